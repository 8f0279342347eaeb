//! The module filters with the backend that its own setting names, else libvirt's file, else with that of libvirt.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anyhow::Result;
use nwfilter_testlab::stream::{Stream, Tally, while_streaming};
use nwfilter_testlab::{Host, Libvirtd, LibvirtdOptions, Need, Tap, frames, skip_unless};

use common::{Module, driver_dir, install};

const CONF: &str = "/etc/libvirt/nwfilter.conf";
const GUEST: &str = "52:54:00:7b:35:93";
const PEER: &str = "52:54:00:00:00:09";
const BINDING: &str = "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
    <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='no-mac-spoofing'/></filterbinding>";

struct Lab {
    host: Host,
    guest: Tap,
    peer: Tap,
}

impl Lab {
    fn new() -> Result<Self> {
        let host = Host::new()?;
        let (guest, peer) = (host.tap("tap0")?, host.tap("tap1")?);
        Ok(Self { host, guest, peer })
    }

    fn has_table(&self) -> bool {
        self.host.run(&["nft", "list", "tables", "bridge"]).unwrap().contains("table bridge nwfilter")
    }

    /// Whether the native backend has rules, and whether the other has.
    fn held_by(&self) -> (bool, bool) {
        assert!(self.is_filtered());
        (self.has_table(), self.host.saved().unwrap().ebtables.contains("libvirt-I-tap0"))
    }

    fn is_filtered(&self) -> bool {
        let frame =
            |from: &str| frames::ethernet(from.parse().unwrap(), PEER.parse().unwrap(), 0x88b5, b"data");
        assert!(self.guest.delivers(&self.peer, &frame(GUEST)).unwrap());
        !self.guest.delivers(&self.peer, &frame(PEER)).unwrap()
    }
}

#[test]
fn the_module_takes_the_backend_of_its_own_setting_then_of_libvirts_file_then_libvirts_own() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    let dir = driver_dir(Module::Ours)?;
    let options = |env: &[(&str, &str)]| LibvirtdOptions {
        log_filters: Some("1:nwfilter".into()),
        env: env.iter().map(|(name, value)| (name.into(), value.into())).collect(),
        ..dir.options()
    };
    let mut daemon = Libvirtd::start_with(&lab.host, options(&[]))?;
    daemon.bind(BINDING)?;
    assert_eq!(lab.held_by(), (false, true), "{}", daemon.log());

    // Each start moves the ports with their guests running.
    daemon.write_file(CONF, "# libvirt's\nfirewall_backend = \"nftables\"\n")?;
    daemon.restart()?;
    daemon.virsh(&["nwfilter-binding-list"])?;
    assert_eq!(lab.held_by(), (true, false), "{}", daemon.log());
    daemon.write_file(CONF, "firewall_backend = \"iptables\"\n")?;
    daemon.restart()?;
    daemon.virsh(&["nwfilter-binding-list"])?;
    assert_eq!(lab.held_by(), (false, true), "{}", daemon.log());

    // What it cannot understand it does not guess.
    daemon.write_file(CONF, "firewall_backend = \"pf\"\n")?;
    daemon.restart()?;
    let refused = daemon.virsh(&["nwfilter-binding-list"]).unwrap_err().to_string();
    assert!(refused.contains("nwfilter.conf:1: firewall_backend is \"pf\""), "{refused}");
    assert_eq!(lab.held_by(), (false, true));
    daemon.stop()?;

    let daemon = Libvirtd::start_with(&lab.host, options(&[("NWFILTER_BACKEND", "nftables")]))?;
    daemon.write_file(CONF, "firewall_backend = \"iptables\"\n")?;
    daemon.bind(BINDING)?;
    // Rules of a port without binding are left; this daemon has other stores.
    assert!(lab.has_table(), "{}", daemon.log());
    Ok(())
}

/// Whether libvirt's driver has a backend for nftables (libvirt 12).
fn has_nftables_driver() -> Result<bool> {
    let said = std::process::Command::new("libvirtd").arg("--version").output()?.stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    let major = said.trim().rsplit(' ').next().and_then(|version| version.split('.').next());
    Ok(major.and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major >= 12))
}

#[test]
fn a_guest_that_libvirts_nftables_driver_filters_is_taken_over_and_handed_back() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"), Need::Tool("bridge"));
    if !has_nftables_driver()? {
        eprintln!("nothing to see: this libvirt, older than 12, has no nftables driver");
        return Ok(());
    }
    let lab = Lab::new()?;
    for (mac, port) in [(GUEST, "tap0"), (PEER, "tap1")] {
        lab.host.run(&["bridge", "fdb", "replace", mac, "dev", port, "master", "static"])?;
    }
    let libvirts_tables =
        || lab.host.run(&["nft", "list", "tables", "bridge"]).unwrap().contains("libvirt_nwfilter_ethernet");
    let dir = driver_dir(Module::Libvirts)?;
    let mut daemon = Libvirtd::start_with(&lab.host, common::options(&dir))?;
    daemon.write_file(CONF, "firewall_backend = \"nftables\"\n")?;
    daemon.restart()?;
    daemon.bind(BINDING)?;
    assert!(lab.is_filtered() && libvirts_tables(), "{}", daemon.log());

    let frame = |from: &str, text: &[u8]| {
        frames::ethernet(from.parse().unwrap(), PEER.parse().unwrap(), 0x88b5, text)
    };
    let stream = Stream {
        from: &lab.guest,
        to: &lab.peer,
        allowed: Box::new(|number| frame(GUEST, &number.to_be_bytes())),
        forbidden: vec![frame(PEER, b"spoofed")],
        rest: Duration::from_millis(1),
    };
    let mut exchange = |module: Module, backend: &str| -> Result<Tally> {
        while_streaming(std::slice::from_ref(&stream), |streaming| {
            daemon.stop()?;
            install(&dir, module)?;
            daemon.write_file(CONF, &format!("firewall_backend = \"{backend}\"\n"))?;
            daemon.start_again()?;
            daemon.virsh(&["nwfilter-binding-list"])?;
            streaming.take()
        })
    };
    for backend in ["nftables", "iptables"] {
        let taken_over = exchange(Module::Ours, backend)?;
        eprintln!("taken over with {backend}: {taken_over:?}");
        assert_eq!((taken_over.leaked, taken_over.lost), (0, 0), "{backend}: {taken_over:?}");
        assert!(!libvirts_tables(), "{}", lab.host.run(&["nft", "list", "ruleset"])?);
        assert_eq!(lab.held_by(), (backend == "nftables", backend == "iptables"));

        // Our rules stay beside libvirt's until somebody removes them.
        let handed_back = exchange(Module::Libvirts, "nftables")?;
        eprintln!("handed back from {backend}: {handed_back:?}");
        assert_eq!(handed_back.leaked, 0, "{backend}: {handed_back:?}");
        assert!(libvirts_tables());
        if backend == "nftables" {
            lab.host.run(&["nft", "delete", "table", "bridge", "nwfilter"])?;
            assert!(lab.is_filtered());
        }
    }
    Ok(())
}
