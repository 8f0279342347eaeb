//! The kernel's table of connections: reading it, and ending connections in it.

use std::fmt;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla, NlasIterator, Parseable,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nwfilter_explain::protocol;
use serde::{Serialize, Serializer};

use crate::links::messages;

/// The zone of a connection (`CTA_ZONE`).
const ZONE: u16 = 18;
/// The kernel's number of a connection (`CTA_ID`).
const ID: u16 = 12;
/// The connection that announced it (`CTA_TUPLE_MASTER`).
const MASTER: u16 = 14;
/// `CTA_TUPLE_IP` and so on have these bits free for flags.
const KIND: u16 = 0x3fff;
/// `CTA_PROTO_ICMP_ID`, `CTA_PROTO_ICMP_TYPE`, `CTA_PROTO_ICMP_CODE`, and after them the same of ICMPv6.
const ICMP: [[u16; 3]; 2] = [[4, 5, 6], [7, 8, 9]];
/// `TCP_CONNTRACK_SYN_SENT`
const SYN_SENT: u8 = 1;

/// The first packet of a connection, as conntrack knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// The IP protocol.
    pub protocol: u8,
    /// Who opened the connection.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// The ports of source and destination, where the protocol has any.
    pub ports: Option<(u16, u16)>,
    /// Type, code and identifier of an ICMP message.
    pub(crate) icmp: Option<(u8, u8, u16)>,
}

/// A connection of the kernel.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) zone: u16,
    pub(crate) original: Flow,
    pub(crate) reply: Flow,
    /// The connection that announced it.
    pub(crate) master: Option<Flow>,
    /// Whether another connection announced it, which may be gone.
    pub(crate) is_expected: bool,
    /// What names it to the kernel.
    key: Vec<ConntrackAttribute>,
}

/// How a connection is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The kernel forgot it: its next packet has to be one that may begin a connection.
    Forgotten,
    /// A TCP connection was set back to the state after its first SYN, because the kernel would take it up again in the
    /// middle if it forgot it (`nf_conntrack_tcp_loose`). What its opener sends is invalid then, unless it is another SYN or a
    /// RST. By a RST that the other end ignores, an opener that means harm can bring it back.
    Stalled,
}

/// Whether the kernel takes up TCP connections in the middle. Where it does not say, it does.
pub(crate) fn is_loose() -> bool {
    let setting = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_loose");
    setting.map_or(true, |setting| setting.trim() != "0")
}

/// Asks the kernel about connections, in the network namespace of the calling thread.
pub(crate) struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// The connections that `wanted` picks, of at most `limit` that are read. The second value says whether these were all.
    pub(crate) fn read(
        &mut self,
        limit: usize,
        wanted: impl Fn(&Entry) -> bool,
    ) -> io::Result<(Vec<Entry>, bool)> {
        let get = ConntrackMessage::Get(Vec::new());
        self.send(NetfilterProtoFamily::Unspec, get, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut entries, mut read) = (Vec::new(), 0);
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages(&datagram) {
                match message? {
                    NetlinkPayload::InnerMessage(NetfilterMessage {
                        inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                        ..
                    }) => {
                        read += 1;
                        if read > limit {
                            // The rest of the answer would come before that to the next request.
                            *self = Self::open()?;
                            return Ok((entries, false));
                        }
                        entries.extend(Entry::of(attributes).filter(&wanted));
                    }
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Done(_) => return Ok((entries, true)),
                    _ => (),
                }
            }
        }
    }

    /// Ends a connection. `false` if it is there no more.
    pub(crate) fn end(&self, entry: &Entry, ending: Ending) -> io::Result<bool> {
        let mut attributes = entry.key.clone();
        let message = match ending {
            Ending::Forgotten => ConntrackMessage::Delete(attributes),
            Ending::Stalled => {
                let state = vec![ProtoInfoTCP::State(SYN_SENT)];
                attributes.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(state)]));
                ConntrackMessage::New(attributes)
            }
        };
        let family = match entry.original.source {
            IpAddr::V4(_) => NetfilterProtoFamily::IPv4,
            IpAddr::V6(_) => NetfilterProtoFamily::IPv6,
        };
        self.send(family, message, NLM_F_REQUEST | NLM_F_ACK)?;
        let (datagram, _) = self.socket.recv_from_full()?;
        match messages::<NetfilterMessage>(&datagram).next() {
            Some(Ok(NetlinkPayload::Error(error))) if error.code.is_some() => match error.to_io() {
                gone if gone.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(false),
                other => Err(other),
            },
            Some(Err(error)) => Err(error),
            _ => Ok(true),
        }
    }

    fn send(&self, family: NetfilterProtoFamily, message: ConntrackMessage, flags: u16) -> io::Result<()> {
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map(drop)
    }
}

impl Entry {
    /// `None` for what is no connection between two IP addresses.
    fn of(attributes: Vec<ConntrackAttribute>) -> Option<Self> {
        let (mut original, mut reply, mut master) = (None, None, None);
        let (mut zone, mut is_expected, mut key) = (0, false, Vec::new());
        for attribute in attributes {
            match &attribute {
                ConntrackAttribute::CtaTupleOrig(tuple) => {
                    original = flow(tuple);
                    key.push(attribute);
                }
                ConntrackAttribute::CtaTupleReply(tuple) => reply = flow(tuple),
                ConntrackAttribute::CtaStatus(status) => is_expected = status.contains(Status::Expected),
                ConntrackAttribute::Other(other) => match other.kind() & KIND {
                    ZONE => {
                        let bytes = value(other);
                        zone = u16::from_be_bytes(bytes.try_into().ok()?);
                        key.push(attribute);
                    }
                    ID => key.push(attribute),
                    MASTER => master = flow(&tuples(&value(other))),
                    _ => (),
                },
                _ => (),
            }
        }
        Some(Self { zone, original: original?, reply: reply?, master, is_expected, key })
    }
}

impl Entry {
    /// An answer as the guest sees it, whose addresses the host does not translate.
    pub(crate) fn answer(&self) -> Flow {
        let Flow { protocol, source, destination, ports, .. } = self.original;
        let ports = ports.map(|(from, to)| (to, from));
        Flow { protocol, source: destination, destination: source, ports, icmp: self.reply.icmp }
    }
}

/// The value of an attribute.
fn value(attribute: &impl Nla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

/// The parts of a tuple of which only the bytes are known.
fn tuples(bytes: &[u8]) -> Vec<Tuple> {
    NlasIterator::new(bytes).filter_map(|nla| Tuple::parse(&nla.ok()?).ok()).collect()
}

fn flow(tuples: &[Tuple]) -> Option<Flow> {
    let (mut source, mut destination, mut number) = (None, None, None);
    let (mut from, mut to, mut icmp) = (None, None, [None; 3]);
    for tuple in tuples {
        match tuple {
            Tuple::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(address) => source = Some(*address),
                        IPTuple::DestinationAddress(address) => destination = Some(*address),
                        _ => (),
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(protocol) => number = Some(u8::from(*protocol)),
                        ProtoTuple::SourcePort(port) => from = Some(*port),
                        ProtoTuple::DestinationPort(port) => to = Some(*port),
                        ProtoTuple::Other(other) => {
                            let kind = other.kind() & KIND;
                            let place = ICMP.iter().find_map(|kinds| kinds.iter().position(|of| *of == kind));
                            if let Some(place) = place {
                                let bytes = value(other).into_iter();
                                icmp[place] =
                                    Some(bytes.fold(0u16, |number, byte| (number << 8) | u16::from(byte)));
                            }
                        }
                        _ => (),
                    }
                }
            }
            _ => (),
        }
    }
    let icmp = match icmp {
        [Some(id), Some(kind), Some(code)] => Some((kind as u8, code as u8, id)),
        _ => None,
    };
    Some(Flow { protocol: number?, source: source?, destination: destination?, ports: from.zip(to), icmp })
}

impl Flow {
    fn ends(&self) -> (String, String) {
        let end = |address: IpAddr, port: Option<u16>| match port {
            Some(port) => std::net::SocketAddr::new(address, port).to_string(),
            None => address.to_string(),
        };
        let (from, to) = self.ports.unzip();
        (end(self.source, from), end(self.destination, to))
    }

    fn protocol_name(&self) -> String {
        match self.protocol {
            protocol::ICMP => "icmp".to_owned(),
            protocol::TCP => "tcp".to_owned(),
            protocol::UDP => "udp".to_owned(),
            protocol::ICMPV6 => "icmpv6".to_owned(),
            protocol::SCTP => "sctp".to_owned(),
            protocol::UDPLITE => "udplite".to_owned(),
            other => format!("protocol {other}"),
        }
    }
}

/// `tcp 192.0.2.7:40000 → 10.0.0.2:22`
impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, destination) = self.ends();
        write!(f, "{} {source} → {destination}", self.protocol_name())
    }
}

/// `{"protocol": "tcp", "source": "192.0.2.7:40000", "destination": "10.0.0.2:22"}`
impl Serialize for Flow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown {
            protocol: String,
            source: String,
            destination: String,
        }
        let (source, destination) = self.ends();
        Shown { protocol: self.protocol_name(), source, destination }.serialize(serializer)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by panicking.
pub(crate) mod tests {
    use super::*;

    /// A connection of TCP, or of UDP, as `10.0.0.9:1000` and `10.0.0.2:22`.
    pub(crate) fn entry(protocol: u8, zone: u16, source: &str, destination: &str) -> Entry {
        let end = |text: &str| text.parse::<std::net::SocketAddr>().unwrap();
        let (from, to) = (end(source), end(destination));
        let flow = |from: std::net::SocketAddr, to: std::net::SocketAddr| Flow {
            protocol,
            source: from.ip(),
            destination: to.ip(),
            ports: Some((from.port(), to.port())),
            icmp: None,
        };
        let (original, reply) = (flow(from, to), flow(to, from));
        Entry { zone, original, reply, master: None, is_expected: false, key: Vec::new() }
    }

    #[test]
    fn a_connection_is_read_with_its_zone_and_the_one_that_announced_it() {
        use netlink_packet_core::{DefaultNla, Emitable};
        let tuple = |from: [u8; 4], to: [u8; 4], proto: Vec<ProtoTuple>| {
            let addresses = vec![
                IPTuple::SourceAddress(IpAddr::from(from)),
                IPTuple::DestinationAddress(IpAddr::from(to)),
            ];
            vec![Tuple::Ip(addresses), Tuple::Proto(proto)]
        };
        let ports = |from, to| {
            vec![
                ProtoTuple::Protocol(protocol::TCP.into()),
                ProtoTuple::SourcePort(from),
                ProtoTuple::DestinationPort(to),
            ]
        };
        let (guest, peer) = ([10, 0, 0, 2], [10, 0, 0, 9]);
        let master = tuple(peer, guest, ports(40_000, 21));
        let mut bytes = vec![0; master.as_slice().buffer_len()];
        master.as_slice().emit(&mut bytes);
        let read = Entry::of(vec![
            ConntrackAttribute::CtaTupleOrig(tuple(guest, peer, ports(20, 40_001))),
            ConntrackAttribute::CtaTupleReply(tuple(peer, guest, ports(40_001, 20))),
            ConntrackAttribute::CtaStatus(Status::Expected | Status::SeenReply),
            ConntrackAttribute::Other(DefaultNla::new(ZONE, vec![0x12, 0x34])),
            ConntrackAttribute::Other(DefaultNla::new(MASTER | 0x8000, bytes)),
        ])
        .unwrap();
        let master = entry(protocol::TCP, 0, "10.0.0.9:40000", "10.0.0.2:21").original;
        assert_eq!((read.zone, read.master, read.is_expected), (0x1234, Some(master), true));
        assert_eq!(read.original.to_string(), "tcp 10.0.0.2:20 → 10.0.0.9:40001");

        let echo = |kind| {
            let other = |number, bytes: &[u8]| ProtoTuple::Other(DefaultNla::new(number, bytes.to_vec()));
            let number = ProtoTuple::Protocol(protocol::ICMP.into());
            vec![number, other(4, &[0x01, 0x02]), other(5, &[kind]), other(6, &[0])]
        };
        let read = Entry::of(vec![
            ConntrackAttribute::CtaTupleOrig(tuple(guest, peer, echo(8))),
            ConntrackAttribute::CtaTupleReply(tuple(peer, guest, echo(0))),
        ])
        .unwrap();
        assert_eq!((read.original.icmp, read.answer().icmp), (Some((8, 0, 0x102)), Some((0, 0, 0x102))));
    }

    #[test]
    fn no_more_connections_are_read_than_the_limit() {
        use nwfilter_testlab::{Host, Need, skip_unless};
        skip_unless!(Need::Root, Need::Tool("conntrack"), Need::Tool("ip"));
        let host = Host::new().unwrap();
        for port in ["1", "2", "3"] {
            let line = format!(
                "conntrack -I -p udp -s 10.0.0.{port} -d 10.0.0.9 --sport 5{port} --dport 53 -t 60 -w 7"
            );
            host.run(&line.split(' ').collect::<Vec<_>>()).unwrap();
        }
        host.enter(|| {
            let mut conntrack = Conntrack::open().unwrap();
            let (read, all) = conntrack.read(2, |_| true).unwrap();
            assert_eq!((read.len(), all), (2, false));
            let (read, all) = conntrack.read(3, |_| true).unwrap();
            assert_eq!((read.len(), all), (3, true));
            let first = read.iter().find(|entry| entry.original.ports == Some((51, 53))).unwrap();
            assert_eq!((first.zone, first.original.to_string()), (7, "udp 10.0.0.1:51 → 10.0.0.9:53".into()));
            assert_eq!(first.answer(), first.reply);
            assert!(conntrack.end(first, Ending::Forgotten).unwrap());
            assert!(!conntrack.end(first, Ending::Forgotten).unwrap(), "it is gone");
            assert_eq!(conntrack.read(9, |entry| entry.zone == 7).unwrap().0.len(), 2);
        });
    }
}
