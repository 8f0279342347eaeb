//! The interface between the driver and a kernel's tables.
//!
//! A [`Batch`] is the desired state of ports; a [`Backend`] plans or applies it as a whole. Results are typed: a
//! [`Difference`] names its [`Subject`], its [`KernelObject`] and the filter's rule, a refusal names the port and the rule,
//! and a foreign change names the process that made it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_xml::{PortDev, SetName};
use serde::{Serialize, Serializer};

use crate::held::Held;
use crate::helper::Helper;
use crate::ruleset::{Origin, Ruleset};
use crate::sets::DesiredSet;

/// Applies rulesets to a kernel, in the network namespace of the calling thread.
pub trait Backend: Send + Sync {
    /// The name by which users choose it: `xtables`.
    fn name(&self) -> &'static str;

    /// Whether this backend can express a ruleset. Changes nothing.
    fn check(&self, ruleset: &Ruleset) -> Result<(), Unsupported>;

    /// What [`Backend::apply`] would change. Changes nothing.
    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError>;

    /// Applies the desired state of every port of the batch, or of none. Writes only what differs.
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError>;

    /// The ports for which the kernel holds rules of this backend.
    fn installed(&self) -> Result<Installed, ApplyError>;

    /// Whether this backend filters any port. One that cannot be asked filters none.
    fn filters_ports(&self) -> bool {
        self.installed().is_ok_and(|installed| !installed.ports.is_empty())
    }

    /// The rules that the kernel holds for the filtered ports of the batch, each with the filter's rule that it comes
    /// from and its counter. Changes nothing.
    ///
    /// Chains that differ from what the batch asks for are left out, and their ports are in [`Held::differing`].
    fn rules(&self, _: &Batch) -> Result<Held, ApplyError> {
        Err(ApplyError::Unavailable {
            scope: Scope::Everything,
            what: format!("the counts of backend {}", self.name()),
            why: "it does not show the rules of the kernel".to_owned(),
        })
    }

    /// Starts to watch for changes by others. `None` if this backend cannot watch for changes.
    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        Ok(None)
    }

    /// In which conntrack zone the bridged connections of these ports are; ports that are in no bridge may be left out.
    /// Connections with the host itself are in zone 0.
    fn connection_zones(&self, ports: &BTreeSet<PortDev>) -> Result<BTreeMap<PortDev, u16>, ApplyError> {
        Ok(ports.iter().map(|port| (port.clone(), 0)).collect())
    }

    /// Removes all rules of this backend from the kernel: those of ports, and those that lead to them.
    fn clear(&self) -> Result<Applied, ApplyError>;
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn check(&self, ruleset: &Ruleset) -> Result<(), Unsupported> {
        (**self).check(ruleset)
    }

    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError> {
        (**self).plan(batch)
    }

    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        (**self).apply(batch)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        (**self).installed()
    }

    fn rules(&self, batch: &Batch) -> Result<Held, ApplyError> {
        (**self).rules(batch)
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        (**self).watch()
    }

    fn connection_zones(&self, ports: &BTreeSet<PortDev>) -> Result<BTreeMap<PortDev, u16>, ApplyError> {
        (**self).connection_zones(ports)
    }

    fn clear(&self) -> Result<Applied, ApplyError> {
        (**self).clear()
    }
}

/// Watches for changes by others to rules of ports, and to rules that lead to them.
///
/// The file descriptor becomes readable when [`Watch::changes`] may have something to report.
pub trait Watch: AsFd + Send {
    /// What others changed since the last call. Does not block. Does not report changes that this process made through the
    /// backend. A change need not affect the desired state: [`Backend::plan`] tells whether it does.
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError>;

    /// How often to call [`Watch::changes`] without an event, for changes that the kernel does not notify.
    fn interval(&self) -> Option<Duration>;
}

/// A change that others made in the kernel, for logs and messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignChange {
    /// The process that made it, if the kernel tells.
    pub by: Option<Process>,
    /// The changed objects, sorted; the first ones if there are many.
    pub objects: Vec<KernelObject>,
    /// Whether more changed than `objects` names.
    pub more: bool,
}

impl ForeignChange {
    /// A change of one object by an unknown process.
    pub fn at(object: KernelObject) -> Self {
        Self { objects: vec![object], ..Self::default() }
    }

    /// Unknown changes: notifications were lost.
    pub fn unknown() -> Self {
        Self { more: true, ..Self::default() }
    }
}

impl fmt::Display for ForeignChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            Some(process) => write!(f, "{process}")?,
            None => f.write_str("somebody")?,
        }
        f.write_str(" changed")?;
        for (index, object) in self.objects.iter().enumerate() {
            write!(f, "{}{object}", if index == 0 { " " } else { ", " })?;
        }
        match (self.more, self.objects.is_empty()) {
            (true, true) => f.write_str(" more than could be followed"),
            (true, false) => f.write_str(", …"),
            (false, _) => Ok(()),
        }
    }
}

/// A process of the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process {
    /// The program's name (`comm`), at most 15 bytes. May be empty.
    pub name: String,
    /// Its process id.
    pub id: u32,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() { "a program without a name" } else { &self.name };
        write!(f, "{name} (process {})", self.id)
    }
}

/// The desired state of ports and sets.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Each port and its desired state. Other ports stay as they are.
    pub ports: BTreeMap<PortDev, Desired>,
    /// Each set and its desired content. Other sets stay as they are. A set is there before rules that ask it, and goes
    /// after them.
    pub sets: BTreeMap<SetName, DesiredSet>,
    /// Whether to fill [`Applied::differences`].
    pub report_differences: bool,
}

impl Batch {
    /// Sets the ruleset of a port.
    pub fn filter(&mut self, port: PortDev, ruleset: Arc<Ruleset>) {
        self.ports.insert(port, Desired::Filtered(ruleset));
    }

    /// Removes all rules of a port.
    pub fn remove(&mut self, port: PortDev) {
        self.ports.insert(port, Desired::Gone);
    }

    /// Whether it has neither ports nor sets.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.sets.is_empty()
    }

    /// The ports that get a ruleset, with it.
    pub fn filtered(&self) -> impl Iterator<Item = (&PortDev, &Arc<Ruleset>)> {
        self.ports.iter().filter_map(|(port, desired)| match desired {
            Desired::Filtered(ruleset) => Some((port, ruleset)),
            Desired::Gone => None,
        })
    }
}

/// The desired state of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Desired {
    /// This ruleset.
    Filtered(Arc<Ruleset>),
    /// No rule at all.
    Gone,
}

/// What a batch would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// The rules that would be written and removed, sorted.
    pub differences: Vec<Difference>,
    /// What the host does not support although the batch can be applied, sorted.
    pub warnings: Vec<Warning>,
}

/// What a batch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The ports whose rules were written.
    pub changed: BTreeSet<PortDev>,
    /// The sets whose entries were written.
    pub changed_sets: BTreeSet<SetName>,
    /// The number of committed transactions.
    pub commits: usize,
    /// What the host does not support although the batch was applied, sorted.
    pub warnings: Vec<Warning>,
    /// The rules that were written and removed, sorted; empty unless [`Batch::report_differences`] is set.
    pub differences: Vec<Difference>,
}

/// A part of a port's filter that this host does not support. The rest of the filter is in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Warning {
    /// Connections get no conntrack helper, so RELATED packets of theirs do not pass.
    NoHelper {
        /// The port of the bridge.
        port: PortDev,
        /// The helper.
        helper: Helper,
        /// The port that the connections go to.
        destination: u16,
        /// Why.
        why: NoHelper,
    },
    /// What the filter rejects on the way to the guest is dropped without an answer.
    NoAnswer {
        /// The port of the bridge.
        port: PortDev,
        /// Why.
        why: NoAnswer,
    },
    /// The port is in no bridge, so its rules see none of its packets.
    Unbridged {
        /// The port.
        port: PortDev,
    },
}

/// Why nobody is told of packets that are rejected on the way to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum NoAnswer {
    /// This backend finds the guest by its MAC address, which is not known.
    MacUnknown,
    /// The guest of another port of the bridge has the same MAC address.
    MacShared,
    /// A rule before limits the number of connections, which can be counted once only.
    Connlimit,
}

/// Why connections get no conntrack helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum NoHelper {
    /// This backend selects connections to a guest by its IP address, which is not known.
    AddressUnknown,
    /// The kernel has none of that name.
    Missing,
}

impl Warning {
    /// The port that it is about.
    pub fn port(&self) -> &PortDev {
        match self {
            Self::NoHelper { port, .. } | Self::NoAnswer { port, .. } | Self::Unbridged { port } => port,
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHelper { port, helper, destination, why } => {
                write!(
                    f,
                    "{port}: connections to port {destination} get no conntrack helper '{helper}', so what is RELATED \
                     to them will not pass: "
                )?;
                match why {
                    NoHelper::AddressUnknown => {
                        f.write_str("the guest's IP address is not known (parameter IP)")
                    }
                    NoHelper::Missing => write!(f, "this kernel has no nf_conntrack_{helper}"),
                }
            }
            Self::NoAnswer { port, why } => {
                let why = match why {
                    NoAnswer::MacUnknown => "the guest's MAC address is not known",
                    NoAnswer::MacShared => "another port of the bridge has the same MAC address",
                    NoAnswer::Connlimit => "rules before it limit connections (connlimit-above)",
                };
                write!(
                    f,
                    "{port}: what is rejected on the way to the guest is dropped without an answer: {why}"
                )
            }
            Self::Unbridged { port } => write!(
                f,
                "{port}: is in no bridge, so its rules see none of its packets until it is put into one"
            ),
        }
    }
}

/// What the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// The ports that have rules.
    pub ports: BTreeSet<PortDev>,
    /// Those of them that are partly or fully unfiltered, because no rule leads to some of their chains.
    pub unreached: BTreeSet<PortDev>,
    /// The sets that there are.
    pub sets: BTreeSet<SetName>,
}

/// What a difference is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// What all ports share: base chains, the jumps to them, settings of the kernel.
    Host,
    /// One port.
    Port(PortDev),
    /// A set.
    Set(SetName),
}

impl Subject {
    /// The port, unless it is about all of them.
    pub fn port(&self) -> Option<&PortDev> {
        match self {
            Subject::Host | Subject::Set(_) => None,
            Subject::Port(port) => Some(port),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Host => f.write_str("host"),
            Subject::Port(port) => write!(f, "{port}"),
            Subject::Set(set) => write!(f, "set {set}"),
        }
    }
}

/// An object of the kernel that contains rules, or that rules depend on. Tables are named as their tools name them:
/// `iptables`, `iptables raw`, `ebtables`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
#[allow(missing_docs)] // The fields are what the variants are named after.
pub enum KernelObject {
    /// A table as a whole.
    Table { table: String },
    /// A chain.
    Chain { table: String, chain: String },
    /// A set.
    Set { table: String, set: String },
    /// A setting of the kernel, as sysctl(8) names it.
    Setting { setting: String },
}

impl fmt::Display for KernelObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelObject::Table { table } => f.write_str(table),
            KernelObject::Chain { table, chain: name } | KernelObject::Set { table, set: name } => {
                write!(f, "{table}: {name}")
            }
            KernelObject::Setting { setting } => write!(f, "sysctl: {setting}"),
        }
    }
}

/// A rule that differs between the kernel and what is desired.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The port, or the host.
    #[serde(serialize_with = "port_or_null", rename = "port")]
    pub subject: Subject,
    /// The object that has or lacks the rule.
    #[serde(flatten)]
    pub object: KernelObject,
    /// How it differs.
    pub kind: DifferenceKind,
    /// The rule, as the table's tool prints it.
    pub rule: String,
    /// The filter's rule it comes from, if any.
    pub origin: Option<Origin>,
}

/// Differences of the host and of sets have no port.
fn port_or_null<S: Serializer>(subject: &Subject, serializer: S) -> Result<S::Ok, S::Error> {
    subject.port().map(PortDev::as_str).serialize(serializer)
}

/// How a rule differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceKind {
    /// It is desired and not in the kernel.
    Missing,
    /// It is in the kernel and not desired.
    Foreign,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.kind {
            DifferenceKind::Missing => '-',
            DifferenceKind::Foreign => '+',
        };
        write!(f, "{sign} {} {} {}", self.subject, self.object, self.rule)?;
        match &self.origin {
            Some(origin) => write!(f, "  ({origin})"),
            None => Ok(()),
        }
    }
}

/// A part of a ruleset that a backend cannot express.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct Unsupported {
    /// The filter's rule.
    pub origin: Origin,
    /// What it asks for, and what to do.
    pub what: String,
}

/// Why a batch was not applied. The kernel is unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The backend cannot express a port's ruleset.
    #[error("the filter of port '{port}' cannot be applied by this backend")]
    Unsupported {
        /// The port.
        port: PortDev,
        /// What cannot be expressed.
        source: Box<Unsupported>,
    },
    /// A set cannot be as it must be.
    #[error("set '{set}' cannot be brought into the kernel: {why}")]
    Set {
        /// The set.
        set: SetName,
        /// Why.
        why: String,
    },
    /// The kernel refused a rule.
    #[error(transparent)]
    Refused(Box<Refused>),
    /// The host lacks a tool, a kernel module or a permission.
    #[error("{what}: {why}")]
    Unavailable {
        /// Which rules need it.
        scope: Scope,
        /// What is needed.
        what: String,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// A file in /proc or /sys could not be read or written.
    #[error("{path}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A rule that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: refused on port {port} in {object}: {why}\n  rule: {rule}")]
pub struct Refused {
    /// The port.
    pub port: PortDev,
    /// The filter's rule.
    pub origin: Origin,
    /// The object that was to contain it.
    pub object: KernelObject,
    /// The rule, as the table's tool prints it.
    pub rule: String,
    /// What the kernel or the tool said.
    pub why: String,
}

/// Which rules need what the host lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    Everything,
    /// Those on IP packets.
    IpRules,
}
