//! What passes a port of this backend is what passes one of the backend for iptables and ebtables.
//!
//! Rules on states need the tracking of bridged connections, which not every kernel has: `vm_packets.rs` is about them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{
    Applied, Backend, Batch, EthernetSide, EthernetTest, IpRule, IpTest, Match, Rule, Ruleset, Verdict,
    instantiate,
};
use nwfilter_testlab::conformance::{Case, fixture_cases, random_case};
use nwfilter_testlab::corpus::{Speakers, corpus};
use nwfilter_testlab::{Host, Mac, Need, Tap, skip_unless};
use nwfilter_xml::{Binding, Filter, MacAddr, read_binding};
use nwfilter_xtables::{Settings, Xtables};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
/// How long no frame may arrive before we believe that none will.
const SILENCE: Duration = Duration::from_millis(20);

/// A host with a filtered port and another one.
struct Side {
    host: Host,
    port: Tap,
    peer: Tap,
}

impl Side {
    fn new() -> Result<Self> {
        let host = Host::new()?;
        let (port, peer) = (host.tap("tap0")?, host.tap("tap1")?);
        Ok(Self { host, port, peer })
    }

    fn apply(&self, backend: &dyn Backend, ruleset: Arc<Ruleset>) -> Result<Applied> {
        let mut batch = Batch::default();
        batch.filter("tap0".parse()?, ruleset);
        Ok(self.host.enter(|| backend.apply(&batch))?)
    }

    /// The names of the frames that pass from the guest and to it.
    fn passed(&self) -> Result<[Vec<String>; 2]> {
        let from = Speakers { from: GUEST, from_number: 2, to: PEER, to_number: 9 };
        let to = Speakers { from: PEER, from_number: 9, to: GUEST, to_number: 2 };
        Ok([sent(&self.port, &self.peer, &from)?, sent(&self.peer, &self.port, &to)?])
    }
}

fn sent(from: &Tap, to: &Tap, speakers: &Speakers) -> Result<Vec<String>> {
    from.drain()?;
    to.drain()?;
    let corpus = corpus(speakers);
    let mut seen = Vec::new();
    for (_, frame) in &corpus {
        from.send(frame)?;
    }
    while let Some(frame) = to.recv(SILENCE)? {
        if let Some((name, _)) = corpus.iter().find(|(_, sent)| *sent == frame) {
            seen.push(name.clone());
        }
    }
    seen.sort();
    Ok(seen)
}

fn binding(case: &Case) -> Result<Binding> {
    let last = &case.filters.last().unwrap().name;
    let text = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='{last}'/></filterbinding>"
    );
    let mut binding = read_binding("b.xml", &text).into_result()?;
    binding.params = case.params.clone();
    Ok(binding)
}

fn ruleset(case: &Case) -> Option<Ruleset> {
    let filters: BTreeMap<_, Filter> =
        case.filters.iter().map(|filter| (filter.name.clone(), filter.clone())).collect();
    instantiate(&filters, &binding(case).ok()?).ok()
}

/// The ruleset as far as it needs no tracking of connections and answers nobody.
fn stateless(mut ruleset: Ruleset) -> Ruleset {
    ruleset.helpers.clear();
    for part in [&mut ruleset.ipv4, &mut ruleset.ipv6].into_iter().flatten() {
        for rules in [&mut part.from_guest, &mut part.to_guest] {
            rules
                .retain(|rule: &IpRule| !rule.matches.iter().any(|m| matches!(m.test, IpTest::IpSet { .. })));
            for rule in rules {
                rule.matches.retain(|m| {
                    !matches!(m.test, IpTest::States(_) | IpTest::CtDirection(_) | IpTest::ConnlimitAbove(_))
                });
                if rule.verdict == Verdict::Reject {
                    rule.verdict = Verdict::Drop;
                }
            }
        }
    }
    ruleset
}

#[test]
fn the_same_frames_pass_as_with_iptables_and_ebtables() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../xml-fixtures"));
    let mut cases = fixture_cases(fixtures)?;
    cases.extend((0..100).map(|number| random_case(14, number)));
    let (theirs, ours) = (Side::new()?, Side::new()?);
    let (xtables, nftables) = (Xtables::new(Settings::default()), Nftables::new());
    let (mut compared, mut passed) = (0, 0);
    for case in cases {
        let Some(ruleset) = ruleset(&case).map(stateless).map(Arc::new) else { continue };
        // What the tools refuse is no matter of this backend.
        if theirs.apply(&xtables, ruleset.clone()).is_err() {
            continue;
        }
        ours.apply(&nftables, ruleset.clone()).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        let (theirs, ours_passed) = (theirs.passed()?, ours.passed()?);
        assert_eq!(
            theirs,
            ours_passed,
            "{}: {:#?}\n{}",
            case.name,
            ruleset,
            ours.host.run(&["nft", "list", "ruleset"])?
        );
        compared += 1;
        passed += theirs.iter().flatten().count();
    }
    assert!(compared > 100 && passed > 1000, "{compared} rulesets, {passed} frames");
    Ok(())
}

fn mac(address: &str) -> MacAddr {
    address.parse().unwrap()
}

#[test]
fn ports_of_one_filter_share_its_chains_and_have_their_own_values() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::new()?;
    let nftables = Nftables::new();
    let own_mac = |address: &str| {
        let drop = Rule::built_in([Match::is_not(EthernetTest::SrcMac(mac(address).into()))], Verdict::Drop);
        let mut ruleset = Ruleset::default();
        ruleset.ethernet.from_guest = Some(EthernetSide::of_rules([drop]));
        Arc::new(ruleset)
    };
    let taps = [host.tap("tap0")?, host.tap("tap1")?];
    let mut batch = Batch::default();
    batch.filter("tap0".parse()?, own_mac("52:54:00:7b:35:93"));
    batch.filter("tap1".parse()?, own_mac("52:54:00:00:00:09"));
    let applied = host.enter(|| nftables.apply(&batch))?;
    assert_eq!((applied.changed.len(), applied.commits), (2, 1));

    let listed = host.run(&["nft", "list", "ruleset"])?;
    let roots = listed.lines().filter(|line| line.starts_with("\tchain ") && line.ends_with(".from {"));
    assert_eq!(roots.count(), 1, "{listed}");
    let frame = |from: Mac, to: Mac| nwfilter_testlab::frames::ethernet(from, to, 0x88b5, b"data");
    assert!(taps[0].delivers(&taps[1], &frame(GUEST, PEER))?);
    assert!(!taps[0].delivers(&taps[1], &frame(PEER, PEER))?, "tap1's address does not pass at tap0");
    assert!(taps[1].delivers(&taps[0], &frame(PEER, GUEST))?);
    assert!(!taps[1].delivers(&taps[0], &frame(GUEST, GUEST))?);

    // The last port of a class takes the class along.
    let mut gone = Batch::default();
    gone.remove("tap0".parse()?);
    gone.remove("tap1".parse()?);
    host.enter(|| nftables.apply(&gone))?;
    let listed = host.run(&["nft", "list", "ruleset"])?;
    assert!(!listed.contains(".from") && !listed.contains("tap"), "{listed}");
    assert!(host.enter(|| nftables.installed())?.ports.is_empty());
    Ok(())
}
