//! The listener at `test:///default`, libvirt's driver without guests, inside this process.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use nwfilter::{Config, Driver};
use nwfilter_libvirt::{Guard, Listener, Status};
use nwfilter_testlab::{Ends, Host, Mac, Need, Saved, frames, port_dev, skip_unless};
use nwfilter_xtables::Xtables;
use virt::connect::Connect;

const URI: &str = "test:///default";

/// A domain of the test driver, which takes ports as its XML has them.
fn domain(number: u8, interfaces: &str) -> String {
    format!(
        "<domain type='test'><name>vm{number}</name>
         <uuid>d54df46f-1ab5-4a22-8618-4560ef5fac{number:02x}</uuid><memory>8192</memory>
         <os><type>hvm</type></os><devices>{interfaces}</devices></domain>"
    )
}

fn interface(number: u8, filter: &str) -> String {
    format!(
        "<interface type='bridge'><source bridge='br0'/><mac address='{}'/><target dev='tap{number}'/>
         <filterref filter='{filter}'><parameter name='IP' value='10.0.0.{number}'/></filterref></interface>",
        mac(number)
    )
}

fn mac(number: u8) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 1, number])
}

/// Runs a listener in the host while `work` is done there, with its statuses.
fn with_listener(
    host: &Host,
    driver: &Driver,
    guard: Option<&str>,
    work: impl FnOnce(&Receiver<Status>) -> Result<()> + Send,
) -> Result<()> {
    let guard = guard.map(Guard::new).transpose()?;
    let listener = Listener::new(Some(URI), guard);
    let stopper = listener.stopper();
    let (sender, statuses) = channel();
    std::thread::scope(|scope| {
        let listening = scope.spawn(move || {
            host.enter(|| {
                listener.run(driver, |status| {
                    let _ = sender.send(status);
                })
            })
        });
        let worked = work(&statuses);
        stopper.stop();
        listening.join().map_err(|_| anyhow!("the listener panicked"))??;
        worked
    })
}

fn driver(host: &Host, dir: &tempfile::TempDir) -> Result<Driver> {
    let config = Config::new(dir.path().join("etc"), dir.path().join("run"));
    Ok(host.enter(|| Driver::open(config, Xtables::default()))?)
}

fn ports(driver: &Driver) -> Result<Vec<String>> {
    Ok(driver.bindings()?.iter().map(|binding| binding.port.to_string()).collect())
}

fn eventually(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so()? {
        ensure!(Instant::now() < deadline, "never so: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn follows(statuses: &Receiver<Status>) -> Result<()> {
    let patience = Duration::from_secs(10);
    assert_eq!(statuses.recv_timeout(patience)?, Status::Ready);
    let status = statuses.recv_timeout(patience)?;
    ensure!(matches!(status, Status::Following { .. }), "{status:?}");
    Ok(())
}

#[test]
fn ports_are_bound_from_the_start_of_their_guest_to_its_end() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"));
    let host = Host::new()?;
    let (_tap1, _tap2, _tap3) = (host.tap("tap1")?, host.tap("tap2")?, host.tap("tap3")?);
    let dir = tempfile::tempdir()?;
    let driver = driver(&host, &dir)?;
    let stays = "<filterbinding><owner><name>other</name><uuid>00000000-0000-4000-8000-000000000001</uuid></owner>
        <portdev name='tap3'/><mac address='52:54:00:00:00:03'/><filterref filter='no-mac-spoofing'/></filterbinding>";
    host.enter(|| -> Result<()> {
        driver.create_binding(nwfilter_xml::read_binding("other", stays).into_result()?)?;
        Ok(())
    })?;

    with_listener(&host, &driver, None, |statuses| {
        follows(statuses)?;
        let connect = Connect::open(Some(URI))?;
        let both = interface(1, "clean-traffic") + &interface(2, "no-mac-spoofing");
        let vm = connect.create_domain_xml(&domain(1, &both), 0)?;
        eventually("both ports are bound", || Ok(ports(&driver)? == ["tap1", "tap2", "tap3"]))?;
        assert!(host.saved()?.port("tap1").ebtables.contains(&mac(1).to_string()));
        assert_eq!(driver.binding(&port_dev("tap1"))?.owner.name, "vm1");

        vm.destroy()?;
        eventually("what another owner bound is left", || Ok(ports(&driver)? == ["tap3"]))?;
        assert_eq!(host.saved()?.port("tap1"), Saved::default());
        Ok(())
    })?;
    assert_eq!(ports(&driver)?, ["tap3"]);
    Ok(())
}

#[test]
fn changes_during_a_pause_of_the_daemon_are_caught_up_with() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"));
    let host = Host::new()?;
    let (_tap4, _tap5) = (host.tap("tap4")?, host.tap("tap5")?);
    let dir = tempfile::tempdir()?;
    let driver = driver(&host, &dir)?;
    let connect = Connect::open(Some(URI))?;
    let first = connect.create_domain_xml(&domain(4, &interface(4, "clean-traffic")), 0)?;
    with_listener(&host, &driver, None, follows)?;
    assert_eq!(ports(&driver)?, ["tap4"]);
    assert!(host.saved()?.port("tap4") != Saved::default(), "the port is filtered after the listener's end");

    first.destroy()?;
    let second = connect.create_domain_xml(&domain(5, &interface(5, "clean-traffic")), 0)?;
    let saved = host.saved()?;
    with_listener(&host, &driver, None, follows)?;
    // The first guest is unknown to libvirt now, and its port is still there: it is nobody's to unbind.
    assert_eq!(ports(&driver)?, ["tap4", "tap5"]);
    assert_eq!(saved.port("tap4").diff(&host.saved()?.port("tap4")), None);
    second.destroy()?;
    Ok(())
}

#[test]
fn a_port_that_was_renamed_stays_bound_until_its_guest_ends() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"));
    let host = Host::new()?;
    let _tap = host.tap("tap7")?;
    let dir = tempfile::tempdir()?;
    let driver = driver(&host, &dir)?;
    let guest = Connect::open(Some(URI))?.create_domain_xml(&domain(7, &interface(7, "clean-traffic")), 0)?;
    with_listener(&host, &driver, None, follows)?;
    let reconciler = host.enter(|| driver.keep())?;
    host.ip(&["link set tap7 down", "link set tap7 name renamed7 up"])?;
    eventually("the binding follows", || Ok(ports(&driver)? == ["renamed7"]))?;
    let saved = host.saved()?.port("renamed7");
    with_listener(&host, &driver, None, |statuses| {
        follows(statuses)?;
        assert_eq!(ports(&driver)?, ["renamed7"]);
        assert_eq!(saved.diff(&host.saved()?.port("renamed7")), None);
        guest.destroy()?;
        eventually("nothing is bound", || Ok(ports(&driver)?.is_empty()))
    })?;
    drop(reconciler);
    Ok(())
}

#[test]
fn the_guard_closes_a_port_until_it_is_bound() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"));
    let host = Host::new()?;
    let (guest, other) = (host.tap("tap6")?, host.tap("port7")?);
    let dir = tempfile::tempdir()?;
    let driver = driver(&host, &dir)?;
    let ends = Ends::v4(mac(6), "10.0.0.6".parse()?, mac(7), "10.0.0.7".parse()?);
    let (out, back) = (frames::udp(&ends, 1, 2, b"out"), frames::udp(&ends.reverse(), 2, 1, b"back"));
    let spoofed = frames::udp(&Ends::v4(mac(9), "10.0.0.9".parse()?, mac(7), "10.0.0.7".parse()?), 1, 2, b"");

    with_listener(&host, &driver, Some("tap"), |statuses| {
        follows(statuses)?;
        assert!(!guest.delivers(&other, &out)?);
        assert!(!other.delivers(&guest, &back)?);

        let connect = Connect::open(Some(URI))?;
        let refused = connect.create_domain_xml(&domain(6, &interface(6, "not-there")), 0)?;
        std::thread::sleep(Duration::from_millis(300));
        assert!(!guest.delivers(&other, &out)?, "a port that cannot be filtered is open");
        refused.destroy()?;

        let vm = connect.create_domain_xml(&domain(6, &interface(6, "clean-traffic")), 0)?;
        eventually("the port is open", || guest.delivers(&other, &out))?;
        assert!(other.delivers(&guest, &back)?);
        assert!(!guest.delivers(&other, &spoofed)?);

        vm.destroy()?;
        eventually("the port is closed again", || Ok(!guest.delivers(&other, &out)?))?;
        Ok(())
    })?;
    assert!(!guest.delivers(&other, &out)?, "the guard is gone with the listener");
    host.enter(Guard::remove)?;
    assert!(guest.delivers(&other, &out)?);
    Ok(())
}

#[test]
fn an_unreachable_libvirt_is_tried_again_with_growing_pauses() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("nft"));
    let host = Host::new()?;
    let dir = tempfile::tempdir()?;
    let driver = driver(&host, &dir)?;
    let listener = Listener::new(Some("qemu+unix:///system?socket=/nonexistent/sock"), None);
    let (stopper, mut pauses) = (listener.stopper(), Vec::new());
    host.enter(|| {
        listener.run(&driver, |status| {
            if let Status::Disconnected { pause, .. } = status {
                pauses.push(pause.as_millis());
                if pauses.len() == 4 {
                    stopper.stop();
                }
            }
        })
    })?;
    assert_eq!(pauses, [250, 500, 1000, 2000]);
    Ok(())
}
