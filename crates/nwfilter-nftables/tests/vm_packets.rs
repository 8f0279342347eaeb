//! Rules on states, conntrack helpers and answers, on a kernel that tracks bridged connections.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{AnyRule, Backend, Batch, IpPart, IpTest, Ruleset, instantiate};
use nwfilter_testlab::conformance::{Case, random_case};
use nwfilter_testlab::corpus::{OTHER, close_to_the_corpus};
use nwfilter_testlab::frames;
use nwfilter_testlab::seed::SeedLab;
use nwfilter_testlab::{Ends, Need, skip_unless};
use nwfilter_xml::{Filter, read_binding, read_filter};
use nwfilter_xtables::{Settings, Xtables};
use support::{GUEST, PEER, Side, fixtures, stock_and};

const BY_PORT: &str = include_str!("../../../xml-fixtures/seed/ftp-by-port.xml");
const BY_STATE: &str = include_str!("../../../xml-fixtures/seed/ftp-by-state.xml");

/// Connections that the guest accepts, and whatever is related to them.
const RELATED_BOTH_WAYS: &str = "<filter name='f' chain='root'><filterref filter='clean-traffic'/>
    <rule action='accept' direction='in'><all state='ESTABLISHED,RELATED'/></rule>
    <rule action='accept' direction='out'><all state='ESTABLISHED,RELATED'/></rule>
    <rule action='accept' direction='in'><tcp dstportstart='21' state='NEW'/></rule>
    <rule action='drop' direction='inout'><all/></rule></filter>";

/// What both ports of the lab must have, with a filter.
fn batch(lab: &SeedLab, text: &str) -> Batch {
    let filter: Filter = read_filter("f.xml", text).into_result().unwrap();
    let mut batch = Batch::default();
    let filters = stock_and(filter.clone());
    for port in SeedLab::PORTS {
        let binding = read_binding("b.xml", &lab.binding(port, filter.name.as_str())).into_result().unwrap();
        batch.filter(port.parse().unwrap(), Arc::new(instantiate(&filters, &binding).unwrap()));
    }
    batch
}

fn keeps_its_promises(text: &str) {
    let lab = SeedLab::new().unwrap();
    lab.host().set_bridge_nf(false).unwrap();
    let batch = batch(&lab, text);
    let nftables = Nftables::new();
    let applied = lab.host().enter(|| nftables.apply(&batch)).unwrap();
    assert_eq!((applied.commits, applied.warnings), (1, Vec::new()));
    let broken: Vec<_> = lab.checks(|_| ()).unwrap().into_iter().filter(|check| !check.holds()).collect();
    let listed = lab.host().run(&["nft", "list", "ruleset"]).unwrap();
    assert_eq!(broken, [], "{listed}");
    let again = lab.host().enter(|| nftables.apply(&batch)).unwrap();
    assert_eq!(again.commits, 0);
}

#[test]
fn the_filter_by_port_lets_through_what_the_manual_says_and_nothing_else() {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"), Need::Tool("ping"));
    keeps_its_promises(BY_PORT);
}

#[test]
fn the_filter_by_state_lets_through_what_the_manual_says_and_nothing_else() {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"), Need::Tool("ping"));
    keeps_its_promises(BY_STATE);
}

#[test]
fn ftp_passes_in_passive_mode_only_where_related_connections_to_the_guest_do() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"));
    let lab = SeedLab::new()?;
    lab.host().set_bridge_nf(false)?;
    let nftables = Nftables::new();
    lab.host().enter(|| nftables.apply(&batch(&lab, BY_STATE)))?;
    assert_eq!((lab.ftp()?, lab.passive_ftp()?), (true, false));
    lab.host().enter(|| nftables.apply(&batch(&lab, RELATED_BOTH_WAYS)))?;
    let listed = lab.host().run(&["nft", "list", "ruleset"])?;
    assert_eq!((lab.ftp()?, lab.passive_ftp()?), (true, true), "{listed}");
    Ok(())
}

fn counts_connections(ruleset: &Ruleset) -> bool {
    ruleset.rules().any(|rule| match rule {
        AnyRule::Ip(rule) => rule.matches.iter().any(|m| matches!(m.test, IpTest::ConnlimitAbove(_))),
        AnyRule::Ethernet(_) => false,
    })
}

fn has_states(part: &IpPart) -> bool {
    let mut matches = part.from_guest.iter().chain(&part.to_guest).flat_map(|rule| &rule.matches);
    matches.any(|m| matches!(m.test, IpTest::States(_) | IpTest::CtDirection(_) | IpTest::ConnlimitAbove(_)))
}

/// What passes on one side only.
fn differences([from, to]: &[Vec<String>; 2], [our_from, our_to]: &[Vec<String>; 2]) -> Vec<String> {
    let only = |a: &[String], b: &[String], what: &str| {
        a.iter().filter(|name| !b.contains(name)).map(|name| format!("{what}: {name}")).collect::<Vec<_>>()
    };
    [
        only(from, our_from, "from the guest, iptables only"),
        only(our_from, from, "from the guest, nftables only"),
        only(to, our_to, "to the guest, iptables only"),
        only(our_to, to, "to the guest, nftables only"),
    ]
    .concat()
}

/// How many generated trees are compared, where the environment does not say.
const TREES: usize = 60;

#[test]
fn with_states_the_same_frames_pass_fixtures_as_with_iptables_and_ebtables() -> Result<()> {
    skip_unless!(
        Need::BridgeConntrack,
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("conntrack")
    );
    let compared = compare(fixtures()?)?;
    assert!(compared > 30, "{compared}");
    Ok(())
}

/// `NWFILTER_TREES=300 cargo xtask vm test --timeout 3600 vm_packets` compares more.
#[test]
fn with_states_the_same_frames_pass_generated_trees_as_with_iptables_and_ebtables() -> Result<()> {
    skip_unless!(
        Need::BridgeConntrack,
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("conntrack")
    );
    let trees = std::env::var("NWFILTER_TREES").map_or(Ok(TREES), |text| text.parse())?;
    let trees = (0..trees).map(|number| close_to_the_corpus(random_case(14, number), [GUEST, PEER, OTHER]));
    let compared = compare(trees)?;
    println!("{compared} trees that have rules on IP packets");
    assert!(compared > 10, "{compared}");
    Ok(())
}

/// Sends the frames of the corpus through a port of either backend for each case with IP rules that both take.
fn compare(cases: impl IntoIterator<Item = Case>) -> Result<usize> {
    let (theirs, ours) = (Side::new()?, Side::new()?);
    ours.host.set_bridge_nf(false)?;
    let (xtables, nftables) = (Xtables::new(Settings::default()), Nftables::new());
    let (mut compared, mut differ) = (0, Vec::new());
    for case in cases {
        let Some(ruleset) = case.ruleset().map(Arc::new) else { continue };
        if !ruleset.has_ip_rules()
            || nftables.check(&ruleset).is_err()
            || theirs.apply(&xtables, ruleset.clone()).is_err()
        {
            continue;
        }
        ours.apply(&nftables, ruleset.clone()).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        // Each filter meets connections that were not there before.
        for side in [&theirs, &ours] {
            side.host.run(&["conntrack", "-F"])?;
        }
        let (of_theirs, of_ours) = (theirs.passed()?, ours.passed()?);
        let mut frames = differences(&of_theirs, &of_ours);
        if counts_connections(&ruleset) {
            // iptables counts packets of no connection, and drops those whose headers it cannot read, when they get to such
            // a rule; here it does not match them. The checksum of the UDP-Lite frames is wrong.
            frames.retain(|name| !name.ends_with("IPv6: AH") && !name.ends_with(": UDP-Lite"));
        }
        if ruleset.ipv6.as_ref().is_none_or(|part| !has_states(part)) {
            // iptables does not put the fragments of a family together whose rules ask about no connection.
            frames.retain(|name| !(name.contains("iptables only") && name.contains("IPv6: fragment")));
        }
        if !frames.is_empty() {
            differ.push(format!("{}: {frames:#?}\n{ruleset:#?}", case.name));
        }
        compared += 1;
    }
    assert!(differ.is_empty(), "{} of {compared} differ\n{}", differ.len(), differ.join("\n"));
    Ok(compared)
}

#[test]
fn what_a_guest_may_not_send_is_answered() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("nft"));
    let text =
        "<filter name='f' chain='root'><rule action='reject' direction='out'><tcp dstportstart='80'/></rule>
        <rule action='reject' direction='out'><tcp-ipv6 dstportstart='80'/></rule>
        <rule action='drop' direction='in'><all state='NONE'/></rule></filter>";
    let filter: Filter = read_filter("f.xml", text).into_result()?;
    let binding = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='f'/></filterbinding>"
    );
    let binding = read_binding("b.xml", &binding).into_result()?;
    let ruleset = instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding)?;
    let side = Side::new()?;
    side.host.set_bridge_nf(false)?;
    side.apply(&Nftables::new(), Arc::new(ruleset))?;
    let ends4 = Ends::v4(GUEST, "10.0.0.2".parse()?, PEER, "10.0.0.9".parse()?);
    let ends6 = Ends::v6(GUEST, "2001:db8::2".parse()?, PEER, "2001:db8::9".parse()?);
    for (ends, protocol_at, icmp) in [(ends4, 23, 1u8), (ends6, 20, 58u8)] {
        let syn = frames::tcp(&ends, 1000, 80, frames::tcp_flags::SYN);
        assert!(!side.port.delivers(&side.peer, &syn)?);
        let answer =
            side.port.expect(Duration::from_secs(2), |frame| frame.get(protocol_at) == Some(&icmp))?;
        assert!(answer.is_some(), "no ICMP unreachable\n{}", side.host.run(&["nft", "list", "ruleset"])?);
        assert!(side.port.delivers(&side.peer, &frames::tcp(&ends, 1000, 81, frames::tcp_flags::SYN))?);
    }
    Ok(())
}
