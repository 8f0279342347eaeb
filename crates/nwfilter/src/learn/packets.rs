//! Reads from a frame on a guest's port what it says about the guest's addresses. No I/O. Every byte may be hostile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::ControlFlow;

use dhcproto::v4::borrowed::Message as Dhcp4;
use dhcproto::v4::{HType, MessageType as Dhcp4Type, Opcode, OptionCode as Dhcp4Option};
use dhcproto::v6::{MessageType as Dhcp6Type, OptionCode};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacketSlice, EtherType, Ethernet2Slice, IpNumber, Ipv4HeaderSlice,
    Ipv6HeaderSlice, SingleVlanSlice, UdpSlice,
};
use nwfilter_xml::MacAddr;

/// The bytes of a frame that are read. A longer DHCP message is ignored.
pub(crate) const MAX_FRAME: usize = 2048;

pub(crate) const DHCP_SERVER: u16 = 67;
pub(crate) const DHCP_CLIENT: u16 = 68;
pub(crate) const DHCP6_CLIENT: u16 = 546;
pub(crate) const DHCP6_SERVER: u16 = 547;

const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Type, code, checksum and reserved word come before the target address.
const NEIGHBOUR_TARGET: std::ops::Range<usize> = 8..24;
/// The hop limit that neighbour discovery must have (RFC 4861): no router has forwarded it.
const NEIGHBOUR_HOP_LIMIT: u8 = 255;

/// The direction of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heading {
    /// The guest sent it.
    FromGuest,
    /// The guest receives it.
    ToGuest,
}

/// What one frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The guest claims the address by ARP.
    Arp(Ipv4Addr),
    /// The guest sent an IPv4 packet from the address.
    Ipv4(Ipv4Addr),
    /// The guest claims the address by neighbour discovery, or checks whether it is free.
    Neighbour(Ipv6Addr),
    /// The guest sent an IPv6 packet from the address.
    Ipv6(Ipv6Addr),
    /// The guest asks for addresses, by DHCP or DHCPv6.
    Request {
        /// The transaction id, which the server's answer repeats.
        transaction: u32,
        /// The requested addresses.
        addresses: Vec<IpAddr>,
    },
    /// The guest gives addresses back: DHCPRELEASE, DHCPDECLINE, and the same of DHCPv6.
    Release(Vec<IpAddr>),
    /// A server grants addresses.
    Grant {
        /// The transaction id of the request.
        transaction: u32,
        /// The source address of the answer.
        server: IpAddr,
        /// The addresses, each with its lease time in seconds: [`FOREVER`] for no end, 0 to withdraw it.
        leases: Vec<(IpAddr, u32)>,
    },
    /// A server refuses a request.
    Refusal {
        /// The transaction id of the request.
        transaction: u32,
        /// The source address of the answer.
        server: IpAddr,
    },
}

/// The lease time that never ends, in DHCP as in DHCPv6.
pub const FOREVER: u32 = u32::MAX;

/// Reads what a frame says about the addresses of the guest with this MAC address. `None` if that is nothing, or if the
/// frame is malformed, truncated, ambiguous, or neither from nor to that MAC address.
///
/// A frame may have one VLAN tag, as libvirt allows. An answer of a DHCP server only counts when the guest receives
/// it and it does not come from the guest's own MAC address.
pub fn observe(frame: &[u8], heading: Heading, mac: MacAddr) -> Option<Observation> {
    let frame = frame.get(..MAX_FRAME).unwrap_or(frame);
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).ok()?;
    let from_guest = ethernet.source() == mac.0;
    let (ether_type, packet) = untagged(&ethernet)?;
    match heading {
        Heading::FromGuest if from_guest => match ether_type {
            EtherType::ARP => arp(packet, mac),
            EtherType::IPV4 => ipv4_from_guest(packet, mac),
            EtherType::IPV6 => ipv6_from_guest(packet),
            _ => None,
        },
        Heading::ToGuest if !from_guest && is_for(&ethernet, mac) => match ether_type {
            EtherType::IPV4 => ipv4_to_guest(packet, mac),
            EtherType::IPV6 => ipv6_to_guest(packet),
            _ => None,
        },
        _ => None,
    }
}

fn is_for(ethernet: &Ethernet2Slice<'_>, mac: MacAddr) -> bool {
    ethernet.destination() == mac.0 || ethernet.destination() == [0xff; 6]
}

/// The protocol and packet behind at most one VLAN tag.
fn untagged<'a>(ethernet: &Ethernet2Slice<'a>) -> Option<(EtherType, &'a [u8])> {
    match ethernet.ether_type() {
        EtherType::VLAN_TAGGED_FRAME | EtherType::PROVIDER_BRIDGING => {
            let tag = SingleVlanSlice::from_slice(ethernet.payload_slice()).ok()?;
            Some((tag.ether_type(), tag.payload_slice()))
        }
        other => Some((other, ethernet.payload_slice())),
    }
}

fn arp(packet: &[u8], mac: MacAddr) -> Option<Observation> {
    let arp = ArpPacketSlice::from_slice(packet).ok()?;
    let is_ours = arp.hw_addr_type() == ArpHardwareId::ETHERNET
        && arp.proto_addr_type() == EtherType::IPV4
        && matches!(arp.operation(), ArpOperation::REQUEST | ArpOperation::REPLY)
        && arp.sender_hw_addr() == mac.0;
    let sender: [u8; 4] = arp.sender_protocol_addr().try_into().ok()?;
    usable4(sender.into()).filter(|_| is_ours).map(Observation::Arp)
}

fn ipv4_from_guest(packet: &[u8], mac: MacAddr) -> Option<Observation> {
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    let source = usable4(header.source_addr()).map(Observation::Ipv4);
    match udp(IpHeader::V4(&header), packet, DHCP_CLIENT, DHCP_SERVER) {
        Some(message) => dhcp_request(message, mac).or(source),
        None => source,
    }
}

fn ipv4_to_guest(packet: &[u8], mac: MacAddr) -> Option<Observation> {
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    let message = udp(IpHeader::V4(&header), packet, DHCP_SERVER, DHCP_CLIENT)?;
    dhcp_answer(message, header.source_addr(), mac)
}

fn ipv6_from_guest(packet: &[u8]) -> Option<Observation> {
    let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
    let discovers = header.next_header() == IpNumber::IPV6_ICMP && header.hop_limit() == NEIGHBOUR_HOP_LIMIT;
    if discovers && let Some(address) = neighbour(&header, payload(IpHeader::V6(&header), packet)?) {
        return Some(Observation::Neighbour(address));
    }
    if let Some(message) = udp(IpHeader::V6(&header), packet, DHCP6_CLIENT, DHCP6_SERVER) {
        return dhcp6_request(message);
    }
    usable6(header.source_addr()).map(Observation::Ipv6)
}

fn ipv6_to_guest(packet: &[u8]) -> Option<Observation> {
    let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
    let message = udp(IpHeader::V6(&header), packet, DHCP6_SERVER, DHCP6_CLIENT)?;
    dhcp6_answer(message, header.source_addr())
}

/// The address that a guest claims: the target of an advertisement, or of a solicitation without a source address, by
/// which a host checks whether an address is free (RFC 4862, 5.4).
fn neighbour(header: &Ipv6HeaderSlice<'_>, message: &[u8]) -> Option<Ipv6Addr> {
    let target: [u8; 16] = message.get(NEIGHBOUR_TARGET)?.try_into().ok()?;
    let claims = match (message.first()?, message.get(1)?) {
        (&NEIGHBOUR_ADVERTISEMENT, 0) => true,
        (&NEIGHBOUR_SOLICITATION, 0) => header.source_addr().is_unspecified(),
        _ => false,
    };
    usable6(target.into()).filter(|_| claims)
}

enum IpHeader<'a> {
    V4(&'a Ipv4HeaderSlice<'a>),
    V6(&'a Ipv6HeaderSlice<'a>),
}

/// The payload behind the IP header, if it is complete and not a fragment.
fn payload<'a>(header: IpHeader<'_>, packet: &'a [u8]) -> Option<&'a [u8]> {
    let (start, length) = match header {
        IpHeader::V4(header) => {
            let whole = !header.is_fragmenting_payload();
            (header.slice().len(), header.payload_len().ok().filter(|_| whole)?)
        }
        IpHeader::V6(header) => (header.slice().len(), header.payload_length()),
    };
    packet.get(start..start.checked_add(length.into())?)
}

/// The payload of a UDP datagram between these ports.
fn udp<'a>(header: IpHeader<'_>, packet: &'a [u8], from: u16, to: u16) -> Option<&'a [u8]> {
    let protocol = match &header {
        IpHeader::V4(header) => header.protocol(),
        IpHeader::V6(header) => header.next_header(),
    };
    let datagram = (protocol == IpNumber::UDP).then(|| payload(header, packet)).flatten()?;
    let udp = UdpSlice::from_slice(datagram).ok()?;
    (udp.source_port() == from && udp.destination_port() == to).then(|| udp.payload())
}

// ---- DHCP ----

/// The options of a DHCP message that are used here, each at most once.
#[derive(Default)]
struct Dhcp4Options {
    kind: Option<u8>,
    lease_time: Option<u32>,
    requested: Option<Ipv4Addr>,
}

/// Reads the options. `None` if one occurs twice or has a wrong length, because readers could disagree about it.
fn dhcp4_options(message: &Dhcp4<'_>) -> Option<Dhcp4Options> {
    fn set<T, const N: usize>(field: &mut Option<T>, data: &[u8], read: fn([u8; N]) -> T) -> ControlFlow<()> {
        match (&field, data.try_into()) {
            (None, Ok(bytes)) => {
                *field = Some(read(bytes));
                ControlFlow::Continue(())
            }
            _ => ControlFlow::Break(()),
        }
    }
    let mut options = Dhcp4Options::default();
    let read = message.opts().try_for_each(|option| match option.code() {
        Dhcp4Option::MessageType => set(&mut options.kind, option.data(), |[kind]| kind),
        Dhcp4Option::AddressLeaseTime => set(&mut options.lease_time, option.data(), u32::from_be_bytes),
        Dhcp4Option::RequestedIpAddress => set(&mut options.requested, option.data(), Ipv4Addr::from),
        _ => ControlFlow::Continue(()),
    });
    read.is_continue().then_some(options)
}

/// A DHCP message about the hardware address `mac`.
fn dhcp4(message: &[u8], opcode: Opcode, mac: MacAddr) -> Option<(Dhcp4<'_>, Dhcp4Options)> {
    let message = Dhcp4::new(message).ok()?;
    // chaddr() slices by hlen, so hlen is checked first.
    let is_ours = message.opcode() == opcode
        && message.htype() == HType::Eth
        && usize::from(message.hlen()) == mac.0.len()
        && message.chaddr() == mac.0;
    let options = dhcp4_options(&message).filter(|_| is_ours)?;
    Some((message, options))
}

fn dhcp_request(message: &[u8], mac: MacAddr) -> Option<Observation> {
    let (message, options) = dhcp4(message, Opcode::BootRequest, mac)?;
    let named = || [options.requested, Some(message.ciaddr())].into_iter().flatten().filter_map(usable4);
    let addresses = || named().map(IpAddr::V4).take(1).collect::<Vec<_>>();
    match Dhcp4Type::from(options.kind?) {
        Dhcp4Type::Request => {
            Some(Observation::Request { transaction: message.xid(), addresses: addresses() })
        }
        // A server may acknowledge it directly (RFC 4039), and does not refuse the address that it names.
        Dhcp4Type::Discover => {
            Some(Observation::Request { transaction: message.xid(), addresses: Vec::new() })
        }
        Dhcp4Type::Release => {
            usable4(message.ciaddr()).map(|address| Observation::Release(vec![address.into()]))
        }
        Dhcp4Type::Decline => Some(Observation::Release(addresses())),
        _ => None,
    }
}

fn dhcp_answer(message: &[u8], server: Ipv4Addr, mac: MacAddr) -> Option<Observation> {
    let (message, options) = dhcp4(message, Opcode::BootReply, mac)?;
    let (transaction, server) = (message.xid(), server.into());
    match Dhcp4Type::from(options.kind?) {
        Dhcp4Type::Ack => {
            let address = usable4(message.yiaddr())?;
            let seconds = options.lease_time.filter(|seconds| *seconds > 0)?;
            Some(Observation::Grant { transaction, server, leases: vec![(address.into(), seconds)] })
        }
        Dhcp4Type::Nak => Some(Observation::Refusal { transaction, server }),
        _ => None,
    }
}

// ---- DHCPv6 ----

/// The addresses in a DHCPv6 message.
struct Dhcp6 {
    kind: Dhcp6Type,
    transaction: u32,
    /// The addresses of its identity associations with their valid lifetimes.
    leases: Vec<(IpAddr, u32)>,
}

/// Reads a message by RFC 8415, section 8. The decoder of dhcproto is not used, because it overflows on options that are
/// too short.
fn dhcp6(message: &[u8]) -> Option<Dhcp6> {
    let (&[kind, high, middle, low], options) = message.split_first_chunk()?;
    let transaction = u32::from_be_bytes([0, high, middle, low]);
    let mut leases = Vec::new();
    for option in Dhcp6Options(options) {
        let (code, association) = option?;
        if OptionCode::from(code) == OptionCode::IANA {
            let (_id_and_times, options) = association.split_first_chunk::<12>()?;
            for option in Dhcp6Options(options) {
                let (code, lease) = option?;
                if OptionCode::from(code) == OptionCode::IAAddr {
                    leases.extend(dhcp6_lease(lease)?);
                }
            }
        }
    }
    Some(Dhcp6 { kind: Dhcp6Type::from(kind), transaction, leases })
}

/// The address of an option with its valid lifetime. The inner `None` is an address that no host can have.
fn dhcp6_lease(option: &[u8]) -> Option<Option<(IpAddr, u32)>> {
    let (address, rest) = option.split_first_chunk::<16>()?;
    let (_preferred, rest) = rest.split_first_chunk::<4>()?;
    let valid = u32::from_be_bytes(*rest.first_chunk()?);
    Some(usable6((*address).into()).map(|address| (address.into(), valid)))
}

/// Iterates over options with their codes. Ends with `None` at an option that is longer than the message.
struct Dhcp6Options<'a>(&'a [u8]);

impl<'a> Iterator for Dhcp6Options<'a> {
    type Item = Option<(u16, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let option = self.0.split_first_chunk().and_then(|(&[a, b, c, d], rest)| {
            let data = rest.split_at_checked(u16::from_be_bytes([c, d]).into());
            data.map(|(data, rest)| ((u16::from_be_bytes([a, b]), data), rest))
        });
        let (option, rest) = option.unzip();
        self.0 = rest.unwrap_or_default();
        Some(option)
    }
}

fn dhcp6_request(message: &[u8]) -> Option<Observation> {
    let Dhcp6 { kind, transaction, leases } = dhcp6(message)?;
    let addresses = leases.into_iter().map(|(address, _)| address).collect();
    match kind {
        Dhcp6Type::Solicit | Dhcp6Type::Request | Dhcp6Type::Renew | Dhcp6Type::Rebind => {
            Some(Observation::Request { transaction, addresses })
        }
        Dhcp6Type::Release | Dhcp6Type::Decline => Some(Observation::Release(addresses)),
        _ => None,
    }
}

fn dhcp6_answer(message: &[u8], server: Ipv6Addr) -> Option<Observation> {
    let Dhcp6 { kind, transaction, leases } = dhcp6(message)?;
    let is_grant = kind == Dhcp6Type::Reply && !leases.is_empty();
    is_grant.then_some(Observation::Grant { transaction, server: server.into(), leases })
}

// ---- addresses ----

/// The address, if a single host can have it.
pub(crate) fn usable(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => usable4(address).map(IpAddr::V4),
        IpAddr::V6(address) => usable6(address).map(IpAddr::V6),
    }
}

/// The same for IPv4. libvirt accepts loopback addresses too.
fn usable4(address: Ipv4Addr) -> Option<Ipv4Addr> {
    let first = address.octets()[0];
    (first != 0 && first != 127 && first < 224).then_some(address)
}

fn usable6(address: Ipv6Addr) -> Option<Ipv6Addr> {
    let mapped = address.to_ipv4_mapped().is_some();
    let unusable = address.is_unspecified() || address.is_loopback() || address.is_multicast() || mapped;
    (!unusable).then_some(address)
}
