//! Sets, maps and verdict maps, and their elements.

use super::expr::{IFNAMSIZ, Load, ObjectKind, Order, Stateful, Verdict};
use super::name::{ObjectName, SetName};
use super::rule::Comment;

/// A set, or a map where it has [`data`](Self::data).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set {
    /// Its name.
    pub name: SetName,
    /// The fields of the key, one or more. More make a concatenation: each field begins a register of its own.
    pub key: Vec<Datatype>,
    /// What a map has for a key.
    pub data: Option<MapData>,
    /// What it can do.
    pub flags: SetFlags,
    /// Elements that it may have; `None` for as many as fit into memory. A dynamic set needs one.
    pub size: Option<u32>,
    /// How long elements last that do not say so themselves, in milliseconds.
    pub timeout: Option<u64>,
    /// What each element has and runs for each packet that it matches.
    pub stateful: Vec<Stateful>,
    /// Shown by `nft list`.
    pub comment: Option<Comment>,
}

impl Set {
    /// A set of keys that does nothing but hold them.
    pub fn new(name: SetName, key: impl Into<Vec<Datatype>>) -> Self {
        Self {
            name,
            key: key.into(),
            data: None,
            flags: SetFlags::default(),
            size: None,
            timeout: None,
            stateful: Vec::new(),
            comment: None,
        }
    }

    /// A map.
    pub fn map(name: SetName, key: impl Into<Vec<Datatype>>, data: MapData) -> Self {
        Self { data: Some(data), ..Self::new(name, key) }
    }

    /// Takes ranges and prefixes as keys.
    pub fn interval(mut self) -> Self {
        self.flags.interval = true;
        self
    }

    /// Bytes of a key: each field of a concatenation padded to whole registers.
    pub fn key_len(&self) -> usize {
        match &*self.key {
            [field] => field.len(),
            fields => fields.iter().map(|field| field.len().next_multiple_of(4)).sum(),
        }
    }
}

/// What a set can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetFlags {
    /// Keys may be ranges. They must not overlap.
    pub interval: bool,
    /// Its elements cannot be changed once a rule uses it.
    pub constant: bool,
    /// Rules may change it ([`Dynset`](super::expr::Dynset)).
    pub dynamic: bool,
    /// Elements may have a timeout.
    pub timeout: bool,
}

/// What a map has for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapData {
    /// A verdict.
    Verdict,
    /// A value.
    Value(Datatype),
    /// An object.
    Object(ObjectKind),
}

/// What a field of a key or a value of a map is: how many bytes, and how `nft list` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Datatype {
    /// An interface's name: 16 bytes.
    Ifname,
    /// A MAC address: 6 bytes.
    EtherAddr,
    /// An IPv4 address: 4 bytes.
    Ipv4Addr,
    /// An IPv6 address: 16 bytes.
    Ipv6Addr,
    /// A port of TCP, UDP, SCTP or DCCP: 2 bytes.
    InetService,
    /// A transport protocol: 1 byte.
    InetProto,
    /// An Ethernet type: 2 bytes.
    EtherType,
    /// An ARP or RARP operation: 2 bytes.
    ArpOp,
    /// An ICMP type: 1 byte.
    IcmpType,
    /// An ICMPv6 type: 1 byte.
    Icmpv6Type,
    /// A mark: 4 bytes in the host's order.
    Mark,
    /// A number in network byte order that nft has no name of a type for. nft cannot read back what it lists of a set
    /// of these.
    Integer {
        /// Bytes.
        len: u32,
    },
    /// A type that this crate does not write, as it was read.
    Other {
        /// nft's number for it, `NFTA_SET_KEY_TYPE`.
        id: u32,
        /// Bytes.
        len: u32,
    },
}

impl Datatype {
    /// The type of what a load loads.
    pub fn of(load: Load) -> Self {
        use super::field;
        let named = [
            (Self::Ifname, &[field::IIFNAME, field::OIFNAME, field::IBRNAME, field::OBRNAME][..]),
            (
                Self::EtherAddr,
                &[field::ETHER_SADDR, field::ETHER_DADDR, field::ARP_SADDR_ETHER, field::ARP_DADDR_ETHER],
            ),
            (Self::Ipv4Addr, &[field::IP_SADDR, field::IP_DADDR, field::ARP_SADDR_IP, field::ARP_DADDR_IP]),
            (Self::Ipv6Addr, &[field::IP6_SADDR, field::IP6_DADDR]),
            (Self::InetService, &[field::SPORT, field::DPORT]),
            (Self::InetProto, &[field::IP_PROTOCOL, field::IP6_NEXTHDR, field::L4PROTO]),
            (Self::EtherType, &[field::ETHER_TYPE, field::VLAN_TYPE, field::ARP_PTYPE, field::PROTOCOL]),
            (Self::ArpOp, &[field::ARP_OPERATION]),
            (Self::Mark, &[field::MARK]),
        ];
        let name = named.iter().find(|(_, loads)| loads.contains(&load));
        name.map_or(Self::Integer { len: load.len() as u32 }, |(name, _)| *name)
    }

    /// Bytes of a value.
    #[expect(clippy::len_without_is_empty, reason = "no value is empty")]
    pub fn len(self) -> usize {
        match self {
            Self::InetProto | Self::IcmpType | Self::Icmpv6Type => 1,
            Self::InetService | Self::EtherType | Self::ArpOp => 2,
            Self::Ipv4Addr | Self::Mark => 4,
            Self::EtherAddr => 6,
            Self::Ifname => IFNAMSIZ,
            Self::Ipv6Addr => 16,
            Self::Integer { len } | Self::Other { len, .. } => len as usize,
        }
    }

    /// The byte order of a value.
    pub fn order(self) -> Order {
        if matches!(self, Self::Ifname | Self::Mark) { Order::Host } else { Order::Network }
    }
}

/// An element of a set or a map.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// Its key.
    pub key: ElementKey,
    /// What a map has for the key.
    pub value: Option<ElementValue>,
    /// How long it lasts, in milliseconds, where that is not the set's timeout.
    pub timeout: Option<u64>,
    /// Shown by `nft list`.
    pub comment: Option<Comment>,
}

impl Element {
    /// An element of a set.
    pub fn new(key: ElementKey) -> Self {
        Self { key, value: None, timeout: None, comment: None }
    }

    /// An element of a map.
    pub fn with(key: ElementKey, value: ElementValue) -> Self {
        Self { value: Some(value), ..Self::new(key) }
    }
}

/// The key of an element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElementKey {
    /// One key.
    One(Vec<u8>),
    /// All keys of which each field is between those of these two, both included. Only in sets with
    /// [`interval`](SetFlags::interval).
    Range(Vec<u8>, Vec<u8>),
}

impl ElementKey {
    /// The key of these fields.
    pub fn one<F: AsRef<[u8]>>(fields: &[F]) -> Self {
        Self::One(concatenate(fields.iter().map(AsRef::as_ref)))
    }

    /// The keys whose fields are between these.
    pub fn range<F: AsRef<[u8]>>(from: &[F], to: &[F]) -> Self {
        let (from, to) = (from.iter().map(AsRef::as_ref), to.iter().map(AsRef::as_ref));
        Self::Range(concatenate(from), concatenate(to))
    }
}

/// The bytes of a key: each field of more than one is padded to whole registers.
fn concatenate<'a>(fields: impl ExactSizeIterator<Item = &'a [u8]>) -> Vec<u8> {
    let padded = fields.len() > 1;
    let mut key = Vec::with_capacity(32);
    for field in fields {
        key.extend(field);
        if padded {
            key.resize(key.len().next_multiple_of(4), 0);
        }
    }
    key
}

/// What a map has for a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElementValue {
    /// A verdict.
    Verdict(Verdict),
    /// A value of the map's type.
    Value(Vec<u8>),
    /// The name of an object.
    Object(ObjectName),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::field;

    #[test]
    fn fields_of_a_concatenation_begin_registers() {
        let port = field::ifname("vnet0").unwrap();
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let ElementKey::One(key) = ElementKey::one(&[&port[..], &mac]) else { panic!() };
        assert_eq!(key, b"vnet0\0\0\0\0\0\0\0\0\0\0\0\x52\x54\0\x01\x02\x03\0\0");
        let set = Set::new("mac".parse().unwrap(), [Datatype::Ifname, Datatype::EtherAddr]);
        assert_eq!(set.key_len(), key.len());
        assert_eq!(ElementKey::one(&[&mac[..]]), ElementKey::One(mac.to_vec()));
        assert_eq!(Set::new("m".parse().unwrap(), [Datatype::EtherAddr]).key_len(), 6);
    }

    #[test]
    fn a_load_names_the_type_of_its_value() {
        assert_eq!(Datatype::of(field::ARP_SADDR_IP), Datatype::Ipv4Addr);
        assert_eq!(Datatype::of(field::IP_TTL), Datatype::Integer { len: 1 });
    }
}
