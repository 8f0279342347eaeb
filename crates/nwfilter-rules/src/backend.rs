//! The boundary to a kernel: what the driver asks of a backend, whatever tables that writes to.
//!
//! A [`Batch`] says what ports must have; a [`Backend`] plans or applies it as a whole. What it says back is typed: a
//! [`Difference`] names its [`Subject`], its [`KernelObject`] and the filter's rule, a refusal names the port and the rule,
//! and a foreign change names the process that made it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_xml::PortDev;
use serde::{Serialize, Serializer};

use crate::helper::Helper;
use crate::ruleset::{Origin, Ruleset};

/// Applies rulesets to a kernel, in the network namespace of the calling thread.
pub trait Backend: Send + Sync {
    /// Its name, as users choose it: `xtables`.
    fn name(&self) -> &'static str;

    /// Whether this kind of backend can express a ruleset at all. Touches nothing.
    fn check(&self, ruleset: &Ruleset) -> Result<(), Unsupported>;

    /// What [`Backend::apply`] would change. Touches nothing.
    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError>;

    /// Gives every port of the batch its desired state, all or none. What is already so is not touched.
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError>;

    /// Which ports the kernel holds rules of this backend's kind for.
    fn installed(&self) -> Result<Installed, ApplyError>;

    /// Follows, from now on, what others change in the kernel. `None` for a backend that cannot.
    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        Ok(None)
    }

    /// Removes everything of this backend's kind from the kernel, ports and what leads to them.
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

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        (**self).watch()
    }

    fn clear(&self) -> Result<Applied, ApplyError> {
        (**self).clear()
    }
}

/// Follows what others change in the kernel where rules of ports are, or lead to them.
///
/// The descriptor is readable when [`Watch::changes`] may have something to report.
pub trait Watch: AsFd + Send {
    /// What others changed since the last call, without waiting. Changes that this process makes by the backend are not
    /// reported. A change does not mean that a port lacks what it must have: [`Backend::plan`] knows.
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError>;

    /// How often to ask although the descriptor is not readable, for what the kernel does not report.
    fn interval(&self) -> Option<Duration>;
}

/// Something that others changed in the kernel, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignChange {
    /// Who did it, where the kernel says.
    pub by: Option<Process>,
    /// Where, as far as it is shown; sorted.
    pub objects: Vec<KernelObject>,
    /// Whether there is more than `objects` shows.
    pub more: bool,
}

impl ForeignChange {
    /// A change in one place, by nobody known.
    pub fn at(object: KernelObject) -> Self {
        Self { objects: vec![object], ..Self::default() }
    }

    /// More changes than could be followed.
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
    /// The program's name, as the kernel knows it: at most 15 bytes. Empty where it has none.
    pub name: String,
    /// Its number.
    pub id: u32,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() { "a program without a name" } else { &self.name };
        write!(f, "{name} (process {})", self.id)
    }
}

/// What ports must have.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Each port and its desired state. Ports that are not named stay as they are.
    pub ports: BTreeMap<PortDev, Desired>,
    /// Whether [`Applied::differences`] is asked for.
    pub report_differences: bool,
}

impl Batch {
    /// Asks for a ruleset on a port.
    pub fn filter(&mut self, port: PortDev, ruleset: Arc<Ruleset>) {
        self.ports.insert(port, Desired::Filtered(ruleset));
    }

    /// Asks that nothing of a port is left.
    pub fn remove(&mut self, port: PortDev) {
        self.ports.insert(port, Desired::Gone);
    }

    /// The ports that are to be filtered, with their rulesets.
    pub fn filtered(&self) -> impl Iterator<Item = (&PortDev, &Arc<Ruleset>)> {
        self.ports.iter().filter_map(|(port, desired)| match desired {
            Desired::Filtered(ruleset) => Some((port, ruleset)),
            Desired::Gone => None,
        })
    }
}

/// What one port must have.
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
    /// What will not work although the batch can be applied, sorted.
    pub warnings: Vec<Warning>,
}

/// What a batch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The ports for which something was written.
    pub changed: BTreeSet<PortDev>,
    /// Transactions that were committed.
    pub commits: usize,
    /// What will not work although the batch was applied, sorted.
    pub warnings: Vec<Warning>,
    /// The rules that were written and removed, sorted; empty unless [`Batch::report_differences`] is set.
    pub differences: Vec<Difference>,
}

/// What a port's filter asks for and this host cannot give. All else of the filter is in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Warning {
    /// Connections get no conntrack helper, so what is RELATED to them does not pass.
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
    /// The port is in no bridge, so its rules see none of its packets.
    Unbridged {
        /// The port.
        port: PortDev,
    },
}

/// Why connections get no conntrack helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum NoHelper {
    /// This backend tells connections to a guest by its IP address, which is not known.
    AddressUnknown,
    /// The kernel has none of that name.
    Missing,
}

impl Warning {
    /// The port that it is about.
    pub fn port(&self) -> &PortDev {
        match self {
            Self::NoHelper { port, .. } | Self::Unbridged { port } => port,
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
    /// Those of them that are open none the less, in part or whole, because nothing leads to some of their rules.
    pub unreached: BTreeSet<PortDev>,
}

/// What a difference is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// What all ports share: base chains, the jumps to them, settings of the kernel.
    Host,
    /// One port.
    Port(PortDev),
}

impl Subject {
    /// The port, unless it is about all of them.
    pub fn port(&self) -> Option<&PortDev> {
        match self {
            Subject::Host => None,
            Subject::Port(port) => Some(port),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Host => f.write_str("host"),
            Subject::Port(port) => write!(f, "{port}"),
        }
    }
}

/// Something of the kernel that rules are in, or depend on. Tables have the names by which tools show them: `iptables`,
/// `iptables raw`, `ebtables`.
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
    /// What it is about.
    #[serde(serialize_with = "port_or_null", rename = "port")]
    pub subject: Subject,
    /// Where the rule is, or is missing.
    #[serde(flatten)]
    pub object: KernelObject,
    /// How it differs.
    pub kind: DifferenceKind,
    /// The rule, in the words of the tool that shows it.
    pub rule: String,
    /// The filter's rule it comes from, where it does.
    pub origin: Option<Origin>,
}

/// A host's own differences have no port.
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

/// What a backend of this kind cannot express.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct Unsupported {
    /// The filter's rule.
    pub origin: Origin,
    /// What it asks for, and what to do.
    pub what: String,
}

/// Why a batch was not applied. The kernel is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// This kind of backend cannot express a port's ruleset.
    #[error("the filter of port '{port}' cannot be applied by this backend")]
    Unsupported {
        /// The port.
        port: PortDev,
        /// What cannot be expressed.
        source: Box<Unsupported>,
    },
    /// The kernel refused a rule.
    #[error(transparent)]
    Refused(Box<Refused>),
    /// The host lacks something: a tool, a module of the kernel, a permission.
    #[error("{what}: {why}")]
    Unavailable {
        /// Which rules need it.
        scope: Scope,
        /// What is needed.
        what: String,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// A file of the kernel could not be read or written.
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
    /// Where it was to be.
    pub object: KernelObject,
    /// The rule, in the words of the tool that shows it.
    pub rule: String,
    /// What the kernel or the tool said.
    pub why: String,
}

/// Which rules need what a host lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    Everything,
    /// Those on IP packets.
    IpRules,
}
