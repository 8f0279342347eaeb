//! The kernel's trace of packets: which rules of nf_tables a packet matched, of whatever table.
//!
//! Packets are traced for which a rule sets `meta nftrace`. The rules of iptables-nft and ebtables-nft are among those
//! that are told.

use std::os::fd::{AsFd, BorrowedFd};

use nix::libc;

use super::error::Error;
use super::listener::{Heard, Listener};
use super::wire::{Attributes, Message};

/// Bytes of messages that may wait. One takes some 200 bytes; when more are lost, the kernel says so.
const BACKLOG: usize = 8 << 20;

/// `NFNLGRP_NFTRACE`
const GROUP: u32 = 9;
/// `NFT_MSG_TRACE`
const TRACE: i32 = 17;

// NFTA_TRACE_*
const TABLE: u16 = 1;
const CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const VERDICT: u16 = 5;
const ID: u16 = 6;
const LINK_HEADER: u16 = 7;
const NETWORK_HEADER: u16 = 8;
const TRANSPORT_HEADER: u16 = 9;

/// `NFTA_VERDICT_CODE`
const VERDICT_CODE: u16 = 1;
/// Hears of traced packets from its opening on.
#[derive(Debug)]
pub struct Tracer {
    listener: Listener,
}

/// Something that is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Traced {
    /// A rule matched a packet.
    Rule(TracedRule),
    /// More happened than could be told.
    Missed,
}

/// A rule that matched a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedRule {
    /// What the packet is told by. Packets that do not pass at the same time may have the same.
    pub packet: u32,
    /// The family of the rule's table, `NFPROTO_*`.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Its handle.
    pub handle: u64,
    /// Whether the packet was dropped.
    pub drops: bool,
    /// The beginning of the packet, where this is the first rule of its hook.
    pub frame: Option<TracedFrame>,
}

/// The beginnings of a packet's headers. The rest of the packet is not told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TracedFrame {
    /// The Ethernet header.
    pub link: Vec<u8>,
    /// What follows it, at most 40 bytes.
    pub network: Vec<u8>,
    /// The header behind IP's, at most 20 bytes.
    pub transport: Vec<u8>,
}

impl Tracer {
    /// Listens in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { listener: Listener::open(1 << (GROUP - 1), BACKLOG)? })
    }

    /// What was told since the last call. Does not wait.
    pub fn told(&mut self) -> Result<Vec<Traced>, Error> {
        let mut told = Vec::new();
        self.listener.receive(|heard| {
            match heard {
                Heard::Message(message) => told.extend(rule(&message)?.map(Traced::Rule)),
                Heard::Missed => told.push(Traced::Missed),
            }
            Ok(())
        })?;
        Ok(told)
    }
}

impl AsFd for Tracer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// The rule that a message is about; none where it is about the end of a chain.
fn rule(message: &Message<'_>) -> Result<Option<TracedRule>, Error> {
    let kind = i32::from(message.kind);
    if kind != (libc::NFNL_SUBSYS_NFTABLES << 8 | TRACE) {
        return Ok(None);
    }
    let (family, attributes) = message.family()?;
    // The end of a chain has no handle.
    let Some(handle) = attributes.u64(RULE_HANDLE).filter(|handle| *handle != 0) else { return Ok(None) };
    let text = |kind| attributes.str(kind).unwrap_or_default().to_owned();
    let verdict = attributes.nested(VERDICT).and_then(|verdict| verdict.u32(VERDICT_CODE));
    Ok(Some(TracedRule {
        packet: attributes.need_u32(ID, "packet")?,
        family,
        table: text(TABLE),
        chain: text(CHAIN),
        handle,
        drops: verdict == Some(libc::NF_DROP.cast_unsigned()),
        frame: frame(attributes),
    }))
}

fn frame(attributes: Attributes<'_>) -> Option<TracedFrame> {
    let bytes = |kind| attributes.get(kind).unwrap_or_default().to_vec();
    let link = attributes.get(LINK_HEADER)?.to_vec();
    Some(TracedFrame { link, network: bytes(NETWORK_HEADER), transport: bytes(TRANSPORT_HEADER) })
}
