//! Whole exchanges: the packets that two programs send each other, in both directions.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use nwfilter_rules::Family;
use nwfilter_xml::MacAddr;

use crate::evaluate::{Explainer, Explanation, Unanswerable, Way};
use crate::packet::{Arp, Body, Icmp, Ip, Packet, Tcp, Transport, ether_type, protocol, tcp_flag};
use crate::question::{BadQuestion, Guest, PEER_MAC, peer_address};

/// An exchange that is known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conversation {
    /// FTP with the data connection opened by the server (active).
    Ftp,
    /// A TCP connection that is opened, used and closed.
    Tcp,
    /// An echo request and its reply, after the ARP that finds the other end.
    Ping,
    /// A question to a name server and its answer.
    Dns,
    /// The four messages in which a lease is granted.
    Dhcp,
}

impl Conversation {
    const NAMES: [(&str, Self); 5] = [
        ("ftp", Self::Ftp),
        ("tcp", Self::Tcp),
        ("ping", Self::Ping),
        ("dns", Self::Dns),
        ("dhcp", Self::Dhcp),
    ];
}

impl FromStr for Conversation {
    type Err = BadQuestion;

    fn from_str(text: &str) -> Result<Self, BadQuestion> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, known)| *known);
        let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
        let what = || format!("'{text}' is no conversation: it is one of {}", names.join(", "));
        known.ok_or_else(|| BadQuestion::new(what(), "in --conversation ftp"))
    }
}

/// One packet of an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its direction.
    pub way: Way,
    /// What it is for: `SYN of the control connection`.
    pub what: String,
    /// The packet.
    pub packet: Packet,
}

/// The result of a turn.
#[derive(Clone, Debug)]
pub struct Told {
    /// The packet.
    pub turn: Turn,
    /// Why it passes or not.
    pub explanation: Explanation,
}

impl Conversation {
    /// Its packets, of IPv4. `begins` says who sends the first: the guest, or the other end.
    pub fn turns(self, guest: &Guest, begins: Way) -> Vec<Turn> {
        let mut talk = Talk::new(guest, begins);
        match self {
            Conversation::Tcp => {
                talk.connection("the connection", 40000, 80, &["GET / HTTP/1.0", "HTTP/1.0 200 OK"])
            }
            Conversation::Ftp => talk.ftp(),
            Conversation::Ping => talk.ping(),
            Conversation::Dns => {
                talk.udp(true, "the question", 40000, 53);
                talk.udp(false, "the answer", 53, 40000);
            }
            Conversation::Dhcp => talk.dhcp(),
        }
        talk.turns
    }

    /// Explains the packets in sequence until one does not pass: the later ones are never sent.
    pub fn tell(
        self,
        explainer: &mut Explainer<'_>,
        guest: &Guest,
        begins: Way,
    ) -> Result<Vec<Told>, Unanswerable> {
        let mut told = Vec::new();
        for turn in self.turns(guest, begins) {
            let explanation = explainer.explain(turn.way, &turn.packet)?;
            let stops = !explanation.passes();
            told.push(Told { turn, explanation });
            if stops {
                break;
            }
        }
        Ok(told)
    }
}

struct Talk {
    client: (MacAddr, IpAddr),
    server: (MacAddr, IpAddr),
    /// The way of what the client sends.
    client_way: Way,
    turns: Vec<Turn>,
}

impl Talk {
    fn new(guest: &Guest, begins: Way) -> Self {
        let mine = (guest.mac, guest.address(Family::Ipv4));
        let theirs = (PEER_MAC, peer_address(Family::Ipv4));
        let (client, server) = if begins == Way::FromGuest { (mine, theirs) } else { (theirs, mine) };
        Self { client, server, client_way: begins, turns: Vec::new() }
    }

    fn add(&mut self, by_client: bool, what: &str, packet: Packet) {
        let way = match (self.client_way, by_client) {
            (Way::FromGuest, true) | (Way::ToGuest, false) => Way::FromGuest,
            _ => Way::ToGuest,
        };
        self.turns.push(Turn { way, what: what.to_owned(), packet });
    }

    fn send(&mut self, by_client: bool, what: &str, number: u8, transport: Transport) {
        let (from, to) = if by_client { (self.client, self.server) } else { (self.server, self.client) };
        self.add(by_client, what, Packet::ip(from.0, to.0, Ip::new(from.1, to.1, number, transport)));
    }

    fn segment(&mut self, by_client: bool, what: &str, ports: (u16, u16), flags: u8, payload: &str) {
        let tcp = Tcp {
            src: ports.0,
            dst: ports.1,
            flags,
            options: Vec::new(),
            payload: payload.as_bytes().to_vec(),
        };
        self.send(by_client, what, protocol::TCP, Transport::Tcp(tcp));
    }

    /// Opens a connection, the first packet being sent by the client of the conversation or by the server.
    fn open(&mut self, by_client: bool, name: &str, src: u16, dst: u16) {
        let (to, back) = ((src, dst), (dst, src));
        self.segment(by_client, &format!("opens {name}"), to, tcp_flag::SYN, "");
        self.segment(!by_client, "takes it", back, tcp_flag::SYN | tcp_flag::ACK, "");
        self.segment(by_client, "confirms it", to, tcp_flag::ACK, "");
    }

    fn connection(&mut self, name: &str, src: u16, dst: u16, lines: &[&str]) {
        self.open(true, name, src, dst);
        for (number, line) in lines.iter().enumerate() {
            let by_client = number % 2 == 0;
            let ports = if by_client { (src, dst) } else { (dst, src) };
            let flags = tcp_flag::PSH | tcp_flag::ACK;
            self.segment(by_client, &format!("says {line}"), ports, flags, &format!("{line}\r\n"));
        }
        self.segment(true, "closes it", (src, dst), tcp_flag::FIN | tcp_flag::ACK, "");
        self.segment(false, "closes it too", (dst, src), tcp_flag::FIN | tcp_flag::ACK, "");
        self.segment(true, "confirms that", (src, dst), tcp_flag::ACK, "");
    }

    fn ftp(&mut self) {
        const CLIENT: u16 = 40000;
        const DATA: u16 = 40001;
        let say = tcp_flag::PSH | tcp_flag::ACK;
        let announced = match self.client.1 {
            IpAddr::V4(addr) => addr.octets().map(|octet| octet.to_string()).join(","),
            IpAddr::V6(_) => String::new(),
        };
        self.open(true, "the control connection", CLIENT, 21);
        self.segment(false, "greets", (21, CLIENT), say, "220 ready\r\n");
        let port = format!("PORT {announced},{},{}", DATA / 256, DATA % 256);
        self.segment(true, &format!("says {port}"), (CLIENT, 21), say, &format!("{port}\r\n"));
        self.segment(false, "agrees", (21, CLIENT), say, "200 PORT command successful\r\n");
        self.segment(true, "says RETR file", (CLIENT, 21), say, "RETR file\r\n");
        self.open(false, "the data connection", 20, DATA);
        self.segment(false, "sends the file", (20, DATA), say, "the file");
        self.segment(true, "confirms it", (DATA, 20), tcp_flag::ACK, "");
    }

    fn udp(&mut self, by_client: bool, what: &str, src: u16, dst: u16) {
        self.send(by_client, what, protocol::UDP, Transport::Ports { src, dst, payload: Vec::new() });
    }

    fn ping(&mut self) {
        let (client, server) = (self.client, self.server);
        let (IpAddr::V4(asking), IpAddr::V4(asked)) = (client.1, server.1) else { return };
        let arp = |opcode, (from, sender), (to, target), dst_mac| Packet {
            src_mac: from,
            dst_mac,
            vlan: None,
            ether_type: ether_type::ARP,
            body: Body::Arp(Arp {
                hardware_type: 1,
                protocol_type: ether_type::IPV4,
                opcode,
                macs: Some((from, to)),
                ips: Some((sender, target)),
            }),
            broken: None,
        };
        let nobody = MacAddr([0; 6]);
        let question = arp(1, (client.0, asking), (nobody, asked), MacAddr([0xff; 6]));
        self.add(true, "asks who has the address", question);
        self.add(false, "says that it has", arp(2, (server.0, asked), (client.0, asking), client.0));
        let echo = |kind| Transport::Icmp(Icmp { kind, code: 0, id: 1, about: None });
        self.send(true, "asks for an echo", protocol::ICMP, echo(8));
        self.send(false, "replies", protocol::ICMP, echo(0));
    }

    fn dhcp(&mut self) {
        let known = self.client.1;
        let nobody = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let everybody = IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
        let server = self.server;
        for (ask, answer) in [("discovers", "offers"), ("requests", "acknowledges")] {
            (self.client.1, self.server) = (nobody, (MacAddr([0xff; 6]), everybody));
            self.udp(true, ask, 68, 67);
            (self.client.1, self.server) = (known, server);
            self.udp(false, answer, 67, 68);
        }
    }
}

/// `out  takes it: TCP 10.0.0.2:80 → 192.0.2.7:40000 [SYN,ACK]`
impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.way, self.what, self.packet)
    }
}
