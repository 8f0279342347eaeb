//! Drivers in network namespaces that the process itself is not in.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::thread;
use std::time::{Duration, Instant};

use driver_support::{Lab, accepting, binding, define};
use nwfilter::{Attachment, BindingState, Driver, Error, Fake, NetworkNamespace};
use nwfilter_testlab::{Ends, Need, frames, port_dev, skip_unless};
use nwfilter_xtables::Xtables;

/// How long something may take that a thread of a driver does.
const SOON: Duration = Duration::from_secs(20);

fn driver_of(lab: &Lab) -> Driver {
    let namespace = NetworkNamespace::open(format!("/run/netns/{}", lab.host.name())).unwrap();
    Driver::builder().config(lab.config()).network_namespace(namespace).open(Xtables::default()).unwrap()
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < SOON, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn drivers_of_two_network_namespaces_filter_learn_and_repair_each_in_its_own() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (here, there) = (Lab::new(1), Lab::new(2));
    let (ours, theirs) = (driver_of(&here), driver_of(&there));
    let learning =
        "<filter name='l'><rule action='accept' direction='out'><ip srcipaddr='$IP'/></rule></filter>";
    define(&ours, &[accepting("f", 22), learning.to_owned()]).unwrap();
    define(&theirs, &[accepting("f", 80)]).unwrap();
    thread::scope(|scope| {
        for driver in [&ours, &theirs] {
            scope.spawn(|| driver.create_binding(binding("p0", "f")).unwrap());
        }
    });
    assert!(here.port("p0").contains("--dport 22") && there.port("p0").contains("--dport 80"));
    assert!(matches!(ours.create_binding(binding("p1", "f")), Err(Error::NoSuchPort(_))));
    theirs.create_binding(binding("p1", "f")).unwrap();
    let attachments = [&ours, &theirs].map(|driver| driver.attachment(&port_dev("p1")).unwrap());
    assert_eq!(attachments, [Attachment::Absent, Attachment::Bridged]);

    let reconcilers = [&ours, &theirs].map(|driver| driver.keep().unwrap());
    here.host.run(&["iptables", "-F", "FI-p0"]).unwrap();
    eventually("repaired", || reconcilers[0].repairs() == 1 && ours.diff().unwrap().is_empty());
    assert_eq!(reconcilers[1].repairs(), 0);

    let tap = here.host.tap("tap0").unwrap();
    ours.create_binding(binding("tap0", "l")).unwrap();
    let mac = "52:54:00:7b:35:93".parse().unwrap();
    let ends = Ends::v4(mac, "10.9.8.7".parse().unwrap(), mac, "10.9.8.6".parse().unwrap());
    tap.send(&frames::udp(&ends, 1000, 2000, b"anything")).unwrap();
    let state = || ours.binding_state(&port_dev("tap0")).unwrap();
    eventually("learned", || matches!(state(), BindingState::Learned { .. }));
    assert!(ours.diff().unwrap().is_empty() && theirs.diff().unwrap().is_empty());
}

#[test]
fn a_driver_is_not_opened_for_a_namespace_that_cannot_be_entered() {
    let dir = tempfile::tempdir().unwrap();
    let no_network = NetworkNamespace::open("/proc/self/ns/uts").unwrap();
    let builder = Driver::builder().config_dir(dir.path().join("f")).state_dir(dir.path().join("s"));
    let opened = builder.network_namespace(no_network).open(Fake::new());
    assert!(matches!(opened, Err(Error::Namespace { .. })));
}
