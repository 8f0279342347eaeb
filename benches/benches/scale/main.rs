//! A host with a thousand ports, each filtered by the seed filter. Needs root; takes some minutes.
//!
//! `cargo bench --bench scale -- attach rate` measures some of `memory`, `start`, `attach`, `repair`, `rate`, `backends` and `sets`,
//! else all. `backends` sets both backends side by side, `sets` does so for a large set.
//!
//! What is printed are ratios of two times of the same run, and whether they are as expected; nothing fails by a time.

mod backends;
mod sets;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nwfilter::{Config, Driver};
use nwfilter_benches::{binding, seed_filters};
use nwfilter_rules::{Batch, instantiate};
use nwfilter_testlab::rate::{Between, RateLab};
use nwfilter_testlab::{Host, Need, requirements};
use nwfilter_xml::write_binding_status;
use nwfilter_xtables::Xtables;
use nwfilter_xtables::restore_texts;

const PORTS: usize = 1000;
const FILTER: &str = "ftp-by-port";

/// How often what takes long is done, and what takes little.
const FEW: usize = 3;
const MANY: usize = 20;

/// How long a repair may take before it is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something measured, what was expected of it, and how it came about.
struct Row {
    what: &'static str,
    found: f64,
    expected: f64,
    /// Whether the expectation is the least that it may be, or the most.
    at_least: bool,
    unit: &'static str,
    from: String,
}

type Measure = fn() -> Result<Row>;

fn main() -> Result<()> {
    if let Err(missing) = requirements(&[Need::Root, Need::Tool("ip"), Need::Tool("ebtables-restore")]) {
        eprintln!("skipped: {missing}");
        return Ok(());
    }
    // The first is about this process before anything else needed memory.
    let all: [(&str, Measure); 8] = [
        ("memory", memory),
        ("start", cold_start),
        ("attach", one_more),
        ("repair", || repair("repair after iptables -F FORWARD", &["iptables", "-F", "FORWARD"])),
        ("repair", || {
            repair("repair after ebtables -F PREROUTING", &["ebtables", "-t", "nat", "-F", "PREROUTING"])
        }),
        ("rate", || rate("packet rate beside 1,000, of filtered guests", Between::Filtered)),
        ("rate", || rate("packet rate beside 1,000, of guests without filter", Between::Unfiltered)),
        ("rate", || rate("packet rate beside 1,000, of uplinks", Between::Uplinks)),
    ];
    let wanted: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let chosen = all.into_iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| w == name));
    let rows = chosen.map(|(_, measure)| measure()).collect::<Result<Vec<_>>>()?;
    if wanted.is_empty() || wanted.iter().any(|name| name == "backends") {
        backends::measure()?;
    }
    if wanted.is_empty() || wanted.iter().any(|name| name == "sets") {
        println!("A large set with both backends:\n");
        backends::print([sets::changes(backends::Kind::Nftables)?, sets::changes(backends::Kind::Xtables)?]);
    }
    if rows.is_empty() {
        return Ok(());
    }
    println!("| what | found | expected | met | from |\n| --- | ---: | ---: | --- | --- |");
    for Row { what, found, expected, at_least, unit, from } in rows {
        let (limit, met) = if at_least { ("≥", found >= expected) } else { ("≤", found <= expected) };
        let met = if met { "yes" } else { "no" };
        println!("| {what} | {found:.2}{unit} | {limit} {expected}{unit} | {met} | {from} |");
    }
    Ok(())
}

fn port(number: usize) -> String {
    format!("vnet{number}")
}

/// A host with no rules yet, and stores with bindings of so many ports.
struct Lab {
    host: Host,
    ports: usize,
    config: Config,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(ports: usize) -> Result<Self> {
        let (host, dir) = (Host::new()?, tempfile::tempdir()?);
        let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
        for dir in [&config.config_dir, &config.state_dir] {
            fs::create_dir(dir)?;
        }
        let seed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../xml-fixtures/seed/{FILTER}.xml"));
        fs::copy(seed, config.config_dir.join(format!("{FILTER}.xml")))?;
        for number in 0..ports {
            let text = write_binding_status(&binding(&port(number), FILTER)?);
            fs::write(config.state_dir.join(format!("{}.xml", port(number))), text)?;
        }
        // Only ports that have an interface get rules.
        host.ip(&(0..ports)
            .map(|number| format!("tuntap add dev {} mode tap", port(number)))
            .collect::<Vec<_>>())?;
        Ok(Self { host, ports, config, _dir: dir })
    }

    /// Opens a driver and brings the kernel to what the bindings ask for.
    fn start(&self) -> Result<Driver> {
        let driver = Driver::open(self.config.clone(), Xtables::default())?;
        let changed = self.host.enter(|| driver.reload())?.applied.changed.len();
        ensure!(changed == self.ports, "{changed} of {} ports were filtered", self.ports);
        Ok(driver)
    }

    /// Attaches a port that has an interface, and detaches it again. How long the first of the two took.
    fn attach(&self, driver: &Driver, port: &str) -> Result<Duration> {
        let binding = binding(port, FILTER)?;
        self.host.enter(|| {
            let begin = Instant::now();
            driver.create_binding(binding.clone())?;
            let taken = begin.elapsed();
            driver.delete_binding(&binding.port)?;
            Ok(taken)
        })
    }
}

/// The fastest run of each of two, which take turns so that a busy machine is busy for both.
fn fastest(
    runs: usize,
    mut one: impl FnMut() -> Result<Duration>,
    mut other: impl FnMut() -> Result<Duration>,
) -> Result<(Duration, Duration)> {
    let mut least = (Duration::MAX, Duration::MAX);
    for _ in 0..runs {
        least = (least.0.min(one()?), least.1.min(other()?));
    }
    Ok(least)
}

/// The memory that a process has which holds the driver.
fn memory() -> Result<Row> {
    let lab = Lab::new(PORTS)?;
    let _tap = lab.host.tap(&port(PORTS))?;
    let driver = lab.start()?;
    lab.attach(&driver, &port(PORTS))?;
    lab.host.enter(|| driver.reload())?;
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    let from = "VmRSS after a reload, an attach and a reload".to_owned();
    let found = kib / 1024.0;
    Ok(Row { what: "resident memory", found, expected: 64.0, at_least: false, unit: " MiB", from })
}

/// From a store of bindings and no rules to all rules, beside the tools alone with texts made before.
fn cold_start() -> Result<Row> {
    let (filters, mut batch) = (seed_filters()?, Batch::default());
    for number in 0..PORTS {
        let binding = binding(&port(number), FILTER)?;
        batch.filter(binding.port.clone(), Arc::new(instantiate(&filters, &binding)?));
    }
    let texts = restore_texts(&batch);
    let ours = || {
        let lab = Lab::new(PORTS)?;
        let begin = Instant::now();
        lab.start()?;
        Ok(begin.elapsed())
    };
    let tools = || {
        let host = Host::new()?;
        let begin = Instant::now();
        for (tool, text) in &texts {
            host.run_with_stdin(&[&format!("{tool}-restore"), "--noflush"], text)?;
        }
        Ok(begin.elapsed())
    };
    let (ours, tools) = fastest(FEW, ours, tools)?;
    Ok(ratio("start of all", ours, tools, 1.5, "the restore tools alone"))
}

/// One port more, beside the first of all.
fn one_more() -> Result<Row> {
    let (few, many) = (Lab::new(0)?, Lab::new(PORTS)?);
    let port = port(PORTS);
    let _taps = (few.host.tap(&port)?, many.host.tap(&port)?);
    let (first, last) = (few.start()?, many.start()?);
    let (last, first) = fastest(MANY, || many.attach(&last, &port), || few.attach(&first, &port))?;
    Ok(ratio("attach of the 1,001st port", last, first, 3.0, "of the first"))
}

fn ratio(what: &'static str, ours: Duration, base: Duration, expected: f64, of: &str) -> Row {
    let from = format!("{ours:.3?} / {base:.3?} {of}");
    let found = ours.as_secs_f64() / base.as_secs_f64();
    Row { what, found, expected, at_least: false, unit: "", from }
}

/// What others do to the rules of all ports, until it is undone.
fn repair(what: &'static str, damage: &[&str]) -> Result<Row> {
    let lab = Lab::new(PORTS)?;
    let driver = lab.start()?;
    let reconciler = lab.host.enter(|| driver.keep())?;
    let mut least = Duration::MAX;
    for number in 1..=FEW as u64 {
        lab.host.run(damage)?;
        let begin = Instant::now();
        while reconciler.repairs() < number {
            ensure!(begin.elapsed() < PATIENCE, "no repair within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        least = least.min(begin.elapsed());
    }
    let from = format!("least of {FEW}, beside {PORTS} ports");
    Ok(Row { what, found: least.as_secs_f64(), expected: 1.0, at_least: false, unit: " s", from })
}

/// Frames forwarded beside many ports, and beside few.
fn rate(what: &'static str, between: Between) -> Result<Row> {
    let filters = seed_filters()?;
    let rate = |others: usize| -> Result<f64> {
        let lab = RateLab::new(others, between)?;
        lab.filter(&Xtables::default(), &filters, "ftp-by-state")?;
        lab.frames_a_second(Duration::from_millis(200))
    };
    let (few, many) = (rate(10)?, rate(PORTS)?);
    let from = format!("{many:.0} / {few:.0} frames/s beside 10");
    Ok(Row { what, found: many / few, expected: 0.9, at_least: true, unit: "", from })
}
