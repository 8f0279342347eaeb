//! Decides the ruleset of a port: that of its filter, or a provisional one while its guest's address is not known.

use std::net::IpAddr;
use std::time::Duration;

use nwfilter_rules::{Filters, RulesError, Ruleset, instantiate};
use nwfilter_xml::{Binding, VarName};

use super::known::{GuestKey, Known, Lease};
use super::{BindingState, Family, Learning, Method, RemainingLease, provisional6};
use crate::Error;
use crate::drops::are_logged;
use crate::stores::Stores;

/// The parameter for the method of learning.
const CTRL_IP_LEARNING: &str = "CTRL_IP_LEARNING";
/// The parameter for the DHCP servers whose answers count.
const DHCPSERVER: &str = "DHCPSERVER";

/// The ruleset of a port, and its state.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) ruleset: Ruleset,
    pub(crate) state: BindingState,
}

impl Wanted {
    /// Logs a warning if others on the guest's network can choose its address.
    pub(crate) fn warn(&self, binding: &Binding, learning: &Learning) {
        let by_dhcp = match &self.state {
            BindingState::Learning { method, .. } => *method == Method::Dhcp,
            BindingState::Leased { .. } => true,
            _ => false,
        };
        let names_servers = !binding.params.get(DHCPSERVER).unwrap_or_default().is_empty();
        if by_dhcp && !names_servers && learning.dhcp_servers.is_empty() {
            log::warn!(
                nwfilter_port = binding.port.as_str(), nwfilter_guest = binding.owner.name.as_str(),
                nwfilter_filter = binding.filter.as_str();
                "{}: whoever answers a DHCP request first decides the guest's address: name the servers in {DHCPSERVER}",
                binding.port
            );
        }
    }
}

/// The address that a binding does not give, and how it is learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) family: Family,
    pub(crate) method: Method,
    /// The DHCP servers of the family whose answers count. Empty for all servers.
    pub(crate) servers: Vec<IpAddr>,
}

/// Whether what was learned about a guest is still valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// It is.
    Counts,
    /// It is not, because the port has a new binding.
    Forgotten,
}

/// The ruleset that a port with this binding must have now.
///
/// A binding that needs an address is refused unless its filter makes rules with one.
pub(crate) fn wanted(
    filters: &impl Filters,
    binding: &Binding,
    stores: &Stores,
    past: Past,
) -> Result<Wanted, Error> {
    let Wanted { ruleset, state } = without_log(filters, binding, stores, past)?;
    let ruleset = if are_logged(binding)? { ruleset.logging_drops(stores.log_group) } else { ruleset };
    Ok(Wanted { ruleset, state })
}

fn without_log(
    filters: &impl Filters,
    binding: &Binding,
    stores: &Stores,
    past: Past,
) -> Result<Wanted, Error> {
    let (known, now) = (&stores.known, stores.known.now());
    let missing = match instantiate(filters, binding) {
        Ok(ruleset) => return Ok(Wanted { ruleset, state: BindingState::Filtered }),
        Err(missing) => missing,
    };
    let need = need(binding, missing, &stores.learning)?;
    let guest = GuestKey::of(binding);
    match need.method {
        Method::Any => {
            match known.learned(&binding.port, guest, need.family).filter(|_| past == Past::Counts) {
                Some(learned) => {
                    let ruleset = with_addresses(filters, binding, need.family, &learned.addresses)?;
                    let (addresses, source) = (learned.addresses.clone(), learned.source);
                    Ok(Wanted { ruleset, state: BindingState::Learned { addresses, source } })
                }
                None => {
                    let refused = known.refused(&binding.port, guest, need.family);
                    match refused.filter(|_| past == Past::Counts) {
                        Some(address) => refusing(filters, binding, need, address),
                        None => provisional(filters, binding, &need),
                    }
                }
            }
        }
        Method::Dhcp => {
            let leases = known.leases(guest, need.family).filter(|lease| lease.holds_at(now));
            let leases: Vec<_> = leases.copied().collect();
            match leases.is_empty() {
                true => provisional(filters, binding, &need),
                false => leased(filters, binding, need.family, &leases, now),
            }
        }
    }
}

/// The addresses of a guest: those of its binding, learned ones, and leased ones.
pub(crate) fn addresses(known: &Known, binding: &Binding, past: Past) -> Vec<IpAddr> {
    let (guest, now) = (GuestKey::of(binding), known.now());
    let mut addresses = Vec::new();
    for family in [Family::Ipv4, Family::Ipv6] {
        let given = binding.params.get(family.variable()).unwrap_or_default();
        addresses.extend(given.iter().filter_map(|value| value.parse::<IpAddr>().ok()));
        if past == Past::Counts {
            let learned = known.learned(&binding.port, guest, family);
            addresses.extend(learned.into_iter().flat_map(|learned| &learned.addresses));
            let leases = known.leases(guest, family).filter(|lease| lease.holds_at(now));
            addresses.extend(leases.map(|lease| lease.address));
        }
    }
    addresses
}

/// What must be learned for a binding. `None` if it gives all that its filter needs.
pub(crate) fn needed(
    filters: &impl Filters,
    binding: &Binding,
    learning: &Learning,
) -> Result<Option<Need>, Error> {
    match instantiate(filters, binding) {
        Ok(_) => Ok(None),
        Err(missing) => need(binding, missing, learning).map(Some),
    }
}

/// The address that is missing by an error. The error itself, if more than one address is missing.
fn need(binding: &Binding, missing: RulesError, learning: &Learning) -> Result<Need, Error> {
    let family = match &missing {
        RulesError::MissingVariables { names } => match names.as_slice() {
            [name] if name == Family::Ipv4.variable() => Some(Family::Ipv4),
            [name] if name == Family::Ipv6.variable() => Some(Family::Ipv6),
            _ => None,
        },
        _ => None,
    };
    let (Some(family), Some(method)) = (family, method(binding, learning)?) else {
        return Err(refused(binding, missing));
    };
    let mut servers = servers(binding, learning)?;
    servers.retain(|server| Family::of(*server) == family);
    Ok(Need { family, method, servers })
}

/// The method of learning that the binding asks for, or else that of the host. `None` if learning is forbidden.
fn method(binding: &Binding, learning: &Learning) -> Result<Option<Method>, Error> {
    let values = binding.params.get(CTRL_IP_LEARNING).unwrap_or_default();
    let Some(value) = values.first() else { return Ok(learning.method) };
    Method::from_word(&value.to_ascii_lowercase())
        .ok_or_else(|| bad_parameter(binding, CTRL_IP_LEARNING, value, "any, dhcp or none"))
}

fn servers(binding: &Binding, learning: &Learning) -> Result<Vec<IpAddr>, Error> {
    let values = binding.params.get(DHCPSERVER).unwrap_or_default();
    if values.is_empty() {
        return Ok(learning.dhcp_servers.clone());
    }
    let parse = |value: &String| {
        value
            .parse()
            .map_err(|_| bad_parameter(binding, DHCPSERVER, value, "the IP address of a DHCP server"))
    };
    values.iter().map(parse).collect()
}

/// The ruleset that is in force until the address is known.
fn provisional(filters: &impl Filters, binding: &Binding, need: &Need) -> Result<Wanted, Error> {
    with_addresses(filters, binding, need.family, &[placeholder(need.family)])?;
    let servers4 = || {
        need.servers.iter().filter_map(|server| match server {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    };
    let ruleset = match (need.family, need.method) {
        (Family::Ipv4, Method::Any) => Ruleset::learning(binding.mac),
        (Family::Ipv4, Method::Dhcp) => Ruleset::dhcp_only(binding.mac, &servers4().collect::<Vec<_>>()),
        (Family::Ipv6, Method::Any) => provisional6::learning(binding.mac),
        (Family::Ipv6, Method::Dhcp) => provisional6::dhcp_only(binding.mac, &need.servers),
    };
    Ok(Wanted { ruleset, state: BindingState::Learning { family: need.family, method: need.method } })
}

/// The ruleset that is in force while the guest uses an address of another.
fn refusing(filters: &impl Filters, binding: &Binding, need: Need, address: IpAddr) -> Result<Wanted, Error> {
    let need = Need { method: Method::Dhcp, ..need };
    let Wanted { ruleset, .. } = provisional(filters, binding, &need)?;
    Ok(Wanted { ruleset, state: BindingState::Refused { address } })
}

/// A documentation address, to check whether rules can be made once an address is known.
fn placeholder(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => [192, 0, 2, 1].into(),
        Family::Ipv6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(),
    }
}

fn leased(
    filters: &impl Filters,
    binding: &Binding,
    family: Family,
    leases: &[Lease],
    now: u64,
) -> Result<Wanted, Error> {
    let addresses: Vec<_> = leases.iter().map(|lease| lease.address).collect();
    let (used, ruleset) = match with_addresses(filters, binding, family, &addresses) {
        Ok(ruleset) => (leases, ruleset),
        // The guest determines the number of its leases. It must not be able to make its binding invalid.
        Err(error) => {
            log::warn!(nwfilter_port = binding.port.as_str(); "{}: only the first of {} leases is used: {error}", binding.port, leases.len());
            (&leases[..1], with_addresses(filters, binding, family, &addresses[..1])?)
        }
    };
    let remaining = |lease: &Lease| RemainingLease {
        address: lease.address,
        server: lease.server,
        remaining: lease.expires.map(|expires| Duration::from_secs(expires.saturating_sub(now))),
    };
    let state = BindingState::Leased { leases: used.iter().map(remaining).collect() };
    Ok(Wanted { ruleset, state })
}

fn with_addresses(
    filters: &impl Filters,
    binding: &Binding,
    family: Family,
    addresses: &[IpAddr],
) -> Result<Ruleset, Error> {
    let mut binding = binding.clone();
    if let Ok(name) = family.variable().parse::<VarName>() {
        for address in addresses {
            // An address is always a valid value.
            let _ = binding.params.insert(name.clone(), &address.to_string());
        }
    }
    instantiate(filters, &binding).map_err(|error| refused(&binding, error))
}

fn refused(binding: &Binding, source: RulesError) -> Error {
    Error::Rules { port: binding.port.clone(), filter: binding.filter.clone(), source: Box::new(source) }
}

fn bad_parameter(binding: &Binding, name: &'static str, value: &str, expected: &'static str) -> Error {
    Error::Parameter { port: binding.port.clone(), name, value: value.to_owned(), expected }
}
