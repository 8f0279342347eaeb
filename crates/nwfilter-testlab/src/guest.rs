//! A guest: a namespace with an IP stack of its own behind a port of the bridge.

use std::ops::Deref;

use anyhow::Result;

use crate::netns::Netns;
use crate::{Host, Mac};

/// The interface inside of every guest.
const INTERFACE: &str = "eth0";

/// A guest with an IP stack, whose interface `eth0` is connected to a port of the bridge; that is
/// a veth pair. Port and guest disappear when dropped.
///
/// ```
/// # use nwfilter_testlab::{Host, Need, skip_unless};
/// # fn main() -> anyhow::Result<()> {
/// # skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ping"));
/// let host = Host::builder().bridge_addr("10.0.0.254/24").build()?;
/// let mac = "52:54:00:00:00:0a".parse()?;
/// let guest = host.guest("vnet0", mac).addr("10.0.0.1/24").gateway("10.0.0.254").start()?;
/// assert!(guest.ping("10.0.0.254")?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Guest {
    netns: Netns,
    host: Netns,
    port: String,
    mac: Mac,
}

/// How a [`Guest`] is to be made.
#[derive(Clone, Debug)]
pub struct GuestBuilder<'a> {
    host: &'a Host,
    port: String,
    mac: Mac,
    addrs: Vec<String>,
    gateways: Vec<String>,
}

impl<'a> GuestBuilder<'a> {
    pub(crate) fn new(host: &'a Host, port: &str, mac: Mac) -> Self {
        Self { host, port: port.into(), mac, addrs: Vec::new(), gateways: Vec::new() }
    }

    /// Gives the guest an IPv4 or IPv6 address such as `10.0.0.1/24`; more than one may be given.
    /// Without an IPv6 address the guest does not speak IPv6 at all.
    pub fn addr(mut self, addr: &str) -> Self {
        self.addrs.push(addr.into());
        self
    }

    /// Sets the gateway of the guest's default route, of IPv4 or IPv6.
    pub fn gateway(mut self, gateway: &str) -> Self {
        self.gateways.push(gateway.into());
        self
    }

    /// Makes the guest and waits until the bridge forwards its frames.
    pub fn start(self) -> Result<Guest> {
        let netns = Netns::new(&self.port)?;
        let speaks_ipv6 = self.addrs.iter().any(|addr| addr.contains(':'));
        for (key, value) in [
            ("disable_ipv6", if speaks_ipv6 { "0" } else { "1" }),
            ("accept_ra", "0"),
            ("accept_dad", "0"),
            ("router_solicitations", "0"),
        ] {
            netns.sysctl(&format!("net.ipv6.conf.default.{key}"), value)?;
        }

        let (port, mac, name) = (&self.port, self.mac, netns.name());
        self.host
            .ip(&[format!("link add {port} type veth peer name {INTERFACE} address {mac} netns {name}")])?;
        let host = self.host.netns().clone();
        let guest = Guest { netns, host, port: self.port, mac };

        let mut commands = vec![format!("link set {INTERFACE} up")];
        commands.extend(self.addrs.iter().map(|addr| {
            let nodad = if addr.contains(':') { "nodad" } else { "" };
            format!("addr add {addr} dev {INTERFACE} {nodad}")
        }));
        commands.extend(self.gateways.iter().map(|via| format!("route add default via {via}")));
        guest.ip(&commands)?;
        self.host.join_bridge(&guest.port)?;
        Ok(guest)
    }
}

impl Guest {
    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The name of the port at the bridge.
    pub fn port(&self) -> &str {
        &self.port
    }

    /// The MAC address that the guest was made with.
    pub fn mac(&self) -> Mac {
        self.mac
    }
}

impl Deref for Guest {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Removing the namespace would do as well, but at a time of the kernel's choice.
        let _ = self.host.ip(&[format!("link del {}", self.port)]);
    }
}
