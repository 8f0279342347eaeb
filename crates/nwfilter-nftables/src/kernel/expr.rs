//! The expressions of rules, in nf_tables' own terms.
//!
//! Values are bytes as they stand in registers: what comes from a packet in network byte order, marks and other numbers
//! of the kernel ([`Load::order`]) in that of the host. What the kernel adds by itself (counts, handles) is no part
//! of an expression, so that what was written and what is read back are equal.

use std::fmt;

use super::name::{ChainName, ObjectName, SetName};

/// An expression. The first that does not match ends its rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Expr {
    /// `payload`, `meta`, `ct` or `exthdr`: loads a value into a register and those after it.
    ///
    /// Does not match where the packet has no such value.
    Load {
        /// What is loaded.
        load: Load,
        /// The first register it takes.
        dreg: Register,
    },
    /// `immediate`: loads a constant into a register and those after it.
    Immediate {
        /// The constant, at most 16 bytes.
        value: Vec<u8>,
        /// The first register it takes.
        dreg: Register,
    },
    /// `cmp`
    Cmp(Cmp),
    /// `range`
    Range(Range),
    /// `bitwise`
    Bitwise(Bitwise),
    /// `byteorder`
    Byteorder(Byteorder),
    /// `hash`: turns registers into a number.
    Hash(Hash),
    /// `lookup`: a set, map or verdict map.
    Lookup(Lookup),
    /// `meta`: sets a property of the packet.
    MetaSet {
        /// The property.
        key: MetaKey,
        /// The register with its value.
        sreg: Register,
    },
    /// `ct`: sets a property of the connection.
    CtSet {
        /// The property.
        key: CtKey,
        /// The register with its value.
        sreg: Register,
        /// The direction that a zone holds for; `None` for both.
        direction: Option<Direction>,
    },
    /// `notrack`: no connection is tracked for the packet.
    Notrack,
    /// `counter`, `limit` or `connlimit`, with a state of its own.
    Stateful(Stateful),
    /// `dynset`: changes a set from the packet.
    Dynset(Dynset),
    /// `objref`: runs an object, for a conntrack helper: assigns it to the connection.
    Object {
        /// What kind of object it is.
        kind: ObjectKind,
        /// Its name.
        name: ObjectName,
    },
    /// `objref`: runs the object that a map of objects leads to.
    ObjectMap {
        /// The map.
        map: SetName,
        /// The first register of the key.
        sreg: Register,
    },
    /// `log`
    Log(Log),
    /// `reject`: answers the packet and drops it. Only in chains that are reached from prerouting and input alone.
    Reject(Reject),
    /// `immediate`: ends the rule with a verdict.
    Verdict(Verdict),
    /// An expression that this crate does not write, as it was read.
    Other {
        /// Its kind, `NFTA_EXPR_NAME`.
        name: String,
        /// Its attributes, `NFTA_EXPR_DATA`.
        data: Vec<u8>,
    },
}

/// One of the sixteen data registers of four bytes, `NFT_REG32_00` to `NFT_REG32_15`.
///
/// A value of more than four bytes takes those that follow, too. A concatenation stands in adjacent registers, each
/// field beginning one of its own. The kernel's four registers of 16 bytes are these by another name: `NFT_REG_2` is
/// `NFT_REG32_04`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register(u8);

impl Register {
    /// Bytes in a register.
    pub const SIZE: usize = 4;
    /// How many there are.
    pub const COUNT: u8 = 16;
    /// The first one.
    pub const FIRST: Self = Self(0);
    /// The first one behind 16 bytes.
    pub const SECOND_WIDE: Self = Self(4);

    /// `NFT_REG32_00` plus `index`; `None` from 16 on.
    pub fn new(index: u8) -> Option<Self> {
        (index < Self::COUNT).then_some(Self(index))
    }

    /// Its number, from 0 to 15.
    pub fn index(self) -> u8 {
        self.0
    }

    /// The register behind a value of so many bytes that begins in this one; `None` behind the last.
    pub fn after(self, bytes: usize) -> Option<Self> {
        let slots = u8::try_from(bytes.div_ceil(Self::SIZE)).ok()?;
        Self::new(self.0.checked_add(slots)?)
    }
}

/// What is loaded into registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Load {
    /// Bytes of the packet.
    Payload {
        /// The header that the offset counts from.
        base: Base,
        /// Bytes from there.
        offset: u32,
        /// How many bytes, at most 64.
        len: u32,
    },
    /// A property of the packet.
    Meta(MetaKey),
    /// A property of its connection. Does not match without connection, except [`CtKey::State`], which then is
    /// "untracked" or "invalid".
    Ct {
        /// The property.
        key: CtKey,
        /// The side it is about, for properties that have two.
        direction: Option<Direction>,
    },
    /// An extension header, IP option or TCP option.
    Extension {
        /// What it is an extension of.
        of: Extended,
        /// Its number.
        kind: u8,
        /// What of it.
        part: ExtensionPart,
    },
}

impl Load {
    /// Bytes that are loaded.
    #[expect(clippy::len_without_is_empty, reason = "nothing loads no bytes")]
    pub fn len(self) -> usize {
        match self {
            Self::Payload { len, .. } | Self::Extension { part: ExtensionPart::Bytes { len, .. }, .. } => {
                len as usize
            }
            Self::Extension { part: ExtensionPart::Present, .. } => 1,
            Self::Meta(key) => key.len(),
            Self::Ct { key, .. } => key.len(),
        }
    }

    /// The byte order of the value, where it is a number.
    pub fn order(self) -> Order {
        match self {
            Self::Payload { .. } | Self::Extension { .. } => Order::Network,
            Self::Meta(key) => key.order(),
            Self::Ct { .. } => Order::Host,
        }
    }
}

/// Byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Order {
    /// That of the machine.
    Host,
    /// The most significant byte first, so that bytes compare as the numbers do.
    Network,
}

/// The header that a payload's offset counts from, `NFT_PAYLOAD_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Base {
    /// The Ethernet header. A VLAN tag that the card took off stands in it again at bytes 12 to 16.
    Link,
    /// The IP, ARP or other header behind it. In a tagged frame the kernel counts from the IP header all the same, so
    /// that only the Ethernet type tells tagged frames apart.
    Network,
    /// The header behind IP's, extension headers skipped. Does not match in fragments but the first.
    Transport,
}

/// A property of a packet, `NFT_META_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum MetaKey {
    /// Its length in bytes (4 bytes).
    Length,
    /// The Ethernet type, that behind a VLAN tag which the card took off (2 bytes, network order).
    Protocol,
    /// The firewall mark (4 bytes).
    Mark,
    /// The name of the port it came by (16 bytes).
    Iifname,
    /// The name of the port it leaves by (16 bytes).
    Oifname,
    /// The type of that it came by, `ARPHRD_*` (2 bytes).
    Iiftype,
    /// Whether its way through the rules is told to listeners (1 byte).
    Nftrace,
    /// The family, `NFPROTO_*` (1 byte).
    Nfproto,
    /// The transport protocol, behind extension headers (1 byte).
    L4proto,
    /// The name of the bridge that it came by (16 bytes).
    Ibrname,
    /// The name of the bridge that it leaves by (16 bytes).
    Obrname,
    /// Whether it is to this host, to all, to many or to others, `PACKET_*` (1 byte).
    Pkttype,
}

/// Bytes of an interface's name in a register, `IFNAMSIZ`.
pub const IFNAMSIZ: usize = 16;

impl MetaKey {
    fn len(self) -> usize {
        match self {
            Self::Nftrace | Self::Nfproto | Self::L4proto | Self::Pkttype => 1,
            Self::Protocol | Self::Iiftype => 2,
            Self::Length | Self::Mark => 4,
            Self::Iifname | Self::Oifname | Self::Ibrname | Self::Obrname => IFNAMSIZ,
        }
    }

    fn order(self) -> Order {
        if self == Self::Protocol { Order::Network } else { Order::Host }
    }
}

/// A property of a connection, `NFT_CT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum CtKey {
    /// What the packet is to it, bits of [`state`] (4 bytes).
    State,
    /// Whether the packet goes the way of the first one: 0, or 1 for replies (1 byte).
    Direction,
    /// What happened to it, `IPS_*` bits (4 bytes).
    Status,
    /// Its mark (4 bytes).
    Mark,
    /// Its zone (2 bytes). Set before -200 in prerouting and output.
    Zone,
}

impl CtKey {
    fn len(self) -> usize {
        match self {
            Self::Direction => 1,
            Self::Zone => 2,
            Self::State | Self::Status | Self::Mark => 4,
        }
    }
}

/// Bits of [`CtKey::State`]; the register holds one of them, in host order.
pub mod state {
    /// It belongs to no connection that could be.
    pub const INVALID: u32 = 1;
    /// Packets were seen both ways.
    pub const ESTABLISHED: u32 = 2;
    /// A connection that another one announced, or an error about one.
    pub const RELATED: u32 = 4;
    /// The first packet.
    pub const NEW: u32 = 8;
    /// Not tracked.
    pub const UNTRACKED: u32 = 64;
}

/// A direction of a connection, `IP_CT_DIR_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// That of its first packet.
    Original,
    /// The other one.
    Reply,
}

/// What has extensions, `NFT_EXTHDR_OP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Extended {
    /// IPv6: extension headers by protocol number.
    Ipv6,
    /// TCP: options by kind.
    Tcp,
    /// IPv4: options by type.
    Ipv4,
}

/// What of an extension is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExtensionPart {
    /// 1 if the packet has it, else 0 (1 byte).
    Present,
    /// Bytes of it.
    Bytes {
        /// From its beginning.
        offset: u32,
        /// How many.
        len: u32,
    },
}

/// Compares registers with a constant, byte by byte.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cmp {
    /// The first register.
    pub sreg: Register,
    /// What must hold.
    pub relation: Relation,
    /// The constant, at most 16 bytes.
    pub value: Vec<u8>,
}

/// How the registers compare to the constant. Other than `Equal` and `NotEqual` only for network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Relation {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
}

/// Compares registers with two constants of equal length, in network byte order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// The first register.
    pub sreg: Register,
    /// Matches what is not between them, instead of what is.
    pub negate: bool,
    /// The lowest value, at most 16 bytes.
    pub from: Vec<u8>,
    /// The highest value.
    pub to: Vec<u8>,
}

/// `dreg = (sreg & mask) ^ xor`
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bitwise {
    /// The first register that is read.
    pub sreg: Register,
    /// The first register that is written.
    pub dreg: Register,
    /// The bits that are kept, at most 16 bytes.
    pub mask: Vec<u8>,
    /// The bits that are then flipped; as long as the mask.
    pub xor: Vec<u8>,
}

/// Turns numbers from one byte order into the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Byteorder {
    /// The first register that is read.
    pub sreg: Register,
    /// The first register that is written.
    pub dreg: Register,
    /// The byte order afterwards.
    pub to: Order,
    /// Bytes in all.
    pub len: u32,
    /// Bytes of one number: 2, 4 or 8.
    pub size: u32,
}

/// `dreg = jhash(sreg) % modulus + offset`
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash {
    /// The first register that is read.
    pub sreg: Register,
    /// The register that is written: a number of 4 bytes in the host's order.
    pub dreg: Register,
    /// How many bytes are read.
    pub len: u32,
    /// How many results there are; 1 at least.
    pub modulus: u32,
    /// Begins the hash. The same one gives the same results.
    pub seed: u32,
    /// The lowest result.
    pub offset: u32,
}

/// Looks a key up in a set or map of the same table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lookup {
    /// Its name.
    pub set: SetName,
    /// The first register of the key.
    pub sreg: Register,
    /// What is done with what is found.
    pub result: LookupResult,
}

/// What a [`Lookup`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LookupResult {
    /// Matches if the key is in the set.
    Match,
    /// Matches if the key is not in the set.
    NoMatch,
    /// Loads the value of the map; does not match where there is none.
    Data(Register),
    /// Gives the verdict of the map; does not match where there is none.
    Verdict,
}

/// An expression with a state of its own, which may also stand at each element of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Stateful {
    /// Counts packets and bytes from zero. The counts are read apart from the rule.
    Counter,
    /// Matches a number of times in a time.
    Limit(Limit),
    /// Matches by the number of connections.
    Connlimit(Connlimit),
}

/// `limit`
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Limit {
    /// How many in a unit of time.
    pub rate: u64,
    /// The unit, in seconds.
    pub seconds: u64,
    /// How many more at once; 0 for packets becomes 5 in the kernel.
    pub burst: u32,
    /// What is counted.
    pub of: LimitOf,
    /// Matches what exceeds it, instead of what does not.
    pub over: bool,
}

/// What a [`Limit`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LimitOf {
    /// Packets.
    Packets,
    /// Bytes.
    Bytes,
}

/// `connlimit`: how many connections are open of those whose packets come here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connlimit {
    /// How many.
    pub count: u32,
    /// Matches if there are more, instead of at most so many.
    pub over: bool,
}

/// Changes a set that is [`dynamic`](super::SetFlags::dynamic).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dynset {
    /// The set.
    pub set: SetName,
    /// What is done.
    pub op: DynsetOp,
    /// The first register of the key.
    pub sreg: Register,
    /// How long the element lasts, in milliseconds; `None` as long as the set says.
    pub timeout: Option<u64>,
    /// What each element has and runs for each of its packets: with a [`Connlimit`], connections are limited by key.
    pub stateful: Vec<Stateful>,
    /// Matches if the set is full or a stateful expression does not match, instead of the opposite.
    pub invert: bool,
}

/// What a [`Dynset`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DynsetOp {
    /// Adds the element if it is not there.
    Add,
    /// Adds it, or lets its timeout begin again.
    Update,
    /// Deletes it.
    Delete,
}

/// A kind of stateful object, `NFT_OBJECT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ObjectKind {
    /// A counter.
    Counter,
    /// A conntrack helper.
    CtHelper,
    /// A limit.
    Limit,
}

impl fmt::Display for ObjectKind {
    /// As nft writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::CtHelper => "ct helper",
            Self::Limit => "limit",
        })
    }
}

/// Tells a listener, or the kernel's log, of the packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Log {
    /// Stands before it; at most 127 bytes.
    pub prefix: Option<String>,
    /// Who is told.
    pub to: LogTo,
}

/// Who is told by a [`Log`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LogTo {
    /// The kernel's log, with a level of syslog from 0 to 7 and `NF_LOG_*` flags.
    Syslog {
        /// The level.
        level: u32,
        /// `NF_LOG_*`
        flags: u32,
    },
    /// The listeners of a group of nfnetlink_log.
    Group {
        /// Its number.
        group: u16,
        /// Bytes of the packet that are passed; `None` for all.
        snaplen: Option<u32>,
        /// Packets that are passed at once; `None` for the kernel's default.
        threshold: Option<u16>,
    },
}

/// How a packet is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reject {
    /// With ICMP "unreachable" of IPv4 or IPv6, as the packet is, and this code of that protocol.
    Unreachable(u8),
    /// With a TCP reset; matches TCP only.
    TcpReset,
    /// With the code of ICMP or ICMPv6 that an `NFT_REJECT_ICMPX_*` stands for.
    Icmpx(u8),
}

/// Where a packet goes on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// It passes this base chain.
    Accept,
    /// It is dropped.
    Drop,
    /// With the next rule.
    Continue,
    /// Behind the rule that jumped here; at the policy in a base chain.
    Return,
    /// In another chain, and back at its end.
    Jump(ChainName),
    /// In another chain; its end is the end of this one.
    Goto(ChainName),
}
