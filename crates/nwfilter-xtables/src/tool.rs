//! The save and restore tools: finding them, running them, understanding what they say.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use nwfilter_rules::ApplyError;

/// A family of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tool {
    Iptables,
    Ip6tables,
    Ebtables,
}

impl Tool {
    /// In the order in which they are committed: a port's Ethernet part last, because it is the one that stops
    /// everything until a new port's rules are in.
    pub(crate) const ALL: [Tool; 3] = [Tool::Iptables, Tool::Ip6tables, Tool::Ebtables];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Tool::Iptables => "iptables",
            Tool::Ip6tables => "ip6tables",
            Tool::Ebtables => "ebtables",
        }
    }

    /// Whether a restore text ends each table with COMMIT.
    pub(crate) fn commits(self) -> bool {
        self != Tool::Ebtables
    }
}

/// A table that holds rules of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TableId {
    IptablesRaw,
    IptablesFilter,
    Ip6tablesRaw,
    Ip6tablesFilter,
    EbtablesNat,
}

impl TableId {
    pub(crate) const ALL: [TableId; 5] = [
        TableId::IptablesRaw,
        TableId::IptablesFilter,
        TableId::Ip6tablesRaw,
        TableId::Ip6tablesFilter,
        TableId::EbtablesNat,
    ];

    pub(crate) fn tool(self) -> Tool {
        match self {
            TableId::IptablesRaw | TableId::IptablesFilter => Tool::Iptables,
            TableId::Ip6tablesRaw | TableId::Ip6tablesFilter => Tool::Ip6tables,
            TableId::EbtablesNat => Tool::Ebtables,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            TableId::IptablesRaw | TableId::Ip6tablesRaw => "raw",
            TableId::IptablesFilter | TableId::Ip6tablesFilter => "filter",
            TableId::EbtablesNat => "nat",
        }
    }
}

/// What `TOOL-save` says.
pub(crate) fn save(tool: Tool) -> Result<String, ApplyError> {
    let program = format!("{}-save", tool.name());
    let output = run(&program, &[], None)?;
    if !output.status.success() {
        return Err(failure(program, &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Why a restore was refused.
pub(crate) struct Refusal {
    /// The line of the input, counted from 1, where the tool names one.
    pub(crate) line: Option<usize>,
    /// What it said.
    pub(crate) message: String,
}

/// Feeds a text to `TOOL-restore --noflush`: one transaction for each table in it.
pub(crate) fn restore(tool: Tool, text: &str) -> Result<Result<(), Refusal>, ApplyError> {
    let program = format!("{}-restore", tool.name());
    // Wait for another process that holds the lock of the legacy variant; the nf_tables one needs none.
    let wait: &[&str] = if tool == Tool::Ebtables { &["--noflush"] } else { &["--noflush", "--wait"] };
    let output = run(&program, wait, Some(text))?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(Err(Refusal { line: refused_line(&message), message: essence(&message) }))
}

/// Runs a program with nothing but its arguments and its input.
pub(crate) fn run(program: &str, args: &[&str], input: Option<&str>) -> Result<Output, ApplyError> {
    let cannot = |error: std::io::Error| {
        let why = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "not found: install it (packages iptables and ebtables)".to_owned()
            }
            _ => error.to_string(),
        };
        ApplyError::Tool { tool: program.to_owned(), why }
    };
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    // The tools read all of their input before they write anything but a line of error, so this cannot block.
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        match stdin.write_all(input.as_bytes()) {
            // A tool that refuses a line stops reading; what it says about it comes below.
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(cannot(error)),
            _ => drop(stdin),
        }
    }
    child.wait_with_output().map_err(cannot)
}

fn failure(program: String, output: &Output) -> ApplyError {
    ApplyError::Tool { tool: program, why: essence(&String::from_utf8_lossy(&output.stderr)) }
}

/// The line a tool's message is about: "Error occurred at line: 3", "line 3 failed", "line 3: RULE_APPEND failed".
fn refused_line(message: &str) -> Option<usize> {
    message.lines().find_map(|line| {
        let after = &line[line.find("line")? + "line".len()..];
        let digits = after.trim_start_matches([':', ' ']);
        let end = digits.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end].parse().ok()
    })
}

/// A tool's message without its name, the advice to read its help, and line numbers of a text nobody sees.
fn essence(message: &str) -> String {
    const NOISE: [&str; 3] = ["Try `", "Error occurred at line", "# Warning"];
    let lines = message.lines().map(str::trim);
    let lines = lines.filter(|line| !NOISE.iter().any(|noise| line.starts_with(noise)));
    let stripped =
        lines.map(|line| match line.split_once("(nf_tables): ").or_else(|| line.split_once("(legacy): ")) {
            Some((_, said)) => said.trim(),
            None if line.ends_with("(nf_tables):") || line.ends_with("(legacy):") => "",
            None => line,
        });
    let said: Vec<_> = stripped.filter(|line| !line.is_empty()).collect();
    if said.is_empty() { "it failed without a reason".to_owned() } else { said.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_line_is_found_in_each_way_the_tools_name_it() {
        for (message, expected) in [
            (
                "iptables-restore v1.8.9 (nf_tables): Set x doesn't exist.\n\nError occurred at line: 3\n",
                Some(3),
            ),
            (
                "ebtables-restore v1.8.9 (nf_tables): \nline 5: CHAIN_DEL failed (Device or resource busy)",
                Some(5),
            ),
            ("iptables-restore: line 12 failed: Bad rule", Some(12)),
            ("something else", None),
        ] {
            assert_eq!(refused_line(message), expected, "{message}");
        }
    }

    #[test]
    fn the_essence_of_a_message_is_what_the_tool_complains_about() {
        let message = "iptables-restore v1.8.9 (nf_tables): Set x doesn't exist.\n\nError occurred at line: 3\n\
                       Try `iptables-restore -h' or 'iptables-restore --help' for more information.\n";
        assert_eq!(essence(message), "Set x doesn't exist.");
    }
}
