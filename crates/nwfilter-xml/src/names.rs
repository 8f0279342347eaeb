//! The names and small numbers of the language, each a type that can only hold a valid one.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Error;
use crate::text::serde_as_text;

serde_as_text!(FilterName, PortDev, VarName, ChainName, MacAddr);

/// Bytes a network interface name may have, the terminating zero of the kernel not counted (`IFNAMSIZ` - 1).
const PORT_NAME_MAX: usize = 15;
/// Bytes a file name may have on Linux (`NAME_MAX`), less the `.xml` under which a filter is stored.
const FILTER_NAME_MAX: usize = 255 - ".xml".len();

/// A type for texts that its `FromStr` has found to be valid names.
macro_rules! string_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

pub(crate) use string_newtype;

string_newtype! {
    /// The name of a filter. It is also a file name of the filter store, so it has no `/`, no control
    /// characters, is neither `.` nor `..`, and has 1 to 251 bytes.
    FilterName
}

impl FromStr for FilterName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why| Error::name("filter name", text, why);
        match text {
            "" => Err(wrong("it is empty")),
            "." | ".." => Err(wrong("it is a directory")),
            _ if text.contains('/') => Err(wrong("it contains '/', and filters are stored under their name")),
            _ if text.chars().any(char::is_control) => Err(wrong("it contains a control character")),
            _ if text.contains(['\u{fffe}', '\u{ffff}']) => {
                Err(wrong("it contains what is no character in XML"))
            }
            _ if text.len() > FILTER_NAME_MAX => Err(wrong("it is longer than 251 bytes")),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

string_newtype! {
    /// The name of a tap device or other bridge port that is filtered: 1 to 15 bytes of
    /// `[a-zA-Z0-9_.@=-]`, not starting with `-` or `.`.
    ///
    /// The kernel allows more, but `+` at the end is a wildcard to iptables and ebtables, and `!` a negation.
    PortDev
}

impl FromStr for PortDev {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why| Error::name("port device", text, why);
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_.@=-".contains(c);
        match text {
            "" => Err(wrong("it is empty")),
            _ if text.starts_with(['-', '.']) => Err(wrong("it starts with '-' or '.'")),
            _ if text.len() > PORT_NAME_MAX => Err(wrong("a network interface name has at most 15 bytes")),
            _ if !text.chars().all(allowed) => Err(wrong("only [a-zA-Z0-9_.@=-] can be named in rules")),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

string_newtype! {
    /// The name of a variable: bytes of `[a-zA-Z0-9_]`. libvirt lets it be empty.
    VarName
}

impl VarName {
    /// The MAC address of the port.
    pub const MAC: &str = "MAC";
    /// The IPv4 addresses of the port.
    pub const IP: &str = "IP";
    /// The IPv6 addresses of the port.
    pub const IPV6: &str = "IPV6";

    /// The tags of the port.
    pub const CTRL_TAGS: &str = "CTRL_TAGS";

    pub(crate) fn mac() -> Self {
        Self(Self::MAC.to_owned())
    }

    pub(crate) fn ctrl_tags() -> Self {
        Self(Self::CTRL_TAGS.to_owned())
    }

    /// Whether the values are addresses of the guest, which are learned where none is given.
    pub fn holds_addresses(&self) -> bool {
        [Self::IP, Self::IPV6].contains(&self.as_str())
    }
}

impl FromStr for VarName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        if text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::name("variable name", text, "only [a-zA-Z0-9_] are allowed"))
        }
    }
}

/// The protocol that a chain evaluates: the prefix of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainKind {
    /// The chain every frame enters first.
    Root,
    /// Every frame.
    Mac,
    /// 802.1Q frames.
    Vlan,
    /// Spanning-tree frames (by their destination address).
    Stp,
    /// ARP frames.
    Arp,
    /// Reverse ARP frames.
    Rarp,
    /// IPv4 frames.
    Ipv4,
    /// IPv6 frames.
    Ipv6,
}

impl ChainKind {
    /// Every kind, its prefix and the priority of a chain that names none, in libvirt's order.
    pub const TABLE: [(ChainKind, &'static str, i16); 8] = [
        (ChainKind::Root, "root", 0),
        (ChainKind::Mac, "mac", -800),
        (ChainKind::Vlan, "vlan", -750),
        (ChainKind::Stp, "stp", 0),
        (ChainKind::Arp, "arp", -500),
        (ChainKind::Rarp, "rarp", -400),
        (ChainKind::Ipv4, "ipv4", -700),
        (ChainKind::Ipv6, "ipv6", -600),
    ];
}

/// The name of a chain: `root`, or 3 to 12 bytes of `[a-zA-Z0-9_.:-]` that start with the prefix of a
/// [`ChainKind`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainName {
    name: String,
    kind: ChainKind,
}

impl ChainName {
    /// The root chain.
    pub fn root() -> Self {
        Self { name: "root".to_owned(), kind: ChainKind::Root }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// The protocol its frames have.
    pub fn kind(&self) -> ChainKind {
        self.kind
    }

    /// True for `root`.
    pub fn is_root(&self) -> bool {
        self.kind == ChainKind::Root
    }

    /// The priority of this chain where a filter gives none.
    pub fn default_priority(&self) -> Priority {
        let row = ChainKind::TABLE.iter().find(|(kind, ..)| *kind == self.kind);
        Priority(row.map_or(0, |(_, _, priority)| *priority))
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)
    }
}

impl FromStr for ChainName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why| Error::name("chain", text, why);
        if text.len() > 12 {
            return Err(wrong("it is longer than 12 characters"));
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b)) {
            return Err(wrong("only [a-zA-Z0-9_.:-] are allowed"));
        }
        let row = ChainKind::TABLE.iter().find(|(_, prefix, _)| text.starts_with(prefix));
        match row {
            Some((ChainKind::Root, prefix, _)) if text != *prefix => {
                Err(wrong("'root' is a name of its own, not a prefix"))
            }
            Some((kind, ..)) => Ok(Self { name: text.to_owned(), kind: *kind }),
            None => {
                Err(wrong("it is neither 'root' nor starts with mac, vlan, stp, arp, rarp, ipv4 or ipv6"))
            }
        }
    }
}

/// The priority of a chain or rule, -1000 to 1000; lower ones are evaluated first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Priority(i16);

impl Priority {
    /// The lowest (first) and the highest (last) priority.
    pub const RANGE: std::ops::RangeInclusive<i32> = -1000..=1000;
    /// The priority of a rule that names none.
    pub const RULE_DEFAULT: Priority = Priority(500);

    /// The priority of that number; `None` outside [`Priority::RANGE`].
    pub fn new(number: i32) -> Option<Self> {
        // A number within the range fits an i16.
        Self::RANGE.contains(&number).then_some(Self(number as i16))
    }

    /// The number.
    pub fn get(self) -> i16 {
        self.0
    }
}

impl Serialize for Priority {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Priority {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i32::deserialize(deserializer)?;
        Self::new(number).ok_or_else(|| {
            serde::de::Error::custom(format_args!("{number} is no priority: a number from -1000 to 1000"))
        })
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet (MAC) address; written in lower case with two digits a byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::name("MAC address", text, "expected six bytes in hex, as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            let digits = matches!(part.len(), 1 | 2) && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(wrong)?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}
