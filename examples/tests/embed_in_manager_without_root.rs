//! The same manager against a backend and a host without a kernel: no root, no tap, no tool.

#![allow(clippy::unwrap_used)]

use nwfilter::{Attachment, Driver, Event, Fake, Host};

#[path = "../src/bin/embed-in-manager.rs"]
#[allow(dead_code)]
mod manager;

fn ports() -> Vec<String> {
    let ports = ["vnet0", "52:54:00:00:00:01", "10.0.0.1", "vnet1", "52:54:00:00:00:02", "10.0.0.2"];
    ports.map(str::to_owned).to_vec()
}

#[test]
fn the_manager_binds_both_ports_or_none_and_hears_of_it() {
    let (dir, fake, host) = (tempfile::tempdir().unwrap(), Fake::new(), Host::fake());
    let builder = Driver::builder().config_dir(dir.path().join("filters")).state_dir(dir.path().join("run"));
    let driver = builder.host(host.clone()).open(fake.clone()).unwrap();
    let events = driver.subscribe();
    let [vnet0, vnet1] = ["vnet0", "vnet1"].map(|port| port.parse().unwrap());

    fake.refuse(&vnet1, true);
    let refused = manager::start(&driver, &ports()).unwrap_err().to_string();
    assert!(refused.starts_with("the filter asks for the impossible: "), "{refused}");
    host.set(&vnet1, Attachment::Absent);
    let absent = manager::start(&driver, &ports()).unwrap_err().to_string();
    assert_eq!(absent, "make the tap device vnet1 before the guest starts");
    assert_eq!(fake.ruleset(&vnet0), None);
    assert!(driver.bindings().unwrap().is_empty() && events.try_recv().is_err());

    fake.refuse(&vnet1, false);
    host.set(&vnet1, Attachment::Bridged);
    manager::start(&driver, &ports()).unwrap();
    assert!(fake.ruleset(&vnet0).is_some() && fake.ruleset(&vnet1).is_some());
    manager::stop(&driver, &ports()).unwrap();
    assert_eq!(fake.ruleset(&vnet1), None);
    let last = events.try_iter().last();
    assert_eq!(last, Some(Event::BindingDeleted(vnet1)));
}
