//! The iptables, ip6tables and ebtables backend.
//!
//! A batch runs each restore tool once, and iptables' a second time if old rules must stay until those of ebtables are
//! in: each run is one transaction a table. The backend compares the tables with the batch first and writes only the
//! differences. If a later tool refuses, the backend reverts what an earlier one committed.
//!
//! Chains have libvirt's names and contents: `libvirt-I-PORT`, `libvirt-O-PORT` and `I-PORT-CHAIN` in ebtables' nat
//! table, `FI-PORT`, `FO-PORT` and `HI-PORT` in the filter tables, reached from `libvirt-in`, `libvirt-out`,
//! `libvirt-in-post` and `libvirt-host-in`. Conntrack helpers, which libvirt does not have, are in the raw table:
//! `CT-PORT`, reached from `nwfilter-ct`.

#![forbid(unsafe_code)]

mod canonical;
mod difference;
mod dispatch;
mod held;
mod history;
mod host;
mod memory;
mod names;
mod nftables;
mod plan;
pub mod process;
mod render;
mod saved;
mod script;
mod sets;
mod steps;
mod tool;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, Desired, DesiredSet, Difference, DifferenceKind, Family, Held,
    Helper, HelperSide, Installed, KernelObject, NoHelper, Planned, Ruleset, Subject, Unsupported, Warning,
    Watch,
};
use nwfilter_xml::PortDev;

pub use crate::dispatch::Dispatch;
use crate::memory::{Memory, Tables};
use crate::names::SubChains;
pub use crate::nftables::generation;
use crate::plan::{Plan, Wanted};
use crate::render::PortTable;
use crate::saved::SavedTable;
use crate::script::Script;
use crate::sets::Sets;
use crate::steps::Step;
use crate::tool::{TableId, Tool};

/// What the backend may do to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether the backend may switch on bridge-nf-call-iptables and bridge-nf-call-ip6tables. If it may not and they are
    /// off, it refuses rulesets with IP rules.
    pub enable_bridge_filtering: bool,
    /// Whether the backend assigns conntrack helpers.
    pub conntrack_helpers: bool,
    /// How packets are dispatched to the chains of their ports.
    pub dispatch: Dispatch,
}

impl Default for Settings {
    fn default() -> Self {
        Self { enable_bridge_filtering: true, conntrack_helpers: true, dispatch: Dispatch::Tree }
    }
}

/// How often a batch is tried while others change the same tables.
const ATTEMPTS: usize = 3;

/// The backend, for the network namespace of the calling thread. It reads the tables by the save tools, and caches them as
/// long as the kernel's generation (see [`generation`]) stays the same.
#[derive(Debug, Default)]
pub struct Xtables {
    settings: Settings,
    memory: Mutex<Memory>,
    sets: Mutex<Sets>,
}

impl Xtables {
    /// A backend with these settings.
    pub fn new(settings: Settings) -> Self {
        Self { settings, memory: Mutex::default(), sets: Mutex::default() }
    }

    /// The same backend with its cache in the file `.tables` of a directory, for programs that end after each change: an
    /// attach beside a thousand ports then takes milliseconds too. A long-lived program has its cache in memory and does
    /// not need the file. The file is used only if the kernel's generation is the same. The directory must exist.
    pub fn remembering_in(self, state_dir: &Path) -> Self {
        Self { memory: Mutex::new(Memory::in_file(state_dir.join(".tables"))), ..self }
    }

    /// After a panic the sets are asked for again, once.
    fn sets(&self) -> MutexGuard<'_, Sets> {
        self.sets.lock().unwrap_or_else(|poisoned| {
            let mut sets = PoisonError::into_inner(poisoned);
            *sets = Sets::default();
            self.sets.clear_poison();
            sets
        })
    }

    /// After a panic the tables are read again, once.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(|poisoned| {
            let mut memory = PoisonError::into_inner(poisoned);
            memory.forget();
            self.memory.clear_poison();
            memory
        })
    }
}

impl Backend for Xtables {
    fn name(&self) -> &'static str {
        "xtables"
    }

    /// The tools can express every ruleset; lowering refuses the rest.
    fn check(&self, _: &Ruleset) -> Result<(), Unsupported> {
        Ok(())
    }

    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError> {
        let Possible { rulesets, warnings } = self.possible(batch);
        // `apply` holds the sets while it waits for the memory: the other way round, the two would wait for each other.
        let of_sets = self.sets().changes(&batch.sets, true)?.differences;
        let mut memory = self.memory();
        let tables = memory.tables()?;
        let rendered = render(&rulesets, tables);
        let plans = plans(&rendered, tables, self.settings.dispatch);
        let differences = all_differences(&plans, switched_off(&rulesets).chain(of_sets));
        Ok(Planned { differences, warnings })
    }

    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let Possible { rulesets, warnings } = self.possible(batch);
        // Before they are switched on below.
        let off: Vec<_> =
            if batch.report_differences { switched_off(&rulesets).collect() } else { Vec::new() };
        for family in families(&rulesets) {
            host::enable_bridge_filtering(family, self.settings.enable_bridge_filtering)?;
        }
        // Sets are there before rules that ask them, and go after them.
        let mut sets = self.sets();
        let mut of_sets = sets.changes(&batch.sets, batch.report_differences)?;
        sets.make(&mut of_sets)?;
        let set_differences = std::mem::take(&mut of_sets.differences);
        let mut differences = Vec::new();
        let committed = self.commit(|tables| {
            let rendered = render(&rulesets, tables);
            let plans = plans(&rendered, tables, self.settings.dispatch);
            if batch.report_differences {
                differences = all_differences(&plans, off.iter().chain(&set_differences).cloned());
            }
            steps::in_order(plans, tables, |table| wanted(&rendered, table), self.settings.dispatch)
        });
        let mut applied = committed.inspect_err(|_| sets.take_back(&of_sets))?;
        sets.destroy(&of_sets);
        applied.commits += usize::from(!of_sets.changed().is_empty());
        applied.changed_sets = of_sets.changed();
        applied.warnings = warnings;
        applied.differences = differences;
        Ok(applied)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        let mut memory = self.memory();
        let mut installed = Installed::default();
        for (table, saved) in memory.tables()? {
            let ports = names::ports(*table, saved);
            installed.unreached.extend(plan::unreached(*table, saved, &ports));
            installed.ports.extend(ports);
        }
        // Without the tool there is none.
        installed.sets = Sets::installed().unwrap_or_default();
        Ok(installed)
    }

    fn rules(&self, batch: &Batch) -> Result<Held, ApplyError> {
        let mut memory = self.memory();
        for _ in 0..ATTEMPTS {
            let before = nftables::Generation::now();
            let found = held::rules(batch, memory.tables()?)?;
            // What others changed meanwhile is read again.
            if before.is_ok_and(|before| nftables::Generation::now().is_ok_and(|now| now == before)) {
                return Ok(found);
            }
        }
        let why = "others change the rules all the time: try again".to_owned();
        Err(tool::unavailable("the rules of the kernel cannot be read".to_owned(), why))
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        Ok(Some(Box::new(nftables::Watch::open(self.memory().history())?)))
    }

    /// Base chains in which others have rules stay.
    fn clear(&self) -> Result<Applied, ApplyError> {
        let mut applied = self.commit(|tables| {
            let plans = tables.iter().map(|(table, saved)| Plan::clear(*table, saved));
            steps::by_tool(plans.filter(|plan| !plan.is_empty()).collect())
        })?;
        let all = Sets::installed().unwrap_or_default();
        let gone = all.into_iter().map(|set| (set, DesiredSet::Gone)).collect();
        let mut sets = self.sets();
        let of_sets = sets.changes(&gone, false)?;
        sets.destroy(&of_sets);
        applied.commits += usize::from(!of_sets.changed().is_empty());
        applied.changed_sets = of_sets.changed();
        Ok(applied)
    }
}

/// The rulesets of a batch as far as this host supports them. `None` for a port that goes.
struct Possible<'a> {
    rulesets: BTreeMap<&'a PortDev, Option<Cow<'a, Ruleset>>>,
    warnings: Vec<Warning>,
}

/// The desired tables of every port of a batch.
type Rendered<'a> = BTreeMap<&'a PortDev, BTreeMap<TableId, PortTable>>;

impl Xtables {
    /// Makes steps from the current tables and commits them. Repeats both if others changed the tables meanwhile.
    fn commit(&self, mut steps_for: impl FnMut(&Tables) -> Vec<Step>) -> Result<Applied, ApplyError> {
        let mut memory = self.memory();
        let mut steps = steps_for(memory.tables()?);
        let mut attempts = 1..ATTEMPTS;
        let applied = loop {
            let failed = match steps::commit(&steps) {
                Ok(applied) => break applied,
                Err(failed) => failed,
            };
            memory.forget();
            match memory.tables().map(&mut steps_for) {
                // Otherwise the tools would refuse the same again.
                Ok(again) if (failed.in_a_race || again != steps) && attempts.next().is_some() => {
                    steps = again;
                }
                _ => return Err(failed.error),
            }
        };
        memory.committed(&steps);
        Ok(applied)
    }

    fn possible<'a>(&self, batch: &'a Batch) -> Possible<'a> {
        let (mut available, mut warnings) = (BTreeMap::new(), Vec::new());
        let ruleset = |(port, desired): (&'a PortDev, &'a Desired)| {
            let ruleset = match desired {
                Desired::Gone => None,
                Desired::Filtered(ruleset) if ruleset.helpers.is_empty() => Some(Cow::Borrowed(&**ruleset)),
                Desired::Filtered(ruleset) => {
                    Some(Cow::Owned(self.with_possible_helpers(port, ruleset, &mut available, &mut warnings)))
                }
            };
            (port, ruleset)
        };
        let rulesets = batch.ports.iter().map(ruleset).collect();
        warnings.sort();
        warnings.dedup();
        Possible { rulesets, warnings }
    }

    /// The ruleset without the helpers that this host does not have.
    fn with_possible_helpers(
        &self,
        port: &PortDev,
        ruleset: &Ruleset,
        available: &mut BTreeMap<Helper, bool>,
        warnings: &mut Vec<Warning>,
    ) -> Ruleset {
        let mut possible = ruleset.clone();
        possible.helpers.retain(|rule| {
            let lost = |why| Warning::NoHelper {
                port: port.clone(),
                helper: rule.helper,
                destination: rule.port,
                why,
            };
            if !self.settings.conntrack_helpers {
                return false;
            }
            let address_known = || render::guest_addresses(ruleset, rule.family).next().is_some();
            if rule.side == HelperSide::Guest && !address_known() {
                warnings.push(lost(NoHelper::AddressUnknown));
                return false;
            }
            let has = *available.entry(rule.helper).or_insert_with(|| host::has_helper(rule.helper.name()));
            if !has {
                warnings.push(lost(NoHelper::Missing));
            }
            has
        });
        possible
    }
}

fn render<'a>(rulesets: &BTreeMap<&'a PortDev, Option<Cow<'_, Ruleset>>>, tables: &Tables) -> Rendered<'a> {
    const EMPTY: &SavedTable = &SavedTable::new();
    let mut sub_chains = SubChains::beside(tables.get(&TableId::EbtablesNat).unwrap_or(EMPTY));
    let render = |(port, ruleset): (&&'a PortDev, &Option<Cow<'_, Ruleset>>)| {
        let tables = ruleset.as_ref().map(|ruleset| render::render(port, ruleset, &mut sub_chains));
        (*port, tables.unwrap_or_default())
    };
    rulesets.iter().map(render).collect()
}

/// The families of which a port has IP rules.
fn families(rulesets: &BTreeMap<&PortDev, Option<Cow<'_, Ruleset>>>) -> impl Iterator<Item = Family> {
    let has = |family| rulesets.values().flatten().any(|ruleset| ruleset.ip(family).is_some());
    Family::ALL.into_iter().filter(move |family| has(*family))
}

/// The sysctls that must be 1 and are not.
fn switched_off(rulesets: &BTreeMap<&PortDev, Option<Cow<'_, Ruleset>>>) -> impl Iterator<Item = Difference> {
    let off = families(rulesets).filter(|family| !host::is_bridge_switch_on(*family));
    off.map(|family| Difference {
        subject: Subject::Host,
        object: KernelObject::Setting { setting: host::bridge_switch(family).to_owned() },
        kind: DifferenceKind::Missing,
        rule: "= 1".to_owned(),
        origin: None,
    })
}

fn all_differences(plans: &[Plan], of_host: impl Iterator<Item = Difference>) -> Vec<Difference> {
    let mut differences: Vec<_> = plans.iter().flat_map(difference::differences).chain(of_host).collect();
    differences.sort();
    differences
}

fn plans(rendered: &Rendered<'_>, tables: &Tables, dispatch: Dispatch) -> Vec<Plan> {
    let plan = |(table, saved): (&TableId, _)| Plan::new(*table, saved, &wanted(rendered, *table), dispatch);
    tables.iter().map(plan).filter(|plan| !plan.is_empty()).collect()
}

/// The desired state of the ports in one table.
fn wanted<'a>(rendered: &'a Rendered<'_>, table: TableId) -> Wanted<'a> {
    rendered.iter().map(|(port, tables)| (*port, tables.get(&table))).collect()
}

/// The restore texts that apply a batch to empty tables: for each tool that has something to do its name, such as
/// `iptables`, and the input of its `-restore --noflush`.
pub fn restore_texts(batch: &Batch) -> Vec<(&'static str, String)> {
    let rulesets = batch.filtered().map(|(port, ruleset)| (port, Some(Cow::Borrowed(&**ruleset)))).collect();
    let rendered = render(&rulesets, &Tables::new());
    let text_of = |tool: Tool| {
        let tables = TableId::ALL.into_iter().filter(|table| table.tool() == tool);
        let plan = |table| Plan::new(table, &SavedTable::new(), &wanted(&rendered, table), Dispatch::Tree);
        let plans: Vec<_> = tables.map(plan).filter(|plan| !plan.is_empty()).collect();
        (tool.name(), Script::of(&plans).text)
    };
    Tool::ALL.into_iter().map(text_of).filter(|(_, text)| !text.is_empty()).collect()
}

/// The restore texts of one port, tool by tool, as `nwfilterctl render` prints them.
pub fn restore_text(port: &PortDev, ruleset: &Ruleset) -> String {
    let mut batch = Batch::default();
    batch.filter(port.clone(), Arc::new(ruleset.clone()));
    let sections = restore_texts(&batch).into_iter();
    sections.map(|(tool, text)| format!("# {tool}-restore --noflush\n{text}")).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn after_a_panic_the_next_call_forgets_what_was_known_and_later_ones_remember_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(".tables");
        let backend = Xtables::default().remembering_in(dir.path());
        let panicked = thread::scope(|scope| {
            let panics = || {
                let _held = (backend.sets(), backend.memory());
                panic!("a bug of the backend");
            };
            scope.spawn(panics).join()
        });
        assert!(panicked.is_err() && backend.memory.is_poisoned() && backend.sets.is_poisoned());

        fs::write(&file, "perhaps wrong").unwrap();
        drop((backend.sets(), backend.memory()));
        assert!(!file.exists(), "it is forgotten");
        fs::write(&file, "written since").unwrap();
        drop((backend.sets(), backend.memory()));
        assert!(file.exists(), "it is remembered");
        assert!(!backend.sets.is_poisoned());
    }
}
