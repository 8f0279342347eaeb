//! What one process leaves of the tables for the next: it is believed for as long as nothing has changed, and no longer.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nwfilter_rules::{Applied, Backend, Batch, Installed, instantiate};
use nwfilter_testlab::{Host, Need, Tools, skip_unless};
use nwfilter_xml::{Filter, FilterName, PortDev, read_binding, read_filter};
use nwfilter_xtables::{Xtables, generation};

const FILTER: &str = "<filter name='f'><rule action='drop' direction='inout'><tcp dstportstart='80'/></rule>\
                      <rule action='drop' direction='in'><mac protocolid='0x88cc'/></rule></filter>";

/// A host, and the file that processes leave for each other.
struct Lab {
    host: Host,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Result<Self> {
        Ok(Self { host: Host::new()?, dir: tempfile::tempdir()? })
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join(".tables")
    }

    /// What a process does that starts, filters ports, and ends.
    fn filter(&self, ports: &[&str]) -> Result<Applied> {
        Ok(self.host.enter(|| process(self.dir.path()).apply(&batch(ports)))?)
    }

    /// What a process that starts now takes for installed.
    fn believed(&self) -> Result<Installed> {
        Ok(self.host.enter(|| process(self.dir.path()).installed())?)
    }

    fn real(&self) -> Result<Installed> {
        Ok(self.host.enter(|| Xtables::default().installed())?)
    }
}

fn process(directory: &Path) -> Xtables {
    Xtables::default().remembering_in(directory)
}

fn batch(ports: &[&str]) -> Batch {
    let filter = read_filter("f.xml", FILTER).into_result().unwrap();
    let filters: BTreeMap<FilterName, Arc<Filter>> = [(filter.name.clone(), Arc::new(filter))].into();
    let mut batch = Batch::default();
    for port in ports {
        let text = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
             <portdev name='{port}'/><mac address='52:54:00:00:00:01'/><filterref filter='f'/></filterbinding>"
        );
        let binding = read_binding("binding", &text).into_result().unwrap();
        batch.filter(binding.port.clone(), Arc::new(instantiate(&filters, &binding).unwrap()));
    }
    batch
}

fn ports(names: &[&str]) -> BTreeSet<PortDev> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

/// Takes a port out of what a file says of the tables.
fn lie(file: &Path, port: &str) -> Result<()> {
    let text = fs::read_to_string(file)?;
    ensure!(text.contains(port), "{text}");
    let kept: String =
        text.lines().filter(|line| !line.contains(port)).map(|line| format!("{line}\n")).collect();
    Ok(fs::write(file, kept)?)
}

#[test]
fn the_next_process_begins_with_what_the_last_one_knew() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    lab.filter(&["vnet0", "vnet1"])?;
    lab.filter(&["vnet2"])?;
    assert_eq!(lab.believed()?, lab.real()?);
    assert_eq!(lab.real()?.ports, ports(&["vnet0", "vnet1", "vnet2"]));
    // Nothing but the file can have told it this.
    lie(&lab.file(), "vnet1")?;
    assert_eq!(lab.believed()?.ports, ports(&["vnet0", "vnet2"]));
    Ok(())
}

#[test]
fn what_others_change_is_read() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    lab.filter(&["vnet0", "vnet1"])?;
    lie(&lab.file(), "vnet1")?;
    lab.host.run(&["iptables", "-N", "anything"])?;
    assert_eq!(lab.believed()?, lab.real()?);
    assert_eq!(lab.real()?.ports, ports(&["vnet0", "vnet1"]));
    Ok(())
}

#[test]
fn what_was_true_in_another_namespace_is_read() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let (lab, other) = (Lab::new()?, Lab::new()?);
    lab.filter(&["vnet0"])?;
    fs::copy(lab.file(), other.file())?;
    let number = lab.host.enter(generation)?;
    while other.host.enter(generation)? < number {
        other.host.run(&["iptables", "-N", &format!("chain{}", other.host.enter(generation)?)])?;
    }
    assert_eq!(other.host.enter(generation)?, number);
    assert_eq!(other.believed()?.ports, ports(&[]));
    Ok(())
}

#[test]
fn a_cache_file_that_led_to_a_refusal_is_not_used_again() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    lab.filter(&["vnet0"])?;
    // A rule that is said to be there cannot be deleted.
    let text = fs::read_to_string(lab.file())?;
    let more = "-A libvirt-in -m physdev --physdev-in vnet9 -g FI-vnet9\n";
    let told = text.replacen("-A libvirt-in ", &format!("{more}-A libvirt-in "), 1);
    ensure!(told != text, "{text}");
    fs::write(lab.file(), told)?;
    let mut gone = batch(&["vnet1"]);
    gone.remove("vnet9".parse()?);
    lab.host.enter(|| process(lab.dir.path()).apply(&gone))?;
    assert_eq!(lab.believed()?, lab.real()?);
    assert_eq!(lab.real()?.ports, ports(&["vnet0", "vnet1"]));
    Ok(())
}

#[test]
fn no_file_is_no_reason_to_fail() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    let nowhere = lab.dir.path().join("no/such/directory");
    lab.host.enter(|| process(&nowhere).apply(&batch(&["vnet0"])))?;
    fs::write(lab.file(), "tables of boot\n")?;
    lab.filter(&["vnet1"])?;
    assert_eq!(lab.believed()?, lab.real()?);
    assert_eq!(lab.real()?.ports, ports(&["vnet0", "vnet1"]));
    Ok(())
}

/// Where the save tools note that they were run, beside them.
const NOTES: &str = "notes";

#[test]
fn only_changed_chains_are_read_while_changes_are_followed() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let tools = Tools::new()?;
    for tool in ["iptables-save", "ip6tables-save", "ebtables-save"] {
        let notes = tools.path().join(NOTES);
        tools.script(tool, &format!("echo {tool} >> {}\nexec $REAL \"$@\"\n", notes.display()))?;
    }
    tools.run_test("with_save_tools_that_note_that_they_ran")
}

#[test]
#[ignore = "run by the test of who follows the changes"]
fn with_save_tools_that_note_that_they_ran() -> Result<()> {
    let notes = Tools::of_this_test()?.join(NOTES);
    let host = Host::new()?;
    let backend = Xtables::default();
    let mut watch = host.enter(|| backend.watch())?.context("no watch")?;
    // Which tools a look at the tables runs, after somebody did something.
    let mut read_after = |command: &str, followed: bool| -> Result<Vec<String>> {
        host.run(&command.split(' ').collect::<Vec<_>>())?;
        if followed {
            host.enter(|| watch.changes())?;
        }
        let _ = fs::remove_file(&notes);
        let believed = host.enter(|| backend.installed())?;
        let text = fs::read_to_string(&notes).unwrap_or_default();
        assert_eq!(believed, host.enter(|| Xtables::default().installed())?, "{command}");
        let mut tools: Vec<_> = text.lines().map(str::to_owned).collect();
        tools.sort();
        Ok(tools)
    };
    const ALL: [&str; 3] = ["ebtables-save", "ip6tables-save", "iptables-save"];
    const NONE: [&str; 0] = [];
    assert_eq!(read_after("true", true)?, ALL);
    host.enter(|| backend.apply(&batch(&["vnet0", "vnet1"])))?;
    assert!(read_after("true", true)?.is_empty(), "what it did itself it knows");
    for (command, read) in [
        ("nft add table inet other", &[][..]),
        ("iptables -t nat -A PREROUTING -j ACCEPT", &[]),
        ("iptables -N theirs", &["iptables-save"]),
        ("iptables -A theirs -j ACCEPT", &[]),
        ("iptables -I FORWARD 1 -j theirs", &[]),
        ("ip6tables -A INPUT -j ACCEPT", &["ip6tables-save"]),
        ("ip6tables -A INPUT -j RETURN", &[]),
        ("iptables -F FO-vnet1", &[]),
        ("iptables -E FI-vnet0 FI-vnet5", &["iptables-save"]),
        ("ebtables -t nat -F POSTROUTING", &[]),
        ("ebtables -t nat -F libvirt-O-vnet1", &["ebtables-save"]),
        ("ebtables -t nat -N theirs", &["ebtables-save"]),
        ("nft flush ruleset", &ALL),
    ] {
        assert_eq!(read_after(command, true)?, read, "{command}");
    }
    assert_eq!(read_after("iptables -N theirs", false)?, ALL, "nobody was told");

    // More than the kernel keeps for who follows: nothing is known of what came at the same time.
    assert_eq!(read_after("true", true)?, NONE);
    let rules =
        "-A theirs -m comment --comment 0123456789012345678901234567890123456789 -j DROP\n".repeat(8000);
    for _ in 0..8 {
        host.run_with_stdin(&["iptables-restore", "-n"], &format!("*filter\n:theirs -\n{rules}COMMIT\n"))?;
    }
    assert_eq!(read_after("iptables -F FORWARD", true)?, ALL);
    assert_eq!(read_after("iptables -P FORWARD DROP", true)?, ALL, "it may have begun before");
    assert_eq!(read_after("iptables -I FORWARD 1 -j ACCEPT", true)?, NONE);
    Ok(())
}
