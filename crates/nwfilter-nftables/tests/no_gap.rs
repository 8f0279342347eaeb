//! While rules change under streams of frames, no forbidden frame gets through and no allowed one is lost.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, Ruleset, instantiate};
use nwfilter_testlab::stream::{Stream, Tally, while_streaming};
use nwfilter_testlab::{Host, Mac, Need, Tap, frames, skip_unless};
use nwfilter_xml::{Filter, read_binding, read_filter};
use nwfilter_xtables::Xtables;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);

/// A ruleset that decides the same of the streams' frames whatever the number; its chains and rules differ.
fn variant(number: u16) -> Arc<Ruleset> {
    let other = 0x9000 + number;
    let filter = format!(
        "<filter name='f{}' chain='root'>
           <rule action='drop' direction='out' priority='-900'><mac match='no' srcmacaddr='$MAC'/></rule>
           <rule action='drop' direction='inout' priority='-800'><mac protocolid='{other}'/></rule>
           <rule action='drop' direction='in' priority='-700'><mac srcmacaddr='{STRANGER}'/></rule>
           <rule action='accept' direction='out' priority='-600'><mac srcmacaddr='$MAC' protocolid='0x88b5'/></rule>
           <rule action='accept' direction='in' priority='-600'><mac dstmacaddr='$MAC' protocolid='0x88b5'/></rule>
           <rule action='drop' direction='inout' priority='500'><mac/></rule>
         </filter>",
        number % 3
    );
    let filter: Filter = read_filter("f.xml", &filter).into_result().unwrap();
    let binding = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='{}'/></filterbinding>",
        filter.name
    );
    let binding = read_binding("b.xml", &binding).into_result().unwrap();
    let filters = BTreeMap::from([(filter.name.clone(), filter)]);
    Arc::new(instantiate(&filters, &binding).unwrap())
}

struct Lab {
    host: Host,
    guest: Tap,
    peer: Tap,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
        // Frames to an address that nobody has sent from yet would be flooded.
        for (mac, name) in [(GUEST, "tap0"), (PEER, "tap1"), (STRANGER, "tap1")] {
            host.run(&["bridge", "fdb", "replace", &mac.to_string(), "dev", name, "master", "static"])
                .unwrap();
        }
        Self { host, guest, peer }
    }

    fn streams(&self) -> [Stream<'_>; 2] {
        let frame = |from, to, number: u32| frames::ethernet(from, to, 0x88b5, &number.to_be_bytes());
        let stream =
            |from, to, allowed, forbidden| Stream { from, to, allowed, forbidden, rest: Duration::ZERO };
        [
            stream(
                &self.guest,
                &self.peer,
                Box::new(move |number| frame(GUEST, PEER, number)),
                vec![
                    frames::ethernet(STRANGER, PEER, 0x88b5, b"spoofed"),
                    frames::ethernet(GUEST, PEER, 0x88b6, b"protocol"),
                ],
            ),
            stream(
                &self.peer,
                &self.guest,
                Box::new(move |number| frame(PEER, GUEST, number)),
                vec![
                    frames::ethernet(STRANGER, GUEST, 0x88b5, b"stranger"),
                    frames::ethernet(PEER, GUEST, 0x88b6, b"protocol"),
                ],
            ),
        ]
    }

    fn apply(&self, backend: &dyn Backend, ruleset: Arc<Ruleset>) {
        let mut batch = Batch::default();
        batch.filter("tap0".parse().unwrap(), ruleset);
        self.host.enter(|| backend.apply(&batch)).unwrap();
    }
}

/// Nothing was lost and nothing leaked, of the many frames that were sent.
fn assert_exact(tally: Tally) {
    eprintln!("{tally:?}");
    assert!(tally.allowed > 0 && tally.forbidden > 0, "{tally:?}");
    assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
}

#[test]
fn two_hundred_redefinitions_let_nothing_through_and_lose_nothing() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("bridge"));
    let lab = Lab::new();
    let nftables = Nftables::new();
    lab.apply(&nftables, variant(0));
    let tally = while_streaming(&lab.streams(), |streaming| {
        (1..=200).for_each(|number| lab.apply(&nftables, variant(number)));
        streaming.take()
    });
    assert_exact(tally.unwrap());
}

#[test]
fn twenty_changes_between_backends_let_nothing_through_and_lose_nothing() {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("bridge"),
        Need::Tool("ebtables"),
        Need::Tool("nft")
    );
    let lab = Lab::new();
    let backends: [Box<dyn Backend>; 2] = [Box::new(Nftables::new()), Box::new(Xtables::default())];
    lab.apply(&*backends[0], variant(0));
    let tally = while_streaming(&lab.streams(), |streaming| {
        for number in 1..=20 {
            let (new, old) = (&backends[number % 2], &backends[(number + 1) % 2]);
            lab.apply(&**new, variant(0));
            lab.host.enter(|| old.clear())?;
            assert!(lab.host.enter(|| old.installed())?.ports.is_empty());
        }
        streaming.take()
    });
    assert_exact(tally.unwrap());
}
