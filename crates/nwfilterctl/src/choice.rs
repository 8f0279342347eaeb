//! Chooses the backend, and moves ports from one backend to the other.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nwfilter::Backend;
use nwfilter_nftables::{Nftables, suits};
use nwfilter_xtables::Xtables;

/// The backends, by the names that users give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// The one that filters ports here already; else nftables where the kernel has what it needs, else xtables
    Auto,
    /// One nftables table, over netlink; rules on connections need nf_conntrack_bridge
    Nftables,
    /// iptables, ip6tables and ebtables, with the chains of libvirt's driver
    Xtables,
}

impl BackendName {
    /// The name of the option's value.
    pub fn as_str(self) -> &'static str {
        match self {
            BackendName::Auto => "auto",
            BackendName::Nftables => "nftables",
            BackendName::Xtables => "xtables",
        }
    }
}

/// A chosen backend, and the one that must not filter ports beside it.
pub(crate) struct Choice {
    pub(crate) backend: Box<dyn Backend>,
    other: Box<dyn Backend>,
}

/// Chooses between the native backend and xtables. `needs_ip_sets` says whether a stored filter names an ipset of the host,
/// which only xtables can match.
pub(crate) fn choose(
    name: BackendName,
    nftables: Nftables,
    xtables: Xtables,
    needs_ip_sets: impl FnOnce() -> bool,
) -> Choice {
    let native = match name {
        BackendName::Xtables => false,
        // Filters without rules on connections work on every kernel; the others are refused with the reason.
        BackendName::Nftables => true,
        BackendName::Auto => {
            let (native, why) = suits(&nftables, &xtables, needs_ip_sets);
            log::info!("backend {}: {why}", if native { "nftables" } else { "xtables" });
            native
        }
    };
    let (nftables, xtables): (Box<dyn Backend>, Box<dyn Backend>) = (Box::new(nftables), Box::new(xtables));
    let (backend, other) = if native { (nftables, xtables) } else { (xtables, nftables) };
    Choice { backend, other }
}

impl Choice {
    /// Refuses to filter beside the other backend: a port would have to pass the rules of both.
    pub(crate) fn refuse_a_second_backend(&self) -> Result<()> {
        // Asking iptables takes long. The native backend's table can be asked quickly.
        if self.backend.name() != "xtables" && self.backend.filters_ports() {
            return Ok(());
        }
        if self.other.filters_ports() {
            let (here, wanted) = (self.other.name(), self.backend.name());
            bail!(
                "ports of this host are filtered by {here}; use --backend {here}, or move them with \
                 'nwfilterctl reload --backend {wanted}'"
            );
        }
        Ok(())
    }

    /// The chosen backend, and the other one.
    pub(crate) fn into_backends(self) -> [Box<dyn Backend>; 2] {
        [self.backend, self.other]
    }

    /// The chosen backend, and the former one, whose rules are removed once the chosen one filters every port.
    pub(crate) fn into_parts(self) -> (Box<dyn Backend>, Former) {
        (self.backend, Former(self.other))
    }
}

/// A backend that is being replaced by another one.
pub struct Former(Box<dyn Backend>);

impl Former {
    /// Removes its rules from the kernel. Returns its name and the number of ports that it filtered, if there were any.
    pub fn clear(&self) -> Result<Option<(&'static str, usize)>> {
        if !self.0.filters_ports() {
            return Ok(None);
        }
        let cleared = self.0.clear().with_context(|| format!("the rules of {} stay", self.0.name()))?;
        Ok(Some((self.0.name(), cleared.changed.len())))
    }
}
