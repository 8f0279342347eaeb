//! Frames of all kinds, clean and spoofed, that a filter may let pass or not.

use nwfilter_xml::{Entry, Kind, Literal, MacAddr, Value};

use crate::conformance::Case;
use crate::frames::{self, Arp, protocol, tcp_flags};
use crate::{Ends, Mac};

/// Who speaks to whom in a [`corpus`].
#[derive(Clone, Copy, Debug)]
pub struct Speakers {
    /// The sender.
    pub from: Mac,
    /// The last number of its addresses 10.0.0.N and 2001:db8::N.
    pub from_number: u8,
    /// The receiver.
    pub to: Mac,
    /// The last number of its addresses.
    pub to_number: u8,
}

/// A MAC address that is nobody's.
pub const OTHER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);

/// Named frames, each different from all others.
pub fn corpus(speakers: &Speakers) -> Vec<(String, Vec<u8>)> {
    let Speakers { from: src, from_number, to: dst, to_number } = *speakers;
    let addr4 = |last: u8| std::net::Ipv4Addr::new(10, 0, 0, last);
    let addr6 = |last: u8| std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last));
    let clean = Ends::v4(src, addr4(from_number), dst, addr4(to_number));
    let clean6 = Ends::v6(src, addr6(from_number), dst, addr6(to_number));
    let spoofed = Ends::v4(src, addr4(66), dst, addr4(to_number));
    let mut corpus: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>| corpus.push((name.to_owned(), frame));
    for (name, ends) in [
        ("clean", clean),
        ("spoofed MAC", clean.with_src_mac(OTHER)),
        ("spoofed IP", spoofed),
        ("clean IPv6", clean6),
        ("spoofed MAC over IPv6", clean6.with_src_mac(OTHER)),
        ("spoofed IPv6", Ends::v6(src, addr6(66), dst, addr6(to_number))),
    ] {
        for port in [20, 21, 22, 53, 80, 8080] {
            add(&format!("{name}: TCP SYN to {port}"), frames::tcp(&ends, 1000 + port, port, tcp_flags::SYN));
            add(&format!("{name}: UDP to {port}"), frames::udp(&ends, 2000 + port, port, b"data"));
        }
        add(&format!("{name}: TCP ACK out of nowhere"), frames::tcp(&ends, 3000, 22, tcp_flags::ACK));
        add(&format!("{name}: TCP SYN,FIN"), frames::tcp(&ends, 3001, 22, tcp_flags::SYN | tcp_flags::FIN));
        add(&format!("{name}: TCP RST"), frames::tcp(&ends, 3002, 22, tcp_flags::RST));
        add(&format!("{name}: SCTP"), frames::sctp(&ends, 4000, 22));
        add(&format!("{name}: echo request"), frames::icmp_echo(&ends, 1, 1));
        add(&format!("{name}: echo reply"), frames::icmp_echo_reply(&ends, 2, 1));
        add(&format!("{name}: UDP-Lite"), frames::ip(&ends, protocol::UDPLITE, &[4, 0, 0, 22, 0, 8, 0, 0]));
        add(&format!("{name}: ESP"), frames::ip(&ends, protocol::ESP, &[0, 0, 0, 1, 0, 0, 0, 1]));
        add(&format!("{name}: AH"), frames::ip(&ends, protocol::AH, &[59, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]));
        add(&format!("{name}: DSCP 46"), frames::dscp(frames::udp(&ends, 2500, 22, b"data"), 46));
        // The kernel's tracking of bridged connections lets no IPv6 fragment pass that is smaller than a link may
        // ask for, which is 1280 bytes.
        let (payload, size) = if name.contains("IPv6") { (2600, 1232) } else { (64, 32) };
        let whole = frames::udp(&ends, 2502, 22, &vec![7; payload]);
        for (number, fragment) in frames::fragments(&whole, size).iter().enumerate() {
            add(&format!("{name}: fragment {number}"), fragment.clone());
        }
        add(&format!("{name}: VLAN 7"), frames::vlan(7, &frames::udp(&ends, 2503, 22, b"data")));
    }
    let dhcp =
        Ends::v4(src, addr4(from_number), dst, std::net::Ipv4Addr::BROADCAST).with_dst_mac(Mac::BROADCAST);
    add("DHCP request", frames::udp(&dhcp, 68, 67, b"dhcp"));
    add("DHCP answer", frames::udp(&dhcp, 67, 68, b"dhcp"));
    let group = std::net::Ipv4Addr::new(224, 0, 0, 251);
    let multicast = Mac::new([0x01, 0x00, 0x5e, 0, 0, 0xfb]);
    add("IGMP", frames::igmp(&Ends::v4(src, addr4(from_number), multicast, group), group));
    add("multicast", frames::udp(&Ends::v4(src, addr4(from_number), multicast, group), 5353, 5353, b"mdns"));
    for (name, mac, ip) in
        [("clean", src, from_number), ("spoofed MAC in", OTHER, from_number), ("spoofed IP in", src, 66)]
    {
        let (ip, target) = (addr4(ip), addr4(to_number));
        add(&format!("{name} ARP request"), frames::arp(src, Mac::BROADCAST, Arp::request(mac, ip, target)));
        add(&format!("{name} ARP reply"), frames::arp(src, dst, Arp::reply(mac, ip, dst, target)));
        add(&format!("{name} gratuitous ARP"), frames::arp(src, Mac::BROADCAST, Arp::gratuitous(mac, ip)));
        add(&format!("{name} RARP"), frames::rarp(src, Mac::BROADCAST, Arp::rarp_request(mac)));
    }
    let reply = Arp::reply(src, addr4(from_number), dst, addr4(to_number));
    add("ARP from another MAC", frames::arp(OTHER, dst, reply));
    add("RARP from another MAC", frames::rarp(OTHER, Mac::BROADCAST, Arp::rarp_request(OTHER)));
    add("STP", frames::stp(src));
    add("another protocol", frames::ethernet(src, dst, 0x88b5, b"experimental"));
    // A name stands for one frame only: fragments of spoofed packets are alike where only the IP header differs.
    corpus.dedup_by(|a, b| a.1 == b.1);
    corpus
}

/// The case with these MAC addresses, and with the IP addresses and ports that frames of the corpus have, so that its
/// rules match some.
pub fn close_to_the_corpus(mut case: Case, macs: [Mac; 3]) -> Case {
    let mut number = 0;
    let mut one_of = |count: usize| {
        number += 1;
        number % count
    };
    for entry in case.filters.iter_mut().flat_map(|filter| &mut filter.entries) {
        let Entry::Rule(rule) = entry else { continue };
        for item in rule.matches.iter_mut().flat_map(|matches| &mut matches.items) {
            let text = match item.attribute.kind {
                Kind::Ipv4 => ["10.0.0.2", "10.0.0.9", "10.0.0.66"][one_of(3)],
                Kind::Ipv6 => ["2001:db8::2", "2001:db8::9", "2001:db8::66"][one_of(3)],
                Kind::Ipv4Prefix => ["24", "31", "32"][one_of(3)],
                Kind::Ipv6Prefix => ["64", "127", "128"][one_of(3)],
                Kind::Dscp => ["0", "46"][one_of(2)],
                Kind::U16 if item.attribute.name.ends_with("end") => "65535",
                Kind::U16 if item.attribute.name.contains("port") => ["21", "22", "80", "1022"][one_of(4)],
                Kind::Mac => {
                    let mac = macs[one_of(3)];
                    item.value = Value::Literal(Literal::Mac(MacAddr(mac.octets())));
                    continue;
                }
                _ => continue,
            };
            if let Some(literal) = item.attribute.kind.parse(text) {
                item.value = Value::Literal(literal);
            }
        }
    }
    case
}
