//! A port filtered by libvirt and one filtered by us let through the same frames.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use nwfilter_testlab::conformance::{Case, Pair, Side, fixture_cases, random_case};
use nwfilter_testlab::corpus::close_to_the_corpus;
use nwfilter_testlab::frames::{self, Arp, protocol, tcp_flags};
use nwfilter_testlab::{BRIDGE_MAC, Ends, Mac, Need, Tap, skip_unless};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
const OTHER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);
const GENERATED: usize = 50;

/// How long no frame may arrive before we believe that none will.
const SILENCE: Duration = Duration::from_millis(25);

#[test]
fn the_same_frames_pass_on_both_sides() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Libvirtd);
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../xml-fixtures"));
    let mut cases: Vec<Case> = fixture_cases(fixtures)?;
    cases.retain(|case| !case.name.starts_with("rule "));
    let of_fixtures = cases.len();
    // Of the filters that both sides take, which most of these are.
    let generated = (0..).map(|number| close_to_the_corpus(random_case(50, number), [GUEST, PEER, OTHER]));
    cases.extend(generated.take(2 * GENERATED));

    let (next, seen) = (AtomicUsize::new(0), Mutex::new((0, 0)));
    let worker = || -> Result<()> {
        let mut pair = Pair::new()?;
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let enough = seen.lock().unwrap().1 >= GENERATED;
            let is_fixture = cases[..of_fixtures].contains(case);
            if enough && !is_fixture {
                return Ok(());
            }
            let compared = pair.while_filtered(case, |sides| compare(case, sides))?;
            ensure!(compared.is_some() || !is_fixture, "{} is refused", case.name);
            let mut seen = seen.lock().unwrap();
            seen.0 += usize::from(is_fixture);
            seen.1 += usize::from(compared.is_some() && !is_fixture);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers = [scope.spawn(worker), scope.spawn(worker)];
        workers.into_iter().try_for_each(|worker| worker.join().unwrap())
    })?;
    let (fixtures, generated) = *seen.lock().unwrap();
    assert_eq!(fixtures, of_fixtures);
    assert!(generated >= GENERATED, "only {generated} generated filters were taken by both");
    Ok(())
}

fn compare(case: &Case, sides: [Side<'_>; 2]) -> Result<()> {
    for (what, send) in [
        ("from the guest to its peer", from_guest as fn(&Side<'_>) -> Result<Vec<String>>),
        ("from the peer to the guest", to_guest),
        ("from the guest to the host", to_host),
    ] {
        let [theirs, ours] = sides.each_ref().map(send);
        let (theirs, ours) = (theirs?, ours?);
        ensure!(
            theirs == ours,
            "{}, {what}: libvirt lets through or answers\n{}\nnwfilter\n{}",
            case.name,
            theirs.join("\n"),
            ours.join("\n")
        );
    }
    Ok(())
}

fn from_guest(side: &Side<'_>) -> Result<Vec<String>> {
    passed(side, side.port, side.peer, corpus(GUEST, PEER, false))
}

fn to_guest(side: &Side<'_>) -> Result<Vec<String>> {
    passed(side, side.peer, side.port, corpus(PEER, GUEST, true))
}

fn to_host(side: &Side<'_>) -> Result<Vec<String>> {
    passed(side, side.port, side.peer, corpus(GUEST, BRIDGE_MAC, false))
}

/// What of a corpus arrives at the other port, and what the host answers.
fn passed(side: &Side<'_>, from: &Tap, to: &Tap, corpus: Vec<(String, Vec<u8>)>) -> Result<Vec<String>> {
    // Each filter meets connections that were not there before.
    side.host.run(&["conntrack", "-F"])?;
    from.drain()?;
    to.drain()?;
    for (_, frame) in &corpus {
        from.send(frame)?;
    }
    let mut seen = Vec::new();
    while let Some(frame) = to.recv(SILENCE)? {
        if let Some((name, _)) = corpus.iter().find(|(_, sent)| *sent == frame) {
            seen.push(name.clone());
        }
    }
    while let Some(frame) = from.recv(SILENCE)? {
        // What the host itself says without being asked has no place here.
        if frame[6..12] == BRIDGE_MAC.octets() && frame[12..14] == [0x08, 0x00] {
            seen.push(format!("answer: protocol {} to {:?}", frame[23], &frame[30..34]));
        }
    }
    // The order in which answers come is the host's own affair.
    seen.sort();
    Ok(seen)
}

/// Named frames from one end to another, clean and spoofed, each different from all others.
fn corpus(src: Mac, dst: Mac, reversed: bool) -> Vec<(String, Vec<u8>)> {
    let addr = |last| format!("10.0.0.{last}").parse().unwrap();
    let addr6 = |last| format!("2001:db8::{last}").parse().unwrap();
    let (from, to) = match (reversed, dst == BRIDGE_MAC) {
        (true, _) => (9, 2),
        (false, true) => (2, 254),
        (false, false) => (2, 9),
    };
    let clean = Ends::v4(src, addr(from), dst, addr(to));
    let clean6 = Ends::v6(src, addr6(from), dst, addr6(to));
    let spoofed = Ends::v4(src, addr(66), dst, addr(to));
    let dhcp = Ends::v4(src, addr(if reversed { 254 } else { 2 }), dst, "255.255.255.255".parse().unwrap())
        .with_dst_mac(Mac::BROADCAST);
    let mut corpus: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>| corpus.push((name.to_owned(), frame));
    for (name, ends) in [
        ("clean", clean),
        ("spoofed MAC", clean.with_src_mac(OTHER)),
        ("spoofed IP", spoofed),
        ("clean IPv6", clean6),
        ("spoofed MAC over IPv6", clean6.with_src_mac(OTHER)),
        ("spoofed IPv6", Ends::v6(src, addr6(66), dst, addr6(to))),
    ] {
        for port in [20, 21, 22, 53, 80, 8080] {
            add(&format!("{name}: TCP SYN to {port}"), frames::tcp(&ends, 1000 + port, port, tcp_flags::SYN));
            add(&format!("{name}: UDP to {port}"), frames::udp(&ends, 2000 + port, port, b"data"));
        }
        add(&format!("{name}: TCP ACK out of nowhere"), frames::tcp(&ends, 3000, 22, tcp_flags::ACK));
        add(&format!("{name}: TCP SYN,FIN"), frames::tcp(&ends, 3001, 22, tcp_flags::SYN | tcp_flags::FIN));
        add(&format!("{name}: TCP RST"), frames::tcp(&ends, 3002, 22, tcp_flags::RST));
        add(&format!("{name}: SCTP"), frames::sctp(&ends, 4000, 22));
        add(&format!("{name}: echo request"), frames::icmp_echo(&ends, 1, 1));
        add(&format!("{name}: echo reply"), frames::icmp_echo_reply(&ends, 2, 1));
        add(&format!("{name}: UDP-Lite"), frames::ip(&ends, protocol::UDPLITE, &[4, 0, 0, 22, 0, 8, 0, 0]));
        add(&format!("{name}: ESP"), frames::ip(&ends, protocol::ESP, &[0, 0, 0, 1, 0, 0, 0, 1]));
        add(&format!("{name}: AH"), frames::ip(&ends, protocol::AH, &[59, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]));
        add(&format!("{name}: DSCP 46"), frames::dscp(frames::udp(&ends, 2500, 22, b"data"), 46));
        add(&format!("{name}: bad checksum"), frames::bad_l4_checksum(frames::udp(&ends, 2501, 22, b"data")));
        for (number, fragment) in
            frames::fragments(&frames::udp(&ends, 2502, 22, &[7; 64]), 32).iter().enumerate()
        {
            add(&format!("{name}: fragment {number}"), fragment.clone());
        }
        add(&format!("{name}: VLAN 7"), frames::vlan(7, &frames::udp(&ends, 2503, 22, b"data")));
    }
    add("bad IP checksum", frames::bad_ip_checksum(frames::udp(&clean, 2504, 22, b"data")));
    add("DHCP", frames::udp(&dhcp, if reversed { 67 } else { 68 }, if reversed { 68 } else { 67 }, b"dhcp"));
    let group: std::net::Ipv4Addr = "224.0.0.251".parse().unwrap();
    let multicast = Mac::new([0x01, 0x00, 0x5e, 0, 0, 0xfb]);
    add("IGMP", frames::igmp(&Ends::v4(src, addr(from), multicast, group), group));
    add("multicast", frames::udp(&Ends::v4(src, addr(from), multicast, group), 5353, 5353, b"mdns"));
    for (name, mac, ip) in [("clean", src, from), ("spoofed MAC in", OTHER, from), ("spoofed IP in", src, 66)]
    {
        let (ip, target) = (addr(ip), addr(to));
        add(&format!("{name} ARP request"), frames::arp(src, Mac::BROADCAST, Arp::request(mac, ip, target)));
        add(&format!("{name} ARP reply"), frames::arp(src, dst, Arp::reply(mac, ip, dst, target)));
        add(&format!("{name} gratuitous ARP"), frames::arp(src, Mac::BROADCAST, Arp::gratuitous(mac, ip)));
        add(&format!("{name} RARP"), frames::rarp(src, Mac::BROADCAST, Arp::rarp_request(mac)));
    }
    add("ARP from another MAC", frames::arp(OTHER, dst, Arp::reply(src, addr(from), dst, addr(to))));
    add("RARP from another MAC", frames::rarp(OTHER, Mac::BROADCAST, Arp::rarp_request(OTHER)));
    add("STP", frames::stp(src));
    add("another protocol", frames::ethernet(src, dst, 0x88b5, b"experimental"));
    // A name may stand for one frame only: fragments of spoofed packets are alike where only the IP header differs.
    corpus.dedup_by(|a, b| a.1 == b.1);
    corpus
}
