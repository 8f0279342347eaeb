//! libvirtd's log of the module has the fields of the journal that name the port, the guest and the filter.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nwfilter_testlab::frames::ethernet;
use nwfilter_testlab::{Host, Libvirtd, LibvirtdOptions, Mac, Need, skip_unless};

use common::{Module, driver_dir, options};

const PATIENCE: Duration = Duration::from_secs(20);
const SYSTEMD: &str = "/run/systemd";

#[test]
fn drops_of_a_port_are_in_libvirts_journal_with_its_name_its_guest_and_its_filter() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let tap = host.tap("tap0")?;
    // What is mounted upon has to be there.
    fs::create_dir_all(SYSTEMD)?;
    fs::create_dir(dir.path().join("journal"))?;
    let journal = UnixDatagram::bind(dir.path().join("journal/socket"))?;
    // libvirtd waits while nobody reads.
    let (sender, messages) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length) = journal.recv(&mut buffer) {
            if sender.send(String::from_utf8_lossy(&buffer[..length]).into_owned()).is_err() {
                return;
            }
        }
    });
    let modules = driver_dir(Module::Ours)?;
    let daemon = Libvirtd::start_with(
        &host,
        LibvirtdOptions {
            env: vec![("LIBVIRT_LOG_OUTPUTS".into(), "3:journald".into())],
            mounts: vec![(dir.path().into(), SYSTEMD.into())],
            ..options(&modules)
        },
    )?;
    daemon.bind(
        "<filterbinding><owner><name>vm1</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='no-mac-spoofing'>
         <parameter name='CTRL_LOG_DROPS' value='yes'/></filterref></filterbinding>",
    )?;
    let spoofed = ethernet(Mac::new([2, 0, 0, 0, 0, 9]), Mac::BROADCAST, 0x88b5, b"spoofed");
    let deadline = Instant::now() + PATIENCE;
    let message = loop {
        ensure!(Instant::now() < deadline, "nothing about the port");
        tap.send(&spoofed)?;
        let Ok(message) = messages.recv_timeout(Duration::from_millis(100)) else { continue };
        if message.contains("NWFILTER_PORT") {
            break message;
        }
    };
    for field in ["NWFILTER_PORT=tap0", "NWFILTER_GUEST=vm1", "NWFILTER_FILTER=no-mac-spoofing", "PRIORITY=4"]
    {
        assert!(message.lines().any(|line| line == field), "no {field} in {message}");
    }
    assert!(message.contains("MESSAGE=tap0 out, guest vm1: frame of type 0x88b5"), "{message}");
    Ok(())
}
