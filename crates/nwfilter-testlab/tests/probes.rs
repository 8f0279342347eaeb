//! The probes are what they promise, and what becomes of their frames is seen.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use etherparse::SlicedPacket;
use nwfilter_testlab::probes::{self, Place, Probe, Stations};
use nwfilter_testlab::{Arrival, Host, Need, Tap, Verdicts, What, skip_unless};
use nwfilter_xml::Protocol;

const NEEDS: [Need; 4] = [Need::Root, Need::Tool("ip"), Need::Tool("bridge"), Need::Tool("conntrack")];

fn probes() -> Vec<Probe> {
    probes::probes(&Stations::default())
}

struct Lab {
    host: Host,
    taps: [Tap; 3],
}

impl Lab {
    fn new(bridge_nf: bool) -> Self {
        let host = Host::builder().bridge_nf(bridge_nf).build().unwrap();
        let taps = ["tap0", "tap1", "tap2"].map(|name| host.tap(name).unwrap());
        Self { host, taps }
    }

    fn verdicts(&self) -> Verdicts<'_> {
        Verdicts::new(&self.host, self.taps.each_ref(), &Stations::default()).unwrap()
    }
}

/// Where the frames of a probe got as they were.
fn places(arrivals: &[Arrival]) -> BTreeSet<Place> {
    arrivals
        .iter()
        .filter(|arrival| matches!(arrival.what, What::Step(_)))
        .map(|arrival| arrival.at)
        .collect()
}

#[test]
fn the_list_is_the_same_each_time_and_no_two_probes_are_equal() {
    let probes = probes();
    assert_eq!(probes, self::probes());
    let names: BTreeSet<_> = probes.iter().map(|probe| &probe.name).collect();
    assert_eq!(names.len(), probes.len());
    for (number, probe) in probes.iter().enumerate() {
        let same = probes[..number].iter().find(|other| other.steps == probe.steps);
        assert_eq!(same.map(|same| &same.name), None, "{} is the same", probe.name);
    }
}

#[test]
fn every_protocol_of_the_language_has_frames_to_the_guest_and_from_it() {
    let of = |protocol: Protocol, frame: &[u8]| {
        let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
        let carries = |family: u16, protocol: u8| {
            let at = if family == 0x0800 { 23 } else { 20 };
            ethertype == family && frame.get(at) == Some(&protocol)
        };
        match protocol {
            Protocol::Mac => true,
            Protocol::Arp => ethertype == 0x0806,
            Protocol::Rarp => ethertype == 0x8035,
            Protocol::Vlan => ethertype == 0x8100,
            Protocol::Stp => frame[..6] == [0x01, 0x80, 0xc2, 0, 0, 0],
            Protocol::Ip | Protocol::All => ethertype == 0x0800,
            Protocol::Ipv6 | Protocol::AllOn6 => ethertype == 0x86dd,
            Protocol::Tcp => carries(0x0800, 6),
            Protocol::Udp => carries(0x0800, 17),
            Protocol::UdpLite => carries(0x0800, 136),
            Protocol::Esp => carries(0x0800, 50),
            Protocol::Ah => carries(0x0800, 51),
            Protocol::Sctp => carries(0x0800, 132),
            Protocol::Icmp => carries(0x0800, 1),
            Protocol::Igmp => carries(0x0800, 2),
            Protocol::TcpOn6 => carries(0x86dd, 6),
            Protocol::UdpOn6 => carries(0x86dd, 17),
            Protocol::UdpLiteOn6 => carries(0x86dd, 136),
            Protocol::EspOn6 => carries(0x86dd, 50),
            Protocol::AhOn6 => carries(0x86dd, 51),
            Protocol::SctpOn6 => carries(0x86dd, 132),
            Protocol::Icmpv6 => carries(0x86dd, 58),
        }
    };
    let probes = probes();
    for spec in nwfilter_xml::schema::PROTOCOLS {
        for from in [Place::Guest, Place::Neighbour] {
            let mut steps = probes.iter().flat_map(|probe| &probe.steps);
            let found = steps.any(|step| step.from == from && of(spec.protocol, &step.frame));
            assert!(found, "{:?} from {from:?}", spec.protocol);
        }
    }
}

#[test]
fn every_frame_is_well_formed_unless_its_name_says_otherwise() {
    for probe in probes() {
        // The parser takes the data of an IPv6 fragment for a header.
        for step in probe.steps.iter().filter(|_| !probe.name.contains("fragment")) {
            let parsed = SlicedPacket::from_ethernet(&step.frame);
            assert_eq!(parsed.is_err(), probe.name.contains("cut off"), "{}: {parsed:?}", probe.name);
        }
    }
}

#[test]
fn without_a_filter_every_frame_arrives() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3]);
    let lab = Lab::new(false);
    let probes = probes();
    let verdicts = lab.verdicts().of(&probes).unwrap();
    for (probe, arrivals) in probes.iter().zip(&verdicts) {
        let seen = places(arrivals);
        let (_, to) = probe.name.split_once(" to ").unwrap();
        let goal = match to.split_once(':').unwrap().0 {
            "neighbour" => Place::Neighbour,
            "guest" => Place::Guest,
            _ => Place::Host,
        };
        // The bridge keeps LLDP to itself, and the host's IP stack gets neither tags nor what is not whole.
        let odd = [
            "in VLAN",
            "in fragments",
            "fragment alone",
            "cut off",
            "bad IP checksum",
            "from no address",
            "253",
        ];
        let is_odd = odd.iter().any(|odd| probe.name.contains(odd));
        let lost = match goal {
            Place::Host
                if probe.name.contains("IPv6 UDP from no address") || probe.name.contains("ARP, cut off") =>
            {
                false
            }
            Place::Host if is_odd => true,
            _ => probe.name.contains("LLDP"),
        };
        assert_eq!(seen.contains(&goal), !lost, "{}: {arrivals:?}", probe.name);
        if goal == Place::Neighbour && !lost {
            let all: Vec<_> = (0..probe.steps.len()).map(What::Step).collect();
            assert!(all.iter().all(|step| arrivals.iter().any(|a| a.what == *step)), "{}", probe.name);
        }
    }
}

#[test]
fn what_a_filter_drops_or_refuses_does_not_arrive_and_all_else_does() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3], Need::Tool("iptables"), Need::Tool("ebtables"));
    let lab = Lab::new(true);
    let probes = probes();
    let verdicts = lab.verdicts();
    let before = verdicts.of(&probes).unwrap();
    for rule in [
        "ebtables -A FORWARD -i tap0 -p arp -j DROP",
        "iptables -A FORWARD -p tcp --dport 22 -m conntrack --ctstate NEW -j REJECT --reject-with tcp-reset",
        "iptables -A INPUT -p udp --dport 53 -j DROP",
        "iptables -A OUTPUT -p icmp --icmp-type echo-request -j DROP",
    ] {
        lab.host.run(&rule.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let after = verdicts.of(&probes).unwrap();
    let mut changed = BTreeSet::new();
    for (probe, (before, after)) in probes.iter().zip(before.iter().zip(&after)) {
        if before != after {
            changed.insert(probe.name.as_str());
            let frames: Vec<_> = probe.steps.iter().map(|step| &step.frame).collect();
            let matches = |ethertype, protocol| {
                frames[0][12..14] == u16::to_be_bytes(ethertype)
                    && (ethertype != 0x0800 || frames[0][23] == protocol)
            };
            let due = matches(0x0806, 0) || [1, 6, 17].iter().any(|protocol| matches(0x0800, *protocol));
            assert!(due, "{}:\n{before:?}\n{after:?}", probe.name);
        }
    }
    let others = |name: &str| {
        let probe = probes.iter().position(|probe| probe.name == name).unwrap();
        after[probe].iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    for name in [
        "guest to neighbour: ARP reply, clean",
        "guest to host: IPv4 UDP to 53",
        "host to guest: IPv4 echo request",
    ] {
        assert!(changed.contains(name), "{changed:?}");
        assert_eq!(others(name), Vec::<String>::new());
    }
    let refused = others("guest to neighbour: IPv4 TCP SYN to 22");
    assert!(
        refused.len() == 1 && refused[0].contains("flags 0x14") && refused[0].contains("reaches guest"),
        "{refused:?}"
    );
    assert_eq!(others("guest to neighbour: IPv4 TCP SYN to 80"), ["0 reaches neighbour"]);
    assert_eq!(others("neighbour to guest: ARP reply, clean"), ["0 reaches guest"]);
    assert_eq!(verdicts.of(&probes).unwrap(), after, "the verdicts are the same each time");
}
