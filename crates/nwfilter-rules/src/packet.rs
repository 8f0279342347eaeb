//! The tests of rules: one enum for each layer, so that the compiler finds a backend that forgets one.

use std::net::IpAddr;

use nwfilter_xml::value::{SetDirection, States, TcpFlagSet};
use nwfilter_xml::{MacAddr, SetFamily, SetName};
use serde::{Deserialize, Serialize};

/// A test on a field of an Ethernet frame, or of the ARP, STP or IP packet in it. The frame's EtherType is always tested
/// before the fields after it.
#[allow(missing_docs)] // Fields are named after those of the packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EthernetTest {
    SrcMac(MaskedMac),
    DstMac(MaskedMac),
    EtherType(u16),
    VlanId(u16),
    VlanEncap(u16),
    StpType(u8),
    StpFlags(u8),
    /// A field of a spanning-tree frame within `from..=to`; `from` alone where `to` is not given.
    StpRange {
        field: StpRange,
        from: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<u32>,
    },
    StpRootAddress(MaskedMac),
    StpSenderAddress(MaskedMac),
    ArpHardwareType(u16),
    ArpProtocolType(u16),
    ArpOpcode(u16),
    ArpSrcMac(MacAddr),
    ArpDstMac(MacAddr),
    ArpSrcIp(Network),
    ArpDstIp(Network),
    ArpGratuitous,
    SrcIp(Network),
    DstIp(Network),
    IpProtocol(u8),
    SrcPort(PortRange),
    DstPort(PortRange),
    Dscp(u8),
    /// Inclusive ranges of ICMPv6 types and codes.
    IcmpRange {
        kinds: (u8, u8),
        codes: (u8, u8),
    },
}

/// A test on a field of an IP packet, or on its connection in the kernel.
#[allow(missing_docs)] // Fields are named after those of the packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IpTest {
    SrcMac(MacAddr),
    SrcIp(Network),
    DstIp(Network),
    SrcIpRange {
        from: IpAddr,
        to: IpAddr,
    },
    DstIpRange {
        from: IpAddr,
        to: IpAddr,
    },
    IpProtocol(u8),
    SrcPort(PortRange),
    DstPort(PortRange),
    Dscp(u8),
    /// An ICMP or ICMPv6 type, and a code where one is asked for.
    Icmp {
        kind: u8,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<u8>,
    },
    /// More connections than that from the packet's source address.
    ConnlimitAbove(u16),
    States(States),
    CtDirection(CtDirection),
    /// Whether addresses and ports of the packet are in an ipset of the host.
    IpSet {
        name: String,

        directions: Vec<SetDirection>,
    },
    /// Whether an address or a port of the packet is in a set of the store.
    Set {
        name: SetName,
        /// What the set holds.
        family: SetFamily,
        /// Whether it is the source's that is asked for.
        direction: SetDirection,
    },
    TcpFlags {
        mask: TcpFlagSet,

        set: TcpFlagSet,
    },
    TcpOption(u8),
    /// Matches every packet; a remark for readers of the rules.
    Comment(String),
}

/// A MAC address, of which only the bits of a mask are compared where there is one.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MaskedMac {
    pub addr: MacAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<MacAddr>,
}

impl From<MacAddr> for MaskedMac {
    fn from(addr: MacAddr) -> Self {
        Self { addr, mask: None }
    }
}

/// An address, or the network that it is in where a prefix length is given.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Network {
    pub addr: IpAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<u8>,
}

impl From<IpAddr> for Network {
    fn from(addr: IpAddr) -> Self {
        Self { addr, prefix: None }
    }
}

/// A transport port, or the ports `from..=to`; none where `to` is below `from`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortRange {
    pub from: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u16>,
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self { from: port, to: None }
    }
}

/// The fields of a spanning-tree frame that are compared with a range.
#[allow(missing_docs)] // The names are those of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StpRange {
    RootPriority,
    RootCost,
    SenderPriority,
    Port,
    MessageAge,
    MaxAge,
    HelloTime,
    ForwardDelay,
}

/// Which way a packet goes in its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CtDirection {
    /// As the connection's first packet.
    Original,
    /// Against it.
    Reply,
}
