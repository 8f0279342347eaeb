//! The iptables, ip6tables and ebtables backend.
//!
//! A batch becomes at most one run of each restore tool: the whole change of a table is one transaction. What the
//! tables hold is read first, and only what differs is written. If a later tool refuses, what an earlier one
//! committed is taken back.
//!
//! Chains have libvirt's names and contents: `libvirt-I-PORT`, `libvirt-O-PORT` and `I-PORT-CHAIN` in ebtables' nat
//! table, `FI-PORT`, `FO-PORT` and `HI-PORT` in the filter tables, reached from `libvirt-in`, `libvirt-out`,
//! `libvirt-in-post` and `libvirt-host-in`. Conntrack helpers, which libvirt does not have, are in the raw table:
//! `CT-PORT`, reached from `nwfilter-ct`.

mod canonical;
mod host;
mod nftables;
mod plan;
mod render;
mod saved;
mod tool;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, Desired, Difference, Family, HelperSide, Installed, Ruleset, Watch,
};
use nwfilter_xml::PortDev;

pub use crate::nftables::generation;
use crate::plan::{Plan, Script, Wanted};
use crate::render::PortTable;
use crate::saved::Saved;
use crate::tool::{TableId, Tool};

/// What the backend may do to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether bridge-nf-call-iptables and bridge-nf-call-ip6tables may be switched on. Where they are off and may
    /// not be, a ruleset with IP rules is refused.
    pub enable_bridge_filtering: bool,
    /// Whether connections may be given conntrack helpers.
    pub conntrack_helpers: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { enable_bridge_filtering: true, conntrack_helpers: true }
    }
}

/// The backend. It keeps no state: what is installed is asked of the kernel, in the network namespace of the
/// calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Xtables {
    settings: Settings,
}

impl Xtables {
    /// A backend with these settings.
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }
}

impl Backend for Xtables {
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let mut warnings = Vec::new();
        let rendered = self.render(batch, &mut warnings);
        self.prepare_host(&rendered)?;
        let plans = plans(&rendered)?;
        let mut applied = commit(&plans)?;
        applied.warnings = warnings;
        Ok(applied)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        let mut ports = BTreeSet::new();
        let saved = save_all()?;
        for table in TableId::ALL {
            ports.extend(plan::ports(table, saved[&table.tool()].table(table.name())));
        }
        Ok(Installed { ports })
    }

    fn diff(&self, batch: &Batch) -> Result<Vec<Difference>, ApplyError> {
        let plans = plans(&self.render(batch, &mut Vec::new()))?;
        let mut differences: Vec<_> = plans.iter().flat_map(Plan::differences).collect();
        differences.sort();
        Ok(differences)
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        Ok(Some(Box::new(nftables::Watch::open()?)))
    }
}

/// Every port of a batch with what it must have in each table.
type Rendered<'a> = BTreeMap<&'a PortDev, BTreeMap<TableId, PortTable>>;

impl Xtables {
    fn render<'a>(&self, batch: &'a Batch, warnings: &mut Vec<String>) -> Rendered<'a> {
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
        warnings: &mut Vec<String>,
    ) -> Ruleset {
        let mut possible = ruleset.clone();
        possible.helpers.retain(|rule| {
            let lost = |why: &str| {
                let (helper, number) = (rule.helper, rule.port);
                format!(
                    "{port}: connections to port {number} get no conntrack helper '{helper}', so what is RELATED \
                     to them will not pass: {why}"
                )
            };
            if !self.settings.conntrack_helpers {
                return false;
            }
            if matches!(&rule.side, HelperSide::Guest { addresses } if addresses.is_empty()) {
                warnings.push(lost("the guest's IP address is not known (parameter IP)"));
                return false;
            }
            let has = *available.entry(rule.helper).or_insert_with(|| host::has_helper(rule.helper));
            if !has {
                warnings.push(lost(&format!("this kernel has no nf_conntrack_{}", rule.helper)));
            }
            has
        });
        possible
    }

    fn prepare_host(&self, rendered: &Rendered<'_>) -> Result<(), ApplyError> {
        for (family, table) in
            [(Family::Ipv4, TableId::IptablesFilter), (Family::Ipv6, TableId::Ip6tablesFilter)]
        {
            if rendered.values().any(|tables| tables.contains_key(&table)) {
                host::enable_bridge_filtering(family, self.settings.enable_bridge_filtering)?;
            }
        }
        Ok(())
    }
}

fn save_all() -> Result<BTreeMap<Tool, Saved>, ApplyError> {
    Tool::ALL.into_iter().map(|tool| Ok((tool, Saved::parse(&tool::save(tool)?)))).collect()
}

fn plans(rendered: &Rendered<'_>) -> Result<Vec<Plan>, ApplyError> {
    let saved = save_all()?;
    let plans = TableId::ALL
        .into_iter()
        .map(|table| Plan::new(table, saved[&table.tool()].table(table.name()), &wanted(rendered, table)));
    Ok(plans.filter(|plan| !plan.is_empty()).collect())
}

/// What the ports must have in one table.
fn wanted<'a>(rendered: &'a Rendered<'_>, table: TableId) -> Wanted<'a> {
    rendered.iter().map(|(port, tables)| (*port, tables.get(&table))).collect()
}

/// Commits the plans tool by tool; takes back what was committed when one is refused.
fn commit(plans: &[Plan]) -> Result<Applied, ApplyError> {
    let mut applied = Applied::default();
    for tool in Tool::ALL {
        let of_tool = || plans.iter().filter(move |plan| plan.tool() == tool);
        if of_tool().next().is_none() {
            continue;
        }
        let mut script = Script::default();
        of_tool().for_each(|plan| plan.write(&mut script));
        if let Err(error) = commit_script(tool, &script) {
            take_back(plans);
            return Err(error);
        }
        applied.commits += of_tool().count();
        applied.changed.extend(of_tool().flat_map(|plan| plan.changed.iter().cloned()));
    }
    Ok(applied)
}

fn commit_script(tool: Tool, script: &Script) -> Result<(), ApplyError> {
    log::trace!("{}-restore --noflush\n{}", tool.name(), script.text);
    let Err(refusal) = tool::restore(tool, &script.text)? else { return Ok(()) };
    match refusal.line.and_then(|line| script.rule_at(line)) {
        Some((rule, blame)) => Err(ApplyError::Refused {
            origin: blame.origin.clone(),
            port: blame.port.clone(),
            tool: tool.name(),
            rule: rule.to_owned(),
            why: refusal.message,
        }),
        None => Err(ApplyError::Tool { tool: format!("{}-restore", tool.name()), why: refusal.message }),
    }
}

/// Brings the tables back to where they were before the plans. Which plans were committed is asked of the tables: of
/// a tool's two tables the first may have been, and a tool that did not answer may have done its work.
fn take_back(plans: &[Plan]) {
    for plan in plans.iter().rev() {
        let tool = plan.tool();
        let result = tool::save(tool).and_then(|text| {
            if !plan.is_committed(Saved::parse(&text).table(plan.table().name())) {
                return Ok(());
            }
            let mut script = Script::default();
            plan.inverse().write(&mut script);
            commit_script(tool, &script)
        });
        if let Err(error) = result {
            log::error!(
                "taking back the change of table {} of {}: {error}",
                plan.table().name(),
                tool.name()
            );
        }
    }
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
            let plan = Plan::new(table, &BTreeMap::new(), &wanted(&rendered, table));
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
