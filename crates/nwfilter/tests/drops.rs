//! What rules stop at ports with CTRL_LOG_DROPS is reported, with the rule, and no verdict changes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nwfilter::explain::Way;
use nwfilter::rules::{Backend, Batch, LogGroup, Ruleset};
use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver, DroppedPacket, Error, Event, Reconciler};
use nwfilter_nftables::Nftables;
use nwfilter_testlab::conformance::fixture_cases;
use nwfilter_testlab::frames::{self, Arp, ethernet};
use nwfilter_testlab::probes::{Stations, probes};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, Verdicts, skip_unless};
use nwfilter_xtables::Xtables;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
const PATIENCE: Duration = Duration::from_secs(20);

/// Its rules use no connection states, which only some kernels have in bridges.
const FILTER: &str = "<filter name='web' chain='root'>
  <filterref filter='no-arp-spoofing'/>
  <filterref filter='no-mac-spoofing'/>
  <rule action='accept' direction='in' statematch='false'><tcp dstportstart='80'/></rule>
  <rule action='drop' direction='inout'><udp/></rule>
  <rule action='drop' direction='in'><tcp/></rule>
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
        let driver = host.enter(|| Driver::open(config, backend))?;
        driver.define_filter("web.xml", FILTER)?;
        Ok(Self { host, driver, port, peer, _dir: dir })
    }

    fn bind(&self, log: &str) -> Result<(), Error> {
        let binding = format!(
            "<filterbinding><owner><name>vm1</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='web'>
             <parameter name='IP' value='10.0.0.2'/>{log}</filterref></filterbinding>"
        );
        let binding = read_binding("b.xml", &binding).into_result().unwrap();
        self.host.enter(|| self.driver.replace_binding(binding)).map(drop)
    }

    /// Reports drops until the first value is gone.
    fn report(&self) -> Result<(Reconciler, Receiver<Event>)> {
        let events = self.driver.subscribe();
        let reconciler = self.host.enter(|| self.driver.keep())?;
        // The kernel lists the groups that are read.
        let readers = "/proc/thread-self/net/netfilter/nfnetlink_log";
        let group = LogGroup::default().to_string();
        let is_read = |text: String| text.lines().any(|line| line.split_whitespace().next() == Some(&group));
        let deadline = Instant::now() + PATIENCE;
        while !self.host.enter(|| fs::read_to_string(readers)).is_ok_and(is_read) {
            ensure!(Instant::now() < deadline, "nobody reads the group");
            std::thread::yield_now();
        }
        Ok((reconciler, events))
    }
}

const LOGGED: &str = "<parameter name='CTRL_LOG_DROPS' value='yes'/>";

fn out() -> Ends {
    Ends::v4(GUEST, [10, 0, 0, 2].into(), PEER, [10, 0, 0, 9].into())
}

fn back() -> Ends {
    Ends::v4(PEER, [10, 0, 0, 9].into(), GUEST, [10, 0, 0, 2].into())
}

fn next_drop(events: &Receiver<Event>) -> Result<Arc<DroppedPacket>> {
    loop {
        if let Event::PacketDropped(dropped) = events.recv_timeout(PATIENCE).context("no drop is reported")? {
            return Ok(dropped);
        }
    }
}

fn is_reported_with_its_rule(backend: impl Backend + 'static) -> Result<()> {
    let lab = Lab::new(backend)?;
    lab.bind(LOGGED)?;
    let (_keeps, events) = lab.report()?;
    let arp = |from| frames::arp(GUEST, PEER, Arp::reply(GUEST, from, PEER, [10, 0, 0, 9].into()));
    for (way, frame, reported) in [
        (
            Way::FromGuest,
            arp([10, 0, 0, 66].into()),
            format!(
                "tap0 out, guest vm1: ARP reply, sender 10.0.0.66, target 10.0.0.9, from {GUEST} \
                 dropped by no-arp-ip-spoofing:6"
            ),
        ),
        (
            Way::FromGuest,
            ethernet(PEER, PEER, 0x88b5, b"spoofed"),
            format!("tap0 out, guest vm1: frame of type 0x88b5 {PEER} → {PEER} dropped by no-mac-spoofing:6"),
        ),
        (
            Way::FromGuest,
            frames::udp(&out(), 53, 5353, b"data"),
            format!(
                "tap0 out, guest vm1: UDP 10.0.0.2:53 → 10.0.0.9:5353 [{GUEST} → {PEER}] dropped by web:8"
            ),
        ),
        (
            Way::ToGuest,
            frames::tcp(&back(), 40000, 81, 2),
            format!(
                "tap0 in, guest vm1: TCP 10.0.0.9:40000 → 10.0.0.2:81 [SYN] [{PEER} → {GUEST}] dropped by web:11"
            ),
        ),
    ] {
        let tap = if way == Way::FromGuest { &lab.port } else { &lab.peer };
        tap.send(&frame)?;
        let dropped = next_drop(&events)?;
        assert_eq!((dropped.to_string(), dropped.way), (reported, way));
    }
    // What passes is not reported: the next one is.
    assert!(lab.port.delivers(&lab.peer, &arp([10, 0, 0, 2].into()))?);
    lab.port.send(&frames::udp(&out(), 53, 5354, b"data"))?;
    assert!(next_drop(&events)?.to_string().contains(":5354"));
    Ok(())
}

#[test]
fn with_iptables_a_drop_is_reported_with_the_line_of_its_rule() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("ip"));
    is_reported_with_its_rule(Xtables::default())
}

#[test]
fn with_nftables_a_drop_is_reported_with_the_line_of_its_rule() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    is_reported_with_its_rule(Nftables::new())
}

fn is_bounded(backend: impl Backend + 'static) -> Result<()> {
    let lab = Lab::new(backend)?;
    lab.bind(LOGGED)?;
    let (_keeps, events) = lab.report()?;
    let frame = ethernet(PEER, PEER, 0x88b5, b"spoofed");
    let begin = Instant::now();
    for _ in 0..1000 {
        lab.port.send(&frame)?;
    }
    let sent_in = begin.elapsed();
    let (mut reported, mut suppressed) = (0, 0);
    while suppressed == 0 {
        match events.recv_timeout(PATIENCE).context("nothing is said to be suppressed")? {
            Event::PacketDropped(_) => reported += 1,
            Event::DropsSuppressed { port, at_least } => {
                assert_eq!(port.as_str(), "tap0");
                suppressed += at_least;
            }
            _ => (),
        }
    }
    assert_eq!(reported, 9);
    // The kernel reports 20 at once, and 20 a second.
    let at_most = 20 + 20 * (sent_in.as_secs() + 2);
    assert!((11..=at_most - 9).contains(&suppressed), "{suppressed} in {sent_in:?}");
    Ok(())
}

#[test]
fn with_iptables_a_thousand_drops_are_ten_messages_a_second() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("ip"));
    is_bounded(Xtables::default())
}

#[test]
fn with_nftables_a_thousand_drops_are_ten_messages_a_second() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    is_bounded(Nftables::new())
}

#[test]
fn ports_are_logged_only_if_their_binding_says_yes() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new(Nftables::new())?;
    let rules = || lab.host.run(&["nft", "list", "ruleset"]);
    lab.bind("")?;
    let without = rules()?;
    lab.bind("<parameter name='CTRL_LOG_DROPS' value='no'/>")?;
    assert_eq!(rules()?, without);
    lab.bind("<parameter name='CTRL_LOG_DROPS' value='YES'/>")?;
    assert!(rules()?.contains("group 7410"), "{}", rules()?);
    lab.bind("")?;
    assert_eq!(rules()?, without);
    let refused = lab.bind("<parameter name='CTRL_LOG_DROPS' value='maybe'/>").unwrap_err().to_string();
    assert!(refused.contains("CTRL_LOG_DROPS") && refused.contains("yes or no"), "{refused}");
    assert_eq!(rules()?, without);
    Ok(())
}

/// The effects of all probes with the rulesets of all fixtures.
fn keeps_its_verdicts(backend: &dyn Backend, at_least: usize) -> Result<()> {
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../xml-fixtures"));
    let host = Host::new()?;
    let taps = [host.tap("tap0")?, host.tap("tap1")?, host.tap("tap2")?];
    let verdicts = Verdicts::new(&host, taps.each_ref(), &Stations::default())?;
    let probes = probes(&Stations::default());
    let apply = |ruleset: Ruleset| {
        let mut batch = Batch::default();
        batch.filter("tap0".parse().unwrap(), Arc::new(ruleset));
        host.enter(|| backend.apply(&batch))
    };
    let mut compared = 0;
    for case in fixture_cases(fixtures)?.into_iter().filter(|case| !case.name.starts_with("rule ")) {
        let Some(ruleset) = case.ruleset() else { continue };
        let logging = ruleset.clone().logging_drops(LogGroup::default());
        if !logging.logs_drops() || apply(ruleset).is_err() {
            continue;
        }
        let without = verdicts.of(&probes)?;
        apply(logging).with_context(|| format!("{}, with logging", case.name))?;
        for (probe, (with, without)) in probes.iter().zip(verdicts.of(&probes)?.iter().zip(&without)) {
            if with != without {
                bail!("{}, {}: {without:?} becomes {with:?}", case.name, probe.name);
            }
        }
        compared += 1;
    }
    ensure!(compared >= at_least, "only {compared} filters");
    Ok(())
}

#[test]
fn with_iptables_no_verdict_changes() -> Result<()> {
    skip_unless!(
        Need::Root,
        Need::Tool("iptables"),
        Need::Tool("ebtables"),
        Need::Tool("ip"),
        Need::Tool("ipset"),
        Need::Tool("conntrack")
    );
    keeps_its_verdicts(&Xtables::default(), 15)
}

#[test]
fn with_nftables_no_verdict_changes() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("conntrack"));
    keeps_its_verdicts(&Nftables::new(), 10)
}
