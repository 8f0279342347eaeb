//! Finds and runs the save and restore tools, and parses their messages.

use std::collections::VecDeque;
use std::fmt;
use std::process::Output;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nwfilter_rules::{ApplyError, KernelObject, Scope};

use crate::process::{self, Failure};

/// How long a tool may take. A thousand ports take less than a second; the limit is for a tool that waits for a lock.
const PATIENCE: Duration = Duration::from_secs(60);

/// A family of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tool {
    Iptables,
    Ip6tables,
    Ebtables,
}

impl Tool {
    /// In the order of commits: ebtables last, because a new port's guard there drops everything until the port's rules are
    /// in.
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

/// A table of this backend.
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

    /// Its name for users.
    pub(crate) fn label(self) -> &'static str {
        match self {
            TableId::IptablesRaw => "iptables raw",
            TableId::IptablesFilter => "iptables",
            TableId::Ip6tablesRaw => "ip6tables raw",
            TableId::Ip6tablesFilter => "ip6tables",
            TableId::EbtablesNat => "ebtables",
        }
    }

    /// A chain of it.
    pub(crate) fn chain(self, chain: &str) -> KernelObject {
        KernelObject::Chain { table: self.label().to_owned(), chain: chain.to_owned() }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            TableId::IptablesRaw | TableId::Ip6tablesRaw => "raw",
            TableId::IptablesFilter | TableId::Ip6tablesFilter => "filter",
            TableId::EbtablesNat => "nat",
        }
    }
}

/// The output of `TOOL-save`.
pub(crate) fn save(tool: Tool) -> Result<String, ApplyError> {
    require(tool)?;
    let program = format!("{}-save", tool.name());
    let output = run(&program, &[], None)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let unreadable = message.contains("Parsing nftables rule failed");
        return Err(if unreadable { not_readable(program, tool, None) } else { failure(program, &output) });
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut ours = TableId::ALL.into_iter().filter(|table| table.tool() == tool);
    match ours.find(|table| text.contains(&format!("# Table `{}' is incompatible", table.name()))) {
        Some(table) => Err(not_readable(program, tool, Some(table))),
        None => Ok(text),
    }
}

/// The error for a table with a rule that the tool cannot show, which only nft and programs like it can make. The tool then
/// shows none of the table's rules: taken for an empty table, the chains of all ports would be made anew for those of a batch.
fn not_readable(program: String, tool: Tool, table: Option<TableId>) -> ApplyError {
    let family = match tool {
        Tool::Iptables => "ip",
        Tool::Ip6tables => "ip6",
        Tool::Ebtables => "bridge",
    };
    let (whose, list) = match table {
        Some(table) => {
            (format!("table {}", table.name()), format!("nft -a list table {family} {}", table.name()))
        }
        None => ("a table".to_owned(), format!("nft -a list ruleset {family}")),
    };
    let name = tool.name();
    let why = format!(
        "{whose} has a rule that {name} cannot read, and nothing is changed beside it: find it with '{list}', \
         delete it, and have the program that made it use a table of its own"
    );
    unavailable(program, why)
}

/// The rules of one chain as `TOOL-save` prints them. `None` if listing it would change it.
pub(crate) fn list(table: TableId, chain: &str) -> Result<Option<Vec<String>>, ApplyError> {
    // Listing a user chain makes ebtables rewrite the rule for the chain's policy.
    if table == TableId::EbtablesNat && !["PREROUTING", "POSTROUTING"].contains(&chain) {
        return Ok(None);
    }
    let tool = table.tool();
    let option = if tool == Tool::Ebtables { "-L" } else { "-S" };
    let output = run(tool.name(), &["-t", table.name(), option, chain], None)?;
    if !output.status.success() {
        return Err(failure(tool.name().to_owned(), &output));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let rule = |line: &str| match tool {
        // A heading with the table and the chain comes first.
        Tool::Ebtables => line.starts_with(['-', '!']).then(|| line.trim_end().to_owned()),
        Tool::Iptables | Tool::Ip6tables => {
            let rule = line.strip_prefix("-A ")?.strip_prefix(chain)?.strip_prefix(' ')?;
            Some(rule.trim_end().to_owned())
        }
    };
    Ok(Some(text.lines().filter_map(rule).collect()))
}

/// Why a restore was refused.
pub(crate) struct Refusal {
    /// The line of the input, counted from 1, where the tool names one.
    pub(crate) line: Option<usize>,
    /// The tool's message.
    pub(crate) message: String,
}

/// Feeds a text to `TOOL-restore --noflush`: one transaction for each table in it.
pub(crate) fn restore(tool: Tool, text: &str) -> Result<Result<(), Refusal>, ApplyError> {
    let program = format!("{}-restore", tool.name());
    // -w waits for the lock of the legacy variant; the nf_tables one has none.
    let wait: &[&str] = if tool == Tool::Ebtables { &["--noflush"] } else { &["--noflush", "--wait"] };
    let output = run(&program, wait, Some(text))?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(Err(Refusal { line: refused_line(&message), message: essence(&message) }))
}

/// Runs a program with these arguments and this input.
pub(crate) fn run(program: &str, args: &[&str], input: Option<&str>) -> Result<Output, ApplyError> {
    process::run(PATIENCE, program, args, input, remember).map_err(|failure| {
        let why = match failure {
            Failure::NotFound if program == "ipset" => format!("{failure}: install it (package ipset)"),
            Failure::NotFound => format!("{failure}: install it (packages iptables and ebtables)"),
            _ => failure.to_string(),
        };
        unavailable(program.to_owned(), why)
    })
}

/// The programs that this process started, each with the time, kept for as long as a tool may take.
static STARTED: Mutex<VecDeque<(u32, Instant)>> = Mutex::new(VecDeque::new());

fn remember(process: u32) {
    let (mut started, now) = (STARTED.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
    while started.front().is_some_and(|(_, then)| now.duration_since(*then) > PATIENCE) {
        started.pop_front();
    }
    started.push_back((process, now));
}

/// Whether this process started a program with this id a short time ago.
pub(crate) fn is_ours(process: u32) -> bool {
    let started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    started.iter().any(|(known, then)| *known == process && then.elapsed() <= PATIENCE)
}

fn failure(program: String, output: &Output) -> ApplyError {
    unavailable(program, essence(&String::from_utf8_lossy(&output.stderr)))
}

/// The error for a tool that is missing, cannot be run, or refuses everything.
pub(crate) fn unavailable(what: String, why: String) -> ApplyError {
    ApplyError::Unavailable { scope: Scope::Everything, what, why }
}

/// The line that a message names: "Error occurred at line: 3", "line 3 failed", "line 3: RULE_APPEND failed". Of several,
/// the first: it makes the tool refuse the others.
fn refused_line(message: &str) -> Option<usize> {
    message.lines().find_map(|line| line_number(line).map(|(number, _)| number))
}

/// The number after the word "line", and the text after the number.
fn line_number(text: &str) -> Option<(usize, &str)> {
    let after = &text[text.find("line")? + "line".len()..];
    let digits = after.trim_start_matches([':', ' ']);
    let end = digits.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    Some((digits[..end].parse().ok()?, &digits[end..]))
}

/// A tool's message without its name, its advice to read the help, and line numbers of the restore text. If it names
/// several refused lines, only the first is kept.
fn essence(message: &str) -> String {
    const NOISE: [&str; 4] = ["Try `", "Error occurred at line", "# Warning", "Warning: "];
    let mut said = Vec::new();
    let mut of_line = None;
    for line in
        message.lines().map(str::trim).filter(|line| !NOISE.iter().any(|noise| line.starts_with(noise)))
    {
        let line = match line.split_once("(nf_tables): ").or_else(|| line.split_once("(legacy): ")) {
            Some((_, said)) => said.trim(),
            None if line.ends_with("(nf_tables):") || line.ends_with("(legacy):") => "",
            None => line,
        };
        let line = match line_number(line).filter(|_| line.starts_with("line ")) {
            Some((number, rest)) if of_line.is_none_or(|first| first == number) => {
                of_line = Some(number);
                // "RULE_APPEND failed (Invalid argument): rule in chain FI-vnet0": the error shows the chain elsewhere.
                let rest = rest.trim_start_matches([':', ' ']);
                rest.split_once("): ").map_or(rest, |(failed, _)| &rest[..=failed.len()])
            }
            Some(_) => "",
            None => line,
        };
        if !line.is_empty() && !said.contains(&line) {
            said.push(line);
        }
    }
    if said.is_empty() { "it failed without a reason".to_owned() } else { said.join("; ") }
}

// ---- versions ----

/// The version and variant of a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    number: [u16; 3],
    variant: Variant,
}

/// The kernel interface that a tool uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Variant {
    NfTables,
    Legacy,
}

/// The first version whose restore tools apply a part of a table (`--noflush`) as one transaction in both variants.
const OLDEST: [u16; 3] = [1, 8, 0];

/// Whether a tool is the legacy variant.
pub(crate) fn is_legacy(tool: Tool) -> Result<bool, ApplyError> {
    Ok(require(tool)?.variant == Variant::Legacy)
}

/// Refuses a tool that is missing or too old. A process checks each tool once.
fn require(tool: Tool) -> Result<Version, ApplyError> {
    static FOUND: [OnceLock<Version>; 3] = [const { OnceLock::new() }; 3];
    let found = &FOUND[tool as usize];
    if let Some(version) = found.get() {
        return Ok(*version);
    }
    let said = run(tool.name(), &["--version"], None)?;
    let version = check_version(tool, &String::from_utf8_lossy(&said.stdout))?;
    log::debug!("{} {version}", tool.name());
    // Another thread may have checked at the same time; the result is the same.
    Ok(*found.get_or_init(|| version))
}

fn check_version(tool: Tool, said: &str) -> Result<Version, ApplyError> {
    let refused = |why: String| Err(unavailable(tool.name().to_owned(), why));
    let Some(version) = Version::parse(said) else {
        return refused(format!("its version cannot be told from '{}'", said.trim()));
    };
    if version.variant == Variant::Legacy && tool == Tool::Ebtables {
        return refused(format!(
            "this is the legacy variant ({version}), and the nf_tables one is needed: \
             update-alternatives --set ebtables /usr/sbin/ebtables-nft"
        ));
    }
    if version.number < OLDEST {
        let [major, minor, _] = OLDEST;
        return refused(format!("version {version} is too old: {major}.{minor} or newer is needed"));
    }
    Ok(version)
}

impl Version {
    /// Parses "iptables v1.8.9 (nf_tables)" and "ebtables 1.8.9 (nf_tables)". A tool that names no variant is older than the
    /// second one.
    fn parse(said: &str) -> Option<Self> {
        let number = said.split_ascii_whitespace().nth(1)?;
        let mut parts = number.strip_prefix('v').unwrap_or(number).split('.').map(str::parse);
        let mut part = || parts.next().map_or(Some(0), Result::ok);
        let number = [part()?, part()?, part()?];
        let variant = if said.contains("(nf_tables)") { Variant::NfTables } else { Variant::Legacy };
        Some(Self { number, variant })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.number;
        let variant = match self.variant {
            Variant::NfTables => "nf_tables",
            Variant::Legacy => "legacy",
        };
        write!(f, "{major}.{minor}.{patch} ({variant})")
    }
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

    #[test]
    fn a_refused_commit_reports_its_first_refused_rule() {
        let message = "iptables-restore v1.8.9 (nf_tables): \n\
                       line 4: RULE_APPEND failed (Invalid argument): rule in chain FI-vnet0\n\
                       line 5: RULE_APPEND failed (No such file or directory): rule in chain FO-vnet0\n";
        assert_eq!(refused_line(message), Some(4));
        assert_eq!(essence(message), "RULE_APPEND failed (Invalid argument)");
    }

    #[test]
    fn a_missing_tool_is_reported_as_missing() {
        let error = run("no-such-tool-save", &[], None).unwrap_err();
        assert!(error.to_string().contains("not found in /usr/local/sbin:"), "{error}");
        assert!(error.to_string().contains("install it"), "{error}");
    }

    #[test]
    fn a_tool_that_is_too_old_or_of_the_wrong_variant_is_refused_with_advice() {
        for (tool, said, expected) in [
            (Tool::Iptables, "iptables v1.8.9 (nf_tables)\n", Ok("1.8.9 (nf_tables)")),
            (Tool::Ip6tables, "ip6tables v1.8.10 (legacy)\n", Ok("1.8.10 (legacy)")),
            (Tool::Ebtables, "ebtables 1.8.9 (nf_tables)\n", Ok("1.8.9 (nf_tables)")),
            (Tool::Iptables, "iptables v1.6.2\n", Err("1.6.2 (legacy) is too old: 1.8 or newer")),
            (
                Tool::Ebtables,
                "ebtables v2.0.11 (legacy) (December 2011)\n",
                Err("--set ebtables /usr/sbin/ebtables-nft"),
            ),
            (Tool::Iptables, "", Err("cannot be told")),
        ] {
            match (check_version(tool, said), expected) {
                (Ok(version), Ok(expected)) => assert_eq!(version.to_string(), expected),
                (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
                (found, _) => panic!("{said}: {found:?}"),
            }
        }
    }
}
