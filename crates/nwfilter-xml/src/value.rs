//! The values of attributes: how each kind is read from text and how it is written.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::Error;
use crate::names::{MacAddr, VarName};
use crate::text::serde_as_text;

/// Either a literal of the attribute's kind or a variable that a binding gives a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Value<T = Literal> {
    /// Written out in the filter.
    Literal(T),
    /// `$NAME`, `$NAME[3]` or `$NAME[@2]`.
    Variable(VarRef),
}

/// A reference to a variable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VarRef {
    /// The variable's name.
    pub name: VarName,
    /// Which of its values.
    pub access: Access,
}

/// Which of a variable's values a reference takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// All of them, one after the other; references with the same iterator number advance together.
    Iterator(u16),
    /// The one at this index, counted from 0.
    Element(u32),
}

/// The largest iterator number libvirt takes.
const ITERATOR_MAX: u32 = 1000;

impl VarRef {
    /// Reads a reference without its leading `$`. As in libvirt, spaces are allowed inside the brackets, and
    /// what follows the `]` has no effect.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let end = text.bytes().position(|b| !(b.is_ascii_alphanumeric() || b == b'_')).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        // Bytes of the name were just checked, and that is all a variable name asks for.
        let name: VarName = name.parse().map_err(|_| "malformed variable name".to_owned())?;
        if rest.is_empty() {
            return Ok(Self { name, access: Access::Iterator(0) });
        }
        let inner = rest.strip_prefix('[').ok_or("expected '[' or the end after the variable's name")?;
        let (iterator, inner) = match inner.trim_start().strip_prefix('@') {
            Some(number) => (true, number),
            None => (false, inner),
        };
        let (number, inner) = leading_uint(inner, 10).ok_or("expected a number between the brackets")?;
        if !inner.trim_start().starts_with(']') {
            return Err("expected ']' after the number".to_owned());
        }
        let access = match (iterator, u16::try_from(number)) {
            (false, _) => Access::Element(number),
            (true, Ok(id)) if number <= ITERATOR_MAX => Access::Iterator(id),
            (true, _) => return Err(format!("iterator numbers end at {ITERATOR_MAX}")),
        };
        Ok(Self { name, access })
    }
}

impl fmt::Display for VarRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.access {
            Access::Iterator(0) => write!(f, "${}", self.name),
            Access::Iterator(id) => write!(f, "${}[@{id}]", self.name),
            Access::Element(index) => write!(f, "${}[{index}]", self.name),
        }
    }
}

/// A number and the base it was written in, which is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Number<T> {
    /// The number.
    pub value: T,
    /// True if it was written in hex.
    pub hex: bool,
}

/// A set of connection states, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct States(u8);

impl States {
    /// The first packet of a connection.
    pub const NEW: States = States(1);
    /// A packet of a connection that was seen in both directions.
    pub const ESTABLISHED: States = States(2);
    /// The first packet of a connection that a known one announced (FTP data, ICMP errors).
    pub const RELATED: States = States(4);
    /// A packet that belongs to no connection.
    pub const INVALID: States = States(8);
    /// No match on the state at all; excludes the others.
    pub const NONE: States = States(16);

    const NAMES: [(u8, &'static str); 5] =
        [(1, "NEW"), (2, "ESTABLISHED"), (4, "RELATED"), (8, "INVALID"), (16, "NONE")];

    /// Whether every state of `other` is in the set.
    pub fn contains(self, other: States) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether no state was named (`state=''`).
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl std::ops::BitOr for States {
    type Output = States;
    fn bitor(self, other: States) -> States {
        States(self.0 | other.0)
    }
}

impl fmt::Display for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_bits(f, self.0, &Self::NAMES)
    }
}

/// A set of TCP flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct TcpFlagSet(u8);

impl TcpFlagSet {
    /// Bit and name of each flag, as on the wire.
    pub const NAMES: [(u8, &'static str); 6] =
        [(1, "FIN"), (2, "SYN"), (4, "RST"), (8, "PSH"), (16, "ACK"), (32, "URG")];
    const ALL: u8 = 0x3f;

    /// The flags as the bits of the TCP header.
    pub fn bits(self) -> u8 {
        self.0
    }
}

impl fmt::Display for TcpFlagSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("NONE"),
            Self::ALL => f.write_str("ALL"),
            bits => write_bits(f, bits, &Self::NAMES),
        }
    }
}

fn write_bits(f: &mut fmt::Formatter<'_>, bits: u8, names: &[(u8, &str)]) -> fmt::Result {
    let mut separator = "";
    for (_, name) in names.iter().filter(|(bit, _)| bits & bit != 0) {
        write!(f, "{separator}{name}")?;
        separator = ",";
    }
    Ok(())
}

/// Which address and port of a packet an ipset is asked about, one for each dimension of the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SetDirection {
    /// The source.
    Src,
    /// The destination.
    Dst,
}

impl fmt::Display for SetDirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SetDirection::Src => "src",
            SetDirection::Dst => "dst",
        })
    }
}

impl FromStr for VarRef {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::name("variable", text, "expected $NAME, $NAME[index] or $NAME[@iterator]");
        Self::parse(text.strip_prefix('$').ok_or_else(wrong)?).map_err(|_| wrong())
    }
}

impl FromStr for States {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::name("state", text, "expected NEW, ESTABLISHED, RELATED, INVALID or NONE");
        parse_bits(text, &Self::NAMES).map(States).ok_or_else(wrong)
    }
}

impl FromStr for TcpFlagSet {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::name("TCP flag", text, "expected FIN, SYN, RST, PSH, ACK, URG, ALL or NONE");
        parse_tcp_flags(text).ok_or_else(wrong)
    }
}

impl FromStr for SetDirection {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        match parse_set_flags(text).as_deref() {
            Some([direction]) => Ok(*direction),
            _ => Err(Error::name("direction of a set", text, "expected src or dst")),
        }
    }
}

serde_as_text!(VarRef, States, TcpFlagSet, SetDirection);

/// What an attribute's value is and how it is written. The variants say what they accept beside a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Six bytes in hex.
    Mac,
    /// A MAC mask: ones, then zeros.
    MacMask,
    /// An IPv4 address.
    Ipv4,
    /// The prefix length of an IPv4 address, or a dotted mask.
    Ipv4Prefix,
    /// An IPv6 address.
    Ipv6,
    /// The prefix length of an IPv6 address, or a mask in IPv6 notation.
    Ipv6Prefix,
    /// 0 to 255, decimal or hex.
    U8,
    /// 0 to 65535, decimal or hex.
    U16,
    /// 0 to 65535, decimal only.
    U16Decimal,
    /// 0 to 4294967295, decimal or hex.
    U32,
    /// An Ethernet protocol by name or number; numbers start at 0x600.
    EtherType,
    /// The protocol inside a VLAN tag by name or number; numbers start at 0x3c.
    VlanEncap,
    /// 0 to 4095, decimal or hex.
    VlanId,
    /// An ARP operation by name or number.
    ArpOpcode,
    /// An IP protocol by name or number.
    IpProtocol,
    /// 0 to 63, decimal or hex.
    Dscp,
    /// `true`, `yes` or `1`; anything else counts as false.
    Bool,
    /// NEW, ESTABLISHED, RELATED and INVALID, or NONE.
    States,
    /// MASK/SET, each a list of SYN, ACK, URG, PSH, FIN and RST, or ALL or NONE.
    TcpFlags,
    /// The name of an ipset: up to 31 of `[a-zA-Z0-9_.:+ -]`.
    IpSet,
    /// One to six of src and dst.
    IpSetFlags,
    /// Free text; longer than 256 bytes it is cut.
    Comment,
}

/// A value of one of the [`Kind`]s.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Literal {
    /// [`Kind::Mac`] and [`Kind::MacMask`].
    Mac(MacAddr),
    /// [`Kind::Ipv4`].
    Ipv4(Ipv4Addr),
    /// [`Kind::Ipv6`].
    Ipv6(Ipv6Addr),
    /// [`Kind::Ipv4Prefix`] and [`Kind::Ipv6Prefix`]: the number of leading one bits.
    Prefix(u8),
    /// [`Kind::U8`], [`Kind::Dscp`] and [`Kind::IpProtocol`].
    U8(Number<u8>),
    /// The 16-bit kinds.
    U16(Number<u16>),
    /// [`Kind::U32`].
    U32(Number<u32>),
    /// [`Kind::Bool`].
    Bool(bool),
    /// [`Kind::States`].
    States(States),
    /// [`Kind::TcpFlags`].
    TcpFlags {
        /// The flags that are looked at.
        mask: TcpFlagSet,
        /// Those of them that must be set.
        set: TcpFlagSet,
    },
    /// [`Kind::IpSet`].
    IpSet(String),
    /// [`Kind::IpSetFlags`].
    IpSetFlags(Vec<SetDirection>),
    /// [`Kind::Comment`].
    Text(String),
}

const ETHER_TYPES: [(u16, &str); 5] =
    [(0x0806, "arp"), (0x8035, "rarp"), (0x0800, "ipv4"), (0x86dd, "ipv6"), (0x8100, "vlan")];

const ARP_OPCODES: [(u16, &str); 9] = [
    (1, "Request"),
    (2, "Reply"),
    (3, "Request_Reverse"),
    (4, "Reply_Reverse"),
    (5, "DRARP_Request"),
    (6, "DRARP_Reply"),
    (7, "DRARP_Error"),
    (8, "InARP_Request"),
    (9, "ARP_NAK"),
];

const IP_PROTOCOLS: [(u16, &str); 9] = [
    (6, "tcp"),
    (17, "udp"),
    (136, "udplite"),
    (50, "esp"),
    (51, "ah"),
    (1, "icmp"),
    (2, "igmp"),
    (132, "sctp"),
    (58, "icmpv6"),
];

/// What C's `isspace` takes as white space.
const C_SPACE: [char; 6] = [' ', '\t', '\n', '\r', '\x0b', '\x0c'];

/// Bytes a comment keeps.
pub(crate) const COMMENT_MAX: usize = 256;

impl Kind {
    /// What a value of this kind looks like, for messages and documentation.
    pub fn expected(self) -> &'static str {
        match self {
            Kind::Mac => "a MAC address, as 52:54:00:12:34:56",
            Kind::MacMask => "a MAC mask of ones followed by zeros, as ff:ff:ff:00:00:00",
            Kind::Ipv4 => "an IPv4 address",
            Kind::Ipv4Prefix => "a prefix length (0 to 32) or a dotted mask of ones followed by zeros",
            Kind::Ipv6 => "an IPv6 address",
            Kind::Ipv6Prefix => "a prefix length (0 to 128) or an IPv6 mask of ones followed by zeros",
            Kind::U8 => "a number from 0 to 255, decimal or 0x hex",
            Kind::U16 => "a number from 0 to 65535, decimal or 0x hex",
            Kind::U16Decimal => "a decimal number from 0 to 65535",
            Kind::U32 => "a number from 0 to 4294967295, decimal or 0x hex",
            Kind::EtherType => "arp, rarp, ipv4, ipv6, vlan, or a number from 0x600 to 0xffff",
            Kind::VlanEncap => "arp, rarp, ipv4, ipv6, vlan, or a number from 0x3c to 0xffff",
            Kind::VlanId => "a VLAN number from 0 to 4095",
            Kind::ArpOpcode => "an ARP operation, as Request, Reply or Request_Reverse, or its number",
            Kind::IpProtocol => {
                "tcp, udp, udplite, esp, ah, icmp, igmp, sctp, icmpv6, or a number from 0 to 255"
            }
            Kind::Dscp => "a DSCP value from 0 to 63",
            Kind::Bool => "true or false",
            Kind::States => "a list of NEW, ESTABLISHED, RELATED and INVALID, or NONE",
            Kind::TcpFlags => "MASK/SET, each a list of SYN, ACK, URG, PSH, FIN and RST, or ALL or NONE",
            Kind::IpSet => "the name of an ipset: up to 31 of [a-zA-Z0-9_.:+ -]",
            Kind::IpSetFlags => "one to six of src and dst, separated by commas",
            Kind::Comment => "text",
        }
    }

    /// The names this kind has for numbers.
    pub fn names(self) -> &'static [(u16, &'static str)] {
        match self {
            Kind::EtherType | Kind::VlanEncap => &ETHER_TYPES,
            Kind::ArpOpcode => &ARP_OPCODES,
            Kind::IpProtocol => &IP_PROTOCOLS,
            _ => &[],
        }
    }

    /// Reads a literal of this kind; `None` if the text is none. What is accepted is what libvirt 9.0.0 accepts.
    pub fn parse(self, text: &str) -> Option<Literal> {
        match self {
            Kind::Mac => parse_mac(text).map(Literal::Mac),
            Kind::MacMask => parse_mac(text).filter(is_mac_mask).map(Literal::Mac),
            Kind::Ipv4 => parse_ipv4(text).map(Literal::Ipv4),
            Kind::Ipv6 => text.parse().ok().map(Literal::Ipv6),
            Kind::Ipv4Prefix => {
                parse_prefix(text, 32, |t| parse_ipv4(t).map(|a| u128::from(a.to_bits()) << 96))
            }
            Kind::Ipv6Prefix => parse_prefix(text, 128, |t| t.parse().ok().map(Ipv6Addr::to_bits)),
            Kind::U8 => self.small(text, 0xff),
            Kind::Dscp => self.small(text, 63),
            Kind::IpProtocol => self.small(text, 0xff),
            Kind::U16 => self.number(text, 0, 0xffff),
            Kind::VlanId => self.number(text, 0, 4095),
            Kind::EtherType => self.number(text, 0x600, 0xffff),
            Kind::VlanEncap => self.number(text, 0x3c, 0xffff),
            Kind::ArpOpcode => self.number(text, 0, 0xffff),
            Kind::U16Decimal => {
                let value = u16::try_from(parse_uint(text, 10)?).ok()?;
                Some(Literal::U16(Number { value, hex: false }))
            }
            Kind::U32 => parse_dec_or_hex(text, u32::MAX).map(Literal::U32),
            Kind::Bool => Some(Literal::Bool(matches!(text, "true" | "1" | "yes"))),
            Kind::States => {
                let bits = parse_bits(text, &States::NAMES)?;
                let none = States(bits).contains(States::NONE);
                Some(Literal::States(if none { States::NONE } else { States(bits) }))
            }
            Kind::TcpFlags => {
                let (mask, set) = text.split_once('/')?;
                Some(Literal::TcpFlags { mask: parse_tcp_flags(mask)?, set: parse_tcp_flags(set)? })
            }
            Kind::IpSet => {
                let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_.:-+ ".contains(&b);
                (text.len() <= 31 && text.bytes().all(allowed)).then(|| Literal::IpSet(text.to_owned()))
            }
            Kind::IpSetFlags => parse_set_flags(text).map(Literal::IpSetFlags),
            Kind::Comment => {
                let end =
                    (0..=text.len().min(COMMENT_MAX)).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
                Some(Literal::Text(text[..end].to_owned()))
            }
        }
    }

    /// An 8-bit number up to `max`, or one of the kind's names.
    fn small(self, text: &str, max: u8) -> Option<Literal> {
        let Number { value, hex } = self.number_or_name(text, u32::from(u8::MAX))?;
        let value = u8::try_from(value).ok().filter(|v| *v <= max)?;
        Some(Literal::U8(Number { value, hex }))
    }

    /// A 16-bit number in `min..=max`, or one of the kind's names.
    fn number(self, text: &str, min: u16, max: u16) -> Option<Literal> {
        let Number { value, hex } = self.number_or_name(text, u32::from(u16::MAX))?;
        let value = u16::try_from(value).ok().filter(|v| (min..=max).contains(v))?;
        Some(Literal::U16(Number { value, hex }))
    }

    /// The base is kept only where it is written again: not where a name takes the number's place, and never for
    /// ARP operations.
    fn number_or_name(self, text: &str, max: u32) -> Option<Number<u32>> {
        let named = || {
            let (value, _) = self.names().iter().find(|(_, name)| name.eq_ignore_ascii_case(text))?;
            Some(Number { value: u32::from(*value), hex: false })
        };
        let Number { value, hex } = parse_dec_or_hex(text, max).or_else(named)?;
        let forgotten = self == Kind::ArpOpcode || self.name_of(value).is_some();
        Some(Number { value, hex: hex && !forgotten })
    }

    /// The name that is written in place of a number.
    fn name_of(self, number: u32) -> Option<&'static str> {
        self.names().iter().find(|(value, _)| u32::from(*value) == number).map(|(_, name)| *name)
    }

    /// Writes a literal in libvirt's canonical form, without XML escapes.
    pub fn write(self, literal: &Literal, out: &mut String) {
        use fmt::Write;
        // Writing to a String cannot fail.
        let _ = match self.named(literal) {
            Some(name) => out.write_str(name),
            None => write!(out, "{literal}"),
        };
    }

    /// The name that this kind has for a number.
    fn named(self, literal: &Literal) -> Option<&'static str> {
        let number = match literal {
            Literal::U8(n) => u32::from(n.value),
            Literal::U16(n) => u32::from(n.value),
            _ => return None,
        };
        self.name_of(number)
    }
}

/// As in XML, but for numbers that a [`Kind`] has names for: these are written by [`Kind::write`].
impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Literal::Mac(mac) => mac.fmt(f),
            Literal::Ipv4(addr) => addr.fmt(f),
            Literal::Ipv6(addr) => write_ipv6(f, *addr),
            Literal::Prefix(bits) => bits.fmt(f),
            Literal::U8(number) => number.fmt(f),
            Literal::U16(number) => number.fmt(f),
            Literal::U32(number) => number.fmt(f),
            Literal::Bool(value) => value.fmt(f),
            Literal::States(states) => states.fmt(f),
            Literal::TcpFlags { mask, set } => write!(f, "{mask}/{set}"),
            Literal::IpSet(text) | Literal::Text(text) => f.write_str(text),
            Literal::IpSetFlags(flags) => {
                for (index, flag) in flags.iter().enumerate() {
                    let comma = if index > 0 { "," } else { "" };
                    write!(f, "{comma}{flag}")?;
                }
                Ok(())
            }
        }
    }
}

impl<T: fmt::Display + fmt::LowerHex> fmt::Display for Number<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.hex { write!(f, "0x{:x}", self.value) } else { write!(f, "{}", self.value) }
    }
}

impl<T: fmt::Display> fmt::Display for Value<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Literal(literal) => literal.fmt(f),
            Value::Variable(variable) => variable.fmt(f),
        }
    }
}

/// Writes an IPv6 address as glibc's `inet_ntop` does, which libvirt uses: as Rust does, but with the last 32
/// bits of `::a.b.c.d` dotted.
fn write_ipv6(f: &mut fmt::Formatter<'_>, addr: Ipv6Addr) -> fmt::Result {
    let bits = addr.to_bits();
    let compatible = bits >> 32 == 0 && bits >> 16 != 0;
    match u32::try_from(bits) {
        Ok(low) if compatible => write!(f, "::{}", Ipv4Addr::from_bits(low)),
        _ => write!(f, "{addr}"),
    }
}

/// A MAC address, which ends at the first white space.
pub(crate) fn parse_mac(text: &str) -> Option<MacAddr> {
    let end = text.find(C_SPACE).unwrap_or(text.len());
    text[..end].parse().ok()
}

fn is_mac_mask(mask: &MacAddr) -> bool {
    let bits = mask.0.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    let bits = bits << 16;
    bits.leading_ones() == bits.count_ones()
}

/// A number as C's `strtoul` reads it: leading white space, a sign, and in base 16 a `0x`; nothing may follow.
fn parse_uint(text: &str, base: u32) -> Option<u32> {
    leading_uint(text, base).filter(|(_, rest)| rest.is_empty()).map(|(value, _)| value)
}

/// The number at the start of a text, as C's `strtoul` reads it, and what follows it. A negative number counts
/// down from 2³².
fn leading_uint(text: &str, base: u32) -> Option<(u32, &str)> {
    let text = text.trim_start_matches(C_SPACE);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let digits = match base {
        16 => digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")).unwrap_or(digits),
        _ => digits,
    };
    let end = digits.find(|c: char| !c.is_digit(base)).unwrap_or(digits.len());
    let value = u32::from_str_radix(&digits[..end], base).ok().filter(|_| end > 0)?;
    Some((if negative { value.wrapping_neg() } else { value }, &digits[end..]))
}

/// Decimal if it can be, else hex, with or without `0x`.
fn parse_dec_or_hex(text: &str, max: u32) -> Option<Number<u32>> {
    let decimal = parse_uint(text, 10).filter(|v| *v <= max).map(|value| Number { value, hex: false });
    let hex = || parse_uint(text, 16).filter(|v| *v <= max).map(|value| Number { value, hex: true });
    decimal.or_else(hex)
}

/// An IPv4 address as C's `getaddrinfo` reads it: one to four parts, decimal, octal (`0`) or hex (`0x`), of which
/// the last fills the remaining bytes; or an IPv6 address that stands for an IPv4 one (`::ffff:10.0.0.1`).
fn parse_ipv4(text: &str) -> Option<Ipv4Addr> {
    if let Ok(addr) = text.parse() {
        return Some(addr);
    }
    if text.contains(':') {
        return text.parse().ok().and_then(|addr: Ipv6Addr| addr.to_ipv4_mapped());
    }
    let parts: Vec<u32> = text.split('.').map(parse_c_integer).collect::<Option<_>>()?;
    let (last, leading) = parts.split_last()?;
    if leading.len() > 3 || leading.iter().any(|part| *part > 255) {
        return None;
    }
    let free_bits = 32 - 8 * u32::try_from(leading.len()).ok()?;
    if free_bits < 32 && *last >> free_bits != 0 {
        return None;
    }
    let high = leading.iter().fold(0u32, |high, part| high << 8 | part);
    Some(Ipv4Addr::from_bits(high.checked_shl(free_bits).unwrap_or(0) | last))
}

/// A number in C's notation, without a sign.
fn parse_c_integer(text: &str) -> Option<u32> {
    let (digits, base) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(base)) {
        return None;
    }
    u32::from_str_radix(digits, base).ok()
}

/// A prefix length up to `max`, or a mask that `mask` reads into the leading bits of a `u128`.
fn parse_prefix(text: &str, max: u32, mask: impl Fn(&str) -> Option<u128>) -> Option<Literal> {
    let bits = match parse_uint(text, 10) {
        Some(bits) => Some(bits).filter(|bits| *bits <= max),
        None => mask(text).filter(|m| m.leading_ones() == m.count_ones()).map(u128::count_ones),
    };
    u8::try_from(bits?).ok().map(Literal::Prefix)
}

/// Names in any case, separated by commas, white space or nothing.
fn parse_bits(text: &str, names: &[(u8, &str)]) -> Option<u8> {
    let mut bits = 0;
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c| c == ',' || C_SPACE.contains(&c));
        if rest.is_empty() {
            return Some(bits);
        }
        let (bit, name) = names.iter().find(|(_, name)| starts_with_ignoring_case(rest, name))?;
        bits |= bit;
        rest = &rest[name.len()..];
    }
}

fn starts_with_ignoring_case(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

fn parse_tcp_flags(text: &str) -> Option<TcpFlagSet> {
    let mut names = TcpFlagSet::NAMES.to_vec();
    names.extend([(TcpFlagSet::ALL, "ALL"), (0, "NONE")]);
    parse_bits(text, &names).map(TcpFlagSet)
}

fn parse_set_flags(text: &str) -> Option<Vec<SetDirection>> {
    let flags: Vec<_> = text
        .split(',')
        .map(|flag| match flag {
            _ if flag.eq_ignore_ascii_case("src") => Some(SetDirection::Src),
            _ if flag.eq_ignore_ascii_case("dst") => Some(SetDirection::Dst),
            _ => None,
        })
        .collect::<Option<_>>()?;
    (flags.len() <= 6).then_some(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(kind: Kind, text: &str) -> Option<String> {
        kind.parse(text).map(|literal| {
            let mut out = String::new();
            kind.write(&literal, &mut out);
            out
        })
    }

    #[test]
    fn numbers_keep_the_base_they_were_written_in() {
        for (kind, text, expected) in [
            (Kind::U16, "0x10", Some("0x10")),
            (Kind::U16, "16", Some("16")),
            (Kind::U16, "ff", Some("0xff")),
            (Kind::U16, "65536", None),
            (Kind::U16, " +7", Some("7")),
            (Kind::U16, "7 ", None),
            (Kind::U8, "-0", Some("0")),
            (Kind::U32, "-1", Some("4294967295")),
            (Kind::U16Decimal, "0x3", None),
            (Kind::EtherType, "2054", Some("arp")),
            (Kind::EtherType, "dead", Some("0xdead")),
            (Kind::EtherType, "0x5ff", None),
            (Kind::ArpOpcode, "0x15", Some("21")),
            (Kind::ArpOpcode, "request_reverse", Some("Request_Reverse")),
            (Kind::IpProtocol, "17", Some("udp")),
            (Kind::IpProtocol, "200", Some("200")),
            (Kind::Dscp, "64", None),
            (Kind::VlanId, "4096", None),
        ] {
            assert_eq!(written(kind, text).as_deref(), expected, "{kind:?} {text:?}");
        }
    }

    #[test]
    fn addresses_are_read_as_the_c_library_does() {
        for (kind, text, expected) in [
            (Kind::Ipv4, "10.1", Some("10.0.0.1")),
            (Kind::Ipv4, "010.0.0.1", Some("8.0.0.1")),
            (Kind::Ipv4, "0x7f.1", Some("127.0.0.1")),
            (Kind::Ipv4, "1.2.3.256", None),
            (Kind::Ipv4, "1.2.3.4.5", None),
            (Kind::Ipv4, "", None),
            (Kind::Ipv4Prefix, "255.255.0.0", Some("16")),
            (Kind::Ipv4Prefix, "255.0.255.0", None),
            (Kind::Ipv4Prefix, "33", None),
            (Kind::Ipv6, "FE80::1", Some("fe80::1")),
            (Kind::Ipv6, "::102:304", Some("::1.2.3.4")),
            (Kind::Ipv6Prefix, "ffff::", Some("16")),
            (Kind::MacMask, "ff:ff:ff:0:0:0", Some("ff:ff:ff:00:00:00")),
            (Kind::MacMask, "ff:0:ff:0:0:0", None),
        ] {
            assert_eq!(written(kind, text).as_deref(), expected, "{kind:?} {text:?}");
        }
    }

    #[test]
    fn lists_are_written_in_a_fixed_order() {
        for (kind, text, expected) in [
            (Kind::States, "related,new", Some("NEW,RELATED")),
            (Kind::States, "NEW,NONE", Some("NONE")),
            (Kind::States, "NEWINVALID", Some("NEW,INVALID")),
            (Kind::States, "OLD", None),
            (Kind::TcpFlags, "ack,SYN/SYN", Some("SYN,ACK/SYN")),
            (Kind::TcpFlags, "ALL/NONE", Some("ALL/NONE")),
            (Kind::TcpFlags, "SYN", None),
            (Kind::IpSetFlags, "SRC,dst", Some("src,dst")),
            (Kind::IpSetFlags, "src,", None),
        ] {
            assert_eq!(written(kind, text).as_deref(), expected, "{kind:?} {text:?}");
        }
    }

    #[test]
    fn variables_are_read_with_their_access() {
        for (text, expected) in [
            ("IP", Ok("$IP")),
            ("IP[@0]", Ok("$IP")),
            ("X[ @3 ]rest", Ok("$X[@3]")),
            ("X[2]", Ok("$X[2]")),
            ("", Ok("$")),
            ("X[@1001]", Err(())),
            ("X-", Err(())),
            ("X[", Err(())),
        ] {
            let read = VarRef::parse(text).map(|v| v.to_string());
            assert_eq!(read.as_deref().map_err(|_| ()), expected, "{text:?}");
        }
    }
}
