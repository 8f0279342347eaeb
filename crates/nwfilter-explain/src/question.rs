//! Parses packets in words: `in tcp from 192.0.2.7:40000 to :80 new`, `out arp request sender 10.0.0.9`.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use nwfilter_rules::{CtDirection, Family, Ruleset};
use nwfilter_xml::{Binding, MacAddr, nearest};

use crate::connection::{Connection, State};
use crate::evaluate::Way;
use crate::packet::{Arp, Body, Icmp, Ip, Packet, Stp, Tcp, Transport, ether_type, protocol, tcp_flag};
use crate::words;

/// The guest of a port. Its addresses fill in what a question omits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its known IP addresses.
    pub addresses: Vec<IpAddr>,
}

impl Guest {
    /// The guest of a binding, with the addresses in the port's ruleset.
    pub fn of(binding: &Binding, ruleset: &Ruleset) -> Self {
        Self { mac: binding.mac, addresses: ruleset.guest_addresses.clone() }
    }

    /// Its first address of a family; one for documentation (RFC 5737, RFC 3849) if none is known.
    pub fn address(&self, family: Family) -> IpAddr {
        let known = self.addresses.iter().find(|addr| Family::of(**addr) == family).copied();
        known.unwrap_or(match family {
            Family::Ipv4 => Ipv4Addr::new(192, 0, 2, 2).into(),
            Family::Ipv6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2).into(),
        })
    }
}

/// The MAC address of the other end if a question does not name it.
pub(crate) const PEER_MAC: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0x01]);

/// The IP address of the other end if a question does not name it.
pub(crate) fn peer_address(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(198, 51, 100, 7).into(),
        Family::Ipv6 => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 7).into(),
    }
}

/// A packet of a port and the state of its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Its direction.
    pub way: Way,
    /// The packet.
    pub packet: Packet,
    /// The state of its connection, if the question names one.
    pub connection: Option<Connection>,
}

/// An error in the words of a question.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}\n  for example: {example}")]
pub struct BadQuestion {
    what: String,
    example: String,
}

impl BadQuestion {
    pub(crate) fn new(what: impl Display, example: impl Display) -> Self {
        Self { what: what.to_string(), example: example.to_string() }
    }
}

const EXAMPLE: &str = "in tcp from 192.0.2.7:40000 to :80 new";

/// The first words of a packet, and what may follow.
const KINDS: [&str; 15] = [
    "tcp", "udp", "udplite", "sctp", "icmp", "icmpv6", "igmp", "esp", "ah", "ip", "ipv6", "arp", "rarp",
    "stp", "mac",
];

const ICMP_TYPES: [(&str, u8); 6] = [
    ("echo-request", 8),
    ("echo-reply", 0),
    ("unreachable", 3),
    ("redirect", 5),
    ("time-exceeded", 11),
    ("router-advertisement", 9),
];

const ICMPV6_TYPES: [(&str, u8); 8] = [
    ("echo-request", 128),
    ("echo-reply", 129),
    ("unreachable", 1),
    ("time-exceeded", 3),
    ("router-solicitation", 133),
    ("router-advertisement", 134),
    ("neighbor-solicitation", 135),
    ("neighbor-advertisement", 136),
];

impl Question {
    /// Parses a direction, a kind of packet and its fields. Omitted fields are those of the guest.
    ///
    /// * direction: `in` (to the guest) or `out`
    /// * kind: tcp, udp, udplite, sctp, icmp, icmpv6, igmp, esp, ah, ip, ipv6, arp, rarp, stp, mac
    /// * `from` and `to` with `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT` or `:PORT`
    /// * `mac` and `dst-mac` with a MAC address, `vlan NUMBER`, `dscp NUMBER`, `proto PROTOCOL`, `type NUMBER`
    /// * `flags SYN,ACK` and `option NUMBER` of TCP, `code NUMBER` of ICMP
    /// * of ARP `request`, `reply` or `op NUMBER`, `sender` and `target` with an address, `sender-mac` and `target-mac`
    /// * the state: `new`, `established`, `related`, `invalid` or `untracked`, and `reply` for the other direction
    pub fn read(guest: &Guest, words: &[impl AsRef<str>]) -> Result<Self, BadQuestion> {
        let mut words = words.iter().map(AsRef::as_ref);
        let way = match words.next() {
            Some("in") => Way::ToGuest,
            Some("out") => Way::FromGuest,
            Some(other) => {
                let what = format!("'{other}' is no direction: 'in' is to the guest, 'out' from it");
                return Err(BadQuestion::new(what, EXAMPLE));
            }
            None => return Err(BadQuestion::new("no direction and no packet", EXAMPLE)),
        };
        let Some(kind) = words.next() else {
            return Err(BadQuestion::new(format!("no packet: one of {}", KINDS.join(", ")), EXAMPLE));
        };
        if !KINDS.contains(&kind) {
            let hint = nearest(kind, KINDS).map(|near| format!(": did you mean '{near}'?"));
            let hint = hint.unwrap_or_else(|| format!(": it is one of {}", KINDS.join(", ")));
            return Err(BadQuestion::new(format!("'{kind}' is no kind of packet{hint}"), EXAMPLE));
        }
        let mut given = Given::default();
        while let Some(word) = words.next() {
            given.take(kind, word, &mut words)?;
        }
        given.question(guest, way, kind)
    }
}

/// What the words say.
#[derive(Default)]
struct Given {
    src: End,
    dst: End,
    src_mac: Option<MacAddr>,
    dst_mac: Option<MacAddr>,
    vlan: Option<u16>,
    dscp: u8,
    proto: Option<u8>,
    frame_type: Option<u16>,
    icmp_type: Option<u8>,
    code: u8,
    flags: Option<u8>,
    options: Vec<u8>,
    opcode: Option<u16>,
    sender: Option<Ipv4Addr>,
    target: Option<Ipv4Addr>,
    sender_mac: Option<MacAddr>,
    target_mac: Option<MacAddr>,
    state: Option<State>,
    is_reply: bool,
    is_v6: bool,
}

#[derive(Clone, Copy, Default)]
struct End {
    addr: Option<IpAddr>,
    port: Option<u16>,
}

impl FromStr for End {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if let Ok(addr) = text.trim_start_matches('[').trim_end_matches(']').parse() {
            return Ok(Self { addr: Some(addr), port: None });
        }
        if let Ok(both) = text.parse::<SocketAddr>() {
            return Ok(Self { addr: Some(both.ip()), port: Some(both.port()) });
        }
        let port = text.strip_prefix(':').and_then(|port| port.parse().ok());
        port.map(|port| Self { addr: None, port: Some(port) }).ok_or(())
    }
}

impl Given {
    fn take<'w>(
        &mut self,
        kind: &str,
        word: &str,
        rest: &mut impl Iterator<Item = &'w str>,
    ) -> Result<(), BadQuestion> {
        let is_arp = matches!(kind, "arp" | "rarp");
        let is_icmp = matches!(kind, "icmp" | "icmpv6");
        match word {
            "from" | "sender" if is_arp => {
                self.sender = Some(value(word, rest, "an IPv4 address", "10.0.0.2")?)
            }
            "to" | "target" if is_arp => {
                self.target = Some(value(word, rest, "an IPv4 address", "10.0.0.1")?)
            }
            "from" => self.src = value(word, rest, "an address, a port or both", "192.0.2.7:40000")?,
            "to" => self.dst = value(word, rest, "an address, a port or both", ":80")?,
            "mac" => self.src_mac = Some(value(word, rest, "a MAC address", "52:54:00:00:00:01")?),
            "dst-mac" => self.dst_mac = Some(value(word, rest, "a MAC address", "ff:ff:ff:ff:ff:ff")?),
            "sender-mac" if is_arp => {
                self.sender_mac = Some(value(word, rest, "a MAC address", "52:54:00:00:00:01")?);
            }
            "target-mac" if is_arp => {
                self.target_mac = Some(value(word, rest, "a MAC address", "52:54:00:00:00:01")?);
            }
            "vlan" => self.vlan = Some(below(word, rest, 4096, "7")?),
            "dscp" => self.dscp = below(word, rest, 64, "46")? as u8,
            "code" if is_icmp => self.code = below(word, rest, 256, "0")? as u8,
            "type" if is_icmp => {
                let text = next(word, rest, "a type of ICMP", "8")?;
                self.icmp_type =
                    Some(self.icmp(kind, text).ok_or_else(|| wrong(word, text, "a type of ICMP", "8"))?);
            }
            "type" if kind == "mac" => {
                let text = next(word, rest, "a type of frames", "0x88cc")?;
                let hex = || u16::from_str_radix(text.strip_prefix("0x")?, 16).ok();
                let number = words::ether_type_number(text).or_else(hex).or_else(|| text.parse().ok());
                self.frame_type =
                    Some(number.ok_or_else(|| wrong(word, text, "a type of frames", "0x88cc"))?);
            }
            "proto" if matches!(kind, "ip" | "ipv6") => {
                let text = next(word, rest, "an IP protocol", "47")?;
                let number = words::protocol_number(text).or_else(|| text.parse().ok());
                self.proto = Some(number.ok_or_else(|| wrong(word, text, "an IP protocol", "47"))?);
            }
            "flags" if kind == "tcp" => {
                let text = next(word, rest, "TCP flags", "SYN,ACK")?;
                let bits = text.split(',').filter(|name| !name.eq_ignore_ascii_case("none"));
                let bits = bits.map(words::tcp_flag).collect::<Option<Vec<_>>>();
                let bits = bits.ok_or_else(|| wrong(word, text, "TCP flags", "SYN,ACK"))?;
                self.flags = Some(bits.iter().fold(0, |all, bit| all | bit));
            }
            "option" if kind == "tcp" => self.options.push(below(word, rest, 256, "2")? as u8),
            "op" if is_arp => self.opcode = Some(below(word, rest, u16::MAX, "1")?),
            "request" if is_arp => self.opcode = Some(if kind == "arp" { 1 } else { 3 }),
            "reply" if is_arp => self.opcode = Some(if kind == "arp" { 2 } else { 4 }),
            "gratuitous" if kind == "arp" => self.opcode = Some(u16::MAX),
            "new" => self.state = Some(State::New),
            "established" => self.state = Some(State::Established),
            "related" => self.state = Some(State::Related),
            "invalid" => self.state = Some(State::Invalid),
            "untracked" => self.state = Some(State::Untracked),
            "reply" => self.is_reply = true,
            "inet6" => self.is_v6 = true,
            name => match is_icmp.then(|| self.icmp(kind, name)).flatten() {
                Some(number) => self.icmp_type = Some(number),
                None => {
                    let what = format!("'{name}' says nothing about a packet of kind {kind}");
                    return Err(BadQuestion::new(what, example(kind)));
                }
            },
        }
        Ok(())
    }

    fn icmp(&self, kind: &str, text: &str) -> Option<u8> {
        let names: &[_] = if kind == "icmp" { &ICMP_TYPES } else { &ICMPV6_TYPES };
        let named = names.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
        named.or_else(|| text.parse().ok())
    }

    fn question(self, guest: &Guest, way: Way, kind: &str) -> Result<Question, BadQuestion> {
        let outgoing = way == Way::FromGuest;
        let (own, other) = (guest.mac, PEER_MAC);
        let (src, dst) = if outgoing { (own, other) } else { (other, own) };
        let mut packet = Packet {
            src_mac: src,
            dst_mac: dst,
            vlan: None,
            ether_type: ether_type::IPV4,
            body: Body::Other,
            broken: None,
        };
        match kind {
            "arp" | "rarp" => self.arp(guest, way, kind, &mut packet),
            "stp" => {
                packet.dst_mac = MacAddr([0x01, 0x80, 0xc2, 0, 0, 0]);
                packet.ether_type = 38;
                packet.body = Body::Stp(Stp { kind: 0, config: Some([0; 31]) });
            }
            "mac" => packet.ether_type = self.frame_type.unwrap_or(0x88cc),
            _ => {
                let ip = self.ip(guest, way, kind)?;
                packet = Packet::ip(packet.src_mac, packet.dst_mac, ip);
                packet.dst_mac = packet.as_ip().and_then(|ip| group_mac(ip.dst)).unwrap_or(dst);
            }
        }
        packet.src_mac = self.src_mac.unwrap_or(packet.src_mac);
        packet.dst_mac = self.dst_mac.unwrap_or(packet.dst_mac);
        packet.vlan = self.vlan;
        let direction = if self.is_reply { CtDirection::Reply } else { CtDirection::Original };
        let state = self.state.or(self.is_reply.then_some(State::Established));
        if self.is_reply && matches!(state, Some(State::New | State::Invalid | State::Untracked)) {
            let what = "a packet in reply direction belongs to a connection that is established or related";
            return Err(BadQuestion::new(what, "in tcp from :80 established reply"));
        }
        let connection = state.map(|state| Connection::new(state, direction));
        Ok(Question { way, packet, connection })
    }

    fn arp(&self, guest: &Guest, way: Way, kind: &str, packet: &mut Packet) {
        let mine = match guest.address(Family::Ipv4) {
            IpAddr::V4(addr) => addr,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let theirs = match peer_address(Family::Ipv4) {
            IpAddr::V4(addr) => addr,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let (src, dst) = if way == Way::FromGuest { (mine, theirs) } else { (theirs, mine) };
        let is_gratuitous = self.opcode == Some(u16::MAX);
        let opcode = match (self.opcode, kind) {
            (None | Some(u16::MAX), "arp") => 1,
            (None | Some(u16::MAX), _) => 3,
            (Some(opcode), _) => opcode,
        };
        let sender = self.sender.unwrap_or(src);
        let target = self.target.unwrap_or(if is_gratuitous { sender } else { dst });
        let asks = matches!(opcode, 1 | 3);
        let target_mac = self.target_mac.unwrap_or(if asks { MacAddr([0; 6]) } else { packet.dst_mac });
        let sender_mac = self.sender_mac.or(self.src_mac).unwrap_or(packet.src_mac);
        if asks {
            packet.dst_mac = MacAddr([0xff; 6]);
        }
        packet.ether_type = if kind == "arp" { ether_type::ARP } else { ether_type::RARP };
        packet.body = Body::Arp(Arp {
            hardware_type: 1,
            protocol_type: ether_type::IPV4,
            opcode,
            macs: Some((sender_mac, target_mac)),
            ips: Some((sender, target)),
        });
    }

    fn ip(&self, guest: &Guest, way: Way, kind: &str) -> Result<Ip, BadQuestion> {
        let families = [self.src.addr, self.dst.addr].map(|addr| addr.map(Family::of));
        let family = match (families, kind) {
            ([Some(a), Some(b)], _) if a != b => {
                let what = "one address is of IPv4 and the other of IPv6: no packet has both";
                return Err(BadQuestion::new(what, example(kind)));
            }
            ([Some(Family::Ipv4), _] | [_, Some(Family::Ipv4)], "icmpv6" | "ipv6") => {
                let what = format!("an IPv4 address in a packet of kind {kind}");
                return Err(BadQuestion::new(what, example(kind)));
            }
            ([Some(Family::Ipv6), _] | [_, Some(Family::Ipv6)], "icmp" | "igmp" | "ip") => {
                let what = format!("an IPv6 address in a packet of kind {kind}");
                return Err(BadQuestion::new(what, example(kind)));
            }
            ([Some(family), _] | [_, Some(family)], _) => family,
            (_, "icmpv6" | "ipv6") => Family::Ipv6,
            _ if self.is_v6 => Family::Ipv6,
            _ => Family::Ipv4,
        };
        let (mine, theirs) = (guest.address(family), peer_address(family));
        let (src, dst) = if way == Way::FromGuest { (mine, theirs) } else { (theirs, mine) };
        let (src, dst) = (self.src.addr.unwrap_or(src), self.dst.addr.unwrap_or(dst));
        let number = match kind {
            "ip" | "ipv6" => self.proto.unwrap_or(253),
            name => words::protocol_number(name).unwrap_or(253),
        };
        let has_ports = matches!(number, protocol::TCP | protocol::UDP | protocol::UDPLITE | protocol::SCTP);
        if !has_ports && (self.src.port.is_some() || self.dst.port.is_some()) {
            return Err(BadQuestion::new(format!("a packet of kind {kind} has no ports"), example(kind)));
        }
        let ports = (self.src.port.unwrap_or(40000), self.dst.port.unwrap_or(80));
        let begins =
            !self.is_reply && self.state.is_none_or(|state| matches!(state, State::New | State::Related));
        let usual_flags = if begins { tcp_flag::SYN } else { tcp_flag::ACK };
        let transport = match number {
            protocol::TCP => Transport::Tcp(Tcp {
                src: ports.0,
                dst: ports.1,
                flags: self.flags.unwrap_or(usual_flags),
                options: self.options.clone(),
                payload: Vec::new(),
            }),
            _ if has_ports => Transport::Ports { src: ports.0, dst: ports.1, payload: Vec::new() },
            protocol::ICMP | protocol::ICMPV6 => {
                let echo = if number == protocol::ICMP { 8 } else { 128 };
                let kind = self.icmp_type.unwrap_or(echo);
                Transport::Icmp(Icmp { kind, code: self.code, id: 1, about: None })
            }
            _ => Transport::Other,
        };
        Ok(Ip { tos: self.dscp << 2, ..Ip::new(src, dst, number, transport) })
    }
}

/// The MAC address of a multicast or broadcast address.
fn group_mac(addr: IpAddr) -> Option<MacAddr> {
    match addr {
        IpAddr::V4(addr) if addr.is_broadcast() => Some(MacAddr([0xff; 6])),
        IpAddr::V4(addr) if addr.is_multicast() => {
            let [_, b, c, d] = addr.octets();
            Some(MacAddr([0x01, 0, 0x5e, b & 0x7f, c, d]))
        }
        IpAddr::V6(addr) if addr.is_multicast() => {
            let [.., a, b, c, d] = addr.octets();
            Some(MacAddr([0x33, 0x33, a, b, c, d]))
        }
        _ => None,
    }
}

fn example(kind: &str) -> &'static str {
    match kind {
        "arp" | "rarp" => "out arp request sender 10.0.0.9",
        "icmp" => "in icmp echo-request from 192.0.2.7",
        "icmpv6" => "out icmpv6 neighbor-solicitation to ff02::1",
        "ip" | "ipv6" | "igmp" | "esp" | "ah" => "out ip proto 47 to 192.0.2.7",
        "stp" => "out stp",
        "mac" => "out mac type 0x88cc",
        _ => EXAMPLE,
    }
}

fn next<'w>(
    word: &str,
    rest: &mut impl Iterator<Item = &'w str>,
    what: &str,
    example: &str,
) -> Result<&'w str, BadQuestion> {
    rest.next().ok_or_else(|| BadQuestion::new(format!("'{word}' needs {what}"), format!("{word} {example}")))
}

fn wrong(word: &str, text: &str, what: &str, example: &str) -> BadQuestion {
    BadQuestion::new(format!("'{text}' after '{word}' is not {what}"), format!("{word} {example}"))
}

fn value<'w, T: FromStr>(
    word: &str,
    rest: &mut impl Iterator<Item = &'w str>,
    what: &str,
    example: &str,
) -> Result<T, BadQuestion> {
    let text = next(word, rest, what, example)?;
    text.parse().map_err(|_| wrong(word, text, what, example))
}

fn below<'w>(
    word: &str,
    rest: &mut impl Iterator<Item = &'w str>,
    limit: u16,
    example: &str,
) -> Result<u16, BadQuestion> {
    let what = format!("a number below {limit}");
    let text = next(word, rest, &what, example)?;
    let number = text.parse().ok().filter(|number| *number < limit);
    number.ok_or_else(|| wrong(word, text, &what, example))
}
