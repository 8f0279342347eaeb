//! The ruleset of one port: typed matches and verdicts, without text and without the words of any tool.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use nwfilter_xml::value::{SetDirection, States, TcpFlagSet};
use nwfilter_xml::{ChainName, FilterName, MacAddr};
use serde::{Serialize, Serializer};

use crate::helper::HelperRule;

/// What one port enforces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ruleset {
    /// Rules on Ethernet frames.
    pub ethernet: Ethernet,
    /// Rules on IPv4 packets; `None` lets all of them pass.
    pub ipv4: Option<IpPart>,
    /// Rules on IPv6 packets; `None` lets all of them pass.
    pub ipv6: Option<IpPart>,
    /// Connections that get a conntrack helper.
    pub helpers: Vec<HelperRule>,
}

/// The Ethernet part of a ruleset. A side that is `None` lets every frame pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ethernet {
    /// Frames that the guest sends.
    pub from_guest: Option<EthernetSide>,
    /// Frames that the guest receives.
    pub to_guest: Option<EthernetSide>,
}

/// One direction of the Ethernet part. A frame that no rule of a chain stops is accepted at the chain's end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EthernetSide {
    /// The root chain: rules, and jumps into the other chains.
    pub root: Vec<RootEntry>,
    /// The other chains, in the order in which the root chain jumps into them.
    pub chains: Vec<SubChain>,
}

/// An entry of a root chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RootEntry {
    /// A rule.
    Rule(Rule),
    /// A jump into the sub-chain of that name, for the frames of its protocol.
    Jump(#[serde(serialize_with = "as_text")] ChainName),
}

/// A chain for the frames of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubChain {
    /// Its name; the name's prefix says which frames enter it.
    #[serde(serialize_with = "as_text")]
    pub name: ChainName,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// The rules on the packets of one IP family. A packet that no rule stops passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IpPart {
    /// Forwarded packets that the guest sends. `Return` lets a packet go on to the receiving port's rules.
    pub from_guest: Vec<Rule>,
    /// Forwarded packets that the guest receives.
    pub to_guest: Vec<Rule>,
    /// Packets from the guest to the host itself.
    pub to_host: Vec<Rule>,
}

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

/// One rule: a packet that passes all matches gets the verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// All of them must hold.
    pub matches: Vec<Match>,
    /// What then happens.
    pub verdict: Verdict,
    /// The rule of a filter this comes from.
    #[serde(serialize_with = "as_text")]
    pub origin: Origin,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It passes.
    Accept,
    /// It vanishes.
    Drop,
    /// It vanishes and its sender is told.
    Reject,
    /// The chain ends here for it; what follows is the calling chain.
    Return,
    /// It is counted and goes on to the next rule.
    Continue,
}

/// The place of a rule in its filter. Origins never make two rules differ.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The filter; `None` for rules of our own, in force before a filter can be.
    pub filter: Option<Arc<FilterName>>,
    /// The line of the rule in the filter's document, 0 where unknown.
    pub line: u32,
}

impl PartialEq for Origin {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Origin {}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.filter, self.line) {
            (None, _) => f.write_str("nwfilter"),
            (Some(filter), 0) => write!(f, "{filter}"),
            (Some(filter), line) => write!(f, "{filter}:{line}"),
        }
    }
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Match {
    /// What is compared.
    #[serde(flatten)]
    pub test: Test,
    /// True if the test must fail.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub negated: bool,
}

/// A comparison with a field of the packet.
#[allow(missing_docs)] // Fields are named after those of the packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    SrcMac {
        #[serde(serialize_with = "as_text")]
        addr: MacAddr,
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
        mask: Option<MacAddr>,
    },
    DstMac {
        #[serde(serialize_with = "as_text")]
        addr: MacAddr,
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
        mask: Option<MacAddr>,
    },
    EtherType(u16),
    VlanId(u16),
    VlanEncap(u16),
    StpType(u8),
    StpFlags(u8),
    /// A field of a spanning-tree frame within `from..=to`.
    StpRange {
        field: StpRange,
        from: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        to: Option<u32>,
    },
    StpRootAddress {
        #[serde(serialize_with = "as_text")]
        addr: MacAddr,
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
        mask: Option<MacAddr>,
    },
    StpSenderAddress {
        #[serde(serialize_with = "as_text")]
        addr: MacAddr,
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
        mask: Option<MacAddr>,
    },
    ArpHardwareType(u16),
    ArpProtocolType(u16),
    ArpOpcode(u16),
    ArpSrcMac(#[serde(serialize_with = "as_text")] MacAddr),
    ArpDstMac(#[serde(serialize_with = "as_text")] MacAddr),
    ArpSrcIp {
        addr: std::net::Ipv4Addr,
        prefix: u8,
    },
    ArpDstIp {
        addr: std::net::Ipv4Addr,
        prefix: u8,
    },
    ArpGratuitous,
    /// An address, or a network where a prefix length is given.
    SrcIp {
        addr: IpAddr,
        #[serde(skip_serializing_if = "Option::is_none")]
        prefix: Option<u8>,
    },
    DstIp {
        addr: IpAddr,
        #[serde(skip_serializing_if = "Option::is_none")]
        prefix: Option<u8>,
    },
    SrcIpRange {
        from: IpAddr,
        to: IpAddr,
    },
    DstIpRange {
        from: IpAddr,
        to: IpAddr,
    },
    IpProtocol(u8),
    SrcPort {
        from: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        to: Option<u16>,
    },
    DstPort {
        from: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        to: Option<u16>,
    },
    Dscp(u8),
    /// An ICMP or ICMPv6 type, and a code where one is asked for.
    Icmp {
        kind: u8,
        #[serde(skip_serializing_if = "Option::is_none")]
        code: Option<u8>,
    },
    /// Ranges of ICMPv6 types and codes, on the Ethernet layer.
    IcmpRange {
        kinds: (u8, u8),
        codes: (u8, u8),
    },
    /// More connections than that from the packet's source address.
    ConnlimitAbove(u16),
    States(#[serde(serialize_with = "as_text")] States),
    CtDirection(CtDirection),
    IpSet {
        name: String,
        #[serde(serialize_with = "as_texts")]
        directions: Vec<SetDirection>,
    },
    TcpFlags {
        #[serde(serialize_with = "as_text")]
        mask: TcpFlagSet,
        #[serde(serialize_with = "as_text")]
        set: TcpFlagSet,
    },
    TcpOption(u8),
    /// Matches every packet; says something to who reads the rules.
    Comment(String),
}

/// The fields of a spanning-tree frame that are compared with a range.
#[allow(missing_docs)] // The names are those of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CtDirection {
    /// As the connection's first packet.
    Original,
    /// Against it.
    Reply,
}

fn as_text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn as_optional_text<T: fmt::Display, S: Serializer>(
    value: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_none(),
    }
}

fn as_texts<T: fmt::Display, S: Serializer>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
}
