//! What becomes of frames on a host: each is sent, and what comes out anywhere is told.
//!
//! No time is waited for. The kernel carries a frame from a tap to wherever it goes within the call that writes it; behind it,
//! every port gets a sentinel, which passes no filter, and what a port has before its sentinel is the effect of the frame.

use std::fmt;
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, recv, send, sendto, setsockopt, sockopt};

use crate::frames::{self, ethertype, protocol};
use crate::probes::{Place, Probe, Station, Stations, Step};
use crate::{BRIDGE, BRIDGE_MAC, Host, Mac, Tap};

/// How long a sentinel may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// More than a packet of a probe is long, also when its fragments were put together.
const LONGEST: usize = 2048;

/// An ethertype for experiments, which no probe has.
const SENTINEL: u16 = 0x88b6;

/// The protocols of IP whose packets the host is seen to get.
const PROTOCOLS: [(libc::c_int, &[u8]); 2] = [
    (
        libc::AF_INET,
        &[
            protocol::ICMP,
            protocol::IGMP,
            protocol::TCP,
            protocol::UDP,
            protocol::ESP,
            protocol::AH,
            protocol::SCTP,
            protocol::UDPLITE,
        ],
    ),
    (
        libc::AF_INET6,
        &[
            protocol::TCP,
            protocol::UDP,
            protocol::ESP,
            protocol::AH,
            protocol::ICMPV6,
            protocol::SCTP,
            protocol::UDPLITE,
        ],
    ),
];

/// Something that came out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrival {
    /// The step of the probe that made it come out.
    pub step: usize,
    /// Where.
    pub at: Place,
    /// What.
    pub what: What,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// The frame of this step of the probe, as it was sent.
    Step(usize),
    /// Another, such as an answer of the host or a refusal of the filter: its protocol and addresses.
    Other(String),
}

impl fmt::Display for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = format!("{:?}", self.at).to_lowercase();
        match &self.what {
            What::Step(step) if *step == self.step => write!(f, "{step} reaches {at}"),
            What::Step(step) => write!(f, "{step} reaches {at} after {}", self.step),
            What::Other(other) => write!(f, "{other} reaches {at} after {}", self.step),
        }
    }
}

/// A host of which everything is seen that frames make come out.
#[derive(Debug)]
pub struct Verdicts<'a> {
    host: &'a Host,
    ports: [Port<'a>; 3],
    /// Sockets that get what the host's IP stack accepts.
    accepted: Vec<OwnedFd>,
    /// A socket that sees every frame that reaches the bridge's own interface.
    bridge: OwnedFd,
    send4: OwnedFd,
    send6: OwnedFd,
}

#[derive(Debug)]
struct Port<'a> {
    place: Place,
    tap: &'a Tap,
    /// Sends to the tap itself, past the bridge.
    past: OwnedFd,
}

impl<'a> Verdicts<'a> {
    /// Gives the bridge the addresses of the host, which must have none yet, and tells host and bridge where everybody is,
    /// so that they ask nobody and learn nothing. The taps are those of the guest, the neighbour and the uplink.
    pub fn new(
        host: &'a Host,
        [guest, neighbour, uplink]: [&'a Tap; 3],
        stations: &Stations,
    ) -> Result<Self> {
        ensure!(stations.host.mac == BRIDGE_MAC, "the host's MAC address is not that of its bridge");
        host.add_bridge_addr(&format!("{}/24", stations.host.ip))?;
        host.add_bridge_addr(&format!("{}/64", stations.host.ip6))?;
        settle(host, [guest, neighbour, uplink], stations)?;
        let port = |place, tap: &'a Tap| -> Result<Port<'a>> {
            Ok(Port { place, tap, past: packet_socket(tap.name(), 0)? })
        };
        host.enter(|| {
            let accepted = PROTOCOLS.iter().flat_map(|(family, protocols)| {
                protocols.iter().map(|&protocol| raw_socket(*family, protocol.into()))
            });
            let sender = |family| {
                let socket = raw_socket(family, libc::IPPROTO_RAW)?;
                setsockopt(&socket, sockopt::BindToDevice, &BRIDGE.into())?;
                anyhow::Ok(socket)
            };
            Ok(Self {
                host,
                ports: [
                    port(Place::Guest, guest)?,
                    port(Place::Neighbour, neighbour)?,
                    port(Place::Uplink, uplink)?,
                ],
                accepted: accepted.collect::<Result<_>>()?,
                bridge: packet_socket(BRIDGE, libc::ETH_P_ALL)?,
                send4: sender(libc::AF_INET)?,
                send6: sender(libc::AF_INET6)?,
            })
        })
    }

    /// Sends all probes and tells what came of each, in order. The host forgets its connections before, which takes the
    /// program `conntrack`.
    pub fn of(&self, probes: &[Probe]) -> Result<Vec<Vec<Arrival>>> {
        self.host.run(&["conntrack", "-F"])?;
        let nothing = Probe { name: "nothing".into(), steps: Vec::new() };
        self.arrivals(&nothing, 0)?;
        probes.iter().map(|probe| self.probe(probe).with_context(|| probe.name.clone())).collect()
    }

    /// What came of one probe, after whatever was sent before.
    pub fn probe(&self, probe: &Probe) -> Result<Vec<Arrival>> {
        let mut arrivals = Vec::new();
        for (number, step) in probe.steps.iter().enumerate() {
            self.send(step)?;
            let mut of_step = self.arrivals(probe, number)?;
            // The order in which different sockets are read means nothing.
            of_step.sort();
            arrivals.extend(of_step);
        }
        Ok(arrivals)
    }

    fn send(&self, step: &Step) -> Result<()> {
        let [guest, neighbour, uplink] = &self.ports;
        let frame = &step.frame;
        match step.from {
            Place::Guest => guest.tap.send(frame),
            Place::Neighbour => neighbour.tap.send(frame),
            Place::Uplink => uplink.tap.send(frame),
            Place::Host => self.send_from_host(frame),
        }
    }

    /// Sends an IP packet as a program of the host.
    fn send_from_host(&self, frame: &[u8]) -> Result<()> {
        let (packet, flags) = (&frame[14..], MsgFlags::empty());
        let sent = match u16::from_be_bytes([frame[12], frame[13]]) {
            ethertype::IPV4 => {
                let to: [u8; 4] = packet[16..20].try_into()?;
                let to = SockaddrIn::from(SocketAddrV4::new(to.into(), 0));
                sendto(self.send4.as_raw_fd(), packet, &to, flags)
            }
            ethertype::IPV6 => {
                let to: [u8; 16] = packet[24..40].try_into()?;
                let to = SockaddrIn6::from(SocketAddrV6::new(to.into(), 0, 0, 0));
                sendto(self.send6.as_raw_fd(), packet, &to, flags)
            }
            other => bail!("the host cannot send ethertype {other:#06x}"),
        };
        match sent {
            // A filter that refuses what the host sends.
            Err(Errno::EPERM) => Ok(()),
            sent => {
                ensure!(sent.context("the host cannot send")? == packet.len());
                Ok(())
            }
        }
    }

    /// What has come out since the last call.
    fn arrivals(&self, probe: &Probe, step: usize) -> Result<Vec<Arrival>> {
        let mut arrivals = Vec::new();
        let mut add = |at, what| arrivals.push(Arrival { step, at, what });
        let sentinel = frames::ethernet(Mac::ZERO, Mac::BROADCAST, SENTINEL, b"sentinel");
        for Port { place, tap, past } in &self.ports {
            send(past.as_raw_fd(), &sentinel, MsgFlags::empty()).context("cannot send a sentinel")?;
            loop {
                let frame = tap.recv(PATIENCE)?.context("a sentinel does not arrive")?;
                if frame == sentinel {
                    break;
                }
                match probe.steps.iter().position(|step| step.frame == frame) {
                    Some(number) => add(*place, What::Step(number)),
                    None if is_of_the_host_itself(&frame) => {}
                    None => add(*place, What::Other(summary(&frame))),
                }
            }
        }
        // One call instead of one for each socket: in an emulated machine that is what counts.
        let sockets: Vec<_> = self.accepted.iter().chain([&self.bridge]).collect();
        let mut ready: Vec<_> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut ready, PollTimeout::ZERO).context("cannot poll")?;
        for (socket, _) in sockets.iter().zip(&ready).filter(|(_, ready)| ready.any() == Some(true)) {
            while let Some(packet) = received(socket)? {
                if std::ptr::eq(*socket, &self.bridge) {
                    add_from_bridge(probe, &packet, &mut add);
                    continue;
                }
                let is = |step: &Step| step.frame.ends_with(&packet);
                let what = probe
                    .steps
                    .iter()
                    .position(is)
                    .map_or_else(|| What::Other(format!("a packet of {} bytes", packet.len())), What::Step);
                add(Place::Host, what);
            }
        }
        Ok(arrivals)
    }
}

/// What a frame at the bridge's own interface is. IP is seen behind the filters of the host's IP stack, and what the host sends
/// where it arrives.
fn add_from_bridge(probe: &Probe, frame: &[u8], add: &mut impl FnMut(Place, What)) {
    let ip = [ethertype::IPV4, ethertype::IPV6].map(u16::to_be_bytes);
    if frame[6..12] == BRIDGE_MAC.octets() || ip.iter().any(|ip| frame[12..14] == *ip) {
        return;
    }
    let step = probe.steps.iter().position(|step| step.frame == frame);
    add(Place::Host, step.map_or_else(|| What::Other(summary(frame)), What::Step));
}

/// Has nothing happen by itself, and nothing depend on what was sent before.
fn settle(host: &Host, taps: [&Tap; 3], stations: &Stations) -> Result<()> {
    let mut commands = Vec::new();
    for Station { mac, ip, ip6 } in [stations.guest, stations.neighbour, stations.other] {
        for ip in [ip.to_string(), ip6.to_string()] {
            commands.push(format!("neigh replace {ip} lladdr {mac} dev {BRIDGE} nud permanent"));
        }
    }
    host.ip(&commands)?;
    for tap in taps {
        host.run(&["bridge", "link", "set", "dev", tap.name(), "learning", "off"])?;
    }
    for (tap, station) in taps.into_iter().zip([stations.guest, stations.neighbour]) {
        let mac = station.mac.to_string();
        host.run(&["bridge", "fdb", "replace", &mac, "dev", tap.name(), "master", "static"])?;
    }
    for (key, value) in [
        ("net.ipv4.conf.all.rp_filter", "0"),
        (&format!("net.ipv4.conf.{BRIDGE}.rp_filter"), "0"),
        // Answers are not limited to so many a second.
        ("net.ipv4.icmp_ratemask", "0"),
        ("net.ipv6.icmp.ratelimit", "0"),
        ("net.ipv6.icmp.ratemask", "\n"),
    ] {
        host.sysctl(key, value)?;
    }
    Ok(())
}

/// Whether it is what the host says without being asked: reports of its groups.
fn is_of_the_host_itself(frame: &[u8]) -> bool {
    frame[6..12] == BRIDGE_MAC.octets() && frame[0] & 1 == 1
}

/// Protocol, addresses, and what else is not of chance.
fn summary(frame: &[u8]) -> String {
    let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
    let packet = &frame[14..];
    let (src, dst, protocol, rest) = match ethertype {
        ethertype::IPV4 if packet.len() >= 20 => {
            let addr = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
            let header = usize::from(packet[0] & 0x0f) * 4;
            (addr(12).to_string(), addr(16).to_string(), packet[9], packet.get(header..).unwrap_or_default())
        }
        ethertype::IPV6 if packet.len() >= 40 => {
            let addr = |at: usize| -> Option<Ipv6Addr> {
                Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into())
            };
            let text = |at| addr(at).map_or_else(String::new, |addr| addr.to_string());
            (text(8), text(24), packet[6], &packet[40..])
        }
        _ => return format!("ethertype {ethertype:#06x}, {} bytes,", frame.len()),
    };
    let what = match (protocol, rest) {
        (protocol::ICMP | protocol::ICMPV6, [kind, code, ..]) => format!("ICMP {kind}/{code}"),
        (protocol::TCP, [a, b, c, d, _, _, _, _, _, _, _, _, _, flags, ..]) => {
            let port = |high, low| u16::from_be_bytes([high, low]);
            format!("TCP {} to {}, flags {flags:#04x},", port(*a, *b), port(*c, *d))
        }
        _ => format!("protocol {protocol}, {} bytes,", rest.len()),
    };
    format!("{what} from {src} to {dst}")
}

/// The next packet of a socket, if there is one.
fn received(socket: &OwnedFd) -> Result<Option<Vec<u8>>> {
    let mut packet = vec![0; LONGEST];
    match recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
        Ok(length) => {
            packet.truncate(length);
            Ok(Some(packet))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(error) => Err(error).context("cannot receive"),
    }
}

/// A raw socket of IPv4 or IPv6, in the network namespace of the calling thread.
fn raw_socket(family: libc::c_int, protocol: libc::c_int) -> Result<OwnedFd> {
    // SAFETY: socket takes three integers.
    let socket = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    let socket = Errno::result(socket).with_context(|| format!("no raw socket of protocol {protocol}"))?;
    // SAFETY: the kernel just made the descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// A packet socket of one interface, in the network namespace of the calling thread; it receives frames of an ethertype, or
/// none if that is 0.
fn packet_socket(interface: &str, ethertype: libc::c_int) -> Result<OwnedFd> {
    let socket = raw_socket(libc::AF_PACKET, 0)?;
    let index =
        nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
    // SAFETY: all of sockaddr_ll is integers, for which zero is a value.
    let mut addr: libc::sockaddr_ll = unsafe { mem::zeroed() };
    addr.sll_family = libc::AF_PACKET as libc::c_ushort;
    addr.sll_protocol = (ethertype as u16).to_be();
    addr.sll_ifindex = index.cast_signed();
    let length = mem::size_of_val(&addr) as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll of that length, which outlives the call.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const addr).cast(), length) };
    Errno::result(result).with_context(|| format!("cannot bind to {interface}"))?;
    Ok(socket)
}
