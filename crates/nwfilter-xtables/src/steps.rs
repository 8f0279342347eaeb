//! Orders and commits the transactions of several tables. While they run, a frame passes only if the old or the new rules
//! let it pass, and no frame is lost that both let pass.
//!
//! Each table changes in one transaction, but a frame passes two tables: ebtables' nat, and the filter table of its IP
//! family. If a batch moves a drop from one to the other, a frame could pass between the two transactions in either order.
//! If both tables change, the IP tables therefore first get rules that drop what the old *or* the new ones drop, then
//! ebtables changes, then the IP tables get only the new rules:
//!
//! | | ebtables | IP tables | passes |
//! | --- | --- | --- | --- |
//! | before | old | old | |
//! | | old | old and new | what passed before, less what is dropped now |
//! | | new | old and new | what passes now, less what was dropped before |
//! | after | new | new | |
//!
//! A port that is new to the IP tables needs no step in between: without rules everything passes there.

use std::collections::BTreeMap;

use nwfilter_rules::{Applied, ApplyError, Refused};
use nwfilter_xml::PortDev;

use crate::canonical::same_rules;
use crate::dispatch::Dispatch;
use crate::memory::Tables;
use crate::names::IpChain;
use crate::nftables::Generation;
use crate::plan::{Plan, Wanted};
use crate::render::{Line, PortTable};
use crate::saved::{Saved, SavedRule, SavedTable};
use crate::script::Script;
use crate::tool::{self, TableId, Tool};

/// One run of a restore tool: a transaction for each plan.
pub(crate) type Step = Vec<Plan>;

/// The steps to the desired state, given the plans that would reach it at once.
pub(crate) fn in_order<'a>(
    plans: Vec<Plan>,
    tables: &Tables,
    wanted: impl Fn(TableId) -> Wanted<'a>,
    dispatch: Dispatch,
) -> Vec<Step> {
    let (ethernet, ip): (Step, Step) = plans.into_iter().partition(|plan| plan.tool() == Tool::Ebtables);
    let (raw, filter): (Step, Step) = ip.into_iter().partition(|plan| !is_filter(plan.table()));
    let (mut first, mut last) = (Step::new(), Step::new());
    for plan in filter {
        let (saved, wanted) = (&tables[&plan.table()], wanted(plan.table()));
        let joined = if ethernet.is_empty() { None } else { joined(plan.tool(), saved, &wanted) };
        let Some(joined) = joined else {
            first.push(plan);
            continue;
        };
        let joined = joined.iter().map(|(port, table)| (*port, table.as_ref())).collect();
        let join = Plan::new(plan.table(), saved, &joined, dispatch);
        if join.is_empty() {
            last.push(plan);
            continue;
        }
        let mut between = saved.clone();
        join.carry_out(&mut between);
        last.push(Plan::new(plan.table(), &between, &wanted, dispatch));
        first.push(join);
    }
    // The raw table drops nothing, so its plan goes where it needs no run of its own.
    for plan in raw {
        let with_last = last.iter().any(|other| other.tool() == plan.tool());
        if with_last { last.push(plan) } else { first.push(plan) }
    }
    [by_tool(first), vec![ethernet], by_tool(last)]
        .concat()
        .into_iter()
        .filter(|step| !step.is_empty())
        .collect()
}

fn is_filter(table: TableId) -> bool {
    matches!(table, TableId::IptablesFilter | TableId::Ip6tablesFilter)
}

pub(crate) fn by_tool(mut plans: Step) -> Vec<Step> {
    plans.sort_by_key(Plan::table);
    plans.chunk_by(|a, b| a.tool() == b.tool()).map(<[Plan]>::to_vec).collect()
}

/// The state of the ports in a filter table while ebtables changes: the old rules joined with the new ones. Ports that keep
/// their old rules are omitted. `None` if no port has old rules that change.
fn joined<'a>(
    tool: Tool,
    saved: &SavedTable,
    wanted: &Wanted<'a>,
) -> Option<BTreeMap<&'a PortDev, Option<PortTable>>> {
    let mut any = false;
    let mut joined = BTreeMap::new();
    for (port, table) in wanted {
        let held = IpChain::ALL.iter().any(|chain| saved.contains_key(&chain.of(port)));
        match table {
            None if held => any = true,
            None => drop(joined.insert(*port, None)),
            Some(table) if !held => drop(joined.insert(*port, Some((*table).clone()))),
            Some(table) => {
                let (table, changes) = join(tool, saved, port, table);
                any |= changes;
                joined.insert(*port, Some(table));
            }
        }
    }
    any.then_some(joined)
}

/// The desired state of a port, with a jump to the old rules at the beginning of each chain that changes. Returns also
/// whether a chain changes.
fn join(tool: Tool, saved: &SavedTable, port: &PortDev, wanted: &PortTable) -> (PortTable, bool) {
    let (mut table, mut changes) = (wanted.clone(), false);
    for chain in IpChain::ALL {
        let (name, old) = (chain.of(port), chain.old(port));
        let (Some(held), Some(lines)) = (saved.get(&name), table.chains.get_mut(&name)) else { continue };
        let wanted = lines.iter().map(|line| line.text.as_str());
        if same_rules(tool, held.iter().map(String::as_str), wanted) {
            continue;
        }
        changes = true;
        let to_old = format!("-j {old}");
        lines.insert(0, Line::built_in(to_old.clone()));
        // A process that was killed between two steps has left such a jump.
        let held = held.iter().flat_map(|rule| match saved.get(&old).filter(|_| *rule == to_old) {
            Some(older) => older.as_slice(),
            None => std::slice::from_ref(rule),
        });
        // A packet that the old rules accept continues with the new ones.
        let held = held.map(|rule| Line::built_in(SavedRule::new(rule).returning())).collect();
        table.chains.insert(old, held);
    }
    (table, changes)
}

// ---- commit ----

/// Why steps were not committed.
pub(crate) struct Failed {
    pub(crate) error: ApplyError,
    /// Whether a tool refused its text while the kernel's rules changed. The nf_tables tools then send their changes again, and
    /// may delete a rule by a number that it no longer has: "RULE_DELETE failed (No such file or directory)".
    pub(crate) in_a_race: bool,
}

/// Commits the steps. If one is refused, reverts those before it.
pub(crate) fn commit(steps: &[Step]) -> Result<Applied, Failed> {
    let mut applied = Applied::default();
    for (done, step) in steps.iter().enumerate() {
        let Some(tool) = step.first().map(Plan::tool) else { continue };
        let before = Generation::now().ok();
        if let Err(error) = commit_script(tool, &Script::of(step)) {
            // The kernel does not count changes by the legacy variants.
            let counted = tool::is_legacy(tool).is_ok_and(|legacy| !legacy);
            let now = before.and_then(|_| Generation::now().ok());
            let unchanged = counted && now.is_some() && before == now;
            let in_a_race = counted && now.is_some() && before != now && error.is_refusal;
            take_back(if unchanged { &steps[..done] } else { &steps[..=done] });
            return Err(Failed { error: error.error, in_a_race });
        }
        applied.commits += step.len();
        applied.changed.extend(step.iter().flat_map(|plan| plan.changed.iter().cloned()));
    }
    Ok(applied)
}

/// Why a restore text was not committed.
struct NotCommitted {
    error: ApplyError,
    /// Whether the tool ran and refused it.
    is_refusal: bool,
}

fn commit_script(tool: Tool, script: &Script) -> Result<(), NotCommitted> {
    log::trace!("{}-restore --noflush\n{}", tool.name(), script.text);
    let refusal = match tool::restore(tool, &script.text) {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(refusal)) => refusal,
        Err(error) => return Err(NotCommitted { error, is_refusal: false }),
    };
    let error = match refusal.line.and_then(|line| script.rule_at(line)) {
        Some((rule, of_port)) => ApplyError::Refused(Box::new(Refused {
            port: of_port.port.clone(),
            origin: of_port.origin.clone(),
            object: of_port.object.clone(),
            rule: rule.to_owned(),
            why: refusal.message,
        })),
        None => tool::unavailable(format!("{}-restore", tool.name()), refusal.message),
    };
    Err(NotCommitted { error, is_refusal: true })
}

/// Reverts steps, the last one first. Reads the tables to find out which plans were committed: of a tool's two tables the
/// first may have been, and a tool that timed out may have finished.
fn take_back(steps: &[Step]) {
    for plan in steps.iter().rev().flat_map(|step| step.iter().rev()) {
        let tool = plan.tool();
        let result = tool::save(tool).and_then(|text| {
            if !plan.is_committed(Saved::parse(&text).table(plan.table().name())) {
                return Ok(());
            }
            commit_script(tool, &Script::of([&plan.inverse()])).map_err(|failed| failed.error)
        });
        if let Err(error) = result {
            log::error!("the change of {} could not be taken back: {error}", plan.table().label());
        }
    }
}
