//! What libvirt's own nftables driver (from libvirt 12 on) has in the kernel: which ports it filters, and removing it.
//!
//! ```text
//! table bridge libvirt_nwfilter_ethernet { … }
//! table bridge libvirt_nwfilter_inet {
//!   map vmap-iif, vmap-oif     interface → chain of the port
//!   chain prerouting, postrouting
//!   chain vnet0-in, vnet0-out  two for each port, here without others
//! }
//! ```

use std::collections::BTreeSet;

use nix::net::if_::if_nametoindex;
use nwfilter_rules::{ApplyError, Scope};
use nwfilter_xml::PortDev;

use crate::kernel::{CommitError, Connection, Operation, TableId, Transaction};
use crate::layout;

const ETHERNET: &str = "libvirt_nwfilter_ethernet";
const INET: &str = "libvirt_nwfilter_inet";
const HOOKS: [&str; 2] = ["prerouting", "postrouting"];
/// How often it is tried while others change rules.
const ATTEMPTS: usize = 100;

/// What became of the tables of libvirt's nftables driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LibvirtsTables {
    /// There are none.
    None,
    /// They are removed, with the rules of these ports.
    Removed(BTreeSet<PortDev>),
    /// They stay, because these ports are filtered by nothing else.
    Left(BTreeSet<PortDev>),
}

/// Removes the tables of libvirt's own nftables driver, in the network namespace of the calling thread, if every port that they
/// filter is filtered elsewhere, as `is_filtered` says, or has no interface any more.
///
/// Its rules must be in force before: until the tables are gone, a frame passes only what both let pass.
pub fn remove_libvirts_tables(is_filtered: impl Fn(&PortDev) -> bool) -> Result<LibvirtsTables, ApplyError> {
    let tables = [ETHERNET, INET].map(|name| TableId::bridge(layout::fixed(name)));
    let failed = |why: String| ApplyError::Unavailable {
        scope: Scope::Everything,
        what: "the tables of libvirt's nftables driver".into(),
        why,
    };
    let needs_them = |port: &&PortDev| !is_filtered(port) && if_nametoindex(port.as_str()).is_ok();
    // Without nf_tables there are no such tables.
    let Ok(mut connection) = Connection::open() else { return Ok(LibvirtsTables::None) };
    for _ in 0..ATTEMPTS {
        let read = |error: crate::kernel::Error| failed(error.to_string());
        let generation = connection.generation().map_err(read)?;
        let mut chains = Vec::new();
        for table in &tables {
            chains.push((table, connection.chain_names(table).map_err(read)?));
        }
        chains.retain(|(_, chains)| !chains.is_empty());
        if chains.is_empty() {
            return Ok(LibvirtsTables::None);
        }
        let ports = ports(chains.iter().flat_map(|(table, names)| {
            names.iter().filter(|_| table.name.as_str() == INET).map(String::as_str)
        }));
        let left: BTreeSet<_> = ports.iter().filter(needs_them).cloned().collect();
        if !left.is_empty() {
            return Ok(LibvirtsTables::Left(left));
        }
        // A frame that is among the rules when its sets go would not find its addresses.
        let (mut flush, mut delete) = (Transaction::new(), Transaction::new());
        for (table, names) in &chains {
            let hooks = HOOKS.iter().filter(|hook| names.iter().any(|name| name == *hook));
            hooks.for_each(|hook| {
                let chain = layout::fixed(hook);
                flush.push(Operation::FlushChain { table: (*table).clone(), chain }, ());
            });
            delete.push(Operation::DeleteTable { table: (*table).clone() }, ());
        }
        let removed = connection
            .commit(&flush, Some(generation))
            .and_then(|()| connection.commit(&delete, Some(generation.wrapping_add(1))));
        match removed {
            Ok(()) => return Ok(LibvirtsTables::Removed(ports)),
            Err(CommitError::Interrupted) => {}
            Err(error) => return Err(failed(error.to_string())),
        }
    }
    Err(failed("others changed rules all the time".into()))
}

/// The ports that have both of the chains of a port.
fn ports<'a>(chains: impl Iterator<Item = &'a str>) -> BTreeSet<PortDev> {
    let chains: BTreeSet<&str> = chains.collect();
    let of = |chain: &&str| {
        let port = chain.strip_suffix("-in")?;
        chains.contains(format!("{port}-out").as_str()).then(|| port.parse().ok())?
    };
    chains.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ports_are_those_that_have_two_chains() {
        let chains = ["prerouting", "postrouting", "vnet0-in", "vnet0-out", "a-b-in", "a-b-out", "half-in"];
        let found: Vec<_> = ports(chains.into_iter()).into_iter().map(|port| port.to_string()).collect();
        assert_eq!(found, ["a-b", "vnet0"]);
    }
}
