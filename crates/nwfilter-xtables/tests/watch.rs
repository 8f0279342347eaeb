//! Of the changes that are made to the kernel's rules, those of others are told that may concern ports, and no more.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nwfilter_rules::{Backend, Batch, ForeignChange, KernelObject, Ruleset, Watch, instantiate};
use nwfilter_testlab::{Host, Need, Tap, Tools, skip_unless};
use nwfilter_xml::{read_binding, read_filter};
use nwfilter_xtables::Xtables;

/// A host with one filtered port, and a watch.
struct Lab {
    host: Host,
    watch: Box<dyn Watch>,
    _tap: Tap,
}

impl Lab {
    fn new() -> Result<Self> {
        let host = Host::new()?;
        let tap = host.tap("tap0")?;
        let watch = host.enter(|| Xtables::default().watch())?.context("no watch")?;
        let mut lab = Self { host, watch, _tap: tap };
        lab.apply(&[22])?;
        Ok(lab)
    }

    /// Has the backend filter the port.
    fn apply(&mut self, tcp_ports: &[u16]) -> Result<()> {
        let mut batch = Batch::default();
        batch.filter("tap0".parse()?, Arc::new(ruleset(tcp_ports)?));
        self.host.enter(|| Xtables::default().apply(&batch))?;
        Ok(())
    }

    /// What is told of a command. The kernel has told it when the command ends.
    fn told(&mut self, command: &str) -> Result<Vec<ForeignChange>> {
        self.watch.changes()?;
        self.host.run(&command.split(' ').collect::<Vec<_>>())?;
        Ok(self.watch.changes()?)
    }
}

/// What port tap0 has that accepts ARP and connections to these ports.
fn ruleset(tcp_ports: &[u16]) -> Result<Ruleset> {
    let rule = |port: &u16| {
        format!(
            "<rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule>
             <rule action='accept' direction='in'><tcp-ipv6 dstportstart='{port}'/></rule>"
        )
    };
    let rules: String = tcp_ports.iter().map(rule).collect();
    let filter = read_filter(
        "f.xml",
        &format!("<filter name='f'>{rules}<rule action='accept' direction='out'><arp/></rule></filter>"),
    )
    .into_result()?;
    let binding = read_binding(
        "b.xml",
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/></filterbinding>",
    )
    .into_result()?;
    Ok(instantiate(&BTreeMap::from([(filter.name.clone(), Arc::new(filter))]), &binding)?)
}

#[test]
fn changes_of_others_are_reported_with_their_place_and_process() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let mut lab = Lab::new()?;
    for (command, program, what) in [
        ("iptables -I FORWARD 1 -j ACCEPT", "iptables", "iptables: FORWARD"),
        ("iptables -D FORWARD 1", "iptables", "iptables: FORWARD"),
        ("iptables -A FI-tap0 -j ACCEPT", "iptables", "iptables: FI-tap0"),
        ("iptables -F libvirt-in", "iptables", "iptables: libvirt-in"),
        ("iptables -P INPUT DROP", "iptables", "iptables: INPUT"),
        ("ip6tables -F FO-tap0", "ip6tables", "ip6tables: FO-tap0"),
        ("iptables -t raw -I PREROUTING 1 -j ACCEPT", "iptables", "iptables raw, iptables raw: PREROUTING"),
        ("ebtables -t nat -F PREROUTING", "ebtables", "ebtables: PREROUTING"),
        ("nft flush chain bridge nat libvirt-I-tap0", "nft", "ebtables: libvirt-I-tap0"),
        ("nft delete table ip raw", "nft", "iptables raw,"),
    ] {
        let told = lab.told(command)?;
        let [change] = &told[..] else { panic!("{command}: {told:?}") };
        let shown = change.to_string();
        assert!(shown.starts_with(&format!("{program} (process ")), "{command}: {shown}");
        assert!(shown.contains(&format!(") changed {what}")), "{command}: {shown}");
    }
    let told = lab.told("nft flush ruleset")?;
    assert!(matches!(&told[..], [change] if change.more), "{told:?}");
    Ok(())
}

#[test]
fn changes_that_concern_no_port_are_not_reported() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let mut lab = Lab::new()?;
    for command in [
        "iptables -N theirs",
        "iptables -A theirs -j DROP",
        "iptables -A OUTPUT -j theirs",
        "iptables -t mangle -A FORWARD -j ACCEPT",
        "iptables -t nat -A PREROUTING -j ACCEPT",
        "ebtables -A FORWARD -j ACCEPT",
        "ebtables -t nat -A OUTPUT -j ACCEPT",
        "nft add table inet filter",
        "nft add chain inet filter FORWARD",
        "nft add rule inet filter FORWARD accept",
        "iptables -L",
        "iptables-save",
    ] {
        assert_eq!(lab.told(command)?, [], "{command}");
    }
    Ok(())
}

#[test]
fn changes_of_the_backend_itself_are_not_reported() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let mut lab = Lab::new()?;
    assert_eq!(lab.watch.changes()?, []);
    lab.told("iptables -F")?;
    lab.apply(&[22, 80])?;
    lab.apply(&[])?;
    lab.apply(&[22])?;
    assert_eq!(lab.watch.changes()?, []);
    assert_eq!(lab.told("iptables -F FI-tap0")?.len(), 1);
    Ok(())
}

#[test]
fn changes_beyond_what_can_be_followed_are_reported_as_one() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"));
    let mut lab = Lab::new()?;
    lab.watch.changes()?;
    let rules =
        "-A theirs -s 192.0.2.1 -m comment --comment 0123456789012345678901234567890123456789 -j DROP\n";
    let text = format!("*filter\n:theirs - [0:0]\n{}COMMIT\n", rules.repeat(8000));
    // The backlog holds more than one run of the tool makes.
    for _ in 0..8 {
        lab.host.run_with_stdin(&["iptables-restore", "--noflush"], &text)?;
    }
    let told = lab.watch.changes()?;
    assert!(told.iter().any(|change| *change == ForeignChange::unknown()), "{told:?}");
    assert_eq!(lab.told("iptables -F FI-tap0")?.len(), 1);
    Ok(())
}

#[test]
fn a_legacy_tool_is_asked_every_few_seconds() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables-legacy"));
    let host = Host::new()?;
    if let Err(error) = host.run(&["iptables-legacy", "-t", "filter", "-nL"]) {
        eprintln!("skipped: this kernel has no legacy iptables: {error}");
        return Ok(());
    }
    Tools::legacy()?.run_test("with_the_legacy_tools_of_the_search_path")
}

#[test]
#[ignore = "run by the test of the legacy tools"]
fn with_the_legacy_tools_of_the_search_path() -> Result<()> {
    let host = Host::new()?;
    ensure!(host.run(&["iptables", "--version"])?.contains("legacy"));
    let mut watch = host.enter(|| Xtables::default().watch())?.context("no watch")?;
    ensure!(watch.interval().is_some_and(|interval| interval < Duration::from_secs(30)));
    let mut expected = Vec::new();
    for tool in ["iptables", "ip6tables"] {
        host.run(&[tool, "-A", "FORWARD", "-j", "ACCEPT"])?;
        expected.push(ForeignChange::at(KernelObject::Table { table: tool.to_owned() }));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut told = Vec::new();
    while told.is_empty() {
        ensure!(Instant::now() < deadline, "nothing is told");
        std::thread::sleep(Duration::from_millis(50));
        told = host.enter(|| watch.changes())?;
    }
    assert_eq!(told, expected);
    // What the kernel gives word of is told at once, as ever.
    host.run(&["ebtables", "-t", "nat", "-P", "PREROUTING", "DROP"])?;
    assert_eq!(host.enter(|| watch.changes())?.len(), 1);
    Ok(())
}
