//! How far work on many ports is.

use std::fmt;
use std::sync::Arc;

/// How far the change is that a driver is about to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Of so many ports, or documents, it is done.
    pub done: usize,
    /// So many there are.
    pub total: usize,
}

/// The parts of a change, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Phase {
    /// Rules are made of filters and bindings, port by port.
    Rules,
    /// The rules of all ports are written to the kernel, in one piece.
    Kernel,
    /// Documents get their names in the stores.
    Stores,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { phase, done, total } = self;
        match phase {
            Phase::Rules => write!(f, "making rules: {done} of {total} ports"),
            Phase::Kernel => write!(f, "writing rules of {total} ports"),
            Phase::Stores => write!(f, "storing {total} documents"),
        }
    }
}

/// Tells of progress whoever wants to hear of it.
#[derive(Clone, Default)]
pub(crate) struct Reporter(pub(crate) Option<Arc<dyn Fn(Progress) + Send + Sync>>);

impl Reporter {
    pub(crate) fn report(&self, phase: Phase, done: usize, total: usize) {
        if let Some(report) = &self.0 {
            report(Progress { phase, done, total });
        }
    }
}
