//! Packet rates beside many filtered ports: a frame finds its port's rules in libvirt's list of ports, or in ours.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nwfilter::stock_filters;
use nwfilter::xml::{Filter, FilterName, read_filter};
use nwfilter_testlab::rate::{Between, RateLab};
use nwfilter_xtables::{Dispatch, Settings, Xtables};

const FILTER: &str = include_str!("../../../xml-fixtures/seed/ftp-by-state.xml");

/// Between which ports, and what is said of them.
const BETWEEN: [(Between, &str); 3] = [
    (Between::Filtered, "Between two guests that are filtered as the others are"),
    (Between::Unfiltered, "Between two guests that have no filter"),
    (Between::Uplinks, "Between two ports that are no guests' by name (`eth0`, `eth1`), and have no filter"),
];

/// How many ports are filtered beside the two that are measured.
const OTHERS: [usize; 5] = [0, 10, 100, 500, 1000];

/// The length of one run of several.
const RUN: Duration = Duration::from_millis(200);

/// Frames a second with so many other ports.
pub(super) struct Rate {
    others: usize,
    libvirt: f64,
    ours: f64,
}

/// The backend that installs, rule for rule, what libvirt does, which gives no helpers.
fn as_libvirt() -> Xtables {
    Xtables::new(Settings { dispatch: Dispatch::List, conntrack_helpers: false, ..Settings::default() })
}

/// Measures both ways one after the other for each number of ports.
fn measure(between: Between) -> Result<Vec<Rate>> {
    let mut filters: BTreeMap<FilterName, Arc<Filter>> = stock_filters().clone();
    let filter = read_filter("ftp-by-state.xml", FILTER).into_result()?;
    filters.insert(filter.name.clone(), Arc::new(filter));
    let rate = |others: usize, backend: Xtables| -> Result<f64> {
        let lab = RateLab::new(others, between)?;
        lab.filter(&backend, &filters, "ftp-by-state")?;
        let rate = lab.frames_a_second(RUN)?;
        println!("  {between:?}, {others} others: {rate:.0} frames/s");
        Ok(rate)
    };
    let both = |others: usize| {
        Ok(Rate { others, libvirt: rate(others, as_libvirt())?, ours: rate(others, Xtables::default())? })
    };
    OTHERS.into_iter().map(both).collect()
}

/// Measures the rates, and writes them as a section of the report.
pub(super) fn section() -> Result<String> {
    let mut text = String::from(
        "\n## Packets a second\n\nUDP frames of 64 bytes from one port of the bridge to another, by one processor: \
         counted against the time that the sending thread had it,\nwithin which the kernel forwards the frame. The other \
         ports are filtered by the seed filter `ftp-by-state`. Between guests a frame takes the mean\ntime of three pairs \
         of ports: the first, the middle and the last by name. For libvirt's side this driver installed libvirt's list of\n\
         ports, which is rule for rule what libvirt installs (tests compare them with a live libvirtd); libvirtd itself \
         takes a quarter of an\nhour to bind 500 ports.\n",
    );
    for (between, title) in BETWEEN {
        write!(text, "\n{title}:\n\n| other filtered ports | libvirt's rules | nwfilter | ratio |\n")?;
        text.push_str("| ---: | ---: | ---: | ---: |\n");
        for Rate { others, libvirt, ours } in measure(between)? {
            writeln!(text, "| {others} | {libvirt:.0} | {ours:.0} | {:.1} |", ours / libvirt)?;
        }
    }
    Ok(text)
}
