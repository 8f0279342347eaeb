//! The rules that a kernel holds for ports, each with the filter's rule that it comes from and what it has counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use nwfilter_xml::PortDev;
use serde::Serialize;

use crate::ruleset::{Family, Origin, Verdict};

/// What the kernel holds for the ports of a batch, rule by rule: see [`Backend::rules`](crate::Backend::rules).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The rules, in no particular order.
    pub rules: Vec<HeldRule>,
    /// The ports of which the kernel does not hold what they must have. Some of their rules are missing above.
    pub differing: BTreeSet<PortDev>,
}

/// A rule in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldRule {
    /// Where it is.
    pub id: RuleId,
    /// The ports whose packets it sees: one, unless the kernel has a rule for several ports at once.
    pub ports: Arc<BTreeSet<PortDev>>,
    /// Which packets it is about.
    pub layer: Layer,
    /// The chain of the ruleset: `root`, or the name of a sub-chain.
    pub chain: Arc<str>,
    /// The filter's rule.
    pub origin: Origin,
    /// What it does; `None` for a jump into a sub-chain.
    pub verdict: Option<Verdict>,
    /// What it has counted.
    pub count: Count,
}

/// A rule of nf_tables. No two rules of a table ever have the same handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId {
    /// The family of its table, `NFPROTO_*`.
    pub family: u8,
    /// The name of its table.
    pub table: &'static str,
    /// Its handle.
    pub handle: u64,
}

/// The packets that rules are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// Frames.
    Ethernet,
    /// IPv4 packets.
    Ipv4,
    /// IPv6 packets.
    Ipv6,
}

impl From<Family> for Layer {
    fn from(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::Ipv4,
            Family::Ipv6 => Self::Ipv6,
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layer::Ethernet => "Ethernet",
            Layer::Ipv4 => "IPv4",
            Layer::Ipv6 => "IPv6",
        })
    }
}

/// Packets and their bytes. The kernel counts the bytes of IP rules from the IP header on, and those of Ethernet rules
/// without the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

impl Count {
    /// What was counted since an earlier count. Rules that were written anew begin at nothing.
    pub fn since(self, earlier: Self) -> Self {
        let is_later = self.packets >= earlier.packets && self.bytes >= earlier.bytes;
        let earlier = if is_later { earlier } else { Self::default() };
        Self { packets: self.packets - earlier.packets, bytes: self.bytes - earlier.bytes }
    }
}

impl Verdict {
    /// Whether a packet ends here.
    pub fn stops(self) -> bool {
        matches!(self, Verdict::Drop | Verdict::Reject)
    }
}

/// What rules of filters have counted since they were written to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sorted by origin, then by ports.
    pub rules: Vec<RuleCount>,
    /// The ports of which the kernel does not hold what they must have: some of their rules have no count.
    pub differing: BTreeSet<PortDev>,
}

/// What a rule of a filter has counted for a port, summed over the rules of the kernel that it became.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleCount {
    /// The rule.
    pub origin: Origin,
    /// The ports. More than one where the kernel has a rule for several ports at once: what each of them adds to the
    /// count is then not known.
    pub ports: Arc<BTreeSet<PortDev>>,
    /// Whether it stops packets.
    pub stops: bool,
    /// What it has counted.
    pub count: Count,
}

impl From<Held> for Counts {
    fn from(Held { rules, differing }: Held) -> Self {
        let mut sums: BTreeMap<(Origin, Arc<BTreeSet<PortDev>>, bool), Count> = BTreeMap::new();
        // A jump is no rule of a filter, nor is one that logs what the next one stops.
        let counted = |verdict: &Verdict| !matches!(verdict, Verdict::Log(_));
        for (rule, verdict) in
            rules.into_iter().filter_map(|rule| rule.verdict.filter(counted).map(|verdict| (rule, verdict)))
        {
            *sums.entry((rule.origin, rule.ports, verdict.stops())).or_default() += rule.count;
        }
        let rules =
            sums.into_iter().map(|((origin, ports, stops), count)| RuleCount { origin, ports, stops, count });
        Self { rules: rules.collect(), differing }
    }
}

impl Counts {
    /// Those of one filter's rules.
    pub fn of_filter(&self, filter: &str) -> Self {
        let is_of = |origin: &Origin| origin.filter.as_ref().is_some_and(|of| of.as_str() == filter);
        let rules = self.rules.iter().filter(|rule| is_of(&rule.origin)).cloned().collect();
        Self { rules, differing: self.differing.clone() }
    }

    /// The sum over all ports for each rule, sorted by origin.
    pub fn by_rule(&self) -> Vec<RuleCount> {
        let mut sums: BTreeMap<(&Origin, bool), (BTreeSet<PortDev>, Count)> = BTreeMap::new();
        for rule in &self.rules {
            let (ports, count) = sums.entry((&rule.origin, rule.stops)).or_default();
            ports.extend(rule.ports.iter().cloned());
            *count += rule.count;
        }
        let sum = |((origin, stops), (ports, count)): ((&Origin, bool), _)| RuleCount {
            origin: origin.clone(),
            ports: Arc::new(ports),
            stops,
            count,
        };
        sums.into_iter().map(sum).collect()
    }

    /// What the rules of each port have stopped, sorted by port. Ports that the kernel counts together are one entry.
    pub fn stopped_by_port(&self) -> BTreeMap<Arc<BTreeSet<PortDev>>, Count> {
        let mut sums: BTreeMap<Arc<BTreeSet<PortDev>>, Count> = BTreeMap::new();
        for rule in self.rules.iter().filter(|rule| rule.stops) {
            *sums.entry(rule.ports.clone()).or_default() += rule.count;
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(port: &str, origin: &str, verdict: Option<Verdict>, packets: u64) -> HeldRule {
        HeldRule {
            id: RuleId { family: 2, table: "filter", handle: packets },
            ports: Arc::new(BTreeSet::from([port.parse().unwrap()])),
            layer: Layer::Ipv4,
            chain: "root".into(),
            origin: origin.parse().unwrap(),
            verdict,
            count: Count { packets, bytes: packets * 100 },
        }
    }

    #[test]
    fn counts_are_summed_over_the_rules_of_a_port_and_then_over_ports() {
        let rules = vec![
            rule("a", "web:3", Some(Verdict::Accept), 1),
            rule("a", "web:3", Some(Verdict::Pass), 2),
            rule("b", "web:3", Some(Verdict::Pass), 4),
            rule("b", "web:9", Some(Verdict::Drop), 8),
            rule("b", "nwfilter", None, 16),
        ];
        let counts = Counts::from(Held { rules, ..Held::default() });
        let shown = |rules: &[RuleCount]| -> Vec<(String, usize, u64)> {
            rules.iter().map(|rule| (rule.origin.to_string(), rule.ports.len(), rule.count.packets)).collect()
        };
        let of = |origin: &str, ports, packets| (origin.to_owned(), ports, packets);
        assert_eq!(shown(&counts.rules), [of("web:3", 1, 3), of("web:3", 1, 4), of("web:9", 1, 8)]);
        assert_eq!(shown(&counts.by_rule()), [of("web:3", 2, 7), of("web:9", 1, 8)]);
        assert_eq!(
            counts.stopped_by_port().into_values().map(|count| count.packets).collect::<Vec<_>>(),
            [8]
        );
        assert!(counts.of_filter("we").rules.is_empty());
        assert_eq!(counts.of_filter("web"), counts);
    }

    #[test]
    fn a_rule_that_was_written_anew_begins_at_nothing() {
        let count = |packets| Count { packets, bytes: packets * 60 };
        assert_eq!(count(7).since(count(5)), count(2));
        assert_eq!(count(3).since(count(5)), count(3));
    }
}
