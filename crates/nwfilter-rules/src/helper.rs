//! Finds the connections of a port that need a conntrack helper, without which no packet is RELATED.
//!
//! Since Linux 6.0 the kernel does not assign helpers by itself (`nf_conntrack_helper` is gone), so a filter that accepts
//! FTP data as RELATED to the control connection never sees such a packet. A ruleset therefore names the control
//! connections, and the backend assigns the helpers.

use std::fmt;
use std::net::IpAddr;

use nwfilter_xml::value::States;
use nwfilter_xml::{Action, Field, Layer, Literal, Params, Protocol, VarName};
use serde::{Deserialize, Serialize};

use crate::error::RulesError;
use crate::expand::{Scoped, for_each_combination};
use crate::lower_ip::port_range;
use crate::packet::PortRange;
use crate::ruleset::Family;

/// The parameter of a binding that selects helpers: `auto` (the default), `none`, or a list of helpers by name, each for its
/// usual port (`ftp`) or another (`ftp:2121`).
pub const CTRL_CT_HELPERS: &str = "CTRL_CT_HELPERS";

/// The transport protocol of a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// A conntrack helper of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Helper {
    /// FTP: data connections, active and passive.
    Ftp,
    /// TFTP: the server's answers from another port.
    Tftp,
    /// IRC: direct connections between clients.
    Irc,
    /// SIP: media streams.
    Sip,
    /// Amanda: data, message and index streams.
    Amanda,
}

impl Helper {
    /// Its name, as in the kernel module `nf_conntrack_NAME`.
    pub fn name(self) -> &'static str {
        match self {
            Helper::Ftp => "ftp",
            Helper::Tftp => "tftp",
            Helper::Irc => "irc",
            Helper::Sip => "sip",
            Helper::Amanda => "amanda",
        }
    }
}

impl fmt::Display for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A helper and the control port it is for (`/etc/services`, IANA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownHelper {
    /// The helper.
    pub helper: Helper,
    /// The transport of control connections.
    pub transport: Transport,
    /// The usual port of control connections.
    pub port: u16,
    /// Whether it understands IPv6.
    pub ipv6: bool,
}

/// The helpers of the protocols the libvirt manual names. SCTP needs none: the kernel tracks it as a transport.
pub const KNOWN_HELPERS: [KnownHelper; 6] = [
    KnownHelper { helper: Helper::Ftp, transport: Transport::Tcp, port: 21, ipv6: true },
    KnownHelper { helper: Helper::Tftp, transport: Transport::Udp, port: 69, ipv6: true },
    KnownHelper { helper: Helper::Irc, transport: Transport::Tcp, port: 6667, ipv6: false },
    KnownHelper { helper: Helper::Sip, transport: Transport::Udp, port: 5060, ipv6: true },
    KnownHelper { helper: Helper::Sip, transport: Transport::Tcp, port: 5060, ipv6: true },
    KnownHelper { helper: Helper::Amanda, transport: Transport::Udp, port: 10080, ipv6: true },
];

/// Connections that get a helper.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HelperRule {
    /// The family of the connections.
    pub family: Family,
    /// The helper.
    pub helper: Helper,
    /// The transport of the control connection.
    pub transport: Transport,
    /// The port the control connection goes to.
    pub port: u16,
    /// Whether the guest is the server.
    pub side: HelperSide,
}

/// Where the server of a control connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HelperSide {
    /// In the guest: connections to the guest.
    Guest,
    /// Anywhere else: connections from the guest.
    Elsewhere,
}

/// The connections of a port that need a helper. `rules` are those of its tree, `params` those of its binding.
pub(crate) fn helpers(rules: &[Scoped<'_>], params: &Params) -> Result<Vec<HelperRule>, RulesError> {
    let mut found = match Choice::from(params)? {
        Choice::Auto => detected(rules)?,
        Choice::Named(named) => {
            let addresses = guest_addresses(params);
            // A guest that has addresses, but none of this family, serves nothing in this family.
            let has_server =
                |family| addresses.is_empty() || addresses.iter().any(|addr| Family::of(*addr) == family);
            let families = named.iter().flat_map(|known| Family::ALL.map(|family| (known, family)));
            families
                .filter(|(known, family)| *family == Family::Ipv4 || known.ipv6)
                .flat_map(|(known, family)| {
                    let guest = has_server(family).then_some(HelperSide::Guest);
                    let sides = guest.into_iter().chain([HelperSide::Elsewhere]);
                    sides.map(move |side| known.rule(family, known.port, side))
                })
                .collect()
        }
    };
    found.sort();
    found.dedup();
    Ok(found)
}

impl KnownHelper {
    fn rule(&self, family: Family, port: u16, side: HelperSide) -> HelperRule {
        HelperRule { family, helper: self.helper, transport: self.transport, port, side }
    }
}

enum Choice {
    Auto,
    Named(Vec<KnownHelper>),
}

impl Choice {
    fn from(params: &Params) -> Result<Self, RulesError> {
        let mut named = Vec::new();
        for value in params.get(CTRL_CT_HELPERS).unwrap_or(&[]) {
            match value.as_str() {
                "auto" => return Ok(Choice::Auto),
                "none" => return Ok(Choice::Named(Vec::new())),
                _ => named.extend(named_helpers(value)?),
            }
        }
        Ok(if named.is_empty() { Choice::Auto } else { Choice::Named(named) })
    }
}

/// The rows of the table for `ftp` or `ftp:2121`, with that port.
fn named_helpers(value: &str) -> Result<Vec<KnownHelper>, RulesError> {
    let (name, port) = match value.split_once(':') {
        Some((name, port)) => (name, Some(port.parse::<u16>())),
        None => (value, None),
    };
    let rows: Vec<_> = KNOWN_HELPERS.into_iter().filter(|known| known.helper.name() == name).collect();
    let port = port.transpose();
    match (rows.is_empty(), port) {
        (false, Ok(port)) => Ok(rows
            .into_iter()
            .map(|known| KnownHelper { port: port.unwrap_or(known.port), ..known })
            .collect()),
        _ => {
            let mut known: Vec<_> = KNOWN_HELPERS.iter().map(|known| known.helper.name()).collect();
            known.dedup();
            Err(RulesError::UnknownHelper { value: value.to_owned(), known: known.join(", ") })
        }
    }
}

/// The guest's addresses in a binding's parameters: IPv4 in IP, IPv6 in IPV6.
pub(crate) fn guest_addresses(params: &Params) -> Vec<IpAddr> {
    let variables = [(VarName::IP, Family::Ipv4), ("IPV6", Family::Ipv6)];
    let addresses = variables.into_iter().flat_map(|(variable, family)| {
        let values = params.get(variable).unwrap_or(&[]).iter();
        values.filter_map(|value| value.parse().ok()).filter(move |addr| Family::of(*addr) == family)
    });
    addresses.collect()
}

/// Helpers for the control ports that rules accept new connections to, in families whose rules use RELATED.
fn detected(rules: &[Scoped<'_>]) -> Result<Vec<HelperRule>, RulesError> {
    let mut found = Vec::new();
    for family in Family::ALL {
        let accepting = || rules.iter().filter(move |scoped| accepts_in(scoped, family));
        if !accepting().any(|scoped| states(scoped).is_some_and(|states| states.contains(States::RELATED))) {
            continue;
        }
        for scoped in accepting().filter(|scoped| states(scoped).is_none_or(|s| s.contains(States::NEW))) {
            let Some(transport) = transport(scoped) else { continue };
            for_each_combination(scoped, |fields| {
                let range = port_range(fields, Field::DstPortStart, Field::DstPortEnd)?;
                let Some((PortRange { from, to }, false)) = range else { return Ok(()) };
                let ports = from..=to.unwrap_or(from);
                let known = KNOWN_HELPERS.iter().filter(|known| known.transport == transport);
                let known = known.filter(|known| family == Family::Ipv4 || known.ipv6);
                for known in known.filter(|known| ports.contains(&known.port)) {
                    if scoped.rule.direction.is_in() {
                        found.push(known.rule(family, known.port, HelperSide::Guest));
                    }
                    if scoped.rule.direction.is_out() {
                        found.push(known.rule(family, known.port, HelperSide::Elsewhere));
                    }
                }
                Ok(())
            })?;
        }
    }
    Ok(found)
}

fn accepts_in(scoped: &Scoped<'_>, family: Family) -> bool {
    let layer = match family {
        Family::Ipv4 => Layer::Ipv4,
        Family::Ipv6 => Layer::Ipv6,
    };
    let of_family = scoped.rule.matches.as_ref().is_some_and(|matches| matches.protocol.layer() == layer);
    of_family && scoped.rule.action == Action::Accept
}

/// The states that a rule names; `None` if it uses the implicit ones.
fn states(scoped: &Scoped<'_>) -> Option<States> {
    let item = scoped.rule.matches.as_ref()?.get(Field::States)?;
    match &item.value {
        nwfilter_xml::Value::Literal(Literal::States(states)) if !states.is_empty() => Some(*states),
        _ => None,
    }
}

fn transport(scoped: &Scoped<'_>) -> Option<Transport> {
    match scoped.rule.matches.as_ref()?.protocol {
        Protocol::Tcp | Protocol::TcpOn6 => Some(Transport::Tcp),
        Protocol::Udp | Protocol::UdpOn6 => Some(Transport::Udp),
        _ => None,
    }
}
