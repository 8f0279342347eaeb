//! The kernel's trace names the same rules as those that explain a packet on paper.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use anyhow::{Context, Result};
use nwfilter::explain::{Outcome, Packet, StepKind, Way};
use nwfilter::rules::{Backend, Layer};
use nwfilter::xml::{PortDev, read_binding};
use nwfilter::{Config, Driver, Trace, TraceEvent, TraceMatch, TracedPacket};
use nwfilter_nftables::Nftables;
use nwfilter_testlab::frames::{self, Arp, ethernet};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, skip_unless};
use nwfilter_xtables::Xtables;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
const PATIENCE: Duration = Duration::from_secs(20);

/// Its rules use no connection states, which only some kernels have in bridges.
const FILTER: &str = "<filter name='web' chain='root'>
  <filterref filter='no-arp-spoofing'/>
  <filterref filter='no-mac-spoofing'/>
  <rule action='continue' direction='inout' statematch='false'><udp/></rule>
  <rule action='drop' direction='in'><udp dstportstart='53'/></rule>
  <rule action='accept' direction='inout' statematch='false'><udp/></rule>
  <rule action='accept' direction='in' statematch='false'><tcp dstportstart='80'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

struct Lab {
    host: Host,
    driver: Driver,
    port: Tap,
    peer: Tap,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(backend: impl Backend + 'static) -> Result<Self> {
        let host = Host::new()?;
        let (port, peer) = (host.tap("tap0")?, host.tap("tap9")?);
        for (mac, tap) in [(PEER, "tap9"), (GUEST, "tap0")] {
            host.run(&["bridge", "fdb", "replace", &mac.to_string(), "dev", tap, "master", "static"])?;
        }
        let dir = tempfile::tempdir()?;
        let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
        let driver = Driver::open(config, backend)?;
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='web'>
             <parameter name='IP' value='10.0.0.2'/></filterref></filterbinding>"
        );
        host.enter(|| -> Result<()> {
            driver.define_filter("web.xml", FILTER)?;
            driver.create_binding(read_binding("b.xml", &binding).into_result()?)?;
            Ok(())
        })?;
        Ok(Self { host, driver, port, peer, _dir: dir })
    }

    fn trace(&self, wanted: &str) -> Result<Trace<'_>> {
        let wanted: TraceMatch = wanted.parse()?;
        Ok(self.host.enter(|| self.driver.trace(&port(), &wanted))?)
    }

    fn next(&self, trace: &mut Trace<'_>) -> Result<TracedPacket> {
        match self.host.enter(|| trace.next(PATIENCE))?.context("no packet")? {
            TraceEvent::Packet(packet) => Ok(*packet),
            TraceEvent::Missed => anyhow::bail!("packets were missed"),
        }
    }

    fn send(&self, way: Way, frame: &[u8]) -> Result<()> {
        if way == Way::FromGuest { self.port.send(frame) } else { self.peer.send(frame) }
    }
}

fn port() -> PortDev {
    "tap0".parse().unwrap()
}

fn out() -> Ends {
    Ends::v4(GUEST, [10, 0, 0, 2].into(), PEER, [10, 0, 0, 9].into())
}

fn back() -> Ends {
    Ends::v4(PEER, [10, 0, 0, 9].into(), GUEST, [10, 0, 0, 2].into())
}

/// Frames of each kind, some of which each rule matches.
fn packets() -> Vec<(Way, Vec<u8>)> {
    let arp = |from| frames::arp(GUEST, PEER, Arp::reply(GUEST, from, PEER, [10, 0, 0, 9].into()));
    let out6 = Ends::v6(GUEST, "2001:db8::2".parse().unwrap(), PEER, "2001:db8::9".parse().unwrap());
    vec![
        (Way::FromGuest, arp([10, 0, 0, 2].into())),
        (Way::FromGuest, arp([10, 0, 0, 66].into())),
        (Way::FromGuest, ethernet(PEER, PEER, 0x88b5, b"spoofed")),
        (Way::FromGuest, frames::udp(&out(), 53, 5353, b"data")),
        (Way::FromGuest, frames::udp(&out6, 53, 5353, b"data")),
        (Way::FromGuest, frames::tcp(&out(), 40000, 443, 2)),
        (Way::ToGuest, frames::udp(&back(), 40000, 53, b"data")),
        (Way::ToGuest, frames::udp(&back(), 40000, 54, b"data")),
        (Way::ToGuest, frames::tcp(&back(), 40000, 80, 2)),
        (Way::ToGuest, frames::tcp(&back(), 40000, 81, 2)),
        (
            Way::ToGuest,
            frames::arp(PEER, GUEST, Arp::reply(PEER, [10, 0, 0, 9].into(), GUEST, [10, 0, 0, 2].into())),
        ),
    ]
}

/// A rule of a filter: layer, chain and origin.
type Matched = (Layer, String, String);

/// The rules of filters that a packet matches on paper.
fn explained(lab: &Lab, way: Way, packet: &Packet) -> Result<(Outcome, Vec<Matched>)> {
    let explained = lab.host.enter(|| lab.driver.explain(&port()))?;
    let explanation = explained.explainer().explain(way, packet)?;
    let matched = explanation.steps.iter().filter(|step| {
        matches!(step.kind, StepKind::Rule { applies: true, .. }) && step.origin.filter.is_some()
    });
    let matched = matched.map(|step| (step.layer, step.chain.clone(), step.origin.to_string()));
    Ok((explanation.outcome, matched.collect()))
}

fn agree(backend: impl Backend + 'static) -> Result<()> {
    let lab = Lab::new(backend)?;
    let mut trace = lab.trace("")?;
    for (way, frame) in packets() {
        lab.send(way, &frame)?;
        let traced = lab.next(&mut trace)?;
        let packet = Packet::parse(&frame)?;
        let (outcome, matched) = explained(&lab, way, &packet)?;
        let steps = traced.steps.iter().filter(|step| step.origin.filter.is_some());
        let steps: Vec<_> =
            steps.map(|step| (step.layer, step.chain.clone(), step.origin.to_string())).collect();
        assert_eq!((traced.way, traced.outcome, &steps), (way, outcome, &matched), "{packet}: {traced:#?}");
        assert_eq!(traced.packet.map(|packet| packet.to_string()), Some(packet.to_string()));
        assert_eq!(traced.elsewhere, None);
    }
    Ok(())
}

#[test]
fn with_iptables_the_kernel_matches_the_rules_that_are_explained() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("ip"));
    agree(Xtables::default())
}

#[test]
fn with_nftables_the_kernel_matches_the_rules_that_are_explained() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    agree(Nftables::new())
}

#[test]
fn only_what_is_asked_for_is_traced_and_nothing_is_left_behind() -> Result<()> {
    skip_unless!(
        Need::Root,
        Need::Tool("iptables"),
        Need::Tool("ebtables"),
        Need::Tool("ip"),
        Need::Tool("nft")
    );
    let lab = Lab::new(Xtables::default())?;
    let mut trace = lab.trace("udp from 10.0.0.2 to :5353")?;
    lab.send(Way::FromGuest, &frames::udp(&out(), 53, 5354, b"data"))?;
    lab.send(Way::ToGuest, &frames::udp(&back(), 53, 5353, b"data"))?;
    lab.send(Way::FromGuest, &frames::udp(&out(), 53, 5353, b"data"))?;
    let traced = lab.next(&mut trace)?;
    assert_eq!(traced.packet.unwrap().to_string(), "UDP 10.0.0.2:53 → 10.0.0.9:5353");
    drop(trace);
    let tables = || lab.host.run(&["nft", "list", "tables"]);
    assert!(!tables()?.contains("nwfilter-trace"), "{}", tables()?);
    Ok(())
}

#[test]
fn a_drop_by_rules_of_others_is_reported_as_such() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("ip"));
    let lab = Lab::new(Xtables::default())?;
    lab.host.run(&["iptables", "-I", "FORWARD", "-p", "udp", "--dport", "5353", "-j", "DROP"])?;
    let mut trace = lab.trace("")?;
    lab.send(Way::FromGuest, &frames::udp(&out(), 53, 5353, b"data"))?;
    let traced = lab.next(&mut trace)?;
    assert_eq!((traced.outcome, traced.deciding()), (Outcome::Dropped, None));
    assert_eq!(traced.elsewhere.as_deref(), Some("table ip filter, chain FORWARD"));
    Ok(())
}
