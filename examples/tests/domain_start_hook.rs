//! The hook in a live libvirtd that has no nwfilter driver, with QEMU guests.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nwfilter_testlab::{Connect, DriverDir, Host, Libvirtd, Mac, Need, Saved, skip_unless};
use tempfile::TempDir;

const MAC: Mac = Mac::new([0x52, 0x54, 0, 0, 4, 1]);
const HOOK: &str = "/etc/libvirt/hooks/qemu";

/// A libvirtd with the hook.
struct World {
    libvirtd: Libvirtd,
    _modules: DriverDir,
    dir: TempDir,
    host: Host,
}

impl World {
    fn new() -> Result<Self> {
        let (host, dir) = (Host::new()?, tempfile::tempdir()?);
        let modules = DriverDir::without_nwfilter()?;
        let libvirtd = Libvirtd::start_with(&host, modules.options())?;
        let mut world = Self { libvirtd, _modules: modules, dir, host };
        world.install_hook()?;
        Ok(world)
    }

    fn install_hook(&mut self) -> Result<()> {
        let dir = self.dir.path().display();
        let hook = env!("CARGO_BIN_EXE_domain-start-hook");
        let script = format!(
            "#!/bin/sh\necho \"$@\" >>{dir}/calls\n\
             NWFILTER_CONFIG_DIR={dir}/etc NWFILTER_STATE_DIR={dir}/run exec {hook} \"$@\"\n"
        );
        self.libvirtd.write_file(HOOK, &script)?;
        fs::set_permissions(self.libvirtd.path(HOOK)?, Permissions::from_mode(0o755))?;
        self.libvirtd.restart()
    }

    fn start(&self, filter: &str) -> Result<()> {
        let file = self.dir.path().join("guest.xml");
        fs::write(&file, guest(filter))?;
        let path = file.to_str().context("a path that is no text")?;
        self.libvirtd.virsh_on(Connect::Qemu, &["create", path]).map(drop)
    }

    fn port(&self) -> Result<Saved> {
        Ok(self.host.saved()?.port("tap1"))
    }

    fn calls(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.path().join("calls"))?)
    }
}

fn guest(filter: &str) -> String {
    format!(
        "<domain type='qemu'><name>vm1</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
         <metadata><nwf:filterrefs xmlns:nwf='{}'><nwf:interface mac='{MAC}'><nwf:filterref filter='{filter}'>
         <nwf:parameter name='IP' value='10.0.0.2'/></nwf:filterref></nwf:interface></nwf:filterrefs></metadata>
         <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='network'/></os><devices>
         <interface type='bridge'><source bridge='br0'/><mac address='{MAC}'/><target dev='tap1'/>
         <model type='virtio'/></interface><memballoon model='none'/></devices></domain>",
        nwfilter::xml::METADATA_NAMESPACE
    )
}

#[test]
fn a_guest_is_filtered_before_its_first_frame_until_its_end() -> Result<()> {
    skip_unless!(Need::Root, Need::Qemu);
    let mut world = World::new()?;
    let probe = world.host.tap("probe")?;
    world.start("clean-traffic")?;
    let filtered = world.port()?;
    assert!(filtered.ebtables.contains(&MAC.to_string()));

    // The firmware asks for an address from 0.0.0.0, which is not the guest's.
    let asks =
        |frame: &[u8]| frame.get(6..12) == Some(&MAC.octets()[..]) && frame.get(12..14) == Some(&[8, 0]);
    let heard = probe.expect(Duration::from_secs(8), asks)?;
    let allowed =
        |frame: &[u8]| frame.get(26..30) == Some(&[0, 0, 0, 0]) || frame.get(26..30) == Some(&[10, 0, 0, 2]);
    ensure!(heard.as_deref().is_none_or(allowed), "{heard:?}");

    world.libvirtd.restart()?;
    assert_eq!(filtered.diff(&world.port()?), None);
    world.libvirtd.virsh_on(Connect::Qemu, &["destroy", "vm1"])?;
    assert_eq!(world.port()?, Saved::default());
    let calls = world.calls()?;
    let order =
        ["prepare begin", "start begin", "started begin", "reconnect begin", "stopped end", "release end"];
    let at: Vec<_> = order.iter().filter_map(|call| calls.find(&format!("vm1 {call}"))).collect();
    assert!(at.len() == order.len() && at.is_sorted(), "{calls}");
    Ok(())
}

#[test]
fn a_guest_whose_filter_is_refused_does_not_start_and_libvirt_says_why() -> Result<()> {
    skip_unless!(Need::Root, Need::Qemu);
    let world = World::new()?;
    let error = world.start("not-there").err().context("the guest started")?;
    ensure!(format!("{error:#}").contains("no filter is named 'not-there'"), "{error:#}");
    ensure!(world.libvirtd.log().contains("no filter is named 'not-there'"));
    assert_eq!(world.port()?, Saved::default());
    assert!(world.host.run(&["ip", "link", "show", "tap1"]).is_err());
    assert_eq!(world.libvirtd.virsh_on(Connect::Qemu, &["list", "--all", "--name"])?.trim(), "");
    Ok(())
}
