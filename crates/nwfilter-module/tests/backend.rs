//! The module filters with the backend that its own setting names, else libvirt's file, else with that of libvirt.

#![allow(clippy::unwrap_used)]

mod common;

use anyhow::Result;
use nwfilter_testlab::{Host, Libvirtd, LibvirtdOptions, Need, Tap, frames, skip_unless};

use common::{Module, driver_dir};

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
