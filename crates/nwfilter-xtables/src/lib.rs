//! The iptables, ip6tables and ebtables backend.
//!
//! A batch becomes one run of each restore tool, and one more of iptables' where old rules have to hold until ebtables'
//! are in: the whole change of a table is one transaction. What the tables hold is known first, and only what differs
//! is written. If a later tool refuses, what an earlier one committed is taken back.
//!
//! Chains have libvirt's names and contents: `libvirt-I-PORT`, `libvirt-O-PORT` and `I-PORT-CHAIN` in ebtables' nat
//! table, `FI-PORT`, `FO-PORT` and `HI-PORT` in the filter tables, reached from `libvirt-in`, `libvirt-out`,
//! `libvirt-in-post` and `libvirt-host-in`. Conntrack helpers, which libvirt does not have, are in the raw table:
//! `CT-PORT`, reached from `nwfilter-ct`.

mod canonical;
mod dispatch;
mod history;
mod host;
mod memory;
mod nftables;
mod plan;
pub mod process;
mod render;
mod saved;
mod steps;
mod tool;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, Desired, Difference, DifferenceKind, Family, HelperSide, Installed,
    NoHelper, Ruleset, Warning, Watch,
};
use nwfilter_xml::PortDev;

pub use crate::dispatch::Dispatch;
use crate::memory::{Memory, Tables};
pub use crate::nftables::generation;
use crate::plan::{Plan, Script, Wanted};
use crate::render::PortTable;
use crate::saved::SavedTable;
use crate::steps::Step;
use crate::tool::{TableId, Tool};

/// What the backend may do to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether bridge-nf-call-iptables and bridge-nf-call-ip6tables may be switched on. Where they are off and may
    /// not be, a ruleset with IP rules is refused.
    pub enable_bridge_filtering: bool,
    /// Whether connections may be given conntrack helpers.
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

/// The backend, in the network namespace of the calling thread. What the tables hold is asked of the tools, and
/// remembered for as long as the kernel's count of changes (see [`generation`]) says that nobody changed anything.
#[derive(Debug, Default)]
pub struct Xtables {
    settings: Settings,
    memory: Mutex<Memory>,
}

impl Xtables {
    /// A backend with these settings.
    pub fn new(settings: Settings) -> Self {
        Self { settings, memory: Mutex::default() }
    }

    /// The same backend, which leaves in a file what the tables hold, and begins with what another process left there:
    /// to bind a port then takes milliseconds beside a thousand others too. For programs that end after each change;
    /// one that lives remembers by itself, and would write the file in vain. The file is believed only as long as the
    /// kernel says that nobody changed anything; its directory is made by others.
    pub fn remembering_in(self, file: PathBuf) -> Self {
        Self { memory: Mutex::new(Memory::in_file(file)), ..self }
    }

    /// What is to be written, and in which order.
    fn steps(&self, rendered: &Rendered<'_>, tables: &Tables) -> Vec<Step> {
        let dispatch = self.settings.dispatch;
        steps::steps(plans(rendered, tables, dispatch), tables, |table| wanted(rendered, table), dispatch)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(|poisoned| {
            let mut memory = PoisonError::into_inner(poisoned);
            memory.forget();
            memory
        })
    }
}

impl Backend for Xtables {
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let mut warnings = Vec::new();
        let rendered = self.render(batch, &mut warnings);
        self.prepare_host(&rendered)?;
        let mut memory = self.memory();
        let mut steps = self.steps(&rendered, memory.tables()?);
        let mut attempts = 1..ATTEMPTS;
        let mut applied = loop {
            let error = match steps::commit(&steps) {
                Ok(applied) => break applied,
                Err(error) => error,
            };
            memory.forget();
            // Others may have changed the tables at the same time. Tables that are as they were refuse the same again.
            match memory.tables().map(|tables| self.steps(&rendered, tables)) {
                Ok(again) if again != steps && attempts.next().is_some() => steps = again,
                _ => return Err(error),
            }
        };
        memory.committed(&steps);
        applied.warnings = warnings;
        Ok(applied)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        let mut memory = self.memory();
        let mut installed = Installed::default();
        for (table, saved) in memory.tables()? {
            let ports = plan::ports(*table, saved);
            installed.unreached.extend(plan::unreached(*table, saved, &ports));
            installed.ports.extend(ports);
        }
        Ok(installed)
    }

    fn diff(&self, batch: &Batch) -> Result<Vec<Difference>, ApplyError> {
        let rendered = self.render(batch, &mut Vec::new());
        let plans = plans(&rendered, self.memory().tables()?, self.settings.dispatch);
        let mut differences: Vec<_> = plans.iter().flat_map(Plan::differences).collect();
        differences.extend(switched_off(&rendered));
        differences.sort();
        Ok(differences)
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        Ok(Some(Box::new(nftables::Watch::open(self.memory().history())?)))
    }
}

/// Every port of a batch with what it must have in each table.
type Rendered<'a> = BTreeMap<&'a PortDev, BTreeMap<TableId, PortTable>>;

impl Xtables {
    fn render<'a>(&self, batch: &'a Batch, warnings: &mut Vec<Warning>) -> Rendered<'a> {
        let mut available = BTreeMap::new();
        let tables = |(port, desired): (&'a PortDev, &Desired)| {
            let tables = match desired {
                Desired::Gone => BTreeMap::new(),
                Desired::Filtered(ruleset) if ruleset.helpers.is_empty() => render::render(port, ruleset),
                Desired::Filtered(ruleset) => {
                    let possible = self.with_possible_helpers(port, ruleset, &mut available, warnings);
                    render::render(port, &possible)
                }
            };
            (port, tables)
        };
        batch.ports.iter().map(tables).collect()
    }

    /// The ruleset without the helpers that this host cannot give.
    fn with_possible_helpers(
        &self,
        port: &PortDev,
        ruleset: &Ruleset,
        available: &mut BTreeMap<&'static str, bool>,
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
            if matches!(&rule.side, HelperSide::Guest { addresses } if addresses.is_empty()) {
                warnings.push(lost(NoHelper::AddressUnknown));
                return false;
            }
            let has = *available.entry(rule.helper).or_insert_with(|| host::has_helper(rule.helper));
            if !has {
                warnings.push(lost(NoHelper::Missing));
            }
            has
        });
        possible
    }

    fn prepare_host(&self, rendered: &Rendered<'_>) -> Result<(), ApplyError> {
        families(rendered).try_for_each(|family| {
            host::enable_bridge_filtering(family, self.settings.enable_bridge_filtering)
        })
    }
}

/// The families that a port has IP rules of.
fn families(rendered: &Rendered<'_>) -> impl Iterator<Item = Family> {
    let filters = [(Family::Ipv4, TableId::IptablesFilter), (Family::Ipv6, TableId::Ip6tablesFilter)];
    let has = |table: TableId| rendered.values().any(|tables| tables.contains_key(&table));
    filters.into_iter().filter(move |(_, table)| has(*table)).map(|(family, _)| family)
}

/// The switches of the host that must be on, and are not.
fn switched_off(rendered: &Rendered<'_>) -> impl Iterator<Item = Difference> {
    let off = families(rendered).filter(|family| !host::is_bridge_switch_on(*family));
    off.map(|family| Difference {
        port: "*".to_owned(),
        tool: "sysctl",
        chain: host::bridge_switch(family).to_owned(),
        kind: DifferenceKind::Missing,
        rule: "= 1".to_owned(),
        origin: None,
    })
}

fn plans(rendered: &Rendered<'_>, tables: &Tables, dispatch: Dispatch) -> Vec<Plan> {
    let plan = |(table, saved): (&TableId, _)| Plan::new(*table, saved, &wanted(rendered, *table), dispatch);
    tables.iter().map(plan).filter(|plan| !plan.is_empty()).collect()
}

/// What the ports must have in one table.
fn wanted<'a>(rendered: &'a Rendered<'_>, table: TableId) -> Wanted<'a> {
    rendered.iter().map(|(port, tables)| (*port, tables.get(&table))).collect()
}

/// The restore texts that would bring rulesets to ports that have none: for each tool that has something to do its
/// name, such as `iptables`, and the input of its `-restore --noflush`.
pub fn restore_texts(batch: &Batch) -> Vec<(&'static str, String)> {
    let ports = batch.ports.iter().filter_map(|(port, desired)| match desired {
        Desired::Filtered(ruleset) => Some((port, render::render(port, ruleset))),
        Desired::Gone => None,
    });
    let rendered: Rendered<'_> = ports.collect();
    let text_of = |tool: Tool| {
        let mut script = Script::default();
        for table in TableId::ALL.into_iter().filter(|table| table.tool() == tool) {
            let plan = Plan::new(table, &SavedTable::new(), &wanted(&rendered, table), Dispatch::Tree);
            if !plan.is_empty() {
                plan.write(&mut script);
            }
        }
        (tool.name(), script.text)
    };
    Tool::ALL.into_iter().map(text_of).filter(|(_, text)| !text.is_empty()).collect()
}

/// The restore texts for one port, tool by tool, for people to read.
pub fn restore_text(port: &PortDev, ruleset: &Ruleset) -> String {
    let mut batch = Batch::default();
    batch.filter(port.clone(), Arc::new(ruleset.clone()));
    let sections = restore_texts(&batch).into_iter();
    sections.map(|(tool, text)| format!("# {tool}-restore --noflush\n{text}")).collect()
}
