//! How a process changes a table that another one owns: it sends the batch of its transaction to the owner, by a Unix socket,
//! and gets the kernel's answers.
//!
//! | bytes | request | answer |
//! | --- | --- | --- |
//! | 4 | `NWF` and the version of the protocol | the same |
//! | 8, 8 | device and inode of the network namespace | |
//! | 4 | | 0: the kernel answered; 1: the owner refuses; 2: it owns the table no more |
//! | 4 | length of the batch, at most [`MAX_TRANSACTION`] | number of the kernel's datagrams, at most [`MAX_DATAGRAMS`] |
//! | rest | the batch | length and bytes of each; or of the reason |
//!
//! Numbers are in the host's byte order. A connection carries one request and one answer. Both sides take only root, or the
//! user that they run as, for the other one.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use crate::backend::Namespace;
use crate::kernel::{Answers, MAX_TRANSACTION};

/// Begins each message: three letters and the version.
const MAGIC: [u8; 4] = *b"NWF\x01";
/// Datagrams in one answer at most: one for each refused operation, and few others.
const MAX_DATAGRAMS: usize = 1 << 16;
/// How long the other side may take altogether.
const PATIENCE: Duration = Duration::from_secs(30);

/// The kernel's answers follow.
const ANSWERED: u32 = 0;
/// The owner refuses; the reason follows.
const REFUSED: u32 = 1;
/// Whoever serves owns the table no more.
const NOT_OWNER: u32 = 2;

/// What an owner is asked to do.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) namespace: Namespace,
    pub(crate) batch: Vec<u8>,
}

/// What an owner answers.
#[derive(Debug)]
pub(crate) enum Reply {
    /// What the kernel answered.
    Answered(Answers),
    /// Why the owner does not do it.
    Refused(String),
    /// Nobody owns the table here any more.
    NotOwner,
}

/// Why an owner could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Nobody serves there, or not to the end: the owner has ended, or begins.
    #[error("it does not answer")]
    Gone(#[source] io::Error),
    /// It refuses.
    #[error("it refuses: {0}")]
    Refused(String),
    /// It is none whose word counts, or does not speak as it should.
    #[error("it cannot be asked")]
    Other(#[source] io::Error),
}

/// Has the owner who serves at a path carry out a batch.
pub(crate) fn ask(path: &Path, namespace: Namespace, batch: &[u8]) -> Result<Answers, AskError> {
    let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AskError::Gone(error),
        _ => AskError::Other(error),
    })?;
    let trusted = is_trusted(&stream).map_err(AskError::Other)?;
    if !trusted {
        let why = format!("{} is served by another user than root", path.display());
        return Err(AskError::Other(io::Error::new(io::ErrorKind::PermissionDenied, why)));
    }
    let mut peer = Peer::new(&stream);
    let exchange = write_request(&mut peer, namespace, batch).and_then(|()| read_reply(&mut peer));
    match exchange {
        Ok(Reply::Answered(answers)) => Ok(answers),
        Ok(Reply::Refused(why)) => Err(AskError::Refused(why)),
        Ok(Reply::NotOwner) => Err(AskError::Gone(io::ErrorKind::ConnectionReset.into())),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                AskError::Gone(error)
            }
            _ => AskError::Other(error),
        }),
    }
}

/// Answers who asked.
pub(crate) fn serve(stream: &UnixStream, carry_out: impl FnOnce(Request) -> Reply) -> io::Result<()> {
    let mut peer = Peer::new(stream);
    if !is_trusted(stream)? {
        return write_reply(&mut peer, &Reply::Refused("only root may ask".into()));
    }
    let reply = match read_request(&mut peer)? {
        Ok(request) => carry_out(request),
        Err(why) => Reply::Refused(why),
    };
    write_reply(&mut peer, &reply)
}

/// Whether the other side is root, or of this process's own user.
fn is_trusted(stream: &UnixStream) -> io::Result<bool> {
    let peer = getsockopt(stream, PeerCredentials)?;
    Ok(peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}

/// The process on the other side.
pub(crate) fn process(stream: &UnixStream) -> Option<nwfilter_rules::Process> {
    let id = u32::try_from(getsockopt(stream, PeerCredentials).ok()?.pid()).ok()?;
    let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
    Some(nwfilter_rules::Process { name: name.trim_end().into(), id })
}

/// A stream of which all reads and writes together may take [`PATIENCE`].
struct Peer<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl<'a> Peer<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self { stream, deadline: Instant::now() + PATIENCE }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(too_late()) } else { Ok(Some(left)) }
    }
}

impl Read for Peer<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(in_time)
    }
}

impl Write for Peer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes).map_err(in_time)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn too_late() -> io::Error {
    let why = format!("it did not answer within {} seconds", PATIENCE.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, why)
}

/// The error of a stream with a timeout, in words: the kernel says "Resource temporarily unavailable".
fn in_time(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { too_late() } else { error }
}

fn write_request(to: &mut impl Write, namespace: Namespace, batch: &[u8]) -> io::Result<()> {
    to.write_all(&MAGIC)?;
    to.write_all(&namespace.0.to_ne_bytes())?;
    to.write_all(&namespace.1.to_ne_bytes())?;
    write_bytes(to, batch)
}

/// A request, or what is wrong with it.
fn read_request(from: &mut impl Read) -> io::Result<Result<Request, String>> {
    let magic = read_array(from)?;
    if magic != MAGIC {
        return Ok(Err("it speaks another version of this protocol: use programs of one version".into()));
    }
    let namespace = (u64::from_ne_bytes(read_array(from)?), u64::from_ne_bytes(read_array(from)?));
    let len = read_number(from)?;
    if len > MAX_TRANSACTION {
        return Ok(Err(format!("a transaction of {len} bytes is longer than {MAX_TRANSACTION}")));
    }
    Ok(Ok(Request { namespace, batch: read_bytes(from, len)? }))
}

fn write_reply(to: &mut impl Write, reply: &Reply) -> io::Result<()> {
    to.write_all(&MAGIC)?;
    match reply {
        Reply::Answered(answers) => {
            let kept = answers.datagrams.len().min(MAX_DATAGRAMS);
            let lost = answers.lost || kept < answers.datagrams.len();
            to.write_all(&ANSWERED.to_ne_bytes())?;
            to.write_all(&u32::from(lost).to_ne_bytes())?;
            to.write_all(&(kept as u32).to_ne_bytes())?;
            answers.datagrams.iter().take(kept).try_for_each(|datagram| write_bytes(to, datagram))
        }
        Reply::Refused(why) => {
            to.write_all(&REFUSED.to_ne_bytes())?;
            write_bytes(to, why.as_bytes())
        }
        Reply::NotOwner => to.write_all(&NOT_OWNER.to_ne_bytes()),
    }
}

fn read_reply(from: &mut impl Read) -> io::Result<Reply> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    if read_array(from)? != MAGIC {
        return Err(invalid("it speaks another version of the protocol: use programs of one version"));
    }
    let bounded = |len: usize| match len > MAX_TRANSACTION {
        true => Err(invalid("an answer without end")),
        false => Ok(len),
    };
    match u32::from_ne_bytes(read_array(from)?) {
        ANSWERED => {
            let lost = read_number(from)? != 0;
            let count = read_number(from)?;
            if count > MAX_DATAGRAMS {
                return Err(invalid("an answer without end"));
            }
            let (mut datagrams, mut total) = (Vec::new(), 0);
            for _ in 0..count {
                let len = read_number(from)?;
                total = bounded(len.saturating_add(total))?;
                datagrams.push(read_bytes(from, len)?);
            }
            Ok(Reply::Answered(Answers { datagrams, lost }))
        }
        REFUSED => {
            let len = bounded(read_number(from)?)?;
            Ok(Reply::Refused(String::from_utf8_lossy(&read_bytes(from, len)?).into_owned()))
        }
        NOT_OWNER => Ok(Reply::NotOwner),
        _ => Err(invalid("an answer of another protocol")),
    }
}

fn write_bytes(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    to.write_all(&len.to_ne_bytes())?;
    to.write_all(bytes)
}

fn read_array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_number(from: &mut impl Read) -> io::Result<usize> {
    Ok(u32::from_ne_bytes(read_array(from)?) as usize)
}

/// Takes memory only for what has come.
fn read_bytes(from: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(len as u64).read_to_end(&mut bytes)?;
    if bytes.len() < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn request(bytes: &[u8]) -> io::Result<Result<Request, String>> {
        read_request(&mut &bytes[..])
    }

    #[test]
    fn who_does_not_answer_in_time_is_said_not_to() {
        let (stream, _silent) = UnixStream::pair().unwrap();
        for after in [Duration::ZERO, Duration::from_millis(10)] {
            let mut peer = Peer { stream: &stream, deadline: Instant::now() + after };
            let error = peer.read(&mut [0]).unwrap_err();
            assert_eq!(error.to_string(), "it did not answer within 30 seconds");
        }
    }

    #[test]
    fn requests_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        write_request(&mut bytes, (7, 8), b"batch").unwrap();
        let read = request(&bytes).unwrap().unwrap();
        assert_eq!((read.namespace, &read.batch[..]), ((7, 8), &b"batch"[..]));
        for len in 0..bytes.len() {
            assert_eq!(request(&bytes[..len]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{len}");
        }
    }

    #[test]
    fn a_request_of_another_version_or_without_end_is_refused_with_the_reason() {
        let mut bytes = Vec::new();
        write_request(&mut bytes, (7, 8), b"batch").unwrap();
        bytes[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(request(&bytes).unwrap().unwrap_err().contains("is longer than"));
        bytes[3] += 1;
        assert!(request(&bytes).unwrap().unwrap_err().contains("another version"));
    }

    #[test]
    fn replies_are_read_as_they_were_written() {
        let answers = Answers { datagrams: vec![b"one".to_vec(), Vec::new()], lost: true };
        let mut bytes = Vec::new();
        write_reply(&mut bytes, &Reply::Answered(answers.clone())).unwrap();
        assert!(matches!(read_reply(&mut &bytes[..]).unwrap(), Reply::Answered(read) if read == answers));
        assert!(read_reply(&mut &bytes[..bytes.len() - 1]).is_err());
        bytes.clear();
        write_reply(&mut bytes, &Reply::Refused("so".into())).unwrap();
        assert!(matches!(read_reply(&mut &bytes[..]).unwrap(), Reply::Refused(why) if why == "so"));
    }
}
