//! What has to be written to a table so that ports are as desired, and how it is undone.
//!
//! A plan is made from what the table holds and touches only what differs: chains of ports that change, the
//! dispatch rules that lead to them, and our base chains where they are missing. Everything else in the table is
//! somebody else's.

use std::collections::{BTreeMap, BTreeSet};

use nwfilter_rules::{Difference, DifferenceKind, Origin};
use nwfilter_xml::PortDev;

use crate::render::{FROM_GUEST, FROM_GUEST_POST, HELPERS, PortTable, TO_GUEST, TO_HOST};
use crate::saved::{SavedTable, canonical};
use crate::tool::{TableId, Tool};

/// The base chains of a table, and the built-in chain that must start with a jump to each.
fn hooks(table: TableId) -> &'static [(&'static str, &'static [&'static str])] {
    match table {
        TableId::IptablesFilter | TableId::Ip6tablesFilter => {
            &[("FORWARD", &[FROM_GUEST, TO_GUEST, FROM_GUEST_POST]), ("INPUT", &[TO_HOST])]
        }
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &[("PREROUTING", &[HELPERS]), ("OUTPUT", &[HELPERS])],
        TableId::EbtablesNat => &[],
    }
}

/// A change to a chain that other rules live in too.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Edit {
    Append { chain: String, rule: String },
    Insert { chain: String, position: usize, rule: String },
    Delete { chain: String, rule: String },
}

impl Edit {
    fn inverse(&self) -> Edit {
        match self.clone() {
            Edit::Append { chain, rule } | Edit::Insert { chain, rule, .. } => Edit::Delete { chain, rule },
            Edit::Delete { chain, rule } => Edit::Append { chain, rule },
        }
    }

    fn text(&self) -> String {
        match self {
            Edit::Append { chain, rule } => format!("-A {chain} {rule}"),
            Edit::Insert { chain, position, rule } => format!("-I {chain} {position} {rule}"),
            Edit::Delete { chain, rule } => format!("-D {chain} {rule}"),
        }
    }
}

/// A rule with the port and the filter's rule it belongs to.
#[derive(Clone, Debug)]
pub(crate) struct Blame {
    pub(crate) port: PortDev,
    pub(crate) origin: Origin,
}

/// A chain before and after; `None` where it does not exist.
#[derive(Clone, Debug)]
struct ChainChange {
    before: Option<Vec<String>>,
    after: Option<Vec<String>>,
    /// For each rule of `after`.
    blame: Vec<Blame>,
}

/// The changes to one table.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    table: TableId,
    chains: BTreeMap<String, ChainChange>,
    edits: Vec<Edit>,
    /// The ports that change.
    pub(crate) changed: BTreeSet<PortDev>,
}

/// What the ports of a batch must have in one table; `None` where nothing of a port may be left.
pub(crate) type Wanted<'a> = BTreeMap<&'a PortDev, Option<&'a PortTable>>;

impl Plan {
    /// The changes that bring `saved` to what is wanted.
    pub(crate) fn new(table: TableId, saved: &SavedTable, wanted: &Wanted<'_>) -> Self {
        let mut plan = Self { table, chains: BTreeMap::new(), edits: Vec::new(), changed: BTreeSet::new() };
        for (port, wanted) in wanted {
            plan.port(saved, port, *wanted);
        }
        if wanted.values().any(|wanted| wanted.is_some_and(|wanted| !wanted.dispatch.is_empty())) {
            plan.base_chains(saved);
        }
        plan
    }

    /// The tool that commits it.
    pub(crate) fn tool(&self) -> Tool {
        self.table.tool()
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.edits.is_empty()
    }

    fn port(&mut self, saved: &SavedTable, port: &PortDev, wanted: Option<&PortTable>) {
        const NOTHING: &PortTable = &PortTable { chains: BTreeMap::new(), dispatch: Vec::new() };
        let wanted = wanted.unwrap_or(NOTHING);
        let tool = self.table.tool();
        let before = (self.chains.len(), self.edits.len());
        for (name, lines) in &wanted.chains {
            let held = saved.get(name);
            let same = held.is_some_and(|held| {
                held.len() == lines.len()
                    && held
                        .iter()
                        .zip(lines)
                        .all(|(held, line)| canonical(tool, held) == canonical(tool, &line.text))
            });
            if !same {
                let after = Some(lines.iter().map(|line| line.text.clone()).collect());
                let blame =
                    lines.iter().map(|line| Blame { port: port.clone(), origin: line.origin.clone() });
                let change = ChainChange { before: held.cloned(), after, blame: blame.collect() };
                self.chains.insert(name.clone(), change);
            }
        }
        for name in owned_chains(self.table, saved, port) {
            if !wanted.chains.contains_key(&name) {
                let before = saved.get(&name).cloned();
                self.chains.insert(name, ChainChange { before, after: None, blame: Vec::new() });
            }
        }
        self.dispatch(saved, port, wanted);
        if (self.chains.len(), self.edits.len()) != before {
            self.changed.insert(port.clone());
        }
    }

    /// Makes each wanted dispatch rule stand once, and takes away the port's others.
    fn dispatch(&mut self, saved: &SavedTable, port: &PortDev, wanted: &PortTable) {
        let tool = self.table.tool();
        let mut missing: Vec<_> = wanted.dispatch.iter().collect();
        for chain in dispatch_chains(self.table) {
            for held in
                saved.get(*chain).into_iter().flatten().filter(|rule| dispatches(self.table, rule, port))
            {
                let matching = missing.iter().position(|(in_chain, rule)| {
                    in_chain == chain && canonical(tool, rule) == canonical(tool, held)
                });
                match matching {
                    Some(index) => drop(missing.remove(index)),
                    None => self.edits.push(Edit::Delete { chain: (*chain).to_owned(), rule: held.clone() }),
                }
            }
        }
        let append =
            |(chain, rule): &(&str, String)| Edit::Append { chain: (*chain).to_owned(), rule: rule.clone() };
        self.edits.extend(missing.into_iter().map(append));
    }

    /// Makes our base chains, and makes the built-in chains start with jumps to them.
    fn base_chains(&mut self, saved: &SavedTable) {
        for (hook, bases) in hooks(self.table) {
            let held = saved.get(*hook).map_or(&[][..], Vec::as_slice);
            let jumps: Vec<_> = bases.iter().map(|base| format!("-j {base}")).collect();
            for base in *bases {
                if !saved.contains_key(*base) {
                    let change = ChainChange { before: None, after: Some(Vec::new()), blame: Vec::new() };
                    self.chains.insert((*base).to_owned(), change);
                }
            }
            let in_place =
                held.len() >= jumps.len() && held.iter().zip(&jumps).all(|(held, jump)| held == jump);
            let repeated = held.iter().filter(|rule| jumps.contains(rule)).count() != jumps.len();
            if in_place && !repeated {
                continue;
            }
            for rule in held.iter().filter(|rule| jumps.contains(rule)) {
                self.edits.push(Edit::Delete { chain: (*hook).to_owned(), rule: rule.clone() });
            }
            for (index, rule) in jumps.into_iter().enumerate() {
                self.edits.push(Edit::Insert { chain: (*hook).to_owned(), position: index + 1, rule });
            }
        }
    }

    /// The plan that takes everything back.
    pub(crate) fn inverse(&self) -> Plan {
        let chains = self.chains.iter().map(|(name, change)| {
            let ChainChange { before, after, .. } = change.clone();
            (name.clone(), ChainChange { before: after, after: before, blame: Vec::new() })
        });
        let edits = self.edits.iter().rev().map(Edit::inverse).collect();
        Plan { table: self.table, chains: chains.collect(), edits, changed: self.changed.clone() }
    }

    /// Adds the table's part of a restore text to `script`.
    pub(crate) fn write(&self, script: &mut Script) {
        let tool = self.table.tool();
        script.line(format!("*{}", self.table.name()));
        let policy = if tool == Tool::Ebtables { "ACCEPT" } else { "- [0:0]" };
        for name in self.chains.keys() {
            script.line(format!(":{name} {policy}"));
        }
        let deletes = self.edits.iter().filter(|edit| matches!(edit, Edit::Delete { .. }));
        deletes.for_each(|edit| script.line(edit.text()));
        for (name, change) in &self.chains {
            for (index, rule) in change.after.iter().flatten().enumerate() {
                script.blamed(format!("-A {name} {rule}"), change.blame.get(index));
            }
        }
        let others = self.edits.iter().filter(|edit| !matches!(edit, Edit::Delete { .. }));
        others.for_each(|edit| script.line(edit.text()));
        for name in self.chains.iter().filter(|(_, change)| change.after.is_none()).map(|(name, _)| name) {
            script.line(format!("-X {name}"));
        }
        if tool.commits() {
            script.line("COMMIT".to_owned());
        }
    }

    /// The plan as differences between the table and what is wanted.
    pub(crate) fn differences(&self) -> Vec<Difference> {
        let tool = self.table.tool();
        let mut found = Vec::new();
        for (name, change) in &self.chains {
            let (before, after) = (change.before.iter().flatten(), change.after.iter().flatten());
            let held: Vec<_> = before.map(|rule| canonical(tool, rule)).collect();
            let wanted: Vec<_> = after.map(|rule| canonical(tool, rule)).collect();
            let mut add = |kind, rule: &str, blame: Option<&Blame>| {
                found.push(Difference {
                    port: blame.map_or_else(|| self.port_of(name), |blame| blame.port.to_string()),
                    tool: tool.name(),
                    chain: name.clone(),
                    kind,
                    rule: rule.to_owned(),
                    origin: blame.map(|blame| blame.origin.to_string()),
                });
            };
            let (only_held, only_wanted) = uncommon(&held, &wanted);
            only_held.into_iter().for_each(|index| add(DifferenceKind::Foreign, &held[index], None));
            for index in only_wanted {
                add(DifferenceKind::Missing, &wanted[index], change.blame.get(index));
            }
        }
        for edit in &self.edits {
            let (kind, chain, rule) = match edit {
                Edit::Delete { chain, rule } => (DifferenceKind::Foreign, chain, rule),
                Edit::Append { chain, rule } | Edit::Insert { chain, rule, .. } => {
                    (DifferenceKind::Missing, chain, rule)
                }
            };
            let port = self.changed.iter().find(|port| dispatches(self.table, rule, port));
            let port = port.map_or("*".to_owned(), ToString::to_string);
            let (chain, rule) = (chain.clone(), rule.clone());
            found.push(Difference { port, tool: tool.name(), chain, kind, rule, origin: None });
        }
        found
    }

    fn port_of(&self, chain: &str) -> String {
        let named = self.changed.iter().filter(|port| chain.contains(port.as_str()));
        named.max_by_key(|port| port.as_str().len()).map_or("*".to_owned(), ToString::to_string)
    }
}

/// A restore text, and for each of its lines whose rule it is.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) text: String,
    blame: Vec<Option<Blame>>,
}

impl Script {
    fn line(&mut self, line: String) {
        self.blamed(line, None);
    }

    fn blamed(&mut self, line: String, blame: Option<&Blame>) {
        self.text.push_str(&line);
        self.text.push('\n');
        self.blame.push(blame.cloned());
    }

    /// The rule on a line, counted from 1, and whose it is.
    pub(crate) fn rule_at(&self, line: usize) -> Option<(&str, &Blame)> {
        let blame = self.blame.get(line.checked_sub(1)?)?.as_ref()?;
        Some((self.text.lines().nth(line - 1)?, blame))
    }
}

/// The chains in which dispatch rules stand.
fn dispatch_chains(table: TableId) -> &'static [&'static str] {
    match table {
        TableId::EbtablesNat => &["PREROUTING", "POSTROUTING"],
        TableId::IptablesFilter | TableId::Ip6tablesFilter => {
            &[FROM_GUEST, TO_GUEST, FROM_GUEST_POST, TO_HOST]
        }
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &[HELPERS],
    }
}

/// Whether a rule of a dispatch chain leads packets of the port into its chains.
fn dispatches(table: TableId, rule: &str, port: &PortDev) -> bool {
    let words: Vec<_> = rule.split_ascii_whitespace().collect();
    let has = |option: &str| words.windows(2).any(|pair| pair[0] == option && pair[1] == port.as_str());
    let target = words.iter().position(|word| matches!(*word, "-j" | "-g")).and_then(|at| words.get(at + 1));
    match table {
        // Only jumps to a chain of the port are ours: the hook is shared with everybody.
        TableId::EbtablesNat => {
            let ours = ["I", "O", "J", "P"].map(|letter| format!("libvirt-{letter}-{port}"));
            (has("-i") || has("-o")) && target.is_some_and(|target| ours.iter().any(|chain| chain == target))
        }
        TableId::IptablesFilter | TableId::Ip6tablesFilter => has("--physdev-in") || has("--physdev-out"),
        TableId::IptablesRaw | TableId::Ip6tablesRaw => {
            target.is_some_and(|t| t.strip_prefix("CT-") == Some(port.as_str()))
        }
    }
}

/// The chains of a table that belong to a port, also those that libvirt uses while it changes one.
fn owned_chains(table: TableId, saved: &SavedTable, port: &PortDev) -> BTreeSet<String> {
    let names: Vec<String> = match table {
        TableId::IptablesFilter | TableId::Ip6tablesFilter => {
            ["FI", "FO", "HI", "FJ", "FP", "HJ"].iter().map(|prefix| format!("{prefix}-{port}")).collect()
        }
        TableId::IptablesRaw | TableId::Ip6tablesRaw => vec![format!("CT-{port}")],
        TableId::EbtablesNat => {
            ["I", "O", "J", "P"].iter().map(|letter| format!("libvirt-{letter}-{port}")).collect()
        }
    };
    let mut owned: BTreeSet<_> = names.into_iter().filter(|name| saved.contains_key(name)).collect();
    // Names of sub-chains are ambiguous (port a-b, chain c; port a, chain b-c), the jumps to them are not.
    let mut waiting: Vec<_> = owned.iter().cloned().collect();
    while let Some(chain) = waiting.pop() {
        for rule in saved.get(&chain).into_iter().flatten() {
            let target = rule.rsplit_once("-j ").map(|(_, target)| target.trim());
            let sub_chain = |target: &&str| {
                ["I", "O", "J", "P"].iter().any(|letter| {
                    target.strip_prefix(letter).and_then(|rest| rest.strip_prefix('-')).is_some_and(|rest| {
                        rest.strip_prefix(port.as_str()).is_some_and(|rest| rest.starts_with('-'))
                    })
                })
            };
            if let Some(target) = target.filter(sub_chain)
                && saved.contains_key(target)
                && owned.insert(target.to_owned())
            {
                waiting.push(target.to_owned());
            }
        }
    }
    owned
}

/// The ports that have chains or dispatch rules in a table.
pub(crate) fn ports(table: TableId, saved: &SavedTable) -> BTreeSet<PortDev> {
    let prefixes: &[&str] = match table {
        TableId::EbtablesNat => &["libvirt-I-", "libvirt-O-"],
        TableId::IptablesFilter | TableId::Ip6tablesFilter => &["FI-", "FO-", "HI-"],
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &["CT-"],
    };
    let names =
        saved.keys().filter_map(|chain| prefixes.iter().find_map(|prefix| chain.strip_prefix(prefix)));
    names.filter_map(|name| name.parse().ok()).collect()
}

/// The indexes of what stands in only one of two lists, both in order, by a longest common subsequence of their
/// middles.
fn uncommon(a: &[String], b: &[String]) -> (Vec<usize>, Vec<usize>) {
    let start = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let (a_mid, b_mid) = (&a[start..], &b[start..]);
    let end = a_mid.iter().rev().zip(b_mid.iter().rev()).take_while(|(a, b)| a == b).count();
    let (a_mid, b_mid) = (&a_mid[..a_mid.len() - end], &b_mid[..b_mid.len() - end]);
    let mut lengths = vec![vec![0usize; b_mid.len() + 1]; a_mid.len() + 1];
    for i in (0..a_mid.len()).rev() {
        for j in (0..b_mid.len()).rev() {
            lengths[i][j] = match a_mid[i] == b_mid[j] {
                true => lengths[i + 1][j + 1] + 1,
                false => lengths[i + 1][j].max(lengths[i][j + 1]),
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let (mut only_a, mut only_b) = (Vec::new(), Vec::new());
    while i < a_mid.len() || j < b_mid.len() {
        if i < a_mid.len() && j < b_mid.len() && a_mid[i] == b_mid[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == b_mid.len() || (i < a_mid.len() && lengths[i + 1][j] >= lengths[i][j + 1]) {
            only_a.push(start + i);
            i += 1;
        } else {
            only_b.push(start + j);
            j += 1;
        }
    }
    (only_a, only_b)
}
