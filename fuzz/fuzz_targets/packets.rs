//! Whatever a frame holds, reading it ends, does not panic, and yields only addresses that a guest can have.
#![no_main]

use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use nwfilter::packets::{Heading, Observation, observe};
use nwfilter_xml::MacAddr;

const GUEST: [u8; 6] = [0x52, 0x54, 0x00, 0x7b, 0x35, 0x93];
const OTHER: [u8; 6] = [0x52, 0x54, 0x00, 0x00, 0x00, 0xfe];

fuzz_target!(|data: &[u8]| {
    let Some((&choice, payload)) = data.split_first() else { return };
    let heading = if choice & 1 == 0 { Heading::FromGuest } else { Heading::ToGuest };
    // Half of the frames get the MAC addresses without which nothing else is looked at.
    let frame = match (choice & 2 == 0, heading) {
        (true, _) => payload.to_vec(),
        (false, Heading::FromGuest) => [&OTHER, &GUEST, payload].concat(),
        (false, Heading::ToGuest) => [&GUEST, &OTHER, payload].concat(),
    };
    let Some(observation) = observe(&frame, heading, MacAddr(GUEST)) else { return };
    assert!(addresses(&observation).into_iter().all(is_usable), "{observation:?}");
    let from_server = matches!(observation, Observation::Grant { .. } | Observation::Refusal { .. });
    assert_eq!(from_server, heading == Heading::ToGuest, "{observation:?}");
});

fn addresses(observation: &Observation) -> Vec<IpAddr> {
    match observation {
        Observation::Arp(address) | Observation::Ipv4(address) => vec![(*address).into()],
        Observation::Neighbour(address) | Observation::Ipv6(address) => vec![(*address).into()],
        Observation::Request { addresses, .. } | Observation::Release(addresses) => addresses.clone(),
        Observation::Grant { leases, .. } => leases.iter().map(|(address, _)| *address).collect(),
        Observation::Refusal { .. } => Vec::new(),
    }
}

fn is_usable(address: IpAddr) -> bool {
    !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
}
