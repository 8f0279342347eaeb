//! A host with a filtered port, on which rulesets and frames are tried.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nwfilter_rules::{Applied, Backend, Batch, Ruleset};
use nwfilter_testlab::conformance::{Case, fixture_cases};
use nwfilter_testlab::corpus::{Speakers, corpus};
use nwfilter_testlab::{Host, Mac, Tap};
use nwfilter_xml::{Filter, FilterName};

pub const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
pub const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
/// How long no frame may arrive before we believe that none will.
const SILENCE: Duration = Duration::from_millis(20);

/// A host with a filtered port and another one.
pub struct Side {
    pub host: Host,
    pub port: Tap,
    pub peer: Tap,
}

impl Side {
    pub fn new() -> Result<Self> {
        let host = Host::new()?;
        let (port, peer) = (host.tap("tap0")?, host.tap("tap1")?);
        Ok(Self { host, port, peer })
    }

    pub fn apply(&self, backend: &dyn Backend, ruleset: Arc<Ruleset>) -> Result<Applied> {
        let mut batch = Batch::default();
        batch.filter("tap0".parse()?, ruleset);
        Ok(self.host.enter(|| backend.apply(&batch))?)
    }

    /// The names of the frames that pass from the guest and to it.
    pub fn passed(&self) -> Result<[Vec<String>; 2]> {
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
        if let Some((name, _)) =
            corpus.iter().find(|(_, sent)| without_fragment_id(sent) == without_fragment_id(&frame))
        {
            seen.push(name.clone());
        }
    }
    seen.sort();
    Ok(seen)
}

/// The frame without the number that fragments of an IPv6 packet share. The kernel's tracking of bridged connections
/// puts fragments together, and gives those that it makes again a number of its own.
fn without_fragment_id(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(20) == Some(&44) {
        // Behind Ethernet's and IPv6's headers.
        frame.iter_mut().skip(14 + 40 + 4).take(4).for_each(|byte| *byte = 0);
    }
    frame
}

/// The cases of the fixtures.
pub fn fixtures() -> Result<Vec<Case>> {
    fixture_cases(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../xml-fixtures")))
}

/// A filter and those of libvirt that it may include.
pub fn stock_and(filter: Filter) -> BTreeMap<FilterName, Filter> {
    let stock = fixtures().unwrap().into_iter().flat_map(|case| case.filters);
    stock.chain([filter]).map(|filter| (filter.name.clone(), filter)).collect()
}
