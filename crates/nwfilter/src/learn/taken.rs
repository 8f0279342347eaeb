//! Finds whether an address belongs to the host or to another guest, so that it is not learned.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nwfilter_xml::{Binding, PortDev, Uuid};

use super::wanted::{Past, addresses};
use crate::links::Links;
use crate::stores::Stores;

/// The addresses of the host, in the network namespace of the calling thread, and of all bound ports.
pub(crate) struct Taken {
    links: Links,
    host: BTreeSet<IpAddr>,
    /// For each address, the ports whose guests have it, with their guests' UUIDs.
    ports: BTreeMap<IpAddr, Vec<(PortDev, Uuid)>>,
}

/// The owner of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Host,
    Port(PortDev),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host"),
            Self::Port(port) => write!(f, "the guest at port '{port}'"),
        }
    }
}

impl Taken {
    /// The current addresses.
    pub(crate) fn now(stores: &Stores) -> io::Result<Self> {
        let (links, host) = (Links::open()?, addresses_of_host()?);
        let mut taken = Self { links, host, ports: BTreeMap::new() };
        for binding in stores.bindings.documents() {
            for address in addresses(&stores.known, binding, Past::Counts) {
                taken.add(binding, address);
            }
        }
        Ok(taken)
    }

    /// The owner of an address, if it is not the guest of this binding. Interfaces of one guest may share an address, and so
    /// may guests on different bridges.
    pub(crate) fn by(&self, binding: &Binding, address: IpAddr) -> io::Result<Option<Holder>> {
        if self.host.contains(&address) {
            return Ok(Some(Holder::Host));
        }
        for (port, owner) in self.ports.get(&address).into_iter().flatten() {
            let is_another = *port != binding.port && *owner != binding.owner.uuid;
            if is_another && self.links.are_neighbours(port, &binding.port)? {
                return Ok(Some(Holder::Port(port.clone())));
            }
        }
        Ok(None)
    }

    /// Adds an address of the guest of this binding.
    pub(crate) fn add(&mut self, binding: &Binding, address: IpAddr) {
        let port = (binding.port.clone(), binding.owner.uuid);
        self.ports.entry(address).or_default().push(port);
    }
}

fn addresses_of_host() -> io::Result<BTreeSet<IpAddr>> {
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    Ok(getifaddrs()?.filter_map(address).collect())
}
