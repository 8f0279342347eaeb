//! The backend: batches of ports to transactions of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, Desired, ForeignChange, Held, Installed, KernelObject, NoAnswer,
    NoHelper, Origin, Planned, Process, Refused, Ruleset, Scope, Unsupported, Warning, Watch,
};
use nwfilter_xml::PortDev;

use crate::bridges;
use crate::class;
use crate::kernel::{
    BatchHead, Change, CommitError, Connection, Error, Event, Expr, Monitor, Object, Operation, Part,
    Refusal, TableFlags, Transaction, check_batch, expr::Load,
};
use crate::layout;
use crate::model::{Model, port_name};
use crate::owner::{self, OWNED, Server};
use crate::plan::{self, Cause, Classes, Guest, Plan, Wanted};
use crate::relay::{self, AskError, Reply, Request};
use crate::sets;
use crate::{held, host};

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
/// Everything is in `table bridge nwfilter`, and helpers for connections of the host in `table inet nwfilter`. What it holds is read once and then kept in step with what is written; the
/// kernel tells when somebody else changes it, and then it is read again.
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

/// Which changes are a backend's own.
#[derive(Debug, Default)]
struct Own {
    /// The netlink ports of its connections.
    ports: BTreeSet<u32>,
    /// The generations of changes that went by another port than their author's: who made them, or nobody but this backend.
    generations: BTreeMap<u32, Option<Process>>,
}

#[derive(Debug)]
struct State {
    /// The network namespace.
    namespace: Namespace,
    /// Serves others, for an owner. It ends before the connection does, so that nobody asks in vain.
    server: Option<Server>,
    /// Whether this backend can own the table, as far as it was tried.
    may_own: Option<bool>,
    connection: Connection,
    monitor: Monitor,
    model: Model,
    /// The generation of which the table is known.
    generation: u32,
    /// Whether the table has to be read again, whatever its generation.
    stale: bool,
    /// How often in a row the owner of the table did not answer.
    unanswered: usize,
}

/// A network namespace, as the kernel numbers its file.
pub(crate) type Namespace = (u64, u64);

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

impl Own {
    /// Generations that are remembered: as many as notifications can wait, and more.
    const REMEMBERED: usize = 4096;

    fn relayed(&mut self, generation: u32, by: Option<Process>) {
        if self.generations.len() >= Self::REMEMBERED {
            self.generations.pop_first();
        }
        self.generations.insert(generation, by);
    }

    /// Who made a change, where that is not this backend.
    fn foreign(&self, change: Change) -> Option<ForeignChange> {
        match self.generations.get(&change.generation) {
            Some(None) => None,
            Some(Some(process)) => {
                let process = Some((process.id, process.name.clone()));
                Some(foreign_change(Change { process, ..change }))
            }
            None => (!self.ports.contains(&change.port)).then(|| foreign_change(change)),
        }
    }
}

fn lock(own: &Mutex<Own>) -> MutexGuard<'_, Own> {
    own.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a transaction was not carried out.
enum Failed {
    Commit(Box<CommitError<Cause>>),
    /// Its owner could not be asked.
    Owner(AskError),
}

impl State {
    fn open(namespace: Namespace, own: &Mutex<Own>) -> Result<Self, Error> {
        // What changes from here on is told.
        let monitor = Monitor::open(layout::tables())?;
        let mut connection = Connection::open()?;
        lock(own).ports.insert(connection.port());
        let (model, generation) = read(&mut connection)?;
        Ok(Self {
            namespace,
            server: None,
            may_own: None,
            connection,
            monitor,
            model,
            generation,
            stale: false,
            unanswered: 0,
        })
    }

    /// Takes note of what the kernel told; reads the table again where others changed it.
    fn refresh(&mut self, own: &Mutex<Own>) -> Result<(), Error> {
        let events = self.monitor.events()?;
        let own = lock(own);
        let foreign = events.iter().any(|event| match event {
            Event::Missed => true,
            Event::Changed(change) => {
                is_later(change.generation, self.generation) && !own.ports.contains(&change.port)
            }
        });
        drop(own);
        if foreign || self.stale {
            (self.model, self.generation) = read(&mut self.connection)?;
            self.stale = false;
        } else if let Some(told) = self.monitor.generation().filter(|told| is_later(*told, self.generation)) {
            self.generation = told;
        }
        Ok(())
    }

    fn owns(&self) -> bool {
        self.model.owner == Some(self.connection.port())
    }

    /// Whether it owns each table that exists.
    fn owns_all(&self) -> bool {
        self.model.tables().all(|(_, _, owner)| owner == Some(self.connection.port()))
    }

    fn is_owned_by_another(&self) -> bool {
        self.model.owner.is_some() && !self.owns()
    }

    /// Carries out a transaction, itself or by the table's owner.
    fn commit(
        &mut self,
        own: &Mutex<Own>,
        directory: Option<&Path>,
        transaction: &Transaction<Cause>,
    ) -> Result<(), Failed> {
        let expected = Some(self.generation);
        if self.is_owned_by_another() {
            let path = directory.map(owner::socket);
            let mut failed = None;
            let result = self.connection.commit_through(transaction, expected, |batch| {
                let unknown = || AskError::Refused("its directory is not known".into());
                let answers = path
                    .as_deref()
                    .ok_or_else(unknown)
                    .and_then(|path| relay::ask(path, self.namespace, batch));
                answers.map_err(|error| {
                    failed = Some(error);
                    Error::Io(std::io::ErrorKind::NotConnected.into())
                })
            });
            match (result, failed) {
                (_, Some(error)) => return Err(Failed::Owner(error)),
                (Err(error), None) => return Err(Failed::Commit(Box::new(error))),
                (Ok(()), None) => lock(own).relayed(self.generation.wrapping_add(1), None),
            }
        } else {
            self.connection.commit(transaction, expected).map_err(|error| Failed::Commit(Box::new(error)))?;
        }
        self.carried_out(transaction);
        Ok(())
    }

    /// Claims the tables.
    fn claim(&mut self) -> Result<(), Box<CommitError<Cause>>> {
        // An orphan is claimed; any other has to be made again, in one transaction.
        let unowned = self.model.tables().filter(|(.., owner)| *owner != Some(self.connection.port()));
        let operations: Vec<Operation> = unowned
            .flat_map(|(table, flags, _)| match flags.persist {
                true => vec![Operation::AddTable { table, flags: OWNED }],
                false => self.model.made_again(&table, OWNED),
            })
            .collect();
        let object = KernelObject::Table { table: layout::TABLE.into() };
        let cause = Cause { port: None, origin: Origin::BUILT_IN, object, rule: String::new(), set: None };
        let mut transaction = Transaction::new();
        transaction.extend(operations.into_iter().map(|operation| (operation, cause.clone())));
        self.connection.commit(&transaction, Some(self.generation))?;
        self.carried_out(&transaction);
        Ok(())
    }

    /// Serves others who want to change the table, and tells whether it does.
    fn serve(&mut self, shared: &Arc<Shared>, directory: &Path) -> bool {
        if self.server.is_some() {
            return true;
        }
        let shared = Arc::downgrade(shared);
        let started = Server::start(directory, move |stream| {
            relay::serve(stream, |request| match shared.upgrade() {
                Some(shared) => shared.carry_out(&request, relay::process(stream)),
                None => Reply::NotOwner,
            })
        });
        match started {
            Ok(server) => self.server = Some(server),
            Err(error) => {
                log::warn!(
                    "table {} is not owned: other processes could not ask for changes at {}: {error}",
                    layout::TABLE,
                    owner::socket(directory).display()
                );
            }
        }
        self.server.is_some()
    }

    /// Waits for the kernel to tell of a transaction that it carried out.
    fn wait_until_told(&self) {
        let mut ready = [PollFd::new(self.monitor.as_fd(), PollFlags::POLLIN)];
        // What keeps it from waiting, the next attempt meets, too.
        let _ = poll(&mut ready, PollTimeout::try_from(TOLD_WITHIN).unwrap_or(PollTimeout::ZERO));
    }

    fn carried_out(&mut self, transaction: &Transaction<Cause>) {
        self.generation = self.generation.wrapping_add(1);
        // An owner that is asked for a table owns that, too.
        let owner = match self.is_owned_by_another() {
            true => self.model.owner,
            false => Some(self.connection.port()),
        };
        for (operation, _) in transaction.operations() {
            self.model.carry_out(operation.clone());
            if let (Operation::AddTable { table, flags }, Some(owner)) = (operation, owner)
                && flags.owner
            {
                self.model.owned(table, owner);
            }
        }
    }
}

fn read(connection: &mut Connection) -> Result<(Model, u32), Error> {
    for _ in 0..ATTEMPTS {
        let generation = connection.generation()?;
        let (table, host) = (connection.table(&layout::table())?, connection.table(&host::table())?);
        if connection.generation()? == generation {
            return Ok((Model::of(table, host), generation));
        }
    }
    Err(Error::Interrupted { table: layout::table(), times: ATTEMPTS })
}

/// Warnings, sorted.
fn merged(mut warnings: Vec<Warning>, more: Vec<Warning>) -> Vec<Warning> {
    warnings.extend(more);
    warnings.sort();
    warnings
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

// ---- changes of others ----

struct Follower {
    monitor: Monitor,
    own: Arc<Mutex<Own>>,
}

impl Watch for Follower {
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError> {
        let events = self.monitor.events().map_err(unavailable)?;
        let own = lock(&self.own);
        let foreign = events.into_iter().filter_map(|event| match event {
            Event::Missed => Some(ForeignChange::unknown()),
            Event::Changed(change) => own.foreign(change),
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
    let table = |name: &str| layout::table_of(name).to_string();
    let more = change.parts.len() > SHOWN;
    let objects = change.parts.into_iter().take(SHOWN).map(|part| match part {
        Part::Table(table) => KernelObject::Table { table: table.to_string() },
        Part::Chain(chain) => KernelObject::Chain { table: table(&chain), chain },
        Part::Set(set) => KernelObject::Set { table: table(&set), set },
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

impl CommitFailure {
    fn into_error(self) -> ApplyError {
        match self {
            Self::NoHelper(helper) => unavailable(Error::Malformed(format!("helper {helper}"))),
            Self::Apply(error) => error,
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn unavailable(error: Error) -> ApplyError {
    let why = with_causes(&error);
    ApplyError::Unavailable { scope: Scope::Everything, what: "nftables".into(), why }
}

/// Whether the kernel refuses because somebody else owns the table.
fn is_owned(error: &CommitError<Cause>) -> bool {
    matches!(error, CommitError::Refused { first, .. } if first.errno == Errno::EPERM)
}

/// The table's owner does not do what it is asked for.
fn owned(directory: Option<&Path>, error: &AskError) -> ApplyError {
    let place = match directory {
        Some(directory) => format!(" at {}", owner::socket(directory).display()),
        None => String::new(),
    };
    let why = with_causes(error);
    let why = format!(
        "another process owns it, and is asked for changes{place}, but {why}; use the state directory of that process, or \
         end it"
    );
    ApplyError::Unavailable { scope: Scope::Everything, what: format!("table {}", layout::TABLE), why }
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
    let no_tracking = || {
        lacks(
            Scope::IpRules,
            "tracking of bridged connections",
            "this kernel has no nf_conntrack_bridge (Linux 5.3 and newer): use the backend xtables, or filters without \
             rules on states",
        )
    };
    // For the rule that sets zones the kernel does not name the right expression.
    let for_zones = refusal_.tag.object == plan::chain_object(&layout::zones().0.name);
    match &refusal_.expression {
        Some(Expr::Load { load: Load::Ct { .. }, .. } | Expr::Dynset(_)) if unsupported => no_tracking(),
        _ if unsupported && for_zones => no_tracking(),
        Some(Expr::Reject(_)) if unsupported => lacks(
            Scope::IpRules,
            "rejecting bridged packets",
            "this kernel has no nft_reject_bridge: use the backend xtables, or drop instead of reject",
        ),
        _ if refusal_.errno == Errno::EPERM => lacks(
            Scope::Everything,
            "table bridge nwfilter",
            "this process may not change it (CAP_NET_ADMIN), or another one owns it",
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
    let Cause { port, origin, object, rule, set } = cause;
    if let Some(set) = set {
        return ApplyError::Set { set, why };
    }
    match port {
        Some(port) => ApplyError::Refused(Box::new(Refused { port, origin, object, rule, why })),
        None => ApplyError::Unavailable { scope: Scope::Everything, what: object.to_string(), why },
    }
}
