//! The kernel's notifications: what each transaction changed in a table, and who sent it.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};

use nix::libc;

use super::batch::{CHAIN_NAME, RULE_CHAIN, family_number};
use super::connection::GEN_ID;
use super::error::Error;
use super::listener::{Heard, Listener};
use super::set_wire::{LIST_SET, SET_NAME};
use super::table::TableId;
use super::wire::{Attributes, Message};

/// Bytes of notifications that may wait. A rule takes about a kilobyte; when more are lost, the kernel says so.
const BACKLOG: usize = 16 << 20;
/// The first attribute of each message of nf_tables but those of the generation: the table's name.
const TABLE: u16 = 1;
/// `NFTA_GEN_PROC_PID`
const GEN_PROCESS: u16 = 2;
/// `NFTA_GEN_PROC_NAME`
const GEN_PROGRAM: u16 = 3;

/// What the kernel tells of some tables from now on.
///
/// Wait for its descriptor to be readable, then ask for the [`events`](Self::events).
#[derive(Debug)]
pub struct Monitor {
    listener: Listener,
    tables: Vec<TableId>,
    /// What is known of the transaction that is being told.
    parts: BTreeSet<Part>,
    /// The generation that the last transaction that was told made, of whatever table.
    generation: Option<u32>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A transaction changed a table.
    Changed(Change),
    /// More happened than could be told: read the tables again.
    Missed,
}

/// A transaction that changed a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The generation of the rules that it made.
    pub generation: u32,
    /// The netlink port of whoever sent it: equal to [`Connection::port`](super::Connection::port) for one's own.
    pub port: u32,
    /// The process, as its own namespace numbers it, and the program's name.
    pub process: Option<(u32, String)>,
    /// What it changed.
    pub parts: BTreeSet<Part>,
}

/// A part of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// A table itself, or an object of it.
    Table(TableId),
    /// A chain, or rules of it.
    Chain(String),
    /// A set or map, or elements of it.
    Set(String),
}

impl Monitor {
    /// Listens in the network namespace of the calling thread.
    pub fn open(tables: impl IntoIterator<Item = TableId>) -> Result<Self, Error> {
        let listener = Listener::open(1 << (libc::NFNLGRP_NFTABLES - 1), BACKLOG)?;
        let tables = tables.into_iter().collect();
        Ok(Self { listener, tables, parts: BTreeSet::new(), generation: None })
    }

    /// The generation that the last transaction made which was told by now, of whatever table; `None` if none was.
    pub fn generation(&self) -> Option<u32> {
        self.generation
    }

    /// What happened since it was last asked. Does not wait.
    pub fn events(&mut self) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        let Self { listener, tables, parts, generation } = self;
        listener.receive(|heard| {
            let Heard::Message(message) = heard else {
                events.push(Event::Missed);
                return Ok(());
            };
            let Some(change) = take(&message, tables, parts)? else { return Ok(()) };
            *generation = Some(change.generation);
            // Most are of other tables.
            if !change.parts.is_empty() {
                events.push(Event::Changed(change));
            }
            Ok(())
        })?;
        Ok(events)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Takes note of a message; gives the change that it ends. The kernel tells each transaction's changes, then who made
/// them.
fn take(
    message: &Message<'_>,
    tables: &[TableId],
    parts: &mut BTreeSet<Part>,
) -> Result<Option<Change>, Error> {
    if i32::from(message.kind) >> 8 != libc::NFNL_SUBSYS_NFTABLES {
        return Ok(None);
    }
    let kind = i32::from(message.kind) & 0xff;
    let (family, attributes) = message.family()?;
    if kind != libc::NFT_MSG_NEWGEN {
        let ours = tables.iter().find(|table| {
            family == family_number(table.family) && attributes.str(TABLE) == Some(table.name.as_str())
        });
        parts.extend(ours.map(|table| part(kind, attributes, table)));
        return Ok(None);
    }
    let parts = std::mem::take(parts);
    let program = attributes.str(GEN_PROGRAM).map(String::from);
    Ok(Some(Change {
        generation: attributes.u32(GEN_ID).unwrap_or(0),
        port: message.port,
        process: attributes.u32(GEN_PROCESS).zip(program),
        parts,
    }))
}

fn part(kind: i32, attributes: Attributes<'_>, table: &TableId) -> Part {
    let chain = |kind| attributes.str(kind).map(|name| Part::Chain(name.into()));
    let set = |kind| attributes.str(kind).map(|name| Part::Set(name.into()));
    let part = match kind {
        libc::NFT_MSG_NEWCHAIN | libc::NFT_MSG_DELCHAIN => chain(CHAIN_NAME),
        libc::NFT_MSG_NEWRULE | libc::NFT_MSG_DELRULE => chain(RULE_CHAIN),
        libc::NFT_MSG_NEWSET | libc::NFT_MSG_DELSET => set(SET_NAME),
        libc::NFT_MSG_NEWSETELEM | libc::NFT_MSG_DELSETELEM => set(LIST_SET),
        _ => None,
    };
    part.unwrap_or_else(|| Part::Table(table.clone()))
}
