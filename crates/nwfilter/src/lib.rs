//! The network-filter driver that a virtualization manager links.
//!
//! [`Driver`] holds libvirt's nwfilter documents (filters and the bindings of ports to them) on disk in libvirt's
//! formats, and brings the kernel to what they ask for: for one port or a thousand, in one transaction a table.
//!
//! What a rule means is decided in [`nwfilter_rules`]; how a kernel is told, in a [`Backend`]: [`Xtables`] writes
//! iptables, ip6tables and ebtables.

mod atomic;
mod commit;
mod driver;
mod error;
mod events;
mod files;
mod group;
mod guard;
mod learn;
mod links;
mod lock;
mod metrics;
mod progress;
mod reload;
mod salvage;
mod stock;
mod stores;
mod transaction;
mod written;

pub use driver::{Config, Driver};
pub use error::{Error, with_causes};
pub use events::Event;
pub use files::{Problem, ProblemKind};
pub use guard::Keeper;
pub use learn::packets;
pub use learn::{BindingState, Family, Method, PortStatus, RemainingLease, Source};
pub use links::Attachment;
pub use metrics::Metrics;
pub use nwfilter_rules as rules;
pub use nwfilter_rules::{Applied, Backend, Difference, ForeignChange, NoHelper, Warning, Watch};
pub use nwfilter_xml as xml;
pub use nwfilter_xtables::{Dispatch, Settings, Xtables, restore_text};
pub use progress::{Phase, Progress};
pub use reload::{Drift, FailedPort, Instead, OddPorts, Reloaded};
pub use stock::{STOCK, stock_filters};
pub use transaction::{Committed, Transaction};
pub use written::{Location, Written};
