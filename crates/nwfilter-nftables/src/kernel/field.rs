//! The header fields that rules compare, by the names that nft has for them.
//!
//! Fields of ARP, IP and transport headers stand behind whatever the frame has before them: say which with
//! [`ETHER_TYPE`] (untagged frames only) first, or with [`VLAN_TYPE`] behind a tag.

use super::expr::{Base, CtKey, Load, MetaKey};

const fn link(offset: u32, len: u32) -> Load {
    Load::Payload { base: Base::Link, offset, len }
}

const fn network(offset: u32, len: u32) -> Load {
    Load::Payload { base: Base::Network, offset, len }
}

const fn transport(offset: u32, len: u32) -> Load {
    Load::Payload { base: Base::Transport, offset, len }
}

const fn ct(key: CtKey) -> Load {
    Load::Ct { key, direction: None }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $load:expr;)+) => { $(
        $(#[$doc])*
        pub const $name: Load = $load;
    )+ };
}

fields! {
    /// `iifname`: the port that the frame came by, or in a routed packet the interface.
    IIFNAME = Load::Meta(MetaKey::Iifname);
    /// `oifname`: the port that the frame leaves by.
    OIFNAME = Load::Meta(MetaKey::Oifname);
    /// `meta ibrname`: the bridge of the port that the frame came by.
    IBRNAME = Load::Meta(MetaKey::Ibrname);
    /// `meta obrname`: the bridge of the port that the frame leaves by.
    OBRNAME = Load::Meta(MetaKey::Obrname);
    /// `meta mark`, in the host's byte order.
    MARK = Load::Meta(MetaKey::Mark);
    /// `meta protocol`: the Ethernet type, of most tagged frames that behind the tag.
    PROTOCOL = Load::Meta(MetaKey::Protocol);
    /// `meta l4proto`: the transport protocol, IPv6 extension headers skipped.
    L4PROTO = Load::Meta(MetaKey::L4proto);

    /// `ether daddr`
    ETHER_DADDR = link(0, 6);
    /// `ether saddr`
    ETHER_SADDR = link(6, 6);
    /// `ether type`: 0x8100 in a tagged frame.
    ETHER_TYPE = link(12, 2);
    /// The tag of a tagged frame: priority (3 bits), DEI (1 bit), VLAN id (12 bits).
    VLAN_TCI = link(14, 2);
    /// `vlan type`: the Ethernet type behind the tag.
    VLAN_TYPE = link(16, 2);

    /// `arp htype`
    ARP_HTYPE = network(0, 2);
    /// `arp ptype`
    ARP_PTYPE = network(2, 2);
    /// `arp hlen`
    ARP_HLEN = network(4, 1);
    /// `arp plen`
    ARP_PLEN = network(5, 1);
    /// `arp operation`
    ARP_OPERATION = network(6, 2);
    /// `arp saddr ether`
    ARP_SADDR_ETHER = network(8, 6);
    /// `arp saddr ip`
    ARP_SADDR_IP = network(14, 4);
    /// `arp daddr ether`
    ARP_DADDR_ETHER = network(18, 6);
    /// `arp daddr ip`
    ARP_DADDR_IP = network(24, 4);

    /// The type of service; `ip dscp` are its upper six bits.
    IP_TOS = network(1, 1);
    /// `ip length`
    IP_LENGTH = network(2, 2);
    /// `ip frag-off`: flags (3 bits) and offset (13 bits).
    IP_FRAG_OFF = network(6, 2);
    /// `ip ttl`
    IP_TTL = network(8, 1);
    /// `ip protocol`
    IP_PROTOCOL = network(9, 1);
    /// `ip saddr`
    IP_SADDR = network(12, 4);
    /// `ip daddr`
    IP_DADDR = network(16, 4);

    /// Version (4 bits), traffic class (8 bits, of which the upper six are `ip6 dscp`), the flow label's begin (4 bits).
    IP6_TRAFFIC_CLASS = network(0, 2);
    /// `ip6 nexthdr`: the type of the next header, which may be an extension.
    IP6_NEXTHDR = network(6, 1);
    /// `ip6 saddr`
    IP6_SADDR = network(8, 16);
    /// `ip6 daddr`
    IP6_DADDR = network(24, 16);

    /// `th sport`: the source port of TCP, UDP, SCTP and DCCP.
    SPORT = transport(0, 2);
    /// `th dport`
    DPORT = transport(2, 2);
    /// `tcp flags`
    TCP_FLAGS = transport(13, 1);
    /// `icmp type`, `icmpv6 type`, `igmp type`
    ICMP_TYPE = transport(0, 1);
    /// `icmp code`, `icmpv6 code`
    ICMP_CODE = transport(1, 1);

    /// `ct state`: bits of [`state`](super::expr::state), in the host's byte order.
    CT_STATE = ct(CtKey::State);
    /// `ct direction`: 0 original, 1 reply.
    CT_DIRECTION = ct(CtKey::Direction);
}

/// An interface's name as [`IIFNAME`] and the like hold it; `None` if it is empty or has more than 15 bytes.
pub fn ifname(name: &str) -> Option<[u8; super::expr::IFNAMSIZ]> {
    let mut bytes = [0; super::expr::IFNAMSIZ];
    let fits = !name.is_empty() && name.len() < bytes.len();
    fits.then(|| {
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes
    })
}
