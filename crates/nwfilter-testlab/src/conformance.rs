//! The same filters to a live libvirtd and to nwfilter: do the kernels end up with the same rules?
//!
//! A [`Case`] is a filter tree and the parameters of a binding. [`compare`] gives each to a libvirtd of its own
//! host, and to the rules and xtables crates on another host, and then compares what the save tools show. Where
//! libvirt is known to be wrong the difference has a name ([`Known`]); everything else is a [`Failure`], shrunk to
//! a small case.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nwfilter_xml::write_filter;

pub use crate::cases::{Case, fixture_cases, random_case, stateless};
pub use crate::pair::{Known, Pair, Side, Verdict};

/// How often a failing case is tried in a smaller form.
const SHRINK_ATTEMPTS: usize = 80;

/// A case on which libvirt and nwfilter differ.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The smallest form of it that was found.
    pub case: Case,
    /// How they differ on that.
    pub difference: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}:", self.case.name)?;
        for filter in &self.case.filters {
            f.write_str(&write_filter(filter))?;
        }
        for (name, values) in self.case.params.iter() {
            writeln!(f, "${name} = {}", values.join(", "))?;
        }
        write!(f, "{}", self.difference)
    }
}

/// What came of many cases.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How many cases there were.
    pub cases: usize,
    /// How many had the same rules on both sides.
    pub equal: usize,
    /// How many both sides refused.
    pub both_refuse: usize,
    /// How many differed in a known way.
    pub known: BTreeMap<Known, usize>,
    /// Those that differed in another way.
    pub failures: Vec<Failure>,
    /// How long it took.
    pub elapsed: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} filter trees in {} s: {} with equal rules, {} refused by both",
            self.cases,
            self.elapsed.as_secs(),
            self.equal,
            self.both_refuse
        )?;
        for (known, count) in &self.known {
            writeln!(f, "{count} where libvirt is known to be wrong: {known}")?;
        }
        writeln!(f, "{} different", self.failures.len())?;
        self.failures.iter().try_for_each(|failure| writeln!(f, "\n{failure}"))
    }
}

/// Compares `count` random trees, the same for the same seed. `oracles` daemons work side by side.
pub fn run(seed: u64, count: usize, oracles: usize, progress: impl Fn(&str) + Sync) -> Result<Report> {
    compare(&|number| (number < count).then(|| random_case(seed, number)), oracles, progress)
}

/// Compares cases number 0, 1, … until there is none. Each of `oracles` daemons takes the next case when it is done
/// with one.
pub fn compare(
    case: &(impl Fn(usize) -> Option<Case> + Sync),
    oracles: usize,
    progress: impl Fn(&str) + Sync,
) -> Result<Report> {
    let start = Instant::now();
    let next = AtomicUsize::new(0);
    let report = Mutex::new(Report::default());
    let worker = || -> Result<()> {
        let mut pair = Pair::new()?;
        while let Some(case) = case(next.fetch_add(1, Ordering::Relaxed)) {
            let verdict = pair.compare(&case)?;
            let failure = match &verdict {
                Verdict::Different(difference) => {
                    progress(&format!("{}: different, shrinking", case.name));
                    let failure = shrink(&mut pair, case, difference.clone())?;
                    progress(&failure.to_string());
                    Some(failure)
                }
                _ => None,
            };
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.count(verdict);
            report.failures.extend(failure);
            if report.cases.is_multiple_of(50) {
                progress(&format!("{} trees compared, {} different", report.cases, report.failures.len()));
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..oracles.max(1)).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.elapsed = start.elapsed();
    Ok(report)
}

impl Report {
    fn count(&mut self, verdict: Verdict) {
        self.cases += 1;
        match verdict {
            Verdict::Equal => self.equal += 1,
            Verdict::BothRefuse { .. } => self.both_refuse += 1,
            Verdict::Known(known) => *self.known.entry(known).or_default() += 1,
            Verdict::Different(_) => (),
        }
    }
}

/// Makes a failing case smaller as long as it fails.
fn shrink(pair: &mut Pair, mut case: Case, mut difference: String) -> Result<Failure> {
    let mut attempts = 0;
    'smaller: loop {
        for smaller in case.smaller() {
            if attempts == SHRINK_ATTEMPTS {
                break 'smaller;
            }
            attempts += 1;
            if let Verdict::Different(still) = pair.compare(&smaller)? {
                (case, difference) = (smaller, still);
                continue 'smaller;
            }
        }
        break;
    }
    Ok(Failure { case, difference })
}
