//! The socket filter: an eBPF program that selects the frames of a port from which addresses can be learned.
//!
//! The program records the DHCP transactions that the guest opens, and accepts only answers to these. This is done in the
//! kernel because an answer may arrive before a thread of this process has read the request. The program also checks by
//! which interface a frame entered the host, so that no guest can answer another one.

use std::mem::offset_of;
use std::net::IpAddr;

use nix::libc;

use super::bpf::{ARGUMENTS, Arithmetic, FRAME, If, Instruction, KEPT, Map, RESULT, Register, STACK, Size};
use super::packets::{DHCP_CLIENT, DHCP_SERVER, DHCP6_CLIENT, DHCP6_SERVER, MAX_FRAME};
use super::sieve::{Guest, TRANSACTIONS, Wanted};
use super::{Family, Method};

/// The most trusted servers that the program compares. With more it would become too long.
const MAX_SERVERS: usize = 16;

/// The end of the Ethernet header without and with a VLAN tag. The kernel removes most tags from the frame.
const PACKET_OFFSETS: [u32; 2] = [14, 18];
const SOURCE_MAC: u32 = 6;
const DESTINATION_MAC: u32 = 0;

const ETHERTYPE_ARP: u32 = 0x0806;
const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;
const UDP: u32 = 17;
const UDP_HEADER: u32 = 8;
const IPV6_HEADER: u32 = 40;

/// A number that a test loads from a frame.
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
    /// A word at an offset (second number) behind the IPv4 header, which starts at the first number.
    WordBehind(u32, u32),
    HalfBehind(u32, u32),
    /// The lower three bytes of a word.
    ThreeBytes(u32),
    /// The frame's packet type (`PACKET_*`).
    Kind,
    /// Whether the kernel removed a VLAN tag from the frame.
    Tagged,
    /// The index of the interface by which the frame entered the host; 0 if the host sent it.
    Entrance,
}

/// Half of the guest's MAC address.
#[derive(Clone, Copy)]
enum Mac {
    High,
    Low,
}

#[derive(Clone, Copy)]
enum Compare {
    Is(u32),
    IsNot(u32),
    IsMac(Mac),
    Below(u32),
    NoBits(u32),
    /// Always true. Records the number as an open transaction of the guest.
    Opens,
    /// The number is an open transaction of the guest.
    IsOpen,
    /// The number is not the index of a port that must not serve DHCP. Frames of such ports are counted.
    IsNotClosed,
}

// ---- the program ----

/// The program. It captures a frame if all tests of one alternative are true. `guests` has the port's guest, `closed` the
/// indices of ports that must not serve DHCP.
pub(crate) fn program(wanted: &Wanted, guests: &Map, closed: &Map) -> Vec<Instruction> {
    let mut program = vec![Instruction::copy(FRAME, ARGUMENTS[0])];
    program.push(Instruction::load_from(Size::Word, RESULT, FRAME, PORT));
    program.extend(look_up(guests));
    program.push(Instruction::copy(GUEST, RESULT));
    // The guest is removed when the port is closed.
    let mut found = Instruction::jump_if_null(GUEST, If::Differs);
    found.skips(2);
    program.push(found);
    program.extend(returns(0));
    for tests in alternatives(wanted) {
        let mut alternative = Alternative { closed, code: Vec::new(), misses: Vec::new() };
        tests.into_iter().for_each(|test| alternative.add(test));
        program.extend(alternative.captures());
    }
    program.extend(returns(0));
    program
}

/// Ends the program and captures this many bytes of the frame.
fn returns(bytes: i32) -> [Instruction; 2] {
    [Instruction::compute(RESULT, Arithmetic::Set, bytes), Instruction::exit()]
}

/// Looks up the number in [`RESULT`].
fn look_up(map: &Map) -> Vec<Instruction> {
    let [map_low, map_high] = Instruction::load_map(ARGUMENTS[0], map);
    vec![
        Instruction::store(Size::Word, STACK, KEY, RESULT),
        map_low,
        map_high,
        Instruction::copy(ARGUMENTS[1], STACK),
        Instruction::compute(ARGUMENTS[1], Arithmetic::Add, KEY.into()),
        Instruction::look_up(),
    ]
}

/// The code of one alternative.
struct Alternative<'a> {
    closed: &'a Map,
    code: Vec<Instruction>,
    /// The jumps that are taken if a test is false.
    misses: Vec<usize>,
}

/// The stack offset of the key of a lookup.
const KEY: i16 = -4;
/// Offsets of fields in `struct __sk_buff`.
const KIND: i16 = 4;
const TAG_PRESENT: i16 = 20;
const ENTRANCE: i16 = 36;
const PORT: i16 = 40;

/// The address of the [`Guest`] that the frame is about.
const GUEST: Register = KEPT[0];
const OFFSET: Register = KEPT[1];
const NUMBER: Register = KEPT[2];
const MAC_HIGH: i16 = offset_of!(Guest, mac_high) as i16;
const MAC_LOW: i16 = offset_of!(Guest, mac_low) as i16;
const OPEN: i16 = offset_of!(Guest, open) as i16;

impl Alternative<'_> {
    fn add(&mut self, test: Test) {
        self.load(test.load);
        let [first, second] = ARGUMENTS;
        match test.compare {
            Compare::Is(number) => self.miss(Instruction::jump_if(RESULT, If::Differs, number)),
            Compare::IsNot(number) => self.miss(Instruction::jump_if(RESULT, If::Equal, number)),
            Compare::IsMac(half) => {
                let field = match half {
                    Mac::High => MAC_HIGH,
                    Mac::Low => MAC_LOW,
                };
                self.code.push(Instruction::load_from(Size::Word, first, GUEST, field));
                self.miss(Instruction::jump_if_as(RESULT, If::Differs, first));
            }
            Compare::Below(number) => self.miss(Instruction::jump_if(RESULT, If::AtLeast, number)),
            Compare::NoBits(bits) => self.miss(Instruction::jump_if(RESULT, If::AnyBits, bits)),
            Compare::Opens => {
                self.find_transaction();
                self.code.push(Instruction::store(Size::Double, first, OPEN, NUMBER));
            }
            Compare::IsOpen => {
                self.find_transaction();
                self.code.push(Instruction::load_from(Size::Double, second, first, OPEN));
                self.miss(Instruction::jump_if_wide(second, If::Differs, NUMBER));
            }
            Compare::IsNotClosed => {
                self.code.extend(look_up(self.closed));
                let mut not_closed = Instruction::jump_if_null(RESULT, If::Equal);
                not_closed.skips(2);
                self.code.extend([
                    not_closed,
                    Instruction::compute(first, Arithmetic::Set, 1),
                    Instruction::add_atomically(RESULT, first),
                ]);
                self.miss(Instruction::jump_if_null(RESULT, If::Differs));
            }
        }
    }

    fn load(&mut self, load: Load) {
        let described = |field| vec![Instruction::load_from(Size::Word, RESULT, FRAME, field)];
        let behind = |size, packet, k| {
            vec![
                // The lower half of the first byte is the length of the IPv4 header in words.
                Instruction::load(Size::Byte, packet),
                Instruction::compute(RESULT, Arithmetic::And, 0x0f),
                Instruction::compute(RESULT, Arithmetic::ShiftLeft, 2),
                Instruction::copy(OFFSET, RESULT),
                Instruction::load_behind(size, OFFSET, packet + k),
            ]
        };
        self.code.extend(match load {
            Load::Word(k) => vec![Instruction::load(Size::Word, k)],
            Load::Half(k) => vec![Instruction::load(Size::Half, k)],
            Load::Byte(k) => vec![Instruction::load(Size::Byte, k)],
            Load::WordBehind(packet, k) => behind(Size::Word, packet, k),
            Load::HalfBehind(packet, k) => behind(Size::Half, packet, k),
            Load::ThreeBytes(k) => vec![
                Instruction::load(Size::Word, k),
                Instruction::compute(RESULT, Arithmetic::And, 0x00ff_ffff),
            ],
            Load::Kind => described(KIND),
            Load::Tagged => described(TAG_PRESENT),
            Load::Entrance => described(ENTRANCE),
        });
    }

    /// Computes the slot of the loaded transaction and the value that it has while the transaction is open. The value has a
    /// bit above the transaction's 32 bits, so that transaction 0 differs from an empty slot.
    fn find_transaction(&mut self) {
        const _: () = assert!(TRANSACTIONS.is_power_of_two());
        let [place, _] = ARGUMENTS;
        self.code.extend([
            Instruction::copy(NUMBER, RESULT),
            Instruction::compute(place, Arithmetic::Set, 1),
            Instruction::compute(place, Arithmetic::ShiftLeft, 32),
            Instruction::or(NUMBER, place),
            Instruction::compute(RESULT, Arithmetic::And, TRANSACTIONS as i32 - 1),
            // A slot has eight bytes.
            Instruction::compute(RESULT, Arithmetic::ShiftLeft, 3),
            Instruction::copy(place, GUEST),
            Instruction::add(place, RESULT),
        ]);
    }

    fn miss(&mut self, jump: Instruction) {
        self.misses.push(self.code.len());
        self.code.push(jump);
    }

    /// The complete code: captures the frame if all tests are true, else continues behind the last instruction.
    fn captures(mut self) -> Vec<Instruction> {
        self.code.extend(returns(MAX_FRAME as i32));
        for miss in self.misses {
            // An alternative has some dozen tests of at most ten instructions.
            let past = i16::try_from(self.code.len() - miss - 1).unwrap_or(i16::MAX);
            self.code[miss].skips(past);
        }
        self.code
    }
}

// ---- the frames ----

fn alternatives(wanted: &Wanted) -> Vec<Vec<Test>> {
    let mut alternatives = Vec::new();
    for packet in PACKET_OFFSETS {
        // Requests come first: they are also packets with a source.
        let kinds = match (wanted.family, wanted.method) {
            (Family::Ipv4, Method::Any) => {
                vec![dhcp_request(packet), arp_claim(packet), ipv4_source(packet)]
            }
            (Family::Ipv4, Method::Dhcp) => vec![dhcp_request(packet)],
            (Family::Ipv6, Method::Any) => {
                vec![dhcp6_request(packet), vec![is(Load::Half(packet - 2), ETHERTYPE_IPV6)]]
            }
            (Family::Ipv6, Method::Dhcp) => vec![dhcp6_request(packet)],
        };
        let from_mac =
            vec![is_mac(Load::Word(SOURCE_MAC), Mac::High), is_mac(Load::Half(SOURCE_MAC + 4), Mac::Low)];
        let from_guest = [vec![IS_FROM_GUEST], from_mac].concat();
        alternatives.extend(kinds.into_iter().map(|kind| [from_guest.clone(), tag(packet), kind].concat()));
        let answers = match wanted.family {
            Family::Ipv4 => dhcp_answers(packet, wanted),
            Family::Ipv6 => vec![dhcp6_answer(packet)],
        };
        let (high, low) = (Load::Word(DESTINATION_MAC), Load::Half(DESTINATION_MAC + 4));
        let alone = [IS_TO_GUEST, is_mac(high, Mac::High), is_mac(low, Mac::Low)];
        let broadcast = [IS_TO_GUEST, is(high, u32::MAX), is(low, u16::MAX.into())];
        for to_guest in [alone, broadcast] {
            let answers = answers.iter().cloned();
            alternatives.extend(answers.map(|answer| [to_guest.to_vec(), tag(packet), answer].concat()));
        }
    }
    alternatives
}

const IS_TO_GUEST: Test = Test { load: Load::Kind, compare: Compare::Is(libc::PACKET_OUTGOING as u32) };
const IS_FROM_GUEST: Test = Test { load: Load::Kind, compare: Compare::IsNot(libc::PACKET_OUTGOING as u32) };
const IS_FROM_NO_CLOSED_PORT: Test = Test { load: Load::Entrance, compare: Compare::IsNotClosed };

fn is(load: Load, number: u32) -> Test {
    Test { load, compare: Compare::Is(number) }
}

fn is_mac(load: Load, half: Mac) -> Test {
    Test { load, compare: Compare::IsMac(half) }
}

/// A tag in the frame counts only if the kernel has not removed another one.
fn tag(packet: u32) -> Vec<Test> {
    if packet == PACKET_OFFSETS[0] { Vec::new() } else { vec![is(Load::Tagged, 0)] }
}

/// An ARP request or reply with a sender address.
fn arp_claim(packet: u32) -> Vec<Test> {
    let has_address = Test { load: Load::Word(packet + 14), compare: Compare::IsNot(0) };
    let is_arp = is(Load::Half(packet - 2), ETHERTYPE_ARP);
    vec![is_arp, Test { load: Load::Half(packet + 6), compare: Compare::Below(3) }, has_address]
}

/// An IPv4 packet with a source address that a host can have.
fn ipv4_source(packet: u32) -> Vec<Test> {
    let source = Load::Word(packet + 12);
    vec![
        is(Load::Half(packet - 2), ETHERTYPE_IPV4),
        Test { load: source, compare: Compare::IsNot(0) },
        Test { load: source, compare: Compare::Below(0xe000_0000) },
    ]
}

/// An unfragmented IPv4 UDP datagram between these ports, with the guest's MAC address as a DHCP client's in the payload.
fn dhcp(packet: u32, from: u16, to: u16) -> Vec<Test> {
    const CLIENT_HARDWARE: u32 = UDP_HEADER + 28;
    vec![
        is(Load::Half(packet - 2), ETHERTYPE_IPV4),
        is(Load::Byte(packet + 9), UDP),
        Test { load: Load::Half(packet + 6), compare: Compare::NoBits(0x3fff) },
        is(Load::HalfBehind(packet, 0), from.into()),
        is(Load::HalfBehind(packet, 2), to.into()),
        is_mac(Load::WordBehind(packet, CLIENT_HARDWARE), Mac::High),
        is_mac(Load::HalfBehind(packet, CLIENT_HARDWARE + 4), Mac::Low),
    ]
}

fn dhcp_transaction(packet: u32, compare: Compare) -> Test {
    Test { load: Load::WordBehind(packet, UDP_HEADER + 4), compare }
}

fn dhcp_request(packet: u32) -> Vec<Test> {
    let mut request = dhcp(packet, DHCP_CLIENT, DHCP_SERVER);
    request.push(dhcp_transaction(packet, Compare::Opens));
    request
}

/// A DHCP answer to an open transaction, from a trusted server, and not from a port that must not serve DHCP.
fn dhcp_answers(packet: u32, wanted: &Wanted) -> Vec<Vec<Test>> {
    let mut answer = dhcp(packet, DHCP_SERVER, DHCP_CLIENT);
    answer.extend([dhcp_transaction(packet, Compare::IsOpen), IS_FROM_NO_CLOSED_PORT]);
    let servers: Vec<u32> = wanted
        .servers
        .iter()
        .filter_map(|server| match server {
            IpAddr::V4(address) => Some(address.to_bits()),
            IpAddr::V6(_) => None,
        })
        .collect();
    if wanted.servers.is_empty() || servers.len() > MAX_SERVERS {
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
        is(Load::Half(packet + IPV6_HEADER), from.into()),
        is(Load::Half(packet + IPV6_HEADER + 2), to.into()),
    ]
}

fn dhcp6_transaction(packet: u32, compare: Compare) -> Test {
    Test { load: Load::ThreeBytes(packet + IPV6_HEADER + UDP_HEADER), compare }
}

fn dhcp6_request(packet: u32) -> Vec<Test> {
    let mut request = dhcp6(packet, DHCP6_CLIENT, DHCP6_SERVER);
    request.push(dhcp6_transaction(packet, Compare::Opens));
    request
}

fn dhcp6_answer(packet: u32) -> Vec<Test> {
    let mut answer = dhcp6(packet, DHCP6_SERVER, DHCP6_CLIENT);
    answer.extend([dhcp6_transaction(packet, Compare::IsOpen), IS_FROM_NO_CLOSED_PORT]);
    answer
}
