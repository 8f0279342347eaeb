//! What becomes of ports whose interfaces come, go, or are in no bridge.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::time::{Duration, Instant};

use driver_support::{Lab, accepting, binding, define};
use nwfilter::{Attachment, Driver, Error, Fake};
use nwfilter_testlab::{Need, port_dev, skip_unless};

#[test]
fn the_status_of_a_port_says_whether_packets_get_to_its_rules() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(1), Fake::new());
    lab.host.ip(&["tuntap add dev p1 mode tap"]).unwrap();
    for port in ["p0", "p1", "p2"] {
        lab.write_binding(port, "allow-arp");
    }
    let driver = lab.fake_driver(&fake);
    let attachments = || {
        let statuses = lab.host.enter(|| driver.port_statuses()).unwrap();
        statuses.into_iter().map(|status| status.attachment).collect::<Vec<_>>()
    };
    use Attachment::{Absent, Bridged, Unbridged};
    assert_eq!(attachments(), [Bridged, Unbridged, Absent]);
    lab.host.ip(&["link set p1 master br0", "link del p0", "tuntap add dev p2 mode tap"]).unwrap();
    assert_eq!(attachments(), [Absent, Bridged, Unbridged]);
}

#[test]
fn an_alternative_name_of_an_interface_is_no_port() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(1), Fake::new());
    lab.host.ip(&["link property add dev p0 altname other"]).unwrap();
    lab.write_binding("other", "allow-arp");
    let driver = lab.fake_driver(&fake);
    let statuses = lab.host.enter(|| driver.port_statuses()).unwrap();
    assert_eq!(statuses[0].attachment, Attachment::Absent, "rules see the name p0");
    assert_eq!(lab.host.enter(|| driver.reload()).unwrap().unmanaged.absent, [port_dev("other")]);
    lab.host.enter(|| driver.delete_binding(&port_dev("other"))).unwrap();
    let error = lab.host.enter(|| driver.create_binding(binding("other", "allow-arp"))).unwrap_err();
    assert!(matches!(error, Error::NoSuchPort(_)), "{error}");
}

/// How long something that must happen may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[track_caller]
fn eventually<T: PartialEq + std::fmt::Debug>(what: impl Fn() -> T, expected: &T) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = what();
        if now == *expected {
            return;
        }
        assert!(Instant::now() < deadline, "{now:#?}\nis still not\n{expected:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host whose ports are filtered.
fn bound(ports: usize) -> (Lab, Driver) {
    let lab = Lab::new(ports);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 22)]).unwrap();
    for port in 0..ports {
        lab.host.enter(|| driver.create_binding(binding(&format!("p{port}"), "f"))).unwrap();
    }
    (lab, driver)
}

fn ports(driver: &Driver) -> Vec<String> {
    driver.bindings().unwrap().iter().map(|binding| binding.port.to_string()).collect()
}

#[test]
fn a_bound_port_that_comes_back_after_a_flush_is_filtered_again() {
    skip_unless!(
        Need::Root,
        Need::Tool("iptables-restore"),
        Need::Tool("ebtables-restore"),
        Need::Tool("nft")
    );
    let (lab, driver) = bound(2);
    let rules = ["p0", "p1"].map(|port| lab.port(port));
    let reconciler = lab.host.enter(|| driver.keep()).unwrap();
    for round in 0..5 {
        lab.host.ip(&["link del p0"]).unwrap();
        lab.host.run(&["nft", "flush", "ruleset"]).unwrap();
        // Rules are not made for an interface that does not exist.
        eventually(|| lab.port("p1"), &rules[1]);
        assert_ne!(lab.port("p0"), rules[0], "round {round}");
        lab.host.ip(&["tuntap add dev p0 mode tap", "link set p0 master br0 up"]).unwrap();
        eventually(|| lab.port("p0"), &rules[0]);
    }
    // The last one is counted after its rules are in force.
    eventually(|| reconciler.repairs() >= 10, &true);
    // One that is not bound is no business of ours.
    lab.host.ip(&["tuntap add dev p7 mode tap", "link set p7 master br0 up"]).unwrap();
    assert!(lab.host.enter(|| driver.diff()).unwrap().is_empty());
}

#[test]
fn the_binding_of_a_port_that_gets_another_name_follows_it() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (lab, driver) = bound(2);
    let rules = lab.port("p0");
    let reconciler = lab.host.enter(|| driver.keep()).unwrap();
    lab.host.ip(&["link set p0 down", "link set p0 name q0 up"]).unwrap();
    eventually(|| lab.port("q0").replace("q0", "p0"), &rules);
    eventually(|| ports(&driver), &vec!["p1".to_owned(), "q0".to_owned()]);
    assert!(!lab.port("p0").contains("p0"), "{}", lab.port("p0"));
    assert_eq!(driver.binding(&port_dev("q0")).unwrap().filter.as_str(), "f");

    // A name that has a binding of its own keeps that.
    lab.host.ip(&["link del p1", "link set q0 down", "link set q0 name p1 up"]).unwrap();
    eventually(|| lab.port("p1").replace("p1", "p0"), &rules);
    assert_eq!(ports(&driver), ["p1", "q0"]);
    assert_eq!(driver.binding(&port_dev("p1")).unwrap().mac, binding("p1", "f").mac);
    drop(reconciler);
}

#[test]
fn a_port_in_no_bridge_is_warned_of_and_filtered_once_it_is_in_one() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (lab, driver) = bound(1);
    let rules = lab.port("p0");
    lab.host.ip(&["tuntap add dev p1 mode tap"]).unwrap();
    let warnings =
        |applied: nwfilter::Applied| applied.warnings.iter().map(ToString::to_string).collect::<Vec<_>>();
    let warning = "p1: is in no bridge, so its rules see none of its packets until it is put into one";
    let applied = lab.host.enter(|| driver.create_binding(binding("p1", "f"))).unwrap();
    assert_eq!(warnings(applied), [warning]);
    let (_, applied) = lab.host.enter(|| driver.define_filter("f.xml", &accepting("f", 22))).unwrap();
    assert_eq!(warnings(applied), [warning]);
    let drift = lab.host.enter(|| driver.diff()).unwrap();
    assert!(drift.is_empty());
    assert_eq!(drift.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(), [warning]);

    let reconciler = lab.host.enter(|| driver.keep()).unwrap();
    lab.host.run(&["iptables", "-F", "FI-p1"]).unwrap();
    lab.host.ip(&["link set p1 master br0 up"]).unwrap();
    eventually(|| lab.port("p1").replace("p1", "p0"), &rules);
    drop(reconciler);
    assert_eq!(lab.host.enter(|| driver.diff()).unwrap().warnings, []);
}
