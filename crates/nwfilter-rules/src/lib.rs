//! The semantics of network filters: turns a filter tree and a binding into a [`Ruleset`].
//!
//! This crate knows every quirk of libvirt's language (include scopes, variable iteration, priorities, the three ways to
//! lower an IP rule, implicit connection state) and nothing about kernel tables. A [`Ruleset`] is typed and neutral: it is
//! what one port enforces. A [`Backend`] applies it to a kernel. This crate does no I/O.
//!
//! ```
//! use std::collections::BTreeMap;
//! use nwfilter_rules::{Ruleset, instantiate};
//!
//! let filter = nwfilter_xml::read_filter("f.xml", "<filter name='f'>
//!   <rule action='accept' direction='in'><tcp dstportstart='22'/></rule>
//!   <rule action='drop' direction='inout'><all/></rule>
//! </filter>").into_result()?;
//! let binding = nwfilter_xml::read_binding("b.xml", "<filterbinding>
//!   <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
//!   <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/>
//! </filterbinding>").into_result()?;
//! let filters = BTreeMap::from([(filter.name.clone(), filter)]);
//! let ruleset: Ruleset = instantiate(&filters, &binding)?;
//! let ipv4 = ruleset.ipv4.expect("the filter has IPv4 rules");
//! assert_eq!(ipv4.to_guest.len(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod backend;
mod error;
mod expand;
mod fake;
mod held;
mod helper;
mod log;
mod lower_ethernet;
mod lower_ip;
mod packet;
mod provisional;
mod ruleset;
mod sets;
mod tree;
mod variables;

pub use backend::{
    Applied, ApplyError, Backend, Batch, Desired, Difference, DifferenceKind, ForeignChange, Installed,
    KernelObject, NoAnswer, NoHelper, Planned, Process, Refused, Scope, Subject, Unsupported, Warning, Watch,
};
pub use error::RulesError;
pub use expand::instantiate;
pub use fake::Fake;
pub use held::{Count, Counts, Held, HeldRule, Layer, RuleCount, RuleId};
pub use helper::{CTRL_CT_HELPERS, Helper, HelperRule, HelperSide, KNOWN_HELPERS, KnownHelper, Transport};
pub use log::{CTRL_LOG_DROPS, LOG_RATE, LogGroup, LogPrefix, LogSide};
pub use packet::{CtDirection, EthernetTest, IpTest, MaskedMac, Network, PortRange, StpRange};
pub use ruleset::{
    AnyRule, Ethernet, EthernetRule, EthernetSide, Family, IpPart, IpRule, Jump, Match, Origin, RootEntry,
    Rule, Ruleset, SubChain, Verdict,
};
pub use sets::{DesiredSet, SetChange, SetContent, set_differences, sets_of};
pub use tree::{Filters, MAX_EXPANSION, cycle, includes_itself, reachable, too_large};
