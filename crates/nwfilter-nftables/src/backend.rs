//! The backend: batches of ports to transactions of the kernel.

mod failure;
mod follower;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, Desired, Held, Installed, KernelObject, NoAnswer, NoHelper, Origin,
    Planned, Process, Ruleset, Unsupported, Warning, Watch,
};
use nwfilter_xml::PortDev;

use failure::{CommitFailure, failure, is_owned, owned, unavailable};
use follower::Follower;
pub(crate) use state::Namespace;
use state::{Failed, Own, State, lock, namespace};

use crate::kernel::{
    BatchHead, CommitError, Error, Monitor, Object, Operation, TableFlags, Transaction, check_batch,
};
use crate::model::{Model, port_name};
use crate::owner::{self, OWNED};
use crate::plan::{self, Cause, Classes, Guest, Plan, Wanted};
use crate::relay::{AskError, Reply, Request};
use crate::{bridges, class, held, host, layout, sets};

/// How often a batch is tried while others change rules.
const ATTEMPTS: usize = 500;
/// How long the kernel may take to tell of a transaction that it carried out.
const TOLD_WITHIN: Duration = Duration::from_millis(20);

/// How often an owner that does not answer is asked, [`OWNER_REST`] apart: it may be about to end, or to begin.
const OWNER_ATTEMPTS: usize = 100;
/// How long an owner that does not answer is left alone.
const OWNER_REST: Duration = Duration::from_millis(20);

/// The nftables backend, in the network namespace of the calling thread.
///
/// Everything is in `table bridge nwfilter`, and helpers for connections of the host in `table inet nwfilter`. What the tables
/// hold is read once and then kept in step with what is written; the kernel tells when somebody else changes them, and then
/// they are read again.
///
/// A process that stays may [own](Self::owning) the table. Others [ask it](Self::beside) to change it; without a directory
/// where they find the owner they are refused.
#[derive(Debug, Default)]
pub struct Nftables {
    shared: Arc<Shared>,
    /// Where the owner of the table serves.
    directory: Option<PathBuf>,
    /// Whether this backend owns the table, unless another one does.
    owns: bool,
}

/// What a backend shares with the thread that serves others.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    state: Mutex<Option<State>>,
    own: Arc<Mutex<Own>>,
}

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

    /// Where another process owns the table, asks it for every change: it serves in this directory, that of the bindings.
    pub fn beside(self, directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), owns: false, ..self }
    }

    /// Owns the table from the first change on, and serves others in this directory, for as long as the backend lives.
    /// `nft flush ruleset` does not touch the table then. Where another process owns it, it is asked; where the kernel would
    /// remove the table with its owner (before Linux 6.9), it is not owned.
    ///
    /// For a process that stays, and works in one network namespace.
    pub fn owning(self, directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), owns: true, ..self }
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
            let class = classes.rendered(&class);
            if class.lacks_answers {
                warnings.push(Warning::NoAnswer { port: port.clone(), why: NoAnswer::Connlimit });
            }
            let guest = Guest { mac: ruleset.guest_mac, servers: host::servers(&ruleset) };
            wanted.insert(port.clone(), Wanted::Class(class, values, guest));
        }
        warnings.sort();
        warnings.dedup();
        Ok(Possible { wanted, warnings })
    }

    /// The state for the calling thread's network namespace.
    fn entered<'a>(&self, state: &'a mut Option<State>) -> Result<&'a mut State, ApplyError> {
        let namespace = namespace()?;
        if state.as_ref().is_some_and(|state| state.namespace != namespace) {
            *state = None;
        }
        match state {
            Some(state) => Ok(state),
            none => Ok(none.insert(State::open(namespace, &self.shared.own).map_err(unavailable)?)),
        }
    }

    /// Calls with what the table holds now.
    fn with_model<R>(&self, call: impl FnOnce(&Model) -> R) -> Result<R, ApplyError> {
        let mut state = self.shared.state();
        let state = self.entered(&mut state)?;
        state.refresh(&self.shared.own).map_err(unavailable)?;
        Ok(call(&state.model))
    }

    /// Commits what `plan` makes of what the table holds, and the flags that it is to have, again where others change rules
    /// meanwhile.
    fn commit(&self, plan: impl Fn(&Model, TableFlags) -> Plan) -> Result<(Plan, usize), CommitFailure> {
        let mut held = self.shared.state();
        let state = self.entered(&mut held)?;
        let result = self.commit_in(state, plan);
        if result.is_err() {
            // What it did is not known, or the table is not as it was thought to be. Who owns the table keeps the connection.
            if state.owns() { state.stale = true } else { *held = None }
        }
        result
    }

    fn commit_in(
        &self,
        state: &mut State,
        plan: impl Fn(&Model, TableFlags) -> Plan,
    ) -> Result<(Plan, usize), CommitFailure> {
        let (mut done, mut commits, mut undo) = (None::<Plan>, 0, Vec::new());
        for _ in 0..ATTEMPTS {
            state.refresh(&self.shared.own).map_err(unavailable)?;
            let flags = self.own_table(state).map_err(unavailable)?;
            let mut plan = plan(&state.model, flags);
            let transactions = std::mem::take(&mut plan.transactions);
            // What was planned first is what was asked for.
            let done = done.get_or_insert_with(Plan::default);
            if commits == 0 {
                *done = plan;
            } else {
                done.changed.append(&mut plan.changed);
                done.needed = plan.needed;
            }
            let (needed, alone) = (done.needed, transactions.len() == 1);
            let mut interrupted = false;
            for (index, transaction) in transactions.iter().enumerate() {
                let is_needed = index < needed;
                let back = (is_needed && !alone).then(|| plan::taken_back(transaction, &state.model));
                match self.carry_through(state, transaction) {
                    Ok(()) => {
                        commits += 1;
                        undo.extend(back);
                    }
                    Err(None) => {
                        interrupted = true;
                        break;
                    }
                    // What no frame comes to any more goes with the next change.
                    Err(Some(error)) if !is_needed => {
                        log::warn!("table {}: what is not used stays: {}", layout::TABLE, error.into_error());
                        state.stale = true;
                        break;
                    }
                    Err(Some(error)) => {
                        self.take_back(state, &undo);
                        return Err(error);
                    }
                }
            }
            if !interrupted {
                return Ok((std::mem::take(done), commits));
            }
        }
        self.take_back(state, &undo);
        Err(unavailable(Error::Interrupted { table: layout::table(), times: ATTEMPTS }).into())
    }

    /// Carries a transaction out, by the table's owner if need be. The error is none where it has to be planned again.
    fn carry_through(
        &self,
        state: &mut State,
        transaction: &Transaction<Cause>,
    ) -> Result<(), Option<CommitFailure>> {
        let directory = self.directory.as_deref();
        match state.commit(&self.shared.own, directory, transaction) {
            Ok(()) => {
                state.unanswered = 0;
                return Ok(());
            }
            Err(Failed::Commit(error)) if matches!(*error, CommitError::Interrupted) => {
                state.wait_until_told();
            }
            Err(Failed::Owner(AskError::Gone(_))) if state.unanswered < OWNER_ATTEMPTS => {
                state.unanswered += 1;
                state.stale = true;
                std::thread::sleep(OWNER_REST);
            }
            Err(Failed::Owner(error)) => {
                state.unanswered = 0;
                return Err(Some(owned(directory, &error).into()));
            }
            Err(Failed::Commit(error)) if is_owned(&error) && state.unanswered < OWNER_ATTEMPTS => {
                // Somebody claimed it since it was read; the kernel does not tell of that.
                state.unanswered = OWNER_ATTEMPTS;
                state.stale = true;
            }
            Err(Failed::Commit(error)) => {
                state.unanswered = 0;
                return Err(Some(failure(*error)));
            }
        }
        Err(None)
    }

    /// Takes the transactions of a change that failed back, from the last to the first. What stays none the less goes with the
    /// next change.
    fn take_back(&self, state: &mut State, undo: &[Transaction<Cause>]) {
        for transaction in undo.iter().rev().filter(|transaction| !transaction.is_empty()) {
            if let Err(error) = self.take_one_back(state, transaction) {
                return log::error!("table {}: what failed is not taken back: {error}", layout::TABLE);
            }
        }
    }

    fn take_one_back(&self, state: &mut State, transaction: &Transaction<Cause>) -> Result<(), ApplyError> {
        for _ in 0..ATTEMPTS {
            state.refresh(&self.shared.own).map_err(unavailable)?;
            match self.carry_through(state, transaction) {
                Ok(()) => return Ok(()),
                Err(Some(error)) => return Err(error.into_error()),
                Err(None) => {}
            }
        }
        Err(unavailable(Error::Interrupted { table: layout::table(), times: ATTEMPTS }))
    }

    /// Owns the table, if this backend is to and can; gives the flags that a table has which it makes.
    fn own_table(&self, state: &mut State) -> Result<TableFlags, Error> {
        let Some(directory) = self.directory.as_deref().filter(|_| self.owns) else {
            return Ok(TableFlags::default());
        };
        if state.is_owned_by_another() || state.may_own == Some(false) {
            return Ok(TableFlags::default());
        }
        let may_own = match state.may_own {
            Some(may_own) => may_own,
            None => {
                let may_own = owner::is_possible(&mut state.connection)?;
                if !may_own {
                    log::info!(
                        "table {} is not owned: this kernel, older than 6.9, would remove it with its owner",
                        layout::TABLE
                    );
                }
                may_own
            }
        };
        state.may_own = Some(may_own && state.serve(&self.shared, directory));
        if state.may_own == Some(false) {
            return Ok(TableFlags::default());
        }
        let mut interrupted = 0;
        while !state.owns_all() {
            match state.claim() {
                Ok(()) => break,
                Err(error) if matches!(*error, CommitError::Interrupted) && interrupted < ATTEMPTS => {
                    interrupted += 1;
                    state.wait_until_told();
                }
                Err(error) => {
                    // It goes on being filtered as it is.
                    log::warn!("table {} is not owned: {}", layout::TABLE, failure(*error).into_error());
                    state.may_own = Some(false);
                    state.server = None;
                    state.stale = true;
                }
            }
            state.refresh(&self.shared.own)?;
            if state.is_owned_by_another() || state.may_own == Some(false) {
                return Ok(TableFlags::default());
            }
        }
        Ok(OWNED)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(|poisoned| {
            // Whoever panicked may have left half of a change in it.
            let mut state = PoisonError::into_inner(poisoned);
            if let Some(state) = &mut *state {
                state.stale = true;
            }
            self.state.clear_poison();
            state
        })
    }

    /// Carries out what another process asks for.
    fn carry_out(&self, request: &Request, by: Option<Process>) -> Reply {
        let mut state = self.state();
        let Some(state) = state.as_mut().filter(|state| state.owns()) else { return Reply::NotOwner };
        if state.namespace != request.namespace {
            return Reply::Refused("it works in another network namespace".into());
        }
        let generation = match check_batch(&request.batch, &layout::tables()) {
            Ok(BatchHead { generation: Some(generation) }) => generation.wrapping_add(1),
            Ok(BatchHead { generation: None }) => return Reply::Refused("a batch for any generation".into()),
            Err(error) => return Reply::Refused(error.to_string()),
        };
        lock(&self.own).relayed(generation, by);
        state.stale = true;
        match state.connection.exchange(&request.batch) {
            Ok(answers) => {
                if answers.refuse() {
                    lock(&self.own).generations.remove(&generation);
                }
                Reply::Answered(answers)
            }
            Err(error) => Reply::Refused(unavailable(error).to_string()),
        }
    }
}

/// Warnings, sorted.
fn merged(mut warnings: Vec<Warning>, more: Vec<Warning>) -> Vec<Warning> {
    warnings.extend(more);
    warnings.sort();
    warnings
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
        let plan =
            self.with_model(|model| plan::plan(model, &wanted, &batch.sets, TableFlags::default(), true))?;
        Ok(Planned { differences: plan.differences, warnings: merged(warnings, plan.warnings) })
    }

    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let mut lacking = BTreeSet::new();
        loop {
            let Possible { wanted, warnings } = Self::possible(batch, &lacking)?;
            let plan = |model: &Model, flags| {
                plan::plan(model, &wanted, &batch.sets, flags, batch.report_differences)
            };
            match self.commit(plan) {
                Ok((plan, commits)) => {
                    let Plan { changed, changed_sets, differences, warnings: more, .. } = plan;
                    let warnings = merged(warnings, more);
                    return Ok(Applied { changed, changed_sets, commits, warnings, differences });
                }
                Err(CommitFailure::NoHelper(helper)) if lacking.insert(helper.clone()) => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        self.with_model(|model| {
            let names =
                |keys: &mut dyn Iterator<Item = &[u8]>| keys.filter_map(port_name).collect::<BTreeSet<_>>();
            let ports = names(&mut model.ports());
            let dispatched = names(&mut model.dispatched_ports().into_iter());
            let base_is_right = layout::base_chains(model.rejecting().next().is_some())
                .into_iter()
                .all(|(chain, rules)| model.chains.get(&chain.name) == Some(&(chain, rules)));
            let unreached =
                if base_is_right { ports.difference(&dispatched).cloned().collect() } else { ports.clone() };
            let sets = model.sets.keys().filter_map(sets::name_of).collect();
            Installed { ports, unreached, sets }
        })
    }

    fn rules(&self, batch: &Batch) -> Result<Held, ApplyError> {
        let mut state = self.shared.state();
        let state = self.entered(&mut state)?;
        for _ in 0..ATTEMPTS {
            state.refresh(&self.shared.own).map_err(unavailable)?;
            let (chains, generation) = state.connection.chains(&layout::table()).map_err(unavailable)?;
            // Others changed rules meanwhile.
            if generation != state.generation {
                state.wait_until_told();
                continue;
            }
            let Possible { wanted, .. } = Self::possible(batch, &lacking_helpers(batch, &state.model))?;
            return Ok(held::rules(&wanted, &state.model, &chains));
        }
        Err(unavailable(Error::Interrupted { table: layout::table(), times: ATTEMPTS }))
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        let monitor = Monitor::open(layout::tables()).map_err(unavailable)?;
        Ok(Some(Box::new(Follower { monitor, own: self.shared.own.clone() })))
    }

    fn connection_zones(&self, ports: &BTreeSet<PortDev>) -> Result<BTreeMap<PortDev, u16>, ApplyError> {
        let bridges = bridges::of(ports);
        self.with_model(|model| {
            let zone = |bridge: &bridges::Bridge| {
                if model.is_in_zone_0(bridge) { 0 } else { layout::zone_of(bridge) }
            };
            bridges.iter().map(|(port, bridge)| ((*port).clone(), zone(bridge))).collect()
        })
    }

    fn clear(&self) -> Result<Applied, ApplyError> {
        let committed = self.commit(|model, _| {
            let mut plan = Plan::default();
            if model.tables().next().is_some() {
                plan.changed = model.ports().filter_map(port_name).collect();
                plan.changed_sets = model.sets.keys().filter_map(sets::name_of).collect();
                let object = KernelObject::Table { table: layout::TABLE.into() };
                let cause =
                    Cause { port: None, set: None, origin: Origin::BUILT_IN, object, rule: String::new() };
                // A frame that is among the rules when their sets go would not find its own addresses.
                let mut flush = Transaction::new();
                let hooked = model
                    .chains
                    .iter()
                    .filter(|(_, (chain, rules))| chain.base.is_some() && !rules.is_empty());
                for (name, _) in hooked {
                    let chain = name.clone();
                    flush.push(
                        Operation::FlushChain { table: layout::table_of(name.as_str()), chain },
                        cause.clone(),
                    );
                }
                let mut delete = Transaction::new();
                for (table, ..) in model.tables() {
                    delete.push(Operation::DeleteTable { table }, cause.clone());
                }
                plan.transactions = vec![flush, delete];
                plan.transactions.retain(|transaction| !transaction.is_empty());
                plan.needed = plan.transactions.len();
            }
            plan
        });
        match committed {
            Ok((Plan { changed, changed_sets, .. }, commits)) => {
                Ok(Applied { changed, changed_sets, commits, ..Applied::default() })
            }
            Err(failure) => Err(failure.into_error()),
        }
    }
}

/// The helpers that rulesets ask for and the table has not: the kernel lacked them when the rules were written.
fn lacking_helpers(batch: &Batch, model: &Model) -> BTreeSet<String> {
    let has = |helper: &str| {
        model.objects.values().any(|object| match object {
            Object::CtHelper(held) => held.helper == helper,
        })
    };
    let asked = batch.filtered().flat_map(|(_, ruleset)| &ruleset.helpers).map(|rule| rule.helper.name());
    asked.filter(|helper| !has(helper)).map(str::to_owned).collect()
}
