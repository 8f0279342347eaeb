//! Plans the changes of one table, and their inverse.
//!
//! A plan is made from the current table and contains only what differs: chains of ports, the rules that dispatch to
//! them, and missing base chains. It never touches anything else in the table.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use nwfilter_rules::Origin;
use nwfilter_xml::PortDev;

use crate::canonical::same_rules;
use crate::dispatch::{Dispatch, Dispatcher, Layout, dispatchers};
use crate::names::{self, hooks};
use crate::render::{Chains, PortTable};
use crate::saved::SavedTable;
use crate::tool::{TableId, Tool};

/// A change of one rule in a shared chain. Positions are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Edit {
    Append { chain: String, rule: String },
    Insert { chain: String, position: usize, rule: String },
    Delete { chain: String, position: usize, rule: String },
}

impl Edit {
    fn inverse(&self) -> Edit {
        match self.clone() {
            // Nothing needs the position of a rule that goes: it is found by its text.
            Edit::Append { chain, rule } => Edit::Delete { chain, position: 0, rule },
            Edit::Insert { chain, position, rule } => Edit::Delete { chain, position, rule },
            Edit::Delete { chain, position, rule } => Edit::Insert { chain, position, rule },
        }
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Edit::Append { chain, rule } => format!("-A {chain} {rule}"),
            Edit::Insert { chain, position, rule } => format!("-I {chain} {position} {rule}"),
            Edit::Delete { chain, rule, .. } => format!("-D {chain} {rule}"),
        }
    }

    pub(crate) fn chain_and_rule(&self) -> (&str, &str) {
        match self {
            Edit::Append { chain, rule }
            | Edit::Insert { chain, rule, .. }
            | Edit::Delete { chain, rule, .. } => (chain, rule),
        }
    }
}

/// A chain before and after; `None` where it does not exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChainChange {
    pub(crate) before: Option<Vec<String>>,
    pub(crate) after: Option<Vec<String>>,
    /// The port that the chain belongs to; `None` for a shared chain.
    pub(crate) port: Option<PortDev>,
    /// The filter's rule of each rule of `after`, in a port's chain.
    pub(crate) origins: Vec<Origin>,
}

/// The changes to one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) table: TableId,
    pub(crate) chains: BTreeMap<String, ChainChange>,
    /// Deletions from one chain are in the order of their positions.
    pub(crate) edits: Vec<Edit>,
    /// The chain of the first edit as it was before, if the plan has only edits.
    edited: Vec<String>,
    /// The ports that change.
    pub(crate) changed: BTreeSet<PortDev>,
}

/// The desired state of a batch's ports in one table. `None` for a port that goes.
pub(crate) type Wanted<'a> = BTreeMap<&'a PortDev, Option<&'a PortTable>>;

impl Plan {
    /// Plans the changes from `saved` to the desired state.
    pub(crate) fn new(table: TableId, saved: &SavedTable, wanted: &Wanted<'_>, dispatch: Dispatch) -> Self {
        let mut plan = Self::nothing(table);
        for (port, table) in wanted {
            plan.port(saved, port, *table, wanted);
        }
        for dispatcher in dispatchers(table) {
            plan.dispatch(saved, &dispatcher, wanted, dispatch);
        }
        if wanted.values().any(|wanted| wanted.is_some_and(|wanted| !wanted.dispatch.is_empty())) {
            plan.base_chains(saved);
        }
        plan.finished(saved)
    }

    fn nothing(table: TableId) -> Self {
        Self {
            table,
            chains: BTreeMap::new(),
            edits: Vec::new(),
            edited: Vec::new(),
            changed: BTreeSet::new(),
        }
    }

    fn finished(mut self, saved: &SavedTable) -> Self {
        if let Some(edit) = self.edits.first().filter(|_| self.chains.is_empty()) {
            self.edited = saved.get(edit.chain_and_rule().0).cloned().unwrap_or_default();
        }
        self
    }

    /// Plans the removal of every port and of everything that leads to ports. Rules of others stay, and so do base chains that
    /// hold some.
    pub(crate) fn clear(table: TableId, saved: &SavedTable) -> Self {
        let mut plan = Self::nothing(table);
        let ports = names::ports(table, saved);
        let wanted: Wanted<'_> = ports.iter().map(|port| (port, None)).collect();
        for port in &ports {
            plan.port(saved, port, None, &wanted);
        }
        for dispatcher in dispatchers(table) {
            for (name, _) in dispatcher.tree_chains(saved) {
                plan.remove_chain(saved, name.clone(), None);
            }
            plan.edit(saved, &dispatcher, Vec::new(), &BTreeSet::new());
        }
        for (hook, bases) in hooks(table) {
            let held = saved.get(*hook).map_or(&[][..], Vec::as_slice);
            for base in *bases {
                let jump = format!("-j {base}");
                let of_others = |rule: &String| {
                    !dispatchers(table).iter().any(|d| d.chain == *base && d.is_dispatching(rule))
                };
                let Some(rules) = saved.get(*base).filter(|rules| !rules.iter().any(of_others)) else {
                    continue;
                };
                // Emptied by its removal.
                plan.edits.retain(|edit| edit.chain_and_rule().0 != *base);
                let before = Some(rules.clone());
                plan.chains.insert((*base).to_owned(), ChainChange { before, ..ChainChange::default() });
                let jumps = held.iter().enumerate().filter(|(_, rule)| **rule == jump);
                plan.edits.extend(jumps.map(|(index, rule)| Edit::Delete {
                    chain: (*hook).to_owned(),
                    position: index + 1,
                    rule: rule.clone(),
                }));
            }
        }
        plan.edits.sort_by_key(|edit| match edit {
            Edit::Delete { chain, position, .. } => (chain.clone(), *position),
            Edit::Append { chain, .. } | Edit::Insert { chain, .. } => (chain.clone(), 0),
        });
        plan.finished(saved)
    }

    /// The tool that commits it.
    pub(crate) fn tool(&self) -> Tool {
        self.table.tool()
    }

    /// The table it changes.
    pub(crate) fn table(&self) -> TableId {
        self.table
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.edits.is_empty()
    }

    /// Plans the chains of a port.
    fn port(&mut self, saved: &SavedTable, port: &PortDev, table: Option<&PortTable>, of_batch: &Wanted<'_>) {
        const NONE: &Chains = &Chains::new();
        let wanted = table.map_or(NONE, |table| &table.chains);
        let before = self.chains.len();
        for (name, lines) in wanted {
            let held = saved.get(name);
            if !held.is_some_and(|held| self.holds(held, lines.iter().map(|line| line.text.as_str()))) {
                let change = ChainChange {
                    before: held.cloned(),
                    after: Some(lines.iter().map(|line| line.text.clone()).collect()),
                    port: Some(port.clone()),
                    origins: lines.iter().map(|line| line.origin.clone()).collect(),
                };
                self.chains.insert(name.clone(), change);
            }
        }
        let is_wanted = |name: &String, table: Option<&PortTable>| {
            table.is_some_and(|table| table.chains.contains_key(name))
        };
        // What two ports shared goes when the batch leaves it to neither.
        let goes_too =
            |other: &str| other.parse::<PortDev>().is_ok_and(|other| of_batch.contains_key(&other));
        for name in names::owned_chains(self.table, saved, port, goes_too) {
            if !of_batch.values().any(|table| is_wanted(&name, *table)) {
                self.remove_chain(saved, name, Some(port));
            }
        }
        if self.chains.len() != before {
            self.changed.insert(port.clone());
        }
    }

    /// Whether a chain holds exactly these rules.
    fn holds<'a>(&self, held: &[String], rules: impl ExactSizeIterator<Item = &'a str>) -> bool {
        same_rules(self.table.tool(), held.iter().map(String::as_str), rules)
    }

    fn remove_chain(&mut self, saved: &SavedTable, name: String, port: Option<&PortDev>) {
        let before = saved.get(&name).cloned();
        self.chains.insert(name, ChainChange { before, port: port.cloned(), ..ChainChange::default() });
    }

    /// Plans a dispatcher: the ports of the batch get the desired rules, other ports keep theirs.
    fn dispatch(
        &mut self,
        saved: &SavedTable,
        dispatcher: &Dispatcher,
        wanted: &Wanted<'_>,
        dispatch: Dispatch,
    ) {
        let tool = self.table.tool();
        let mut entries = dispatcher.entries(saved);
        for (port, table) in wanted {
            let rules = table.iter().flat_map(|table| &table.dispatch);
            let rules: Vec<_> = rules
                .filter(|(chain, _)| *chain == dispatcher.chain)
                .map(|(_, rule)| rule.as_str())
                .collect();
            let held = entries.get(port.as_str()).map_or(&[][..], Vec::as_slice);
            if same_rules(tool, held.iter().copied(), rules.iter().copied()) {
                continue;
            }
            self.changed.insert((*port).clone());
            match rules.is_empty() {
                true => entries.remove(port.as_str()),
                false => entries.insert(port.as_str(), rules),
            };
        }
        let rules_of = |port: &str| {
            let chain = names::helpers(port);
            let port = port.parse::<PortDev>().ok();
            let wanted = port.and_then(|port| wanted.get(&port).copied().flatten());
            match wanted.and_then(|table| table.chains.get(&chain)) {
                Some(lines) => lines.iter().map(|line| line.text.as_str()).collect(),
                None => saved.get(&chain).into_iter().flatten().map(String::as_str).collect(),
            }
        };
        let Layout { rules, tree } = dispatcher.layout(&entries, (saved, dispatch), rules_of);
        for (name, _) in dispatcher.tree_chains(saved).filter(|(name, _)| !tree.contains_key(*name)) {
            self.remove_chain(saved, name.clone(), None);
        }
        for (name, rules) in tree {
            let before = saved.get(&name);
            if before.is_some_and(|held| self.holds(held, rules.iter().map(String::as_str))) {
                continue;
            }
            // A chain that only gains rules is not replaced: the tool would wait until the kernel has let go of the old.
            match before.and_then(|held| insertions(&name, held, &rules)) {
                Some(insertions) => self.edits.extend(insertions),
                None => {
                    let (before, after) = (before.cloned(), Some(rules));
                    self.chains.insert(name, ChainChange { before, after, ..ChainChange::default() });
                }
            }
        }
        let ports: BTreeSet<_> = entries.keys().copied().collect();
        self.edit(saved, dispatcher, rules, &ports);
    }

    /// Plans the dispatching rules in a dispatcher's chain: each once, before the first rule of others that may accept packets
    /// of ports, and no others of ours. Of a repeated rule the last stays, because a deletion by text takes the first.
    fn edit(
        &mut self,
        saved: &SavedTable,
        dispatcher: &Dispatcher,
        rules: Vec<String>,
        ports: &BTreeSet<&str>,
    ) {
        let chain = || dispatcher.chain.to_owned();
        let mut missing: HashMap<&str, usize> = HashMap::new();
        rules.iter().for_each(|rule| *missing.entry(rule).or_default() += 1);
        let held = saved.get(dispatcher.chain).map_or(&[][..], Vec::as_slice);
        let bypass = held.iter().position(|rule| {
            !dispatcher.is_dispatching(rule) && dispatcher.may_bypass(self.table, saved, rule, ports)
        });
        let bypass = bypass.filter(|_| !rules.is_empty());
        // A deletion by text takes the first of a repeated rule, so one that is out of place takes all of them along.
        let misplaced: BTreeSet<_> = bypass.map(|bypass| held[bypass..].iter().collect()).unwrap_or_default();
        let mut deletions = Vec::new();
        for (index, rule) in held.iter().enumerate().rev().filter(|(_, rule)| dispatcher.is_dispatching(rule))
        {
            let in_place = !misplaced.contains(rule);
            match missing.get_mut(rule.as_str()).filter(|count| in_place && **count > 0) {
                Some(count) => *count -= 1,
                None => {
                    deletions.push(Edit::Delete { chain: chain(), position: index + 1, rule: rule.clone() })
                }
            }
        }
        deletions.reverse();
        let deleted_before = |end: usize| {
            let before = |edit: &&Edit| matches!(edit, Edit::Delete { position, .. } if *position <= end);
            deletions.iter().filter(before).count()
        };
        let mut position = bypass.map(|bypass| bypass + 1 - deleted_before(bypass));
        self.edits.extend(deletions);
        for rule in &rules {
            let Some(count) = missing.get_mut(rule.as_str()).filter(|count| **count > 0) else { continue };
            *count -= 1;
            let (chain, rule) = (chain(), rule.clone());
            self.edits.push(match &mut position {
                Some(position) => {
                    *position += 1;
                    Edit::Insert { chain, position: *position - 1, rule }
                }
                None => Edit::Append { chain, rule },
            });
        }
    }

    /// Plans the base chains, and the jumps to them at the beginning of the built-in chains.
    fn base_chains(&mut self, saved: &SavedTable) {
        for (hook, bases) in hooks(self.table) {
            let held = saved.get(*hook).map_or(&[][..], Vec::as_slice);
            let jumps: Vec<_> = bases.iter().map(|base| format!("-j {base}")).collect();
            for base in *bases {
                if !saved.contains_key(*base) {
                    let change = ChainChange { after: Some(Vec::new()), ..ChainChange::default() };
                    self.chains.insert((*base).to_owned(), change);
                }
            }
            let in_place =
                held.len() >= jumps.len() && held.iter().zip(&jumps).all(|(held, jump)| held == jump);
            let repeated = held.iter().filter(|rule| jumps.contains(rule)).count() != jumps.len();
            if in_place && !repeated {
                continue;
            }
            for (index, rule) in held.iter().enumerate().filter(|(_, rule)| jumps.contains(rule)) {
                let (chain, rule) = ((*hook).to_owned(), rule.clone());
                self.edits.push(Edit::Delete { chain, position: index + 1, rule });
            }
            for (index, rule) in jumps.into_iter().enumerate() {
                self.edits.push(Edit::Insert { chain: (*hook).to_owned(), position: index + 1, rule });
            }
        }
    }

    /// Whether the plan was committed to a table. A commit is all or nothing, so it is enough to look for one change.
    pub(crate) fn is_committed(&self, saved: &SavedTable) -> bool {
        if let Some((name, change)) = self.chains.iter().next() {
            return match (saved.get(name), &change.after) {
                (Some(held), Some(after)) => self.holds(held, after.iter().map(String::as_str)),
                (held, after) => held.is_some() == after.is_some(),
            };
        }
        let edit = self.edits.first();
        edit.is_some_and(|edit| saved.get(edit.chain_and_rule().0) != Some(&self.edited))
    }

    /// Applies the plan to a table in memory.
    pub(crate) fn carry_out(&self, table: &mut SavedTable) {
        for (name, change) in &self.chains {
            match &change.after {
                Some(rules) => drop(table.insert(name.clone(), rules.clone())),
                None => drop(table.remove(name)),
            }
        }
        for edit in self.edits_in_order() {
            let (chain, rule) = edit.chain_and_rule();
            let rules = table.entry(chain.to_owned()).or_default();
            match edit {
                Edit::Append { .. } => rules.push(rule.to_owned()),
                Edit::Insert { position, .. } => {
                    rules.insert((position - 1).min(rules.len()), rule.to_owned())
                }
                Edit::Delete { .. } => {
                    if let Some(index) = rules.iter().position(|held| held == rule) {
                        rules.remove(index);
                    }
                }
            }
        }
    }

    /// The edits in the order of the restore text: deletions, insertions, additions at the end.
    pub(crate) fn edits_in_order(&self) -> impl Iterator<Item = &Edit> {
        // A chain declared above is empty already.
        let deletes = self.edits.iter().filter(|edit| match edit {
            Edit::Delete { chain, .. } => !self.chains.contains_key(chain),
            _ => false,
        });
        // In ascending order each inserted rule stands at its position when all are in.
        let mut inserts: Vec<_> =
            self.edits.iter().filter(|edit| matches!(edit, Edit::Insert { .. })).collect();
        inserts.sort_by_key(|edit| match edit {
            Edit::Insert { chain, position, .. } => (chain, *position),
            Edit::Append { chain, .. } | Edit::Delete { chain, .. } => (chain, usize::MAX),
        });
        let appends = self.edits.iter().filter(|edit| matches!(edit, Edit::Append { .. }));
        deletes.chain(inserts).chain(appends)
    }

    /// The plan that reverts this one.
    pub(crate) fn inverse(&self) -> Plan {
        let chains = self.chains.iter().map(|(name, change)| {
            let ChainChange { before, after, port, .. } = change.clone();
            (name.clone(), ChainChange { before: after, after: before, port, origins: Vec::new() })
        });
        // Rules come back in the order of their positions, so that each finds its place.
        let mut edits: Vec<_> = self.edits.iter().map(Edit::inverse).collect();
        edits.sort_by_key(|edit| match edit {
            Edit::Insert { position, .. } => *position,
            _ => 0,
        });
        let (edited, changed) = (Vec::new(), self.changed.clone());
        Plan { table: self.table, chains: chains.collect(), edits, edited, changed }
    }
}

/// Whether a chain holds rules of ports or leads to them.
pub(crate) fn concerns(table: TableId, chain: &str) -> bool {
    let dispatches = |dispatcher: &Dispatcher| dispatcher.chain == chain || dispatcher.has_in_tree(chain);
    names::concerns(table, chain) || dispatchers(table).iter().any(dispatches)
}

/// The ports that have a chain which drops, but whose packets do not reach it.
pub(crate) fn unreached(table: TableId, saved: &SavedTable, ports: &BTreeSet<PortDev>) -> BTreeSet<PortDev> {
    let hooked = hooks(table).iter().all(|(hook, bases)| {
        let held = saved.get(*hook).map_or(&[][..], Vec::as_slice);
        bases.iter().all(|base| held.contains(&format!("-j {base}")))
    });
    let mut unreached = BTreeSet::new();
    for (dispatcher, chain) in dispatchers(table).iter().zip(names::dispatched(table)) {
        let reached = if hooked { dispatcher.reached(saved) } else { BTreeSet::new() };
        let is_open = |port: &&PortDev| {
            saved.contains_key(&format!("{chain}{port}")) && !reached.contains(port.as_str())
        };
        unreached.extend(ports.iter().filter(is_open).cloned());
    }
    unreached
}

/// The insertions that complete a chain, if all rules it holds are among the desired ones in the same order.
fn insertions(chain: &str, held: &[String], rules: &[String]) -> Option<Vec<Edit>> {
    let mut held = held.iter().peekable();
    let missing = rules.iter().enumerate().filter(|(_, rule)| held.next_if_eq(rule).is_none());
    let insert = |(index, rule): (usize, &String)| Edit::Insert {
        chain: chain.to_owned(),
        position: index + 1,
        rule: rule.clone(),
    };
    let insertions = missing.map(insert).collect();
    held.next().is_none().then_some(insertions)
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;
    use crate::difference::differences;
    use crate::names::{FROM_GUEST, FROM_GUEST_POST, HELPERS};
    use crate::render::{Chains, Line};
    use crate::script::Script;

    const TABLES: [TableId; 3] = [TableId::EbtablesNat, TableId::IptablesFilter, TableId::IptablesRaw];

    /// A restore tool in memory: applies the whole text, or fails at a wrong line.
    fn restored(before: &SavedTable, script: &Script) -> Result<SavedTable, String> {
        let mut table = before.clone();
        let mut declared = BTreeSet::new();
        for line in script.text.lines() {
            let (command, rest) = line.split_at(2.min(line.len()));
            let (chain, rule) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
            let missing = || format!("no chain {chain}: {line}");
            match command {
                _ if line.starts_with('*') || line == "COMMIT" => (),
                _ if line.starts_with(':') => {
                    let name = line[1..].split(' ').next().unwrap_or_default();
                    table.insert(name.to_owned(), Vec::new());
                    declared.insert(name.to_owned());
                }
                "-A" => table.get_mut(chain).ok_or_else(missing)?.push(rule.to_owned()),
                "-I" => {
                    let (position, rule) = rule.split_once(' ').ok_or("no position")?;
                    let rules = table.get_mut(chain).ok_or_else(missing)?;
                    let index = position.parse::<usize>().map_err(|e| e.to_string())? - 1;
                    if index > rules.len() {
                        return Err(format!("beyond the end: {line}"));
                    }
                    rules.insert(index, rule.to_owned());
                }
                "-D" => {
                    let rules = table.get_mut(chain).ok_or_else(missing)?;
                    let at = rules.iter().position(|held| held == rule).ok_or(format!("no rule: {line}"))?;
                    rules.remove(at);
                }
                "-X" => {
                    let jumped_to = table.values().flatten().any(|held| held.ends_with(&format!(" {chain}")));
                    if jumped_to || !table.remove(chain).ok_or_else(missing)?.is_empty() {
                        return Err(format!("in use: {line}"));
                    }
                }
                _ => return Err(format!("unknown: {line}")),
            }
        }
        Ok(table)
    }

    fn committed(plan: &Plan, before: &SavedTable) -> SavedTable {
        let script = Script::of([plan]);
        restored(before, &script).unwrap_or_else(|error| panic!("{error}\n{}\n{before:#?}", script.text))
    }

    /// A port's desired state, made from a few numbers.
    fn port_table(table: TableId, port: &PortDev, rules: &[u8]) -> PortTable {
        let line = |number: &u8| Line {
            text: format!("-s 10.0.0.{number}/32 -j DROP"),
            origin: Origin { filter: None, line: u32::from(*number) },
        };
        let lines: Vec<_> = rules.iter().map(line).collect();
        let jump =
            |chain: &str| Line { text: format!("-j {chain}"), origin: Origin { filter: None, line: 0 } };
        match table {
            TableId::EbtablesNat => {
                let (root, sub) = (format!("libvirt-I-{port}"), format!("I-{port}-arp"));
                PortTable {
                    dispatch: vec![("PREROUTING", format!("-i {port} -j {root}"))],
                    chains: Chains::from([(root, vec![jump(&sub)]), (sub, lines)]),
                }
            }
            TableId::IptablesFilter | TableId::Ip6tablesFilter => PortTable {
                dispatch: vec![
                    (FROM_GUEST, format!("-m physdev --physdev-in {port} -g FI-{port}")),
                    (FROM_GUEST_POST, format!("-m physdev --physdev-in {port} -j ACCEPT")),
                ],
                chains: Chains::from([(format!("FI-{port}"), lines)]),
            },
            TableId::IptablesRaw | TableId::Ip6tablesRaw => PortTable {
                dispatch: vec![(HELPERS, format!("-j CT-{port}"))],
                chains: Chains::from([(format!("CT-{port}"), lines)]),
            },
        }
    }

    /// Ports by number, each with its desired rules; `None` for a port that goes.
    type Wishes = BTreeMap<u8, Option<Vec<u8>>>;

    fn wishes() -> impl Strategy<Value = Wishes> {
        btree_map(0u8..14, proptest::option::of(vec(0u8..4, 0..4)), 0..14)
    }

    fn plan(table: TableId, saved: &SavedTable, wishes: &Wishes) -> Plan {
        let ports: BTreeMap<PortDev, Option<PortTable>> = wishes
            .iter()
            .map(|(number, rules)| {
                let port: PortDev = format!("vnet{number}").parse().unwrap();
                let wanted = rules.as_ref().map(|rules| port_table(table, &port, rules));
                (port, wanted)
            })
            .collect();
        Plan::new(
            table,
            saved,
            &ports.iter().map(|(port, wanted)| (port, wanted.as_ref())).collect(),
            Dispatch::Tree,
        )
    }

    /// A table in which others have rules in the built-in chains.
    fn foreign(table: TableId) -> SavedTable {
        let hooks = match table {
            TableId::EbtablesNat => ["PREROUTING", "POSTROUTING"],
            TableId::IptablesFilter | TableId::Ip6tablesFilter => ["FORWARD", "INPUT"],
            TableId::IptablesRaw | TableId::Ip6tablesRaw => ["PREROUTING", "OUTPUT"],
        };
        let mut saved: SavedTable =
            hooks.iter().map(|hook| ((*hook).to_owned(), vec!["-j theirs".to_owned()])).collect();
        saved.insert("theirs".to_owned(), vec!["-i vnet0 -j ACCEPT".to_owned()]);
        saved
    }

    proptest! {
        #[test]
        fn a_plan_brings_a_table_to_what_is_wanted_and_its_inverse_brings_it_back(
            (table, first, second, disorder) in (prop::sample::select(&TABLES[..]), wishes(), wishes(), 0usize..3)
        ) {
            let mut before = committed(&plan(table, &foreign(table), &first), &foreign(table));
            // Others put a rule before our jumps, or somebody repeats a rule of ours.
            match disorder {
                1 => before.values_mut().for_each(|rules| rules.insert(0, "-j theirs".to_owned())),
                2 => before.values_mut().for_each(|rules| rules.extend(rules.first().cloned())),
                _ => (),
            }
            let change = plan(table, &before, &second);
            prop_assert!(change.is_empty() || !change.is_committed(&before));
            let after = committed(&change, &before);
            prop_assert!(change.is_empty() || change.is_committed(&after));
            let mut carried_out = before.clone();
            change.carry_out(&mut carried_out);
            prop_assert_eq!(&carried_out, &after);
            prop_assert!(plan(table, &after, &second).is_empty(), "{after:#?}");
            prop_assert_eq!(&after["theirs"], &before["theirs"]);
            prop_assert_eq!(committed(&change.inverse(), &after), before);
        }

        #[test]
        fn nothing_is_left_of_a_port_that_is_removed(
            (table, wanted) in (prop::sample::select(&TABLES[..]), wishes())
        ) {
            let there = committed(&plan(table, &foreign(table), &wanted), &foreign(table));
            let gone = wanted.keys().map(|port| (*port, None)).collect();
            let after = committed(&plan(table, &there, &gone), &there);
            prop_assert!(names::ports(table, &after).is_empty());
            prop_assert!(!after.values().flatten().any(|rule| rule.contains("vnet") && !rule.starts_with("-i vnet0 -j A")));
        }
    }

    #[test]
    fn every_chain_that_a_plan_changes_concerns_ports_and_those_of_others_do_not() {
        let wanted: Wishes = (0..200).map(|port| (port, Some(vec![1, 2]))).collect();
        for table in TABLES {
            let after = committed(&plan(table, &foreign(table), &wanted), &foreign(table));
            let unconcerned: Vec<_> = after.keys().filter(|chain| !concerns(table, chain)).collect();
            assert_eq!(unconcerned, ["theirs"]);
        }
    }

    #[test]
    fn one_port_more_adds_rules_to_the_tree_and_takes_none_out() {
        for table in TABLES {
            let many: Wishes = (0..40).map(|port| (port, Some(vec![1]))).collect();
            let held = committed(&plan(table, &foreign(table), &many), &foreign(table));
            let script = Script::of([&plan(table, &held, &Wishes::from([(40, Some(vec![1]))]))]);
            let declared: Vec<_> = script.text.lines().filter_map(|line| line.strip_prefix(':')).collect();
            assert!(declared.iter().all(|chain| chain.contains("vnet40")), "{}", script.text);
            assert!(!script.text.contains("\n-D"), "{}", script.text);
        }
    }

    #[test]
    fn rules_and_chains_of_others_are_never_touched() {
        for table in TABLES {
            let wanted = Wishes::from([(0, Some(vec![1, 2]))]);
            let plan = plan(table, &foreign(table), &wanted);
            let script = Script::of([&plan]);
            assert!(!script.text.contains("theirs"), "{}", script.text);
        }
    }

    #[test]
    fn clearing_leaves_the_table_of_others_as_it_was() {
        for table in TABLES {
            for count in [0, 3, 40] {
                let wanted: Wishes = (0..count).map(|port| (port, Some(vec![1, 2]))).collect();
                let there = committed(&plan(table, &foreign(table), &wanted), &foreign(table));
                let clear = Plan::clear(table, &there);
                assert_eq!(committed(&clear, &there), foreign(table));
                assert_eq!(committed(&clear.inverse(), &foreign(table)), there);
            }
        }
    }

    #[test]
    fn a_rule_of_others_that_accepts_before_ours_is_found_and_ours_are_put_before_it() {
        let wanted = Wishes::from([(0, Some(vec![1])), (1, Some(vec![1]))]);
        for (table, chain, rule, is_found) in [
            (TableId::EbtablesNat, "PREROUTING", "-j ACCEPT", true),
            (TableId::EbtablesNat, "PREROUTING", "-p ARP -j ACCEPT", true),
            (TableId::EbtablesNat, "PREROUTING", "-i vnet1 -j RETURN", true),
            (TableId::EbtablesNat, "PREROUTING", "-j opens", true),
            (TableId::EbtablesNat, "PREROUTING", "-j mark --mark-set 0x1 --mark-target ACCEPT", true),
            (TableId::EbtablesNat, "PREROUTING", "-j mark --mark-set 0x1 --mark-target CONTINUE", false),
            (TableId::EbtablesNat, "PREROUTING", "-i eth0 -j ACCEPT", false),
            (TableId::EbtablesNat, "PREROUTING", "-p ARP -j DROP", false),
            (TableId::EbtablesNat, "PREROUTING", "-j CONTINUE", false),
            (TableId::EbtablesNat, "PREROUTING", "-j theirs", true),
            (TableId::IptablesFilter, FROM_GUEST, "-j ACCEPT", true),
            (TableId::IptablesFilter, FROM_GUEST, "-m comment --comment \"-j DROP\" -j ACCEPT", true),
            (TableId::IptablesFilter, FROM_GUEST, "-p tcp -g opens", true),
            (TableId::IptablesFilter, FROM_GUEST, "-j LOG --log-prefix x", false),
        ] {
            let mut before = committed(&plan(table, &foreign(table), &wanted), &foreign(table));
            before.insert("opens".to_owned(), vec!["-j theirs".to_owned(), "-p IPv4 -j ACCEPT".to_owned()]);
            before.get_mut(chain).unwrap().insert(0, rule.to_owned());
            let repair = plan(table, &before, &wanted);
            assert_eq!(!repair.is_empty(), is_found, "{chain} {rule}");
            let after = committed(&repair, &before);
            assert!(plan(table, &after, &wanted).is_empty(), "{after:#?}");
            assert_eq!(committed(&repair.inverse(), &after), before);
        }
    }

    #[test]
    fn differences_name_port_chain_rule_and_origin() {
        let mut saved = committed(
            &plan(
                TableId::IptablesFilter,
                &foreign(TableId::IptablesFilter),
                &Wishes::from([(0, Some(vec![1, 2, 3]))]),
            ),
            &foreign(TableId::IptablesFilter),
        );
        saved.get_mut("FI-vnet0").unwrap()[1] = "-j ACCEPT".to_owned();
        saved.get_mut(FROM_GUEST_POST).unwrap().clear();
        let plan = plan(TableId::IptablesFilter, &saved, &Wishes::from([(0, Some(vec![1, 2, 3]))]));
        let shown: Vec<_> = differences(&plan).iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "+ vnet0 iptables: FI-vnet0 -j ACCEPT",
                "- vnet0 iptables: FI-vnet0 -s 10.0.0.2/32 -j DROP  (nwfilter)",
                "- vnet0 iptables: libvirt-in-post -m physdev --physdev-in vnet0 -j ACCEPT",
            ]
        );
    }
}
