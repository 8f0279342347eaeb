//! The numbers about a driver as OpenMetrics text, which Prometheus and others read.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use crate::counters::DroppedBy;
use crate::metrics::{ATTACH_SECONDS, COMMIT_SECONDS};
use crate::{BindingState, Driver, Error, Metrics};

/// The media type of the text.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

impl Driver {
    /// [`Driver::metrics`], how many ports are in which state, and what their rules stopped, as OpenMetrics text. Reads the stores
    /// and, once a second at most, what the kernel counts; waits for no change that is being made.
    pub fn openmetrics(&self) -> Result<String, Error> {
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        let (mut learned, mut leases) = (BTreeMap::<String, u64>::new(), 0);
        for status in self.port_statuses()? {
            *states.entry(status.state_name()).or_default() += 1;
            match &status.state {
                Ok(BindingState::Learned { addresses, source }) => {
                    *learned.entry(source.to_string()).or_default() += addresses.len() as u64;
                }
                Ok(BindingState::Leased { leases: held }) => leases += held.len() as u64,
                _ => (),
            }
        }
        let metrics = self.metrics();
        let mut text = Text::default();
        text.family("ports", "gauge", "Bound ports by state.");
        for (state, count) in states {
            text.sample("ports", &label("state", state), count);
        }
        text.family("learned_addresses", "gauge", "Addresses of guests that were learned, by what from.");
        for (source, count) in learned {
            text.sample("learned_addresses", &label("source", &source), count);
        }
        text.gauge("leases", "DHCP leases of guests that count now.", leases);
        text.gauge("filters", "Filters of the store, without stock filters.", metrics.filters);
        text.gauge("damaged_files", "Files of the stores that are ignored.", metrics.problems);
        text.gauge("rules", "Rules that this process brought to the kernel.", metrics.rules);
        text.counter("refusals", "Batches that the backend refused.", metrics.refusals);
        text.counter("repaired_ports", "Ports whose rules others had changed.", metrics.repaired);
        let help = "Repairs of what all ports share, as the jumps in FORWARD.";
        text.counter("repaired_host", help, metrics.host_repairs);
        text.counter("transactions", "Changes that were made.", metrics.transactions);
        text.counter("groups", "Groups in which changes were made together.", metrics.groups);
        text.counter("refused_changes", "Changes that were refused, for whatever reason.", metrics.refused);
        let help = "Packets that rules stopped, by port and filter; by filter alone where ports share rules.";
        text.family("dropped_packets", "counter", help);
        for (DroppedBy { port, filter }, packets) in self.dropped_packets() {
            let mut labels = vec![("filter", filter.as_str())];
            labels.extend(port.as_ref().map(|port| ("port", port.as_str())));
            text.sample("dropped_packets_total", &self::labels(&labels), packets);
        }
        text.family("repairs", "counter", "Repairs while it watched, by the program that changed rules.");
        for (program, count) in &metrics.repaired_by {
            text.sample("repairs_total", &label("by", program), count);
        }
        let help = "Time that the backend took for a batch.";
        let Metrics { commits_within, commits, commit_seconds, .. } = metrics;
        text.histogram("commit_seconds", help, (&COMMIT_SECONDS, &commits_within), commits, commit_seconds);
        let help = "Time that a change took that bound ports, the wait for others included.";
        let Metrics { attaches_within, attaches, attach_seconds, .. } = metrics;
        text.histogram("attach_seconds", help, (&ATTACH_SECONDS, &attaches_within), attaches, attach_seconds);
        text.0.push_str("# EOF\n");
        Ok(text.0)
    }
}

/// A sample's only label.
fn label(name: &str, value: &str) -> String {
    labels(&[(name, value)])
}

/// The labels of a sample. The name of a program, or of a filter, may have any character.
fn labels(labels: &[(&str, &str)]) -> String {
    let label = |(name, value): &(&str, &str)| {
        let value = value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
        format!("{name}=\"{value}\"")
    };
    format!("{{{}}}", labels.iter().map(label).collect::<Vec<_>>().join(","))
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# TYPE nwfilter_{name} {kind}\n# HELP nwfilter_{name} {help}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = writeln!(self.0, "nwfilter_{name}{labels} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample(name, "", value);
    }

    fn histogram(&mut self, name: &str, help: &str, buckets: (&[f64], &[u64]), count: u64, sum: f64) {
        self.family(name, "histogram", help);
        for (bound, count) in buckets.0.iter().zip(buckets.1) {
            self.sample(&format!("{name}_bucket"), &label("le", &format!("{bound:?}")), count);
        }
        self.sample(&format!("{name}_bucket"), &label("le", "+Inf"), count);
        self.sample(&format!("{name}_sum"), "", sum);
        self.sample(&format!("{name}_count"), "", count);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(&format!("{name}_total"), "", value);
    }
}
