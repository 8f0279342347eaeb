//! Connections as the kernel follows them: which state a packet has, and what it changes when it passes.
//!
//! The model of `nf_conntrack` in Linux: its table of TCP states, its rules for what may begin a connection, the FTP and
//! TFTP helpers. Windows and timeouts of TCP are left out: packets are taken as coming in time and in order.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use nwfilter_rules::{CtDirection, Family, Helper, HelperRule, HelperSide, Ruleset, Transport as Over};
use nwfilter_xml::value::States;
use serde::Serialize;

use crate::Way;
use crate::packet::{Fragment, Icmp, Ip, Transport, protocol, tcp_flag};
use crate::parse::is_icmp_error;

/// What the kernel says of a packet's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is the first packet, or no answer came yet.
    New,
    /// The connection was seen in both directions.
    Established,
    /// Another connection announced it, or it is an error about one.
    Related,
    /// It belongs to no connection and cannot begin one.
    Invalid,
    /// The kernel does not follow such packets: neighbour discovery, multicast listeners.
    Untracked,
}

/// The state of a packet's connection, and which way the packet goes in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Connection {
    /// The state.
    pub state: State,
    /// The direction; `None` where there is no connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<CtDirection>,
}

impl Connection {
    /// A packet without connection.
    pub const INVALID: Self = Self { state: State::Invalid, direction: None };

    /// A packet in that state. Without connection there is no direction.
    pub fn new(state: State, direction: CtDirection) -> Self {
        let direction = Some(direction).filter(|_| !matches!(state, State::Invalid | State::Untracked));
        Self { state, direction }
    }

    /// Whether the state is one of these.
    pub(crate) fn is_in(self, states: States) -> bool {
        match self.state {
            State::New => states.contains(States::NEW),
            State::Established => states.contains(States::ESTABLISHED),
            State::Related => states.contains(States::RELATED),
            State::Invalid => states.contains(States::INVALID),
            State::Untracked => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::New => "NEW",
            State::Established => "ESTABLISHED",
            State::Related => "RELATED",
            State::Invalid => "INVALID",
            State::Untracked => "UNTRACKED",
        })
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.direction {
            Some(CtDirection::Reply) => write!(f, "{}, in reply direction", self.state),
            _ => self.state.fmt(f),
        }
    }
}

/// The connections of a port.
#[derive(Clone, Debug, Default)]
pub struct Tracker {
    connections: Vec<Tracked>,
    expected: Vec<Expected>,
    /// The first part of each packet that came in parts.
    first_parts: BTreeMap<PacketId, Ip>,
}

type PacketId = (IpAddr, IpAddr, u8, u32);

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple {
    protocol: u8,
    src: (IpAddr, u16),
    dst: (IpAddr, u16),
    /// The type of an ICMP message.
    kind: u8,
}

#[derive(Clone, Debug)]
struct Tracked {
    original: Tuple,
    is_related: bool,
    reply_seen: bool,
    tcp: TcpState,
    helper: Option<Helper>,
}

/// A connection that another one announced.
#[derive(Clone, Copy, Debug)]
struct Expected {
    protocol: u8,
    src: IpAddr,
    dst: (IpAddr, u16),
}

impl Tuple {
    fn of(ip: &Ip) -> Self {
        let (src, dst, kind) = match &ip.transport {
            Transport::Icmp(icmp) => (icmp.id, 0, icmp.kind),
            _ => ip.ports().map_or((0, 0, 0), |(src, dst)| (src, dst, 0)),
        };
        Self { protocol: ip.protocol, src: (ip.src, src), dst: (ip.dst, dst), kind }
    }

    /// The tuple of an answer; `None` for ICMP messages that have none.
    fn inverted(self) -> Option<Self> {
        let icmp = matches!(self.protocol, protocol::ICMP | protocol::ICMPV6);
        if !icmp {
            return Some(Self { src: self.dst, dst: self.src, ..self });
        }
        const PAIRS: [(u8, u8); 4] = [(8, 0), (13, 14), (15, 16), (17, 18)];
        const PAIRS_V6: [(u8, u8); 2] = [(128, 129), (139, 140)];
        let pairs: &[_] = if self.protocol == protocol::ICMP { &PAIRS } else { &PAIRS_V6 };
        let (asked, answered) = pairs.iter().find(|(a, b)| [*a, *b].contains(&self.kind))?;
        let kind = if self.kind == *asked { *answered } else { *asked };
        // The identifier stays where it is.
        Some(Self { src: (self.dst.0, self.src.1), dst: (self.src.0, 0), kind, ..self })
    }
}

/// What a packet finds.
enum Place {
    Known { index: usize, direction: CtDirection },
    Expected { index: usize },
    Fresh,
}

impl Tracker {
    /// The state of a packet's connection before it passes.
    pub fn look(&self, ip: &Ip) -> Connection {
        // conntrack finds no header to follow after an IPv6 extension header that says there is none.
        if !ip.is_sound || (ip.src.is_ipv6() && ip.protocol == protocol::NONE) {
            return Connection::INVALID;
        }
        let tuple = Tuple::of(ip);
        if let Transport::Icmp(icmp) = &ip.transport {
            if ip.protocol == protocol::ICMPV6 && is_untracked(icmp.kind) {
                return Connection { state: State::Untracked, direction: None };
            }
            if is_icmp_error(ip.protocol, icmp.kind) {
                return self.error(ip, icmp);
            }
        }
        match self.find(&tuple) {
            Place::Known { index, direction } => {
                let known = &self.connections[index];
                if let Transport::Tcp(tcp) = &ip.transport
                    && known.tcp.after(tcp.flags, direction).is_none()
                {
                    return Connection::INVALID;
                }
                let state = match direction {
                    CtDirection::Reply => State::Established,
                    CtDirection::Original if known.reply_seen => State::Established,
                    CtDirection::Original if known.is_related => State::Related,
                    CtDirection::Original => State::New,
                };
                Connection::new(state, direction)
            }
            _ if !may_begin(ip) => Connection::INVALID,
            Place::Expected { .. } => Connection::new(State::Related, CtDirection::Original),
            Place::Fresh => Connection::new(State::New, CtDirection::Original),
        }
    }

    /// How many connections an address has opened, this packet's included.
    pub fn connections_from(&self, ip: &Ip) -> usize {
        let known = matches!(self.find(&Tuple::of(ip)), Place::Known { .. });
        let of_address = self.connections.iter().filter(|known| known.original.src.0 == ip.src);
        of_address.count() + usize::from(!known)
    }

    /// Notes that a packet passed.
    pub fn passed(&mut self, ip: &Ip, way: Way, ruleset: &Ruleset) {
        let Connection { state, direction } = self.look(ip);
        let is_error =
            matches!(&ip.transport, Transport::Icmp(icmp) if is_icmp_error(ip.protocol, icmp.kind));
        let (Some(direction), false) = (direction, is_error) else { return };
        let tuple = Tuple::of(ip);
        let index = match self.find(&tuple) {
            Place::Known { index, .. } => index,
            place => {
                if let Place::Expected { index } = place {
                    self.expected.remove(index);
                }
                self.connections.push(Tracked {
                    original: tuple,
                    is_related: state == State::Related,
                    reply_seen: false,
                    tcp: TcpState::None,
                    helper: helper(ip, way, ruleset),
                });
                self.connections.len() - 1
            }
        };
        let known = &mut self.connections[index];
        if let Transport::Tcp(tcp) = &ip.transport {
            if tcp.flags & tcp_flag::RST != 0 && !known.reply_seen {
                self.connections.remove(index);
                return;
            }
            known.tcp = known.tcp.after(tcp.flags, direction).unwrap_or(known.tcp);
        }
        known.reply_seen |= direction == CtDirection::Reply;
        let expected = match known.helper {
            Some(Helper::Ftp) if known.reply_seen => announced_by_ftp(ip, direction, known.original),
            Some(Helper::Tftp) if direction == CtDirection::Original => announced_by_tftp(ip),
            _ => None,
        };
        self.expected.extend(expected);
    }

    /// The packet that a part belongs to, as far as it was seen: its first part. `None` if that was not.
    pub fn whole(&mut self, ip: &Ip) -> Option<Ip> {
        let Some(Fragment { id, offset }) = ip.fragment else { return Some(ip.clone()) };
        let key = (ip.src, ip.dst, ip.protocol, id);
        // Later parts of IPv6 do not all say the protocol.
        let key = if ip.src.is_ipv6() { (key.0, key.1, 0, id) } else { key };
        if offset == 0 {
            self.first_parts.insert(key, ip.clone());
        }
        self.first_parts.get(&key).cloned()
    }

    fn find(&self, tuple: &Tuple) -> Place {
        for (index, known) in self.connections.iter().enumerate() {
            if known.original == *tuple {
                return Place::Known { index, direction: CtDirection::Original };
            }
            if known.original.inverted() == Some(*tuple) {
                return Place::Known { index, direction: CtDirection::Reply };
            }
        }
        let expects = |expected: &Expected| {
            (expected.protocol, expected.src, expected.dst) == (tuple.protocol, tuple.src.0, tuple.dst)
        };
        self.expected.iter().position(expects).map_or(Place::Fresh, |index| Place::Expected { index })
    }

    /// An error belongs to the connection of the packet that it is about, and goes the other way.
    fn error(&self, ip: &Ip, icmp: &Icmp) -> Connection {
        let Some(about) = icmp.about.as_ref().filter(|about| about.src == ip.dst) else {
            return Connection::INVALID;
        };
        match self.find(&Tuple::of(about)) {
            Place::Known { direction: CtDirection::Original, .. } => {
                Connection::new(State::Related, CtDirection::Reply)
            }
            Place::Known { direction: CtDirection::Reply, .. } => {
                Connection::new(State::Related, CtDirection::Original)
            }
            _ => Connection::INVALID,
        }
    }
}

/// Neighbour discovery and multicast listeners (`noct_valid_new` in `nf_conntrack_proto_icmpv6.c`).
fn is_untracked(kind: u8) -> bool {
    matches!(kind, 130..=136 | 143)
}

/// Whether a packet may be the first of a connection.
fn may_begin(ip: &Ip) -> bool {
    match &ip.transport {
        // A connection that is in progress is taken up (`nf_conntrack_tcp_loose`).
        Transport::Tcp(tcp) => TcpState::None.after(tcp.flags, CtDirection::Original).is_some(),
        Transport::Ports { payload, .. } if ip.protocol == protocol::SCTP => {
            // INIT and HEARTBEAT; a packet made of fields begins one.
            payload.first().is_none_or(|chunk| matches!(chunk, 1 | 4))
        }
        Transport::Icmp(icmp) => match ip.protocol {
            protocol::ICMP => matches!(icmp.kind, 8 | 13 | 15 | 17),
            _ => matches!(icmp.kind, 128 | 139),
        },
        _ => true,
    }
}

/// The helper that a ruleset gives to a connection.
fn helper(ip: &Ip, way: Way, ruleset: &Ruleset) -> Option<Helper> {
    let (_, port) = ip.ports()?;
    let matches = |rule: &&HelperRule| {
        let over = match rule.transport {
            Over::Tcp => protocol::TCP,
            Over::Udp => protocol::UDP,
        };
        let on_its_side = match rule.side {
            HelperSide::Guest => ruleset.guest_addresses.contains(&ip.dst),
            HelperSide::Elsewhere => way == Way::FromGuest,
        };
        let asked = (rule.family, over, rule.port) == (Family::of(ip.dst), ip.protocol, port);
        asked && on_its_side
    };
    ruleset.helpers.iter().find(matches).map(|rule| rule.helper)
}

/// What a line of an FTP control connection announces (RFC 959, RFC 2428).
fn announced_by_ftp(ip: &Ip, direction: CtDirection, control: Tuple) -> Option<Expected> {
    let Transport::Tcp(tcp) = &ip.transport else { return None };
    let line = std::str::from_utf8(&tcp.payload).ok()?;
    let other = if direction == CtDirection::Original { control.dst.0 } else { control.src.0 };
    let expected = |dst| Some(Expected { protocol: protocol::TCP, src: other, dst });
    let upper = line.to_ascii_uppercase();
    if direction == CtDirection::Original {
        if let Some(numbers) = upper.strip_prefix("PORT ") {
            return expected(six_numbers(numbers)?);
        }
        let mut fields = upper.strip_prefix("EPRT ")?.trim_start().trim_start_matches('|').split('|');
        let (_, addr, port) = (fields.next()?, fields.next()?, fields.next()?);
        return expected((addr.parse().ok()?, port.parse().ok()?));
    }
    if upper.starts_with("227 ") {
        let numbers = upper.get(4..)?.trim_start_matches(|c: char| !c.is_ascii_digit());
        return expected(six_numbers(numbers)?);
    }
    let fields = upper.strip_prefix("229 ")?.split_once("|||")?.1;
    expected((ip.src, fields.split('|').next()?.parse().ok()?))
        // The address must be that of the connection.
        .filter(|expected| expected.dst.0 == ip.src)
}

fn six_numbers(text: &str) -> Option<(IpAddr, u16)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u8>().ok());
    let mut next = || numbers.next().flatten();
    let addr = Ipv4Addr::new(next()?, next()?, next()?, next()?);
    Some((addr.into(), u16::from_be_bytes([next()?, next()?])))
}

/// The server answers a request from another port.
fn announced_by_tftp(ip: &Ip) -> Option<Expected> {
    let Transport::Ports { src, payload, .. } = &ip.transport else { return None };
    // Requests to read and to write.
    let is_request = matches!(payload.as_slice(), [0, 1 | 2, ..]);
    is_request.then_some(Expected { protocol: protocol::UDP, src: ip.dst, dst: (ip.src, *src) })
}

/// Where a TCP connection is, in the words of `nf_conntrack_proto_tcp.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TcpState {
    None,
    SynSent,
    SynRecv,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Close,
    SynSent2,
}

impl TcpState {
    /// The state after a segment with these flags; `None` if it is invalid then.
    fn after(self, flags: u8, direction: CtDirection) -> Option<Self> {
        use TcpState::{
            Close as CL, CloseWait as CW, Established as ES, FinWait as FW, LastAck as LA, None as NO,
            SynRecv as SR, SynSent as SS, SynSent2 as S2, TimeWait as TW,
        };
        /// Stays as it is.
        const IG: Option<TcpState> = Some(NO);
        const IV: Option<TcpState> = None;
        const fn s(state: TcpState) -> Option<TcpState> {
            Some(state)
        }
        // By flags, then by the state before.
        const ORIGINAL: [[Option<TcpState>; 10]; 5] = [
            [s(SS), s(SS), IG, IG, IG, IG, IG, s(SS), s(SS), s(S2)],
            [IV, IV, s(SR), IV, IV, IV, IV, IV, IV, s(SR)],
            [IV, IV, s(FW), s(FW), s(LA), s(LA), s(LA), s(TW), s(CL), IV],
            [s(ES), IV, s(ES), s(ES), s(CW), s(CW), s(TW), s(TW), s(CL), IV],
            [IV, s(CL), s(CL), s(CL), s(CL), s(CL), s(CL), s(CL), s(CL), s(CL)],
        ];
        const REPLY: [[Option<TcpState>; 10]; 5] = [
            [IV, s(S2), IV, IV, IV, IV, IV, s(SS), IV, s(S2)],
            [IV, s(SR), IG, IG, IG, IG, IG, IG, IG, s(SR)],
            [IV, IV, s(FW), s(FW), s(LA), s(LA), s(LA), s(TW), s(CL), IV],
            [IV, IG, s(SR), s(ES), s(CW), s(CW), s(TW), s(TW), s(CL), IG],
            [IV, s(CL), s(CL), s(CL), s(CL), s(CL), s(CL), s(CL), s(CL), s(CL)],
        ];
        use tcp_flag::{ACK, FIN, RST, SYN, URG};
        // `tcp_valid_flags` and `get_conntrack_index`; the urgent flag goes with some combinations only.
        let row = match (flags & (SYN | ACK | FIN | RST), flags & URG != 0) {
            (f, _) if f == SYN => 0,
            (f, false) if f == SYN | ACK => 1,
            (f, _) if f == FIN | ACK => 2,
            (f, _) if f == ACK => 3,
            (f, false) if f == RST || f == RST | ACK => 4,
            _ => return None,
        };
        let table = if direction == CtDirection::Original { &ORIGINAL } else { &REPLY };
        table[row][self as usize].map(|next| if next == NO { self } else { next })
    }
}
