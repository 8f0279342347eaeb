//! The network-filter driver that a virtualization manager links.
//!
//! [`Driver`] holds libvirt's nwfilter documents (filters and the bindings of ports to them) on disk in libvirt's
//! formats, and brings the kernel to what they ask for: for one port or a thousand, in one transaction a table.
//!
//! What a rule means is decided in [`nwfilter_rules`]; a [`Backend`] applies it to a kernel. The crate nwfilter-xtables
//! has the one that writes iptables, ip6tables and ebtables.

mod apart;
mod atomic;
mod clock;
mod commit;
mod config;
mod conntrack;
mod counters;
mod cut;
mod driver;
mod drops;
mod error;
mod events;
mod explaining;
mod exporter;
mod files;
mod frame;
mod group;
mod host;
mod learn;
mod link_watch;
mod links;
mod lock;
mod metrics;
mod namespace;
mod openmetrics;
mod preview;
mod progress;
mod reconciler;
mod reload;
mod sets;
mod stock;
mod stores;
mod trace;
mod transaction;
mod written;

pub use clock::Clock;
pub use config::{Builder, Config, Layout};
pub use conntrack::{Ending, Flow};
pub use cut::{Cut, CutConnection, CutFailure, MAX_CONNECTIONS};
pub use driver::Driver;
pub use drops::DroppedPacket;
pub use error::{Error, with_causes};
pub use events::{Event, EventQueue, Next};
pub use explaining::ExplainedPort;
pub use exporter::serve_metrics;
pub use files::{Problem, ProblemKind, read_at_most};
pub use host::Host;
pub use learn::packets;
pub use learn::sieve::check_learning;
pub use learn::{BindingState, Family, Learning, Method, PortStatus, RemainingLease, Source};
pub use links::Attachment;
pub use metrics::{ATTACH_SECONDS, COMMIT_SECONDS, Metrics};
pub use namespace::NetworkNamespace;
pub use nwfilter_explain as explain;
pub use nwfilter_rules as rules;
pub use nwfilter_rules::{
    Applied, ApplyError, Backend, Difference, Fake, ForeignChange, KernelObject, NoHelper, Subject, Warning,
    Watch,
};
pub use nwfilter_xml as xml;
pub use openmetrics::OPENMETRICS;
pub use preview::Preview;
pub use progress::{Phase, Progress};
pub use reconciler::Reconciler;
pub use reload::{Drift, FailedPort, FailedSet, Fallback, Reloaded, UnmanagedPorts};
pub use sets::{CTRL_TAGS, tags_of};
pub use stock::{STOCK, stock_filters};
pub use trace::{BadTraceMatch, Trace, TraceEvent, TraceMatch, TracedPacket, TracedStep};
pub use transaction::{Committed, Transaction};
pub use written::{Location, Written};
