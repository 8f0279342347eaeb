//! A packet as rules see it: the fields that they compare.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use nwfilter_xml::MacAddr;

use crate::words;

/// An Ethernet frame and its contents, made from bytes by [`Packet::parse`] or from fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The frame's source address.
    pub src_mac: MacAddr,
    /// The frame's destination address.
    pub dst_mac: MacAddr,
    /// The VLAN tag (IEEE 802.1Q), if the frame has one.
    pub vlan: Option<u16>,
    /// The EtherType, after the tag if there is one. Below 0x600 it is a length (IEEE 802.3).
    pub ether_type: u16,
    /// The contents.
    pub body: Body,
    /// Why the kernel drops the IP packet before any rule: a wrong checksum or length.
    pub broken: Option<&'static str>,
}

/// The contents of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// ARP or RARP.
    Arp(Arp),
    /// IPv4 or IPv6.
    Ip(Ip),
    /// A spanning-tree message.
    Stp(Stp),
    /// Anything else.
    Other,
}

/// An ARP or RARP packet.
#[allow(missing_docs)] // Fields are named after those of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    pub hardware_type: u16,
    pub protocol_type: u16,
    pub opcode: u16,
    /// `None` where hardware addresses do not have 6 bytes.
    pub macs: Option<(MacAddr, MacAddr)>,
    /// `None` where protocol addresses do not have 4 bytes. Sender and target.
    pub ips: Option<(Ipv4Addr, Ipv4Addr)>,
}

/// A spanning-tree message as the kernel's `ebt_stp` reads it: each field one byte before its place in IEEE 802.1D.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stp {
    /// Its type, 0 for a configuration.
    pub kind: u8,
    /// The 31 bytes of a configuration after the type.
    pub config: Option<[u8; 31]>,
}

/// An IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// The source address.
    pub src: IpAddr,
    /// The destination address, of the same family.
    pub dst: IpAddr,
    /// The type of service, or the traffic class: all 8 bits.
    pub tos: u8,
    /// The protocol, after all extension headers.
    pub protocol: u8,
    /// Whether an authentication header precedes it, which IP rules on IPv6 take for the protocol.
    pub is_authenticated: bool,
    /// Set for a fragment.
    pub fragment: Option<Fragment>,
    /// The payload.
    pub transport: Transport,
    /// Whether checksums and lengths of the payload are right.
    pub is_sound: bool,
}

/// A fragment of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fragment {
    /// The identification, equal in all fragments of a packet.
    pub id: u32,
    /// The offset in bytes.
    pub offset: u16,
}

/// The payload of an IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP
    Tcp(Tcp),
    /// UDP, UDP-Lite and SCTP.
    Ports {
        /// The source port.
        src: u16,
        /// The destination port.
        dst: u16,
        /// What is after the header.
        payload: Vec<u8>,
    },
    /// ICMP and ICMPv6.
    Icmp(Icmp),
    /// Anything else, or a truncated header.
    Other,
}

/// A TCP segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tcp {
    /// The source port.
    pub src: u16,
    /// The destination port.
    pub dst: u16,
    /// The low 8 flags, as on the wire.
    pub flags: u8,
    /// The kinds of its options.
    pub options: Vec<u8>,
    /// What is after the header.
    pub payload: Vec<u8>,
}

/// An ICMP or ICMPv6 message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Icmp {
    /// Its type.
    pub kind: u8,
    /// Its code.
    pub code: u8,
    /// The identifier of an echo.
    pub id: u16,
    /// The packet that an error quotes.
    pub about: Option<Box<Ip>>,
}

/// The types of frames that rules know by name.
#[allow(missing_docs)]
pub mod ether_type {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const RARP: u16 = 0x8035;
    pub const VLAN: u16 = 0x8100;
    pub const IPV6: u16 = 0x86dd;
}

/// The IP protocols that rules know by name.
#[allow(missing_docs)]
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const IGMP: u8 = 2;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const IPV6_FRAGMENT: u8 = 44;
    pub const ESP: u8 = 50;
    pub const AH: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const NONE: u8 = 59;
    pub const SCTP: u8 = 132;
    pub const UDPLITE: u8 = 136;
}

/// The bits of [`Tcp::flags`].
#[allow(missing_docs)]
pub mod tcp_flag {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const URG: u8 = 0x20;
}

impl Packet {
    /// An IP packet in a frame without tag.
    pub fn ip(src_mac: MacAddr, dst_mac: MacAddr, ip: Ip) -> Self {
        let ether_type = if ip.src.is_ipv4() { ether_type::IPV4 } else { ether_type::IPV6 };
        Self { src_mac, dst_mac, vlan: None, ether_type, body: Body::Ip(ip), broken: None }
    }

    /// The IP packet in it.
    pub fn as_ip(&self) -> Option<&Ip> {
        match &self.body {
            Body::Ip(ip) => Some(ip),
            _ => None,
        }
    }
}

impl Ip {
    /// A whole packet without type of service.
    pub fn new(src: IpAddr, dst: IpAddr, protocol: u8, transport: Transport) -> Self {
        Self {
            src,
            dst,
            tos: 0,
            protocol,
            is_authenticated: false,
            fragment: None,
            transport,
            is_sound: true,
        }
    }

    /// Source and destination port.
    pub fn ports(&self) -> Option<(u16, u16)> {
        match &self.transport {
            Transport::Tcp(tcp) => Some((tcp.src, tcp.dst)),
            Transport::Ports { src, dst, .. } => Some((*src, *dst)),
            _ => None,
        }
    }

    /// The protocol as ip6tables and iptables see it, which stop at an authentication header.
    pub(crate) fn rule_protocol(&self) -> u8 {
        if self.is_authenticated { protocol::AH } else { self.protocol }
    }

    /// The protocol as ebtables sees it. It does not look into later fragments, and finds none after an extension header with
    /// no next header.
    pub(crate) fn bridge_protocol(&self) -> Option<u8> {
        match (self.src, self.fragment) {
            (IpAddr::V6(_), Some(fragment)) if fragment.offset > 0 => Some(protocol::IPV6_FRAGMENT),
            (IpAddr::V6(_), _) if self.protocol == protocol::NONE => None,
            _ => Some(self.protocol),
        }
    }

    /// Whether it is a fragment other than the first.
    pub(crate) fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|fragment| fragment.offset > 0)
    }
}

/// `TCP 192.0.2.7:40000 → 10.0.0.2:80 [SYN]`
impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(id) = self.vlan {
            write!(f, "VLAN {id}, ")?;
        }
        match &self.body {
            Body::Arp(arp) => write!(f, "{arp}, from {}", self.src_mac),
            Body::Ip(ip) => ip.fmt(f),
            Body::Stp(stp) => write!(f, "spanning-tree message of type {} from {}", stp.kind, self.src_mac),
            Body::Other => {
                let kind = words::ether_type(self.ether_type);
                write!(f, "frame of type {kind} {} → {}", self.src_mac, self.dst_mac)
            }
        }?;
        self.broken.map_or(Ok(()), |why| write!(f, ", {why}"))
    }
}

impl fmt::Display for Arp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.opcode {
            1 => "ARP request".to_owned(),
            2 => "ARP reply".to_owned(),
            3 => "RARP request".to_owned(),
            4 => "RARP reply".to_owned(),
            other => format!("ARP, opcode {other}"),
        };
        write!(f, "{what}")?;
        if let Some((sender, target)) = self.ips {
            write!(f, ", sender {sender}, target {target}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", words::protocol(self.protocol).to_uppercase())?;
        let end = |addr: IpAddr, port: u16| std::net::SocketAddr::new(addr, port).to_string();
        match self.ports() {
            Some((src, dst)) => write!(f, "{} → {}", end(self.src, src), end(self.dst, dst))?,
            None => write!(f, "{} → {}", self.src, self.dst)?,
        }
        match &self.transport {
            Transport::Tcp(tcp) => write!(f, " [{}]", words::tcp_flags(tcp.flags))?,
            Transport::Icmp(icmp) => write!(f, ", type {} code {}", icmp.kind, icmp.code)?,
            _ => (),
        }
        match self.fragment {
            Some(fragment) => write!(f, ", the part at byte {}", fragment.offset),
            None => Ok(()),
        }
    }
}
