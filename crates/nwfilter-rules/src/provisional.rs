//! Built-in rulesets, equal to libvirt's, for ports whose filter cannot be enforced yet.

use std::net::{IpAddr, Ipv4Addr};

use nwfilter_xml::MacAddr;

use crate::packet::EthernetTest as Test;
use crate::ruleset::{Ethernet, EthernetSide, Match, Rule, Ruleset, Verdict};

const UDP: u8 = 17;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;

impl Ruleset {
    /// Nothing passes.
    pub fn drop_all() -> Self {
        let drop = || Some(EthernetSide::of_rules([Rule::built_in([], Verdict::Drop)]));
        Self { ethernet: Ethernet { from_guest: drop(), to_guest: drop() }, ..Self::default() }
    }

    /// IPv4 and ARP pass from the guest's own MAC address, everything passes to it: while its IP address is
    /// learned from what it sends.
    pub fn learning(mac: MacAddr) -> Self {
        let from_guest = EthernetSide::of_rules([
            Rule::built_in([Match::is_not(Test::SrcMac(mac.into()))], Verdict::Drop),
            Rule::built_in([Match::is(Test::EtherType(IPV4))], Verdict::Accept),
            Rule::built_in([Match::is(Test::EtherType(ARP))], Verdict::Accept),
            Rule::built_in([], Verdict::Drop),
        ]);
        Self { ethernet: Ethernet { from_guest: Some(from_guest), to_guest: None }, ..Self::default() }
    }

    /// Only DHCP passes, from the guest's own MAC address and to it: while it has no lease. Answers pass from
    /// `servers`, or from any if that is empty.
    pub fn dhcp_only(mac: MacAddr, servers: &[Ipv4Addr]) -> Self {
        let from_guest = EthernetSide::of_rules([
            Rule::built_in(
                [
                    Match::is(Test::SrcMac(mac.into())),
                    Match::is(Test::EtherType(IPV4)),
                    Match::is(Test::IpProtocol(UDP)),
                    Match::is(Test::SrcPort(DHCP_CLIENT_PORT.into())),
                    Match::is(Test::DstPort(DHCP_SERVER_PORT.into())),
                ],
                Verdict::Accept,
            ),
            Rule::built_in([], Verdict::Drop),
        ]);
        let any_server = [None];
        let servers: Vec<_> = servers.iter().copied().map(Some).collect();
        let servers = if servers.is_empty() { &any_server[..] } else { &servers };
        let answers = servers.iter().flat_map(|server| {
            [mac, MacAddr([0xff; 6])].map(|receiver| {
                let from = server.map(|addr| Match::is(Test::SrcIp(IpAddr::V4(addr).into())));
                let matches = [
                    Match::is(Test::DstMac(receiver.into())),
                    Match::is(Test::EtherType(IPV4)),
                    Match::is(Test::IpProtocol(UDP)),
                    Match::is(Test::SrcPort(DHCP_SERVER_PORT.into())),
                    Match::is(Test::DstPort(DHCP_CLIENT_PORT.into())),
                ];
                Rule::built_in(matches.into_iter().chain(from), Verdict::Accept)
            })
        });
        let to_guest = EthernetSide::of_rules(answers.chain([Rule::built_in([], Verdict::Drop)]));
        Self {
            ethernet: Ethernet { from_guest: Some(from_guest), to_guest: Some(to_guest) },
            ..Self::default()
        }
    }
}
