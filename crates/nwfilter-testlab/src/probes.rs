//! Named frames and short conversations on which two filters can be compared: the same list for the same stations.
//!
//! Every protocol of the language is there, from the guest and to it, clean and spoofed, and to and from the host itself.
//! [`Verdicts`](crate::Verdicts) sends them.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::frames::{self, Arp, ethertype, protocol, tcp_flags::*};
use crate::{BRIDGE_MAC, Ends, Mac};

/// A MAC address, and the addresses that belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// The MAC address.
    pub mac: Mac,
    /// The IPv4 address.
    pub ip: Ipv4Addr,
    /// The IPv6 address.
    pub ip6: Ipv6Addr,
}

impl Station {
    /// `52:54:00:00:00:LAST`, `10.0.0.LAST` and `2001:db8::LAST6`.
    const fn numbered(last: u8, last6: u16) -> Self {
        Self {
            mac: Mac::new([0x52, 0x54, 0, 0, 0, last]),
            ip: Ipv4Addr::new(10, 0, 0, last),
            ip6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last6),
        }
    }
}

/// Who talks to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stations {
    /// Behind the port that is filtered.
    pub guest: Station,
    /// Behind another port.
    pub neighbour: Station,
    /// The host of both, whose MAC address is that of the bridge.
    pub host: Station,
    /// Nobody's addresses, which a guest may claim.
    pub other: Station,
}

impl Default for Stations {
    /// The guest is 52:54:00:7b:35:93, 10.0.0.2 and 2001:db8::2; the others end in 9, 254 and 66.
    fn default() -> Self {
        Self {
            guest: Station { mac: Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]), ..Station::numbered(2, 2) },
            neighbour: Station::numbered(9, 9),
            host: Station { mac: BRIDGE_MAC, ..Station::numbered(254, 0x254) },
            other: Station::numbered(66, 0x66),
        }
    }
}

/// Where a frame begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The port that is filtered.
    Guest,
    /// A port that is not.
    Neighbour,
    /// Another that is not, with nobody's addresses behind it: it gets what goes to all.
    Uplink,
    /// The IP stack of the host.
    Host,
}

/// One frame of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Who sends it.
    pub from: Place,
    /// The whole frame.
    pub frame: Vec<u8>,
}

/// A frame, or several that belong together, with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What it is; no other probe has this name.
    pub name: String,
    /// The frames, in the order in which they are sent.
    pub steps: Vec<Step>,
}

/// The field of an ICMP error that has no use.
const UNUSED: [u8; 4] = [0, 0, 0, 0];

/// The options of a SYN: a maximal segment size of 1460, and that selective acknowledgements are understood (4 is that).
const SYN_OPTIONS: [u8; 8] = [2, 4, 0x05, 0xb4, 4, 2, 1, 1];

/// The whole list.
pub fn probes(stations: &Stations) -> Vec<Probe> {
    let Stations { guest, neighbour, host, .. } = *stations;
    let mut list = List { probes: Vec::new(), other: stations.other };
    for (way, from, (src, dst)) in [
        ("guest to neighbour", Place::Guest, (guest, neighbour)),
        ("neighbour to guest", Place::Neighbour, (neighbour, guest)),
        ("guest to host", Place::Guest, (guest, host)),
        ("host to guest", Place::Host, (host, guest)),
    ] {
        let way = Way { name: way, from, src, dst };
        list.packets(&way);
        if from != Place::Host {
            list.spoofed(&way);
            list.ethernet(&way);
        }
    }
    for (way, client, server) in [
        ("guest to neighbour", (Place::Guest, guest), (Place::Neighbour, neighbour)),
        ("neighbour to guest", (Place::Neighbour, neighbour), (Place::Guest, guest)),
    ] {
        list.conversations(way, client, server);
    }
    list.probes
}

/// Frames from one station to another.
struct Way {
    name: &'static str,
    from: Place,
    src: Station,
    dst: Station,
}

impl Way {
    fn v4(&self) -> Ends {
        v4(&self.src, &self.dst)
    }

    fn v6(&self) -> Ends {
        v6(&self.src, &self.dst)
    }
}

fn v4(src: &Station, dst: &Station) -> Ends {
    Ends::v4(src.mac, src.ip, dst.mac, dst.ip)
}

fn v6(src: &Station, dst: &Station) -> Ends {
    Ends::v6(src.mac, src.ip6, dst.mac, dst.ip6)
}

struct List {
    probes: Vec<Probe>,
    other: Station,
}

impl List {
    /// A number that no other probe has: a port, or an identification of fragments.
    fn fresh(&self) -> u16 {
        // Below the ports that a host chooses by itself, and above those that filters name.
        20_000 + self.probes.len() as u16
    }

    fn add(&mut self, way: &Way, what: &str, frame: Vec<u8>) {
        self.add_steps(way.name, what, vec![Step { from: way.from, frame }]);
    }

    fn add_steps(&mut self, way: &str, what: &str, steps: Vec<Step>) {
        // What goes to all goes to the neighbour and to the host alike.
        if self.probes.iter().all(|probe| probe.steps != steps) {
            self.probes.push(Probe { name: format!("{way}: {what}"), steps });
        }
    }

    /// Single packets of every IP protocol.
    fn packets(&mut self, way: &Way) {
        for (family, ends) in [("IPv4", way.v4()), ("IPv6", way.v6())] {
            for port in [20, 21, 22, 53, 80, 8080] {
                let frame = frames::tcp(&ends, self.fresh(), port, SYN);
                self.add(way, &format!("{family} TCP SYN to {port}"), frame);
            }
            for port in [22, 53, 67, 69, 546, 547, 8080] {
                let frame = frames::udp(&ends, self.fresh(), port, b"data");
                self.add(way, &format!("{family} UDP to {port}"), frame);
            }
            for (name, flags) in [
                ("no flags", 0),
                ("FIN", FIN),
                ("RST", RST),
                ("ACK", ACK),
                ("SYN,ACK", SYN | ACK),
                ("SYN,FIN", SYN | FIN),
                ("FIN,PSH,URG", FIN | PSH | URG),
                ("all flags", FIN | SYN | RST | PSH | ACK | URG),
            ] {
                let frame = frames::tcp(&ends, self.fresh(), 22, flags);
                self.add(way, &format!("{family} TCP {name} out of nowhere"), frame);
            }
            let frame = frames::tcp_with_options(&ends, self.fresh(), 22, SYN, &SYN_OPTIONS);
            self.add(way, &format!("{family} TCP SYN with options"), frame);
            let frame = frames::tcp(&ends, 22, self.fresh(), SYN);
            self.add(way, &format!("{family} TCP SYN from 22"), frame);
            let frame = frames::udp(&ends, 53, self.fresh(), b"data");
            self.add(way, &format!("{family} UDP from 53"), frame);
            let frame = frames::udplite(&ends, self.fresh(), 22, b"data");
            self.add(way, &format!("{family} UDP-Lite"), frame);
            let frame = frames::sctp(&ends, self.fresh(), 22);
            self.add(way, &format!("{family} SCTP INIT"), frame);
            self.add(
                way,
                &format!("{family} ESP"),
                frames::ip(&ends, protocol::ESP, &[0, 0, 0, 1, 0, 0, 0, 1]),
            );
            // The header of AH, and nothing behind it (59).
            let ah = [59, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1];
            self.add(way, &format!("{family} AH"), frames::ip(&ends, protocol::AH, &ah));
            self.add(way, &format!("{family} protocol 253"), frames::ip(&ends, 253, b"experimental"));
            for code_point in [10, 46] {
                let frame = frames::dscp(frames::udp(&ends, self.fresh(), 22, b"data"), code_point);
                self.add(way, &format!("{family} UDP with DSCP {code_point}"), frame);
            }
            let frame = frames::bad_l4_checksum(frames::udp(&ends, self.fresh(), 22, b"data"));
            self.add(way, &format!("{family} UDP with a bad checksum"), frame);
            let frame = frames::icmp_echo_reply(&ends, self.fresh(), 1);
            self.add(way, &format!("{family} echo reply to nobody"), frame);
            let frame = frames::icmp_echo(&ends, self.fresh(), 1);
            self.add(way, &format!("{family} echo request"), frame);
            self.fragments(way, family, &ends);
        }
        // Unreachable, source quench, redirect, router advertisement and solicitation, time exceeded, bad parameter, timestamp.
        for (kind, code) in [(3, 1), (3, 3), (4, 0), (5, 1), (9, 0), (10, 0), (11, 0), (12, 0), (13, 0)] {
            let frame = frames::icmp(&way.v4(), kind, code, &[0; 16]);
            self.add(way, &format!("ICMP {kind}/{code}"), frame);
        }
        // Unreachable, too big, time exceeded, bad parameter, and neighbour discovery with the source as its target.
        let target = [&UNUSED[..], &way.src.ip6.octets()].concat();
        for (kind, code, body) in [
            (1, 4, &UNUSED[..]),
            (2, 0, &UNUSED),
            (3, 0, &UNUSED),
            (4, 1, &UNUSED),
            (133, 0, &UNUSED),
            (134, 0, &[64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (135, 0, &target),
            (136, 0, &target),
        ] {
            let frame = frames::icmp(&way.v6(), kind, code, body);
            self.add(way, &format!("ICMPv6 {kind}/{code}"), frame);
        }
        let group = Ipv4Addr::new(224, 0, 0, 251);
        let to_group = Ends::v4(way.src.mac, way.src.ip, Mac::new([0x01, 0x00, 0x5e, 0, 0, 0xfb]), group);
        self.add(way, "IGMP", frames::igmp(&way.v4(), group));
        self.add(way, "IGMP to its group", frames::igmp(&to_group, group));
        self.add(way, "UDP to a group", frames::udp(&to_group, 5353, 5353, b"mdns"));
        for (name, kind, body) in [
            ("hop-by-hop options", protocol::IPV6_HOP_BY_HOP, [1, 4, 0, 0, 0, 0]),
            ("destination options", protocol::IPV6_DESTINATION, [1, 4, 0, 0, 0, 0]),
            // Of the experimental type 253, with no segment left.
            ("a routing header", protocol::IPV6_ROUTING, [253, 0, 0, 0, 0, 0]),
            ("a fragment header and no fragment", protocol::IPV6_FRAGMENT, [0, 0, 0, 0, 0, 1]),
        ] {
            for (inner, frame) in [
                ("UDP", frames::udp(&way.v6(), self.fresh(), 53, b"data")),
                ("TCP SYN", frames::tcp(&way.v6(), self.fresh(), 22, SYN)),
                ("echo request", frames::icmp_echo(&way.v6(), self.fresh(), 1)),
            ] {
                self.add(way, &format!("IPv6 {inner} behind {name}"), frames::extension(frame, kind, body));
            }
        }
    }

    fn fragments(&mut self, way: &Way, family: &str, ends: &Ends) {
        for (what, whole, size) in [
            ("UDP", frames::udp(ends, self.fresh(), 53, &[7; 64]), 32),
            ("TCP SYN", frames::tcp(ends, self.fresh(), 22, SYN), 8),
        ] {
            let id = self.fresh();
            let pieces = |frames: Vec<Vec<u8>>| -> Vec<Step> {
                let step = |frame| Step { from: way.from, frame: frames::identification(frame, id) };
                frames.into_iter().map(step).collect()
            };
            let fragments = frames::fragments(&whole, size);
            let last = fragments.last().cloned().unwrap_or_default();
            self.add_steps(way.name, &format!("{family} {what} in fragments"), pieces(fragments));
            if way.from != Place::Host {
                let alone = frames::identification(last, id.wrapping_add(1 << 15));
                self.add(way, &format!("{family} {what}, the last fragment alone"), alone);
            }
        }
    }

    /// Packets with addresses that are not the sender's.
    fn spoofed(&mut self, way: &Way) {
        let Station { mac, ip, ip6 } = self.other;
        for (who, src) in [
            ("another MAC address", Station { mac, ..way.src }),
            ("another IP address", Station { ip, ip6, ..way.src }),
            ("both addresses of another", self.other),
        ] {
            for (family, ends) in [("IPv4", v4(&src, &way.dst)), ("IPv6", v6(&src, &way.dst))] {
                for (what, frame) in [
                    ("TCP SYN to 22", frames::tcp(&ends, self.fresh(), 22, SYN)),
                    ("TCP ACK", frames::tcp(&ends, self.fresh(), 22, ACK)),
                    ("UDP to 53", frames::udp(&ends, self.fresh() + 1000, 53, b"data")),
                    ("echo request", frames::icmp_echo(&ends, self.fresh(), 1)),
                    ("ESP", frames::ip(&ends, protocol::ESP, &[0, 0, 0, 2, 0, 0, 0, 1])),
                ] {
                    self.add(way, &format!("{family} {what} from {who}"), frame);
                }
            }
        }
        let nowhere = Station { ip: Ipv4Addr::UNSPECIFIED, ip6: Ipv6Addr::UNSPECIFIED, ..way.src };
        let everybody = Station { mac: Mac::BROADCAST, ip: Ipv4Addr::BROADCAST, ..way.dst };
        let request = frames::udp(&v4(&nowhere, &everybody), 68, 67, b"request");
        self.add(way, "DHCP request", request);
        self.add(way, "DHCP request with an address", frames::udp(&v4(&way.src, &way.dst), 68, 67, b"renew"));
        self.add(way, "DHCP offer", frames::udp(&v4(&way.src, &way.dst), 67, 68, b"offer"));
        self.add(way, "DHCP offer to all", frames::udp(&v4(&way.src, &everybody), 67, 68, b"offer"));
        self.add(way, "IPv4 UDP from no address", frames::udp(&v4(&nowhere, &way.dst), 4000, 53, b"data"));
        self.add(way, "IPv6 UDP from no address", frames::udp(&v6(&nowhere, &way.dst), 4000, 53, b"data"));
    }

    /// Frames of Ethernet itself.
    fn ethernet(&mut self, way: &Way) {
        let (src, dst) = (way.src, way.dst);
        for (who, mac, ip) in [
            ("clean", src.mac, src.ip),
            ("from another MAC address", self.other.mac, src.ip),
            ("from another IP address", src.mac, self.other.ip),
        ] {
            let arp = |to, arp| frames::arp(src.mac, to, arp);
            self.add(way, &format!("ARP request, {who}"), arp(Mac::BROADCAST, Arp::request(mac, ip, dst.ip)));
            self.add(way, &format!("ARP reply, {who}"), arp(dst.mac, Arp::reply(mac, ip, dst.mac, dst.ip)));
            self.add(way, &format!("ARP announcement, {who}"), arp(Mac::BROADCAST, Arp::gratuitous(mac, ip)));
            let rarp = frames::rarp(src.mac, Mac::BROADCAST, Arp::rarp_request(mac));
            if ip == src.ip {
                self.add(way, &format!("RARP request, {who}"), rarp);
            }
        }
        let reply = Arp { op: 4, ..Arp::reply(src.mac, src.ip, dst.mac, dst.ip) };
        self.add(way, "RARP reply", frames::rarp(src.mac, dst.mac, reply));
        let probe = Arp::request(src.mac, Ipv4Addr::UNSPECIFIED, dst.ip);
        self.add(way, "ARP probe", frames::arp(src.mac, Mac::BROADCAST, probe));
        let reply = Arp::reply(src.mac, src.ip, dst.mac, dst.ip);
        self.add(way, "ARP in a frame of another", frames::arp(self.other.mac, dst.mac, reply));
        for op in [0, 8, 9] {
            let arp = frames::arp(src.mac, dst.mac, Arp { op, ..reply });
            self.add(way, &format!("ARP with operation {op}"), arp);
        }
        let arp = frames::arp(src.mac, dst.mac, reply);
        self.add(way, "ARP, cut off", arp[..30].to_vec());

        self.add(way, "STP", frames::stp(src.mac));
        self.add(way, "STP of another", frames::stp(self.other.mac));
        let mut change = frames::stp(src.mac);
        // The type of a topology change notification.
        change[20] = 0x80;
        self.add(way, "STP topology change", change);
        let lldp = Mac::new([0x01, 0x80, 0xc2, 0, 0, 0x0e]);
        self.add(way, "LLDP", frames::ethernet(src.mac, lldp, 0x88cc, b"\x02\x07\x04abcdef\x00\x00"));
        self.add(
            way,
            "an experimental protocol",
            frames::ethernet(src.mac, dst.mac, 0x88b5, b"experimental"),
        );
        self.add(
            way,
            "PPPoE",
            frames::ethernet(src.mac, dst.mac, 0x8864, b"\x11\x00\x00\x01\x00\x02\x00\x21"),
        );
        self.add(way, "802.3 with LLC", frames::ethernet(src.mac, dst.mac, 4, &[0xaa, 0xaa, 3, 0]));
        let broadcast = v4(&src, &Station { mac: Mac::BROADCAST, ip: Ipv4Addr::new(10, 0, 0, 255), ..dst });
        self.add(way, "UDP to all", frames::udp(&broadcast, 4000, 4000, b"data"));

        let (udp, udp6) = (
            frames::udp(&way.v4(), self.fresh(), 53, b"data"),
            frames::udp(&way.v6(), self.fresh(), 53, b"data"),
        );
        let arp = frames::arp(src.mac, dst.mac, reply);
        let spoofed =
            frames::udp(&v4(&Station { ip: self.other.ip, ..src }, &dst), self.fresh(), 53, b"data");
        for (what, frame) in
            [("ARP", &arp), ("UDP", &udp), ("IPv6 UDP", &udp6), ("UDP from another IP address", &spoofed)]
        {
            self.add(way, &format!("{what} in VLAN 7"), frames::vlan(7, frame));
        }
        self.add(way, "UDP in VLAN 10", frames::vlan(10, &udp));
        self.add(way, "UDP in VLAN 8 in VLAN 7", frames::vlan(7, &frames::vlan(8, &udp)));
        let mut service = frames::vlan(7, &frames::vlan(8, &udp));
        service[12..14].copy_from_slice(&SERVICE_VLAN.to_be_bytes());
        self.add(way, "UDP in VLAN 8 in service VLAN 7", service);
        let udp = frames::udp(&way.v4(), self.fresh(), 22, b"data");
        self.add(way, "UDP with a bad IP checksum", frames::bad_ip_checksum(udp));
        let mut truncated = frames::udp(&way.v4(), self.fresh(), 22, b"data");
        truncated.truncate(14 + 12);
        self.add(way, "IPv4, cut off", truncated);
        let nothing = frames::ethernet(src.mac, dst.mac, ethertype::IPV6, &[]);
        self.add(way, "IPv6, cut off", nothing);
    }

    /// Connections, of which the filter sees the state.
    fn conversations(&mut self, way: &str, client: (Place, Station), server: (Place, Station)) {
        for (family, ends) in [("IPv4", v4(&client.1, &server.1)), ("IPv6", v6(&client.1, &server.1))] {
            for port in [22, 80, 8080] {
                let mut tcp = Tcp::new(ends, client.0, server.0, (self.fresh(), port));
                tcp.open();
                tcp.say(false, b"question");
                tcp.say(true, b"answer");
                tcp.close();
                self.add_steps(way, &format!("{family} TCP connection to {port}"), tcp.steps);
            }
            let port = self.fresh();
            let there = |frame| Step { from: client.0, frame };
            let back = |frame| Step { from: server.0, frame };
            let reverse = ends.reverse();
            let dns = vec![
                there(frames::udp(&ends, port, 53, b"question")),
                back(frames::udp(&reverse, 53, port, b"answer")),
                there(frames::udp(&ends, port, 53, b"another")),
            ];
            self.add_steps(way, &format!("{family} DNS"), dns);
            let id = self.fresh();
            let ping =
                vec![there(frames::icmp_echo(&ends, id, 1)), back(frames::icmp_echo_reply(&reverse, id, 1))];
            self.add_steps(way, &format!("{family} ping"), ping);
            let port = self.fresh();
            let question = frames::udp(&ends, port, 8080, b"question");
            let (kind, code) = if family == "IPv4" { (3, 3) } else { (1, 4) };
            let body = [&UNUSED[..], &question[14..]].concat();
            let unreachable = vec![there(question), back(frames::icmp(&reverse, kind, code, &body))];
            self.add_steps(way, &format!("{family} UDP to a closed port"), unreachable);
            let mut tcp = Tcp::new(ends, client.0, server.0, (self.fresh(), 80));
            tcp.send(false, SYN, b"");
            tcp.send(true, RST | ACK, b"");
            self.add_steps(way, &format!("{family} TCP to a closed port"), tcp.steps);
        }
        self.ftp(way, client, server);
    }

    /// Transfers of FTP, whose data connections belong to their control connections.
    fn ftp(&mut self, way: &str, client: (Place, Station), server: (Place, Station)) {
        let ends = v4(&client.1, &server.1);
        let control = |port| {
            let mut tcp = Tcp::new(ends, client.0, server.0, (port, 21));
            tcp.open();
            tcp.say(true, b"220 ready\r\n");
            tcp
        };
        let numbers = |ip: Ipv4Addr, port: u16| {
            let [a, b, c, d] = ip.octets();
            format!("{a},{b},{c},{d},{},{}", port >> 8, port & 0xff)
        };
        let port = self.fresh();
        let (mut tcp, data_port) = (control(port), port + 10_000);
        tcp.say(false, format!("PORT {}\r\n", numbers(client.1.ip, data_port)).as_bytes());
        tcp.say(true, b"200 done\r\n");
        let mut data = Tcp::new(ends.reverse(), server.0, client.0, (20, data_port));
        data.open();
        data.say(false, b"contents");
        data.close();
        self.add_steps(way, "FTP, active", [tcp.steps, data.steps].concat());

        let port = self.fresh();
        let (mut tcp, data_port) = (control(port), port + 10_000);
        tcp.say(false, b"PASV\r\n");
        tcp.say(
            true,
            format!("227 Entering Passive Mode ({}).\r\n", numbers(server.1.ip, data_port)).as_bytes(),
        );
        let mut data = Tcp::new(ends, client.0, server.0, (port + 20_000, data_port));
        data.open();
        data.say(true, b"contents");
        data.close();
        self.add_steps(way, "FTP, passive", [tcp.steps, data.steps].concat());
    }
}

/// The ethertype of the outer tag of 802.1ad.
const SERVICE_VLAN: u16 = 0x88a8;

/// A TCP connection with right sequence numbers.
struct Tcp {
    ends: Ends,
    ports: (u16, u16),
    places: (Place, Place),
    /// The next number of the client and of the server.
    numbers: (u32, u32),
    steps: Vec<Step>,
}

impl Tcp {
    fn new(ends: Ends, client: Place, server: Place, ports: (u16, u16)) -> Self {
        Self { ends, ports, places: (client, server), numbers: (1000, 5000), steps: Vec::new() }
    }

    fn open(&mut self) {
        self.send(false, SYN, b"");
        self.send(true, SYN | ACK, b"");
        self.send(false, ACK, b"");
    }

    /// Data, and its acknowledgement.
    fn say(&mut self, server: bool, data: &[u8]) {
        self.send(server, PSH | ACK, data);
        self.send(!server, ACK, b"");
    }

    fn close(&mut self) {
        self.send(false, FIN | ACK, b"");
        self.send(true, FIN | ACK, b"");
        self.send(false, ACK, b"");
    }

    fn send(&mut self, server: bool, flags: u8, data: &[u8]) {
        let counted = data.len() as u32 + u32::from(flags & (SYN | FIN) != 0);
        let (own, peer) = self.numbers;
        let (client_port, server_port) = self.ports;
        let frame = if server {
            self.numbers.1 += counted;
            frames::tcp_segment(&self.ends.reverse(), (server_port, client_port), (peer, own), flags, data)
        } else {
            self.numbers.0 += counted;
            let acknowledged = if flags & ACK == 0 { 0 } else { peer };
            frames::tcp_segment(&self.ends, (client_port, server_port), (own, acknowledged), flags, data)
        };
        let from = if server { self.places.1 } else { self.places.0 };
        self.steps.push(Step { from, frame });
    }
}
