//! The numbers about a driver as OpenMetrics text, which Prometheus and others read.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use crate::metrics::COMMIT_SECONDS;
use crate::{Driver, Error};

/// The media type of the text.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

impl Driver {
    /// [`Driver::metrics`], and how many ports are in which state, as OpenMetrics text. Reads the stores, and waits for no
    /// change that is being made.
    pub fn openmetrics(&self) -> Result<String, Error> {
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        for status in self.port_statuses()? {
            *states.entry(status.state_name()).or_default() += 1;
        }
        let metrics = self.metrics();
        let mut text = Text::default();
        text.family("ports", "gauge", "Bound ports by state.");
        for (state, count) in states {
            text.sample("ports", &format!("{{state=\"{state}\"}}"), count);
        }
        text.gauge("filters", "Filters of the store, without stock filters.", metrics.filters);
        text.gauge("damaged_files", "Files of the stores that are ignored.", metrics.problems);
        text.gauge("rules", "Rules that this process brought to the kernel.", metrics.rules);
        text.counter("refusals", "Batches that the backend refused.", metrics.refusals);
        text.counter("repaired_ports", "Ports whose rules others had changed.", metrics.repaired);
        let help = "Repairs of what all ports share, as the jumps in FORWARD.";
        text.counter("repaired_host", help, metrics.host_repairs);
        text.counter("transactions", "Changes that were made.", metrics.transactions);
        text.counter("groups", "Groups in which changes were made together.", metrics.groups);
        text.family("commit_seconds", "histogram", "Time that the backend took for a batch.");
        for (bound, count) in COMMIT_SECONDS.iter().zip(metrics.commits_within) {
            text.sample("commit_seconds_bucket", &format!("{{le=\"{bound:?}\"}}"), count);
        }
        text.sample("commit_seconds_bucket", "{le=\"+Inf\"}", metrics.commits);
        text.sample("commit_seconds_sum", "", metrics.commit_seconds);
        text.sample("commit_seconds_count", "", metrics.commits);
        text.0.push_str("# EOF\n");
        Ok(text.0)
    }
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

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(&format!("{name}_total"), "", value);
    }
}
