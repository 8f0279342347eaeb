//! The filter tables of a host as text that compares equal when the rules are equal.

use std::collections::BTreeMap;
use std::fmt::Write;

/// One of the three tools whose rules a [`Saved`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `ebtables-save`
    Ebtables,
    /// `iptables-save`
    Iptables,
    /// `ip6tables-save`
    Ip6tables,
}

impl Tool {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ebtables, Self::Iptables, Self::Ip6tables];

    /// The name of the program, such as `ebtables`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebtables => "ebtables",
            Self::Iptables => "iptables",
            Self::Ip6tables => "ip6tables",
        }
    }
}

/// The filter tables of a host, normalised.
///
/// Comments, timestamps, counters and `COMMIT` are left out, and so are built-in chains that only
/// accept and tables without anything else: they differ merely by which tool ran before. Tables
/// and chains are in the order of their names, a chain's rules in their own.
///
/// ```
/// # use nwfilter_testlab::{Saved, Tool};
/// let before = Saved::parse("", "*filter\n:INPUT ACCEPT [3:180]\nCOMMIT\n", "");
/// assert_eq!(before, Saved::default());
/// let after = Saved::parse("", "*filter\n:FI-vnet0 - [0:0]\n-A FI-vnet0 -j DROP\nCOMMIT\n", "");
/// assert_eq!(after.table(Tool::Iptables, "filter"), [":FI-vnet0 -", "-A FI-vnet0 -j DROP"]);
/// assert_eq!(
///     before.diff(&after).as_deref(),
///     Some("--- iptables\n+ *filter\n+ :FI-vnet0 -\n+ -A FI-vnet0 -j DROP\n")
/// );
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// The rules `ebtables-save` prints.
    pub ebtables: String,
    /// The rules `iptables-save` prints.
    pub iptables: String,
    /// The rules `ip6tables-save` prints.
    pub ip6tables: String,
}

impl Saved {
    /// Normalises the output of `ebtables-save`, `iptables-save` and `ip6tables-save`.
    pub fn parse(ebtables: &str, iptables: &str, ip6tables: &str) -> Self {
        Self { ebtables: normal(ebtables), iptables: normal(iptables), ip6tables: normal(ip6tables) }
    }

    /// The rules of one tool.
    pub fn of(&self, tool: Tool) -> &str {
        match tool {
            Tool::Ebtables => &self.ebtables,
            Tool::Iptables => &self.iptables,
            Tool::Ip6tables => &self.ip6tables,
        }
    }

    /// The lines of one table, such as `raw`, without its `*raw` line.
    pub fn table(&self, tool: Tool, table: &str) -> Vec<String> {
        let mut tables = tables(self.of(tool));
        tables.remove(table).unwrap_or_default().into_iter().map(Into::into).collect()
    }

    /// Whether nothing is filtered.
    pub fn is_empty(&self) -> bool {
        Tool::ALL.iter().all(|&tool| self.of(tool).is_empty())
    }

    /// Only the chains of one port and the rules that lead to them.
    pub fn port(&self, port: &str) -> Self {
        let only = |text: &str| {
            let keep = |line: &&str| line.split([' ', ':']).any(|word| concerns(word, port));
            let kept = tables(text)
                .into_iter()
                .map(|(table, lines)| (table, lines.into_iter().filter(keep).collect()))
                .collect();
            join(&kept)
        };
        Self {
            ebtables: only(&self.ebtables),
            iptables: only(&self.iptables),
            ip6tables: only(&self.ip6tables),
        }
    }

    /// The lines only here (`-`) and only in `other` (`+`), under the tool they belong to, or
    /// `None` when there are none.
    pub fn diff(&self, other: &Self) -> Option<String> {
        let mut text = String::new();
        for tool in Tool::ALL {
            let lines = |saved: &Self| saved.of(tool).lines().map(String::from).collect::<Vec<_>>();
            let changes = changes(&lines(self), &lines(other));
            if !changes.is_empty() {
                let _ = write!(text, "--- {}\n{changes}", tool.name());
            }
        }
        (!text.is_empty()).then_some(text)
    }
}

const BUILT_IN: [&str; 6] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "BROUTING"];

type Tables<'a> = BTreeMap<&'a str, Vec<&'a str>>;

fn normal(text: &str) -> String {
    let mut tables = tables(text);
    for lines in tables.values_mut() {
        lines.retain(|line| !accepts_only(line));
        // The sort is stable: a chain's rules stay in order.
        lines.sort_by_key(|line| (line.starts_with("-A "), chain(line)));
    }
    join(&tables)
}

/// The lines of each table, without comments, counters and `COMMIT`.
fn tables(text: &str) -> Tables<'_> {
    let mut tables = Tables::new();
    let mut current = "";
    for line in text.lines().map(str::trim) {
        if let Some(table) = line.strip_prefix('*') {
            current = table;
        } else if let Some((declaration, _counters)) = line.strip_prefix(':').and(line.split_once(" [")) {
            tables.entry(current).or_default().push(declaration);
        } else if line.starts_with([':', '-']) {
            tables.entry(current).or_default().push(line);
        }
    }
    tables
}

fn join(tables: &Tables<'_>) -> String {
    let mut text = String::new();
    for (table, lines) in tables.iter().filter(|(_, lines)| !lines.is_empty()) {
        let _ = writeln!(text, "*{table}");
        for line in lines {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

/// The chain that a line declares or adds a rule to.
fn chain(line: &str) -> &str {
    let rest = line.strip_prefix(':').or_else(|| line.strip_prefix("-A ")).unwrap_or(line);
    rest.split(' ').next().unwrap_or(rest)
}

fn accepts_only(line: &str) -> bool {
    line.starts_with(':') && line.ends_with(" ACCEPT") && BUILT_IN.contains(&chain(line))
}

/// Whether a word is the port or one of its chains, as libvirt names them: `I` and `O` are what
/// the guest sends and gets, and `J` and `P` stand for them while a filter is being replaced.
fn concerns(word: &str, port: &str) -> bool {
    let prefixes =
        ["libvirt-I-", "libvirt-O-", "libvirt-J-", "libvirt-P-", "FI-", "FO-", "HI-", "FJ-", "FP-", "HJ-"];
    let is_root = |prefix: &&str| word.strip_prefix(*prefix) == Some(port);
    let is_sub_chain = |prefix: &&str| {
        let rest = word.strip_prefix(*prefix).and_then(|rest| rest.strip_prefix(port));
        rest.is_some_and(|rest| rest.starts_with('-'))
    };
    word == port || prefixes.iter().any(is_root) || ["I-", "O-", "J-", "P-"].iter().any(is_sub_chain)
}

/// The changed lines between two texts, by their longest common subsequence.
fn changes(old: &[String], new: &[String]) -> String {
    let prefix = old.iter().zip(new).take_while(|(a, b)| a == b).count();
    let (old, new) = (&old[prefix..], &new[prefix..]);

    // common[i][j] is the length of the longest common subsequence of old[i..] and new[j..].
    let mut common = vec![vec![0_u32; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }

    let mut text = String::new();
    let (mut i, mut j) = (0, 0);
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[i + 1][j] >= common[i][j + 1]) {
            let _ = writeln!(text, "- {}", old[i]);
            i += 1;
        } else {
            let _ = writeln!(text, "+ {}", new[j]);
            j += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "# Generated\n*nat\n:PREROUTING ACCEPT\n:OUTPUT DROP\n:libvirt-I-tap1 ACCEPT\n\
        :I-tap1-mac RETURN\n:libvirt-I-tap10 ACCEPT\n-A libvirt-I-tap1 -j I-tap1-mac\n\
        -A libvirt-I-tap1 -j ACCEPT\n-A PREROUTING -i tap1 -j libvirt-I-tap1\n\
        -A PREROUTING -i tap10 -j libvirt-I-tap10\n-A libvirt-I-tap10 -j DROP\n# Completed\n\
        *broute\n:BROUTING ACCEPT\n*filter\n:INPUT ACCEPT\n-A INPUT -i tap1 -j DROP\n";

    #[test]
    fn what_does_not_filter_is_left_out() {
        let saved = Saved::parse(SAVED, "", "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n");
        assert_eq!(
            saved.ebtables,
            "*filter\n-A INPUT -i tap1 -j DROP\n*nat\n:I-tap1-mac RETURN\n:OUTPUT DROP\n\
             :libvirt-I-tap1 ACCEPT\n:libvirt-I-tap10 ACCEPT\n\
             -A PREROUTING -i tap1 -j libvirt-I-tap1\n-A PREROUTING -i tap10 -j libvirt-I-tap10\n\
             -A libvirt-I-tap1 -j I-tap1-mac\n-A libvirt-I-tap1 -j ACCEPT\n\
             -A libvirt-I-tap10 -j DROP\n"
        );
        assert_eq!(saved.ip6tables, "");
        assert_eq!(Saved::parse(&saved.ebtables, "", ""), saved);
    }

    #[test]
    fn a_port_has_its_chains_and_not_those_of_a_port_with_a_longer_name() {
        let saved = Saved::parse(SAVED, "", "");
        assert_eq!(
            saved.port("tap10").ebtables,
            "*nat\n:libvirt-I-tap10 ACCEPT\n-A PREROUTING -i tap10 -j libvirt-I-tap10\n\
             -A libvirt-I-tap10 -j DROP\n"
        );
        assert!(!saved.port("tap1").ebtables.contains("tap10"));
        assert_eq!(saved.port("tap1").ebtables.lines().count(), 8);
        assert!(saved.port("tap2").is_empty());
    }

    #[test]
    fn a_diff_names_the_tool_and_the_changed_lines() {
        let before = Saved::parse("", "*raw\n-A A -j 1\n-A A -j 2\n-A A -j 3\n", "");
        let after = Saved::parse("", "*raw\n-A A -j 1\n-A A -j 4\n-A A -j 3\n-A A -j 5\n", "");
        let diff = "--- iptables\n- -A A -j 2\n+ -A A -j 4\n+ -A A -j 5\n";
        assert_eq!(before.diff(&after).as_deref(), Some(diff));
        assert_eq!(before.diff(&before), None);
        assert_eq!(before.table(Tool::Iptables, "raw").len(), 3);
    }
}
