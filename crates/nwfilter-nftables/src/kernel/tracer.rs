//! The kernel's trace of packets: which rules of nf_tables a packet matched, of whatever table.
//!
//! Packets are traced for which a rule sets `meta nftrace`. The rules of iptables-nft and ebtables-nft are among those
//! that are told.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce};

use super::connection::receive_now;
use super::error::Error;
use super::wire::{Attributes, Message, messages};

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
    socket: Socket,
    buffer: Vec<u8>,
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
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        if setsockopt(&socket, RcvBufForce, &BACKLOG).is_err() {
            setsockopt(&socket, RcvBuf, &BACKLOG).map_err(io::Error::from)?;
        }
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, 1 << (GROUP - 1)))?;
        Ok(Self { socket, buffer: vec![0; 64 << 10] })
    }

    /// What was told since the last call. Does not wait.
    pub fn told(&mut self) -> Result<Vec<Traced>, Error> {
        let mut told = Vec::new();
        loop {
            match receive_now(&self.socket, &mut self.buffer) {
                Ok(Some(len)) => {
                    for message in messages(&self.buffer[..len]) {
                        told.extend(rule(&message?)?.map(Traced::Rule));
                    }
                }
                Ok(None) => return Ok(told),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => told.push(Traced::Missed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Tracer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
