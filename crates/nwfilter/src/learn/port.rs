//! What the observations on one port mean: which address is learned, which lease begins or ends.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use super::known::{Change, GuestKey, Lease};
use super::packets::{FOREVER, Observation};
use super::sieve::Interest;
use super::{Family, Method, Source};

/// Requests of the guest that are remembered until a server answers.
const MAX_REQUESTS: usize = 8;
/// Seconds for which a server may answer. A client asks again long before they are over.
const PATIENCE: u64 = 120;
/// Addresses of others that are not looked at again, and for how many seconds.
const MAX_IGNORED: usize = 64;
const PAUSE: u64 = 30;
/// Addresses that one request is remembered with.
const MAX_ADDRESSES: usize = 8;
/// Leases that one guest can have at a time.
pub(crate) const MAX_LEASES: usize = 32;

/// The learning of one port.
#[derive(Debug)]
pub(crate) struct PortLearner {
    guest: GuestKey,
    interest: Interest,
    requests: VecDeque<Request>,
    /// Addresses of others that the guest uses, and until when that is not looked at again, in seconds since the epoch.
    ignored: VecDeque<(IpAddr, u64)>,
}

/// A transaction with DHCP servers that the guest has opened and none has answered.
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

    /// Learns nothing from a guest's use of an address for a while: it is another's.
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

    /// What an observation changes of what is known, at a time in seconds since the epoch.
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

    /// An address that is learned once and for all.
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

    /// The request that a server answers, if its time is not over.
    fn close(&mut self, transaction: u32, now: u64) -> Option<Request> {
        let answered = self.requests.iter().position(|known| known.transaction == transaction)?;
        let request = self.requests.remove(answered)?;
        (now < request.opened.saturating_add(PATIENCE)).then_some(request)
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
