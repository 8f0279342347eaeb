//! The backend: batches of ports to transactions of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, Desired, ForeignChange, Installed, KernelObject, NoHelper, Origin,
    Planned, Process, Refused, Ruleset, Scope, Unsupported, Warning, Watch,
};
use nwfilter_xml::PortDev;

use crate::class;
use crate::kernel::{
    Change, CommitError, Connection, Error, Event, Expr, Monitor, Operation, Part, Refusal, Transaction,
    expr::Load,
};
use crate::layout;
use crate::model::{Model, port_name};
use crate::plan::{self, Cause, Classes, Plan, Wanted};

/// How often a batch is tried while others change rules.
const ATTEMPTS: usize = 500;
/// How long the kernel may take to tell of a transaction that it carried out.
const TOLD_WITHIN: Duration = Duration::from_millis(20);

/// The nftables backend, in the network namespace of the calling thread.
///
/// Everything is in `table bridge nwfilter`. What it holds is read once and then kept in step with what is written; the
/// kernel tells when somebody else changes it, and then it is read again.
#[derive(Debug, Default)]
pub struct Nftables {
    state: Mutex<Option<State>>,
    /// The netlink ports of this backend's connections, whose changes are its own.
    own: Arc<Mutex<BTreeSet<u32>>>,
}

#[derive(Debug)]
struct State {
    /// The network namespace.
    namespace: Namespace,
    connection: Connection,
    monitor: Monitor,
    model: Model,
    /// The generation of which the table is known.
    generation: u32,
}

/// A network namespace, as the kernel numbers its file.
type Namespace = (u64, u64);

/// What the ports of a batch can have.
struct Possible {
    wanted: BTreeMap<PortDev, Wanted>,
    warnings: Vec<Warning>,
}

impl Nftables {
    /// A backend that has read nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What each port must have. Helpers that the kernel lacks are left out.
    fn possible(batch: &Batch, lacking: &BTreeSet<String>) -> Result<Possible, ApplyError> {
        let (mut wanted, mut warnings, mut classes) = (BTreeMap::new(), Vec::new(), Classes::default());
        for (port, desired) in &batch.ports {
            let ruleset = match desired {
                Desired::Gone => {
                    wanted.insert(port.clone(), Wanted::Gone);
                    continue;
                }
                Desired::Filtered(ruleset) => ruleset,
            };
            let lacks = |helper: &str| lacking.contains(helper);
            let ruleset = if ruleset.helpers.iter().any(|rule| lacks(rule.helper.name())) {
                let mut possible = (**ruleset).clone();
                possible.helpers.retain(|rule| {
                    if lacks(rule.helper.name()) {
                        let (port, helper, destination) = (port.clone(), rule.helper, rule.port);
                        warnings.push(Warning::NoHelper {
                            port,
                            helper,
                            destination,
                            why: NoHelper::Missing,
                        });
                        return false;
                    }
                    true
                });
                Arc::new(possible)
            } else {
                ruleset.clone()
            };
            let (class, values) = class::of(&ruleset)
                .map_err(|source| ApplyError::Unsupported { port: port.clone(), source: Box::new(source) })?;
            wanted.insert(port.clone(), Wanted::Class(classes.rendered(&class), values));
        }
        warnings.sort();
        warnings.dedup();
        Ok(Possible { wanted, warnings })
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(|poisoned| {
            // Whoever panicked may have left half of a change in it.
            let mut state = PoisonError::into_inner(poisoned);
            *state = None;
            state
        })
    }

    /// The state for the calling thread's network namespace.
    fn entered<'a>(&self, state: &'a mut Option<State>) -> Result<&'a mut State, ApplyError> {
        let namespace = namespace()?;
        if state.as_ref().is_some_and(|state| state.namespace != namespace) {
            *state = None;
        }
        match state {
            Some(state) => Ok(state),
            none => Ok(none.insert(State::open(namespace, &self.own).map_err(unavailable)?)),
        }
    }

    /// Calls with what the table holds now.
    fn with_model<R>(&self, call: impl FnOnce(&Model) -> R) -> Result<R, ApplyError> {
        let mut state = self.state();
        let state = self.entered(&mut state)?;
        state.refresh(&self.own).map_err(unavailable)?;
        Ok(call(&state.model))
    }

    /// Commits what `plan` makes of what the table holds, again where others change rules meanwhile.
    fn commit(&self, plan: impl Fn(&Model) -> Plan) -> Result<(Plan, usize), CommitFailure> {
        let mut state = self.state();
        let result = self
            .entered(&mut state)
            .map_err(CommitFailure::Apply)
            .and_then(|state| state.commit(&self.own, plan));
        if result.is_err() {
            // What it did is not known, or the table is not as it was thought to be.
            *state = None;
        }
        result
    }
}

impl State {
    fn open(namespace: Namespace, own: &Mutex<BTreeSet<u32>>) -> Result<Self, Error> {
        // What changes from here on is told.
        let monitor = Monitor::open(layout::table())?;
        let mut connection = Connection::open()?;
        own.lock().unwrap_or_else(PoisonError::into_inner).insert(connection.port());
        let (model, generation) = read(&mut connection)?;
        Ok(Self { namespace, connection, monitor, model, generation })
    }

    /// Takes note of what the kernel told; reads the table again where others changed it.
    fn refresh(&mut self, own: &Mutex<BTreeSet<u32>>) -> Result<(), Error> {
        let events = self.monitor.events()?;
        let own = own.lock().unwrap_or_else(PoisonError::into_inner);
        let foreign = events.iter().any(|event| match event {
            Event::Missed => true,
            Event::Changed(change) => {
                is_later(change.generation, self.generation) && !own.contains(&change.port)
            }
        });
        drop(own);
        if foreign {
            (self.model, self.generation) = read(&mut self.connection)?;
        } else if let Some(told) = self.monitor.generation().filter(|told| is_later(*told, self.generation)) {
            self.generation = told;
        }
        Ok(())
    }

    fn commit(
        &mut self,
        own: &Mutex<BTreeSet<u32>>,
        plan: impl Fn(&Model) -> Plan,
    ) -> Result<(Plan, usize), CommitFailure> {
        for _ in 0..ATTEMPTS {
            self.refresh(own).map_err(unavailable)?;
            let plan = plan(&self.model);
            if plan.transaction.is_empty() {
                return Ok((plan, 0));
            }
            match self.connection.commit(&plan.transaction, Some(self.generation)) {
                Ok(()) => {
                    self.carried_out(&plan.transaction);
                    return Ok((plan, 1));
                }
                Err(CommitError::Interrupted) => self.wait_until_told(),
                Err(error) => return Err(failure(error)),
            }
        }
        Err(unavailable(Error::Interrupted { table: layout::table(), times: ATTEMPTS }).into())
    }

    /// Waits for the kernel to tell of a transaction that it carried out.
    fn wait_until_told(&self) {
        let mut ready = [PollFd::new(self.monitor.as_fd(), PollFlags::POLLIN)];
        // What keeps it from waiting, the next attempt meets, too.
        let _ = poll(&mut ready, PollTimeout::try_from(TOLD_WITHIN).unwrap_or(PollTimeout::ZERO));
    }

    fn carried_out(&mut self, transaction: &Transaction<Cause>) {
        self.generation = self.generation.wrapping_add(1);
        for (operation, _) in transaction.operations() {
            self.model.carry_out(operation.clone());
        }
    }
}

fn read(connection: &mut Connection) -> Result<(Model, u32), Error> {
    let generation = connection.generation()?;
    let table = connection.table(&layout::table())?;
    let generation = table.as_ref().map_or(generation, |table| table.generation);
    Ok((Model::of(table), generation))
}

/// Whether one generation comes after another. The kernel's count goes round.
fn is_later(generation: u32, than: u32) -> bool {
    generation.wrapping_sub(than).cast_signed() > 0
}

fn namespace() -> Result<Namespace, ApplyError> {
    const FILE: &str = "/proc/thread-self/ns/net";
    let file = std::fs::metadata(FILE).map_err(|source| ApplyError::Io { path: FILE.into(), source })?;
    Ok((file.dev(), file.ino()))
}

impl Backend for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn check(&self, ruleset: &Ruleset) -> Result<(), Unsupported> {
        class::of(ruleset).map(|_| ())
    }

    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError> {
        let Possible { wanted, warnings } = Self::possible(batch, &BTreeSet::new())?;
        let differences = self.with_model(|model| plan::plan(model, &wanted, true).differences)?;
        Ok(Planned { differences, warnings })
    }

    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let mut lacking = BTreeSet::new();
        loop {
            let Possible { wanted, warnings } = Self::possible(batch, &lacking)?;
            match self.commit(|model| plan::plan(model, &wanted, batch.report_differences)) {
                Ok((plan, commits)) => {
                    let Plan { changed, differences, .. } = plan;
                    return Ok(Applied { changed, commits, warnings, differences });
                }
                Err(CommitFailure::NoHelper(helper)) if lacking.insert(helper.clone()) => {}
                Err(CommitFailure::NoHelper(helper)) => {
                    return Err(unavailable(Error::Malformed(format!("helper {helper}"))));
                }
                Err(CommitFailure::Apply(error)) => return Err(error),
            }
        }
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        self.with_model(|model| {
            let names =
                |keys: &mut dyn Iterator<Item = &[u8]>| keys.filter_map(port_name).collect::<BTreeSet<_>>();
            let ports = names(&mut model.ports());
            let dispatched = names(&mut model.dispatched_ports().into_iter());
            let base_is_right = layout::base_chains()
                .into_iter()
                .all(|(chain, rules)| model.chains.get(&chain.name) == Some(&(chain, rules)));
            let unreached =
                if base_is_right { ports.difference(&dispatched).cloned().collect() } else { ports.clone() };
            Installed { ports, unreached }
        })
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        let monitor = Monitor::open(layout::table()).map_err(unavailable)?;
        Ok(Some(Box::new(Follower { monitor, own: self.own.clone() })))
    }

    fn clear(&self) -> Result<Applied, ApplyError> {
        let committed = self.commit(|model| {
            let mut plan = Plan::default();
            if model.exists {
                plan.changed = model.ports().filter_map(port_name).collect();
                let object = KernelObject::Table { table: layout::TABLE.into() };
                let cause = Cause { port: None, origin: Origin::BUILT_IN, object, rule: String::new() };
                plan.transaction.push(Operation::DeleteTable { table: layout::table() }, cause);
            }
            plan
        });
        match committed {
            Ok((plan, commits)) => Ok(Applied { changed: plan.changed, commits, ..Applied::default() }),
            Err(CommitFailure::Apply(error)) => Err(error),
            Err(CommitFailure::NoHelper(helper)) => {
                Err(unavailable(Error::Malformed(format!("helper {helper}"))))
            }
        }
    }
}

// ---- changes of others ----

struct Follower {
    monitor: Monitor,
    own: Arc<Mutex<BTreeSet<u32>>>,
}

impl Watch for Follower {
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError> {
        let events = self.monitor.events().map_err(unavailable)?;
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let foreign = events.into_iter().filter_map(|event| match event {
            Event::Missed => Some(ForeignChange::unknown()),
            Event::Changed(change) => (!own.contains(&change.port)).then(|| foreign_change(change)),
        });
        Ok(foreign.collect())
    }

    fn interval(&self) -> Option<Duration> {
        None
    }
}

impl AsFd for Follower {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }
}

/// Objects that are told of one change.
const SHOWN: usize = 6;

fn foreign_change(change: Change) -> ForeignChange {
    let table = layout::TABLE.to_string();
    let more = change.parts.len() > SHOWN;
    let objects = change.parts.into_iter().take(SHOWN).map(|part| match part {
        Part::Table => KernelObject::Table { table: table.clone() },
        Part::Chain(chain) => KernelObject::Chain { table: table.clone(), chain },
        Part::Set(set) => KernelObject::Set { table: table.clone(), set },
    });
    let by = change.process.map(|(id, name)| Process { name, id });
    ForeignChange { by, objects: objects.collect(), more }
}

// ---- what goes wrong ----

enum CommitFailure {
    /// The kernel has no such helper.
    NoHelper(String),
    Apply(ApplyError),
}

impl From<ApplyError> for CommitFailure {
    fn from(error: ApplyError) -> Self {
        Self::Apply(error)
    }
}

fn unavailable(error: Error) -> ApplyError {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        why.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    ApplyError::Unavailable { scope: Scope::Everything, what: "nftables".into(), why }
}

fn failure(error: CommitError<Cause>) -> CommitFailure {
    let lacking = |scope, what: &str, why: String| {
        CommitFailure::Apply(ApplyError::Unavailable { scope, what: what.into(), why })
    };
    match error {
        CommitError::Refused { first, others } => {
            let helper = std::iter::once(&*first).chain(&others).find_map(lacking_helper);
            match helper {
                Some(helper) => CommitFailure::NoHelper(helper),
                None => refused(*first),
            }
        }
        CommitError::Invalid { tag, why, .. } => CommitFailure::Apply(refusal(tag, why)),
        CommitError::Netlink(error) => CommitFailure::Apply(unavailable(error)),
        other => {
            let why = match std::error::Error::source(&other) {
                Some(source) => format!("{other}: {source}"),
                None => other.to_string(),
            };
            lacking(Scope::Everything, "nftables", why)
        }
    }
}

/// The helper of an object that the kernel lacks a module for.
fn lacking_helper(refusal: &Refusal<Cause>) -> Option<String> {
    (refusal.errno == Errno::ENOENT)
        .then(|| refusal.tag.rule.strip_prefix("ct helper ").map(String::from))
        .flatten()
}

fn refused(refusal_: Refusal<Cause>) -> CommitFailure {
    let unsupported = refusal_.is_unsupported();
    let lacks = |scope, what: &str, why: &str| {
        CommitFailure::Apply(ApplyError::Unavailable { scope, what: what.into(), why: why.into() })
    };
    match &refusal_.expression {
        Some(Expr::Load { load: Load::Ct { .. }, .. } | Expr::Dynset(_)) if unsupported => lacks(
            Scope::IpRules,
            "tracking of bridged connections",
            "the kernel has none (module nf_conntrack_bridge): use the backend xtables, or a filter without states",
        ),
        Some(Expr::Reject(_)) if unsupported => lacks(
            Scope::IpRules,
            "rejecting bridged packets",
            "the kernel cannot (module nft_reject_bridge): use the backend xtables, or drop in place of reject",
        ),
        _ if refusal_.errno == Errno::EPERM => lacks(
            Scope::Everything,
            "table bridge nwfilter",
            "it belongs to another process, or this one may not administer the network (CAP_NET_ADMIN)",
        ),
        _ => {
            let why = match &refusal_.message {
                Some(message) => format!("{} ({message})", refusal_.errno.desc()),
                None => format!("{}: {}", refusal_.what, refusal_.errno.desc()),
            };
            CommitFailure::Apply(refusal(refusal_.tag, why))
        }
    }
}

fn refusal(cause: Cause, why: String) -> ApplyError {
    let Cause { port, origin, object, rule } = cause;
    match port {
        Some(port) => ApplyError::Refused(Box::new(Refused { port, origin, object, rule, why })),
        None => ApplyError::Unavailable { scope: Scope::Everything, what: object.to_string(), why },
    }
}
