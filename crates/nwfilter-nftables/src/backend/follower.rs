//! Changes of others.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nwfilter_rules::{ApplyError, ForeignChange, KernelObject, Process, Watch};

use super::failure::unavailable;
use super::state::{Own, lock};
use crate::kernel::{Change, Event, Monitor, Part};
use crate::layout;

/// Tells of changes that this backend did not make.
pub(super) struct Follower {
    pub(super) monitor: Monitor,
    pub(super) own: Arc<Mutex<Own>>,
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

pub(super) fn foreign_change(change: Change) -> ForeignChange {
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
