//! Lookups while a change is made: they answer at once, and see all of the change or nothing of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use driver_support::{Lab, accepting, binding, define};
use nwfilter::{Fake, Transaction};
use nwfilter_testlab::{Need, filter_name, port_dev, skip_unless};

/// How long a lookup may take that does not wait for anybody.
const HANG: Duration = Duration::from_secs(20);

#[test]
fn lookups_answer_while_the_kernel_is_being_changed() {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let (lab, fake) = (Lab::new(2), Fake::new());
    let driver = Arc::new(lab.fake_driver(&fake));
    define(&driver, &[accepting("f", 1)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();

    let gate = Arc::new(Barrier::new(2));
    let waits = gate.clone();
    fake.before_apply(move |_| {
        waits.wait();
        waits.wait();
    });
    thread::scope(|scope| {
        let committer = scope.spawn(|| {
            let mut transaction = Transaction::new();
            transaction.create_binding(binding("p1", "f")).delete_binding(&port_dev("p0"));
            lab.host.enter(|| driver.commit(transaction))
        });
        gate.wait();
        let (sender, seen) = channel();
        let looking = driver.clone();
        // Not in the scope: one that hangs must not keep the test from failing.
        thread::spawn(move || {
            let ports: Vec<_> = looking.bindings().unwrap().iter().map(|b| b.port.to_string()).collect();
            let states = looking.port_statuses().unwrap().len();
            let stored =
                looking.is_stored(&filter_name("f")).unwrap() && looking.filter(&filter_name("f")).is_ok();
            let state =
                looking.binding_state(&port_dev("p0")).is_ok() && looking.binding(&port_dev("p1")).is_err();
            let problems = looking.problems().unwrap().len();
            sender.send((ports, states, stored, state, problems, looking.metrics().ports)).unwrap();
        });
        let seen = seen.recv_timeout(HANG);
        gate.wait();
        assert_eq!(seen.expect("lookups wait for the change"), (vec!["p0".into()], 1, true, true, 0, 1));
        committer.join().unwrap().unwrap();
    });
    let ports: Vec<_> = driver.bindings().unwrap().iter().map(|b| b.port.to_string()).collect();
    assert_eq!(ports, ["p1"]);
}
