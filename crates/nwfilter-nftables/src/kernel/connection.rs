//! A netlink socket to nf_tables: transactions, and reading a table back.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce, SndBuf, SndBufForce};

use super::batch::{Batch, Ending, expression_at, message_type};
use super::error::{CommitError, Error, Refusal};
use super::installed::{InstalledChain, InstalledTable};
use super::name::ChainName;
use super::read;
use super::table::TableId;
use super::transaction::{Operation, Transaction};
use super::wire::{Attributes, HEADER, Head, Message, Writer, malformed, messages, missing, ne_u32};

/// The most bytes that a transaction may have as messages. A rule takes some 300, an element of a map some 120.
///
/// The kernel holds other changes of its rules, and the processor, while it looks at a transaction: beyond some 10,000
/// operations better split it.
pub const MAX_TRANSACTION: usize = 64 << 20;

/// How long the kernel may take for a part of an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of answers that may wait. Each refused operation takes about one kilobyte.
const RECEIVE_BUFFER: usize = 8 << 20;
/// The kernel puts the messages of a dump together in at most 32 KiB; only one that is longer by itself is longer.
const DATAGRAM: usize = 64 << 10;
/// How often a transaction that a signal interrupted is sent again.
const SIGNALS: usize = 100;
/// How often a table is read before others must stop changing rules.
const READS: usize = 32;

/// `NFTA_GEN_ID`
pub(super) const GEN_ID: u16 = 1;

/// `NLMSGERR_ATTR_MSG`
const ERROR_MESSAGE: u16 = 1;
/// `NLMSGERR_ATTR_OFFS`
const ERROR_OFFSET: u16 = 2;
/// `ERESTART`, which nfnetlink answers where the generation is another one. Not in nix.
const ERESTART: i32 = 85;

/// Speaks with nf_tables of the network namespace in which it was opened.
///
/// Needs `CAP_NET_ADMIN` there. A table with the flag [`owner`](super::TableFlags::owner) belongs to the connection
/// that made it, and goes, or is orphaned, when the connection is dropped.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What the kernel answered to the messages of a batch.
///
/// A process that may not change a table itself sends the [bytes](Connection::commit_through) of its batch to one that
/// may, which [exchanges](Connection::exchange) them for these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// The datagrams, in the order of their arrival.
    pub datagrams: Vec<Vec<u8>>,
    /// Whether the kernel had more to say than could wait.
    pub lost: bool,
}

impl Answers {
    /// Whether the kernel refused a message, or all.
    pub fn refuse(&self) -> bool {
        let refuses = |message: Result<Message<'_>, Error>| match message.and_then(|message| answer(&message))
        {
            Ok(answer) => answer.is_some_and(|answer| answer.errno != 0),
            Err(_) => true,
        };
        self.datagrams.iter().any(|datagram| messages(datagram).any(refuses))
    }
}

/// What the kernel said to a message.
pub(super) struct Answer {
    pub(super) errno: i32,
    message: Option<String>,
    offset: Option<usize>,
}

impl Connection {
    /// Opens a connection in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(unavailable)?;
        let port = socket.bind_auto()?.port_number();
        // Answers without the message that they answer, and with what the kernel has to say.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        socket.set_non_blocking(true)?;
        receive_buffer(&socket, RECEIVE_BUFFER)?;
        let mut connection = Self { socket, port, sequence: 1, buffer: vec![0; DATAGRAM] };
        connection.generation()?;
        Ok(connection)
    }

    /// The netlink port, by which [`Change::port`](super::Change::port) says whose change it is.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The generation of the rules of the namespace: the kernel counts the transactions that it carries out, of all
    /// tables and whoever sends them.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let mut generation = None;
        self.ask(
            libc::NFT_MSG_GETGEN,
            0,
            0,
            |_| {},
            |_, attributes| {
                generation = attributes.u32(GEN_ID);
                Ok(())
            },
        )
        .map_err(|error| match error {
            Error::Refused { source, .. } => unavailable(source),
            other => other,
        })?;
        generation.ok_or_else(|| missing("generation"))
    }

    /// Carries a transaction out, whole or not at all.
    ///
    /// With `expected` only if no other transaction was carried out since the rules had that
    /// [generation](Self::generation); otherwise it fails with [`CommitError::Interrupted`].
    pub fn commit<T: Clone + std::fmt::Debug>(
        &mut self,
        transaction: &Transaction<T>,
        expected: Option<u32>,
    ) -> Result<(), CommitError<T>> {
        self.send_batch(transaction, expected, Ending::Commit, |connection, bytes| connection.exchange(bytes))
    }

    /// The same by the hands of another process: `exchange` has it send the bytes and brings the answers. The batch is
    /// numbered as one of this connection's.
    pub fn commit_through<T: Clone + std::fmt::Debug>(
        &mut self,
        transaction: &Transaction<T>,
        expected: Option<u32>,
        mut exchange: impl FnMut(&[u8]) -> Result<Answers, Error>,
    ) -> Result<(), CommitError<T>> {
        self.send_batch(transaction, expected, Ending::Commit, |_, bytes| exchange(bytes))
    }

    /// Sends a batch and takes the answers: the kernel carries it out, and answers, within the call that sends it.
    pub fn exchange(&mut self, batch: &[u8]) -> Result<Answers, Error> {
        self.discard()?;
        self.send(batch)?;
        let mut answers = Answers::default();
        loop {
            match self.receive_now() {
                Ok(Some(len)) => answers.datagrams.push(self.buffer[..len].to_vec()),
                Ok(None) => return Ok(answers),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => answers.lost = true,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Asks whether the kernel would carry a transaction out, and changes nothing.
    ///
    /// It looks at each operation as for [`commit`](Self::commit); what it only finds at the end, such as a loop of
    /// chains, it does not find here on all kernels.
    pub fn validate<T: Clone + std::fmt::Debug>(
        &mut self,
        transaction: &Transaction<T>,
    ) -> Result<(), CommitError<T>> {
        self.send_batch(transaction, None, Ending::Abort, |connection, bytes| connection.exchange(bytes))
    }

    /// Reads a table; `None` where there is none. Of other tables nothing is read but the names of chains.
    pub fn table(&mut self, table: &TableId) -> Result<Option<InstalledTable>, Error> {
        self.read(table, |connection, generation| read::table(connection, table, generation))
    }

    /// The netlink port of a table's owner. `None` if the table has no owner, or does not exist.
    pub fn owner(&mut self, table: &TableId) -> Result<Option<u32>, Error> {
        Ok(read::head(self, table)?.and_then(|(_, owner)| owner))
    }

    /// Reads the chains of a table and their rules, and the generation of which they are; none where there is no table.
    pub fn chains(&mut self, table: &TableId) -> Result<(BTreeMap<ChainName, InstalledChain>, u32), Error> {
        self.read(table, |connection, generation| {
            Ok((read::chains_with_rules(connection, table)?, generation))
        })
    }

    /// Reads something of a table, again where others change rules meanwhile.
    fn read<T>(
        &mut self,
        table: &TableId,
        read: impl Fn(&mut Self, u32) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for _ in 0..READS {
            let before = self.generation()?;
            match read(self, before) {
                Ok(read) if self.generation()? == before => return Ok(read),
                // What it was reading went away.
                Ok(_) | Err(Error::Interrupted { .. }) => {}
                Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {}
                Err(other) => return Err(other),
            }
        }
        Err(Error::Interrupted { table: table.clone(), times: READS })
    }

    /// The names of the chains of a table; none where there is none.
    pub fn chain_names(&mut self, table: &TableId) -> Result<Vec<String>, Error> {
        read::chain_names(self, table)
    }

    // ---- transactions ----

    fn send_batch<T: Clone + std::fmt::Debug>(
        &mut self,
        transaction: &Transaction<T>,
        expected: Option<u32>,
        ending: Ending,
        mut exchange: impl FnMut(&mut Self, &[u8]) -> Result<Answers, Error>,
    ) -> Result<(), CommitError<T>> {
        if transaction.is_empty() {
            return Ok(());
        }
        for _ in 0..SIGNALS {
            let batch = Batch::new(transaction, expected, self.sequence, ending)?;
            if batch.bytes().len() > MAX_TRANSACTION {
                return Err(CommitError::TooLarge { size: batch.bytes().len(), limit: MAX_TRANSACTION });
            }
            self.sequence = self.sequence.wrapping_add(batch.sequence_numbers());
            let answers = exchange(self, batch.bytes())?;
            if let Some(result) = outcome(&batch, transaction, &answers)? {
                return result;
            }
        }
        Err(Error::Io(io::ErrorKind::Interrupted.into()).into())
    }

    /// Forgets answers to what was asked before.
    fn discard(&mut self) -> Result<(), Error> {
        loop {
            match self.receive_now() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        loop {
            let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0);
            match sent {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => self.enlarge(bytes.len())?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Lets the socket send so many bytes at once.
    fn enlarge(&mut self, bytes: usize) -> Result<(), Error> {
        let too_large = || Error::Io(io::Error::from_raw_os_error(libc::EMSGSIZE));
        if setsockopt(&self.socket, SndBufForce, &bytes).is_err() {
            setsockopt(&self.socket, SndBuf, &bytes).map_err(io::Error::from)?;
        }
        // The kernel holds twice of what is asked for, so that this is enough unless it was cut.
        let held = nix::sys::socket::getsockopt(&self.socket, SndBuf).map_err(io::Error::from)?;
        if held > bytes { Ok(()) } else { Err(too_large()) }
    }

    // ---- questions ----

    /// Asks, and hands each message of the answer on with its family and attributes.
    pub(super) fn ask<'c>(
        &'c mut self,
        kind: i32,
        family: u8,
        flags: i32,
        attributes: impl FnOnce(&mut Writer),
        mut each: impl FnMut(u8, Attributes<'_>) -> Result<(), Error> + 'c,
    ) -> Result<(), Error> {
        self.discard()?;
        let sequence = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = Writer::default();
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        request.message(Head { kind: message_type(kind), flags, sequence, family, resource: 0 }, attributes);
        self.send(request.bytes())?;
        let dump = flags & libc::NLM_F_DUMP as u16 == libc::NLM_F_DUMP as u16;
        loop {
            let len = self.receive()?;
            for message in messages(&self.buffer[..len]) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                if i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0 {
                    return Err(interrupted());
                }
                if i32::from(message.kind) == libc::NLMSG_DONE {
                    return match ne_u32(message.payload, 0).map(u32::cast_signed) {
                        Some(errno) if errno < 0 => Err(refused(-errno)),
                        _ => Ok(()),
                    };
                }
                if let Some(answer) = answer(&message)? {
                    return if answer.errno == 0 { Ok(()) } else { Err(refused(answer.errno)) };
                }
                let (family, attributes) = message.family()?;
                each(family, attributes)?;
                if !dump {
                    return Ok(());
                }
            }
        }
    }

    /// The length of the next datagram in the buffer. Waits for it.
    fn receive(&mut self) -> Result<usize, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(len) = self.receive_now()? {
                return Ok(len);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Io(io::ErrorKind::TimedOut.into()));
            }
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::Io(errno.into())),
            }
        }
    }

    /// The length of the datagram that waits, read into the buffer; `None` if none does.
    fn receive_now(&mut self) -> io::Result<Option<usize>> {
        receive_now(&self.socket, &mut self.buffer)
    }
}

/// What the kernel said of a batch; `None` if a signal interrupted it.
fn outcome<T: Clone + std::fmt::Debug>(
    batch: &Batch,
    transaction: &Transaction<T>,
    answers: &Answers,
) -> Result<Option<Result<(), CommitError<T>>>, Error> {
    let (mut refusals, mut whole, mut acknowledged) = (Vec::new(), None, false);
    for message in answers.datagrams.iter().flat_map(|datagram| messages(datagram)) {
        let message = message?;
        let Some(answer) = answer(&message)? else { continue };
        match batch.origin(message.sequence) {
            Some(_) if answer.errno == 0 => acknowledged |= message.sequence == batch.last(),
            Some((index, sent)) => {
                let (operation, tag) = &transaction.operations()[index];
                refusals.push(refusal(operation, tag.clone(), answer, sent));
            }
            None if batch.is_begin(message.sequence) && answer.errno != 0 => whole = Some(answer.errno),
            None => {}
        }
    }
    let mut refusals = refusals.into_iter();
    Ok(Some(match (whole, refusals.next()) {
        (Some(ERESTART), _) => Err(CommitError::Interrupted),
        (Some(libc::EINTR), _) => return Ok(None),
        (_, Some(first)) => Err(CommitError::Refused { first: Box::new(first), others: refusals.collect() }),
        (Some(errno), None) => Err(CommitError::RefusedWhole(io::Error::from_raw_os_error(errno))),
        (None, None) if acknowledged => Ok(()),
        (None, None) if answers.lost => return Err(Error::Io(io::Error::from_raw_os_error(libc::ENOBUFS))),
        // The kernel says nothing where a signal made it give up.
        (None, None) => return Ok(None),
    }))
}

/// Sets how many bytes may wait for a socket.
pub(super) fn receive_buffer(socket: &Socket, bytes: usize) -> io::Result<()> {
    // Only root of the first user namespace may force it; the others get what net.core.rmem_max allows.
    setsockopt(socket, RcvBufForce, &bytes)
        .or_else(|_| setsockopt(socket, RcvBuf, &bytes))
        .map_err(io::Error::from)
}

/// Reads the kernel's datagram that waits into a buffer, which grows as it must.
pub(super) fn receive_now(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
    loop {
        let received = socket.recv_from(&mut &mut buffer[..], libc::MSG_PEEK | libc::MSG_TRUNC);
        match received {
            Ok((len, sender)) => {
                buffer.resize(buffer.len().max(len), 0);
                let (len, _) = socket.recv_from(&mut &mut buffer[..], 0)?;
                // Other processes may write to the port, too.
                if sender.port_number() == 0 {
                    return Ok(Some(len));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What the kernel says of a message, where this is an acknowledgement or an error.
pub(super) fn answer(message: &Message<'_>) -> Result<Option<Answer>, Error> {
    if i32::from(message.kind) != libc::NLMSG_ERROR {
        return Ok(None);
    }
    let error = ne_u32(message.payload, 0).ok_or_else(|| malformed("an acknowledgement is cut"))?;
    // The header of what it answers, with NLM_F_CAPPED without the rest.
    let attributes = Attributes(message.payload.get(4 + HEADER..).unwrap_or_default());
    let has_attributes = i32::from(message.flags) & libc::NLM_F_ACK_TLVS != 0;
    let attributes = if has_attributes { attributes } else { Attributes(&[]) };
    Ok(Some(Answer {
        errno: -error.cast_signed(),
        message: attributes.str(ERROR_MESSAGE).map(Into::into),
        offset: attributes
            .get(ERROR_OFFSET)
            .and_then(|offset| ne_u32(offset, 0))
            .map(|offset| offset as usize),
    }))
}

fn refusal<T>(operation: &Operation, tag: T, answer: Answer, sent: &[u8]) -> Refusal<T> {
    let expression = match operation {
        Operation::AddRule { rule, .. } | Operation::ReplaceRule { rule, .. } => answer
            .offset
            .and_then(|offset| expression_at(sent, offset))
            .and_then(|index| rule.exprs.get(index)),
        _ => None,
    };
    Refusal {
        tag,
        what: operation.to_string(),
        errno: Errno::from_raw(answer.errno),
        expression: expression.cloned(),
        message: answer.message,
    }
}

fn interrupted() -> Error {
    // Which table it was, the reader knows.
    Error::Refused {
        what: "rules that are changing".into(),
        source: io::Error::from_raw_os_error(libc::ENOENT),
    }
}

fn refused(errno: i32) -> Error {
    Error::Refused { what: "its rules".into(), source: io::Error::from_raw_os_error(errno) }
}

fn unavailable(source: io::Error) -> Error {
    let why = match source.raw_os_error() {
        Some(libc::EPERM) => "that needs the right to administer the network (CAP_NET_ADMIN)",
        Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP) => {
            "the kernel has no nf_tables (module nf_tables)"
        }
        _ => "the kernel does not answer",
    };
    Error::Unavailable { why: why.into(), source }
}
