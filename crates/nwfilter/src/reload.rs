//! Applying the desired state of all ports, and showing how the kernel differs from it. One failing port does not block the
//! others.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use nwfilter_rules::{
    Applied, ApplyError, Batch, Desired, DesiredSet, Difference, Planned, Ruleset, Subject, Warning,
};
use nwfilter_xml::{Binding, FilterName, PortDev, SetName};

use crate::apart::{self, Refused, Suspicion, Units};
use crate::group::Request;
use crate::stores::Stores;
use crate::{Driver, Error, Event, Phase};

/// What a reload did.
#[derive(Clone, Debug, Default)]
pub struct Reloaded {
    /// What was written.
    pub applied: Applied,
    /// The ports that do not have what their bindings ask for, sorted.
    pub failed: Vec<FailedPort>,
    /// The sets that do not hold in the kernel what they must, sorted.
    pub failed_sets: Vec<FailedSet>,
    /// The ports whose rules were removed because neither a binding nor an interface of that name exists, sorted.
    pub removed: Vec<PortDev>,
    /// The ports that the reload left alone.
    pub unmanaged: UnmanagedPorts,
}

/// Ports that a reload leaves as they are because it cannot know better.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnmanagedPorts {
    /// The ports that have rules in the kernel and an interface, but no binding here: a driver over other stores may
    /// have made the rules, or a process was killed before it stored the binding. Also those that have no interface,
    /// but a damaged binding. Sorted.
    pub unbound: Vec<PortDev>,
    /// The ports that have a binding but no interface, sorted. As in libvirt's driver the binding stays until it is
    /// deleted, and no rules are made for it: the next interface of that name may be another guest's. Rules that
    /// the kernel still has are left alone.
    pub absent: Vec<PortDev>,
}

/// How the kernel differs from what the bindings ask for.
#[derive(Clone, Debug, Default)]
pub struct Drift {
    /// The rules that a reload would write and remove, sorted.
    pub differences: Vec<Difference>,
    /// The ports of whose bindings no rules can be made, sorted.
    pub failed: Vec<FailedPort>,
    /// The sets that cannot be, sorted.
    pub failed_sets: Vec<FailedSet>,
    /// The ports that a reload would leave as they are.
    pub unmanaged: UnmanagedPorts,
    /// What does not work although the rules are in the kernel, sorted.
    pub warnings: Vec<Warning>,
}

impl Drift {
    /// Whether a reload would change nothing and every port gets its filter. Unmanaged ports do not count.
    pub fn is_empty(&self) -> bool {
        self.differences.is_empty() && self.failed.is_empty() && self.failed_sets.is_empty()
    }
}

impl Reloaded {
    /// Whether every port has its filter, and every set holds what it must. Unmanaged ports do not count.
    pub fn is_complete(&self) -> bool {
        self.failed.is_empty() && self.failed_sets.is_empty()
    }
}

/// A set that does not hold in the kernel what it must. The kernel has what it had before, if anything.
#[derive(Clone, Debug, thiserror::Error)]
#[error("set '{set}' does not hold in the kernel what it must")]
pub struct FailedSet {
    /// The set.
    pub set: SetName,
    /// Why.
    #[source]
    pub error: Arc<Error>,
}

/// A port that cannot be brought to what its binding asks for.
#[derive(Clone, Debug, thiserror::Error)]
#[error("port '{port}' does not get filter '{filter}' but {fallback}")]
pub struct FailedPort {
    /// The port.
    pub port: PortDev,
    /// The filter of its binding.
    pub filter: FilterName,
    /// What it has instead: it is never less filtered than before.
    pub fallback: Fallback,
    /// Why. Ports that fail for one reason share it.
    #[source]
    pub error: Arc<Error>,
}

/// What a port has in place of its filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The rules that the kernel holds for it.
    OldRules,
    /// The kernel held none: nothing passes.
    DropAll,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OldRules => "the rules it has",
            Self::DropAll => "a drop of everything",
        })
    }
}

impl Driver {
    /// How the kernel differs from what the bindings ask for. Nothing is changed.
    ///
    /// An error is what makes all of it impossible: stores or tables that cannot be read.
    pub fn diff(&self) -> Result<Drift, Error> {
        self.inside(|| self.diff_here())
    }

    fn diff_here(&self) -> Result<Drift, Error> {
        let stores = self.look()?;
        let desired = DesiredState::of(self, &stores)?;
        let Planned { differences, mut warnings } = self.backend().plan(&desired.batch)?;
        warnings.extend(self.host().unbridged(&desired.batch));
        warnings.sort();
        let DesiredState { failed, failed_sets, unmanaged, .. } = desired;
        Ok(Drift { differences, failed, failed_sets, unmanaged, warnings })
    }

    /// Applies what the bindings ask for. Only what differs is written.
    ///
    /// A port whose rules cannot be made, or are refused by the kernel, does not block the others: it keeps the
    /// rules that the kernel holds for it, or drops everything if there are none, and the result names it. Rules of
    /// ports that have neither a binding nor an interface are removed. An error is what makes all of it impossible:
    /// stores or tables that cannot be read, or tools that do not work. A set that cannot be brought into the kernel does not
    /// block the others either.
    pub fn reload(&self) -> Result<Reloaded, Error> {
        self.ask(Request::Reload)
    }

    /// Carries out a reload, in its turn.
    pub(crate) fn bring_all(&self, stores: &Stores) -> Result<Reloaded, Error> {
        let DesiredState { batch, mut failed, mut failed_sets, removed, unmanaged, filtered } =
            DesiredState::of(self, stores)?;
        let (gone, sets): (BTreeMap<_, _>, _) =
            batch.sets.into_iter().partition(|(_, desired)| *desired == DesiredSet::Gone);
        let batch = Batch { ports: batch.ports, ..Batch::default() };
        let mut of_sets = self.bring_sets(sets, &mut failed_sets);
        let open = batch.filtered().map(|(port, _)| port).filter(|port| !filtered.contains(*port));
        let mut work = Ports {
            driver: self,
            open: open.cloned().collect(),
            applied: None,
            refused: Vec::new(),
            error: None,
        };
        apart::carry_out(&mut work, batch.ports.into_iter().collect());
        if let Some(error) = work.error {
            return Err(error);
        }
        let mut applied = work.applied.unwrap_or_default();
        merge(&mut of_sets, self.bring_sets(gone, &mut failed_sets));
        merge(&mut applied, of_sets);
        for (port, error) in work.refused {
            // Rules are asked for by bindings only.
            let Some(binding) = stores.bindings.get(port.as_str()) else { continue };
            failed.push(failed_port(binding, &filtered, error));
        }
        failed.sort_by(|a, b| a.port.cmp(&b.port));
        failed_sets.sort_by(|a, b| a.set.cmp(&b.set));
        self.feed().publish(failed_sets.iter().map(|failed| Event::SetFailed(failed.set.clone())));
        let is_repaired = |port: &&PortDev| !failed.iter().any(|failed| failed.port == **port);
        let repaired: Vec<_> = applied.changed.iter().filter(is_repaired).cloned().collect();
        self.meter().repaired(repaired.len());
        self.feed().publish(repaired.into_iter().map(Event::DriftRepaired));
        if applied.differences.iter().any(|difference| difference.subject == Subject::Host) {
            self.meter().host_repaired();
            self.feed().publish([Event::HostRepaired]);
        }
        Ok(Reloaded { applied, failed, failed_sets, removed, unmanaged })
    }
}

impl Driver {
    /// Brings sets into the kernel, without rules. One that cannot be does not block the others: ports whose rules ask it
    /// are refused if it is not there.
    fn bring_sets(&self, mut sets: BTreeMap<SetName, DesiredSet>, failed: &mut Vec<FailedSet>) -> Applied {
        while !sets.is_empty() {
            let batch = Batch { sets: sets.clone(), report_differences: true, ..Batch::default() };
            let error = match self.apply(&batch) {
                Ok(applied) => return applied,
                Err(error) => Arc::new(error),
            };
            let guilty = match &*error {
                Error::Apply(ApplyError::Set { set, .. }) => sets.remove_entry(set).map(|(set, _)| set),
                _ => None,
            };
            match guilty {
                Some(set) => failed.push(FailedSet { set, error }),
                None => {
                    let all = std::mem::take(&mut sets).into_keys();
                    failed.extend(all.map(|set| FailedSet { set, error: error.clone() }));
                }
            }
        }
        Applied::default()
    }
}

/// The ports of a reload. Those that are refused, or wait for others, are closed meanwhile if the kernel holds no rules
/// for them.
struct Ports<'a> {
    driver: &'a Driver,
    /// The ports that nothing filters.
    open: BTreeSet<PortDev>,
    /// What was applied, once something was.
    applied: Option<Applied>,
    refused: Vec<(PortDev, Arc<Error>)>,
    /// What is not about a port.
    error: Option<Error>,
}

impl Units for Ports<'_> {
    type Unit = (PortDev, Desired);

    fn attempt(&mut self, units: Vec<Self::Unit>) -> Result<(), Refused<Self::Unit>> {
        if self.error.is_some() {
            return Ok(());
        }
        let drop_all = Arc::new(Ruleset::drop_all());
        let close = self.open.iter().map(|port| (port.clone(), Desired::Filtered(drop_all.clone())));
        let ports = close.chain(units.iter().cloned()).collect();
        let batch = Batch { ports, report_differences: true, ..Batch::default() };
        match self.driver.apply(&batch) {
            Ok(applied) => {
                self.open.clear();
                merge(self.applied.get_or_insert_default(), applied);
                Ok(())
            }
            Err(error) => {
                let suspicion = |(port, desired): &Self::Unit| match desired {
                    Desired::Filtered(_) => apart::suspicion(port, &batch, &error),
                    Desired::Gone => Suspicion::Innocent,
                };
                let units = units.into_iter().map(|unit| (unit.clone(), suspicion(&unit))).collect();
                Err(Refused { error, units })
            }
        }
    }

    fn refuse(&mut self, units: Vec<Self::Unit>, error: Error) {
        let error = Arc::new(error);
        self.refused.extend(units.into_iter().map(|(port, _)| (port, error.clone())));
    }

    fn give_up(&mut self, units: Vec<Self::Unit>, error: Error) -> Vec<Self::Unit> {
        // Once something was applied, the tools work.
        match self.applied {
            Some(_) => self.refuse(units, error),
            None => self.error = Some(error),
        }
        Vec::new()
    }
}

fn merge(applied: &mut Applied, more: Applied) {
    applied.changed.extend(more.changed);
    applied.changed_sets.extend(more.changed_sets);
    applied.commits += more.commits;
    applied.warnings.extend(more.warnings);
    applied.warnings.sort();
    applied.warnings.dedup();
    applied.differences.extend(more.differences);
    applied.differences.sort();
}

/// What the bindings ask for, as far as rules can be made of them.
#[derive(Default)]
struct DesiredState {
    batch: Batch,
    failed: Vec<FailedPort>,
    failed_sets: Vec<FailedSet>,
    removed: Vec<PortDev>,
    unmanaged: UnmanagedPorts,
    /// The ports that are filtered by what the kernel holds.
    filtered: BTreeSet<PortDev>,
}

impl DesiredState {
    fn of(driver: &Driver, stores: &Stores) -> Result<Self, Error> {
        let installed = driver.backend().installed()?;
        let filters = stores.filter_map();
        let filtered = &installed.ports - &installed.unreached;
        let mut desired = Self { filtered, ..Self::default() };
        let total = stores.bindings.documents().count();
        for (done, binding) in stores.bindings.documents().enumerate() {
            driver.reporter.report(Phase::Rules, done, total);
            let port = binding.port.clone();
            if !driver.host().has(&port) {
                desired.unmanaged.absent.push(port);
                continue;
            }
            match stores.ruleset(&filters, binding) {
                Ok(ruleset) => desired.batch.filter(port, Arc::new(ruleset)),
                Err(error) => {
                    let failed = failed_port(binding, &desired.filtered, Arc::new(error));
                    if failed.fallback == Fallback::DropAll {
                        desired.batch.filter(port, Arc::new(Ruleset::drop_all()));
                    }
                    desired.failed.push(failed);
                }
            }
        }
        let contents = stores.contents();
        for name in installed.sets.iter().filter(|name| !contents.contains_key(*name)) {
            // Rules that the kernel holds may ask a set whose file is damaged.
            if stores.sets.get(name.as_str()).is_none() && !stores.sets.is_lost(name.as_str()) {
                desired.batch.sets.insert(name.clone(), DesiredSet::Gone);
            }
        }
        for (set, content) in contents {
            match content {
                Ok(content) => drop(desired.batch.sets.insert(set, DesiredSet::Holds(content))),
                Err(error) => desired.failed_sets.push(FailedSet { set, error: Arc::new(error) }),
            }
        }
        let unbound = installed.ports.iter().filter(|port| stores.bindings.get(port.as_str()).is_none());
        for port in unbound {
            match driver.host().has(port) || stores.bindings.is_lost(port.as_str()) {
                true => desired.unmanaged.unbound.push(port.clone()),
                false => {
                    desired.removed.push(port.clone());
                    desired.batch.remove(port.clone());
                }
            }
        }
        Ok(desired)
    }
}

fn failed_port(binding: &Binding, filtered: &BTreeSet<PortDev>, error: Arc<Error>) -> FailedPort {
    let fallback = if filtered.contains(&binding.port) { Fallback::OldRules } else { Fallback::DropAll };
    FailedPort { port: binding.port.clone(), filter: binding.filter.clone(), fallback, error }
}
