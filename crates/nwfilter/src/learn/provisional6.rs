//! What a port enforces while the IPv6 address of its guest is learned. libvirt has no such thing; these rulesets
//! are the counterparts of those for IPv4.

use std::net::IpAddr;

use nwfilter_rules::{Ethernet, EthernetSide, Match, Origin, RootEntry, Rule, Ruleset, Test, Verdict};
use nwfilter_xml::MacAddr;

use super::packets::{DHCP6_CLIENT, DHCP6_SERVER};

const ETHERTYPE_IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Router and neighbour solicitations and advertisements; not redirects.
const NEIGHBOUR_DISCOVERY: (u8, u8) = (133, 136);

/// IPv6 passes from the guest's own MAC address, everything passes to it.
pub(crate) fn learning(mac: MacAddr) -> Ruleset {
    let from_guest = [
        rule([not(source(mac))], Verdict::Drop),
        rule([is(Test::EtherType(ETHERTYPE_IPV6))], Verdict::Accept),
        rule([], Verdict::Drop),
    ];
    Ruleset {
        ethernet: Ethernet { from_guest: Some(side(from_guest)), to_guest: None },
        ..Ruleset::default()
    }
}

/// Only DHCPv6 and the neighbour discovery that it needs pass. Answers pass from `servers`, or from any if that is
/// empty.
pub(crate) fn dhcp_only(mac: MacAddr, servers: &[IpAddr]) -> Ruleset {
    let from_guest = [
        rule([not(source(mac))], Verdict::Drop),
        rule(discovery(), Verdict::Accept),
        rule(dhcp(DHCP6_CLIENT, DHCP6_SERVER, None), Verdict::Accept),
        rule([], Verdict::Drop),
    ];
    let senders: Vec<_> =
        if servers.is_empty() { vec![None] } else { servers.iter().copied().map(Some).collect() };
    let answers = senders.into_iter().map(|server| dhcp(DHCP6_SERVER, DHCP6_CLIENT, server));
    let to_guest = [discovery()].into_iter().chain(answers).map(|matches| rule(matches, Verdict::Accept));
    let to_guest = side(to_guest.chain([rule([], Verdict::Drop)]));
    Ruleset {
        ethernet: Ethernet { from_guest: Some(side(from_guest)), to_guest: Some(to_guest) },
        ..Ruleset::default()
    }
}

fn source(mac: MacAddr) -> Test {
    Test::SrcMac { addr: mac, mask: None }
}

fn discovery() -> Vec<Match> {
    vec![
        is(Test::EtherType(ETHERTYPE_IPV6)),
        is(Test::IpProtocol(ICMPV6)),
        is(Test::IcmpRange { kinds: NEIGHBOUR_DISCOVERY, codes: (0, 0) }),
    ]
}

fn dhcp(from: u16, to: u16, server: Option<IpAddr>) -> Vec<Match> {
    let mut matches = vec![
        is(Test::EtherType(ETHERTYPE_IPV6)),
        is(Test::IpProtocol(UDP)),
        is(Test::SrcPort { from, to: None }),
        is(Test::DstPort { from: to, to: None }),
    ];
    matches.extend(server.map(|addr| is(Test::SrcIp { addr, prefix: None })));
    matches
}

fn is(test: Test) -> Match {
    Match { test, negated: false }
}

fn not(test: Test) -> Match {
    Match { test, negated: true }
}

fn rule(matches: impl IntoIterator<Item = Match>, verdict: Verdict) -> Rule {
    Rule { matches: matches.into_iter().collect(), verdict, origin: Origin { filter: None, line: 0 } }
}

fn side(rules: impl IntoIterator<Item = Rule>) -> EthernetSide {
    EthernetSide { root: rules.into_iter().map(RootEntry::Rule).collect(), chains: Vec::new() }
}
