//! A host: a network namespace with a bridge whose ports are taps and guests.

use std::ops::Deref;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::netns::{Netns, sweep};
use crate::{GuestBuilder, Mac, Saved, Tap};

/// The name of a host's bridge.
pub const BRIDGE: &str = "br0";

/// The MAC address of a host's bridge.
pub const BRIDGE_MAC: Mac = Mac::new([0x52, 0x54, 0x00, 0xff, 0xff, 0xfe]);

/// What br_netfilter brings.
const BRIDGE_NF: &str = "/proc/sys/net/bridge";

/// A fresh network namespace with a bridge `br0` that forwards at once and sends nothing by itself.
///
/// ```
/// # use nwfilter_testlab::{Host, Need, skip_unless};
/// # fn main() -> anyhow::Result<()> {
/// # skip_unless!(Need::Root, Need::Tool("ip"));
/// let host = Host::builder().bridge_nf(false).bridge_addr("10.0.0.254/24").build()?;
/// let key = "/proc/sys/net/bridge/bridge-nf-call-iptables";
/// assert_eq!(host.enter(|| std::fs::read_to_string(key))?, "0\n");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Host {
    netns: Netns,
}

/// How a [`Host`] is to be made.
#[derive(Clone, Debug)]
pub struct HostBuilder {
    /// `None` leaves the module br_netfilter alone.
    bridge_nf: Option<bool>,
    bridge_addrs: Vec<String>,
}

impl HostBuilder {
    /// Whether bridged traffic passes iptables and ip6tables (`bridge-nf-call-*`); on by default.
    pub fn bridge_nf(mut self, on: bool) -> Self {
        self.bridge_nf = Some(on);
        self
    }

    /// Does not load br_netfilter, and switches it off if it is there. Where it is a module, and another host of the test has
    /// it loaded later, bridged traffic passes iptables here too from then on.
    pub fn without_bridge_nf(mut self) -> Self {
        self.bridge_nf = Path::new(BRIDGE_NF).exists().then_some(false);
        self
    }

    /// Gives the bridge an address such as `10.0.0.254/24`; more than one may be given.
    pub fn bridge_addr(mut self, addr: &str) -> Self {
        self.bridge_addrs.push(addr.into());
        self
    }

    /// Makes the host, after a [`sweep`].
    pub fn build(self) -> Result<Host> {
        sweep();
        let netns = Netns::new("host")?;
        netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        netns.sysctl("net.ipv6.conf.default.accept_ra", "0")?;
        // Whether the host answers must not depend on how often it was asked before.
        netns.sysctl("net.ipv4.icmp_ratemask", "0")?;
        netns.sysctl("net.ipv6.icmp.ratelimit", "0")?;
        netns.ip(&[
            format!("link add {BRIDGE} address {BRIDGE_MAC} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
            format!("link set {BRIDGE} up"),
        ])?;
        let host = Host { netns };
        if let Some(on) = self.bridge_nf {
            host.set_bridge_nf(on)?;
        }
        for addr in &self.bridge_addrs {
            host.add_bridge_addr(addr)?;
        }
        Ok(host)
    }
}

impl Host {
    /// A host with bridge-nf on and no address on the bridge.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// A host with other options.
    pub fn builder() -> HostBuilder {
        HostBuilder { bridge_nf: Some(true), bridge_addrs: Vec::new() }
    }

    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Sets whether bridged traffic passes iptables and ip6tables.
    pub fn set_bridge_nf(&self, on: bool) -> Result<()> {
        if !Path::new(BRIDGE_NF).exists() {
            let _ = Command::new("modprobe").arg("br_netfilter").stderr(Stdio::null()).status();
        }
        let value = if on { "1" } else { "0" };
        self.sysctl("net.bridge.bridge-nf-call-iptables", value)?;
        self.sysctl("net.bridge.bridge-nf-call-ip6tables", value)
    }

    /// Gives the bridge an IPv4 or IPv6 address such as `10.0.0.254/24`, so that guests can talk
    /// to the host itself at [`BRIDGE_MAC`].
    pub fn add_bridge_addr(&self, addr: &str) -> Result<()> {
        if !addr.contains(':') {
            return self.ip(&[format!("addr add {addr} dev {BRIDGE}")]);
        }
        self.sysctl(&format!("net.ipv6.conf.{BRIDGE}.disable_ipv6"), "0")?;
        self.ip(&[format!("addr add {addr} dev {BRIDGE} nodad")])
    }

    /// Makes a tap that is a port of the bridge.
    pub fn tap(&self, name: &str) -> Result<Tap> {
        Tap::new(self, name)
    }

    /// Begins a guest behind a port of the bridge.
    pub fn guest(&self, port: &str, mac: Mac) -> GuestBuilder<'_> {
        GuestBuilder::new(self, port, mac)
    }

    /// The filter tables of the namespace as they are now.
    pub fn saved(&self) -> Result<Saved> {
        Ok(Saved::parse(
            &self.run(&["ebtables-save"])?,
            &self.run(&["iptables-save"])?,
            &self.run(&["ip6tables-save"])?,
        ))
    }

    /// Makes an interface a port of the bridge and waits until the bridge forwards its frames.
    pub(crate) fn join_bridge(&self, port: &str) -> Result<()> {
        self.ip(&[format!("link set {port} master {BRIDGE} up")])?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.run(&["ip", "-d", "-o", "link", "show", port])?.contains("state forwarding") {
            ensure!(Instant::now() < deadline, "the port {port} does not begin to forward");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Deref for Host {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}
