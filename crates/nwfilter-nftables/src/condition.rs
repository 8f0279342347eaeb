//! Translates a test of a ruleset into expressions of nf_tables.
//!
//! A test becomes alternatives, one of which must hold; each is a list of conditions that must all hold. If a packet lacks the
//! header, or is a later fragment, the expression does not match, not even in a negated test, as with iptables and ebtables.

use std::net::IpAddr;

use nwfilter_rules::{
    CtDirection, EthernetTest, Family, IpTest, MaskedMac, Match, Network, PortRange, StpRange,
};
use nwfilter_xml::value::{SetDirection, States};
use nwfilter_xml::{MacAddr, SetFamily};

use crate::kernel::expr::{
    Base, Bitwise, Cmp, Connlimit, Expr, Extended, ExtensionPart, Load, Range, Register, Relation, state,
};
use crate::kernel::{Rule, SetName, field};
use crate::sets;

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Condition {
    /// A field has a value, or not. The value can be moved to a set.
    Value {
        /// The field.
        load: Load,
        /// The value.
        value: Vec<u8>,
        /// Whether it must not have it.
        negated: bool,
    },
    /// Expressions without a value of a port.
    Exprs(Vec<Expr>),
    /// The same address has more open connections than that, or not.
    Connlimit {
        /// The source address.
        source: Load,
        /// How many.
        limit: Connlimit,
    },
    /// Two bytes of the packet are equal, or not; see [`SAME_BYTES`].
    SameBytes {
        /// Both of them.
        pair: [Load; 2],
        /// Whether they must differ.
        negated: bool,
    },
}

/// Conditions that must all hold.
pub(crate) type All = Vec<Condition>;

/// The set of all pairs of the same byte: two fields of a packet are compared byte by byte, because nf_tables cannot
/// compare a register with a register.
pub(crate) const SAME_BYTES: &str = "same-bytes";

/// What this backend cannot express, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inexpressible(pub(crate) String);

const SREG: Register = Register::FIRST;
const IPV4: [u8; 2] = [0x08, 0x00];
const ETHERNET: [u8; 2] = [0, 1];

fn value(load: Load, value: impl Into<Vec<u8>>, negated: bool) -> Condition {
    Condition::Value { load, value: value.into(), negated }
}

fn is(load: Load, bytes: impl Into<Vec<u8>>) -> Condition {
    value(load, bytes, false)
}

fn loaded(load: Load, rest: impl IntoIterator<Item = Expr>) -> Condition {
    Condition::Exprs(std::iter::once(Expr::Load { load, dreg: SREG }).chain(rest).collect())
}

fn compare(relation: Relation, value: impl Into<Vec<u8>>) -> Expr {
    Expr::Cmp(Cmp { sreg: SREG, relation, value: value.into() })
}

fn equality(negated: bool) -> Relation {
    if negated { Relation::NotEqual } else { Relation::Equal }
}

fn keep(mask: impl Into<Vec<u8>>) -> Expr {
    let mask = mask.into();
    let xor = vec![0; mask.len()];
    Expr::Bitwise(Bitwise { sreg: SREG, dreg: SREG, mask, xor })
}

/// A field under a mask equals a value under the mask.
fn masked(load: Load, mask: &[u8], bits: &[u8], negated: bool) -> Condition {
    if mask.iter().all(|byte| *byte == 0xff) {
        return value(load, bits, negated);
    }
    let wanted: Vec<u8> = mask.iter().zip(bits).map(|(mask, bits)| mask & bits).collect();
    loaded(load, [keep(mask), compare(equality(negated), wanted)])
}

/// A field in network byte order is between two values, both included.
fn range(load: Load, from: &[u8], to: &[u8], negated: bool) -> Condition {
    if from == to {
        return value(load, from, negated);
    }
    match (negated, from > to) {
        (false, _) => {
            loaded(load, [compare(Relation::GreaterOrEqual, from), compare(Relation::LessOrEqual, to)])
        }
        // Every value is outside an empty range.
        (true, true) => loaded(load, []),
        (true, false) => {
            loaded(load, [Expr::Range(Range { sreg: SREG, negate: true, from: from.into(), to: to.into() })])
        }
    }
}

fn mac(load: Load, MaskedMac { addr, mask }: &MaskedMac, negated: bool) -> Condition {
    masked(load, &mask.map_or([0xff; 6], |mask| mask.0), &addr.0, negated)
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().into(),
        IpAddr::V6(addr) => addr.octets().into(),
    }
}

fn network(load: Load, Network { addr, prefix }: &Network, negated: bool) -> Condition {
    let bits = octets(*addr);
    let prefix = prefix.map_or(bits.len() * 8, usize::from);
    let mask: Vec<u8> = (0..bits.len())
        .map(|index| match prefix.saturating_sub(index * 8) {
            0 => 0,
            kept @ 1..8 => 0xff << (8 - kept),
            _ => 0xff,
        })
        .collect();
    masked(load, &mask, &bits, negated)
}

fn ports(load: Load, PortRange { from, to }: &PortRange, negated: bool) -> Condition {
    range(load, &from.to_be_bytes(), &to.unwrap_or(*from).to_be_bytes(), negated)
}

fn one(condition: Condition) -> Vec<All> {
    vec![vec![condition]]
}

/// The alternatives for the negation of several conditions: one of them fails. `conditions` makes them plain or negated.
fn negate<const N: usize>(conditions: impl Fn(bool) -> [Condition; N], negated: bool) -> Vec<All> {
    if negated {
        conditions(true).into_iter().map(|failed| vec![failed]).collect()
    } else {
        vec![conditions(false).into()]
    }
}

// ---- frames ----

const fn network_field(offset: u32, len: u32) -> Load {
    Load::Payload { base: Base::Network, offset, len }
}

/// The LLC header and protocol number at the beginning of all spanning-tree frames.
const STP_HEADER: Load = network_field(0, 6);
const STP_HEADER_BYTES: [u8; 6] = [0x42, 0x42, 0x03, 0, 0, 0];
const STP_TYPE: Load = network_field(6, 1);
/// The type of frames that have the other fields.
const STP_CONFIGURATION: u8 = 0;
const STP_FLAGS: Load = network_field(7, 1);
const STP_ROOT_ADDRESS: Load = network_field(10, 6);
const STP_SENDER_ADDRESS: Load = network_field(22, 6);

fn stp_field(field: StpRange) -> Load {
    match field {
        StpRange::RootPriority => network_field(8, 2),
        StpRange::RootCost => network_field(16, 4),
        StpRange::SenderPriority => network_field(20, 2),
        StpRange::Port => network_field(28, 2),
        StpRange::MessageAge => network_field(30, 2),
        StpRange::MaxAge => network_field(32, 2),
        StpRange::HelloTime => network_field(34, 2),
        StpRange::ForwardDelay => network_field(36, 2),
    }
}

/// The alternatives of a test on frames. `ether_type` is that of the rule, if it names one.
pub(crate) fn of_ethernet(
    m: &Match<EthernetTest>,
    ether_type: Option<u16>,
) -> Result<Vec<All>, Inexpressible> {
    use EthernetTest as Test;
    let negated = m.negated;
    let ipv6 = ether_type == Some(0x86dd);
    Ok(match &m.test {
        Test::SrcMac(addr) => one(mac(field::ETHER_SADDR, addr, negated)),
        Test::DstMac(addr) => one(mac(field::ETHER_DADDR, addr, negated)),
        Test::EtherType(number) => one(value(field::ETHER_TYPE, number.to_be_bytes(), negated)),
        Test::VlanId(id) => one(masked(field::VLAN_TCI, &[0x0f, 0xff], &id.to_be_bytes(), negated)),
        Test::VlanEncap(number) => one(value(field::VLAN_TYPE, number.to_be_bytes(), negated)),
        Test::StpType(_)
        | Test::StpFlags(_)
        | Test::StpRange { .. }
        | Test::StpRootAddress(_)
        | Test::StpSenderAddress(_) => stp(&m.test, negated),
        Test::ArpHardwareType(number) => one(value(field::ARP_HTYPE, number.to_be_bytes(), negated)),
        Test::ArpProtocolType(number) => one(value(field::ARP_PTYPE, number.to_be_bytes(), negated)),
        Test::ArpOpcode(number) => one(value(field::ARP_OPERATION, number.to_be_bytes(), negated)),
        Test::ArpSrcMac(addr) => arp_mac(field::ARP_SADDR_ETHER, *addr, negated),
        Test::ArpDstMac(addr) => arp_mac(field::ARP_DADDR_ETHER, *addr, negated),
        Test::ArpSrcIp(addr) => arp_ip(network(field::ARP_SADDR_IP, addr, negated)),
        Test::ArpDstIp(addr) => arp_ip(network(field::ARP_DADDR_IP, addr, negated)),
        Test::ArpGratuitous => gratuitous(negated),
        Test::SrcIp(addr) => {
            one(network(if ipv6 { field::IP6_SADDR } else { field::IP_SADDR }, addr, negated))
        }
        Test::DstIp(addr) => {
            one(network(if ipv6 { field::IP6_DADDR } else { field::IP_DADDR }, addr, negated))
        }
        // ebtables, too, looks at the last header of IPv6.
        Test::IpProtocol(number) => {
            one(value(if ipv6 { field::L4PROTO } else { field::IP_PROTOCOL }, [*number], negated))
        }
        Test::SrcPort(range) => one(ports(field::SPORT, range, negated)),
        Test::DstPort(range) => one(ports(field::DPORT, range, negated)),
        // ebtables compares all eight bits.
        Test::Dscp(number) if ipv6 => one(traffic_class(0xff, *number, negated)),
        Test::Dscp(number) => one(value(field::IP_TOS, [*number], negated)),
        Test::IcmpRange { kinds, codes } => negate(
            |negated| {
                [
                    range(field::ICMP_TYPE, &[kinds.0], &[kinds.1], negated),
                    range(field::ICMP_CODE, &[codes.0], &[codes.1], negated),
                ]
            },
            negated,
        ),
    })
}

/// The traffic class is in the middle of the first two bytes of IPv6.
fn traffic_class(mask: u8, bits: u8, negated: bool) -> Condition {
    let shifted = |bits: u8| (u16::from(bits) << 4).to_be_bytes();
    masked(field::IP6_TRAFFIC_CLASS, &shifted(mask), &shifted(bits), negated)
}

/// Fields of spanning-tree frames. Only configuration frames have those after the type.
fn stp(test: &EthernetTest, negated: bool) -> Vec<All> {
    let field = match test {
        EthernetTest::StpType(number) => {
            return vec![vec![is(STP_HEADER, STP_HEADER_BYTES), value(STP_TYPE, [*number], negated)]];
        }
        EthernetTest::StpFlags(bits) => value(STP_FLAGS, [*bits], negated),
        EthernetTest::StpRootAddress(addr) => mac(STP_ROOT_ADDRESS, addr, negated),
        EthernetTest::StpSenderAddress(addr) => mac(STP_SENDER_ADDRESS, addr, negated),
        EthernetTest::StpRange { field, from, to } => {
            let load = stp_field(*field);
            // The kinds of these fields are as wide as the fields.
            let bytes = |number: u32| number.to_be_bytes()[4 - load.len()..].to_vec();
            range(load, &bytes(*from), &bytes(to.unwrap_or(*from)), negated)
        }
        _ => return Vec::new(),
    };
    vec![vec![is(STP_HEADER, STP_HEADER_BYTES), is(STP_TYPE, [STP_CONFIGURATION]), field]]
}

/// ebtables compares MAC addresses in ARP only where there are such.
fn arp_mac(load: Load, addr: MacAddr, negated: bool) -> Vec<All> {
    vec![vec![is(field::ARP_HTYPE, ETHERNET), is(field::ARP_HLEN, [6]), value(load, addr.0, negated)]]
}

/// ebtables compares IP addresses in ARP only where there are such.
fn arp_ip(condition: Condition) -> Vec<All> {
    vec![vec![is(field::ARP_PTYPE, IPV4), is(field::ARP_PLEN, [4]), condition]]
}

fn gratuitous(negated: bool) -> Vec<All> {
    let same = |negated| {
        [0, 1, 2, 3].map(|byte| {
            // Where `arp saddr ip` and `arp daddr ip` begin.
            let pair = [14, 24].map(|offset| network_field(offset + byte, 1));
            Condition::SameBytes { pair, negated }
        })
    };
    let guard = [is(field::ARP_PTYPE, IPV4), is(field::ARP_PLEN, [4])];
    negate(same, negated).into_iter().map(|all| guard.iter().cloned().chain(all).collect()).collect()
}

// ---- packets ----

/// The alternatives of a test on IP packets of a family.
pub(crate) fn of_ip(m: &Match<IpTest>, family: Family) -> Result<Vec<All>, Inexpressible> {
    use IpTest as Test;
    let negated = m.negated;
    let by_family = |ipv4, ipv6| if family == Family::Ipv4 { ipv4 } else { ipv6 };
    let source = by_family(field::IP_SADDR, field::IP6_SADDR);
    let destination = by_family(field::IP_DADDR, field::IP6_DADDR);
    Ok(match &m.test {
        Test::SrcMac(addr) => one(value(field::ETHER_SADDR, addr.0, negated)),
        Test::SrcIp(addr) => one(network(source, addr, negated)),
        Test::DstIp(addr) => one(network(destination, addr, negated)),
        Test::SrcIpRange { from, to } => one(range(source, &octets(*from), &octets(*to), negated)),
        Test::DstIpRange { from, to } => one(range(destination, &octets(*from), &octets(*to), negated)),
        Test::IpProtocol(number) => one(value(field::L4PROTO, [*number], negated)),
        Test::SrcPort(range) => one(ports(field::SPORT, range, negated)),
        Test::DstPort(range) => one(ports(field::DPORT, range, negated)),
        Test::Dscp(number) => one(match family {
            Family::Ipv4 => masked(field::IP_TOS, &[0xfc], &[number << 2], negated),
            Family::Ipv6 => traffic_class(0xfc, number << 2, negated),
        }),
        Test::Icmp { kind, code } => icmp(*kind, *code, family, negated),
        Test::ConnlimitAbove(count) => one(Condition::Connlimit {
            source,
            limit: Connlimit { count: u32::from(*count), over: !negated },
        }),
        Test::States(states) => one(connection_state(*states, negated)),
        Test::CtDirection(direction) => {
            let number = u8::from(*direction == CtDirection::Reply);
            one(loaded(field::CT_DIRECTION, [compare(equality(negated), [number])]))
        }
        Test::IpSet { name, .. } => {
            return Err(Inexpressible(format!(
                "nftables cannot look into the ipset '{name}' of the host: make a set of it (nwfilterctl set-define), or \
                 use the backend xtables for this filter"
            )));
        }
        Test::Set { name, family: held, direction } => {
            let is_source = *direction == SetDirection::Src;
            let load = match (held, is_source) {
                (SetFamily::Ipv4 | SetFamily::Ipv6, true) => source,
                (SetFamily::Ipv4 | SetFamily::Ipv6, false) => destination,
                (SetFamily::Mac, true) => field::ETHER_SADDR,
                (SetFamily::Mac, false) => field::ETHER_DADDR,
                (SetFamily::Port, true) => field::SPORT,
                (SetFamily::Port, false) => field::DPORT,
            };
            let (rule, set) = (Rule::new(), sets::kernel_name(name));
            let asked = if negated { rule.is_not_in(&[load], &set) } else { rule.is_in(&[load], &set) };
            one(Condition::Exprs(asked.exprs))
        }
        Test::TcpFlags { mask, set } => one(masked_flags(mask.bits(), set.bits(), negated)),
        Test::TcpOption(kind) => {
            let load = Load::Extension { of: Extended::Tcp, kind: *kind, part: ExtensionPart::Present };
            one(loaded(load, [compare(Relation::Equal, [u8::from(!negated)])]))
        }
        Test::Comment(_) => vec![Vec::new()],
    })
}

fn masked_flags(mask: u8, set: u8, negated: bool) -> Condition {
    // Bits outside the mask can never match. They are not removed, so such a rule matches nothing.
    loaded(field::TCP_FLAGS, [keep([mask]), compare(equality(negated), [set])])
}

/// For iptables the type 255 means any.
fn icmp(kind: u8, code: Option<u8>, family: Family, negated: bool) -> Vec<All> {
    const ANY: u8 = 255;
    let kind_is = |negated| match (kind, family) {
        (ANY, Family::Ipv4) => None,
        _ => Some(value(field::ICMP_TYPE, [kind], negated)),
    };
    let code_is = |negated| code.map(|code| value(field::ICMP_CODE, [code], negated));
    match (kind_is(negated), code_is(negated)) {
        (Some(kind), Some(code)) if negated => vec![vec![kind], vec![code]],
        (Some(kind), code) => vec![std::iter::once(kind).chain(code).collect()],
        // Any type, whatever the code.
        (None, _) if negated => Vec::new(),
        (None, _) => one(loaded(field::ICMP_TYPE, [])),
    }
}

fn connection_state(states: States, negated: bool) -> Condition {
    let bits = [
        (States::INVALID, state::INVALID),
        (States::NEW, state::NEW),
        (States::RELATED, state::RELATED),
        (States::ESTABLISHED, state::ESTABLISHED),
    ];
    let wanted: u32 =
        bits.iter().filter(|(states_bit, _)| states.contains(*states_bit)).map(|(_, bit)| bit).sum();
    // The register has one bit set.
    let relation = if negated { Relation::Equal } else { Relation::NotEqual };
    loaded(field::CT_STATE, [keep(wanted.to_ne_bytes()), compare(relation, [0; 4])])
}

/// The expressions of a condition without a value of a port. `same_bytes` is [`SAME_BYTES`].
pub(crate) fn literal(condition: &Condition, same_bytes: &SetName) -> Vec<Expr> {
    match condition {
        Condition::Value { load, value, negated } => {
            Rule::new().cmp(*load, equality(*negated), value.clone()).exprs
        }
        Condition::Exprs(exprs) => exprs.clone(),
        Condition::SameBytes { pair, negated: false } => Rule::new().is_in(pair, same_bytes).exprs,
        Condition::SameBytes { pair, negated: true } => Rule::new().is_not_in(pair, same_bytes).exprs,
        Condition::Connlimit { .. } => Vec::new(),
    }
}

/// The transport protocol is one.
pub(crate) fn l4proto_is(number: u8) -> Condition {
    is(field::L4PROTO, [number])
}

/// The destination port is one.
pub(crate) fn dport_is(number: u16) -> Condition {
    is(field::DPORT, number.to_be_bytes())
}

/// The packet belongs to a connection. In a bridge the kernel drops whatever else gets to a limit on connections.
pub(crate) fn is_tracked() -> Condition {
    connection_state(States::NEW | States::ESTABLISHED | States::RELATED, false)
}

/// The packet is the first of its connection.
pub(crate) fn is_new() -> Condition {
    connection_state(States::NEW, false)
}
