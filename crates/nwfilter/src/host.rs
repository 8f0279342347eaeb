//! The host of a driver: the network interfaces of its ports.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::net::if_::{if_indextoname, if_nametoindex};
use nwfilter_rules::{Batch, Warning};
use nwfilter_xml::PortDev;

use crate::links::{Attachment, Links};

/// Where a driver finds the interfaces of its ports.
#[derive(Clone)]
pub struct Host(Interfaces);

#[derive(Clone)]
enum Interfaces {
    Kernel,
    Fake(Arc<Mutex<BTreeMap<PortDev, Attachment>>>),
}

impl Host {
    /// The kernel's interfaces, in the driver's network namespace.
    pub fn kernel() -> Self {
        Self(Interfaces::Kernel)
    }

    /// A host for tests. Every port is an interface in a bridge until [`Host::set`] changes it. Clones share their state.
    pub fn fake() -> Self {
        Self(Interfaces::Fake(Arc::default()))
    }

    /// Sets what a port of a fake host is attached to. Has no effect on the kernel's host.
    pub fn set(&self, port: &PortDev, attachment: Attachment) {
        if let Interfaces::Fake(ports) = &self.0 {
            ports.lock().unwrap_or_else(PoisonError::into_inner).insert(port.clone(), attachment);
        }
    }

    /// Whether it is the kernel's.
    pub(crate) fn is_kernel(&self) -> bool {
        matches!(self.0, Interfaces::Kernel)
    }

    /// Looks up many ports.
    pub(crate) fn ports(&self) -> io::Result<Ports> {
        Ok(match &self.0 {
            Interfaces::Kernel => Ports::Kernel(Links::open()?),
            Interfaces::Fake(ports) => {
                Ports::Fake(ports.lock().unwrap_or_else(PoisonError::into_inner).clone())
            }
        })
    }

    /// Whether there is an interface of that name.
    pub(crate) fn has(&self, port: &PortDev) -> bool {
        match &self.0 {
            Interfaces::Kernel => is_interface(port),
            Interfaces::Fake(ports) => {
                let ports = ports.lock().unwrap_or_else(PoisonError::into_inner);
                ports.get(port) != Some(&Attachment::Absent)
            }
        }
    }

    /// A warning for each port that a batch filters and that is in no bridge.
    pub(crate) fn unbridged(&self, batch: &Batch) -> Vec<Warning> {
        let find = || {
            let ports = self.ports()?;
            let mut warnings = Vec::new();
            for (port, _) in batch.filtered() {
                if ports.attachment(port)? == Attachment::Unbridged {
                    warnings.push(Warning::Unbridged { port: port.clone() });
                }
            }
            Ok(warnings)
        };
        find().unwrap_or_else(|error: io::Error| {
            log::warn!("whether ports are in a bridge is not known: {error}");
            Vec::new()
        })
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_kernel() { "Host::kernel()" } else { "Host::fake()" })
    }
}

/// Whether the kernel has an interface of that name. Rules do not match an interface by an alternative name
/// (`ip link property add … altname`), though the kernel finds it by one.
fn is_interface(port: &PortDev) -> bool {
    let name = if_nametoindex(port.as_str()).and_then(if_indextoname);
    name.is_ok_and(|name| name.as_bytes() == port.as_str().as_bytes())
}

/// The interfaces of a host at one time.
pub(crate) enum Ports {
    Kernel(Links),
    Fake(BTreeMap<PortDev, Attachment>),
}

impl Ports {
    pub(crate) fn attachment(&self, port: &PortDev) -> io::Result<Attachment> {
        match self {
            Ports::Kernel(links) => links.attachment(port),
            Ports::Fake(ports) => Ok(ports.get(port).copied().unwrap_or(Attachment::Bridged)),
        }
    }
}
