//! Frames that pass on paper, and those that pass a port with a backend.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unreachable_pub)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nwfilter_explain::{Explainer, IpSets, Outcome, Packet, Way, protocol};
use nwfilter_rules::{Backend, Batch, IpPart, IpTest, Match, Ruleset};
use nwfilter_testlab::conformance::{fixture_cases, random_case};
use nwfilter_testlab::corpus::{OTHER, Speakers, close_to_the_corpus, corpus};
use nwfilter_testlab::{Host, Mac, Tap};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
const FROM_GUEST: Speakers = Speakers { from: GUEST, from_number: 2, to: PEER, to_number: 9 };
const TO_GUEST: Speakers = Speakers { from: PEER, from_number: 9, to: GUEST, to_number: 2 };

/// How long no frame may arrive before we believe that none will.
const SILENCE: Duration = Duration::from_millis(25);

pub struct Lab {
    host: Host,
    port: Tap,
    peer: Tap,
    backend: Box<dyn Backend>,
}

impl Lab {
    pub fn new(backend: impl Backend + 'static, bridge_nf: bool) -> Result<Self> {
        let host = Host::builder().bridge_addr("10.0.0.254/24").bridge_nf(bridge_nf).build()?;
        let (port, peer) = (host.tap("tap0")?, host.tap("tap1")?);
        for (set, family) in [("conformance", "inet"), ("conformance6", "inet6")] {
            host.run(&["ipset", "create", set, "hash:ip,port,ip", "family", family])?;
        }
        Ok(Self { host, port, peer, backend: Box::new(backend) })
    }

    fn apply(&self, ruleset: Arc<Ruleset>) -> Result<()> {
        let mut batch = Batch::default();
        batch.filter("tap0".parse()?, ruleset);
        self.host.enter(|| self.backend.apply(&batch))?;
        Ok(())
    }

    /// The names of the frames that pass.
    fn passed(&self, way: Way) -> Result<BTreeSet<String>> {
        let (from, to, speakers) = match way {
            Way::FromGuest => (&self.port, &self.peer, &FROM_GUEST),
            Way::ToGuest => (&self.peer, &self.port, &TO_GUEST),
        };
        self.host.run(&["conntrack", "-F"])?;
        from.drain()?;
        to.drain()?;
        let corpus = named(speakers);
        for (_, frame) in &corpus {
            from.send(frame)?;
        }
        let mut seen = BTreeSet::new();
        while let Some(frame) = to.recv(SILENCE)?.map(without_id) {
            if let Some((name, _)) = corpus.iter().find(|(_, sent)| without_id(sent.clone()) == frame) {
                seen.insert(name.clone());
            }
        }
        Ok(seen)
    }
}

/// The corpus without frames that come again under another name.
fn named(speakers: &Speakers) -> Vec<(String, Vec<u8>)> {
    let mut known = BTreeSet::new();
    corpus(speakers).into_iter().filter(|(_, frame)| known.insert(frame.clone())).collect()
}

/// The frame without the number that the parts of a packet of IPv6 have in common: the bridge puts the packet together and
/// takes it apart again under another number.
fn without_id(mut frame: Vec<u8>) -> Vec<u8> {
    if frame.get(12..14) == Some(&[0x86, 0xdd]) && frame[20] == protocol::IPV6_FRAGMENT {
        frame[58..62].fill(0);
    }
    frame
}

/// The same on paper, with the way of each frame.
fn explained(ruleset: &Ruleset, way: Way) -> Result<(BTreeSet<String>, BTreeMap<String, String>)> {
    let mut sets = IpSets::default();
    sets.add("conformance", "")?;
    sets.add("conformance6", "")?;
    let mut explainer = Explainer::new(ruleset).with_sets(sets);
    let speakers = if way == Way::FromGuest { &FROM_GUEST } else { &TO_GUEST };
    let (mut passing, mut ways) = (BTreeSet::new(), BTreeMap::new());
    for (name, frame) in named(speakers) {
        let packet = Packet::parse(&frame)?;
        let explanation = explainer.explain(way, &packet)?;
        if explanation.outcome == Outcome::Passes {
            passing.insert(name.clone());
        }
        ways.insert(name, format!("{packet:?}\n{explanation:#?}"));
    }
    // Where the kernel follows connections, parts of a packet pass together or not at all.
    let parts: Vec<_> = ways.keys().filter(|name| name.contains("fragment")).cloned().collect();
    for name in &parts {
        let (packet, _) = name.rsplit_once(' ').context("a number")?;
        let rules = if packet.contains("IPv6") { &ruleset.ipv6 } else { &ruleset.ipv4 };
        let stopped = parts.iter().any(|other| other.starts_with(packet) && !passing.contains(other));
        if rules.as_ref().is_some_and(follows_connections) && stopped {
            passing.remove(name);
        }
    }
    Ok((passing, ways))
}

/// Where the kernel does something else than the rules say:
///
/// * connlimit drops at once what conntrack finds no header in, as IPv6 with an authentication header before nothing;
/// * what is at the place of the ports in a later fragment is compared with ports, where fragments are not put together.
pub fn is_known(ruleset: &Ruleset, frame: &str) -> bool {
    let part = if frame.contains("IPv6") { &ruleset.ipv6 } else { &ruleset.ipv4 };
    let Some(part) = part else { return false };
    let any = |is: fn(&Match<IpTest>) -> bool| {
        part.from_guest.iter().chain(&part.to_guest).any(|rule| rule.matches.iter().any(is))
    };
    if frame.ends_with("fragment 1") || frame.ends_with("fragment 2") {
        return !follows_connections(part)
            && any(|m| match &m.test {
                IpTest::SrcPort(ports) | IpTest::DstPort(ports) => m.negated || ports.to.is_some(),
                _ => false,
            });
    }
    frame.contains("IPv6: AH") && any(|m| matches!(m.test, IpTest::ConnlimitAbove(_)))
}

fn follows_connections(part: &IpPart) -> bool {
    part.from_guest
        .iter()
        .chain(&part.to_guest)
        .flat_map(|rule| &rule.matches)
        .any(|m| matches!(m.test, IpTest::States(_) | IpTest::CtDirection(_) | IpTest::ConnlimitAbove(_)))
}

/// Compares what passes on paper with what passes in the kernel, for the fixtures and this many generated trees.
pub fn compare(
    lab: &Lab,
    trees: usize,
    part: impl Fn(Ruleset) -> Ruleset,
    is_known: impl Fn(&Ruleset, &str) -> bool,
) -> Result<()> {
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../xml-fixtures"));
    let mut cases = fixture_cases(fixtures)?;
    cases.extend(
        (0..trees)
            .map(|number| random_case(15, number))
            .map(|case| close_to_the_corpus(case, [GUEST, PEER, OTHER])),
    );
    let (mut compared, mut passed, mut stopped, mut differing) = (0, 0, 0, Vec::new());
    for case in cases {
        let Some(ruleset) = case.ruleset().map(|ruleset| Arc::new(part(ruleset))) else { continue };
        // What the backend refuses has no meaning.
        if lab.apply(ruleset.clone()).is_err() {
            continue;
        }
        compared += 1;
        for way in [Way::FromGuest, Way::ToGuest] {
            let (paper, ways) = explained(&ruleset, way)?;
            let kernel = lab.passed(way)?;
            passed += kernel.len();
            stopped += ways.len() - kernel.len();
            let differ = paper.symmetric_difference(&kernel).filter(|name| !is_known(&ruleset, name));
            let differ: Vec<_> = differ.cloned().collect();
            if let Some(first) = differ.first() {
                let what = format!("{} {way:?}: {differ:?}", case.name);
                eprintln!("{what}");
                differing.push(format!("{what}\n{}\n{ruleset:#?}", ways[first]));
            }
        }
    }
    println!("{compared} rulesets, {passed} frames pass, {stopped} do not");
    assert!(differing.is_empty(), "{} differ, as\n{}", differing.len(), differing[0]);
    assert!(compared > 70 && passed > 1000 && stopped > 1000, "{compared}, {passed}, {stopped}");
    Ok(())
}

/// How many generated trees are tried: with NWFILTER_EXPLAIN_TREES, others than usual.
pub fn trees(usual: usize) -> usize {
    let asked = std::env::var("NWFILTER_EXPLAIN_TREES").ok().and_then(|count| count.parse().ok());
    asked.unwrap_or(usual)
}
