//! What frames say, and that malformed ones say nothing: no kernel, no root.

#![allow(clippy::unwrap_used)] // The lint does not see that the helpers are tests.

mod learn_support;

use std::net::{IpAddr, Ipv6Addr};

use dhcproto::v4::{DhcpOption, MessageType, Opcode};
use dhcproto::{Encodable, Encoder, v6};
use learn_support::*;
use nwfilter::packets::{FOREVER, Heading, Observation, observe};
use nwfilter::xml::MacAddr;
use nwfilter_testlab::{Ends, Mac, frames};
use proptest::prelude::*;

const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const SERVER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

fn from_guest(frame: &[u8]) -> Option<Observation> {
    observe(frame, Heading::FromGuest, MacAddr(GUEST.octets()))
}

fn to_guest(frame: &[u8]) -> Option<Observation> {
    observe(frame, Heading::ToGuest, MacAddr(GUEST.octets()))
}

fn grant(seconds: u32) -> Option<Observation> {
    let leases = vec![(ADDRESS.into(), seconds)];
    Some(Observation::Grant { transaction: 7, server: SERVER_ADDRESS.into(), leases })
}

fn dhcp6(kind: v6::MessageType, addresses: &[(Ipv6Addr, u32)]) -> Vec<u8> {
    let mut opts = v6::DhcpOptions::new();
    for &(addr, valid_life) in addresses {
        let address =
            v6::IAAddr { addr, preferred_life: valid_life, valid_life, opts: v6::DhcpOptions::new() };
        opts.insert(v6::DhcpOption::IAAddr(address));
    }
    let mut message = v6::Message::new_with_id(kind, [0, 0, 7]);
    message.opts_mut().insert(v6::DhcpOption::IANA(v6::IANA { id: 1, t1: 0, t2: 0, opts }));
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn reply6(addresses: &[(Ipv6Addr, u32)]) -> Vec<u8> {
    let ends = Ends::v6(SERVER, SERVER6, GUEST, LINK);
    frames::udp(&ends, 547, 546, &dhcp6(v6::MessageType::Reply, addresses))
}

fn request6(kind: v6::MessageType) -> Vec<u8> {
    let group: Ipv6Addr = "ff02::1:2".parse().unwrap();
    let ends = Ends::v6(GUEST, LINK, Mac::new([0x33, 0x33, 0, 1, 0, 2]), group);
    frames::udp(&ends, 546, 547, &dhcp6(kind, &[(ADDRESS6, 60)]))
}

fn good_frames() -> Vec<(Heading, Vec<u8>)> {
    let arp = frames::arp(GUEST, Mac::BROADCAST, frames::Arp::request(GUEST, ADDRESS, SERVER_ADDRESS));
    vec![
        (Heading::FromGuest, arp.clone()),
        (Heading::FromGuest, frames::vlan(5, &arp)),
        (Heading::FromGuest, packet(GUEST, ADDRESS)),
        (Heading::FromGuest, asked(&request(MessageType::Request, ADDRESS), GUEST)),
        (Heading::FromGuest, asked(&request(MessageType::Release, ADDRESS), GUEST)),
        (Heading::FromGuest, request6(v6::MessageType::Request)),
        (Heading::ToGuest, answer(&ack(GUEST, ADDRESS, 60))),
        (Heading::ToGuest, frames::vlan(5, &answer(&ack(GUEST, ADDRESS, 60)))),
        (Heading::ToGuest, reply6(&[(ADDRESS6, 60), (LINK, 0)])),
    ]
}

#[test]
fn a_lease_is_what_a_server_acknowledges_to_this_hardware_address() {
    let with = |change: &dyn Fn(&mut dhcproto::v4::Message)| {
        let mut message = ack(GUEST, ADDRESS, 60);
        change(&mut message);
        to_guest(&answer(&message))
    };
    assert_eq!(with(&|_| ()), grant(60));
    assert_eq!(to_guest(&answer(&ack(GUEST, ADDRESS, FOREVER))), grant(FOREVER));
    assert_eq!(
        to_guest(&answer_from(&ack(GUEST, ADDRESS, 60), SERVER, SERVER_ADDRESS, Mac::BROADCAST)),
        grant(60)
    );
    assert_eq!(to_guest(&answer_from(&ack(GUEST, ADDRESS, 60), SERVER, SERVER_ADDRESS, OTHER)), None);
    assert_eq!(to_guest(&answer_from(&ack(GUEST, ADDRESS, 60), GUEST, SERVER_ADDRESS, GUEST)), None);
    assert_eq!(
        from_guest(&answer_from(&ack(GUEST, ADDRESS, 60), GUEST, ADDRESS, GUEST)),
        Some(Observation::Ipv4(ADDRESS))
    );
    assert_eq!(to_guest(&answer(&ack(OTHER, ADDRESS, 60))), None);
    assert_eq!(to_guest(&answer(&ack(GUEST, ADDRESS, 0))), None);
    assert_eq!(
        with(&|m| {
            m.set_yiaddr([127, 0, 0, 1]);
        }),
        None
    );
    assert_eq!(
        with(&|m| {
            m.set_opcode(Opcode::BootRequest);
        }),
        None
    );
    assert_eq!(
        with(&|m| {
            m.set_htype(dhcproto::v4::HType::Unknown(9));
        }),
        None
    );
    assert_eq!(
        with(&|m| {
            m.set_chaddr(&[0x52; 16]);
        }),
        None
    );
    assert_eq!(
        with(&|m| {
            m.opts_mut().insert(DhcpOption::MessageType(MessageType::Offer));
        }),
        None
    );
    assert_eq!(
        with(&|m| {
            m.opts_mut().remove(dhcproto::v4::OptionCode::AddressLeaseTime);
        }),
        None
    );
    assert_eq!(
        with(&|m| {
            m.opts_mut().remove(dhcproto::v4::OptionCode::MessageType);
        }),
        None
    );
    let nak = dhcp(Opcode::BootReply, MessageType::Nak, GUEST);
    let refusal = Observation::Refusal { transaction: 7, server: SERVER_ADDRESS.into() };
    assert_eq!(to_guest(&answer(&nak)), Some(refusal));
}

#[test]
fn an_option_that_two_readers_could_read_differently_makes_a_message_worthless() {
    let frame_with = |options: &[&[u8]]| {
        let message = bytes(&ack(GUEST, ADDRESS, 60));
        let message = [&message[..240], &options.concat(), &[255]].concat();
        let ends = Ends::v4(SERVER, SERVER_ADDRESS, GUEST, ADDRESS);
        to_guest(&frames::udp(&ends, 67, 68, &message))
    };
    let (kind, time, pad): (&[u8], &[u8], &[u8]) = (&[53, 1, 5], &[51, 4, 0, 0, 0, 60], &[0; 3]);
    assert_eq!(frame_with(&[kind, pad, time]), grant(60));
    assert_eq!(frame_with(&[kind, time, kind]), None, "twice");
    assert_eq!(frame_with(&[kind, kind, time]), None, "twice in a row: one long option");
    assert_eq!(frame_with(&[kind, time, &[51, 4, 0, 0, 0, 1]]), None, "two times");
    assert_eq!(frame_with(&[&[53, 2, 5, 5], time]), None, "too long");
    assert_eq!(frame_with(&[&[53, 0], time]), None, "too short");
    assert_eq!(frame_with(&[kind, &[51, 200, 0, 0, 0, 60]]), None, "behind the end");
    assert_eq!(frame_with(&[&[255], kind, time]), None, "after the last option");
    assert_eq!(frame_with(&[&[52, 1, 3]]), None, "overloaded into the file name");
    let mut cookie = bytes(&ack(GUEST, ADDRESS, 60));
    cookie[236] ^= 1;
    let ends = Ends::v4(SERVER, SERVER_ADDRESS, GUEST, ADDRESS);
    assert_eq!(to_guest(&frames::udp(&ends, 67, 68, &cookie)), None, "no magic cookie");
    let long_hardware = {
        let mut message = bytes(&ack(GUEST, ADDRESS, 60));
        message[2] = 255;
        frames::udp(&ends, 67, 68, &message)
    };
    assert_eq!(to_guest(&long_hardware), None);
}

#[test]
fn fragments_and_cut_packets_grant_nothing() {
    let frame = answer(&ack(GUEST, ADDRESS, 60));
    assert!(frames::fragments(&frame, 280).iter().all(|fragment| to_guest(fragment).is_none()));
    let (heading, frame) = (Heading::ToGuest, frame);
    assert!((0..frame.len()).all(|end| observe(&frame[..end], heading, MacAddr(GUEST.octets())).is_none()));
    let mut huge = ack(GUEST, ADDRESS, 60);
    huge.opts_mut().insert(DhcpOption::Message("x".repeat(250)));
    assert_eq!(to_guest(&answer(&huge)), grant(60));
}

#[test]
fn dhcpv6_grants_every_address_of_an_association_and_takes_back_those_without_time() {
    let (server, address, link) = (IpAddr::from(SERVER6), IpAddr::from(ADDRESS6), IpAddr::from(LINK));
    let both = Observation::Grant { transaction: 7, server, leases: vec![(link, 0), (address, 60)] };
    assert_eq!(to_guest(&reply6(&[(ADDRESS6, 60), (LINK, 0)])), Some(both));
    assert_eq!(to_guest(&reply6(&[])), None);
    assert_eq!(to_guest(&reply6(&[("ff02::1".parse().unwrap(), 60)])), None);
    let asks = Observation::Request { transaction: 7, addresses: vec![address] };
    assert_eq!(from_guest(&request6(v6::MessageType::Renew)), Some(asks));
    assert_eq!(from_guest(&request6(v6::MessageType::Release)), Some(Observation::Release(vec![address])));
}

#[test]
fn a_dhcpv6_option_that_is_too_short_or_too_long_makes_a_message_worthless() {
    let said = |options: &[u8]| {
        let message = [&[7, 0, 0, 7][..], options].concat();
        to_guest(&frames::udp(&Ends::v6(SERVER, SERVER6, GUEST, LINK), 547, 546, &message))
    };
    let lease = [&[0, 5, 0, 24][..], &ADDRESS6.octets(), &[0, 0, 0, 60, 0, 0, 0, 60]].concat();
    let association = [&[0, 3, 0, 40][..], &[0; 12], &lease].concat();
    assert!(said(&association).is_some());
    assert!(said(&[&[0, 99, 0, 1, 0][..], &association].concat()).is_some(), "others do not matter");
    assert_eq!(said(&[&association[..], &[0, 99, 0]].concat()), None);
    assert_eq!(said(&[&association[..], &[0, 99, 0, 9, 1]].concat()), None);
    assert_eq!(said(&[&association[..], &[0, 3, 0, 11], &[0; 11]].concat()), None);
    for length in 0..24 {
        let inner = [&[0, 5, 0, length][..], &ADDRESS6.octets(), &[0; 8]].concat();
        let inner = &inner[..4 + usize::from(length)];
        let outer = [&[0, 3, 0, 12 + inner.len() as u8][..], &[0; 12], inner].concat();
        assert_eq!(said(&outer), None, "{length}");
    }
}

#[test]
fn deeply_nested_dhcpv6_options_are_harmless() {
    let mut nested = Vec::new();
    while nested.len() < 1900 {
        let length = (nested.len() + 12) as u16;
        nested = [&[0, 3][..], &length.to_be_bytes(), &[0; 12], &nested].concat();
    }
    let message = [&[7, 0, 0, 7][..], &nested].concat();
    let ends = Ends::v6(SERVER, SERVER6, GUEST, LINK);
    assert_eq!(to_guest(&frames::udp(&ends, 547, 546, &message)), None);
}

#[test]
fn nothing_is_learned_from_a_spoofed_source() {
    for (heading, mut frame) in good_frames() {
        assert!(observe(&frame, heading, MacAddr(GUEST.octets())).is_some());
        frame[6..12].copy_from_slice(&OTHER.octets());
        let said = observe(&frame, heading, MacAddr(GUEST.octets()));
        assert_eq!(said.is_some(), heading == Heading::ToGuest, "{heading:?} {frame:?}");
    }
}

#[test]
fn every_prefix_of_a_good_frame_is_harmless() {
    for (heading, frame) in good_frames() {
        for end in 0..frame.len() {
            let said = observe(&frame[..end], heading, MacAddr(GUEST.octets()));
            let addresses = |said: &Observation| match said {
                Observation::Arp(address) | Observation::Ipv4(address) => *address == ADDRESS,
                Observation::Ipv6(address) => *address == LINK,
                _ => false,
            };
            assert!(said.as_ref().is_none_or(addresses), "{end} of {frame:?}: {said:?}");
        }
    }
}

fn is_usable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_unspecified() && !address.is_multicast() && !address.is_loopback(),
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast() && !address.is_loopback(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_reader_panic_or_believe_an_unusable_address(
        which in 0..9_usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in any::<prop::sample::Index>(),
    ) {
        let (heading, mut frame) = good_frames().swap_remove(which);
        for (at, byte) in edits {
            let at = at.index(frame.len());
            frame[at] = byte;
        }
        if cut.index(4) == 0 {
            frame.truncate(cut.index(frame.len()));
        }
        let addresses: Vec<IpAddr> = match observe(&frame, heading, MacAddr(GUEST.octets())) {
            Some(Observation::Arp(address) | Observation::Ipv4(address)) => vec![address.into()],
            Some(Observation::Neighbour(address) | Observation::Ipv6(address)) => vec![address.into()],
            Some(Observation::Request { addresses, .. } | Observation::Release(addresses)) => addresses,
            Some(Observation::Grant { leases, .. }) => leases.into_iter().map(|(address, _)| address).collect(),
            _ => Vec::new(),
        };
        prop_assert!(addresses.into_iter().all(is_usable));
    }

    #[test]
    fn random_bytes_say_nothing_that_panics(frame in prop::collection::vec(any::<u8>(), 0..400)) {
        observe(&frame, Heading::FromGuest, MacAddr(GUEST.octets()));
        observe(&frame, Heading::ToGuest, MacAddr(GUEST.octets()));
    }
}
