//! Rulesets of a port while its guest's IPv6 address is learned. libvirt does not learn IPv6 addresses; these rulesets
//! correspond to those for IPv4.

use std::net::IpAddr;

use nwfilter_rules::{Ethernet, EthernetSide, EthernetTest as Test, Match, Rule, Ruleset, Verdict};
use nwfilter_xml::MacAddr;

use super::packets::{DHCP6_CLIENT, DHCP6_SERVER};

const ETHERTYPE_IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Router and neighbour solicitations and advertisements; not redirects.
const NEIGHBOUR_DISCOVERY: (u8, u8) = (133, 136);

/// IPv6 passes from the guest's own MAC address; everything passes to the guest.
pub(crate) fn learning(mac: MacAddr) -> Ruleset {
    let from_guest = [
        Rule::built_in([Match::is_not(source(mac))], Verdict::Drop),
        Rule::built_in([Match::is(Test::EtherType(ETHERTYPE_IPV6))], Verdict::Accept),
        Rule::built_in([], Verdict::Drop),
    ];
    Ruleset {
        ethernet: Ethernet { from_guest: Some(EthernetSide::of_rules(from_guest)), to_guest: None },
        ..Ruleset::default()
    }
}

/// Only DHCPv6 and the neighbour discovery that it needs pass. Answers pass from `servers`, or from any if that is
/// empty.
pub(crate) fn dhcp_only(mac: MacAddr, servers: &[IpAddr]) -> Ruleset {
    let from_guest = [
        Rule::built_in([Match::is_not(source(mac))], Verdict::Drop),
        Rule::built_in(discovery(), Verdict::Accept),
        Rule::built_in(dhcp(DHCP6_CLIENT, DHCP6_SERVER, None), Verdict::Accept),
        Rule::built_in([], Verdict::Drop),
    ];
    let senders: Vec<_> =
        if servers.is_empty() { vec![None] } else { servers.iter().copied().map(Some).collect() };
    let answers = senders.into_iter().map(|server| dhcp(DHCP6_SERVER, DHCP6_CLIENT, server));
    let to_guest =
        [discovery()].into_iter().chain(answers).map(|matches| Rule::built_in(matches, Verdict::Accept));
    let to_guest = EthernetSide::of_rules(to_guest.chain([Rule::built_in([], Verdict::Drop)]));
    Ruleset {
        ethernet: Ethernet { from_guest: Some(EthernetSide::of_rules(from_guest)), to_guest: Some(to_guest) },
        ..Ruleset::default()
    }
}

fn source(mac: MacAddr) -> Test {
    Test::SrcMac(mac.into())
}

fn discovery() -> Vec<Match<Test>> {
    vec![
        Match::is(Test::EtherType(ETHERTYPE_IPV6)),
        Match::is(Test::IpProtocol(ICMPV6)),
        Match::is(Test::IcmpRange { kinds: NEIGHBOUR_DISCOVERY, codes: (0, 0) }),
    ]
}

fn dhcp(from: u16, to: u16, server: Option<IpAddr>) -> Vec<Match<Test>> {
    let mut matches = vec![
        Match::is(Test::EtherType(ETHERTYPE_IPV6)),
        Match::is(Test::IpProtocol(UDP)),
        Match::is(Test::SrcPort(from.into())),
        Match::is(Test::DstPort(to.into())),
    ];
    matches.extend(server.map(|addr| Match::is(Test::SrcIp(addr.into()))));
    matches
}
