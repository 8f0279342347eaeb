//! What the observations on one port mean: which address is learned, which lease begins or ends.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use super::capture::Interest;
use super::known::{Change, GuestKey, Lease};
use super::packets::{FOREVER, Observation};
use super::{Family, Method, Source};

/// Requests of the guest that are remembered until a server refuses one.
const MAX_REQUESTS: usize = 8;
/// Addresses that one request is remembered with.
const MAX_ADDRESSES: usize = 8;
/// Leases that one guest can have at a time.
pub(crate) const MAX_LEASES: usize = 32;

/// The learning of one port.
#[derive(Debug)]
pub(crate) struct PortLearner {
    guest: GuestKey,
    interest: Interest,
    requests: VecDeque<(u32, Vec<IpAddr>)>,
}

impl PortLearner {
    pub(crate) fn new(guest: GuestKey, interest: Interest) -> Self {
        Self { guest, interest, requests: VecDeque::new() }
    }

    pub(crate) fn guest(&self) -> GuestKey {
        self.guest
    }

    pub(crate) fn interest(&self) -> &Interest {
        &self.interest
    }

    /// What an observation changes of what is known, at a time in seconds since the epoch.
    pub(crate) fn take(&mut self, observation: Observation, now: u64) -> Vec<Change> {
        match self.interest.method {
            Method::Any => self.learn(observation).into_iter().collect(),
            Method::Dhcp => self.lease(observation, now),
        }
    }

    fn learn(&self, observation: Observation) -> Option<Change> {
        let (address, source) = match observation {
            Observation::Arp(address) => (address.into(), Source::Arp),
            Observation::Ipv4(address) => (address.into(), Source::Ipv4),
            Observation::Neighbour(address) => (address.into(), Source::NeighbourDiscovery),
            Observation::Ipv6(address) => (address.into(), Source::Ipv6),
            Observation::Grant { server, leases, .. } if self.trusts(server) => {
                let granted = leases.iter().find(|(_, seconds)| *seconds > 0)?;
                (granted.0, Source::Dhcp)
            }
            _ => return None,
        };
        let fits = Family::of(address) == self.interest.family;
        fits.then_some(Change::Learned { guest: self.guest, address, source })
    }

    fn lease(&mut self, observation: Observation, now: u64) -> Vec<Change> {
        let guest = self.guest;
        let family = self.interest.family;
        let ended = |addresses: Vec<IpAddr>, why| {
            addresses.into_iter().map(|address| Change::Ended { guest, address, why }).collect()
        };
        match observation {
            Observation::Request { transaction, mut addresses } => {
                addresses.truncate(MAX_ADDRESSES);
                self.remember(transaction, addresses);
                Vec::new()
            }
            Observation::Release(addresses) => ended(addresses, "the guest gave it back"),
            Observation::Grant { server, leases, .. } if self.trusts(server) => {
                let fitting = leases.into_iter().filter(|(address, _)| Family::of(*address) == family);
                let change = |(address, seconds)| match seconds {
                    0 => Change::Ended { guest, address, why: "the server took it back" },
                    FOREVER => Change::Granted { guest, lease: Lease { address, server, expires: None } },
                    seconds => {
                        let expires = Some(now.saturating_add(u64::from(seconds)));
                        Change::Granted { guest, lease: Lease { address, server, expires } }
                    }
                };
                fitting.take(MAX_LEASES).map(change).collect()
            }
            Observation::Refusal { transaction, server } if self.trusts(server) => {
                let refused = self.requests.iter().position(|(known, _)| *known == transaction);
                let request = refused.and_then(|index| self.requests.remove(index));
                request.map(|(_, addresses)| ended(addresses, "the server refused it")).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    fn trusts(&self, server: IpAddr) -> bool {
        self.interest.servers.is_empty() || self.interest.servers.contains(&server)
    }

    fn remember(&mut self, transaction: u32, addresses: Vec<IpAddr>) {
        self.requests.retain(|(known, _)| *known != transaction);
        if self.requests.len() == MAX_REQUESTS {
            self.requests.pop_front();
        }
        self.requests.push_back((transaction, addresses));
    }
}

/// Whether an IPv6 address only reaches the link, so that the guest will have another one.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if Ipv6Addr::is_unicast_link_local(&address))
}

/// Whether nothing is left to learn behind these addresses: of IPv6, a guest has one for the link and one for the
/// world.
pub(crate) fn is_complete(addresses: &[IpAddr]) -> bool {
    addresses.iter().any(|address| !is_link_local(*address))
}
