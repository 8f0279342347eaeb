//! Packets that are rejected on their way to a guest are answered, on a kernel that tracks bridged connections.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_nftables::Nftables;
use nwfilter_nftables::kernel::{Logged, PacketLog};
use nwfilter_rules::{Applied, Backend, Batch, LogGroup, NoAnswer, Ruleset, Warning, instantiate};
use nwfilter_testlab::frames::{self, tcp_flags};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, skip_unless};
use nwfilter_xml::{Filter, PortDev, read_binding, read_filter};
use support::{GUEST, PEER};

/// Connections to port 80 of the guest are refused, with and without states, and by its address.
const REFUSES: &str = "<filter name='f' chain='root'>
    <rule action='drop' direction='in'><tcp dstportstart='79'/></rule>
    <rule action='reject' direction='in'><tcp dstportstart='80' state='NEW'/></rule>
    <rule action='reject' direction='in'><tcp-ipv6 dstportstart='80'/></rule></filter>";

/// Nothing but answers gets to the guest.
const ASKS: &str = "<filter name='f' chain='root'>
    <rule action='accept' direction='out'><all state='NEW,ESTABLISHED'/></rule>
    <rule action='accept' direction='in'><all state='ESTABLISHED'/></rule>
    <rule action='drop' direction='in'><all state='NONE'/></rule></filter>";

fn apply(host: &Host, backend: &Nftables, ports: &[(&str, Mac, &str)]) -> Result<Applied> {
    apply_as(host, backend, ports, |ruleset| ruleset)
}

fn apply_as(
    host: &Host,
    backend: &Nftables,
    ports: &[(&str, Mac, &str)],
    change: fn(Ruleset) -> Ruleset,
) -> Result<Applied> {
    let mut batch = Batch::default();
    for (port, mac, text) in ports {
        let filter: Filter = read_filter("f.xml", text).into_result()?;
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{port}'/><mac address='{mac}'/><filterref filter='f'/></filterbinding>"
        );
        let binding = read_binding("b.xml", &binding).into_result()?;
        let ruleset = instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding)?;
        batch.filter(port.parse()?, Arc::new(change(ruleset)));
    }
    let applied = host.enter(|| backend.apply(&batch))?;
    assert_eq!(host.enter(|| Nftables::new().plan(&batch))?.differences, []);
    Ok(applied)
}

/// Those of a guest and its peer, with the place of the protocol in their answers, and ICMP's number.
fn speakers() -> [(Ends, usize, u8); 2] {
    let ends4 = Ends::v4(PEER, "10.0.0.9".parse().unwrap(), GUEST, "10.0.0.2".parse().unwrap());
    let ends6 = Ends::v6(PEER, "2001:db8::9".parse().unwrap(), GUEST, "2001:db8::2".parse().unwrap());
    [(ends4, 23, 1), (ends6, 20, 58)]
}

fn is_refused(from: &Tap, guest: &Tap) -> Result<()> {
    for (ends, protocol_at, icmp) in speakers() {
        let syn = |port| frames::tcp(&ends, 1000, port, tcp_flags::SYN);
        assert!(!from.delivers(guest, &syn(80))?);
        let answer = from.expect(Duration::from_secs(2), |frame| {
            frame.get(protocol_at) == Some(&icmp) && frame[6..12] == GUEST.octets()
        })?;
        assert!(answer.is_some(), "nobody tells the sender");
        assert!(from.delivers(guest, &syn(81))?);
    }
    Ok(())
}

#[test]
fn a_neighbour_gets_an_answer_when_a_packet_to_a_guest_is_rejected() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::builder().bridge_nf(false).build()?;
    let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    let backend = Nftables::new();
    assert_eq!(apply(&host, &backend, &[("tap0", GUEST, REFUSES)])?.warnings, []);
    is_refused(&peer, &guest)?;
    // The neighbour is a guest, too, whose filter lets answers pass and rejects nothing.
    apply(&host, &backend, &[("tap1", PEER, ASKS)])?;
    is_refused(&peer, &guest)?;
    let mut gone = Batch::default();
    gone.remove("tap0".parse()?);
    host.enter(|| backend.apply(&gone))?;
    let listed = host.run(&["nft", "list", "ruleset"])?;
    assert!(!listed.contains("toward") && !listed.contains("answers"), "{listed}");
    assert!(peer.delivers(&guest, &frames::tcp(&speakers()[0].0, 1000, 80, tcp_flags::SYN))?);
    Ok(())
}

#[test]
fn no_answer_is_sent_for_a_guest_of_another_bridge_with_the_same_address() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::builder().bridge_nf(false).build()?;
    let [guest, peer, other, other_peer] =
        ["tap0", "tap1", "tap2", "tap3"].map(|name| host.tap(name).unwrap());
    host.ip(&[
        "link add br1 type bridge",
        "link set br1 up",
        "link set tap2 master br1",
        "link set tap3 master br1",
    ])?;
    apply(&host, &Nftables::new(), &[("tap0", GUEST, REFUSES)])?;
    is_refused(&peer, &guest)?;
    assert!(other_peer.delivers(&other, &frames::tcp(&speakers()[0].0, 1000, 80, tcp_flags::SYN))?);
    Ok(())
}

#[test]
fn of_two_guests_of_a_bridge_with_one_mac_address_one_gets_answers_and_the_other_a_warning() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::builder().bridge_nf(false).build()?;
    let [guest, peer, _other] = ["tap0", "tap1", "tap2"].map(|name| host.tap(name).unwrap());
    let backend = Nftables::new();
    apply(&host, &backend, &[("tap0", GUEST, REFUSES)])?;
    let warnings = apply(&host, &backend, &[("tap2", GUEST, REFUSES)])?.warnings;
    let port: PortDev = "tap2".parse()?;
    assert_eq!(warnings, [Warning::NoAnswer { port, why: NoAnswer::MacShared }]);
    is_refused(&peer, &guest)?;
    Ok(())
}

#[test]
fn what_is_rejected_on_its_way_to_a_guest_is_logged_once_with_the_address_of_the_guest() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("nft"));
    const GROUP: LogGroup = LogGroup(9);
    let host = Host::builder().bridge_nf(false).build()?;
    let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    apply_as(&host, &Nftables::new(), &[("tap0", GUEST, REFUSES)], |ruleset| ruleset.logging_drops(GROUP))?;
    let mut log = host.enter(|| PacketLog::open(GROUP.0))?.unwrap();
    is_refused(&peer, &guest)?;
    // The last one to come: a packet that is dropped where it leaves the bridge.
    peer.send(&frames::tcp(&speakers()[0].0, 1000, 79, tcp_flags::SYN))?;
    let mut logged = Vec::new();
    while logged.len() < 3 {
        let mut ready = [PollFd::new(log.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::from(10_000u16))?, 1, "{logged:?}");
        for packet in log.logged()? {
            let Logged::Packet(packet) = packet else { panic!("some are missed") };
            assert_eq!(packet.link[..6], GUEST.octets());
            logged.push((packet.prefix, packet.output.is_some()));
        }
    }
    let line = |number: u32, leaves| (format!("nwfilter:in:f:{number}"), leaves);
    assert_eq!(logged, [line(3, false), line(4, false), line(2, true)]);
    Ok(())
}
