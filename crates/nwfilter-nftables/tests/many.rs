//! More ports at once than fit into one transaction.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, EthernetSide, EthernetTest, Match, Rule, Ruleset, Verdict};
use nwfilter_testlab::stream::{Stream, while_streaming};
use nwfilter_testlab::{Host, Mac, Need, frames, skip_unless};
use nwfilter_xml::MacAddr;

const PORTS: usize = 11_000;
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0xff, 0x00, 0x09]);
/// Of the port that has frames.
const GUEST: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0]);

/// Lets port `number` send with its own address, and nothing to the address of its class.
fn ruleset(class: usize, number: usize) -> Arc<Ruleset> {
    let mac = |kind: u8, number: usize| -> MacAddr {
        format!("52:54:{kind:02x}:00:{:02x}:{:02x}", number >> 8, number & 0xff).parse().unwrap()
    };
    let rules = [
        Rule::built_in([Match::is_not(EthernetTest::SrcMac(mac(0, number).into()))], Verdict::Drop),
        Rule::built_in([Match::is(EthernetTest::DstMac(mac(1, class).into()))], Verdict::Drop),
    ];
    let mut ruleset = Ruleset::default();
    ruleset.ethernet.from_guest = Some(EthernetSide::of_rules(rules));
    Arc::new(ruleset)
}

/// Port `tap0` and many that have no interface, in as many classes.
fn batch(classes: std::ops::Range<usize>) -> Batch {
    let mut batch = Batch::default();
    for number in 0..PORTS {
        let name = if number == 0 { "tap0".to_owned() } else { format!("vnet{number}") };
        batch.filter(name.parse().unwrap(), ruleset(classes.start + number % classes.len(), number));
    }
    batch
}

#[test]
fn eleven_thousand_ports_are_filtered_and_redefined_in_parts_without_a_gap() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("bridge"));
    let host = Host::new()?;
    let (guest, peer) = (host.tap("tap0")?, host.tap("tap1")?);
    for (mac, name) in [(GUEST, "tap0"), (PEER, "tap1")] {
        host.run(&["bridge", "fdb", "replace", &mac.to_string(), "dev", name, "master", "static"])?;
    }
    let nftables = Nftables::new();
    let apply = |batch: &Batch| host.enter(|| nftables.apply(batch));
    let (first, second) = (batch(0..10), batch(10..2_010));
    let applied = apply(&first)?;
    assert_eq!(applied.changed.len(), PORTS);
    assert!(applied.commits > 1, "{}", applied.commits);

    let stream = Stream {
        from: &guest,
        to: &peer,
        allowed: Box::new(|number: u32| frames::ethernet(GUEST, PEER, 0x88b5, &number.to_be_bytes())),
        forbidden: vec![frames::ethernet(PEER, PEER, 0x88b5, b"spoofed")],
        rest: Duration::ZERO,
    };
    let tally = while_streaming(&[stream], |streaming| {
        let applied = apply(&second)?;
        assert_eq!(applied.changed.len(), PORTS);
        assert!(applied.commits > 3, "{}", applied.commits);
        streaming.take()
    })?;
    assert!(tally.allowed > 0 && tally.forbidden > 0);
    assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
    assert_eq!(apply(&second)?.commits, 0);

    let mut gone = Batch::default();
    second.ports.keys().for_each(|port| gone.remove(port.clone()));
    assert_eq!(apply(&gone)?.changed.len(), PORTS);
    assert!(host.enter(|| nftables.installed())?.ports.is_empty());
    Ok(())
}
