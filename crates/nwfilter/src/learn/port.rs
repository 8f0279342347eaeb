//! Decides what observations on one port mean: which address is learned, and which lease begins or ends.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use super::known::{Change, GuestKey, Lease};
use super::packets::{FOREVER, Observation};
use super::sieve::Interest;
use super::{Family, Method, Source};

/// The most requests of a guest that wait for an answer.
const MAX_REQUESTS: usize = 8;
/// How long a server may take to answer, in seconds. A client repeats its request much earlier.
const PATIENCE: u64 = 120;
/// The most ignored addresses, and for how many seconds they are ignored.
const MAX_IGNORED: usize = 64;
const PAUSE: u64 = 30;
/// The most addresses of a request that are remembered.
const MAX_ADDRESSES: usize = 8;
/// The most leases of a guest.
pub(crate) const MAX_LEASES: usize = 32;

/// The learner's state for one port.
#[derive(Debug)]
pub(crate) struct PortLearner {
    guest: GuestKey,
    interest: Interest,
    requests: VecDeque<Request>,
    /// Addresses that belong to others but that the guest uses, and until when they are ignored, in seconds since the epoch.
    ignored: VecDeque<(IpAddr, u64)>,
}

/// A DHCP transaction of the guest that no server has answered.
#[derive(Debug)]
struct Request {
    transaction: u32,
    addresses: Vec<IpAddr>,
    /// When it was opened, in seconds since the epoch.
    opened: u64,
}

impl PortLearner {
    pub(crate) fn new(guest: GuestKey, interest: Interest) -> Self {
        Self { guest, interest, requests: VecDeque::new(), ignored: VecDeque::new() }
    }

    /// Ignores an address for a while, because it belongs to another.
    pub(crate) fn ignore(&mut self, address: IpAddr, now: u64) {
        self.ignored.retain(|(ignored, until)| *ignored != address && *until > now);
        if self.ignored.len() == MAX_IGNORED {
            self.ignored.pop_front();
        }
        self.ignored.push_back((address, now.saturating_add(PAUSE)));
    }

    pub(crate) fn guest(&self) -> GuestKey {
        self.guest
    }

    pub(crate) fn interest(&self) -> &Interest {
        &self.interest
    }

    /// The changes that follow from an observation. `now` is in seconds since the epoch.
    ///
    /// A server's answer counts only in a transaction that the guest has opened, and only the first.
    pub(crate) fn take(&mut self, observation: Observation, now: u64) -> Vec<Change> {
        match observation {
            Observation::Request { transaction, addresses } => {
                self.remember(transaction, addresses, now);
                Vec::new()
            }
            Observation::Grant { transaction, server, leases } if self.trusts(server) => {
                match self.close(transaction, now) {
                    Some(_) => self.granted(server, &leases, now),
                    None => Vec::new(),
                }
            }
            Observation::Refusal { transaction, server } if self.trusts(server) => {
                let refused = self.close(transaction, now).map(|request| request.addresses);
                self.ended(refused.unwrap_or_default(), "the server refused it")
            }
            Observation::Release(addresses) => self.ended(addresses, "the guest gave it back"),
            Observation::Arp(address) => self.uses(address.into(), Source::Arp, now),
            Observation::Ipv4(address) => self.uses(address.into(), Source::Ipv4, now),
            Observation::Neighbour(address) => self.uses(address.into(), Source::NeighbourDiscovery, now),
            Observation::Ipv6(address) => self.uses(address.into(), Source::Ipv6, now),
            Observation::Grant { .. } | Observation::Refusal { .. } => Vec::new(),
        }
    }

    /// Learns an address that the guest uses. It is final.
    fn uses(&self, address: IpAddr, source: Source, now: u64) -> Vec<Change> {
        let wanted = &self.interest.wanted;
        let fits = wanted.method == Method::Any && Family::of(address) == wanted.family;
        let is_ignored = self.ignored.iter().any(|(ignored, until)| *ignored == address && *until > now);
        let learned = (fits && !is_ignored).then_some(Change::Learned { guest: self.guest, address, source });
        learned.into_iter().collect()
    }

    fn granted(&self, server: IpAddr, leases: &[(IpAddr, u32)], now: u64) -> Vec<Change> {
        let guest = self.guest;
        let fitting =
            leases.iter().filter(|(address, _)| Family::of(*address) == self.interest.wanted.family);
        if self.interest.wanted.method == Method::Any {
            let first = fitting.into_iter().find(|(_, seconds)| *seconds > 0);
            return first.map(|(address, _)| self.uses(*address, Source::Dhcp, now)).unwrap_or_default();
        }
        let change = |&(address, seconds): &(IpAddr, u32)| match seconds {
            0 => Change::Ended { guest, address, why: "the server took it back" },
            FOREVER => Change::Granted { guest, lease: Lease { address, server, expires: None } },
            seconds => {
                let expires = Some(now.saturating_add(u64::from(seconds)));
                Change::Granted { guest, lease: Lease { address, server, expires } }
            }
        };
        fitting.take(MAX_LEASES).map(change).collect()
    }

    /// Leases that are over.
    fn ended(&self, addresses: Vec<IpAddr>, why: &'static str) -> Vec<Change> {
        let guest = self.guest;
        if self.interest.wanted.method == Method::Any {
            return Vec::new();
        }
        addresses.into_iter().map(|address| Change::Ended { guest, address, why }).collect()
    }

    fn trusts(&self, server: IpAddr) -> bool {
        let servers = &self.interest.wanted.servers;
        servers.is_empty() || servers.contains(&server)
    }

    fn remember(&mut self, transaction: u32, mut addresses: Vec<IpAddr>, now: u64) {
        addresses.truncate(MAX_ADDRESSES);
        self.requests.retain(|known| known.transaction != transaction);
        if self.requests.len() == MAX_REQUESTS {
            self.requests.pop_front();
        }
        self.requests.push_back(Request { transaction, addresses, opened: now });
    }

    /// Removes the request that a server answers, and returns it unless it is too old.
    fn close(&mut self, transaction: u32, now: u64) -> Option<Request> {
        let answered = self.requests.iter().position(|known| known.transaction == transaction)?;
        let request = self.requests.remove(answered)?;
        (now < request.opened.saturating_add(PATIENCE)).then_some(request)
    }
}

/// Whether an address is link-local, so that the guest will have another one.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if Ipv6Addr::is_unicast_link_local(&address))
}

/// Whether these addresses are all that is learned of a guest. An IPv6 guest has a link-local address and another one.
pub(crate) fn is_complete(addresses: &[IpAddr]) -> bool {
    addresses.iter().any(|address| !is_link_local(*address))
}
