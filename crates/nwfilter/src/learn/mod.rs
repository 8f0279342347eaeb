//! Learning the addresses of guests whose bindings do not give them.
//!
//! A binding whose filter lacks a value for exactly `IP` (or, in an extension of libvirt's language, exactly `IPV6`)
//! is not refused: its port gets a provisional ruleset, one thread listens to what passes the ports, and the filter
//! is applied once the address is known.
//!
//! [`wanted`] decides what a port must have. [`packets`] reads frames, [`port`] decides what they mean for a port,
//! [`serving`] which guests may serve DHCP, [`taken`] which addresses belong to others, and [`known`] stores what is known.
//! [`capture`], [`sieve`], [`program`] and [`bpf`] are the kernel's part, [`engine`] is the thread, [`service`] what the
//! driver asks of it, and [`shown`] a port's status for programs.

pub(crate) mod bpf;
pub(crate) mod capture;
pub(crate) mod engine;
pub(crate) mod known;
pub mod packets;
pub(crate) mod port;
pub(crate) mod program;
pub(crate) mod provisional6;
pub(crate) mod service;
pub(crate) mod serving;
mod shown;
pub(crate) mod sieve;
pub(crate) mod taken;
pub(crate) mod wanted;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_xml::Binding;

use crate::{Attachment, Error};

/// How the address of a guest is learned: parameter `CTRL_IP_LEARNING`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// From the first ARP or IPv4 packet that the guest sends, or from a DHCP server's answer to it.
    Any,
    /// From DHCP servers' answers only. The guest has the address while its lease runs.
    Dhcp,
}

/// How addresses are learned for bindings that do not say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learning {
    /// The method for bindings without parameter `CTRL_IP_LEARNING`. `None` refuses a binding that lacks an address.
    pub method: Option<Method>,
    /// The DHCP servers whose answers count for bindings without parameter `DHCPSERVER`. Empty for all servers.
    pub dhcp_servers: Vec<IpAddr>,
}

impl Learning {
    /// Of words as settings have them: `any`, `dhcp` or `none`, and addresses with commas between them, if any. `None` for other
    /// words.
    pub fn from_words(method: &str, dhcp_servers: Option<&str>) -> Option<Self> {
        let addresses = dhcp_servers.into_iter().flat_map(|servers| servers.split(','));
        let dhcp_servers = addresses.map(|address| address.trim().parse().ok()).collect::<Option<_>>()?;
        Some(Self { method: Method::from_word(method)?, dhcp_servers })
    }
}

impl Default for Learning {
    /// As libvirt has it: any method, and all servers.
    fn default() -> Self {
        Self { method: Some(Method::Any), dhcp_servers: Vec::new() }
    }
}

/// The IP family of the address that a binding lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// Variable `IP`.
    Ipv4,
    /// Variable `IPV6`.
    Ipv6,
}

/// What an address was learned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The guest claimed it by ARP.
    Arp,
    /// The guest sent an IPv4 packet from it.
    Ipv4,
    /// A server granted it by DHCP or DHCPv6.
    Dhcp,
    /// The guest claimed it by neighbour discovery.
    NeighbourDiscovery,
    /// The guest sent an IPv6 packet from it.
    Ipv6,
}

/// Whether the filter of a port is in force, and with which addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BindingState {
    /// The filter is in force, with the values that the binding gives.
    Filtered,
    /// A provisional ruleset is in force until the guest's address is known.
    Learning {
        /// Which address.
        family: Family,
        /// How it will be learned.
        method: Method,
    },
    /// A provisional ruleset is in force, and no process learns the guest's address: [`Driver::reload`](crate::Driver::reload)
    /// starts the learning again, or [`Driver::learn`](crate::Driver::learn).
    Unattended {
        /// Which address.
        family: Family,
        /// How it would be learned.
        method: Method,
    },
    /// The guest uses an address of the host or of another guest, so it was not learned. Only DHCP passes until the guest
    /// uses another one.
    Refused {
        /// The address.
        address: IpAddr,
    },
    /// The filter is in force with the learned addresses, which are final.
    Learned {
        /// The addresses, at least one.
        addresses: Vec<IpAddr>,
        /// What they were learned from.
        source: Source,
    },
    /// The filter is in force with the addresses of DHCP leases.
    Leased {
        /// The leases, at least one, in the order in which they were granted.
        leases: Vec<RemainingLease>,
    },
}

/// A port that is filtered. Serialized it is what `nwfilterctl binding-list --json` prints of it.
#[derive(Debug)]
pub struct PortStatus {
    /// Its binding.
    pub binding: Arc<Binding>,
    /// The state, or why no rules can be made of the binding any more.
    pub state: Result<BindingState, Error>,
    /// Whether packets get to its rules.
    pub attachment: Attachment,
}

impl PortStatus {
    /// The name of the state: `absent` or `unbridged` if packets do not get to the port's rules, `invalid` if there are none,
    /// else `filtered`, `learning`, `unattended`, `refused`, `learned` or `leased`.
    pub fn state_name(&self) -> &'static str {
        match (self.attachment, &self.state) {
            (Attachment::Absent, _) => "absent",
            (Attachment::Unbridged, _) => "unbridged",
            (Attachment::Bridged, Err(_)) => "invalid",
            (Attachment::Bridged, Ok(state)) => state.name(),
        }
    }
}

/// A lease in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemainingLease {
    /// The address.
    pub address: IpAddr,
    /// The address of the server that granted it.
    pub server: IpAddr,
    /// The remaining time. `None` if it has no end.
    pub remaining: Option<Duration>,
}

impl BindingState {
    /// Its name: `filtered`, `learning`, `unattended`, `refused`, `learned` or `leased`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Filtered => "filtered",
            Self::Learning { .. } => "learning",
            Self::Unattended { .. } => "unattended",
            Self::Refused { .. } => "refused",
            Self::Learned { .. } => "learned",
            Self::Leased { .. } => "leased",
        }
    }

    /// Whether no frame can change it.
    pub(crate) fn is_complete(&self) -> bool {
        match self {
            Self::Filtered => true,
            Self::Learned { addresses, .. } => port::is_complete(addresses),
            Self::Learning { .. } | Self::Unattended { .. } | Self::Refused { .. } | Self::Leased { .. } => {
                false
            }
        }
    }
}

impl Family {
    /// The variable of the family's address.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Ipv4 => "IP",
            Self::Ipv6 => "IPV6",
        }
    }

    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

impl Method {
    /// The method of a word: `Some(None)` for `none`, and `None` for an unknown word.
    pub(crate) fn from_word(word: &str) -> Option<Option<Self>> {
        match word {
            "any" => Some(Some(Method::Any)),
            "dhcp" => Some(Some(Method::Dhcp)),
            "none" => Some(None),
            _ => None,
        }
    }

    const NAMES: [(Self, &'static str); 2] = [(Self::Any, "any"), (Self::Dhcp, "dhcp")];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&Self::NAMES, *self))
    }
}

impl Source {
    const NAMES: [(Self, &'static str); 5] = [
        (Self::Arp, "arp"),
        (Self::Ipv4, "ipv4"),
        (Self::Dhcp, "dhcp"),
        (Self::NeighbourDiscovery, "nd"),
        (Self::Ipv6, "ipv6"),
    ];

    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(source, _)| *source)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&Self::NAMES, *self))
    }
}

fn name_of<T: PartialEq>(names: &[(T, &'static str)], value: T) -> &'static str {
    names.iter().find(|(known, _)| *known == value).map_or("", |(_, name)| name)
}

/// `filtered`, `learning IP (any)`, `learning IP: 10.0.0.1 is another's`, `10.0.0.2 (arp)`, `10.0.0.2 (lease, 3540 s)`.
impl fmt::Display for BindingState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filtered => f.write_str("filtered"),
            Self::Learning { family, method } => write!(f, "learning {} ({method})", family.variable()),
            Self::Unattended { family, method } => {
                write!(f, "not learning {} ({method}): no learner runs", family.variable())
            }
            Self::Refused { address } => {
                write!(f, "learning {}: {address} is another's", Family::of(*address).variable())
            }
            Self::Learned { addresses, source } => {
                let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                write!(f, "{} ({source})", addresses.join(", "))
            }
            Self::Leased { leases } => {
                let shown = leases.iter().map(|lease| match lease.remaining {
                    Some(remaining) => format!("{} (lease, {} s)", lease.address, remaining.as_secs()),
                    None => format!("{} (lease)", lease.address),
                });
                f.write_str(&shown.collect::<Vec<_>>().join(", "))
            }
        }
    }
}
