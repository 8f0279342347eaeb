//! Whether this backend or another one is the right one for a host.

use nwfilter_rules::Backend;

use crate::probe;

/// Whether the native backend is the right one beside another one of which nobody asked for either, and why: the one that
/// filters ports already, else the native one if the kernel has what it needs. `needs_ip_sets` says whether a stored filter
/// names an ipset, which only the other one can match on.
pub fn suits(
    native: &dyn Backend,
    other: &dyn Backend,
    needs_ip_sets: impl FnOnce() -> bool,
) -> (bool, String) {
    if native.filters_ports() {
        return (true, "it filters ports here already".into());
    }
    if other.filters_ports() {
        return (false, "it filters ports here already".into());
    }
    if needs_ip_sets() {
        return (false, "a stored filter names an ipset of the host".into());
    }
    match probe::check() {
        Ok(()) => (true, "the kernel tracks connections in bridges".into()),
        Err(error) => (false, error.to_string()),
    }
}
