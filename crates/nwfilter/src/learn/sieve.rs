//! The eBPF programs of the ports that the learner listens on, and their maps.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use nix::sys::resource::{Resource, setrlimit};
use nwfilter_xml::{MacAddr, PortDev};

use super::bpf::{Map, SocketFilter};
use super::capture::Capture;
use super::program::program;
use super::{Family, Method};

/// The most open transactions of a guest.
pub(crate) const TRANSACTIONS: usize = 64;
/// The most ports.
const MAX_PORTS: u32 = 1 << 14;
/// The most cached programs. There is one for each list of servers.
const MAX_PROGRAMS: usize = 64;

/// What a port's socket captures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interest {
    pub(crate) mac: MacAddr,
    pub(crate) wanted: Wanted,
}

/// What selects frames. Ports for which it is equal share a program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Wanted {
    pub(crate) family: Family,
    pub(crate) method: Method,
    /// The DHCP servers whose answers count. Empty for all servers.
    pub(crate) servers: Vec<IpAddr>,
}

/// A guest in the programs' layout.
#[repr(C)]
pub(crate) struct Guest {
    /// The first four bytes of its MAC address as a number; the last two follow.
    pub(crate) mac_high: u32,
    pub(crate) mac_low: u32,
    /// The transactions that it opened, each in the slot that its lower bits select; 0 for an empty slot.
    pub(crate) open: [u64; TRANSACTIONS],
}

impl Guest {
    fn new(mac: MacAddr) -> Self {
        let [a, b, c, d, e, f] = mac.0;
        let (mac_high, mac_low) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([0, 0, e, f]));
        Self { mac_high, mac_low, open: [0; TRANSACTIONS] }
    }
}

/// The kernel's part of learning.
pub(crate) struct Sieve {
    /// The guests, by the indices of their ports.
    guests: Map,
    /// The indices of ports whose guests must not serve DHCP, each with the number of their answers.
    closed: Map,
    closed_ports: BTreeMap<u32, PortDev>,
    /// Those of them that were reported.
    told: BTreeSet<u32>,
    programs: BTreeMap<Wanted, SocketFilter>,
}

/// Checks whether addresses can be learned in the network namespace of the calling thread: loads a program and its maps,
/// and frees them.
pub fn check_learning() -> io::Result<()> {
    let wanted = Wanted { family: Family::Ipv4, method: Method::Any, servers: Vec::new() };
    let mac = MacAddr([0; 6]);
    let loopback = "lo".parse().map_err(io::Error::other)?;
    Sieve::new()?.open(&loopback, &Interest { mac, wanted }).map(drop)
}

impl Sieve {
    pub(crate) fn new() -> io::Result<Self> {
        // Before Linux 5.11, maps and programs count as locked memory. If the limit cannot be raised, it may still suffice.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, u64::MAX, u64::MAX);
        Ok(Self {
            guests: Map::new(size_of::<Guest>(), MAX_PORTS)?,
            closed: Map::new(size_of::<u64>(), MAX_PORTS)?,
            closed_ports: BTreeMap::new(),
            told: BTreeSet::new(),
            programs: BTreeMap::new(),
        })
    }

    /// Starts to capture. The port must exist.
    pub(crate) fn open(&mut self, port: &PortDev, interest: &Interest) -> io::Result<Capture> {
        let index = nix::net::if_::if_nametoindex(port.as_str())?;
        let wanted = &interest.wanted;
        if !self.programs.contains_key(wanted) {
            if self.programs.len() >= MAX_PROGRAMS {
                self.programs.clear();
            }
            let program = SocketFilter::load(&program(wanted, &self.guests, &self.closed))?;
            self.programs.insert(wanted.clone(), program);
        }
        let capture = Capture::open(index, &self.programs[wanted])?;
        self.guests.insert(index, &Guest::new(interest.mac))?;
        Ok(capture)
    }

    /// Stops capturing.
    pub(crate) fn close(&self, capture: &Capture) {
        // If this fails, closing the socket still ends the capture.
        let _ = self.guests.remove(capture.index());
    }

    /// Drops DHCP answers that enter by these ports, and no longer those by other ports.
    pub(crate) fn close_to_dhcp(&mut self, ports: &[PortDev]) -> io::Result<()> {
        let index = |port: &PortDev| {
            let index = nix::net::if_::if_nametoindex(port.as_str()).ok()?;
            Some((index, port.clone()))
        };
        let ports: BTreeMap<_, _> = ports.iter().filter_map(index).collect();
        for index in ports.keys().filter(|index| !self.closed_ports.contains_key(*index)) {
            self.closed.insert(*index, &0_u64)?;
        }
        for index in self.closed_ports.keys().filter(|index| !ports.contains_key(*index)) {
            self.closed.remove(*index)?;
            self.told.remove(index);
        }
        self.closed_ports = ports;
        Ok(())
    }

    /// The ports whose guests answered DHCP requests and must not, each reported once.
    pub(crate) fn disbelieved(&mut self) -> Vec<PortDev> {
        let answered =
            |index: &u32| !self.told.contains(index) && self.closed.count(*index).is_ok_and(|n| n > 0);
        let new: Vec<_> = self.closed_ports.iter().filter(|(index, _)| answered(index)).collect();
        let (indices, ports): (Vec<u32>, Vec<PortDev>) =
            new.into_iter().map(|(index, port)| (*index, port.clone())).unzip();
        self.told.extend(indices);
        ports
    }
}
