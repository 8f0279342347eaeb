//! Why an operation of the driver was refused. Whatever the reason: nothing was changed.

use std::path::PathBuf;
use std::time::Duration;

use nwfilter_rules::{ApplyError, Origin, RulesError};
use nwfilter_xml::{Diagnostics, FilterName, PortDev, SetName, Uuid};

/// Why an operation was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The document is not valid.
    #[error(transparent)]
    Invalid(#[from] Diagnostics),
    /// No filter has that name, neither in the store nor among the stock filters.
    #[error("no filter is named '{0}'")]
    NoSuchFilter(FilterName),
    /// The filter is one of those the library embeds, and the store has none of its name.
    #[error("'{0}' is a stock filter: it is not in the store and cannot be undefined")]
    StockFilter(FilterName),
    /// Ports use the filter, directly or through others.
    #[error("filter '{name}' is in use by {}", list(ports))]
    FilterInUse {
        /// The filter.
        name: FilterName,
        /// The ports.
        ports: Vec<PortDev>,
    },
    /// A filter's UUID and name do not belong together.
    #[error("filter '{name}' has the UUID {uuid}, but {conflict}")]
    UuidConflict {
        /// The filter in the document.
        name: FilterName,
        /// Its UUID in the document.
        uuid: Uuid,
        /// What it conflicts with.
        conflict: String,
    },
    /// A filter would include itself.
    #[error("filter '{name}' cannot be defined")]
    IncludesItself {
        /// The filter.
        name: FilterName,
        /// The circle.
        source: Box<RulesError>,
    },
    /// No set has that name.
    #[error("no set is named '{0}'")]
    NoSuchSet(SetName),
    /// Filters, sets or ports use the set.
    #[error("set '{name}' is in use by {}", list(users))]
    SetInUse {
        /// The set.
        name: SetName,
        /// Who uses it: `filter 'web'`.
        users: Vec<String>,
    },
    /// A set cannot be so.
    #[error("set '{set}': {why}")]
    Set {
        /// The set.
        set: SetName,
        /// Why not.
        why: String,
    },
    /// The port has no binding.
    #[error("port '{0}' has no binding")]
    NoSuchBinding(PortDev),
    /// The port has a binding already.
    #[error("port '{0}' has a binding already: delete it first")]
    BindingExists(PortDev),
    /// A text is no name of a filter or port.
    #[error(transparent)]
    Name(#[from] nwfilter_xml::Error),
    /// There is no such network interface.
    #[error("there is no network interface '{0}' on this host")]
    NoSuchPort(PortDev),
    /// A filter does not make rules for a port.
    #[error("port '{port}' cannot be filtered by '{filter}'")]
    Rules {
        /// The port.
        port: PortDev,
        /// The filter of its binding.
        filter: FilterName,
        /// Why not.
        source: Box<RulesError>,
    },
    /// A parameter that steers how the guest's address is learned has a value it cannot have.
    #[error("port '{port}': parameter {name} is '{value}', but must be {expected}")]
    Parameter {
        /// The port.
        port: PortDev,
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The learning of addresses could not start or go on.
    #[error("the addresses of guests cannot be learned")]
    Learner {
        /// Why not.
        source: std::io::Error,
    },
    /// What others change in the kernel cannot be followed.
    #[error("changes of others cannot be repaired")]
    Reconciler {
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file descriptor for events could not be made.
    #[error("events cannot be followed")]
    Events {
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel does not tell which network interfaces there are.
    #[error("the network interfaces are not known")]
    Links {
        /// Why not.
        source: std::io::Error,
    },
    /// Packets of a port cannot be followed through the kernel.
    #[error("packets cannot be traced")]
    Trace {
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The network namespace of the driver cannot be entered.
    #[error("the network namespace cannot be entered")]
    Namespace {
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel, or a tool that talks to it, refused.
    #[error("the rules were not applied")]
    Apply(#[from] ApplyError),
    /// The thread that carried out this change together with others failed. The change was made as a whole or not at
    /// all.
    #[error("the change was given up with those of other threads")]
    Abandoned,
    /// Somebody else changes the stores, for longer than this driver waits.
    #[error("{} is held by {holder}, and was not free within {} s", path.display(), patience.as_secs_f32())]
    Locked {
        /// The lock of the state directory.
        path: PathBuf,
        /// Who holds it, as far as the kernel tells.
        holder: String,
        /// How long the driver waited: [`Config::patience`](crate::Config::patience).
        patience: Duration,
    },
    /// A file or directory could not be read or written.
    #[error("cannot read or write {}", path.display())]
    Store {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    /// The rule of a filter that it is about, if it is about one.
    pub fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Rules { source, .. } => source.origin(),
            Self::Apply(ApplyError::Refused(refused)) => Some(&refused.origin),
            Self::Apply(ApplyError::Unsupported { source, .. }) => Some(&source.origin),
            _ => None,
        }
    }
}

/// An error with its causes in one line, as a log shows it.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn list<T: ToString>(ports: &[T]) -> String {
    const SHOWN: usize = 5;
    let mut named: Vec<_> = ports.iter().take(SHOWN).map(ToString::to_string).collect();
    if ports.len() > SHOWN {
        named.push(format!("{} more", ports.len() - SHOWN));
    }
    named.join(", ")
}
