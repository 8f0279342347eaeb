//! The native nftables backend: one transaction over netlink for every change, no process started.
//!
//! [`Nftables`] gives ports their rulesets in `table bridge nwfilter`, which filters frames of all protocols where they
//! enter and leave the bridge. Ports of the same filter share its chains, a *class*; what is a port's own (MAC and IP
//! addresses, any variable) is elements of sets, `vnet0 . 52:54:00:7b:35:93`. So attaching a port beside a thousand of
//! the same filter adds a few elements, and redefining the filter replaces the chains of its class, for all its ports at
//! once.
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
//! [`kernel`] speaks nf_tables: typed rules, sets and transactions, reading our own tables back, and notifications.
//! It knows nothing of filters or ports.

#![forbid(unsafe_code)]

mod backend;
mod bridges;
mod class;
mod condition;
mod held;
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
pub use libvirts::{LibvirtsTables, remove_libvirts_tables};
pub use probe::check as check_kernel;
