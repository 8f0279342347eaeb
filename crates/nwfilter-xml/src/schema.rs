//! The attribute table: every protocol element and every attribute it has, in the order in which libvirt writes
//! them. Reader, writer, documentation and the tests' generators all walk it; a new attribute is one line here.

use std::fmt;
use std::str::FromStr;

use crate::Error;
use crate::names::ChainKind;
use crate::text::serde_as_text;
use crate::value::Kind;

/// Which of the host's tables a protocol is filtered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layer {
    /// Ethernet frames of any kind.
    Ethernet,
    /// IPv4 packets, with connection state.
    Ipv4,
    /// IPv6 packets, with connection state.
    Ipv6,
}

/// Declares the fields, each with what it is, which is its documentation as well.
macro_rules! fields {
    ($($field:ident: $about:literal,)+) => {
        /// What an attribute matches on: the field of the packet, independent of the element it stands in.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Field {
            $(#[doc = $about] $field,)+
        }

        impl Field {
            /// What it is, in a few words.
            pub fn about(self) -> &'static str {
                match self {
                    $(Field::$field => $about,)+
                }
            }
        }
    };
}

fields! {
    SrcMac: "source MAC address",
    SrcMacMask: "bits of the source MAC address that count",
    DstMac: "destination MAC address",
    DstMacMask: "bits of the destination MAC address that count",
    EtherType: "protocol of the Ethernet frame",
    VlanId: "number of the VLAN",
    VlanEncap: "protocol inside the VLAN tag",
    StpType: "type of the bridge message",
    StpFlags: "flags of the bridge message",
    StpRootPriority: "priority of the root bridge",
    StpRootPriorityHi: "end of the range of root priorities",
    StpRootAddress: "MAC address of the root bridge",
    StpRootAddressMask: "bits of the root bridge's address that count",
    StpRootCost: "cost of the path to the root bridge",
    StpRootCostHi: "end of the range of costs",
    StpSenderPriority: "priority of the sending bridge",
    StpSenderPriorityHi: "end of the range of sender priorities",
    StpSenderAddress: "MAC address of the sending bridge",
    StpSenderAddressMask: "bits of the sending bridge's address that count",
    StpPort: "port of the sending bridge",
    StpPortHi: "end of the range of bridge ports",
    StpAge: "age of the message",
    StpAgeHi: "end of the range of ages",
    StpMaxAge: "greatest age of a message",
    StpMaxAgeHi: "end of the range of greatest ages",
    StpHelloTime: "time between two messages",
    StpHelloTimeHi: "end of the range of times",
    StpForwardDelay: "delay before a port forwards",
    StpForwardDelayHi: "end of the range of delays",
    ArpHardwareType: "hardware type of the ARP message",
    ArpProtocolType: "protocol type of the ARP message",
    ArpOpcode: "operation of the ARP message",
    ArpSrcMac: "sender's MAC address in the ARP message",
    ArpDstMac: "target's MAC address in the ARP message",
    ArpSrcIp: "sender's IP address in the ARP message",
    ArpSrcIpMask: "bits of the sender's IP address that count",
    ArpDstIp: "target's IP address in the ARP message",
    ArpDstIpMask: "bits of the target's IP address that count",
    ArpGratuitous: "whether sender and target are the same",
    SrcIp: "source IP address",
    SrcIpMask: "bits of the source IP address that count",
    DstIp: "destination IP address",
    DstIpMask: "bits of the destination IP address that count",
    SrcIpFrom: "start of a range of source IP addresses",
    SrcIpTo: "end of the range of source IP addresses",
    DstIpFrom: "start of a range of destination IP addresses",
    DstIpTo: "end of the range of destination IP addresses",
    IpProtocol: "protocol of the IP packet",
    SrcPortStart: "source port, or the first of a range",
    SrcPortEnd: "last source port of the range",
    DstPortStart: "destination port, or the first of a range",
    DstPortEnd: "last destination port of the range",
    Dscp: "class of service of the IP packet",
    IcmpType: "ICMP type, or the first of a range",
    IcmpTypeEnd: "last ICMP type of the range",
    IcmpCode: "ICMP code, or the first of a range",
    IcmpCodeEnd: "last ICMP code of the range",
    ConnlimitAbove: "more connections of one address than this",
    States: "state of the packet's connection",
    IpSet: "address, or address and port, in a set of the host",
    IpSetFlags: "which addresses and ports are looked for in the set",
    TcpOption: "number of a TCP option that is present",
    TcpFlags: "TCP flags that are looked at, and those of them that are set",
    Comment: "nothing: a note that stands beside the rule in the kernel",
}

/// One attribute of a protocol element.
#[derive(Debug, PartialEq, Eq)]
pub struct Attribute {
    /// The name in XML.
    pub name: &'static str,
    /// What it matches on.
    pub field: Field,
    /// What its value is.
    pub kind: Kind,
    /// The attribute that decides whether this one is negated, where it is not its own element's `match='no'`.
    pub sign_of: Option<Field>,
    /// The attribute without which this one has no effect.
    pub needs: Option<Field>,
}

const fn attribute(name: &'static str, field: Field, kind: Kind) -> Attribute {
    Attribute { name, field, kind, sign_of: None, needs: None }
}

/// The mask of an address, or the end of a range, with a sign of its own.
const fn part(name: &'static str, field: Field, kind: Kind, of: Field) -> Attribute {
    Attribute { name, field, kind, sign_of: None, needs: Some(of) }
}

/// The mask of an address, or the end of a range, negated as the address or the range's start is.
const fn signed_part(name: &'static str, field: Field, kind: Kind, of: Field) -> Attribute {
    Attribute { name, field, kind, sign_of: Some(of), needs: Some(of) }
}

/// One protocol element.
#[derive(Debug, PartialEq, Eq)]
pub struct ProtocolSpec {
    /// The protocol.
    pub protocol: Protocol,
    /// The name of the element in XML.
    pub element: &'static str,
    /// The table its rules go to.
    pub layer: Layer,
    /// Its attributes in the order in which they are written.
    pub attributes: &'static [Attribute],
}

/// The protocol that a rule's element names.
#[allow(missing_docs)] // The names are those of the protocols; `On6` is "over IPv6".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Arp,
    Rarp,
    Mac,
    Vlan,
    Stp,
    Ip,
    Ipv6,
    Tcp,
    Udp,
    UdpLite,
    Esp,
    Ah,
    Sctp,
    Icmp,
    All,
    Igmp,
    TcpOn6,
    UdpOn6,
    UdpLiteOn6,
    EspOn6,
    AhOn6,
    SctpOn6,
    Icmpv6,
    AllOn6,
}

impl Field {
    /// The field that holds the start of the range whose end this one holds.
    pub fn range_start(self) -> Option<Self> {
        let start = match self {
            Field::StpRootPriorityHi => Field::StpRootPriority,
            Field::StpRootCostHi => Field::StpRootCost,
            Field::StpSenderPriorityHi => Field::StpSenderPriority,
            Field::StpPortHi => Field::StpPort,
            Field::StpAgeHi => Field::StpAge,
            Field::StpMaxAgeHi => Field::StpMaxAge,
            Field::StpHelloTimeHi => Field::StpHelloTime,
            Field::StpForwardDelayHi => Field::StpForwardDelay,
            Field::SrcIpTo => Field::SrcIpFrom,
            Field::DstIpTo => Field::DstIpFrom,
            Field::SrcPortEnd => Field::SrcPortStart,
            Field::DstPortEnd => Field::DstPortStart,
            Field::IcmpTypeEnd => Field::IcmpType,
            Field::IcmpCodeEnd => Field::IcmpCode,
            _ => return None,
        };
        Some(start)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.spec().element)
    }
}

impl FromStr for Protocol {
    type Err = Error;
    fn from_str(element: &str) -> Result<Self, Error> {
        Self::of_element(element).ok_or_else(|| Error::name("protocol", element, "no element has that name"))
    }
}

serde_as_text!(Protocol);

impl Protocol {
    /// The protocol of an element, `None` if no protocol has that name.
    pub fn of_element(element: &str) -> Option<Self> {
        PROTOCOLS.iter().find(|spec| spec.element == element).map(|spec| spec.protocol)
    }

    /// Its row of the table.
    pub fn spec(self) -> &'static ProtocolSpec {
        // `PROTOCOLS` has one row for each variant, in their order; a test holds it to that.
        &PROTOCOLS[self as usize]
    }

    /// The table its rules go to.
    pub fn layer(self) -> Layer {
        self.spec().layer
    }

    /// Its attribute for a field.
    pub fn attribute(self, field: Field) -> Option<&'static Attribute> {
        self.spec().attributes.iter().find(|attribute| attribute.field == field)
    }

    /// The chain whose frames can match it; `None` if frames of any chain can.
    pub fn chain(self) -> Option<ChainKind> {
        match self {
            Protocol::Arp => Some(ChainKind::Arp),
            Protocol::Rarp => Some(ChainKind::Rarp),
            Protocol::Vlan => Some(ChainKind::Vlan),
            Protocol::Stp => Some(ChainKind::Stp),
            Protocol::Ip => Some(ChainKind::Ipv4),
            Protocol::Ipv6 => Some(ChainKind::Ipv6),
            _ => None,
        }
    }
}

/// Concatenates lists of attributes at compile time.
macro_rules! attributes {
    ($($part:expr),+ $(,)?) => {{
        const PARTS: &[&[Attribute]] = &[$($part),+];
        const LEN: usize = {
            let (mut len, mut i) = (0, 0);
            while i < PARTS.len() {
                len += PARTS[i].len();
                i += 1;
            }
            len
        };
        const JOINED: [Attribute; LEN] = {
            let mut joined = [const { attribute("", Field::Comment, Kind::Comment) }; LEN];
            let (mut at, mut i) = (0, 0);
            while i < PARTS.len() {
                let mut j = 0;
                while j < PARTS[i].len() {
                    let Attribute { name, field, kind, sign_of, needs } = PARTS[i][j];
                    joined[at] = Attribute { name, field, kind, sign_of, needs };
                    at += 1;
                    j += 1;
                }
                i += 1;
            }
            joined
        };
        &JOINED
    }};
}

/// MAC addresses of mac and vlan elements.
const MACS_SIGNED: &[Attribute] = &[
    attribute("srcmacaddr", Field::SrcMac, Kind::Mac),
    signed_part("srcmacmask", Field::SrcMacMask, Kind::MacMask, Field::SrcMac),
    attribute("dstmacaddr", Field::DstMac, Kind::Mac),
    signed_part("dstmacmask", Field::DstMacMask, Kind::MacMask, Field::DstMac),
];
/// MAC addresses of the other Ethernet elements, whose masks keep the sign of their own element.
const MACS: &[Attribute] = &[
    attribute("srcmacaddr", Field::SrcMac, Kind::Mac),
    part("srcmacmask", Field::SrcMacMask, Kind::MacMask, Field::SrcMac),
    attribute("dstmacaddr", Field::DstMac, Kind::Mac),
    part("dstmacmask", Field::DstMacMask, Kind::MacMask, Field::DstMac),
];

const COMMENT: &[Attribute] = &[attribute("comment", Field::Comment, Kind::Comment)];

const VLAN: &[Attribute] = &[
    attribute("vlanid", Field::VlanId, Kind::VlanId),
    attribute("encap-protocol", Field::VlanEncap, Kind::VlanEncap),
];

const STP: &[Attribute] = &[
    attribute("srcmacaddr", Field::SrcMac, Kind::Mac),
    signed_part("srcmacmask", Field::SrcMacMask, Kind::MacMask, Field::SrcMac),
    attribute("type", Field::StpType, Kind::U8),
    attribute("flags", Field::StpFlags, Kind::U8),
    attribute("root-priority", Field::StpRootPriority, Kind::U16),
    signed_part("root-priority-hi", Field::StpRootPriorityHi, Kind::U16, Field::StpRootPriority),
    attribute("root-address", Field::StpRootAddress, Kind::Mac),
    signed_part("root-address-mask", Field::StpRootAddressMask, Kind::MacMask, Field::StpRootAddress),
    attribute("root-cost", Field::StpRootCost, Kind::U32),
    signed_part("root-cost-hi", Field::StpRootCostHi, Kind::U32, Field::StpRootCost),
    attribute("sender-priority", Field::StpSenderPriority, Kind::U16),
    signed_part("sender-priority-hi", Field::StpSenderPriorityHi, Kind::U16, Field::StpSenderPriority),
    attribute("sender-address", Field::StpSenderAddress, Kind::Mac),
    signed_part("sender-address-mask", Field::StpSenderAddressMask, Kind::MacMask, Field::StpSenderAddress),
    attribute("port", Field::StpPort, Kind::U16),
    signed_part("port-hi", Field::StpPortHi, Kind::U16, Field::StpPort),
    attribute("age", Field::StpAge, Kind::U16),
    signed_part("age-hi", Field::StpAgeHi, Kind::U16, Field::StpAge),
    attribute("max-age", Field::StpMaxAge, Kind::U16),
    signed_part("max-age-hi", Field::StpMaxAgeHi, Kind::U16, Field::StpMaxAge),
    attribute("hello-time", Field::StpHelloTime, Kind::U16),
    signed_part("hello-time-hi", Field::StpHelloTimeHi, Kind::U16, Field::StpHelloTime),
    attribute("forward-delay", Field::StpForwardDelay, Kind::U16),
    signed_part("forward-delay-hi", Field::StpForwardDelayHi, Kind::U16, Field::StpForwardDelay),
];

const ARP: &[Attribute] = &[
    attribute("hwtype", Field::ArpHardwareType, Kind::U16),
    attribute("protocoltype", Field::ArpProtocolType, Kind::U16),
    attribute("opcode", Field::ArpOpcode, Kind::ArpOpcode),
    attribute("arpsrcmacaddr", Field::ArpSrcMac, Kind::Mac),
    attribute("arpdstmacaddr", Field::ArpDstMac, Kind::Mac),
    attribute("arpsrcipaddr", Field::ArpSrcIp, Kind::Ipv4),
    part("arpsrcipmask", Field::ArpSrcIpMask, Kind::Ipv4Prefix, Field::ArpSrcIp),
    attribute("arpdstipaddr", Field::ArpDstIp, Kind::Ipv4),
    part("arpdstipmask", Field::ArpDstIpMask, Kind::Ipv4Prefix, Field::ArpDstIp),
    attribute("gratuitous", Field::ArpGratuitous, Kind::Bool),
];

const fn addresses(addr: Kind, mask: Kind) -> [Attribute; 4] {
    [
        attribute("srcipaddr", Field::SrcIp, addr),
        signed_part("srcipmask", Field::SrcIpMask, mask, Field::SrcIp),
        attribute("dstipaddr", Field::DstIp, addr),
        signed_part("dstipmask", Field::DstIpMask, mask, Field::DstIp),
    ]
}

const fn address_ranges(addr: Kind) -> [Attribute; 4] {
    [
        attribute("srcipfrom", Field::SrcIpFrom, addr),
        signed_part("srcipto", Field::SrcIpTo, addr, Field::SrcIpFrom),
        attribute("dstipfrom", Field::DstIpFrom, addr),
        signed_part("dstipto", Field::DstIpTo, addr, Field::DstIpFrom),
    ]
}

const IPV4_ADDRESSES: &[Attribute] = &addresses(Kind::Ipv4, Kind::Ipv4Prefix);
const IPV6_ADDRESSES: &[Attribute] = &addresses(Kind::Ipv6, Kind::Ipv6Prefix);
const IPV4_RANGES: &[Attribute] = &address_ranges(Kind::Ipv4);
const IPV6_RANGES: &[Attribute] = &address_ranges(Kind::Ipv6);

const IP_PROTOCOL: &[Attribute] = &[attribute("protocol", Field::IpProtocol, Kind::IpProtocol)];
const DSCP: &[Attribute] = &[attribute("dscp", Field::Dscp, Kind::Dscp)];

/// Ports of ip and ipv6 elements.
const PORTS: &[Attribute] = &[
    attribute("srcportstart", Field::SrcPortStart, Kind::U16),
    part("srcportend", Field::SrcPortEnd, Kind::U16, Field::SrcPortStart),
    attribute("dstportstart", Field::DstPortStart, Kind::U16),
    part("dstportend", Field::DstPortEnd, Kind::U16, Field::DstPortStart),
];

/// Ports of the transport protocols: all of them are negated as the source port is.
const PORTS_SIGNED: &[Attribute] = &[
    attribute("srcportstart", Field::SrcPortStart, Kind::U16),
    signed_part("srcportend", Field::SrcPortEnd, Kind::U16, Field::SrcPortStart),
    Attribute {
        sign_of: Some(Field::SrcPortStart),
        ..attribute("dstportstart", Field::DstPortStart, Kind::U16)
    },
    Attribute {
        sign_of: Some(Field::SrcPortStart),
        ..part("dstportend", Field::DstPortEnd, Kind::U16, Field::DstPortStart)
    },
];

/// ICMPv6 of ipv6 elements: each of the four counts alone.
const ICMP_RANGES: &[Attribute] = &[
    attribute("type", Field::IcmpType, Kind::U8),
    icmp_range("typeend", Field::IcmpTypeEnd),
    icmp_range("code", Field::IcmpCode),
    icmp_range("codeend", Field::IcmpCodeEnd),
];

const fn icmp_range(name: &'static str, field: Field) -> Attribute {
    Attribute { sign_of: Some(Field::IcmpType), ..attribute(name, field, Kind::U8) }
}

const SRC_MAC: &[Attribute] = &[attribute("srcmacaddr", Field::SrcMac, Kind::Mac)];

const CONNECTION: &[Attribute] = &[
    attribute("dscp", Field::Dscp, Kind::Dscp),
    attribute("connlimit-above", Field::ConnlimitAbove, Kind::U16Decimal),
    attribute("state", Field::States, Kind::States),
    attribute("ipset", Field::IpSet, Kind::IpSet),
    part("ipsetflags", Field::IpSetFlags, Kind::IpSetFlags, Field::IpSet),
];

const TCP_OPTION: &[Attribute] = &[attribute("option", Field::TcpOption, Kind::U8)];
const TCP_FLAGS: &[Attribute] = &[attribute("flags", Field::TcpFlags, Kind::TcpFlags)];

const ICMP: &[Attribute] = &[
    attribute("type", Field::IcmpType, Kind::U8),
    signed_part("code", Field::IcmpCode, Kind::U8, Field::IcmpType),
];

const ARP_ATTRIBUTES: &[Attribute] = attributes!(MACS, ARP, COMMENT);
const PLAIN4: &[Attribute] = attributes!(SRC_MAC, IPV4_ADDRESSES, IPV4_RANGES, CONNECTION, COMMENT);
const PLAIN6: &[Attribute] = attributes!(SRC_MAC, IPV6_ADDRESSES, IPV6_RANGES, CONNECTION, COMMENT);
const PORTS4: &[Attribute] =
    attributes!(SRC_MAC, IPV4_ADDRESSES, IPV4_RANGES, CONNECTION, PORTS_SIGNED, COMMENT);
const PORTS6: &[Attribute] =
    attributes!(SRC_MAC, IPV6_ADDRESSES, IPV6_RANGES, CONNECTION, PORTS_SIGNED, COMMENT);

const fn spec(
    protocol: Protocol,
    element: &'static str,
    layer: Layer,
    attributes: &'static [Attribute],
) -> ProtocolSpec {
    ProtocolSpec { protocol, element, layer, attributes }
}

/// Every protocol element, in the order of [`Protocol`]'s variants.
pub static PROTOCOLS: &[ProtocolSpec] = &[
    spec(Protocol::Arp, "arp", Layer::Ethernet, ARP_ATTRIBUTES),
    spec(Protocol::Rarp, "rarp", Layer::Ethernet, ARP_ATTRIBUTES),
    spec(
        Protocol::Mac,
        "mac",
        Layer::Ethernet,
        attributes!(MACS_SIGNED, &[attribute("protocolid", Field::EtherType, Kind::EtherType)], COMMENT),
    ),
    spec(Protocol::Vlan, "vlan", Layer::Ethernet, attributes!(MACS_SIGNED, VLAN, COMMENT)),
    spec(Protocol::Stp, "stp", Layer::Ethernet, attributes!(STP, COMMENT)),
    spec(
        Protocol::Ip,
        "ip",
        Layer::Ethernet,
        attributes!(MACS, IPV4_ADDRESSES, IP_PROTOCOL, PORTS, DSCP, COMMENT),
    ),
    spec(
        Protocol::Ipv6,
        "ipv6",
        Layer::Ethernet,
        attributes!(MACS, IPV6_ADDRESSES, IP_PROTOCOL, PORTS, ICMP_RANGES, COMMENT),
    ),
    spec(
        Protocol::Tcp,
        "tcp",
        Layer::Ipv4,
        attributes!(
            SRC_MAC,
            IPV4_ADDRESSES,
            IPV4_RANGES,
            CONNECTION,
            PORTS_SIGNED,
            TCP_OPTION,
            TCP_FLAGS,
            COMMENT
        ),
    ),
    spec(Protocol::Udp, "udp", Layer::Ipv4, PORTS4),
    spec(Protocol::UdpLite, "udplite", Layer::Ipv4, PLAIN4),
    spec(Protocol::Esp, "esp", Layer::Ipv4, PLAIN4),
    spec(Protocol::Ah, "ah", Layer::Ipv4, PLAIN4),
    spec(Protocol::Sctp, "sctp", Layer::Ipv4, PORTS4),
    spec(
        Protocol::Icmp,
        "icmp",
        Layer::Ipv4,
        attributes!(SRC_MAC, IPV4_ADDRESSES, IPV4_RANGES, CONNECTION, ICMP, COMMENT),
    ),
    spec(Protocol::All, "all", Layer::Ipv4, PLAIN4),
    spec(Protocol::Igmp, "igmp", Layer::Ipv4, PLAIN4),
    spec(
        Protocol::TcpOn6,
        "tcp-ipv6",
        Layer::Ipv6,
        attributes!(SRC_MAC, IPV6_ADDRESSES, IPV6_RANGES, CONNECTION, PORTS_SIGNED, TCP_OPTION, COMMENT),
    ),
    spec(Protocol::UdpOn6, "udp-ipv6", Layer::Ipv6, PORTS6),
    spec(Protocol::UdpLiteOn6, "udplite-ipv6", Layer::Ipv6, PLAIN6),
    spec(Protocol::EspOn6, "esp-ipv6", Layer::Ipv6, PLAIN6),
    spec(Protocol::AhOn6, "ah-ipv6", Layer::Ipv6, PLAIN6),
    spec(Protocol::SctpOn6, "sctp-ipv6", Layer::Ipv6, PORTS6),
    spec(
        Protocol::Icmpv6,
        "icmpv6",
        Layer::Ipv6,
        attributes!(SRC_MAC, IPV6_ADDRESSES, IPV6_RANGES, CONNECTION, ICMP, COMMENT),
    ),
    spec(Protocol::AllOn6, "all-ipv6", Layer::Ipv6, PLAIN6),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_one_row_for_each_protocol_in_their_order() {
        for (index, spec) in PROTOCOLS.iter().enumerate() {
            assert_eq!(spec.protocol as usize, index);
            assert_eq!(spec.protocol.spec(), spec);
        }
        assert_eq!(PROTOCOLS.len(), Protocol::AllOn6 as usize + 1);
    }

    #[test]
    fn every_field_stands_once_in_an_element_and_refers_to_fields_of_it() {
        for spec in PROTOCOLS {
            for (index, attribute) in spec.attributes.iter().enumerate() {
                let again =
                    |other: &Attribute| other.field == attribute.field || other.name == attribute.name;
                assert!(!spec.attributes[..index].iter().any(again), "{} {}", spec.element, attribute.name);
                for other in [attribute.sign_of, attribute.needs].into_iter().flatten() {
                    let found = spec.protocol.attribute(other);
                    assert!(found.is_some(), "{} {}", spec.element, attribute.name);
                }
            }
        }
    }
}
