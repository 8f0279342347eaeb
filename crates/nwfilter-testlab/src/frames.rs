//! Builders of raw Ethernet frames.
//!
//! Every builder returns the whole frame, with right lengths and checksums. What is to be unusual
//! is done to a frame afterwards: [`vlan`], [`fragments`], [`dscp`], [`bad_ip_checksum`],
//! [`bad_l4_checksum`].
//!
//! ```
//! use nwfilter_testlab::{Ends, frames};
//! # fn main() -> anyhow::Result<()> {
//! let ends = Ends::v4(
//!     "52:54:00:00:00:0a".parse()?, "10.0.0.1".parse()?,
//!     "52:54:00:00:00:0b".parse()?, "10.0.0.2".parse()?,
//! );
//! let query = frames::udp(&ends, 40000, 53, b"a query");
//! let answer = frames::udp(&ends.reverse(), 53, 40000, b"an answer");
//! let tagged = frames::vlan(42, &query);
//! let many = frames::fragments(&frames::icmp_echo(&ends, 1, 1), 8);
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context, ensure};

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// ff:ff:ff:ff:ff:ff
    pub const BROADCAST: Self = Self([0xff; 6]);
    /// 00:00:00:00:00:00
    pub const ZERO: Self = Self([0; 6]);

    /// The address with these octets.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The octets of the address.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().with_context(|| format!("short MAC address {text:?}"))?;
            *octet = u8::from_str_radix(part, 16).with_context(|| format!("MAC address {text:?}"))?;
        }
        ensure!(parts.next().is_none(), "long MAC address {text:?}");
        Ok(Self(octets))
    }
}

/// The MAC and IP addresses that a packet goes from and to; both of IPv4 or both of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    src_mac: Mac,
    dst_mac: Mac,
    addrs: Addrs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Addrs {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

impl Ends {
    /// Two ends of IPv4.
    pub const fn v4(src_mac: Mac, src: Ipv4Addr, dst_mac: Mac, dst: Ipv4Addr) -> Self {
        Self { src_mac, dst_mac, addrs: Addrs::V4(src, dst) }
    }

    /// Two ends of IPv6.
    pub const fn v6(src_mac: Mac, src: Ipv6Addr, dst_mac: Mac, dst: Ipv6Addr) -> Self {
        Self { src_mac, dst_mac, addrs: Addrs::V6(src, dst) }
    }

    /// The way back.
    pub const fn reverse(&self) -> Self {
        let addrs = match self.addrs {
            Addrs::V4(src, dst) => Addrs::V4(dst, src),
            Addrs::V6(src, dst) => Addrs::V6(dst, src),
        };
        Self { src_mac: self.dst_mac, dst_mac: self.src_mac, addrs }
    }

    /// The same but for the source MAC address.
    pub const fn with_src_mac(self, src_mac: Mac) -> Self {
        Self { src_mac, ..self }
    }

    /// The same but for the destination MAC address.
    pub const fn with_dst_mac(self, dst_mac: Mac) -> Self {
        Self { dst_mac, ..self }
    }
}

/// The ethertypes of the frames built here.
pub mod ethertype {
    /// IPv4
    pub const IPV4: u16 = 0x0800;
    /// ARP
    pub const ARP: u16 = 0x0806;
    /// RARP
    pub const RARP: u16 = 0x8035;
    /// An 802.1Q VLAN tag
    pub const VLAN: u16 = 0x8100;
    /// IPv6
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocol numbers.
pub mod protocol {
    /// ICMP of IPv4
    pub const ICMP: u8 = 1;
    /// IGMP
    pub const IGMP: u8 = 2;
    /// The hop-by-hop options of IPv6
    pub const IPV6_HOP_BY_HOP: u8 = 0;
    /// The routing header of IPv6
    pub const IPV6_ROUTING: u8 = 43;
    /// The destination options of IPv6
    pub const IPV6_DESTINATION: u8 = 60;
    /// TCP
    pub const TCP: u8 = 6;
    /// UDP
    pub const UDP: u8 = 17;
    /// The fragment header of IPv6
    pub const IPV6_FRAGMENT: u8 = 44;
    /// ESP
    pub const ESP: u8 = 50;
    /// AH
    pub const AH: u8 = 51;
    /// ICMP of IPv6
    pub const ICMPV6: u8 = 58;
    /// SCTP
    pub const SCTP: u8 = 132;
    /// UDP-Lite
    pub const UDPLITE: u8 = 136;
}

/// TCP flags, to be combined with `|`.
pub mod tcp_flags {
    /// FIN
    pub const FIN: u8 = 0x01;
    /// SYN
    pub const SYN: u8 = 0x02;
    /// RST
    pub const RST: u8 = 0x04;
    /// PSH
    pub const PSH: u8 = 0x08;
    /// ACK
    pub const ACK: u8 = 0x10;
    /// URG
    pub const URG: u8 = 0x20;
}

const ETHERNET_HEADER: usize = 14;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// A frame of any ethertype. It is not padded to the 60 bytes of a wire: bridge-nf would cut the
/// padding off again, and a frame shall arrive as it was sent.
pub fn ethernet(src: Mac, dst: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&dst.0[..], &src.0, &ethertype.to_be_bytes(), payload].concat()
}

/// Puts an 802.1Q tag into a frame.
pub fn vlan(id: u16, frame: &[u8]) -> Vec<u8> {
    let (macs, rest) = frame.split_at(12);
    [macs, &ethertype::VLAN.to_be_bytes(), &(id & 0x0fff).to_be_bytes(), rest].concat()
}

/// A configuration BPDU of the spanning tree protocol, from a root bridge.
pub fn stp(src: Mac) -> Vec<u8> {
    let dst = Mac([0x01, 0x80, 0xc2, 0x00, 0x00, 0x00]);
    let bridge_id = [&[0x80, 0x00], &src.0[..]].concat();
    let llc = [0x42, 0x42, 0x03];
    // Protocol, version, type and flags; then the root, no path cost, the bridge and a port.
    let ids = [&[0; 5], &bridge_id[..], &[0; 4], &bridge_id, &[0x80, 0x01]].concat();
    // Message age, maximal age, hello time and forward delay, in 1/256 s.
    let times = [0, 0, 20, 0, 2, 0, 15, 0];
    let length = (llc.len() + ids.len() + times.len()) as u16;
    ethernet(src, dst, length, &[&llc[..], &ids, &times].concat())
}

/// What an ARP or RARP packet for IPv4 over Ethernet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 is a request, 2 a reply; 3 and 4 are those of RARP.
    pub op: u16,
    /// The MAC address the sender says it has.
    pub sender_mac: Mac,
    /// The IP address the sender says it has.
    pub sender_ip: Ipv4Addr,
    /// The MAC address of the target.
    pub target_mac: Mac,
    /// The IP address of the target.
    pub target_ip: Ipv4Addr,
}

impl Arp {
    /// Asks who has an address.
    pub const fn request(sender_mac: Mac, sender_ip: Ipv4Addr, target_ip: Ipv4Addr) -> Self {
        Self { op: 1, sender_mac, sender_ip, target_mac: Mac::ZERO, target_ip }
    }

    /// Tells who has an address.
    pub const fn reply(sender_mac: Mac, sender_ip: Ipv4Addr, target_mac: Mac, target_ip: Ipv4Addr) -> Self {
        Self { op: 2, sender_mac, sender_ip, target_mac, target_ip }
    }

    /// Announces the sender's own address.
    pub const fn gratuitous(sender_mac: Mac, sender_ip: Ipv4Addr) -> Self {
        Self::request(sender_mac, sender_ip, sender_ip)
    }

    /// Asks by RARP for the IP address of a MAC address, as QEMU announces a guest.
    pub const fn rarp_request(mac: Mac) -> Self {
        let nowhere = Ipv4Addr::UNSPECIFIED;
        Self { op: 3, sender_mac: mac, sender_ip: nowhere, target_mac: mac, target_ip: nowhere }
    }

    fn packet(&self) -> Vec<u8> {
        [
            // Ethernet and IPv4, with addresses of 6 and 4 bytes.
            &[0x00, 0x01, 0x08, 0x00, 6, 4][..],
            &self.op.to_be_bytes(),
            &self.sender_mac.0,
            &self.sender_ip.octets(),
            &self.target_mac.0,
            &self.target_ip.octets(),
        ]
        .concat()
    }
}

/// An ARP packet; `src` and `dst` are the MAC addresses of the frame itself.
pub fn arp(src: Mac, dst: Mac, arp: Arp) -> Vec<u8> {
    ethernet(src, dst, ethertype::ARP, &arp.packet())
}

/// A RARP packet.
pub fn rarp(src: Mac, dst: Mac, arp: Arp) -> Vec<u8> {
    ethernet(src, dst, ethertype::RARP, &arp.packet())
}

/// An IP packet of any protocol.
pub fn ip(ends: &Ends, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (ethertype, header) = match ends.addrs {
        Addrs::V4(src, dst) => (ethertype::IPV4, ipv4_header(src, dst, protocol, payload.len())),
        Addrs::V6(src, dst) => (ethertype::IPV6, ipv6_header(src, dst, protocol, payload.len())),
    };
    ethernet(ends.src_mac, ends.dst_mac, ethertype, &[&header, payload].concat())
}

fn ipv4_header(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: usize) -> Vec<u8> {
    let length = (IPV4_HEADER + payload) as u16;
    let mut header = [
        &[0x45, 0][..],
        &length.to_be_bytes(),
        // An identification, may be fragmented, a time to live of 64, no checksum yet.
        &[0x12, 0x34, 0, 0, 64, protocol, 0, 0],
        &src.octets(),
        &dst.octets(),
    ]
    .concat();
    put_checksum(&mut header, 10, &[]);
    header
}

fn ipv6_header(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, payload: usize) -> Vec<u8> {
    let length = (payload as u16).to_be_bytes();
    [&[0x60, 0, 0, 0][..], &length, &[protocol, 64], &src.octets(), &dst.octets()].concat()
}

/// A UDP datagram.
pub fn udp(ends: &Ends, src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let mut datagram =
        [&src_port.to_be_bytes()[..], &dst_port.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload]
            .concat();
    put_checksum(&mut datagram, 6, &pseudo_header(ends, protocol::UDP, usize::from(length)));
    ip(ends, protocol::UDP, &datagram)
}

/// A TCP segment without data, with [`tcp_flags`].
pub fn tcp(ends: &Ends, src_port: u16, dst_port: u16, flags: u8) -> Vec<u8> {
    let acknowledged = u32::from(flags & tcp_flags::ACK != 0);
    tcp_segment(ends, (src_port, dst_port), (1, acknowledged), flags, &[])
}

/// A TCP segment with its ports, its sequence and acknowledgement numbers, and data.
pub fn tcp_segment(
    ends: &Ends,
    ports: (u16, u16),
    numbers: (u32, u32),
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    ip(ends, protocol::TCP, &tcp_bytes(ends, ports, numbers, flags, &[], payload))
}

/// A TCP segment with options, whose length is a multiple of 4.
pub fn tcp_with_options(ends: &Ends, src_port: u16, dst_port: u16, flags: u8, options: &[u8]) -> Vec<u8> {
    ip(ends, protocol::TCP, &tcp_bytes(ends, (src_port, dst_port), (1, 0), flags, options, &[]))
}

fn tcp_bytes(
    ends: &Ends,
    ports: (u16, u16),
    numbers: (u32, u32),
    flags: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let words = 5 + (options.len() / 4) as u8;
    let mut segment = [
        &ports.0.to_be_bytes()[..],
        &ports.1.to_be_bytes(),
        &numbers.0.to_be_bytes(),
        &numbers.1.to_be_bytes(),
        // The length of the header, a window of 64240, no checksum yet, nothing urgent.
        &[words << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0],
        options,
        payload,
    ]
    .concat();
    let pseudo = pseudo_header(ends, protocol::TCP, segment.len());
    put_checksum(&mut segment, 16, &pseudo);
    segment
}

/// A UDP-Lite datagram whose checksum covers all of it.
pub fn udplite(ends: &Ends, src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram =
        [&src_port.to_be_bytes()[..], &dst_port.to_be_bytes(), &[0, 0, 0, 0], payload].concat();
    let pseudo = pseudo_header(ends, protocol::UDPLITE, datagram.len());
    put_checksum(&mut datagram, 6, &pseudo);
    ip(ends, protocol::UDPLITE, &datagram)
}

/// Puts an extension header of 8 bytes before what an untagged IPv6 frame carries: `kind` is its protocol number, `body` what
/// follows its two first bytes.
pub fn extension(mut frame: Vec<u8>, kind: u8, body: [u8; 6]) -> Vec<u8> {
    let header = ip_header(&frame);
    let next = std::mem::replace(&mut frame[header.start + 6], kind);
    let length = (frame.len() - header.end + 8) as u16;
    frame[header.start + 4..header.start + 6].copy_from_slice(&length.to_be_bytes());
    frame.splice(header.end..header.end, [&[next, 0][..], &body].concat());
    frame
}

/// Gives an untagged IPv4 frame, or a fragment of an IPv6 frame, another identification, which is what tells the fragments of
/// one packet from those of another.
pub fn identification(mut frame: Vec<u8>, id: u16) -> Vec<u8> {
    let header = ip_header(&frame);
    if is_v6(&frame) {
        frame[header.end + 6..header.end + 8].copy_from_slice(&id.to_be_bytes());
    } else {
        frame[header.start + 4..header.start + 6].copy_from_slice(&id.to_be_bytes());
        put_checksum(&mut frame[header], 10, &[]);
    }
    frame
}

/// An ICMP or ICMPv6 message; `body` is what follows the checksum.
pub fn icmp(ends: &Ends, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0], body].concat();
    let (protocol, pseudo) = match ends.addrs {
        Addrs::V4(..) => (protocol::ICMP, Vec::new()),
        Addrs::V6(..) => (protocol::ICMPV6, pseudo_header(ends, protocol::ICMPV6, message.len())),
    };
    put_checksum(&mut message, 2, &pseudo);
    ip(ends, protocol, &message)
}

/// A ping of ICMP or ICMPv6.
pub fn icmp_echo(ends: &Ends, id: u16, sequence: u16) -> Vec<u8> {
    icmp(ends, echo_kind(ends, 8, 128), 0, &echo_body(id, sequence))
}

/// The answer to a ping.
pub fn icmp_echo_reply(ends: &Ends, id: u16, sequence: u16) -> Vec<u8> {
    icmp(ends, echo_kind(ends, 0, 129), 0, &echo_body(id, sequence))
}

fn echo_kind(ends: &Ends, v4: u8, v6: u8) -> u8 {
    match ends.addrs {
        Addrs::V4(..) => v4,
        Addrs::V6(..) => v6,
    }
}

fn echo_body(id: u16, sequence: u16) -> Vec<u8> {
    [&id.to_be_bytes()[..], &sequence.to_be_bytes(), b"thirty-two bytes of a ping's data"].concat()
}

/// An SCTP packet with an INIT chunk.
pub fn sctp(ends: &Ends, src_port: u16, dst_port: u16) -> Vec<u8> {
    let mut packet = [
        &src_port.to_be_bytes()[..],
        &dst_port.to_be_bytes(),
        // No verification tag, no checksum yet; INIT of 20 bytes, a tag, a window, 1 stream each
        // way, a sequence number.
        &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1],
    ]
    .concat();
    let checksum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&checksum);
    ip(ends, protocol::SCTP, &packet)
}

/// An IGMPv2 report of being a member of a group.
pub fn igmp(ends: &Ends, group: Ipv4Addr) -> Vec<u8> {
    let mut message = [&[0x16, 0, 0, 0][..], &group.octets()].concat();
    put_checksum(&mut message, 2, &[]);
    ip(ends, protocol::IGMP, &message)
}

/// Cuts an untagged IPv4 or IPv6 frame into fragments of at most `size` bytes of payload, where
/// `size` is rounded down to a multiple of 8.
pub fn fragments(frame: &[u8], size: usize) -> Vec<Vec<u8>> {
    let size = (size / 8).max(1) * 8;
    let is_v6 = is_v6(frame);
    let header = ip_header(frame);
    let payload = &frame[header.end..];
    let mut offset = 0;
    payload
        .chunks(size)
        .map(|chunk| {
            let more = u16::from(offset + chunk.len() < payload.len());
            let mut ip = frame[header.clone()].to_vec();
            if is_v6 {
                let length = ((8 + chunk.len()) as u16).to_be_bytes();
                let next = std::mem::replace(&mut ip[6], protocol::IPV6_FRAGMENT);
                ip[4..6].copy_from_slice(&length);
                ip.extend([next, 0]);
                // The offset is in units of 8 bytes and stands above 3 bits.
                ip.extend((offset as u16 | more).to_be_bytes());
                ip.extend([0, 0, 0x12, 0x34]);
            } else {
                let length = ((ip.len() + chunk.len()) as u16).to_be_bytes();
                ip[2..4].copy_from_slice(&length);
                ip[6..8].copy_from_slice(&((offset / 8) as u16 | more << 13).to_be_bytes());
                put_checksum(&mut ip, 10, &[]);
            }
            offset += chunk.len();
            [&frame[..ETHERNET_HEADER], &ip, chunk].concat()
        })
        .collect()
}

/// Sets the differentiated services code point (0 to 63) of an untagged IPv4 or IPv6 frame.
pub fn dscp(mut frame: Vec<u8>, dscp: u8) -> Vec<u8> {
    let header = ip_header(&frame);
    if is_v6(&frame) {
        let ip = &mut frame[header];
        ip[0] = 0x60 | dscp >> 2;
        ip[1] = dscp << 6 | ip[1] & 0x3f;
    } else {
        let ip = &mut frame[header];
        ip[1] = dscp << 2 | ip[1] & 0x03;
        put_checksum(ip, 10, &[]);
    }
    frame
}

/// Makes the header checksum of an untagged IPv4 frame wrong.
pub fn bad_ip_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    frame[ETHERNET_HEADER + 10] ^= 0x55;
    frame
}

/// Makes the checksum of an untagged TCP, UDP, ICMP, ICMPv6, IGMP or SCTP frame wrong.
pub fn bad_l4_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    let header = ip_header(&frame);
    let protocol = frame[header.start + if is_v6(&frame) { 6 } else { 9 }];
    let offset = match protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        protocol::SCTP => 8,
        _ => 2,
    };
    frame[header.end + offset] ^= 0x55;
    frame
}

fn is_v6(frame: &[u8]) -> bool {
    frame[12..14] == ethertype::IPV6.to_be_bytes()
}

fn ip_header(frame: &[u8]) -> std::ops::Range<usize> {
    let length = if is_v6(frame) { IPV6_HEADER } else { usize::from(frame[ETHERNET_HEADER] & 0x0f) * 4 };
    ETHERNET_HEADER..ETHERNET_HEADER + length
}

fn pseudo_header(ends: &Ends, protocol: u8, length: usize) -> Vec<u8> {
    let length = (length as u32).to_be_bytes();
    let zero_and_protocol = [0, 0, 0, protocol];
    match ends.addrs {
        Addrs::V4(src, dst) => [&src.octets()[..], &dst.octets(), &zero_and_protocol, &length].concat(),
        Addrs::V6(src, dst) => [&src.octets()[..], &dst.octets(), &zero_and_protocol, &length].concat(),
    }
}

/// Computes the Internet checksum of the pseudo header and the data, and puts it into the data.
fn put_checksum(data: &mut [u8], at: usize, pseudo_header: &[u8]) {
    data[at..at + 2].fill(0);
    let words = |bytes: &[u8]| -> u32 {
        let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into());
        bytes.chunks(2).map(word).sum()
    };
    let mut sum = words(pseudo_header) + words(data);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    data[at..at + 2].copy_from_slice(&(!sum as u16).to_be_bytes());
}

fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !data.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}
