//! Frames and captures of any bytes are read and explained without panic, and connections end as they do in the kernel.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use nwfilter_explain::{
    Connection, Explainer, Ip, Packet, State, Tcp, Tracker, Transport, Way, frames, protocol, tcp_flag,
};
use nwfilter_rules::Ruleset;
use nwfilter_testlab::Mac;
use nwfilter_testlab::corpus::{OTHER, Speakers, corpus};
use proptest::prelude::*;

fn any_corpus_frame() -> impl Strategy<Value = Vec<u8>> {
    let speakers = Speakers { from: OTHER, from_number: 2, to: Mac::BROADCAST, to_number: 9 };
    prop::sample::select(corpus(&speakers)).prop_map(|(_, frame)| frame)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read_as_a_frame_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(Packet::parse(&bytes).is_err(), bytes.len() < 14);
    }

    #[test]
    fn frames_with_wrong_bytes_or_cut_off_are_explained(
        frame in any_corpus_frame(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut frame = frame;
        for (at, byte) in changes {
            let at = at.index(frame.len());
            frame[at] = byte;
        }
        let length = frame.len() - cut.index(frame.len() - 14);
        frame.truncate(length);
        let packet = Packet::parse(&frame).unwrap();
        prop_assert!(!packet.to_string().is_empty());
        let mut ruleset = Ruleset::drop_all();
        ruleset.ipv4 = Some(Default::default());
        for way in [Way::FromGuest, Way::ToGuest] {
            prop_assert!(!Explainer::new(&ruleset).explain(way, &packet).unwrap().passes());
        }
    }

    #[test]
    fn any_bytes_are_a_capture_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let with_header = [&[0xd4, 0xc3, 0xb2, 0xa1][..], &[0; 16], &[1, 0, 0, 0], &bytes].concat();
        if let Ok(frames) = frames(&with_header) {
            prop_assert_eq!(frames.iter().map(|frame| frame.len() + 16).sum::<usize>(), bytes.len());
        }
    }
}

fn segment(by_client: bool, flags: u8) -> Ip {
    let (client, server) = (("192.0.2.7".parse().unwrap(), 40000), ("10.0.0.2".parse().unwrap(), 80));
    let (from, to) = if by_client { (client, server) } else { (server, client) };
    let tcp = Tcp { src: from.1, dst: to.1, flags, ..Tcp::default() };
    Ip::new(from.0, to.0, protocol::TCP, Transport::Tcp(tcp))
}

#[test]
fn a_connection_is_new_until_it_is_answered_and_invalid_out_of_turn() {
    use tcp_flag::{ACK, RST, SYN};
    let (mut tracker, ruleset) = (Tracker::default(), Ruleset::default());
    let mut state = |by_client, flags| {
        let ip = segment(by_client, flags);
        let Connection { state, .. } = tracker.look(&ip);
        tracker.passed(&ip, Way::ToGuest, &ruleset);
        state
    };
    assert_eq!(state(false, SYN | ACK), State::Invalid, "an answer to nothing");
    assert_eq!(state(true, SYN), State::New);
    assert_eq!(state(true, SYN), State::New, "sent again");
    assert_eq!(state(true, ACK), State::Invalid, "before the answer");
    assert_eq!(state(false, SYN | ACK), State::Established);
    assert_eq!(state(true, ACK), State::Established);
    assert_eq!(state(true, SYN | RST), State::Invalid, "flags that exclude each other");
    assert_eq!(state(false, RST), State::Established);
    assert_eq!(state(true, SYN), State::Established, "the kernel keeps what was closed for a while");
}
