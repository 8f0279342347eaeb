//! One condition and one packet: does it hold, and in which words is that said.

use std::fmt::Display;
use std::net::IpAddr;

use nwfilter_rules::{CtDirection, EthernetTest, Family, IpTest, MaskedMac, Network, PortRange, StpRange};
use nwfilter_xml::value::SetDirection;
use nwfilter_xml::{MacAddr, SetFamily};

use crate::connection::Connection;
use crate::packet::{Arp, Body, Ip, Packet, Stp, Transport, ether_type};
use crate::sets::{IpSets, set_value};
use crate::words;

/// What a test sees of a packet.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) packet: &'a Packet,
    /// The IP packet, whole where the frame holds a part of it.
    pub(crate) ip: Option<&'a Ip>,
    pub(crate) connection: Connection,
    /// How many connections the packet's source has.
    pub(crate) connections: usize,
    pub(crate) sets: &'a IpSets,
}

/// A test of either layer.
pub(crate) trait Test {
    /// Whether it holds. A packet without the field fails a test also where that is negated.
    fn holds(&self, subject: &Subject<'_>, negated: bool) -> Holds;
    /// What is compared: `destination port`.
    fn field(&self) -> &'static str;
    /// With what: `80`.
    fn wanted(&self) -> String;
    /// What the packet has there: `443`; `None` if it has no such field.
    fn found(&self, subject: &Subject<'_>) -> Option<String>;
}

/// Whether a test holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    Yes,
    No,
    /// The contents of an ipset decide, and nobody said what they are.
    Unknown,
}

impl From<bool> for Holds {
    fn from(holds: bool) -> Self {
        if holds { Holds::Yes } else { Holds::No }
    }
}

fn mac_matches(found: MacAddr, MaskedMac { addr, mask }: &MaskedMac) -> bool {
    let mask = mask.unwrap_or(MacAddr([0xff; 6]));
    (0..6).all(|i| (found.0[i] ^ addr.0[i]) & mask.0[i] == 0)
}

pub(crate) fn is_in_network(found: IpAddr, Network { addr, prefix }: &Network) -> bool {
    let (found, addr, width) = match (found, addr) {
        (IpAddr::V4(found), IpAddr::V4(addr)) => {
            (u128::from(found.to_bits()), u128::from(addr.to_bits()), 32)
        }
        (IpAddr::V6(found), IpAddr::V6(addr)) => (found.to_bits(), addr.to_bits(), 128),
        _ => return false,
    };
    let free = width - u32::from(prefix.unwrap_or(width as u8)).min(width);
    (found ^ addr).checked_shr(free).unwrap_or(0) == 0
}

fn is_in_ports(found: u16, PortRange { from, to }: &PortRange) -> bool {
    (*from..=to.unwrap_or(*from)).contains(&found)
}

fn masked(MaskedMac { addr, mask }: &MaskedMac) -> String {
    mask.map_or_else(|| addr.to_string(), |mask| format!("{addr}/{mask}"))
}

fn network(Network { addr, prefix }: &Network) -> String {
    prefix.map_or_else(|| addr.to_string(), |prefix| format!("{addr}/{prefix}"))
}

fn range<T: Display + PartialEq>(from: T, to: Option<T>) -> String {
    match to {
        Some(to) if to != from => format!("{from} to {to}"),
        _ => from.to_string(),
    }
}

impl Test for EthernetTest {
    fn holds(&self, subject: &Subject<'_>, negated: bool) -> Holds {
        use EthernetTest as T;
        let packet = subject.packet;
        // ebt_stp compares these fields of configuration messages only, and lets all others pass.
        let is_of_config = matches!(
            self,
            T::StpFlags(_) | T::StpRange { .. } | T::StpRootAddress(_) | T::StpSenderAddress(_)
        );
        if let (true, Body::Stp(Stp { kind: 1.., .. })) = (is_of_config, &packet.body) {
            return Holds::Yes;
        }
        let holds = match self {
            T::SrcMac(mac) => Some(mac_matches(packet.src_mac, mac)),
            T::DstMac(mac) => Some(mac_matches(packet.dst_mac, mac)),
            T::EtherType(number) => Some(outer_type(packet) == *number),
            T::VlanId(id) => packet.vlan.map(|found| found == *id),
            T::VlanEncap(number) => packet.vlan.map(|_| packet.ether_type == *number),
            T::StpType(number) => stp(packet).map(|stp| stp.kind == *number),
            T::StpFlags(number) => config(packet).map(|config| config[0] == *number),
            T::StpRange { field, from, to } => config(packet)
                .map(|config| (*from..=to.unwrap_or(*from)).contains(&stp_field(config, *field))),
            T::StpRootAddress(mac) => config(packet).map(|config| mac_matches(mac_at(config, 3), mac)),
            T::StpSenderAddress(mac) => config(packet).map(|config| mac_matches(mac_at(config, 15), mac)),
            T::ArpHardwareType(number) => arp(packet).map(|arp| arp.hardware_type == *number),
            T::ArpProtocolType(number) => arp(packet).map(|arp| arp.protocol_type == *number),
            T::ArpOpcode(number) => arp(packet).map(|arp| arp.opcode == *number),
            T::ArpSrcMac(addr) => arp_macs(packet).map(|(sender, _)| sender == *addr),
            T::ArpDstMac(addr) => arp_macs(packet).map(|(_, target)| target == *addr),
            T::ArpSrcIp(net) => arp_ips(packet).map(|(sender, _)| is_in_network(sender, net)),
            T::ArpDstIp(net) => arp_ips(packet).map(|(_, target)| is_in_network(target, net)),
            T::ArpGratuitous => arp_ips(packet).map(|(sender, target)| sender == target),
            T::SrcIp(net) => packet.as_ip().map(|ip| is_in_network(ip.src, net)),
            T::DstIp(net) => packet.as_ip().map(|ip| is_in_network(ip.dst, net)),
            T::IpProtocol(number) => {
                packet.as_ip().and_then(Ip::bridge_protocol).map(|found| found == *number)
            }
            T::SrcPort(ports) => frame_ports(packet).map(|(src, _)| is_in_ports(src, ports)),
            T::DstPort(ports) => frame_ports(packet).map(|(_, dst)| is_in_ports(dst, ports)),
            // ebtables compares all 8 bits, and is given the 6 of the DSCP as they are; libvirt does the same.
            T::Dscp(number) => packet.as_ip().map(|ip| ip.tos == *number),
            T::IcmpRange { kinds, codes } => {
                packet.as_ip().filter(|ip| !ip.is_later_fragment()).and_then(icmp).map(|(kind, code)| {
                    (kinds.0..=kinds.1).contains(&kind) && (codes.0..=codes.1).contains(&code)
                })
            }
        };
        holds.is_some_and(|holds| holds != negated).into()
    }

    fn field(&self) -> &'static str {
        use EthernetTest as T;
        match self {
            T::SrcMac(_) => "source MAC",
            T::DstMac(_) => "destination MAC",
            T::EtherType(_) => "frame type",
            T::VlanId(_) => "VLAN",
            T::VlanEncap(_) => "type inside the VLAN tag",
            T::StpType(_) => "STP type",
            T::StpFlags(_) => "STP flags",
            T::StpRange { field, .. } => match field {
                StpRange::RootPriority => "STP root priority",
                StpRange::RootCost => "STP root cost",
                StpRange::SenderPriority => "STP sender priority",
                StpRange::Port => "STP port",
                StpRange::MessageAge => "STP message age",
                StpRange::MaxAge => "STP maximum age",
                StpRange::HelloTime => "STP hello time",
                StpRange::ForwardDelay => "STP forward delay",
            },
            T::StpRootAddress(_) => "STP root address",
            T::StpSenderAddress(_) => "STP sender address",
            T::ArpHardwareType(_) => "ARP hardware type",
            T::ArpProtocolType(_) => "ARP protocol type",
            T::ArpOpcode(_) => "ARP opcode",
            T::ArpSrcMac(_) => "ARP sender MAC",
            T::ArpDstMac(_) => "ARP target MAC",
            T::ArpSrcIp(_) => "ARP sender address",
            T::ArpDstIp(_) => "ARP target address",
            T::ArpGratuitous => "ARP packet",
            T::SrcIp(_) => "source address",
            T::DstIp(_) => "destination address",
            T::IpProtocol(_) => "protocol",
            T::SrcPort(_) => "source port",
            T::DstPort(_) => "destination port",
            T::Dscp(_) => "type of service",
            T::IcmpRange { .. } => "ICMPv6 type and code",
        }
    }

    fn wanted(&self) -> String {
        use EthernetTest as T;
        match self {
            T::SrcMac(mac) | T::DstMac(mac) | T::StpRootAddress(mac) | T::StpSenderAddress(mac) => {
                masked(mac)
            }
            T::EtherType(number) | T::VlanEncap(number) | T::ArpProtocolType(number) => {
                words::ether_type(*number)
            }
            T::VlanId(number) | T::ArpHardwareType(number) | T::ArpOpcode(number) => number.to_string(),
            T::StpType(number) | T::StpFlags(number) | T::Dscp(number) => number.to_string(),
            T::StpRange { from, to, .. } => range(*from, *to),
            T::ArpSrcMac(addr) | T::ArpDstMac(addr) => addr.to_string(),
            T::ArpSrcIp(net) | T::ArpDstIp(net) | T::SrcIp(net) | T::DstIp(net) => network(net),
            T::ArpGratuitous => "gratuitous".to_owned(),
            T::IpProtocol(number) => words::protocol(*number),
            T::SrcPort(ports) | T::DstPort(ports) => range(ports.from, ports.to),
            T::IcmpRange { kinds, codes } => {
                format!("{} / {}", range(kinds.0, Some(kinds.1)), range(codes.0, Some(codes.1)))
            }
        }
    }

    fn found(&self, subject: &Subject<'_>) -> Option<String> {
        use EthernetTest as T;
        let packet = subject.packet;
        Some(match self {
            T::SrcMac(_) => packet.src_mac.to_string(),
            T::DstMac(_) => packet.dst_mac.to_string(),
            T::EtherType(_) => words::ether_type(outer_type(packet)),
            T::VlanId(_) => packet.vlan?.to_string(),
            T::VlanEncap(_) => packet.vlan.map(|_| words::ether_type(packet.ether_type))?,
            T::StpType(_) => stp(packet)?.kind.to_string(),
            T::StpFlags(_) => config(packet)?[0].to_string(),
            T::StpRange { field, .. } => stp_field(config(packet)?, *field).to_string(),
            T::StpRootAddress(_) => mac_at(config(packet)?, 3).to_string(),
            T::StpSenderAddress(_) => mac_at(config(packet)?, 15).to_string(),
            T::ArpHardwareType(_) => arp(packet)?.hardware_type.to_string(),
            T::ArpProtocolType(_) => words::ether_type(arp(packet)?.protocol_type),
            T::ArpOpcode(_) => arp(packet)?.opcode.to_string(),
            T::ArpSrcMac(_) => arp_macs(packet)?.0.to_string(),
            T::ArpDstMac(_) => arp_macs(packet)?.1.to_string(),
            T::ArpSrcIp(_) => arp_ips(packet)?.0.to_string(),
            T::ArpDstIp(_) => arp_ips(packet)?.1.to_string(),
            T::ArpGratuitous => {
                let (sender, target) = arp_ips(packet)?;
                if sender == target { "gratuitous" } else { "about another address" }.to_owned()
            }
            T::SrcIp(_) => packet.as_ip()?.src.to_string(),
            T::DstIp(_) => packet.as_ip()?.dst.to_string(),
            T::IpProtocol(_) => words::protocol(packet.as_ip()?.bridge_protocol()?),
            T::SrcPort(_) => frame_ports(packet)?.0.to_string(),
            T::DstPort(_) => frame_ports(packet)?.1.to_string(),
            T::Dscp(_) => packet.as_ip()?.tos.to_string(),
            T::IcmpRange { .. } => {
                let (kind, code) = packet.as_ip().and_then(icmp)?;
                format!("{kind} / {code}")
            }
        })
    }
}

/// The type of a frame from outside: a tag hides what is in it.
fn outer_type(packet: &Packet) -> u16 {
    packet.vlan.map_or(packet.ether_type, |_| ether_type::VLAN)
}

fn stp(packet: &Packet) -> Option<&Stp> {
    match &packet.body {
        Body::Stp(stp) => Some(stp),
        _ => None,
    }
}

fn config(packet: &Packet) -> Option<&[u8; 31]> {
    stp(packet)?.config.as_ref()
}

/// A field of a configuration message, whose bytes begin with the flags (`ebt_stp.c`).
fn stp_field(config: &[u8; 31], field: StpRange) -> u32 {
    let two = |at: usize| u32::from(config[at]) << 8 | u32::from(config[at + 1]);
    match field {
        StpRange::RootPriority => two(1),
        StpRange::RootCost => two(9) << 16 | two(11),
        StpRange::SenderPriority => two(13),
        StpRange::Port => two(21),
        StpRange::MessageAge => two(23),
        StpRange::MaxAge => two(25),
        StpRange::HelloTime => two(27),
        StpRange::ForwardDelay => two(29),
    }
}

fn mac_at(config: &[u8; 31], at: usize) -> MacAddr {
    MacAddr(std::array::from_fn(|i| config[at + i]))
}

fn arp(packet: &Packet) -> Option<&Arp> {
    match &packet.body {
        Body::Arp(arp) => Some(arp),
        _ => None,
    }
}

/// Only of hardware that is Ethernet.
fn arp_macs(packet: &Packet) -> Option<(MacAddr, MacAddr)> {
    arp(packet).filter(|arp| arp.hardware_type == 1)?.macs
}

/// Only of a protocol that is IPv4.
fn arp_ips(packet: &Packet) -> Option<(IpAddr, IpAddr)> {
    let (sender, target) = arp(packet).filter(|arp| arp.protocol_type == ether_type::IPV4)?.ips?;
    Some((sender.into(), target.into()))
}

fn frame_ports(packet: &Packet) -> Option<(u16, u16)> {
    packet.as_ip().filter(|ip| !ip.is_later_fragment())?.ports()
}

fn icmp(ip: &Ip) -> Option<(u8, u8)> {
    match &ip.transport {
        Transport::Icmp(icmp) => Some((icmp.kind, icmp.code)),
        _ => None,
    }
}

impl Test for IpTest {
    fn holds(&self, subject: &Subject<'_>, negated: bool) -> Holds {
        use IpTest as T;
        let Some(ip) = subject.ip else { return Holds::No };
        let tcp = match &ip.transport {
            Transport::Tcp(tcp) => Some(tcp),
            _ => None,
        };
        let holds = match self {
            T::SrcMac(addr) => Some(subject.packet.src_mac == *addr),
            T::SrcIp(net) => Some(is_in_network(ip.src, net)),
            T::DstIp(net) => Some(is_in_network(ip.dst, net)),
            T::SrcIpRange { from, to } => Some((*from..=*to).contains(&ip.src)),
            T::DstIpRange { from, to } => Some((*from..=*to).contains(&ip.dst)),
            T::IpProtocol(number) => Some(ip.rule_protocol() == *number),
            T::SrcPort(ports) => ip.ports().map(|(src, _)| is_in_ports(src, ports)),
            T::DstPort(ports) => ip.ports().map(|(_, dst)| is_in_ports(dst, ports)),
            T::Dscp(number) => Some(ip.tos >> 2 == *number),
            T::Icmp { kind, code } => icmp(ip).map(|(found, found_code)| {
                // xt_icmp takes the type 255 for any.
                let any = *kind == 255 && ip.src.is_ipv4();
                any || (found == *kind && code.is_none_or(|code| found_code == code))
            }),
            T::ConnlimitAbove(limit) => Some(subject.connections > usize::from(*limit)),
            T::States(states) => Some(subject.connection.is_in(*states)),
            T::CtDirection(direction) => subject.connection.direction.map(|found| found == *direction),
            T::IpSet { name, directions } => {
                match subject.sets.contains(name, directions, subject.packet, ip) {
                    None => return Holds::Unknown,
                    known => known,
                }
            }
            T::Set { name, family, direction } => {
                match subject.sets.holds(name, *family, *direction, subject.packet, ip) {
                    None => return Holds::Unknown,
                    known => known,
                }
            }
            T::TcpFlags { mask, set } => tcp.map(|tcp| tcp.flags & mask.bits() == set.bits()),
            T::TcpOption(number) => tcp.map(|tcp| tcp.options.contains(number)),
            T::Comment(_) => return Holds::Yes,
        };
        holds.is_some_and(|holds| holds != negated).into()
    }

    fn field(&self) -> &'static str {
        use IpTest as T;
        match self {
            T::SrcMac(_) => "source MAC",
            T::SrcIp(_) | T::SrcIpRange { .. } => "source address",
            T::DstIp(_) | T::DstIpRange { .. } => "destination address",
            T::IpProtocol(_) => "protocol",
            T::SrcPort(_) => "source port",
            T::DstPort(_) => "destination port",
            T::Dscp(_) => "DSCP",
            T::Icmp { .. } => "ICMP type",
            T::ConnlimitAbove(_) => "number of connections",
            T::States(_) => "connection state",
            T::CtDirection(_) => "direction in the connection",
            T::IpSet { .. } => "packet",
            T::Set { family, direction, .. } => set_field(*family, *direction),
            T::TcpFlags { .. } => "TCP flags",
            T::TcpOption(_) => "TCP options",
            T::Comment(_) => "comment",
        }
    }

    fn wanted(&self) -> String {
        use IpTest as T;
        match self {
            T::SrcMac(addr) => addr.to_string(),
            T::SrcIp(net) | T::DstIp(net) => network(net),
            T::SrcIpRange { from, to } | T::DstIpRange { from, to } => range(*from, Some(*to)),
            T::IpProtocol(number) => words::protocol(*number),
            T::SrcPort(ports) | T::DstPort(ports) => range(ports.from, ports.to),
            T::Dscp(number) => number.to_string(),
            T::Icmp { kind, code } => match code {
                Some(code) => format!("{kind}, code {code}"),
                None => kind.to_string(),
            },
            T::ConnlimitAbove(limit) => format!("above {limit}"),
            T::States(states) => states.to_string(),
            T::CtDirection(direction) => ct_direction(*direction).to_owned(),
            T::IpSet { name, directions } => {
                let directions: Vec<_> = directions.iter().map(ToString::to_string).collect();
                format!("in ipset {name} ({})", directions.join(","))
            }
            T::Set { name, .. } => format!("in set {name}"),
            T::TcpFlags { mask, set } => format!("{set} of {mask}"),
            T::TcpOption(number) => format!("{number} among them"),
            T::Comment(text) => text.clone(),
        }
    }

    fn found(&self, subject: &Subject<'_>) -> Option<String> {
        use IpTest as T;
        let ip = subject.ip?;
        Some(match self {
            T::SrcMac(_) => subject.packet.src_mac.to_string(),
            T::SrcIp(_) | T::SrcIpRange { .. } => ip.src.to_string(),
            T::DstIp(_) | T::DstIpRange { .. } => ip.dst.to_string(),
            T::IpProtocol(_) => words::protocol(ip.rule_protocol()),
            T::SrcPort(_) => ip.ports()?.0.to_string(),
            T::DstPort(_) => ip.ports()?.1.to_string(),
            T::Dscp(_) => (ip.tos >> 2).to_string(),
            T::Icmp { .. } => {
                let (kind, code) = icmp(ip)?;
                format!("{kind}, code {code}")
            }
            T::ConnlimitAbove(_) => subject.connections.to_string(),
            T::States(_) => subject.connection.state.to_string(),
            T::CtDirection(_) => ct_direction(subject.connection.direction?).to_owned(),
            T::Set { family, direction, .. } => {
                set_value(*family, *direction, subject.packet, ip)?.to_string()
            }
            T::IpSet { .. } | T::Comment(_) => return None,
            T::TcpFlags { .. } | T::TcpOption(_) => {
                let Transport::Tcp(tcp) = &ip.transport else { return None };
                match self {
                    T::TcpFlags { .. } => words::tcp_flags(tcp.flags),
                    _ => tcp.options.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
                }
            }
        })
    }
}

fn set_field(family: SetFamily, direction: SetDirection) -> &'static str {
    match (family, direction) {
        (SetFamily::Ipv4 | SetFamily::Ipv6, SetDirection::Src) => "source address",
        (SetFamily::Ipv4 | SetFamily::Ipv6, SetDirection::Dst) => "destination address",
        (SetFamily::Mac, SetDirection::Src) => "source MAC",
        (SetFamily::Mac, SetDirection::Dst) => "destination MAC",
        (SetFamily::Port, SetDirection::Src) => "source port",
        (SetFamily::Port, SetDirection::Dst) => "destination port",
    }
}

fn ct_direction(direction: CtDirection) -> &'static str {
    match direction {
        CtDirection::Original => "original",
        CtDirection::Reply => "reply",
    }
}

/// The family of the IP rules that look at a packet: those in a VLAN are hidden from them.
pub(crate) fn family(packet: &Packet) -> Option<Family> {
    match (packet.vlan, packet.ether_type) {
        (None, ether_type::IPV4) => Some(Family::Ipv4),
        (None, ether_type::IPV6) => Some(Family::Ipv6),
        _ => None,
    }
}
