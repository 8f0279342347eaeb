//! The kernel's packet log (nfnetlink_log): packets that rules report to a group, of whatever tool.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::SocketAddr;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{answer, receive_now};
use super::error::Error;
use super::listener::{Heard, Listener};
use super::wire::{Attributes, Head, Message, Writer, messages};

/// Bytes of messages that may wait. One takes some 300 bytes; when more are lost, the kernel says so.
const BACKLOG: usize = 2 << 20;
/// Bytes of each packet that are reported, behind its Ethernet header: enough for the headers of IPv6 and TCP.
const COPIED: u32 = 128;
/// The kernel sends what it has after this time, in hundredths of a second, or so many packets.
const TIMEOUT: u32 = 10;
const THRESHOLD: u32 = 16;
/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// `NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET`
const PACKET: u16 = (libc::NFNL_SUBSYS_ULOG << 8) as u16;
/// `NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG`
const CONFIG: u16 = PACKET | 1;

// NFULA_CFG_*
const CFG_COMMAND: u16 = 1;
const CFG_MODE: u16 = 2;
const CFG_TIMEOUT: u16 = 4;
const CFG_THRESHOLD: u16 = 5;
/// `NFULNL_CFG_CMD_BIND`
const BIND: u8 = 1;
/// `NFULNL_COPY_PACKET`
const COPY_PACKET: u8 = 2;

// NFULA_*
const PACKET_HEADER: u16 = 1;
const PHYSICAL_INPUT: u16 = 6;
const PHYSICAL_OUTPUT: u16 = 7;
const PAYLOAD: u16 = 9;
const PREFIX: u16 = 10;
const HARDWARE_HEADER: u16 = 16;
const VLAN: u16 = 20;
const LINK_HEADER: u16 = 21;
// NFULA_VLAN_*
const VLAN_PROTOCOL: u16 = 1;
const VLAN_TAG: u16 = 2;
/// The bytes of an Ethernet header before the type.
const ADDRESSES: usize = 12;

/// Reads a group of the log, from its opening on.
#[derive(Debug)]
pub struct PacketLog {
    listener: Listener,
    /// What came before the kernel's answer to the opening.
    early: Vec<Logged>,
}

/// Something that is reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Logged {
    /// A packet.
    Packet(LoggedPacket),
    /// More was reported than could be read.
    Missed,
}

/// A packet that a rule reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoggedPacket {
    /// What the rule says of it.
    pub prefix: String,
    /// The index of the bridge port on which it came.
    pub input: Option<u32>,
    /// The index of the bridge port on which it leaves.
    pub output: Option<u32>,
    /// Its Ethernet header, with the VLAN tag; with addresses of zeros where the kernel reports none.
    pub link: Vec<u8>,
    /// The beginning of what follows it.
    pub payload: Vec<u8>,
}

impl PacketLog {
    /// Reads a group in the network namespace of the calling thread. `None` if another program reads it.
    pub fn open(group: u16) -> Result<Option<Self>, Error> {
        // The kernel sends the packets to the socket that asks for them.
        let mut log = Self { listener: Listener::open(0, BACKLOG)?, early: Vec::new() };
        match log.bind(group)? {
            0 => Ok(Some(log)),
            libc::EPERM | libc::EBUSY => Ok(None),
            errno => Err(io::Error::from_raw_os_error(errno).into()),
        }
    }

    /// Asks for the packets of a group, and gives the kernel's answer.
    fn bind(&mut self, group: u16) -> Result<i32, Error> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut request = Writer::default();
        request.message(Head { kind: CONFIG, flags, sequence: 1, family: 0, resource: group }, |writer| {
            writer.put(CFG_COMMAND, &[BIND]);
            let [a, b, c, d] = COPIED.to_be_bytes();
            writer.put(CFG_MODE, &[a, b, c, d, COPY_PACKET, 0]);
            writer.put_u32(CFG_TIMEOUT, TIMEOUT);
            writer.put_u32(CFG_THRESHOLD, THRESHOLD);
        });
        let Listener { socket, buffer } = &mut self.listener;
        socket.send_to(request.bytes(), &SocketAddr::new(0, 0), 0)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(len) = receive_now(socket, buffer)? {
                for message in messages(&buffer[..len]) {
                    let message = message?;
                    match answer(&message)? {
                        Some(answer) => return Ok(answer.errno),
                        None => self.early.extend(packet(&message)?.map(Logged::Packet)),
                    }
                }
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Io(io::ErrorKind::TimedOut.into()));
            }
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Error::Io(errno.into())),
            }
        }
    }

    /// What was reported since the last call. Does not wait.
    pub fn logged(&mut self) -> Result<Vec<Logged>, Error> {
        let mut logged = std::mem::take(&mut self.early);
        self.listener.receive(|heard| {
            match heard {
                Heard::Message(message) => logged.extend(packet(&message)?.map(Logged::Packet)),
                Heard::Missed => logged.push(Logged::Missed),
            }
            Ok(())
        })?;
        Ok(logged)
    }
}

impl AsFd for PacketLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

fn packet(message: &Message<'_>) -> Result<Option<LoggedPacket>, Error> {
    if message.kind != PACKET {
        return Ok(None);
    }
    let (_, attributes) = message.family()?;
    Ok(Some(LoggedPacket {
        prefix: attributes.str(PREFIX).unwrap_or_default().to_owned(),
        input: attributes.u32(PHYSICAL_INPUT),
        output: attributes.u32(PHYSICAL_OUTPUT),
        link: link(attributes),
        payload: attributes.get(PAYLOAD).unwrap_or_default().to_vec(),
    }))
}

fn link(attributes: Attributes<'_>) -> Vec<u8> {
    let header = attributes.get(LINK_HEADER).or_else(|| attributes.get(HARDWARE_HEADER));
    let Some(header) = header.filter(|header| header.len() > ADDRESSES) else {
        // The packet's protocol begins its header.
        let protocol = attributes.get(PACKET_HEADER).and_then(|header| header.get(..2));
        return [&[0; ADDRESSES], protocol.unwrap_or_default()].concat();
    };
    let (addresses, kind) = header.split_at(ADDRESSES);
    let vlan = attributes.nested(VLAN);
    let tag = |kind| vlan.and_then(|vlan| vlan.get(kind)?.get(..2)).unwrap_or_default();
    [addresses, tag(VLAN_PROTOCOL), tag(VLAN_TAG), kind].concat()
}
