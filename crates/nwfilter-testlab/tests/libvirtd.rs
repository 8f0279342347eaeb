//! A live libvirtd in a host.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use anyhow::Result;
use nwfilter_testlab::{Connect, Host, Libvirtd, LibvirtdOptions, Need, Tool, skip_unless};

fn binding(port: &str, filter: &str) -> String {
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'>\
         <parameter name='IP' value='10.0.0.2'/></filterref></filterbinding>"
    )
}

#[test]
fn a_binding_makes_the_chains_of_its_port_and_unbinding_removes_them() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let host = Host::new()?;
    let _taps = (host.tap("tap0")?, host.tap("tap1")?);
    let daemon = Libvirtd::start(&host)?;
    assert!(daemon.dumpxml("clean-traffic")?.contains("no-mac-spoofing"));

    daemon.bind(&binding("tap0", "clean-traffic"))?;
    let one = host.saved()?;
    let nat = one.table(Tool::Ebtables, "nat");
    assert!(nat.contains(&":libvirt-I-tap0 ACCEPT".to_owned()), "{nat:?}");
    assert!(nat.contains(&"-A PREROUTING -i tap0 -j libvirt-I-tap0".to_owned()));
    assert!(daemon.binding_dumpxml("tap0")?.contains("10.0.0.2"));

    daemon.bind(&binding("tap1", "clean-traffic"))?;
    let two = host.saved()?;
    assert_eq!(two.port("tap0"), one.port("tap0"));
    assert_eq!(two.port("tap1").ebtables, two.port("tap0").ebtables.replace("tap0", "tap1"));

    daemon.unbind("tap1")?;
    assert_eq!(one.diff(&host.saved()?), None);
    daemon.unbind("tap0")?;
    assert!(host.saved()?.port("tap0").is_empty());
    Ok(())
}

#[test]
fn two_daemons_run_side_by_side_and_know_nothing_of_each_other() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let hosts = (Host::new()?, Host::new()?);
    let _taps = (hosts.0.tap("tap0")?, hosts.1.tap("tap0")?);
    let bare = LibvirtdOptions { keep_stock_filters: false, ..Default::default() };
    let one = Libvirtd::start(&hosts.0)?;
    let two = Libvirtd::start_with(&hosts.1, bare)?;
    one.bind(&binding("tap0", "no-mac-spoofing"))?;
    assert!(!hosts.0.saved()?.is_empty());
    assert!(hosts.1.saved()?.is_empty());
    assert_eq!(two.virsh(&["nwfilter-list", "--name"]).unwrap_or_default().trim(), "");
    assert!(two.bind(&binding("tap0", "no-mac-spoofing")).is_err());
    Ok(())
}

#[test]
fn errors_are_those_of_virsh_and_a_batch_tells_which() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let host = Host::new()?;
    let daemon = Libvirtd::start(&host)?;
    let error = daemon.dumpxml("nosuch").unwrap_err();
    assert!(error.to_string().contains("no nwfilter with matching name 'nosuch'"), "{error}");

    let command = |name: &str| vec!["nwfilter-dumpxml".to_owned(), name.to_owned()];
    let results = daemon.virsh_batch(&[command("allow-arp"), command("nosuch"), command("allow-ipv4")])?;
    let [Ok(arp), Err(nosuch), Ok(ipv4)] = &results[..] else { panic!("{results:?}") };
    assert_eq!(*arp, daemon.dumpxml("allow-arp")?);
    assert_eq!(*ipv4, daemon.dumpxml("allow-ipv4")?);
    assert!(nosuch.to_string().contains("'nosuch'"), "{nosuch}");
    assert!(daemon.virsh_batch(&[command("allow-arp"), vec!["nonsense".into()]]).is_err());
    Ok(())
}

#[test]
fn filters_outlive_the_daemon() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let host = Host::new()?;
    let mut daemon = Libvirtd::start(&host)?;
    daemon.define("<filter name='mine' chain='root'/>")?;
    let file = "/etc/libvirt/nwfilter/mine.xml";
    let text = daemon.read_file(file)?;
    assert!(text.contains("name='mine'"), "{text}");
    assert!(!fs::exists(file)?, "the machine's own files stay as they are");

    daemon.kill()?;
    assert!(daemon.virsh(&["nwfilter-list"]).is_err());
    daemon.write_file(file, &text.replace("chain='root'", "chain='arp'"))?;
    daemon.start_again()?;
    assert!(daemon.dumpxml("mine")?.contains("chain='arp'"));

    daemon.undefine("mine")?;
    daemon.restart()?;
    assert!(daemon.dumpxml("mine").is_err());
    assert!(daemon.read_file("/etc/hostname").is_err());
    daemon.stop()?;
    assert!(daemon.stop().is_err());
    Ok(())
}

#[test]
fn nothing_is_left_of_a_dropped_daemon() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let host = Host::new()?;
    let daemon = Libvirtd::start(&host)?;
    let (pid, state) = (daemon.pid().unwrap(), daemon.path("/etc/libvirt")?);
    assert_eq!(host.pids(), [pid]);
    drop(daemon);
    assert!(host.pids().is_empty());
    assert!(!state.exists() && !state.parent().unwrap().exists());
    Ok(())
}

#[test]
fn a_daemon_that_cannot_start_shows_its_log() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let host = Host::new()?;
    let mut daemon = Libvirtd::start(&host)?;
    daemon.stop()?;
    daemon.write_file("/etc/libvirt/libvirtd.conf", "no configuration")?;
    let error = format!("{:#}", daemon.start_again().unwrap_err());
    assert!(error.contains("libvirtd.conf:1"), "{error}");
    Ok(())
}

#[test]
fn a_real_guest_starts_under_the_qemu_driver() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Qemu);
    let host = Host::new()?;
    let qemu = LibvirtdOptions { qemu_conf: true, ..Default::default() };
    let daemon = Libvirtd::start_with(&host, qemu)?;
    daemon.write_file(
        "/etc/libvirt/guest.xml",
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64'>hvm</type></os><devices><interface type='bridge'><source bridge='br0'/>\
         <mac address='52:54:00:7b:35:93'/><model type='virtio'/><filterref filter='clean-traffic'>\
         <parameter name='IP' value='10.0.0.2'/></filterref></interface></devices></domain>",
    )?;
    let file = daemon.path("/etc/libvirt/guest.xml")?;
    daemon.virsh_on(Connect::Qemu, &["create", file.to_str().unwrap()])?;
    assert!(daemon.virsh(&["nwfilter-binding-list"])?.contains("vnet0"));
    assert!(host.saved()?.port("vnet0").ebtables.contains("libvirt-I-vnet0"));
    daemon.virsh_on(Connect::Qemu, &["destroy", "guest"])?;
    assert!(host.saved()?.port("vnet0").is_empty());
    Ok(())
}
