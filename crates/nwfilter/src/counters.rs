//! What the rules of filters have counted in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nwfilter_rules::{Batch, Count, Counts, Origin, RuleCount};
use nwfilter_xml::PortDev;

use crate::{Driver, Error};

/// How old what the kernel counted may be: to read it takes a fifth of a second for a thousand ports.
const AGE: Duration = Duration::from_secs(1);

impl Driver {
    /// What every rule has counted for every port, since it was written to the kernel. Nothing changes.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let driver = nwfilter::Driver::open(Default::default(), nwfilter::Fake::new())?;
    /// for rule in driver.counters()?.by_rule().iter().filter(|rule| rule.stops) {
    ///     println!("{}: {} packets stopped at {} ports", rule.origin, rule.count.packets, rule.ports.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn counters(&self) -> Result<Counts, Error> {
        self.inside(|| self.counters_here())
    }

    fn counters_here(&self) -> Result<Counts, Error> {
        let stores = self.look()?;
        let filters = stores.filter_map();
        let mut batch = Batch::default();
        let mut without_rules = Vec::new();
        for binding in stores.bindings.documents().filter(|binding| self.host().has(&binding.port)) {
            match stores.ruleset(&filters, binding) {
                Ok(ruleset) => batch.filter(binding.port.clone(), Arc::new(ruleset)),
                // `diff` and `reload` say why.
                Err(_) => without_rules.push(binding.port.clone()),
            }
        }
        let mut counts = self.counts(&batch)?;
        counts.differing.extend(without_rules);
        Ok(counts)
    }

    /// The same for one port.
    pub fn port_counters(&self, port: &PortDev) -> Result<Counts, Error> {
        let binding = self.binding(port)?;
        let mut batch = Batch::default();
        batch.filter(port.clone(), Arc::new(self.ruleset(&binding)?));
        self.counts(&batch)
    }

    /// How many packets the rules of ports have stopped, from when the rules were written. Where the kernel cannot be asked, it
    /// is what was known last.
    pub(crate) fn dropped_packets(&self) -> BTreeMap<DroppedBy, u64> {
        let mut dropped = self.dropped().lock().unwrap_or_else(PoisonError::into_inner);
        if dropped.read.is_none_or(|read| read.elapsed() >= AGE) {
            match self.counters() {
                Ok(counts) => dropped.add(&counts),
                Err(error) => log::debug!("dropped packets: {}", crate::with_causes(&error)),
            }
            dropped.read = Some(Instant::now());
        }
        dropped.totals.clone()
    }

    fn counts(&self, batch: &Batch) -> Result<Counts, Error> {
        if batch.ports.is_empty() {
            return Ok(Counts::default());
        }
        self.inside(|| Ok(self.backend().rules(batch)?.into()))
    }
}

/// Whose rules stopped packets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DroppedBy {
    /// The port; `None` where the kernel counts several ports together.
    pub(crate) port: Option<PortDev>,
    /// The filter; `nwfilter` for built-in rules.
    pub(crate) filter: String,
}

/// Stopped packets as sums that do not go back when a rule is written anew, which the kernel then counts from zero.
#[derive(Debug, Default)]
pub(crate) struct Dropped {
    read: Option<Instant>,
    /// What each rule had counted when the kernel was asked last.
    last: BTreeMap<(Origin, Arc<BTreeSet<PortDev>>), Count>,
    totals: BTreeMap<DroppedBy, u64>,
}

impl Dropped {
    fn add(&mut self, counts: &Counts) {
        let earlier = std::mem::take(&mut self.last);
        let mut totals: BTreeMap<DroppedBy, u64> = BTreeMap::new();
        for RuleCount { origin, ports, count, .. } in counts.rules.iter().filter(|rule| rule.stops) {
            let port = if ports.len() == 1 { ports.first().cloned() } else { None };
            let filter = origin.filter.as_ref().map_or_else(|| origin.to_string(), ToString::to_string);
            let by = DroppedBy { port, filter };
            let key = (origin.clone(), ports.clone());
            let more = count.since(earlier.get(&key).copied().unwrap_or_default());
            // Ports and filters that are gone have no sum.
            let sum = totals.entry(by).or_insert_with_key(|by| self.totals.get(by).copied().unwrap_or(0));
            *sum = sum.saturating_add(more.packets);
            self.last.insert(key, *count);
        }
        self.totals = totals;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(rules: &[(&str, &[&str], u64)]) -> Counts {
        let rule = |(origin, ports, packets): &(&str, &[&str], u64)| RuleCount {
            origin: origin.parse().unwrap(),
            ports: Arc::new(ports.iter().map(|port| port.parse().unwrap()).collect()),
            stops: true,
            count: Count { packets: *packets, bytes: *packets },
        };
        Counts { rules: rules.iter().map(rule).collect(), ..Counts::default() }
    }

    #[test]
    fn sums_do_not_go_back_when_rules_are_written_anew_and_end_with_their_port() {
        let mut dropped = Dropped::default();
        let mut sums = |rules: &[(&str, &[&str], u64)]| -> Vec<(String, u64)> {
            dropped.add(&counts(rules));
            let name = |by: &DroppedBy| format!("{:?} {}", by.port.as_ref().map(PortDev::as_str), by.filter);
            dropped.totals.iter().map(|(by, sum)| (name(by), *sum)).collect()
        };
        let of = |name: &str, sum| (name.to_owned(), sum);
        let (a, both) = ("Some(\"a\") web", "None web");
        assert_eq!(sums(&[("web:3", &["a"], 5), ("web:9", &["a"], 1)]), [of(a, 6)]);
        assert_eq!(sums(&[("web:3", &["a"], 7), ("web:9", &["a"], 0)]), [of(a, 8)]);
        assert_eq!(sums(&[("web:3", &["a"], 2)]), [of(a, 10)]);
        assert_eq!(sums(&[("web:3", &["a"], 2), ("web:3", &["b", "c"], 4)]), [of(both, 4), of(a, 10)]);
        assert_eq!(sums(&[("web:3", &["b", "c"], 5)]), [of(both, 5)]);
    }
}
