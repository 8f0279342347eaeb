//! What a driver tells of its work: events, numbers, progress.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::sync::{Arc, Mutex};

use driver_support::{Lab, accepting, binding, define, refused};
use nwfilter::{Driver, Fake, Metrics, Phase, Progress, Transaction};
use nwfilter_testlab::{Need, filter_name, port_dev, skip_unless};

#[test]
fn subscribers_hear_of_what_changed_and_of_nothing_else() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab::new(2);
    let driver = lab.driver();
    define(&driver, &[accepting("before", 22)]).unwrap();
    let (events, dropped) = (driver.subscribe(), driver.subscribe());
    drop(dropped);
    lab.host.enter(|| {
        define(&driver, &[accepting("f", 22)]).unwrap();
        driver.create_binding(binding("p0", "f")).unwrap();
        driver.replace_binding(binding("p0", "f")).unwrap();
        driver.replace_binding(binding("p0", "before")).unwrap();
        driver.create_binding(binding("p0", "before")).unwrap_err();
        define(&driver, &[refused("before")]).unwrap_err();
        let mut transaction = Transaction::new();
        transaction
            .create_binding(binding("p1", "f"))
            .delete_binding(&port_dev("p0"))
            .undefine_filter(&filter_name("before"));
        driver.commit(transaction).unwrap();
        driver.reload().unwrap();
        lab.host.run(&["iptables", "-F", "FI-p1"]).unwrap();
        driver.replace_binding(binding("p1", "f")).unwrap();
        lab.host.run(&["iptables", "-F", "FI-p1"]).unwrap();
        driver.reload().unwrap();
        lab.host.run(&["iptables", "-F", "FORWARD"]).unwrap();
        driver.reload().unwrap();
    });
    let told: Vec<_> = events.try_iter().map(|event| event.to_string()).collect();
    assert_eq!(
        told,
        [
            "filter 'f' defined",
            "port 'p0' bound",
            "port 'p0' bound anew",
            "port 'p1' bound",
            "port 'p0' unbound",
            "filter 'before' undefined",
            "port 'p1' brought back",
            "port 'p1' brought back",
            "what all ports share brought back",
        ]
    );
    assert_eq!((driver.metrics().repaired, driver.metrics().host_repairs), (2, 1));
}

#[test]
fn metrics_count_what_was_done_and_what_is_there() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(3), Fake::new());
    let driver = lab.fake_driver(&fake);
    assert_eq!(driver.metrics(), Metrics::default());
    define(&driver, &[accepting("f", 22), accepting("g", 80)]).unwrap();
    let mut transaction = Transaction::new();
    transaction.create_binding(binding("p0", "f")).create_binding(binding("p1", "g"));
    lab.host.enter(|| driver.commit(transaction)).unwrap();
    fake.refuse(&"p2".parse().unwrap(), true);
    lab.host.enter(|| driver.create_binding(binding("p2", "f"))).unwrap_err();
    std::fs::write(lab.filters().join("bad.xml"), "").unwrap();
    driver.filters().unwrap();
    let metrics = driver.metrics();
    assert_eq!((metrics.ports, metrics.filters, metrics.problems), (2, 2, 1));
    assert_eq!((metrics.commits, metrics.refusals), (1, 1), "a filter that no port uses needs no batch");
    assert_eq!(
        (metrics.transactions, metrics.groups, metrics.largest_group, metrics.last_group),
        (3, 3, 1, 1)
    );
    assert!(metrics.commit_seconds >= metrics.last_commit_seconds && metrics.last_commit_seconds > 0.0);
    // From the guest and to the guest, for each of two ports.
    assert_eq!(metrics.rules, 4);
    lab.host.enter(|| driver.delete_binding(&port_dev("p0"))).unwrap();
    assert_eq!((driver.metrics().rules, driver.metrics().ports), (2, 1));
    let json = serde_json::to_value(driver.metrics()).unwrap();
    assert_eq!(json["ports"], 1);
    assert!(json["commit_seconds"].is_f64());
}

#[test]
fn progress_goes_through_all_ports_and_phases() {
    skip_unless!(Need::Root);
    let (lab, fake, told) = (Lab::new(20), Fake::new(), Arc::new(Mutex::new(Vec::new())));
    let heard = told.clone();
    let builder = Driver::builder().config(lab.config()).without_learner();
    let driver =
        builder.on_progress(move |progress| heard.lock().unwrap().push(progress)).open(fake).unwrap();
    let mut transaction = Transaction::new();
    let filter = nwfilter::xml::read_filter("f.xml", &accepting("f", 22)).into_result().unwrap();
    transaction.define_filter(filter);
    for index in 0..20 {
        transaction.create_binding(binding(&format!("p{index}"), "f"));
    }
    lab.host.enter(|| driver.commit(transaction)).unwrap();
    let told = std::mem::take(&mut *told.lock().unwrap());
    let rules: Vec<_> = told.iter().filter(|told| told.phase == Phase::Rules).map(|told| told.done).collect();
    assert_eq!(rules, (0..20).collect::<Vec<_>>());
    let last = told.last().unwrap();
    assert_eq!(*last, Progress { phase: Phase::Stores, done: 21, total: 21 });
    assert!(told.is_sorted_by_key(|told| (told.phase, told.done)), "{told:?}");
    assert_eq!(told[20].to_string(), "writing rules of 20 ports");
}
