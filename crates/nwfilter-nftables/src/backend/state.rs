//! What a backend knows of the tables of a network namespace, and how it changes them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_rules::{ApplyError, ForeignChange, KernelObject, Origin, Process};

use super::follower::foreign_change;
use super::{ATTEMPTS, Shared, TOLD_WITHIN};
use crate::kernel::{Change, CommitError, Connection, Error, Event, Monitor, Operation, Transaction};
use crate::model::Model;
use crate::owner::{self, OWNED, Server};
use crate::plan::Cause;
use crate::relay::{self, AskError, Reply};
use crate::{host, layout};

/// Which changes are a backend's own.
#[derive(Debug, Default)]
pub(super) struct Own {
    /// The netlink ports of its connections.
    pub(super) ports: BTreeSet<u32>,
    /// The generations of changes that went by another port than their author's: who made them, or nobody but this backend.
    pub(super) generations: BTreeMap<u32, Option<Process>>,
}

#[derive(Debug)]
pub(super) struct State {
    /// The network namespace.
    pub(super) namespace: Namespace,
    /// Serves others, for an owner. It ends before the connection does, so that nobody asks in vain.
    pub(super) server: Option<Server>,
    /// Whether this backend can own the table, as far as it was tried.
    pub(super) may_own: Option<bool>,
    pub(super) connection: Connection,
    /// Reports which rules others change. It is opened at their first change: while anybody listens, the kernel makes a message
    /// of each element that changes, which costs several times as much as the change.
    pub(super) monitor: Option<Monitor>,
    pub(super) model: Model,
    /// The generation of which the table is known.
    pub(super) generation: u32,
    /// Whether the table has to be read again, whatever its generation.
    pub(super) stale: bool,
    /// How often in a row the owner of the table did not answer.
    pub(super) unanswered: usize,
}

/// A network namespace, as the kernel numbers its file.
pub(crate) type Namespace = (u64, u64);

impl Own {
    /// Generations that are remembered: as many as notifications can wait, and more.
    const REMEMBERED: usize = 4096;

    pub(super) fn relayed(&mut self, generation: u32, by: Option<Process>) {
        if self.generations.len() >= Self::REMEMBERED {
            self.generations.pop_first();
        }
        self.generations.insert(generation, by);
    }

    /// Who made a change, where that is not this backend.
    pub(super) fn foreign(&self, change: Change) -> Option<ForeignChange> {
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

pub(super) fn lock(own: &Mutex<Own>) -> MutexGuard<'_, Own> {
    own.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a transaction was not carried out.
pub(super) enum Failed {
    Commit(Box<CommitError<Cause>>),
    /// Its owner could not be asked.
    Owner(AskError),
}

impl State {
    pub(super) fn open(namespace: Namespace, own: &Mutex<Own>) -> Result<Self, Error> {
        let mut connection = Connection::open()?;
        lock(own).ports.insert(connection.port());
        let (model, generation) = read(&mut connection)?;
        Ok(Self {
            namespace,
            server: None,
            may_own: None,
            connection,
            monitor: None,
            model,
            generation,
            stale: false,
            unanswered: 0,
        })
    }

    /// Reads the tables again if others changed them.
    pub(super) fn refresh(&mut self, own: &Mutex<Own>) -> Result<(), Error> {
        match &mut self.monitor {
            Some(monitor) => {
                let (events, reported) = (monitor.events()?, monitor.generation());
                self.follow(&events, reported, own)?;
            }
            None => {
                let is_changed = self.connection.generation()? != self.generation;
                if is_changed {
                    self.monitor = Some(Monitor::open(layout::tables())?);
                }
                if is_changed || self.stale {
                    self.read_again()?;
                }
            }
        }
        if self.is_owned_by_another() {
            // The kernel does not report the end of an owner.
            self.model.owner = self.connection.owner(&layout::table())?;
        }
        Ok(())
    }

    fn read_again(&mut self) -> Result<(), Error> {
        (self.model, self.generation) = read(&mut self.connection)?;
        self.stale = false;
        Ok(())
    }

    /// Takes note of what the monitor reports.
    fn follow(&mut self, events: &[Event], reported: Option<u32>, own: &Mutex<Own>) -> Result<(), Error> {
        let own = lock(own);
        let foreign = events.iter().any(|event| match event {
            Event::Missed => true,
            Event::Changed(change) => {
                is_later(change.generation, self.generation) && !own.ports.contains(&change.port)
            }
        });
        drop(own);
        if foreign || self.stale {
            self.read_again()?;
        } else if let Some(reported) = reported.filter(|reported| is_later(*reported, self.generation)) {
            self.generation = reported;
        }
        Ok(())
    }

    pub(super) fn owns(&self) -> bool {
        self.model.owner == Some(self.connection.port())
    }

    /// Whether it owns each table that exists.
    pub(super) fn owns_all(&self) -> bool {
        self.model.tables().all(|(_, _, owner)| owner == Some(self.connection.port()))
    }

    pub(super) fn is_owned_by_another(&self) -> bool {
        self.model.owner.is_some() && !self.owns()
    }

    /// Carries out a transaction, itself or by the table's owner.
    pub(super) fn commit(
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
    pub(super) fn claim(&mut self) -> Result<(), Box<CommitError<Cause>>> {
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
    pub(super) fn serve(&mut self, shared: &Arc<Shared>, directory: &Path) -> bool {
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

    /// Waits for the kernel to report a transaction.
    pub(super) fn wait_until_told(&self) {
        let Some(monitor) = &self.monitor else { return };
        let mut ready = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
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

/// Whether one generation comes after another. The kernel's count goes round.
fn is_later(generation: u32, than: u32) -> bool {
    generation.wrapping_sub(than).cast_signed() > 0
}

pub(super) fn namespace() -> Result<Namespace, ApplyError> {
    const FILE: &str = "/proc/thread-self/ns/net";
    let file = std::fs::metadata(FILE).map_err(|source| ApplyError::Io { path: FILE.into(), source })?;
    Ok((file.dev(), file.ino()))
}
