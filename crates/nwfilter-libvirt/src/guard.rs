//! The guard closes bridge ports whose names have a prefix until they have a binding.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use nwfilter_xml::PortDev;
use nwfilter_xtables::process;

/// The guard's own nftables table.
const TABLE: &str = "bridge nwfilter_guard";

/// The deadline of one run of nft.
const PATIENCE: Duration = Duration::from_secs(10);

/// Closes every bridge port whose name starts with a prefix, except for those that are opened.
///
/// The guard is an nftables table of its own, with a set of the open ports: a frame costs one lookup, however many ports
/// there are. It has no filters: an open port is filtered by its binding. The guard outlives the process, until
/// [`Guard::remove`].
#[derive(Debug)]
pub struct Guard {
    prefix: String,
    open: Option<BTreeSet<PortDev>>,
}

/// Why the guard was not changed. It is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// The prefix cannot begin the name of a port.
    #[error("'{0}' cannot begin the name of a port")]
    Prefix(String),
    /// nft cannot be run.
    #[error("nft, which the guard needs: {0}")]
    Run(#[from] process::Failure),
    /// nft refused.
    #[error("nft: {0}")]
    Refused(String),
}

impl Guard {
    /// A guard for the ports with this prefix. It closes nothing before [`Guard::open`] is called.
    pub fn new(prefix: &str) -> Result<Self, GuardError> {
        match prefix.parse::<PortDev>() {
            Ok(_) => Ok(Self { prefix: prefix.to_owned(), open: None }),
            Err(_) => Err(GuardError::Prefix(prefix.to_owned())),
        }
    }

    /// Opens these ports and closes all others that have the prefix, in one transaction.
    pub fn open(&mut self, ports: BTreeSet<PortDev>) -> Result<(), GuardError> {
        let ports: BTreeSet<_> = ports.into_iter().filter(|port| self.covers(port)).collect();
        if self.open.as_ref() != Some(&ports) {
            nft(&self.table(&ports))?;
            self.open = Some(ports);
        }
        Ok(())
    }

    /// Closes some of the ports that are open.
    pub fn close(&mut self, ports: &[PortDev]) -> Result<(), GuardError> {
        let Some(open) = &self.open else { return Ok(()) };
        let left = open.iter().filter(|port| !ports.contains(port)).cloned().collect();
        self.open(left)
    }

    /// Removes the guard that this or another process made.
    pub fn remove() -> Result<(), GuardError> {
        // Only an existing table can be deleted, so it is declared first.
        nft(&format!("table {TABLE}\ndelete table {TABLE}\n"))
    }

    fn covers(&self, port: &PortDev) -> bool {
        port.as_str().starts_with(&self.prefix)
    }

    fn table(&self, open: &BTreeSet<PortDev>) -> String {
        let prefix = &self.prefix;
        let mut table =
            format!("table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n  set open {{ type ifname;");
        if !open.is_empty() {
            let names: Vec<_> = open.iter().map(|port| format!("\"{port}\"")).collect();
            // Writing to a String cannot fail.
            let _ = write!(table, " elements = {{ {} }};", names.join(", "));
        }
        let chain = |name: &str, hook: &str, field: &str| {
            format!(
                "  chain {name} {{ type filter hook {hook}; policy accept; \
                 {field} \"{prefix}*\" {field} != @open drop; }}\n"
            )
        };
        table
            + " }\n"
            + &chain("from_guests", "prerouting priority -400", "iifname")
            + &chain("to_guests", "postrouting priority 400", "oifname")
            + "}\n"
    }
}

fn nft(script: &str) -> Result<(), GuardError> {
    log::trace!("nft -f -\n{script}");
    let output = process::run(PATIENCE, "nft", &["-f", "-"], Some(script), |_| ())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(GuardError::Refused(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_begin_a_port_s_name_is_a_prefix() {
        for refused in ["", "vnet*", "a b", "vnet\"", "-x", "longer-than-a-name"] {
            assert!(matches!(Guard::new(refused), Err(GuardError::Prefix(_))), "{refused}");
        }
        assert!(Guard::new("vnet").is_ok());
    }

    #[test]
    fn the_table_names_the_ports_that_are_open() {
        let guard = Guard::new("vnet").unwrap();
        let ports = ["vnet0", "vnet1"].map(|port| port.parse().unwrap()).into();
        let table = guard.table(&ports);
        assert!(table.contains("elements = { \"vnet0\", \"vnet1\" };"), "{table}");
        assert!(table.contains("iifname \"vnet*\" iifname != @open drop"), "{table}");
        assert!(!guard.table(&BTreeSet::new()).contains("elements"));
    }
}
