//! `cargo xtask compare`: the same jobs by the installed libvirtd and by this driver, in one run.

mod rates;
mod starts;

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nwfilter_testlab::{Host, Libvirtd, Tap};

use crate::packages::{DEMO, TEST, ensure_installed};

const FILTER: &str = include_str!("../../xml-fixtures/seed/ftp-by-port.xml");

/// What stands behind this line was measured by hand, and stays.
const BY_HAND: &str = "\n<!-- What follows is not written by `cargo xtask compare`. -->\n";

/// One job, and how long each took for it.
struct Row {
    job: String,
    libvirt: Duration,
    ours: Duration,
}

/// Measures with `ports` ports and writes docs/performance.md.
pub(crate) fn run(ports: usize) -> Result<ExitCode> {
    ensure_installed(&[DEMO, TEST])?;
    ensure!(ports > 1, "at least 2 ports are needed");
    let ctl = build_ctl()?;
    let dir = tempfile::tempdir()?;
    println!("libvirtd: about {:.0} minutes", ports as f64 * 7.0 / 60.0 + 0.2);
    let theirs = libvirt(ports, dir.path())?;
    println!("nwfilter");
    let ours = nwfilter(ports, dir.path(), &ctl)?;
    let jobs = [
        "attach the seed filter to one port".to_owned(),
        format!("attach it to {} more, one after the other", ports - 1),
        format!("redefine the filter that {ports} ports share"),
        format!("restart with {ports} ports, until requests are served"),
    ];
    let rows: Vec<_> = jobs
        .into_iter()
        .zip(theirs.into_iter().zip(ours))
        .map(|(job, (libvirt, ours))| Row { job, libvirt, ours })
        .collect();
    println!("starting a guest");
    let starts = starts::section()?;
    println!("packets a second");
    let report = [report(&rows)?, starts, rates::section()?].concat();
    print!("{report}");
    fs::create_dir_all("docs")?;
    let file = Path::new("docs/performance.md");
    let old = fs::read_to_string(file).unwrap_or_default();
    let by_hand = old.find(BY_HAND).map_or("", |start| &old[start + BY_HAND.len()..]);
    fs::write(file, report + BY_HAND + by_hand)
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(ExitCode::SUCCESS)
}

fn build_ctl() -> Result<PathBuf> {
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let args = ["build", "--release", "--quiet", "--package", "nwfilterctl"];
    ensure!(Command::new(cargo).args(args).status()?.success(), "nwfilterctl does not build");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    Ok(target.join("release/nwfilterctl").canonicalize()?)
}

fn port(index: usize) -> String {
    format!("vnet{index}")
}

fn binding(index: usize) -> String {
    format!(
        "<filterbinding><owner><name>guest{index}</name><uuid>d54df46f-1ab5-4a22-8618-{index:012x}</uuid></owner>
<portdev name='{}'/><mac address='52:54:00:00:{:02x}:{:02x}'/>
<filterref filter='ftp-by-port'><parameter name='IP' value='10.0.{}.{}'/></filterref></filterbinding>",
        port(index),
        index / 256,
        index % 256,
        index / 250,
        index % 250 + 1,
    )
}

/// The filter with one more rule.
fn changed_filter() -> String {
    FILTER.replace(
        "<!-- nothing else -->",
        "<rule action='accept' direction='in'><tcp dstportstart='443'/></rule>",
    )
}

fn host(ports: usize) -> Result<(Host, Vec<Tap>)> {
    let host = Host::new()?;
    let taps = (0..ports).map(|index| host.tap(&port(index))).collect::<Result<_>>()?;
    Ok((host, taps))
}

fn timed(job: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    job()?;
    let took = start.elapsed();
    println!("  {took:.2?}");
    Ok(took)
}

fn libvirt(ports: usize, dir: &Path) -> Result<[Duration; 4]> {
    let (host, _taps) = host(ports)?;
    let mut daemon = Libvirtd::start(&host)?;
    daemon.define(FILTER)?;
    let one = timed(|| daemon.bind(&binding(0)))?;
    let rest = timed(|| (1..ports).try_for_each(|index| daemon.bind(&binding(index))))?;
    // libvirt replaces a filter only under its own UUID.
    let dumped = daemon.dumpxml("ftp-by-port")?;
    let uuid = dumped.lines().find(|line| line.contains("<uuid>")).context("the filter has no UUID")?;
    let changed = changed_filter().replacen("<!-- no spoofing", &format!("{uuid}<!-- no spoofing"), 1);
    fs::write(dir.join("changed.xml"), &changed)?;
    let redefine = timed(|| daemon.define(&changed))?;
    let restart = timed(|| {
        daemon.restart()?;
        daemon.virsh(&["nwfilter-binding-list"]).map(drop)
    })?;
    Ok([one, rest, redefine, restart])
}

fn nwfilter(ports: usize, dir: &Path, ctl: &Path) -> Result<[Duration; 4]> {
    let (host, _taps) = host(ports)?;
    // In memory, as /run is on a host.
    let state = tempfile::tempdir_in("/dev/shm")?;
    let run = |args: &[&str]| -> Result<()> {
        let mut command = host.command(ctl);
        command.current_dir(dir).args(["--config-dir", "filters", "--state-dir"]).arg(state.path());
        let output = command.args(args).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let bind = |index: usize| {
        fs::write(dir.join("binding.xml"), binding(index))?;
        run(&["binding-create", "binding.xml"])
    };
    fs::write(dir.join("filter.xml"), FILTER)?;
    fs::write(dir.join("changed.xml"), changed_filter())?;
    run(&["define", "filter.xml"])?;
    let one = timed(|| bind(0))?;
    let rest = timed(|| (1..ports).try_for_each(bind))?;
    let redefine = timed(|| run(&["define", "changed.xml"]))?;
    let before = host.saved()?;
    let restart = timed(|| run(&["reload"]))?;
    ensure!(host.saved()? == before, "a reload with nothing to do changed the kernel");
    Ok([one, rest, redefine, restart])
}

fn report(rows: &[Row]) -> Result<String> {
    let version =
        Command::new("libvirtd").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    let mut text = String::from(
        "# Performance\n\nWritten by `cargo xtask compare`: libvirtd and nwfilter did the same jobs one after the other \
         in one run, each in a\nnetwork namespace of its own, each job by its command line tool (`virsh`, \
         `nwfilterctl`). The machines these runs are made on are\nshared, so the ratios say more than the times.\n\n",
    );
    writeln!(text, "| job | {} | nwfilter | ratio |\n| --- | ---: | ---: | ---: |", version.trim())?;
    for Row { job, libvirt, ours } in rows {
        let ratio = libvirt.as_secs_f64() / ours.as_secs_f64();
        writeln!(text, "| {job} | {libvirt:.2?} | {ours:.2?} | {ratio:.0} |")?;
    }
    Ok(text)
}
