//! A socket that captures the few frames of one port that can teach its guest's addresses: the kernel drops the rest.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;
use nwfilter_xml::{MacAddr, PortDev};

use super::packets::{DHCP_CLIENT, DHCP_SERVER, DHCP6_CLIENT, DHCP6_SERVER, Heading, MAX_FRAME};
use super::{Family, Method};

/// Bytes of frames that may wait for one port; more are dropped. The kernel doubles it for its own needs.
const BUFFER: libc::c_int = 32 * 1024;
/// So many trusted servers are compared by the kernel; of more, the program would get too long.
const MAX_SERVERS: usize = 16;

/// What a port's socket captures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interest {
    pub(crate) mac: MacAddr,
    pub(crate) family: Family,
    pub(crate) method: Method,
    /// Whose DHCP answers count; empty for everybody's.
    pub(crate) servers: Vec<IpAddr>,
}

/// A capturing socket, bound to one port in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Capture {
    socket: OwnedFd,
}

impl Capture {
    /// Begins to capture. The port must exist.
    pub(crate) fn open(port: &PortDev, interest: &Interest) -> io::Result<Self> {
        let index = nix::net::if_::if_nametoindex(port.as_str())?;
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: a bare system call. Protocol 0 captures nothing until the socket is bound.
        let descriptor = checked(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the descriptor was just made, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let capture = Self { socket };
        capture.attach(&program(interest))?;
        capture.set(libc::SO_RCVBUF, &BUFFER)?;
        capture.bind(index)?;
        Ok(capture)
    }

    /// Captures nothing any longer.
    pub(crate) fn deafen(&self) -> io::Result<()> {
        self.attach(&[statement(libc::BPF_RET | libc::BPF_K, 0)])
    }

    fn attach(&self, program: &[libc::sock_filter]) -> io::Result<()> {
        let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // The kernel only reads through the pointer.
        let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
        self.set(libc::SO_ATTACH_FILTER, &program)
    }

    fn set<T>(&self, option: libc::c_int, value: &T) -> io::Result<()> {
        let length = size_of::<T>() as libc::socklen_t;
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the pointer and length are those of a value that outlives the call.
        checked(unsafe {
            libc::setsockopt(self.socket.as_raw_fd(), libc::SOL_SOCKET, option, value, length)
        })?;
        Ok(())
    }

    fn bind(&self, index: libc::c_uint) -> io::Result<()> {
        let mut address = empty_address();
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index.cast_signed();
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the pointer and length are those of an address that outlives the call.
        checked(unsafe { libc::bind(self.socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), length) })?;
        Ok(())
    }

    /// The next frame that waits, and its length in `buffer`; one that does not fit is cut. `None` when none waits.
    pub(crate) fn next(&self, buffer: &mut [u8; MAX_FRAME]) -> io::Result<Option<(Heading, usize)>> {
        let mut address = empty_address();
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: both pointers are to values that outlive the call, with their lengths.
        let received = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                std::ptr::from_mut(&mut address).cast(),
                &raw mut length,
            )
        };
        match usize::try_from(received) {
            Ok(received) => {
                let outgoing = address.sll_pkttype == libc::PACKET_OUTGOING;
                let heading = if outgoing { Heading::ToGuest } else { Heading::FromGuest };
                Ok(Some((heading, received)))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn empty_address() -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: 0,
        sll_protocol: 0,
        sll_ifindex: 0,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

// ---- the packet filter ----

/// Where the Ethernet header ends, without and with a VLAN tag. The kernel takes most tags out of the frame.
const PACKET_OFFSETS: [u32; 2] = [14, 18];
const SOURCE_MAC: u32 = 6;
const DESTINATION_MAC: u32 = 0;

const ETHERTYPE_ARP: u32 = 0x0806;
const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;
const UDP: u32 = 17;

/// A condition on a frame: a number is loaded and compared.
#[derive(Clone, Copy)]
struct Test {
    load: Load,
    compare: Compare,
}

#[derive(Clone, Copy)]
enum Load {
    Word(u32),
    Half(u32),
    Byte(u32),
    /// At an offset behind the IPv4 header that starts at the first number.
    WordBehind(u32, u32),
    HalfBehind(u32, u32),
    /// The kernel's `PACKET_*` kind of the frame.
    Kind,
    /// Whether the kernel took a VLAN tag out of the frame.
    Tagged,
}

#[derive(Clone, Copy)]
enum Compare {
    Is(u32),
    IsNot(u32),
    Below(u32),
    NoBits(u32),
}

/// The program that captures a frame if all tests of one of the alternatives hold.
fn program(interest: &Interest) -> Vec<libc::sock_filter> {
    let mut program: Vec<_> = alternatives(interest).iter().flat_map(|tests| conjunction(tests)).collect();
    program.push(statement(libc::BPF_RET | libc::BPF_K, 0));
    program
}

/// Captures the frame if all tests hold, else goes on behind the last instruction.
fn conjunction(tests: &[Test]) -> Vec<libc::sock_filter> {
    let mut reversed = vec![statement(libc::BPF_RET | libc::BPF_K, MAX_FRAME as u32)];
    for test in tests.iter().rev() {
        // A conjunction has some dozen tests of at most three instructions: a jump past the rest always fits.
        let past = u8::try_from(reversed.len()).unwrap_or(u8::MAX);
        reversed.push(comparison(test.compare, past));
        reversed.extend(load(test.load).into_iter().rev());
    }
    reversed.reverse();
    reversed
}

fn load(load: Load) -> Vec<libc::sock_filter> {
    let absolute = |size, k| vec![statement(libc::BPF_LD | size | libc::BPF_ABS, k)];
    let behind = |size, packet, k| {
        vec![
            statement(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, packet),
            statement(libc::BPF_LD | size | libc::BPF_IND, packet + k),
        ]
    };
    let ancillary = |k: libc::c_int| absolute(libc::BPF_B, (libc::SKF_AD_OFF + k).cast_unsigned());
    match load {
        Load::Word(k) => absolute(libc::BPF_W, k),
        Load::Half(k) => absolute(libc::BPF_H, k),
        Load::Byte(k) => absolute(libc::BPF_B, k),
        Load::WordBehind(packet, k) => behind(libc::BPF_W, packet, k),
        Load::HalfBehind(packet, k) => behind(libc::BPF_H, packet, k),
        Load::Kind => ancillary(libc::SKF_AD_PKTTYPE),
        Load::Tagged => ancillary(libc::SKF_AD_VLAN_TAG_PRESENT),
    }
}

/// Goes on if the comparison holds, else jumps over `past` instructions.
fn comparison(compare: Compare, past: u8) -> libc::sock_filter {
    let jump =
        |code, k, jt, jf| libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_K | code) as u16, jt, jf, k };
    match compare {
        Compare::Is(k) => jump(libc::BPF_JEQ, k, 0, past),
        Compare::IsNot(k) => jump(libc::BPF_JEQ, k, past, 0),
        Compare::Below(k) => jump(libc::BPF_JGE, k, past, 0),
        Compare::NoBits(k) => jump(libc::BPF_JSET, k, past, 0),
    }
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn alternatives(interest: &Interest) -> Vec<Vec<Test>> {
    let mut alternatives = Vec::new();
    for packet in PACKET_OFFSETS {
        let kinds = match (interest.family, interest.method) {
            (Family::Ipv4, Method::Any) => [arp_claims(packet), ipv4_sources(packet)].concat(),
            (Family::Ipv4, Method::Dhcp) => dhcp_requests(packet),
            (Family::Ipv6, Method::Any) => vec![vec![is(Load::Half(packet - 2), ETHERTYPE_IPV6)]],
            (Family::Ipv6, Method::Dhcp) => vec![dhcp6(packet, DHCP6_CLIENT, DHCP6_SERVER)],
        };
        let from_guest = [IS_FROM_GUEST.to_vec(), mac_is(SOURCE_MAC, interest.mac.0)].concat();
        alternatives.extend(kinds.into_iter().map(|kind| [from_guest.clone(), tag(packet), kind].concat()));
        let answers = match interest.family {
            Family::Ipv4 => dhcp_answers(packet, interest),
            Family::Ipv6 => vec![dhcp6(packet, DHCP6_SERVER, DHCP6_CLIENT)],
        };
        for receiver in [interest.mac.0, [0xff; 6]] {
            let to_guest = [IS_TO_GUEST.to_vec(), mac_is(DESTINATION_MAC, receiver)].concat();
            let answers = answers.iter().cloned();
            alternatives.extend(answers.map(|answer| [to_guest.clone(), tag(packet), answer].concat()));
        }
    }
    alternatives
}

const IS_TO_GUEST: [Test; 1] =
    [Test { load: Load::Kind, compare: Compare::Is(libc::PACKET_OUTGOING as u32) }];
const IS_FROM_GUEST: [Test; 1] =
    [Test { load: Load::Kind, compare: Compare::IsNot(libc::PACKET_OUTGOING as u32) }];

fn is(load: Load, number: u32) -> Test {
    Test { load, compare: Compare::Is(number) }
}

fn mac_is(offset: u32, mac: [u8; 6]) -> Vec<Test> {
    let [a, b, c, d, e, f] = mac;
    let (high, low) = (u32::from_be_bytes([a, b, c, d]), u32::from(u16::from_be_bytes([e, f])));
    vec![is(Load::Word(offset), high), is(Load::Half(offset + 4), low)]
}

/// A tag in the frame counts only if the kernel has not taken out another.
fn tag(packet: u32) -> Vec<Test> {
    if packet == PACKET_OFFSETS[0] { Vec::new() } else { vec![is(Load::Tagged, 0)] }
}

/// An ARP request or reply in which the sender has an address.
fn arp_claims(packet: u32) -> Vec<Vec<Test>> {
    let has_address = Test { load: Load::Word(packet + 14), compare: Compare::IsNot(0) };
    let is_arp = is(Load::Half(packet - 2), ETHERTYPE_ARP);
    vec![vec![is_arp, Test { load: Load::Half(packet + 6), compare: Compare::Below(3) }, has_address]]
}

/// An IPv4 packet with a source that a host can have.
fn ipv4_sources(packet: u32) -> Vec<Vec<Test>> {
    let source = Load::Word(packet + 12);
    vec![vec![
        is(Load::Half(packet - 2), ETHERTYPE_IPV4),
        Test { load: source, compare: Compare::IsNot(0) },
        Test { load: source, compare: Compare::Below(0xe000_0000) },
    ]]
}

/// An unfragmented IPv4 UDP datagram between these ports.
fn udp(packet: u32, from: u16, to: u16) -> Vec<Test> {
    vec![
        is(Load::Half(packet - 2), ETHERTYPE_IPV4),
        is(Load::Byte(packet + 9), UDP),
        Test { load: Load::Half(packet + 6), compare: Compare::NoBits(0x3fff) },
        is(Load::HalfBehind(packet, 0), from.into()),
        is(Load::HalfBehind(packet, 2), to.into()),
    ]
}

fn dhcp_requests(packet: u32) -> Vec<Vec<Test>> {
    vec![udp(packet, DHCP_CLIENT, DHCP_SERVER)]
}

/// A DHCP answer about the guest's hardware address, from one of the trusted servers.
fn dhcp_answers(packet: u32, interest: &Interest) -> Vec<Vec<Test>> {
    const CLIENT_HARDWARE: u32 = 8 + 28;
    let [a, b, c, d, e, f] = interest.mac.0;
    let mut answer = udp(packet, DHCP_SERVER, DHCP_CLIENT);
    answer.push(is(Load::WordBehind(packet, CLIENT_HARDWARE), u32::from_be_bytes([a, b, c, d])));
    answer.push(is(Load::HalfBehind(packet, CLIENT_HARDWARE + 4), u16::from_be_bytes([e, f]).into()));
    let servers: Vec<u32> = interest
        .servers
        .iter()
        .filter_map(|server| match server {
            IpAddr::V4(address) => Some(address.to_bits()),
            IpAddr::V6(_) => None,
        })
        .collect();
    if interest.servers.is_empty() || servers.len() > MAX_SERVERS {
        return vec![answer];
    }
    let from = |server| [answer.clone(), vec![is(Load::Word(packet + 12), server)]].concat();
    servers.into_iter().map(from).collect()
}

/// A DHCPv6 message without extension headers.
fn dhcp6(packet: u32, from: u16, to: u16) -> Vec<Test> {
    vec![
        is(Load::Half(packet - 2), ETHERTYPE_IPV6),
        is(Load::Byte(packet + 6), UDP),
        is(Load::Half(packet + 40), from.into()),
        is(Load::Half(packet + 42), to.into()),
    ]
}
