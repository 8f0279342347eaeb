//! How long a guest takes to start, with a filter and without, under libvirt's module and under ours.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nwfilter_testlab::{Connect, DriverDir, Host, Libvirtd};

use crate::install_module;

/// How often a guest is started. The median counts.
const STARTS: usize = 7;

/// The time without a filter, and with one.
struct Starts {
    open: Duration,
    filtered: Duration,
}

/// Measures, and writes a section of the report.
pub(super) fn section() -> Result<String> {
    let module = install_module::build()?;
    let libvirts = starts(|dir| dir.install_libvirts())?;
    let ours = starts(|dir| dir.install(&module))?;
    let mut text = format!(
        "\n## Starting a guest\n\n`virsh create` of a QEMU guest (TCG, no disk) with one interface, median of {STARTS}. \
         The filter is `clean-traffic`.\n\n\
         | module | without a filter | with it | what the filter adds |\n| --- | ---: | ---: | ---: |\n"
    );
    for (name, Starts { open, filtered }) in [("libvirt's own", &libvirts), ("this one", &ours)] {
        let added = filtered.saturating_sub(*open);
        writeln!(text, "| {name} | {open:.2?} | {filtered:.2?} | {added:.2?} |")?;
    }
    Ok(text)
}

/// Starts guests in a libvirtd with the nwfilter driver that is installed in its directory of modules.
fn starts(install: impl Fn(&DriverDir) -> Result<()>) -> Result<Starts> {
    let (host, modules, dir) = (Host::new()?, DriverDir::without_nwfilter()?, tempfile::tempdir()?);
    install(&modules)?;
    let daemon = Libvirtd::start_with(&host, modules.options())?;
    let filterref = "<filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.1'/></filterref>";
    let median = |filterref: &str| -> Result<Duration> {
        let mut times: Vec<_> =
            (0..STARTS).map(|_| start(&daemon, dir.path(), filterref)).collect::<Result<_>>()?;
        times.sort();
        println!("  {:.2?}", times[STARTS / 2]);
        Ok(times[STARTS / 2])
    };
    // What only the first start takes is nobody's.
    start(&daemon, dir.path(), filterref)?;
    Ok(Starts { open: median("")?, filtered: median(filterref)? })
}

/// How long a guest takes to start; it is destroyed then.
fn start(daemon: &Libvirtd, dir: &Path, filterref: &str) -> Result<Duration> {
    let file = dir.join("guest.xml");
    fs::write(
        &file,
        format!(
            "<domain type='qemu'><name>guest</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
             <interface type='bridge'><source bridge='br0'/><mac address='52:54:00:00:01:01'/><target dev='tap1'/>
             <model type='virtio'/>{filterref}</interface><memballoon model='none'/></devices></domain>"
        ),
    )?;
    let begin = Instant::now();
    daemon.virsh_on(Connect::Qemu, &["create", file.to_str().context("a path that is no text")?])?;
    let taken = begin.elapsed();
    daemon.virsh_on(Connect::Qemu, &["destroy", "guest"])?;
    Ok(taken)
}
