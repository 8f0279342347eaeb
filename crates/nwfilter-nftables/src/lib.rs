//! The native nftables backend: one transaction over netlink for every change, no process started.
//!
//! [`kernel`] speaks nf_tables: typed rules, sets and transactions, reading our own tables back, and notifications.
//! It knows nothing of filters or ports.

#![forbid(unsafe_code)]

pub mod kernel;
