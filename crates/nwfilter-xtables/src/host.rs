//! Kernel settings and modules that IP rules and conntrack helpers on bridged packets need.

use std::fs;
use std::path::Path;

use nwfilter_rules::{ApplyError, Family, Scope};

use crate::tool::run;

/// The sysctl that makes bridged packets of a family pass iptables.
pub(crate) fn bridge_switch(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "net.bridge.bridge-nf-call-iptables",
        Family::Ipv6 => "net.bridge.bridge-nf-call-ip6tables",
    }
}

/// Whether that sysctl is 1 in the network namespace of the calling thread.
pub(crate) fn is_bridge_switch_on(family: Family) -> bool {
    fs::read_to_string(path_of(bridge_switch(family))).is_ok_and(|value| value.trim() != "0")
}

fn path_of(switch: &str) -> String {
    format!("/proc/sys/{}", switch.replace('.', "/"))
}

/// Makes bridged packets of a family pass iptables. Without it, IP rules on bridge ports have no effect.
pub(crate) fn enable_bridge_filtering(family: Family, may_change: bool) -> Result<(), ApplyError> {
    let path = path_of(bridge_switch(family));
    let what = format!("{family} rules on bridge ports");
    let impossible = |why| ApplyError::Unavailable { scope: Scope::IpRules, what: what.clone(), why };
    if !Path::new(&path).exists() {
        load_module("br_netfilter");
    }
    let value = fs::read_to_string(&path).map_err(|error| {
        impossible(format!("{path}: {error}; the kernel needs br_netfilter (modprobe br_netfilter)"))
    })?;
    if value.trim() != "0" {
        return Ok(());
    }
    if !may_change {
        return Err(impossible(format!("{path} is 0, and the settings forbid to change it")));
    }
    fs::write(&path, "1")
        .map_err(|error| impossible(format!("{path} is 0 and cannot be set to 1: {error}")))?;
    log::info!("{path} was 0, set to 1: {family} rules had no effect on bridge ports");
    Ok(())
}

/// Whether the kernel has a conntrack helper. Loads its module if necessary.
pub(crate) fn has_helper(name: &str) -> bool {
    let module = format!("nf_conntrack_{name}");
    let path = format!("/sys/module/{module}");
    if !Path::new(&path).exists() {
        load_module(&module);
    }
    Path::new(&path).exists()
}

/// Loads a kernel module. Failures are not reported: the caller checks for what the module provides.
fn load_module(name: &str) {
    match run("modprobe", &["-q", name], None) {
        Ok(output) if output.status.success() => log::info!("kernel module {name} loaded"),
        Ok(output) => log::debug!("modprobe {name}: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => log::debug!("{error}"),
    }
}
