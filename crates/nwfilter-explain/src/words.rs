//! Numbers of packets in words.

use nwfilter_xml::value::TcpFlagSet;

use crate::packet::{ether_type as types, protocol as protocols};

const PROTOCOLS: [(u8, &str); 9] = [
    (protocols::ICMP, "icmp"),
    (protocols::IGMP, "igmp"),
    (protocols::TCP, "tcp"),
    (protocols::UDP, "udp"),
    (protocols::ESP, "esp"),
    (protocols::AH, "ah"),
    (protocols::ICMPV6, "icmpv6"),
    (protocols::SCTP, "sctp"),
    (protocols::UDPLITE, "udplite"),
];

const ETHER_TYPES: [(u16, &str); 5] = [
    (types::IPV4, "ipv4"),
    (types::ARP, "arp"),
    (types::RARP, "rarp"),
    (types::VLAN, "vlan"),
    (types::IPV6, "ipv6"),
];

pub(crate) fn protocol(number: u8) -> String {
    let name = PROTOCOLS.iter().find(|(known, _)| *known == number);
    name.map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

pub(crate) fn protocol_number(text: &str) -> Option<u8> {
    PROTOCOLS.iter().find(|(_, name)| *name == text).map(|(number, _)| *number)
}

pub(crate) fn ether_type(number: u16) -> String {
    let name = ETHER_TYPES.iter().find(|(known, _)| *known == number);
    name.map_or_else(|| format!("0x{number:04x}"), |(_, name)| (*name).to_owned())
}

pub(crate) fn ether_type_number(text: &str) -> Option<u16> {
    ETHER_TYPES.iter().find(|(_, name)| *name == text).map(|(number, _)| *number)
}

pub(crate) fn tcp_flags(bits: u8) -> String {
    let names: Vec<_> =
        TcpFlagSet::NAMES.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(",") }
}

pub(crate) fn tcp_flag(text: &str) -> Option<u8> {
    TcpFlagSet::NAMES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text)).map(|(bit, _)| *bit)
}
