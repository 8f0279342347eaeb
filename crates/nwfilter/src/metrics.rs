//! Numbers about a driver, for whoever exposes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nwfilter_rules::{Batch, Desired};
use nwfilter_xml::PortDev;
use serde::Serialize;

use crate::Driver;
use crate::stores::Stores;

/// The bounds, in seconds, that [`Metrics::commits_within`] counts batches within.
pub const COMMIT_SECONDS: [f64; 9] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// The bounds, in seconds, that [`Metrics::attaches_within`] counts attaches within.
pub const ATTACH_SECONDS: [f64; 9] = COMMIT_SECONDS;

/// Programs that [`Metrics::repaired_by`] names; the repairs of what others changed are counted for [`OTHERS`].
const MAX_PROGRAMS: usize = 32;
/// The name for programs beyond these, and for those that the kernel does not name.
const OTHERS: &str = "unknown";

/// Numbers about a driver. Counters count from its opening, in this process.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Metrics {
    /// Bindings, when the stores were read last.
    pub ports: u64,
    /// Filters of the store, without the stock filters, when it was read last.
    pub filters: u64,
    /// Files of the stores that are as if they were not there, when they were read last.
    pub problems: u64,
    /// Rules of the ports that this driver has brought to the kernel. A rule in force for several directions counts
    /// in each.
    pub rules: u64,
    /// Batches that the backend has applied. One that found nothing to do counts.
    pub commits: u64,
    /// Batches that the backend has refused.
    pub refusals: u64,
    /// Seconds that the backend took for all batches.
    pub commit_seconds: f64,
    /// Seconds that it took for the last one.
    pub last_commit_seconds: f64,
    /// Applied batches that took at most as long as the bound at the same place of [`COMMIT_SECONDS`].
    pub commits_within: [u64; COMMIT_SECONDS.len()],
    /// Transactions that bound ports, and were carried out.
    pub attaches: u64,
    /// Seconds that these took, the wait for those of others included.
    pub attach_seconds: f64,
    /// Those that took at most as long as the bound at the same place of [`ATTACH_SECONDS`].
    pub attaches_within: [u64; ATTACH_SECONDS.len()],
    /// Transactions that were refused, for whatever reason.
    pub refused: u64,
    /// Repairs of the reconciler, by the name of the program that made them necessary. At most 32 programs are named.
    pub repaired_by: BTreeMap<String, u64>,
    /// Ports whose rules in the kernel were not as they should have been, and were brought back.
    pub repaired: u64,
    /// How often what all ports share, such as the jumps to their chains, was not as it should have been, and was
    /// brought back.
    pub host_repairs: u64,
    /// Transactions that were carried out; a single operation is one.
    pub transactions: u64,
    /// Groups of transactions that were carried out together; one alone is a group.
    pub groups: u64,
    /// Transactions in the largest group.
    pub largest_group: u64,
    /// Transactions in the last group.
    pub last_group: u64,
}

impl Driver {
    /// Numbers about this driver, its learning of addresses included. Waits for nothing.
    pub fn metrics(&self) -> Metrics {
        let counters = self.meter().counters();
        Metrics { rules: counters.rules.values().sum(), ..counters.metrics.clone() }
    }
}

/// Counts.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<Counters>);

#[derive(Debug, Default)]
struct Counters {
    metrics: Metrics,
    /// The rules of each port.
    rules: BTreeMap<PortDev, u64>,
}

impl Meter {
    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stores(&self, stores: &Stores) {
        let mut counters = self.counters();
        counters.metrics.ports = stores.bindings.documents().count() as u64;
        counters.metrics.filters = stores.filters.documents().count() as u64;
        counters.metrics.problems =
            (stores.filters.problems().count() + stores.bindings.problems().count()) as u64;
    }

    pub(crate) fn applied(&self, batch: &Batch, took: Duration) {
        let mut counters = self.counters();
        counters.metrics.commits += 1;
        counters.metrics.commit_seconds += took.as_secs_f64();
        counters.metrics.last_commit_seconds = took.as_secs_f64();
        for (bound, count) in COMMIT_SECONDS.iter().zip(&mut counters.metrics.commits_within) {
            *count += u64::from(took.as_secs_f64() <= *bound);
        }
        for (port, desired) in &batch.ports {
            match desired {
                Desired::Filtered(ruleset) => {
                    counters.rules.insert(port.clone(), ruleset.rules().count() as u64)
                }
                Desired::Gone => counters.rules.remove(port),
            };
        }
    }

    /// Counts a transaction that bound so many ports.
    pub(crate) fn transaction(&self, bound: usize, took: Duration, done: bool) {
        let metrics = &mut self.counters().metrics;
        if !done {
            metrics.refused += 1;
        } else if bound > 0 {
            metrics.attaches += 1;
            metrics.attach_seconds += took.as_secs_f64();
            for (bound, count) in ATTACH_SECONDS.iter().zip(&mut metrics.attaches_within) {
                *count += u64::from(took.as_secs_f64() <= *bound);
            }
        }
    }

    /// Counts a repair of what these programs changed, once for each.
    pub(crate) fn repaired_after<'a>(&self, programs: impl IntoIterator<Item = &'a str>) {
        let repaired = &mut self.counters().metrics.repaired_by;
        let programs: BTreeSet<_> = programs.into_iter().collect();
        let programs = if programs.is_empty() { BTreeSet::from([OTHERS]) } else { programs };
        for program in programs {
            let is_named = repaired.contains_key(program) || repaired.len() < MAX_PROGRAMS;
            let name = if is_named && !program.is_empty() { program } else { OTHERS };
            *repaired.entry(name.to_owned()).or_default() += 1;
        }
    }

    pub(crate) fn refused(&self) {
        self.counters().metrics.refusals += 1;
    }

    pub(crate) fn repaired(&self, ports: usize) {
        self.counters().metrics.repaired += ports as u64;
    }

    pub(crate) fn host_repaired(&self) {
        self.counters().metrics.host_repairs += 1;
    }

    /// Counts transactions that were carried out together, if there are any.
    pub(crate) fn group(&self, transactions: usize) {
        if transactions == 0 {
            return;
        }
        let metrics = &mut self.counters().metrics;
        metrics.transactions += transactions as u64;
        metrics.groups += 1;
        metrics.last_group = transactions as u64;
        metrics.largest_group = metrics.largest_group.max(metrics.last_group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_programs_are_named_that_metrics_stay_small() {
        let meter = Meter::default();
        meter.repaired_after([]);
        meter.repaired_after(["iptables", "nft"]);
        (0..100).for_each(|number| meter.repaired_after([format!("p{number}").as_str(), "iptables"]));
        let repaired = meter.counters().metrics.repaired_by.clone();
        assert_eq!(repaired.len(), MAX_PROGRAMS);
        assert_eq!((repaired["iptables"], repaired["nft"], repaired["p0"]), (101, 1, 1));
        assert_eq!(repaired[OTHERS], 1 + 100 - (MAX_PROGRAMS as u64 - 3));
    }
}
