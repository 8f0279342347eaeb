//! The native nftables backend: one transaction over netlink for every change, no process started.
//!
//! [`Nftables`] writes the rulesets of ports to `table bridge nwfilter`, which filters frames of all protocols when they enter
//! and leave the bridge. Ports of the same filter share chains, a *class*. A port's own values (MAC and IP addresses, any
//! variable) are elements of sets, such as `vnet0 . 52:54:00:7b:35:93`. So attaching a port beside a thousand of the same filter
//! adds a few elements, and redefining the filter replaces the chains of its class for all ports at once. `table inet nwfilter`
//! assigns conntrack helpers to connections that the host itself opens to guests.
//!
//! ```no_run
//! use nwfilter_nftables::Nftables;
//! use nwfilter_rules::{Backend, Batch, Ruleset};
//!
//! let backend = Nftables::new();
//! let mut batch = Batch::default();
//! batch.filter("vnet0".parse()?, Ruleset::drop_all().into());
//! backend.apply(&batch)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`kernel`] is the interface to nf_tables: typed rules, sets and transactions, reading back our own tables, and
//! notifications. It knows nothing of filters or ports.

#![forbid(unsafe_code)]

mod backend;
mod bridges;
mod choice;
mod class;
mod condition;
mod held;
mod host;
pub mod kernel;
mod layout;
mod libvirts;
mod model;
mod owner;
mod plan;
mod probe;
mod relay;
mod sets;

pub use backend::Nftables;
pub use choice::suits;
pub use libvirts::{LibvirtsTables, remove_libvirts_tables};
pub use probe::check as check_kernel;
