//! `cargo xtask demo`: the main job, on this machine, in namespaces that are gone afterwards. It uses the native backend where
//! the kernel tracks bridged connections, as that of the virtual machine does.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;
use nwfilter::xml::{Binding, read_binding};
use nwfilter::{Config, Driver};
use nwfilter_nftables::Nftables;
use nwfilter_testlab::Host;
use nwfilter_testlab::seed::{Check, SeedLab};
use nwfilter_xtables::{Xtables, restore_text};

use crate::interrupt::interruptible;
use crate::packages::{DEMO, ensure_installed};

const FILTER: (&str, &str) = ("ftp-by-port", include_str!("../../xml-fixtures/seed/ftp-by-port.xml"));

/// Runs the demonstration; exit code 0 only if everything was as the manual promises.
pub(crate) fn run() -> Result<ExitCode> {
    ensure!(
        Uid::effective().is_root(),
        "network namespaces need root: run `sudo -E env PATH=$PATH cargo xtask demo`"
    );
    ensure_installed(&[DEMO])?;
    interruptible(demonstrate)
}

fn demonstrate() -> Result<ExitCode> {
    let (name, filter) = FILTER;
    println!("building a host: a bridge, a guest that serves FTP, HTTP and SSH, a client outside");
    let lab = SeedLab::new()?;
    let dir = tempfile::tempdir()?;
    let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
    // Asked within the host: whatever the kernel loads to answer, loads for all namespaces.
    let driver = match lab.host().enter(nwfilter_nftables::check_kernel) {
        Ok(()) => {
            println!("backend nftables: this kernel tracks bridged connections, and needs no br_netfilter");
            lab.host().set_bridge_nf(false)?;
            Driver::open(config, Nftables::new())?
        }
        Err(why) => {
            println!("backend xtables: {why}");
            Driver::open(config, Xtables::default())?
        }
    };
    println!("defining the filter '{name}' of the libvirt manual");
    driver.define_filter(name, filter)?;
    let bindings = SeedLab::PORTS.map(|port| read_binding(port, &lab.binding(port, name)).into_result());
    let mut attach = Duration::MAX;
    for binding in bindings {
        let binding = binding?;
        println!("attaching it to the port {} of the guest '{}'", binding.port, binding.owner.name);
        let (took, applied) = lab.host().enter(|| {
            let start = Instant::now();
            driver.create_binding(binding).map(|applied| (start.elapsed(), applied))
        })?;
        applied.warnings.iter().for_each(|warning| println!("  warning: {warning}"));
        println!("  {} transactions in {took:.1?}", applied.commits);
        attach = attach.min(took);
    }
    println!("trying what gets through");
    let checks = lab.checks(|check| println!("  {} … {}", check.what, check.seen))?;
    println!("attaching the same rules with one process a rule, for comparison");
    let binding = driver.binding(&SeedLab::PORTS[0].parse()?)?;
    let (rules, slow) = one_process_a_rule(&restore_text(&binding.port, &driver.ruleset(&binding)?))?;
    lab.host().enter(|| {
        let bindings = driver.bindings()?;
        bindings.iter().try_for_each(|binding| driver.delete_binding(&binding.port).map(drop))
    })?;
    let trace = traces(lab.host(), &binding)?;
    print_table(&checks);
    let ratio = slow.as_secs_f64() / attach.as_secs_f64();
    println!("attach time        {attach:.1?}");
    println!("one process a rule {slow:.1?}   ({rules} processes, {ratio:.0} times as long)");
    println!(
        "left in the kernel after detaching: {}",
        if trace { "something of the port" } else { "nothing of the ports" }
    );
    let broken = checks.iter().filter(|check| !check.holds()).count();
    if broken == 0 && !trace {
        println!("everything is as the manual promises");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{broken} of {} are not as the manual promises", checks.len());
    Ok(ExitCode::FAILURE)
}

/// Whether a rule or chain of a port is left.
fn traces(host: &Host, binding: &Binding) -> Result<bool> {
    let port = binding.port.as_str();
    let raw = host.run(&["iptables-save", "-t", "raw"])?;
    let native = host.run(&["nft", "list", "ruleset"])?;
    let is_named = native.contains(&format!("\"{port}\""));
    Ok(!host.saved()?.port(port).is_empty() || raw.contains(&format!("CT-{port}")) || is_named)
}

/// Makes the rules of a restore text in a namespace of their own, the way that needs no restore tool; how many
/// processes that were and how long they took.
fn one_process_a_rule(text: &str) -> Result<(usize, Duration)> {
    let host = Host::new()?;
    let mut commands: Vec<Vec<&str>> = Vec::new();
    let (mut tool, mut table) = ("", "");
    for line in text.lines() {
        if let Some(restore) = line.strip_prefix("# ") {
            tool = restore.split_once("-restore").map_or("", |(tool, _)| tool);
        } else if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            let chain = chain.split(' ').next().unwrap_or(chain);
            commands.push(vec![tool, "-t", table, "-N", chain]);
        } else if line.starts_with('-') {
            commands.push([tool, "-t", table].into_iter().chain(line.split(' ')).collect());
        }
    }
    let start = Instant::now();
    for command in &commands {
        host.run(command).with_context(|| command.join(" "))?;
    }
    Ok((commands.len(), start.elapsed()))
}

fn print_table(checks: &[Check]) {
    let width = checks.iter().map(|check| check.what.len()).max().unwrap_or(0);
    println!("\n{:width$}   expected   seen", "what was tried");
    println!("{}", "-".repeat(width + 23));
    for Check { what, expected, seen } in checks {
        let mark = if expected == seen { "" } else { "   <- not as promised" };
        println!("{what:width$}   {expected:8}   {seen:8}{mark}");
    }
    println!();
}
