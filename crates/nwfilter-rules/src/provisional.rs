//! What a port enforces before its filter can be: rulesets of our own, the same as libvirt's.

use std::net::{IpAddr, Ipv4Addr};

use nwfilter_xml::MacAddr;

use crate::ruleset::{Ethernet, EthernetSide, Match, Origin, RootEntry, Rule, Ruleset, Test, Verdict};

const UDP: u8 = 17;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;

impl Ruleset {
    /// Nothing passes.
    pub fn drop_all() -> Self {
        let drop = || Some(side([rule([], Verdict::Drop)]));
        Self { ethernet: Ethernet { from_guest: drop(), to_guest: drop() }, ..Self::default() }
    }

    /// IPv4 and ARP pass from the guest's own MAC address, everything passes to it: while its IP address is
    /// learned from what it sends.
    pub fn learning(mac: MacAddr) -> Self {
        let from_guest = side([
            rule([not(Test::SrcMac { addr: mac, mask: None })], Verdict::Drop),
            rule([is(Test::EtherType(IPV4))], Verdict::Accept),
            rule([is(Test::EtherType(ARP))], Verdict::Accept),
            rule([], Verdict::Drop),
        ]);
        Self { ethernet: Ethernet { from_guest: Some(from_guest), to_guest: None }, ..Self::default() }
    }

    /// Only DHCP passes, from the guest's own MAC address and to it: while it has no lease. Answers pass from
    /// `servers`, or from any if that is empty.
    pub fn dhcp_only(mac: MacAddr, servers: &[Ipv4Addr]) -> Self {
        let from_guest = side([
            rule(
                [
                    is(Test::SrcMac { addr: mac, mask: None }),
                    is(Test::EtherType(IPV4)),
                    is(Test::IpProtocol(UDP)),
                    is(Test::SrcPort { from: DHCP_CLIENT_PORT, to: None }),
                    is(Test::DstPort { from: DHCP_SERVER_PORT, to: None }),
                ],
                Verdict::Accept,
            ),
            rule([], Verdict::Drop),
        ]);
        let any_server = [None];
        let servers: Vec<_> = servers.iter().copied().map(Some).collect();
        let servers = if servers.is_empty() { &any_server[..] } else { &servers };
        let answers = servers.iter().flat_map(|server| {
            [mac, MacAddr([0xff; 6])].map(|receiver| {
                let from = server.map(|addr| is(Test::SrcIp { addr: IpAddr::V4(addr), prefix: None }));
                let matches = [
                    is(Test::DstMac { addr: receiver, mask: None }),
                    is(Test::EtherType(IPV4)),
                    is(Test::IpProtocol(UDP)),
                    is(Test::SrcPort { from: DHCP_SERVER_PORT, to: None }),
                    is(Test::DstPort { from: DHCP_CLIENT_PORT, to: None }),
                ];
                rule(matches.into_iter().chain(from), Verdict::Accept)
            })
        });
        let to_guest = side(answers.chain([rule([], Verdict::Drop)]));
        Self {
            ethernet: Ethernet { from_guest: Some(from_guest), to_guest: Some(to_guest) },
            ..Self::default()
        }
    }
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
