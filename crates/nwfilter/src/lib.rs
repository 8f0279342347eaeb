//! The network-filter driver that a virtualization manager links.
//!
//! [`Driver`] holds libvirt's nwfilter documents (filters and the bindings of ports to them) on disk in libvirt's
//! formats, and brings the kernel to what they ask for: for one port or a thousand, in one transaction a table.
//!
//! What a rule means is decided in [`nwfilter_rules`]; how a kernel is told, in a [`Backend`]: [`Xtables`] writes
//! iptables, ip6tables and ebtables.

mod driver;
mod error;
mod files;
mod learn;
mod stock;

pub use driver::{Config, Driver};
pub use error::Error;
pub use learn::packets;
pub use learn::{BindingState, Family, Method, PortStatus, RemainingLease, Source};
pub use nwfilter_rules as rules;
pub use nwfilter_rules::{Applied, Backend, Difference};
pub use nwfilter_xml as xml;
pub use nwfilter_xtables::{Dispatch, Settings, Xtables, restore_text};
pub use stock::{STOCK, stock_filters};
