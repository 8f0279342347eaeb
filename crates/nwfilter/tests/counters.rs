//! What rules count is found by the filter's rule, whatever they became in the kernel.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use anyhow::Result;
use nwfilter::rules::{Backend, Count, Counts, Origin};
use nwfilter::xml::{PortDev, read_binding};
use nwfilter::{Config, Driver, Fake};
use nwfilter_nftables::Nftables;
use nwfilter_testlab::frames::{self, ethernet};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, skip_unless};
use nwfilter_xtables::Xtables;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);

/// Its rules use no connection states, which only some kernels have in bridges.
const FILTER: &str = "<filter name='web' chain='root'>
  <rule action='drop' direction='out' priority='100'><mac match='no' srcmacaddr='$MAC'/></rule>
  <rule action='drop' direction='in'><udp dstportstart='53'/></rule>
  <rule action='accept' direction='inout' statematch='false'><udp/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

fn binding(port: &str) -> String {
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='{port}'/><mac address='{GUEST}'/><filterref filter='web'/></filterbinding>"
    )
}

struct Lab {
    host: Host,
    driver: Driver,
    ports: [Tap; 2],
    peer: Tap,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(backend: impl Backend + 'static) -> Result<Self> {
        let host = Host::new()?;
        let (ports, peer) = ([host.tap("tap0")?, host.tap("tap1")?], host.tap("tap9")?);
        // What the bridge floods is counted for each port that it would leave by.
        host.run(&["bridge", "fdb", "replace", &PEER.to_string(), "dev", "tap9", "master", "static"])?;
        let dir = tempfile::tempdir()?;
        let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
        let driver = Driver::open(config, backend)?;
        host.enter(|| -> Result<()> {
            driver.define_filter("web.xml", FILTER)?;
            for port in ["tap0", "tap1"] {
                driver.create_binding(read_binding("b.xml", &binding(port)).into_result()?)?;
            }
            Ok(())
        })?;
        Ok(Self { host, driver, ports, peer, _dir: dir })
    }

    fn counters(&self) -> Result<Counts> {
        Ok(self.host.enter(|| self.driver.counters())?)
    }

    /// Sends these frames from the guest at each of these ports, and waits until the last of them was seen to pass.
    fn send(&self, port: &Tap, frame: &[u8], times: usize) -> Result<()> {
        for _ in 0..times {
            port.send(frame)?;
        }
        let end = frames::udp(&ends(), 1, 2, b"end");
        assert!(port.delivers(&self.peer, &end)?);
        Ok(())
    }

    /// The counted packets of a rule, by the line of the filter that it is written on.
    fn rule(&self, number: usize) -> Result<Origin> {
        let line = self.driver.filter(&"web".parse()?)?.rules().nth(number).unwrap().place.line;
        Ok(format!("web:{line}").parse()?)
    }
}

fn ends() -> Ends {
    Ends::v4(GUEST, [10, 0, 0, 2].into(), PEER, [10, 0, 0, 9].into())
}

fn port(name: &str) -> PortDev {
    name.parse().unwrap()
}

fn ports(names: &[&str]) -> BTreeSet<PortDev> {
    names.iter().map(|name| port(name)).collect()
}

fn packets(counts: &Counts, of: &[&str], origin: &Origin) -> Option<u64> {
    let rule = counts.rules.iter().find(|rule| *rule.ports == ports(of) && rule.origin == *origin);
    rule.map(|rule| rule.count.packets)
}

#[test]
fn with_iptables_each_port_counts_for_itself() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("ip"));
    let lab = Lab::new(Xtables::default())?;
    let [spoofed, accepted, dropped] = [lab.rule(0)?, lab.rule(2)?, lab.rule(3)?];
    assert_eq!(packets(&lab.counters()?, &["tap0"], &spoofed), Some(0));
    lab.send(&lab.ports[0], &ethernet(PEER, GUEST, 0x88b5, b"spoofed"), 3)?;
    lab.send(&lab.ports[1], &frames::tcp(&ends(), 1, 22, 2), 2)?;
    let counts = lab.counters()?;
    assert!(counts.differing.is_empty());
    assert_eq!(packets(&counts, &["tap0"], &spoofed), Some(3));
    assert_eq!(packets(&counts, &["tap1"], &spoofed), Some(0));
    assert_eq!(packets(&counts, &["tap0"], &dropped), Some(0));
    assert_eq!(packets(&counts, &["tap1"], &dropped), Some(2));
    // The end of each series.
    let by_rule = counts.by_rule();
    let sum =
        |origin: &Origin| by_rule.iter().find(|rule| rule.origin == *origin).map(|rule| rule.count.packets);
    assert_eq!((sum(&spoofed), sum(&accepted), sum(&dropped)), (Some(3), Some(2), Some(2)));
    let stopped: Vec<_> = counts.stopped_by_port().into_values().map(|count| count.packets).collect();
    assert_eq!(stopped, [3, 2]);
    // TCP without options is 40 bytes from the IP header on.
    let bytes = counts.rules.iter().find(|rule| *rule.ports == ports(&["tap1"]) && rule.origin == dropped);
    assert_eq!(bytes.map(|rule| rule.count), Some(Count { packets: 2, bytes: 80 }));
    let alone = lab.host.enter(|| lab.driver.port_counters(&port("tap1")))?;
    let of_tap1 = counts.rules.iter().filter(|rule| *rule.ports == ports(&["tap1"])).cloned();
    assert_eq!(alone.rules, of_tap1.collect::<Vec<_>>());

    // What the kernel lost is not counted, and said.
    lab.host.run(&["iptables", "-F", "FI-tap1"])?;
    let counts = lab.counters()?;
    assert_eq!(counts.differing, ports(&["tap1"]));
    assert_eq!(packets(&counts, &["tap0"], &spoofed), Some(3));
    Ok(())
}

#[test]
fn with_nftables_ports_of_one_filter_count_together() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let lab = Lab::new(Nftables::new())?;
    let [spoofed, accepted, dropped] = [lab.rule(0)?, lab.rule(2)?, lab.rule(3)?];
    lab.send(&lab.ports[0], &ethernet(PEER, GUEST, 0x88b5, b"spoofed"), 3)?;
    lab.send(&lab.ports[1], &frames::tcp(&ends(), 1, 22, 2), 2)?;
    let counts = lab.counters()?;
    assert!(counts.differing.is_empty());
    let both = ["tap0", "tap1"];
    let of = |origin| packets(&counts, &both, origin);
    assert_eq!((of(&spoofed), of(&accepted), of(&dropped)), (Some(3), Some(2), Some(2)));
    assert_eq!(lab.host.enter(|| lab.driver.port_counters(&port("tap0")))?, counts);
    Ok(())
}

#[test]
fn counts_of_a_manager_without_a_kernel_are_those_that_it_was_given() -> Result<()> {
    let (dir, fake) = (tempfile::tempdir()?, Fake::new());
    let driver = Driver::builder()
        .config_dir(dir.path().join("filters"))
        .state_dir(dir.path().join("bindings"))
        .host(nwfilter::Host::fake())
        .without_learner();
    let driver = driver.open(fake.clone())?;
    driver.define_filter("web.xml", FILTER)?;
    driver.create_binding(read_binding("b.xml", &binding("vnet0")).into_result()?)?;
    let rule = driver.counters()?.rules.pop().unwrap().origin;
    let count = Count { packets: 7, bytes: 420 };
    fake.set_count(&port("vnet0"), &rule, count);
    assert_eq!(driver.counters()?.rules.pop().unwrap().count, count);
    Ok(())
}
