//! The attribute table: every protocol element and every attribute it has, in the order in which libvirt writes
//! them. Reader, writer, documentation and the tests' generators all walk it; a new attribute is one line here.

use crate::names::ChainKind;
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

/// What an attribute matches on: the field of the packet, independent of the element it stands in.
#[allow(missing_docs)] // The names are those of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Field {
    SrcMac,
    SrcMacMask,
    DstMac,
    DstMacMask,
    EtherType,
    VlanId,
    VlanEncap,
    StpType,
    StpFlags,
    StpRootPriority,
    StpRootPriorityHi,
    StpRootAddress,
    StpRootAddressMask,
    StpRootCost,
    StpRootCostHi,
    StpSenderPriority,
    StpSenderPriorityHi,
    StpSenderAddress,
    StpSenderAddressMask,
    StpPort,
    StpPortHi,
    StpAge,
    StpAgeHi,
    StpMaxAge,
    StpMaxAgeHi,
    StpHelloTime,
    StpHelloTimeHi,
    StpForwardDelay,
    StpForwardDelayHi,
    ArpHardwareType,
    ArpProtocolType,
    ArpOpcode,
    ArpSrcMac,
    ArpDstMac,
    ArpSrcIp,
    ArpSrcIpMask,
    ArpDstIp,
    ArpDstIpMask,
    ArpGratuitous,
    SrcIp,
    SrcIpMask,
    DstIp,
    DstIpMask,
    SrcIpFrom,
    SrcIpTo,
    DstIpFrom,
    DstIpTo,
    IpProtocol,
    SrcPortStart,
    SrcPortEnd,
    DstPortStart,
    DstPortEnd,
    Dscp,
    IcmpType,
    IcmpTypeEnd,
    IcmpCode,
    IcmpCodeEnd,
    ConnlimitAbove,
    States,
    IpSet,
    IpSetFlags,
    TcpOption,
    TcpFlags,
    Comment,
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
}

const fn attribute(name: &'static str, field: Field, kind: Kind) -> Attribute {
    Attribute { name, field, kind, sign_of: None }
}

const fn signed(name: &'static str, field: Field, kind: Kind, sign_of: Field) -> Attribute {
    Attribute { name, field, kind, sign_of: Some(sign_of) }
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
                    let Attribute { name, field, kind, sign_of } = PARTS[i][j];
                    joined[at] = Attribute { name, field, kind, sign_of };
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

const fn mac_pair(masks_follow_addresses: bool) -> [Attribute; 4] {
    let (src, dst) =
        if masks_follow_addresses { (Some(Field::SrcMac), Some(Field::DstMac)) } else { (None, None) };
    [
        attribute("srcmacaddr", Field::SrcMac, Kind::Mac),
        Attribute { name: "srcmacmask", field: Field::SrcMacMask, kind: Kind::MacMask, sign_of: src },
        attribute("dstmacaddr", Field::DstMac, Kind::Mac),
        Attribute { name: "dstmacmask", field: Field::DstMacMask, kind: Kind::MacMask, sign_of: dst },
    ]
}

/// MAC addresses of mac and vlan elements.
const MACS_SIGNED: &[Attribute] = &mac_pair(true);
/// MAC addresses of the other Ethernet elements, whose masks keep the sign of their own element.
const MACS: &[Attribute] = &mac_pair(false);

const COMMENT: &[Attribute] = &[attribute("comment", Field::Comment, Kind::Comment)];

const VLAN: &[Attribute] = &[
    attribute("vlanid", Field::VlanId, Kind::VlanId),
    attribute("encap-protocol", Field::VlanEncap, Kind::VlanEncap),
];

const STP: &[Attribute] = &[
    attribute("srcmacaddr", Field::SrcMac, Kind::Mac),
    signed("srcmacmask", Field::SrcMacMask, Kind::MacMask, Field::SrcMac),
    attribute("type", Field::StpType, Kind::U8),
    attribute("flags", Field::StpFlags, Kind::U8),
    attribute("root-priority", Field::StpRootPriority, Kind::U16),
    signed("root-priority-hi", Field::StpRootPriorityHi, Kind::U16, Field::StpRootPriority),
    attribute("root-address", Field::StpRootAddress, Kind::Mac),
    signed("root-address-mask", Field::StpRootAddressMask, Kind::MacMask, Field::StpRootAddress),
    attribute("root-cost", Field::StpRootCost, Kind::U32),
    signed("root-cost-hi", Field::StpRootCostHi, Kind::U32, Field::StpRootCost),
    attribute("sender-priority", Field::StpSenderPriority, Kind::U16),
    signed("sender-priority-hi", Field::StpSenderPriorityHi, Kind::U16, Field::StpSenderPriority),
    attribute("sender-address", Field::StpSenderAddress, Kind::Mac),
    signed("sender-address-mask", Field::StpSenderAddressMask, Kind::MacMask, Field::StpSenderAddress),
    attribute("port", Field::StpPort, Kind::U16),
    signed("port-hi", Field::StpPortHi, Kind::U16, Field::StpPort),
    attribute("age", Field::StpAge, Kind::U16),
    signed("age-hi", Field::StpAgeHi, Kind::U16, Field::StpAge),
    attribute("max-age", Field::StpMaxAge, Kind::U16),
    signed("max-age-hi", Field::StpMaxAgeHi, Kind::U16, Field::StpMaxAge),
    attribute("hello-time", Field::StpHelloTime, Kind::U16),
    signed("hello-time-hi", Field::StpHelloTimeHi, Kind::U16, Field::StpHelloTime),
    attribute("forward-delay", Field::StpForwardDelay, Kind::U16),
    signed("forward-delay-hi", Field::StpForwardDelayHi, Kind::U16, Field::StpForwardDelay),
];

const ARP: &[Attribute] = &[
    attribute("hwtype", Field::ArpHardwareType, Kind::U16),
    attribute("protocoltype", Field::ArpProtocolType, Kind::U16),
    attribute("opcode", Field::ArpOpcode, Kind::ArpOpcode),
    attribute("arpsrcmacaddr", Field::ArpSrcMac, Kind::Mac),
    attribute("arpdstmacaddr", Field::ArpDstMac, Kind::Mac),
    attribute("arpsrcipaddr", Field::ArpSrcIp, Kind::Ipv4),
    attribute("arpsrcipmask", Field::ArpSrcIpMask, Kind::Ipv4Prefix),
    attribute("arpdstipaddr", Field::ArpDstIp, Kind::Ipv4),
    attribute("arpdstipmask", Field::ArpDstIpMask, Kind::Ipv4Prefix),
    attribute("gratuitous", Field::ArpGratuitous, Kind::Bool),
];

const fn addresses(addr: Kind, mask: Kind) -> [Attribute; 4] {
    [
        attribute("srcipaddr", Field::SrcIp, addr),
        signed("srcipmask", Field::SrcIpMask, mask, Field::SrcIp),
        attribute("dstipaddr", Field::DstIp, addr),
        signed("dstipmask", Field::DstIpMask, mask, Field::DstIp),
    ]
}

const fn address_ranges(addr: Kind) -> [Attribute; 4] {
    [
        attribute("srcipfrom", Field::SrcIpFrom, addr),
        signed("srcipto", Field::SrcIpTo, addr, Field::SrcIpFrom),
        attribute("dstipfrom", Field::DstIpFrom, addr),
        signed("dstipto", Field::DstIpTo, addr, Field::DstIpFrom),
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
    attribute("srcportend", Field::SrcPortEnd, Kind::U16),
    attribute("dstportstart", Field::DstPortStart, Kind::U16),
    attribute("dstportend", Field::DstPortEnd, Kind::U16),
];

/// Ports of the transport protocols: all of them are negated as the source port is.
const PORTS_SIGNED: &[Attribute] = &[
    attribute("srcportstart", Field::SrcPortStart, Kind::U16),
    signed("srcportend", Field::SrcPortEnd, Kind::U16, Field::SrcPortStart),
    signed("dstportstart", Field::DstPortStart, Kind::U16, Field::SrcPortStart),
    signed("dstportend", Field::DstPortEnd, Kind::U16, Field::SrcPortStart),
];

const ICMP_RANGES: &[Attribute] = &[
    attribute("type", Field::IcmpType, Kind::U8),
    signed("typeend", Field::IcmpTypeEnd, Kind::U8, Field::IcmpType),
    signed("code", Field::IcmpCode, Kind::U8, Field::IcmpType),
    signed("codeend", Field::IcmpCodeEnd, Kind::U8, Field::IcmpType),
];

const SRC_MAC: &[Attribute] = &[attribute("srcmacaddr", Field::SrcMac, Kind::Mac)];

const CONNECTION: &[Attribute] = &[
    attribute("dscp", Field::Dscp, Kind::Dscp),
    attribute("connlimit-above", Field::ConnlimitAbove, Kind::U16Decimal),
    attribute("state", Field::States, Kind::States),
    attribute("ipset", Field::IpSet, Kind::IpSet),
    attribute("ipsetflags", Field::IpSetFlags, Kind::IpSetFlags),
];

const TCP_OPTION: &[Attribute] = &[attribute("option", Field::TcpOption, Kind::U8)];
const TCP_FLAGS: &[Attribute] = &[attribute("flags", Field::TcpFlags, Kind::TcpFlags)];

const ICMP: &[Attribute] = &[
    attribute("type", Field::IcmpType, Kind::U8),
    signed("code", Field::IcmpCode, Kind::U8, Field::IcmpType),
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
pub const PROTOCOLS: &[ProtocolSpec] = &[
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
    fn every_field_stands_once_in_an_element_and_signs_refer_to_fields_of_it() {
        for spec in PROTOCOLS {
            for (index, attribute) in spec.attributes.iter().enumerate() {
                let again =
                    |other: &Attribute| other.field == attribute.field || other.name == attribute.name;
                assert!(!spec.attributes[..index].iter().any(again), "{} {}", spec.element, attribute.name);
                let sign = attribute.sign_of.map(|field| spec.protocol.attribute(field));
                assert_ne!(sign, Some(None), "{} {}", spec.element, attribute.name);
            }
        }
    }
}
