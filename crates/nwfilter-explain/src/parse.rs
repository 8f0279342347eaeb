//! Parses frames as the kernel does, with what it ignores and what it drops at once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nwfilter_xml::MacAddr;

use crate::packet::{Arp, Body, Fragment, Icmp, Ip, Packet, Stp, Tcp, Transport, ether_type, protocol};

/// A frame that is too short to have an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame has at least 14 bytes: two addresses and a type; this one has {0}")]
pub struct TooShort(pub usize);

impl Packet {
    /// Reads an Ethernet frame.
    ///
    /// ```
    /// use nwfilter_explain::Packet;
    ///
    /// assert!(Packet::parse(&[0; 13]).is_err());
    /// assert_eq!(Packet::parse(&[0; 14]).map(|packet| packet.ether_type), Ok(0));
    /// ```
    pub fn parse(frame: &[u8]) -> Result<Self, TooShort> {
        let short = TooShort(frame.len());
        let dst_mac = mac(frame, 0).ok_or(short)?;
        let src_mac = mac(frame, 6).ok_or(short)?;
        let outer = u16_at(frame, 12).ok_or(short)?;
        // The kernel removes the outer tag.
        let (vlan, ether_type, start) = match (outer, u16_at(frame, 14), u16_at(frame, 16)) {
            (ether_type::VLAN, Some(tag), Some(inner)) => (Some(tag & 0x0fff), inner, 18),
            _ => (None, outer, 14),
        };
        let rest = frame.get(start..).unwrap_or(&[]);
        let (body, broken) = body(ether_type, rest);
        Ok(Self { src_mac, dst_mac, vlan, ether_type, body, broken })
    }
}

/// The contents of a frame, and why the kernel would drop it.
type Read = (Body, Option<&'static str>);

fn body(kind: u16, bytes: &[u8]) -> Read {
    let body = match kind {
        ether_type::ARP | ether_type::RARP => arp(bytes).map_or(Body::Other, Body::Arp),
        ether_type::IPV4 => return ipv4(bytes),
        ether_type::IPV6 => return ipv6(bytes),
        0..0x600 => stp(bytes).map_or(Body::Other, Body::Stp),
        _ => Body::Other,
    };
    (body, None)
}

fn arp(bytes: &[u8]) -> Option<Arp> {
    let (hardware_len, protocol_len) = (usize::from(*bytes.get(4)?), usize::from(*bytes.get(5)?));
    let v4 = |at: usize| bytes.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(Ipv4Addr::from);
    let sender_ip = 8 + hardware_len;
    let target = sender_ip + protocol_len;
    Some(Arp {
        hardware_type: u16_at(bytes, 0)?,
        protocol_type: u16_at(bytes, 2)?,
        opcode: u16_at(bytes, 6)?,
        macs: (hardware_len == 6).then(|| Some((mac(bytes, 8)?, mac(bytes, target)?))).flatten(),
        ips: (protocol_len == 4).then(|| Some((v4(sender_ip)?, v4(target + hardware_len)?))).flatten(),
    })
}

/// An LLC header for spanning tree, the protocol and the version, as `ebt_stp.c` wants them.
const STP_HEADER: [u8; 6] = [0x42, 0x42, 0x03, 0, 0, 0];

/// The kernel reads one byte for the protocol where the standard has two, so it reads every later field one byte too early:
/// the version as the type, the type as the flags, and so on.
fn stp(bytes: &[u8]) -> Option<Stp> {
    let kind = *bytes.get(5)?;
    let config = bytes.get(6..37).and_then(|config| config.try_into().ok());
    bytes.starts_with(&STP_HEADER).then_some(Stp { kind, config })
}

/// `br_validate_ipv4` of the kernel.
fn ipv4(bytes: &[u8]) -> Read {
    const CUT: Read = (Body::Other, Some("its IPv4 header is cut off"));
    let Some(header) = bytes.first_chunk::<20>() else { return CUT };
    let header_len = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_len < 20 {
        return (Body::Other, Some("its IPv4 header is wrong"));
    }
    let Some(whole_header) = bytes.get(..header_len) else { return CUT };
    let wrong_sum = (sum(whole_header, 0) != 0xffff).then_some("the checksum of its IPv4 header is wrong");
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let Some(payload) = bytes.get(header_len..total) else {
        return (Body::Other, Some("it is shorter than its IPv4 header says"));
    };
    let quad = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    let (src, dst) = (quad(12), quad(16));
    let parts = u16::from_be_bytes([header[6], header[7]]);
    let (more, offset) = (parts & 0x2000 != 0, (parts & 0x1fff) * 8);
    let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
    let fragment = (more || offset > 0).then_some(Fragment { id, offset });
    (Body::Ip(ip((src.into(), dst.into()), header[1], header[9], fragment, payload)), wrong_sum)
}

/// `br_validate_ipv6` of the kernel, and its way over extension headers.
fn ipv6(bytes: &[u8]) -> Read {
    let Some(header) = bytes.first_chunk::<40>() else {
        return (Body::Other, Some("its IPv6 header is cut off"));
    };
    if header[0] >> 4 != 6 {
        return (Body::Other, Some("its IPv6 header is wrong"));
    }
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let Some(mut rest) = bytes.get(40..40 + length) else {
        return (Body::Other, Some("it is shorter than its IPv6 header says"));
    };
    let addr = |at: usize| {
        let octets: [u8; 16] = std::array::from_fn(|i| header[at + i]);
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    let tos = header[0] << 4 | header[1] >> 4;
    let (mut next, mut fragment, mut is_authenticated) = (header[6], None, false);
    // Hop by hop, routing, part, authentication, destination.
    while let 0 | 43 | protocol::IPV6_FRAGMENT | protocol::AH | 60 = next {
        let Some(extension) = rest.first_chunk::<8>() else { break };
        let units = usize::from(extension[1]);
        let length = match next {
            protocol::IPV6_FRAGMENT => 8,
            protocol::AH => (units + 2) * 4,
            _ => (units + 1) * 8,
        };
        let is_part = next == protocol::IPV6_FRAGMENT;
        is_authenticated |= next == protocol::AH;
        next = extension[0];
        rest = rest.get(length..).unwrap_or(&[]);
        if is_part {
            let offset = u16::from_be_bytes([extension[2], extension[3]]) & !7;
            let id = u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
            fragment = Some(Fragment { id, offset });
            if offset > 0 {
                break;
            }
        }
    }
    let ip = Ip { is_authenticated, ..ip((addr(8), addr(24)), tos, next, fragment, rest) };
    (Body::Ip(ip), None)
}

fn ip((src, dst): (IpAddr, IpAddr), tos: u8, protocol: u8, fragment: Option<Fragment>, bytes: &[u8]) -> Ip {
    let later = fragment.is_some_and(|fragment| fragment.offset > 0);
    let transport = if later { Some(Transport::Other) } else { transport(protocol, bytes) };
    // The checksum of a fragmented packet can be checked only after reassembly.
    let is_sound = transport.is_some() && (fragment.is_some() || is_sound((src, dst), protocol, bytes));
    Ip {
        src,
        dst,
        tos,
        protocol,
        is_authenticated: false,
        fragment,
        transport: transport.unwrap_or(Transport::Other),
        is_sound,
    }
}

/// `None` if the header is cut off.
fn transport(number: u8, bytes: &[u8]) -> Option<Transport> {
    Some(match number {
        protocol::TCP => {
            let header_len = usize::from(*bytes.get(12)? >> 4) * 4;
            let options = bytes.get(20..header_len)?;
            Transport::Tcp(Tcp {
                src: u16_at(bytes, 0)?,
                dst: u16_at(bytes, 2)?,
                flags: *bytes.get(13)?,
                options: option_kinds(options),
                payload: bytes.get(header_len..)?.to_vec(),
            })
        }
        protocol::UDP | protocol::UDPLITE | protocol::SCTP => {
            let header_len = if number == protocol::SCTP { 12 } else { 8 };
            Transport::Ports {
                src: u16_at(bytes, 0)?,
                dst: u16_at(bytes, 2)?,
                payload: bytes.get(header_len..)?.to_vec(),
            }
        }
        protocol::ICMP | protocol::ICMPV6 => {
            let kind = *bytes.first()?;
            let about = bytes.get(8..).filter(|_| is_icmp_error(number, kind));
            Transport::Icmp(Icmp {
                kind,
                code: *bytes.get(1)?,
                id: u16_at(bytes, 4).unwrap_or(0),
                about: about.and_then(|inner| quoted(number, inner)).map(Box::new),
            })
        }
        _ => Transport::Other,
    })
}

pub(crate) fn is_icmp_error(number: u8, kind: u8) -> bool {
    match number {
        protocol::ICMP => matches!(kind, 3 | 4 | 5 | 11 | 12),
        _ => kind < 128,
    }
}

/// The beginning of a packet that an error is about: 8 bytes after its header are enough.
fn quoted(number: u8, bytes: &[u8]) -> Option<Ip> {
    let (ends, inner, payload) = if number == protocol::ICMP {
        let header = bytes.first_chunk::<20>()?;
        let quad = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
        ((quad(12).into(), quad(16).into()), header[9], bytes.get(usize::from(header[0] & 15) * 4..)?)
    } else {
        let header = bytes.first_chunk::<40>()?;
        let addr =
            |at: usize| IpAddr::V6(Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(|i| header[at + i])));
        ((addr(8), addr(24)), header[6], bytes.get(40..)?)
    };
    let transport = match inner {
        protocol::TCP => {
            Transport::Tcp(Tcp { src: u16_at(payload, 0)?, dst: u16_at(payload, 2)?, ..Tcp::default() })
        }
        protocol::UDP | protocol::UDPLITE | protocol::SCTP => {
            Transport::Ports { src: u16_at(payload, 0)?, dst: u16_at(payload, 2)?, payload: Vec::new() }
        }
        protocol::ICMP | protocol::ICMPV6 => Transport::Icmp(Icmp {
            kind: *payload.first()?,
            code: *payload.get(1)?,
            id: u16_at(payload, 4)?,
            about: None,
        }),
        _ => Transport::Other,
    };
    Some(Ip::new(ends.0, ends.1, inner, transport))
}

fn option_kinds(mut options: &[u8]) -> Vec<u8> {
    let mut kinds = Vec::new();
    while let Some(&kind) = options.first() {
        kinds.push(kind);
        // Kinds 0 and 1 are single bytes; a length of 0 would never end.
        let length = if kind < 2 { 1 } else { usize::from(*options.get(1).unwrap_or(&1)).max(1) };
        options = options.get(length..).unwrap_or(&[]);
    }
    kinds
}

/// Whether conntrack finds lengths and checksums right (`nf_conntrack_checksum` is on by default).
fn is_sound((src, dst): (IpAddr, IpAddr), number: u8, bytes: &[u8]) -> bool {
    let length = bytes.len() as u32;
    let pseudo = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
        (src, dst) => {
            let octets = |addr| match addr {
                IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
                IpAddr::V6(addr) => addr.octets(),
            };
            [octets(src), octets(dst)].concat()
        }
    };
    let with_pseudo = |covered: &[u8]| sum(covered, sum_of(&pseudo, u32::from(number) + length)) == 0xffff;
    match number {
        protocol::TCP => with_pseudo(bytes),
        protocol::UDP => match (u16_at(bytes, 4), u16_at(bytes, 6)) {
            (Some(claimed), _) if usize::from(claimed) > bytes.len() || claimed < 8 => false,
            (_, Some(0)) => true,
            _ => with_pseudo(bytes),
        },
        protocol::UDPLITE => match (u16_at(bytes, 4).map(usize::from), u16_at(bytes, 6)) {
            (_, Some(0)) => false,
            (Some(0), _) => with_pseudo(bytes),
            (Some(covered), _) if covered >= 8 => bytes.get(..covered).is_some_and(with_pseudo),
            _ => false,
        },
        protocol::ICMP => sum(bytes, 0) == 0xffff,
        protocol::ICMPV6 => with_pseudo(bytes),
        protocol::SCTP => bytes.get(8..12).is_some_and(|claimed| claimed == crc32c(bytes).to_le_bytes()),
        _ => true,
    }
}

/// The checksum of SCTP (RFC 9260, appendix A), its own field taken as zero.
fn crc32c(bytes: &[u8]) -> u32 {
    let bits = bytes.iter().enumerate().fold(u32::MAX, |mut crc, (at, byte)| {
        crc ^= u32::from(if (8..12).contains(&at) { 0 } else { *byte });
        (0..8).for_each(|_| crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()));
        crc
    });
    !bits
}

fn sum_of(bytes: &[u8], start: u32) -> u32 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    words.fold(start, |sum, word| {
        let sum = sum.wrapping_add(word);
        (sum & 0xffff) + (sum >> 16)
    })
}

/// The Internet checksum (RFC 1071) over bytes that hold their own: 0xffff if that is right.
fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut sum = sum_of(bytes, start);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn mac(bytes: &[u8], at: usize) -> Option<MacAddr> {
    bytes.get(at..at + 6).and_then(|octets| octets.try_into().ok()).map(MacAddr)
}
