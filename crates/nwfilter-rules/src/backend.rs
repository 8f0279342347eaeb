//! The boundary to a kernel: what the driver asks of a backend, whatever tables that writes to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_xml::PortDev;
use serde::Serialize;

use crate::ruleset::{Origin, Ruleset};

/// Brings rulesets to a kernel.
pub trait Backend: Send + Sync {
    /// Brings every named port to its desired state, all or none; what is already so is not touched.
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError>;

    /// Which ports the kernel holds rules of this backend's kind for.
    fn installed(&self) -> Result<Installed, ApplyError>;

    /// How the kernel differs from what `batch` asks for, rule by rule; nothing is changed.
    fn diff(&self, batch: &Batch) -> Result<Vec<Difference>, ApplyError>;

    /// Follows, from now on, what others change in the kernel, in the network namespace of the calling thread. `None`
    /// for a backend that cannot.
    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        Ok(None)
    }
}

/// Follows what others change in the kernel where rules of ports are, or lead to them.
///
/// The descriptor is readable when [`Watch::changes`] may have something to tell.
pub trait Watch: AsFd + Send {
    /// What others changed since the last call, without waiting. What this process had written by the backend is not
    /// told. That something is told does not mean that a port has not what it must have: [`Backend::diff`] knows.
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError>;

    /// How often to ask although the descriptor is not readable, for what the kernel gives no word of.
    fn interval(&self) -> Option<Duration>;
}

/// Something that others changed in the kernel, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignChange {
    /// The program and process that did it, where the kernel tells.
    pub by: Option<String>,
    /// What it is about.
    pub what: String,
}

/// What ports must have.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Each port and its desired state. Ports that are not named stay as they are.
    pub ports: BTreeMap<PortDev, Desired>,
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
}

/// What one port must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Desired {
    /// This ruleset.
    Filtered(Arc<Ruleset>),
    /// No rule at all.
    Gone,
}

/// What a batch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The ports for which something was written.
    pub changed: BTreeSet<PortDev>,
    /// Transactions that were committed.
    pub commits: usize,
    /// What will not work although the batch was applied.
    pub warnings: Vec<Warning>,
}

/// What a port's filter asks for and this host cannot give. All else of the filter is in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Warning {
    /// Connections get no conntrack helper, so what is RELATED to them does not pass.
    NoHelper {
        /// The port of the bridge.
        port: PortDev,
        /// The helper, as the kernel names it.
        helper: &'static str,
        /// The port that the connections go to.
        destination: u16,
        /// Why.
        why: NoHelper,
    },
}

/// Why connections get no conntrack helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum NoHelper {
    /// Those to a guest are told by its IP address, which is not known.
    AddressUnknown,
    /// The kernel has none of that name.
    Missing,
}

impl Warning {
    /// The port that it is about.
    pub fn port(&self) -> &PortDev {
        match self {
            Self::NoHelper { port, .. } => port,
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::NoHelper { port, helper, destination, why } = self;
        write!(
            f,
            "{port}: connections to port {destination} get no conntrack helper '{helper}', so what is RELATED to them \
             will not pass: "
        )?;
        match why {
            NoHelper::AddressUnknown => f.write_str("the guest's IP address is not known (parameter IP)"),
            NoHelper::Missing => write!(f, "this kernel has no nf_conntrack_{helper}"),
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

/// A rule that differs between the kernel and what is desired.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The port it is about.
    pub port: String,
    /// The tool that shows the rule.
    pub tool: &'static str,
    /// The chain it is in.
    pub chain: String,
    /// How it differs.
    pub kind: DifferenceKind,
    /// The rule, in the tool's words.
    pub rule: String,
    /// The filter's rule it comes from, where it does.
    pub origin: Option<String>,
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
        write!(f, "{sign} {} {}: {} {}", self.port, self.tool, self.chain, self.rule)?;
        match &self.origin {
            Some(origin) => write!(f, "  ({origin})"),
            None => Ok(()),
        }
    }
}

/// Why a batch was not applied. The kernel is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// A tool is missing, too old or cannot be run.
    #[error("{tool}: {why}")]
    Tool {
        /// Its name.
        tool: String,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// The kernel refused a rule.
    #[error("{origin}: refused on port {port} by {tool}: {why}\n  rule: {rule}")]
    Refused {
        /// The filter's rule.
        origin: Origin,
        /// The port.
        port: PortDev,
        /// The tool that said so.
        tool: &'static str,
        /// The rule in the tool's words.
        rule: String,
        /// What it said.
        why: String,
    },
    /// The host lacks something that the rules need.
    #[error("{what}: {why}")]
    Host {
        /// What is needed.
        what: String,
        /// Why it is not there, and what to do.
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
