//! Reads nf_tables' generation and its notifications of changes over netlink: what changed, and who changed it.
//!
//! Message types are those of `linux/netfilter/nf_tables.h`, attribute numbers those of its `enum nft_*_attributes`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{GetStruct, RcvBuf, RcvBufForce};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockopt, recvfrom, send,
    setsockopt, socket,
};
use nwfilter_rules::{ApplyError, Count, Family, ForeignChange, KernelObject, Process, Scope};

use crate::history::{Changes, History};
use crate::host::{bridge_switch, is_bridge_switch_on};
use crate::plan::concerns;
use crate::saved::Saved;
use crate::tool::{self, TableId, Tool};

/// struct nlmsghdr
const HEADER: usize = 16;
/// struct nfgenmsg
const FAMILY_HEADER: usize = 4;
/// struct nlattr
const ATTRIBUTE_HEADER: usize = 4;
/// The kernel packs messages into datagrams of a page or 8 KiB; a longer datagram holds a single message.
const DATAGRAM: usize = 64 * 1024;

/// Size of the receive buffer. A rule takes about a kilobyte; if the buffer overflows, the kernel reports it.
const BACKLOG: usize = 16 << 20;
/// How often to read a tool of the legacy variant: the kernel does not notify its changes.
const LEGACY_INTERVAL: Duration = Duration::from_secs(5);
/// How often to read the sysctls: the kernel does not notify their changes either.
const SWITCH_INTERVAL: Duration = Duration::from_secs(1);
/// The most chains that one reported change names.
const SHOWN: usize = 6;

/// NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE
const TABLE: u16 = 1;
/// NFTA_RULE_CHAIN
const CHAIN_OF_RULE: u16 = 2;
/// NFTA_RULE_HANDLE
const HANDLE_OF_RULE: u16 = 3;
/// NFTA_RULE_EXPRESSIONS
const EXPRESSIONS_OF_RULE: u16 = 4;
/// NFTA_EXPR_NAME
const EXPRESSION_NAME: u16 = 1;
/// NFTA_EXPR_DATA
const EXPRESSION_DATA: u16 = 2;
/// NFTA_COUNTER_BYTES
const COUNTED_BYTES: u16 = 1;
/// NFTA_COUNTER_PACKETS
const COUNTED_PACKETS: u16 = 2;
/// NFTA_CHAIN_NAME
const NAME_OF_CHAIN: u16 = 3;
/// NFTA_GEN_ID
const GEN_ID: u16 = 1;
/// NFTA_GEN_PROC_PID
const GEN_PROCESS: u16 = 2;
/// NFTA_GEN_PROC_NAME
const GEN_PROGRAM: u16 = 3;

/// The generation of the nf_tables ruleset of the calling thread's network namespace.
///
/// The kernel counts committed transactions of all tables and families. A run of a restore tool adds one for each table
/// that it changes or creates. Input that changes nothing, and reading, add nothing. The legacy variants of the tools do
/// not change the generation.
///
/// Needs `CAP_NET_ADMIN`.
pub fn generation() -> io::Result<u32> {
    generation_number(GEN_ID)
}

/// Identifies the ruleset of a network namespace at one time, uniquely until the next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation {
    /// The cookie of the namespace, which the kernel never reuses.
    pub(crate) namespace: u64,
    /// See [`generation`].
    pub(crate) number: u32,
}

/// The socket option for the cookie of the socket's namespace, since Linux 5.14.
#[derive(Clone, Copy, Debug)]
struct NetnsCookie;

nix::getsockopt_impl!(NetnsCookie, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, u64, GetStruct<u64>);

impl Generation {
    /// The current one of the calling thread's network namespace.
    pub(crate) fn now() -> io::Result<Self> {
        let socket = open(0)?;
        Ok(Self { namespace: getsockopt(&socket, NetnsCookie)?, number: ask(&socket, GEN_ID)? })
    }

    /// The one after one more transaction.
    pub(crate) fn next(self) -> Self {
        Self { number: self.number.wrapping_add(1), ..self }
    }

    /// The number of transactions from this one to a later one. `None` if that is of another namespace.
    pub(crate) fn until(self, later: Self) -> Option<u32> {
        (self.namespace == later.namespace).then(|| later.number.wrapping_sub(self.number))
    }
}

/// An attribute of the kernel's answer about the generation.
fn generation_number(wanted: u16) -> io::Result<u32> {
    ask(&open(0)?, wanted)
}

fn ask(socket: &OwnedFd, wanted: u16) -> io::Result<u32> {
    send(socket.as_raw_fd(), &generation_request(), MsgFlags::empty())?;
    let mut buffer = vec![0; DATAGRAM];
    // The kernel answers within the call that asks.
    let (length, _) = recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer)?;
    let answer = messages(&buffer[..length]).find_map(|message| match message {
        Message::Refused(error) => Some(Err(io::Error::from_raw_os_error(error))),
        Message::Nftables { kind: libc::NFT_MSG_NEWGEN, attributes, .. } => {
            number(attributes, wanted).map(Ok)
        }
        Message::Nftables { .. } | Message::Done => None,
    });
    answer.unwrap_or_else(|| Err(io::ErrorKind::InvalidData.into()))
}

/// A non-blocking socket that joined the multicast groups of a mask.
fn open(groups: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// NFT_MSG_GETGEN
fn generation_request() -> Vec<u8> {
    request(libc::NFT_MSG_GETGEN, 0, libc::AF_UNSPEC, &[])
}

/// A question, with attributes that are texts.
fn request(kind: libc::c_int, flags: libc::c_int, family: libc::c_int, texts: &[(u16, &str)]) -> Vec<u8> {
    let mut attributes = Vec::new();
    for (attribute, text) in texts {
        let length = ATTRIBUTE_HEADER + text.len() + 1;
        attributes.extend((length as u16).to_ne_bytes());
        attributes.extend(attribute.to_ne_bytes());
        attributes.extend(text.bytes());
        // The end of the text, and what is missing to a word.
        attributes.resize(attributes.len() + length.next_multiple_of(4) - length + 1, 0);
    }
    let length = HEADER + FAMILY_HEADER + attributes.len();
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
    let mut request = Vec::with_capacity(length);
    request.extend((length as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    // The sequence number and the sender, which the kernel knows.
    request.extend([0; 8]);
    // Family, version, resource.
    request.extend([family as u8, libc::NFNETLINK_V0 as u8, 0, 0]);
    request.extend(attributes);
    request
}

// ---- rules ----

/// A rule that the kernel holds, with what it has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KernelRule {
    pub(crate) handle: u64,
    pub(crate) count: Count,
}

/// The rules of a table by chain, first to last: of one chain where one is named, else of all. A table or chain that
/// there is not has none.
pub(crate) fn rules(table: TableId, chain: Option<&str>) -> io::Result<BTreeMap<String, Vec<KernelRule>>> {
    let socket = open(0)?;
    let texts = [(TABLE, table.name()), (CHAIN_OF_RULE, chain.unwrap_or_default())];
    let texts = &texts[..=usize::from(chain.is_some())];
    let request = request(libc::NFT_MSG_GETRULE, libc::NLM_F_DUMP, family(table.tool()), texts);
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut rules: BTreeMap<String, Vec<KernelRule>> = BTreeMap::new();
    let mut buffer = vec![0; DATAGRAM];
    loop {
        // The kernel has more ready whenever it is asked, until it says that it is done.
        let length = match recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, _)) => length,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for message in messages(&buffer[..length]) {
            match message {
                Message::Done => return Ok(rules),
                Message::Refused(libc::ENOENT) => return Ok(BTreeMap::new()),
                Message::Refused(error) => return Err(io::Error::from_raw_os_error(error)),
                Message::Nftables { attributes, .. } => {
                    let (Some(chain), Some(rule)) = (text(attributes, CHAIN_OF_RULE), rule(attributes))
                    else {
                        return Err(io::ErrorKind::InvalidData.into());
                    };
                    match rules.get_mut(chain) {
                        Some(rules) => rules.push(rule),
                        None => drop(rules.insert(chain.to_owned(), vec![rule])),
                    }
                }
            }
        }
    }
}

fn rule(attributes: &[u8]) -> Option<KernelRule> {
    let handle = long(attributes, HANDLE_OF_RULE)?;
    let expressions = attribute(attributes, EXPRESSIONS_OF_RULE).unwrap_or_default();
    let counter = each_attribute(expressions)
        .map(|(_, expression)| expression)
        .find(|expression| text(expression, EXPRESSION_NAME) == Some("counter"))
        .and_then(|counter| attribute(counter, EXPRESSION_DATA));
    let count = counter.and_then(|counter| {
        Some(Count { packets: long(counter, COUNTED_PACKETS)?, bytes: long(counter, COUNTED_BYTES)? })
    });
    Some(KernelRule { handle, count: count.unwrap_or_default() })
}

/// The family of a tool's tables.
pub(crate) fn family(tool: Tool) -> libc::c_int {
    match tool {
        Tool::Iptables => libc::NFPROTO_IPV4,
        Tool::Ip6tables => libc::NFPROTO_IPV6,
        Tool::Ebtables => libc::NFPROTO_BRIDGE,
    }
}

// ---- changes ----

/// Watches this backend's tables.
///
/// The kernel notifies each transaction: first what it changed, then which process made it. It does not notify changes by
/// the legacy variants of the tools, nor those of sysctls: both are read every few seconds.
pub(crate) struct Watch {
    socket: OwnedFd,
    buffer: Vec<u8>,
    transaction: Transaction,
    /// The last output of the save tools of the legacy variant.
    legacy: BTreeMap<Tool, Saved>,
    asked: Instant,
    /// The families whose sysctl was 0 when it was read last.
    off: BTreeSet<Family>,
}

/// The transaction whose notifications are arriving.
struct Transaction {
    /// Its changes of this backend's tables, except in rules of chains of others.
    changes: Changes,
    /// The chains of ours that it changes, as many as are reported.
    objects: BTreeSet<KernelObject>,
    /// Whether process ids of the notifications are those of this process's PID namespace.
    same_numbers: bool,
    /// The cookie of the namespace; `None` where the kernel has none.
    namespace: Option<u64>,
    history: SharedHistory,
    heard: Heard,
}

/// Whether notifications may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// All notifications of the current transaction arrived.
    All,
    /// The beginning of the current transaction may be missing.
    End,
    /// Some were lost, before some that still wait in the buffer.
    NotAll,
}

/// Gets what a watch reports, to invalidate cached tables.
pub(crate) type SharedHistory = Arc<Mutex<History>>;

impl Watch {
    /// Watches from now on.
    pub(crate) fn open(history: SharedHistory) -> Result<Self, ApplyError> {
        let mut legacy = BTreeMap::new();
        for tool in Tool::ALL {
            if tool::is_legacy(tool)? {
                legacy.insert(tool, Saved::parse(&tool::save(tool)?));
            }
        }
        let subscribe = || {
            let socket = open(1 << (libc::NFNLGRP_NFTABLES - 1))?;
            let forced = setsockopt(&socket, RcvBufForce, &BACKLOG);
            forced.or_else(|_| setsockopt(&socket, RcvBuf, &BACKLOG))?;
            let me = nix::unistd::gettid().as_raw().cast_unsigned();
            let same_numbers = generation_number(GEN_PROCESS).is_ok_and(|process| process == me);
            let namespace = getsockopt(&socket, NetnsCookie).ok();
            let (changes, objects) = (Changes::default(), BTreeSet::new());
            let heard = Heard::End;
            Ok((socket, Transaction { changes, objects, same_numbers, namespace, history, heard }))
        };
        let (socket, transaction) = subscribe().map_err(cannot_follow)?;
        let off = Family::ALL.into_iter().filter(|family| !is_bridge_switch_on(*family)).collect();
        Ok(Self { socket, buffer: vec![0; DATAGRAM], transaction, legacy, asked: Instant::now(), off })
    }

    /// The changes that the kernel notifies.
    fn told(&mut self, found: &mut Vec<ForeignChange>) -> io::Result<()> {
        loop {
            match recvfrom::<NetlinkAddr>(self.socket.as_raw_fd(), &mut self.buffer) {
                Ok((length, sender)) if sender.is_some_and(|sender| sender.pid() == 0) => {
                    let messages = messages(&self.buffer[..length]);
                    found.extend(messages.filter_map(|message| self.transaction.take(&message)));
                }
                Ok(_) | Err(Errno::EINTR) => (),
                Err(Errno::EAGAIN) => {
                    self.transaction.all_is_heard();
                    return Ok(());
                }
                Err(Errno::ENOBUFS) => {
                    self.transaction.miss();
                    found.push(ForeignChange::unknown());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn look_at_switches(&mut self, found: &mut Vec<ForeignChange>) {
        for family in Family::ALL {
            if is_bridge_switch_on(family) {
                self.off.remove(&family);
            } else if self.off.insert(family) {
                let setting = bridge_switch(family).to_owned();
                found.push(ForeignChange::at(KernelObject::Setting { setting }));
            }
        }
    }

    /// The changes that are found by reading: those by legacy tools, and sysctls.
    fn ask_legacy(&mut self, found: &mut Vec<ForeignChange>) -> Result<(), ApplyError> {
        for (tool, known) in &mut self.legacy {
            let held = Saved::parse(&tool::save(*tool)?);
            if held != *known {
                *known = held;
                found.push(ForeignChange::at(KernelObject::Table { table: tool.name().to_owned() }));
            }
        }
        Ok(())
    }
}

impl nwfilter_rules::Watch for Watch {
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError> {
        let mut found = Vec::new();
        self.told(&mut found).map_err(cannot_follow)?;
        self.look_at_switches(&mut found);
        if self.asked.elapsed() >= LEGACY_INTERVAL {
            self.asked = Instant::now();
            self.ask_legacy(&mut found)?;
        }
        Ok(found)
    }

    fn interval(&self) -> Option<Duration> {
        Some(SWITCH_INTERVAL)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Transaction {
    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that notifications were lost.
    fn miss(&mut self) {
        self.heard = Heard::NotAll;
        self.history().miss();
    }

    /// Records that the buffer is empty.
    fn all_is_heard(&mut self) {
        if self.heard == Heard::NotAll {
            self.heard = Heard::End;
        }
    }

    /// The change, if the message ends a transaction of others that concerns rules of ours.
    fn take(&mut self, message: &Message<'_>) -> Option<ForeignChange> {
        let Message::Nftables { kind, family, attributes } = message else { return None };
        if *kind != libc::NFT_MSG_NEWGEN {
            if let Some((table, chain)) = place(*kind, *family, attributes) {
                let concerns = chain.is_none_or(|chain| concerns(table, chain));
                match chain {
                    Some(chain) if matches!(*kind, libc::NFT_MSG_NEWRULE | libc::NFT_MSG_DELRULE) => {
                        if concerns {
                            self.changes.chain(table, chain);
                        }
                    }
                    // Of a chain that gets another name, only that is told.
                    _ => self.changes.whole(table),
                }
                if concerns && self.objects.len() <= SHOWN {
                    let whole = || KernelObject::Table { table: table.label().to_owned() };
                    self.objects.insert(chain.map_or_else(whole, |chain| table.chain(chain)));
                }
            }
            return None;
        }
        let (changes, objects) = (std::mem::take(&mut self.changes), std::mem::take(&mut self.objects));
        match (self.heard, self.namespace, number(attributes, GEN_ID)) {
            (Heard::All, Some(namespace), Some(number)) => {
                self.history().tell(Generation { namespace, number }, changes);
            }
            (Heard::End, ..) => self.heard = Heard::All,
            _ => (),
        }
        let process = number(attributes, GEN_PROCESS);
        if objects.is_empty() || (self.same_numbers && process.is_some_and(tool::is_ours)) {
            return None;
        }
        let by = process.map(|id| {
            let name = text(attributes, GEN_PROGRAM).unwrap_or_default().to_owned();
            Process { name, id }
        });
        let more = objects.len() > SHOWN;
        Some(ForeignChange { by, objects: objects.into_iter().take(SHOWN).collect(), more })
    }
}

/// The table and the chain that a message is about, if the table is one of ours. Without a chain it is about the table
/// itself.
fn place(kind: libc::c_int, family: u8, attributes: &[u8]) -> Option<(TableId, Option<&str>)> {
    let chain = match kind {
        libc::NFT_MSG_NEWTABLE | libc::NFT_MSG_DELTABLE => None,
        libc::NFT_MSG_NEWCHAIN | libc::NFT_MSG_DELCHAIN => Some(text(attributes, NAME_OF_CHAIN)?),
        libc::NFT_MSG_NEWRULE | libc::NFT_MSG_DELRULE => Some(text(attributes, CHAIN_OF_RULE)?),
        _ => return None,
    };
    Some((table(family, text(attributes, TABLE)?)?, chain))
}

/// The table of ours with this name and family in nf_tables.
fn table(family: u8, name: &str) -> Option<TableId> {
    let is_it = |id: &TableId| id.name() == name && self::family(id.tool()) == libc::c_int::from(family);
    TableId::ALL.into_iter().find(is_it)
}

fn cannot_follow(error: io::Error) -> ApplyError {
    ApplyError::Unavailable {
        scope: Scope::Everything,
        what: "changes of the kernel's rules cannot be followed".into(),
        why: error.to_string(),
    }
}

// ---- messages ----

/// A message of the kernel.
#[derive(Debug, PartialEq, Eq)]
enum Message<'a> {
    /// The request was refused, with an errno.
    Refused(i32),
    /// The answer ends here.
    Done,
    /// One of nf_tables.
    Nftables {
        /// `NFT_MSG_*`
        kind: libc::c_int,
        /// `NFPROTO_*`
        family: u8,
        attributes: &'a [u8],
    },
}

/// The messages of a datagram, without those of other subsystems. A truncated message ends it.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    let next = move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let payload = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    };
    std::iter::from_fn(next).filter_map(|(kind, payload)| {
        if kind == libc::NLMSG_ERROR as u16 {
            return Some(Message::Refused(-i32::from_ne_bytes(*payload.first_chunk()?)));
        }
        if kind == libc::NLMSG_DONE as u16 {
            return Some(Message::Done);
        }
        let (subsystem, kind) = (libc::c_int::from(kind >> 8), libc::c_int::from(kind & 0xff));
        let (family, attributes) = (*payload.first()?, payload.get(FAMILY_HEADER..)?);
        (subsystem == libc::NFNL_SUBSYS_NFTABLES).then_some(Message::Nftables { kind, family, attributes })
    })
}

/// The attributes of a message or of another attribute, by their numbers. What is cut off ends them.
fn each_attribute(attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = attributes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & libc::NLA_TYPE_MASK as u16, value))
    })
}

/// The value of an attribute.
fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    each_attribute(attributes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn long(attributes: &[u8], wanted: u16) -> Option<u64> {
    Some(u64::from_be_bytes(*attribute(attributes, wanted)?.first_chunk()?))
}

fn number(attributes: &[u8], wanted: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*attribute(attributes, wanted)?.first_chunk()?))
}

fn text(attributes: &[u8], wanted: u16) -> Option<&str> {
    CStr::from_bytes_until_nul(attribute(attributes, wanted)?).ok()?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attribute as the kernel writes it, padded.
    fn written(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut attribute = ((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes().to_vec();
        attribute.extend(kind.to_ne_bytes());
        attribute.extend(value);
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        attribute
    }

    /// A message of nf_tables as the kernel writes it.
    fn message(kind: libc::c_int, family: libc::c_int, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = vec![family as u8, 0, 0, 0];
        payload.extend(attributes.concat());
        let mut message = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        message.extend(((libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16).to_ne_bytes());
        message.extend([0; 10]);
        message.extend(payload);
        message
    }

    #[test]
    fn every_message_of_a_datagram_is_read() {
        let name = written(3, b"iptables\0");
        let first = message(libc::NFT_MSG_NEWGEN, libc::AF_UNSPEC, &[name, written(GEN_ID, &[0, 0, 1, 2])]);
        let mut foreign = message(libc::NFT_MSG_NEWGEN, libc::AF_UNSPEC, &[]);
        foreign[5] = libc::NFNL_SUBSYS_CTNETLINK as u8;
        let datagram = [first.clone(), foreign, first].concat();
        let read: Vec<_> = messages(&datagram).collect();
        assert_eq!(read.len(), 2);
        for message in read {
            let Message::Nftables { kind: libc::NFT_MSG_NEWGEN, attributes, .. } = message else {
                panic!("{message:?}")
            };
            assert_eq!(number(attributes, GEN_ID), Some(0x102));
            assert_eq!(attribute(attributes, 3), Some(&b"iptables\0"[..]));
            assert_eq!(attribute(attributes, 9), None);
        }
    }

    #[test]
    fn a_refusal_of_the_kernel_is_an_error_number() {
        let mut refused = message(0, 0, &[]);
        refused[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        refused[HEADER..HEADER + 4].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(messages(&refused).collect::<Vec<_>>(), [Message::Refused(libc::EPERM)]);
    }

    #[test]
    fn what_is_cut_or_wrong_is_not_read() {
        let whole = message(libc::NFT_MSG_NEWGEN, libc::AF_UNSPEC, &[written(GEN_ID, &[0, 0, 0, 7])]);
        for length in 0..whole.len() {
            assert_eq!(messages(&whole[..length]).count(), 0, "{length} bytes");
        }
        for length in [0u32, 1, 15, u32::MAX] {
            let mut wrong = whole.clone();
            wrong[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&wrong).count(), 0, "said to be {length} bytes long");
        }
        for length in [0u16, 3, 9, u16::MAX] {
            let mut attributes = written(GEN_ID, &[0, 0, 0, 7]);
            attributes[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(number(&attributes, GEN_ID), None, "said to be {length} bytes long");
        }
    }
}
