//! Connections of each bridge are apart, on a kernel that tracks bridged connections.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, Ruleset, instantiate};
use nwfilter_testlab::frames::{self, tcp_flags};
use nwfilter_testlab::seed::SeedLab;
use nwfilter_testlab::{Ends, Host, Need, skip_unless};
use nwfilter_xml::{Filter, read_binding, read_filter};
use support::{GUEST, PEER, stock_and};

/// The guest opens connections, answers pings, and gets nothing else.
const OPENS: &str = "<filter name='opens' chain='root'>
    <rule action='accept' direction='out'><all state='NEW,ESTABLISHED'/></rule>
    <rule action='accept' direction='in'><icmp state='NEW'/></rule>
    <rule action='accept' direction='in'><all state='ESTABLISHED'/></rule>
    <rule action='drop' direction='in'><all/></rule></filter>";

fn opens(port: &str) -> Arc<Ruleset> {
    let filter: Filter = read_filter("f.xml", OPENS).into_result().unwrap();
    let binding = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='{port}'/><mac address='{GUEST}'/><filterref filter='opens'/></filterbinding>"
    );
    let binding = read_binding("b.xml", &binding).into_result().unwrap();
    Arc::new(instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding).unwrap())
}

fn filter(host: &Host, backend: &Nftables, ports: &[&str]) -> Result<()> {
    let mut batch = Batch::default();
    ports.iter().for_each(|port| batch.filter(port.parse().unwrap(), opens(port)));
    host.enter(|| backend.apply(&batch))?;
    Ok(())
}

/// Adds the bridge `br1`, and moves ports there.
fn second_bridge(host: &Host, ports: &[&str]) -> Result<()> {
    let moves = ports.iter().map(|port| format!("link set {port} master br1"));
    let begin = ["link add br1 type bridge", "link set br1 up"].map(String::from);
    host.ip(&begin.into_iter().chain(moves).collect::<Vec<_>>())
}

#[test]
fn guests_with_the_same_addresses_on_two_bridges_do_not_share_connections() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::builder().bridge_nf(false).build()?;
    let [one, peer, other, other_peer] = ["tap0", "tap1", "tap2", "tap3"].map(|name| host.tap(name).unwrap());
    let backend = Nftables::new();
    filter(&host, &backend, &["tap0"])?;
    // A bridge that comes later has its zone, too.
    second_bridge(&host, &["tap2", "tap3"])?;
    filter(&host, &backend, &["tap2"])?;
    let ends = Ends::v4(GUEST, "10.0.0.2".parse()?, PEER, "10.0.0.9".parse()?);
    for (first, second, port) in
        [([&one, &peer], [&other, &other_peer], 80), ([&other, &other_peer], [&one, &peer], 81)]
    {
        let open = frames::tcp(&ends, 1000, port, tcp_flags::SYN);
        let answer = frames::tcp(&ends.reverse(), port, 1000, tcp_flags::SYN | tcp_flags::ACK);
        assert!(first[0].delivers(first[1], &open)?);
        // Nobody asked on this bridge.
        assert!(!second[1].delivers(second[0], &answer)?, "{}", host.run(&["nft", "list", "ruleset"])?);
        assert!(first[1].delivers(first[0], &answer)?);
        assert!(second[0].delivers(second[1], &open)?);
        assert!(second[1].delivers(second[0], &answer)?);
    }
    Ok(())
}

#[test]
fn the_host_and_guests_of_every_bridge_talk_to_each_other() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("ping"));
    let host = Host::builder().bridge_nf(false).bridge_addr("10.0.0.254/24").build()?;
    let one = host.guest("vnet0", GUEST).addr("10.0.0.2/24").start()?;
    let other = host.guest("vnet1", GUEST).addr("10.0.1.2/24").start()?;
    second_bridge(&host, &["vnet1"])?;
    host.ip(&["addr add 10.0.1.254/24 dev br1"])?;
    filter(&host, &Nftables::new(), &["vnet0", "vnet1"])?;
    for (guest, subnet) in [(&one, "10.0.0"), (&other, "10.0.1")] {
        assert!(guest.ping(&format!("{subnet}.254"))?, "guest in {subnet} to host");
        assert!(host.netns().ping(&format!("{subnet}.2"))?, "host to guest in {subnet}");
    }
    Ok(())
}

#[test]
fn a_filter_with_a_helper_works_on_a_bridge_with_a_zone() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"), Need::Tool("ping"));
    let lab = SeedLab::new()?;
    lab.host().set_bridge_nf(false)?;
    let _first = lab.host().tap("tap9")?;
    let backend = Nftables::new();
    filter(lab.host(), &backend, &["tap9"])?;
    second_bridge(lab.host(), &["vnet0", "tap0", "outside0", "outside1"])?;
    let text = include_str!("../../../xml-fixtures/seed/ftp-by-state.xml");
    let seed: Filter = read_filter("f.xml", text).into_result().unwrap();
    let filters = stock_and(seed.clone());
    let mut batch = Batch::default();
    for port in SeedLab::PORTS {
        let binding = read_binding("b.xml", &lab.binding(port, seed.name.as_str())).into_result().unwrap();
        batch.filter(port.parse()?, Arc::new(instantiate(&filters, &binding)?));
    }
    lab.host().enter(|| backend.apply(&batch))?;
    let broken: Vec<_> = lab.checks(|_| ())?.into_iter().filter(|check| !check.holds()).collect();
    assert_eq!(broken, [], "{}", lab.host().run(&["nft", "list", "ruleset"])?);
    Ok(())
}

#[test]
fn connections_are_kept_apart_only_while_a_filter_asks_about_them() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::builder().bridge_nf(false).build()?;
    let _taps = [host.tap("tap0")?, host.tap("tap1")?];
    let backend = Nftables::new();
    let listed = || host.run(&["nft", "list", "ruleset"]);
    let mut plain = Batch::default();
    plain.filter("tap1".parse()?, Arc::new(Ruleset::drop_all()));
    host.enter(|| backend.apply(&plain))?;
    assert!(!listed()?.contains("zone"), "{}", listed()?);
    filter(&host, &backend, &["tap0"])?;
    assert!(listed()?.contains("elements = { \"br0\" }"), "{}", listed()?);
    // Another process finds nothing to do, and leaves the bridge where it is.
    let mut again = plain.clone();
    again.filter("tap0".parse()?, opens("tap0"));
    assert_eq!(host.enter(|| Nftables::new().plan(&again))?.differences, []);
    let ports = host.enter(|| Nftables::new().installed())?.ports;
    assert_eq!(ports.iter().map(|port| port.as_str()).collect::<Vec<_>>(), ["tap0", "tap1"]);
    let mut gone = Batch::default();
    gone.remove("tap0".parse()?);
    host.enter(|| backend.apply(&gone))?;
    assert!(!listed()?.contains("zone"), "{}", listed()?);
    Ok(())
}
