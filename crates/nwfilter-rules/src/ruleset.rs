//! The ruleset of one port: typed matches and verdicts, independent of any tool.
//!
//! A ruleset says what passes, not how a kernel's tables express it. A backend adds what its tables need: a copy of the
//! guest's rules for packets to the host, rules that assign conntrack helpers, an exception for replies that a reject
//! makes.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use nwfilter_xml::value::VarRef;
use nwfilter_xml::{ChainName, FilterName, MacAddr};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::held::Layer;
use crate::helper::HelperRule;
use crate::log::LogGroup;
use crate::packet::{EthernetTest, IpTest};

/// What one port enforces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruleset {
    /// Rules on Ethernet frames. A frame has to pass these and those of its IP family.
    pub ethernet: Ethernet,
    /// Rules on IPv4 packets; `None` lets all of them pass.
    pub ipv4: Option<IpPart>,
    /// Rules on IPv6 packets; `None` lets all of them pass.
    pub ipv6: Option<IpPart>,
    /// Connections that get a conntrack helper.
    pub helpers: Vec<HelperRule>,
    /// The guest's own addresses that are given or learned.
    pub guest_addresses: Vec<IpAddr>,
    /// The guest's MAC address, where the ruleset is that of a binding.
    #[serde(default)]
    pub guest_mac: Option<MacAddr>,
}

/// The Ethernet part of a ruleset. A side that is `None` lets every frame pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ethernet {
    /// Frames that the guest sends.
    pub from_guest: Option<EthernetSide>,
    /// Frames that the guest receives.
    pub to_guest: Option<EthernetSide>,
}

/// One direction of the Ethernet part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EthernetSide {
    /// The root chain: rules, and jumps into the other chains.
    pub root: Vec<RootEntry>,
    /// The other chains, in the order in which the root chain jumps into them.
    pub chains: Vec<SubChain>,
    /// What happens to a frame at the end of the root chain.
    pub end: Verdict,
}

/// An entry of a root chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootEntry {
    /// A rule.
    Rule(EthernetRule),
    /// A jump into a sub-chain.
    Jump(Jump),
}

/// A jump into a sub-chain, for the frames of its protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jump {
    /// The name of the sub-chain.
    pub chain: ChainName,
    /// All of them must hold for a frame to enter it.
    pub matches: Vec<Match<EthernetTest>>,
}

/// A chain for the frames of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubChain {
    /// Its name.
    pub name: ChainName,
    /// Its rules.
    pub rules: Vec<EthernetRule>,
    /// What happens to a frame at its end.
    pub end: Verdict,
}

/// The rules on the packets of one IP family. A packet that no rule matches passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpPart {
    /// Packets that the guest sends, to other ports and to the host itself.
    pub from_guest: Vec<IpRule>,
    /// Packets that the guest receives.
    pub to_guest: Vec<IpRule>,
}

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::Ipv4, Family::Ipv6];

    /// The family of an address.
    pub fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Ipv4 => "IPv4",
            Family::Ipv6 => "IPv6",
        })
    }
}

/// One rule: a packet that passes all matches gets the verdict.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule<T> {
    /// All of them must hold.
    pub matches: Vec<Match<T>>,
    /// What then happens.
    pub verdict: Verdict,
    /// The rule of a filter this comes from.
    pub origin: Origin,
}

/// A rule on Ethernet frames.
pub type EthernetRule = Rule<EthernetTest>;

/// A rule on IP packets.
pub type IpRule = Rule<IpTest>;

impl<T> Rule<T> {
    /// A rule that comes from no filter.
    pub fn built_in(matches: impl IntoIterator<Item = Match<T>>, verdict: Verdict) -> Self {
        Self { matches: matches.into_iter().collect(), verdict, origin: Origin::BUILT_IN }
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The packet passes this port and layer; no later rule of them is evaluated.
    Accept,
    /// The sending port lets the packet pass, and the rules of the receiving port decide.
    Pass,
    /// It is dropped.
    Drop,
    /// It is dropped, and its sender gets an error.
    Reject,
    /// It leaves the chain and continues after the jump.
    Return,
    /// It is counted and continues with the next rule.
    Continue,
    /// It is reported to a group of the kernel's log, unless that was done [too often](crate::LOG_RATE), and continues with
    /// the next rule, which stops it: see [`Ruleset::logging_drops`].
    Log(LogGroup),
}

/// The filter and line of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// The filter; `None` for built-in rules, in force before a filter can be.
    pub filter: Option<Arc<FilterName>>,
    /// The line of the rule in the filter's document, 0 where unknown.
    pub line: u32,
}

impl Origin {
    /// The origin of built-in rules.
    pub const BUILT_IN: Origin = Origin { filter: None, line: 0 };
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.filter, self.line) {
            (None, _) => f.write_str("nwfilter"),
            (Some(filter), 0) => write!(f, "{filter}"),
            (Some(filter), line) => write!(f, "{filter}:{line}"),
        }
    }
}

impl FromStr for Origin {
    type Err = nwfilter_xml::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == Self::BUILT_IN.to_string() {
            return Ok(Self::BUILT_IN);
        }
        let line = text.rsplit_once(':').and_then(|(filter, line)| Some((filter, line.parse().ok()?)));
        let (filter, line) = line.unwrap_or((text, 0));
        Ok(Self { filter: Some(Arc::new(filter.parse()?)), line })
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Match<T> {
    /// What is compared.
    #[serde(flatten)]
    pub test: T,
    /// True if the test must fail.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub negated: bool,
    /// The variables whose values are compared; none if the filter contains the values. A backend can share rules between
    /// ports whose rulesets differ only in such values.
    #[serde(default = "Vec::new", skip_serializing_if = "Vec::is_empty")]
    pub variables: Vec<VarRef>,
}

impl<T> Match<T> {
    /// The test must hold.
    pub fn is(test: T) -> Self {
        Self { test, negated: false, variables: Vec::new() }
    }

    /// The test must fail.
    pub fn is_not(test: T) -> Self {
        Self { test, negated: true, variables: Vec::new() }
    }
}

impl EthernetSide {
    /// A root chain with these rules.
    pub fn of_rules(rules: impl IntoIterator<Item = EthernetRule>) -> Self {
        Self {
            root: rules.into_iter().map(RootEntry::Rule).collect(),
            chains: Vec::new(),
            end: Verdict::Accept,
        }
    }
}

/// A rule of either layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyRule<'a> {
    /// On Ethernet frames.
    Ethernet(&'a EthernetRule),
    /// On IP packets.
    Ip(&'a IpRule),
}

impl<'a> AnyRule<'a> {
    /// The rule of a filter it comes from.
    pub fn origin(self) -> &'a Origin {
        match self {
            AnyRule::Ethernet(rule) => &rule.origin,
            AnyRule::Ip(rule) => &rule.origin,
        }
    }

    /// What happens to a packet that it matches.
    pub fn verdict(self) -> Verdict {
        match self {
            AnyRule::Ethernet(rule) => rule.verdict,
            AnyRule::Ip(rule) => rule.verdict,
        }
    }
}

impl Ruleset {
    /// The rules of an IP family.
    pub fn ip(&self, family: Family) -> Option<&IpPart> {
        match family {
            Family::Ipv4 => self.ipv4.as_ref(),
            Family::Ipv6 => self.ipv6.as_ref(),
        }
    }

    /// Whether there are rules of any IP family.
    pub fn has_ip_rules(&self) -> bool {
        self.ipv4.is_some() || self.ipv6.is_some()
    }

    /// Every rule, of both layers and directions.
    pub fn rules(&self) -> impl Iterator<Item = AnyRule<'_>> {
        self.rules_by_layer().map(|(_, rule)| rule)
    }

    /// The same, each with the packets that it is about.
    pub fn rules_by_layer(&self) -> impl Iterator<Item = (Layer, AnyRule<'_>)> {
        let sides = [&self.ethernet.from_guest, &self.ethernet.to_guest].into_iter().flatten();
        let ethernet = sides.flat_map(|side| {
            let root = side.root.iter().filter_map(|entry| match entry {
                RootEntry::Rule(rule) => Some(rule),
                RootEntry::Jump(_) => None,
            });
            root.chain(side.chains.iter().flat_map(|chain| &chain.rules))
        });
        let parts = Family::ALL.into_iter().filter_map(|family| Some((family, self.ip(family)?)));
        let ip = parts.flat_map(|(family, part)| {
            let rules = part.from_guest.iter().chain(&part.to_guest);
            rules.map(move |rule| (Layer::from(family), AnyRule::Ip(rule)))
        });
        ethernet.map(|rule| (Layer::Ethernet, AnyRule::Ethernet(rule))).chain(ip)
    }
}
