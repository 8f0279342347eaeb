//! A host whose filtered ports are under streams of frames, and filters that all decide the same about them.

// Each test file uses its part.
#![allow(dead_code, clippy::unwrap_used)]

use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;

use nwfilter_testlab::frames::{self, Arp};
use nwfilter_testlab::stream::{Stream, Tally};
use nwfilter_testlab::{Ends, Host, Mac, Tap};

/// The address whose frames no variant lets in.
const UNWANTED: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x66]);

/// A host with ports that are to be filtered, and two that are not.
pub(crate) struct Ports {
    pub(crate) host: Host,
    filtered: Vec<Tap>,
    outside: [Tap; 2],
}

impl Ports {
    /// A host with that many ports to filter, `tap0` and so on, at least 2.
    pub(crate) fn new(count: u8) -> Self {
        let host = Host::new().unwrap();
        let filtered: Vec<_> = (0..count).map(|number| host.tap(&port(number)).unwrap()).collect();
        let outside = ["out0", "out1"].map(|name| host.tap(name).unwrap());
        // Frames to an address that nobody has sent from yet would be flooded to all ports.
        let addresses = (0..count).map(guest).chain([0, 1].map(outsider));
        for (tap, (mac, _)) in filtered.iter().chain(&outside).zip(addresses) {
            let (mac, name) = (mac.to_string(), tap.name());
            host.run(&["bridge", "fdb", "replace", &mac, "dev", name, "master", "static"]).unwrap();
        }
        Self { host, filtered, outside }
    }

    /// Queries out of the first port and into the second, and what must not pass there.
    pub(crate) fn streams(&self, rest: Duration) -> [Stream<'_>; 2] {
        let (out, into) = (ends(guest(0), outsider(0)), ends(outsider(1), guest(1)));
        let other_ip = Ipv4Addr::new(10, 0, 0, 99);
        let spoofed = ends((guest(0).0, other_ip), outsider(0));
        let ipv6 =
            Ends::v6(guest(0).0, "fd00::1".parse().unwrap(), outsider(0).0, "fd00::2".parse().unwrap());
        let arp = Arp::request(guest(0).0, other_ip, outsider(0).1);
        [
            Stream {
                from: &self.filtered[0],
                to: &self.outside[0],
                allowed: Box::new(move |number| frames::udp(&out, 4000, 53, &number.to_be_bytes())),
                forbidden: vec![
                    frames::udp(&out, 4000, 54, b"to another port"),
                    frames::udp(&out.with_src_mac(Mac::new([0x52, 0x54, 0, 0, 0, 0x99])), 4000, 53, b"mac"),
                    frames::udp(&spoofed, 4000, 53, b"ip"),
                    frames::udp(&ipv6, 4000, 53, b"ipv6"),
                    frames::arp(guest(0).0, outsider(0).0, arp),
                ],
                rest,
            },
            Stream {
                from: &self.outside[1],
                to: &self.filtered[1],
                allowed: Box::new(move |number| frames::udp(&into, 4000, 5000, &number.to_be_bytes())),
                forbidden: vec![
                    frames::udp(&into, 4000, 5001, b"to another port"),
                    frames::udp(&into.with_src_mac(UNWANTED), 4000, 5000, b"unwanted"),
                    frames::tcp(&into, 4000, 5000, frames::tcp_flags::SYN),
                ],
                rest,
            },
        ]
    }
}

/// The name of a filtered port.
pub(crate) fn port(number: u8) -> String {
    format!("tap{number}")
}

/// The guest behind a filtered port.
fn guest(number: u8) -> (Mac, Ipv4Addr) {
    (Mac::new([0x52, 0x54, 0, 0, 0, number + 1]), Ipv4Addr::new(10, 0, 0, number + 1))
}

/// Who is behind a port without filter.
fn outsider(number: u8) -> (Mac, Ipv4Addr) {
    (Mac::new([0x52, 0x54, 0, 0, 1, number]), Ipv4Addr::new(10, 0, 0, 100 + number))
}

fn ends((from_mac, from): (Mac, Ipv4Addr), (to_mac, to): (Mac, Ipv4Addr)) -> Ends {
    Ends::v4(from_mac, from, to_mac, to)
}

/// Filters a port with the filter of all [`variant`]s.
pub(crate) fn binding(number: u8) -> String {
    let ((mac, ip), port) = (guest(number), port(number));
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='{port}'/><mac address='{mac}'/>
         <filterref filter='f'><parameter name='IP' value='{ip}'/></filterref></filterbinding>"
    )
}

/// Ways to drop, by rules of ebtables, what is not IPv4 or ARP with the guest's own addresses.
const ETHERNET: [&str; 3] = [
    "<filterref filter='clean-traffic'/>",
    "<rule action='drop' direction='out' priority='-900'><mac match='no' srcmacaddr='$MAC'/></rule>
     <rule action='drop' direction='out' priority='-850'><ip match='no' srcipaddr='$IP'/></rule>
     <rule action='drop' direction='out' priority='-800'><arp match='no' arpsrcipaddr='$IP'/></rule>
     <rule action='drop' direction='inout' priority='-750'><ipv6/></rule>",
    "<filterref filter='no-arp-spoofing'/><filterref filter='no-mac-spoofing'/><filterref filter='no-ip-spoofing'/>
     <rule action='drop' direction='inout' priority='-750'><ipv6/></rule>",
];

/// A filter that decides the same about the frames of the streams whatever the number; its chains and rules differ.
pub(crate) fn variant(number: u32) -> String {
    filter(ETHERNET[number as usize % 3], 6000 + number..6001 + number + number % 7, number % 2 == 1)
}

/// A [`variant`] of few rules, for those who are slow.
pub(crate) fn small_variant(number: u32) -> String {
    filter(ETHERNET[1], 6000 + number..6001 + number, number % 2 == 1)
}

fn filter(ethernet: &str, open_ports: Range<u32>, with_state: bool) -> String {
    let state = if with_state { " state='NEW,ESTABLISHED'" } else { "" };
    let open: String = open_ports
        .map(|port| format!("<rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule>"))
        .collect();
    format!(
        "<filter name='f' chain='root'>
           <rule action='drop' direction='in' priority='-950'><mac srcmacaddr='{UNWANTED}'/></rule>
           {ethernet}{open}
           <rule action='accept' direction='out'><udp dstportstart='53'{state}/></rule>
           <rule action='accept' direction='in'><udp dstportstart='5000'{state}/></rule>
           <rule action='drop' direction='inout'><all/></rule>
         </filter>"
    )
}

/// Nothing was lost and nothing leaked, of the many frames that were sent.
pub(crate) fn assert_exact(tally: Tally) {
    eprintln!("{tally:?}");
    assert!(tally.allowed > 0 && tally.forbidden > 0, "{tally:?}");
    assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
}
