//! Threads that bind and unbind ports while another redefines their filter and somebody flushes the tables.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use driver_support::{Lab, accepting, binding, define};
use nwfilter::Error;
use nwfilter::rules::ApplyError;
use nwfilter_testlab::{Need, port_dev, skip_unless};

const THREADS: usize = 8;
const PORTS: usize = 200;
/// How often a thread tries again when somebody flushed the tables while they were written.
const TRIES: usize = 100;

#[test]
fn threads_a_redefinition_and_foreign_flushes_end_in_the_desired_state() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab::new(PORTS);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 1000)]).unwrap();
    let (done, disturbed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // A batch may name a rule that a flush has just taken away; nothing else may fail.
    let insist = |call: &dyn Fn() -> Result<(), Error>| {
        for _ in 0..TRIES {
            match call() {
                Ok(()) => return,
                Err(Error::Apply(ApplyError::Unavailable { .. } | ApplyError::Refused(_))) => {
                    disturbed.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => panic!("{error:?}"),
            }
        }
        panic!("it never worked");
    };
    let work = |thread: usize| {
        let ports: Vec<_> =
            (0..PORTS).filter(|index| index % THREADS == thread).map(|index| format!("p{index}")).collect();
        let bind = |port: &String| insist(&|| driver.create_binding(binding(port, "f")).map(drop));
        let unbind = |port: &String| insist(&|| driver.delete_binding(&port_dev(port)).map(drop));
        ports.iter().for_each(bind);
        for port in &ports {
            assert!(matches!(driver.create_binding(binding(port, "f")), Err(Error::BindingExists(_))));
            assert_eq!(
                driver.binding(&port_dev(port)).unwrap().port.as_str(),
                port,
                "what was bound is seen"
            );
            unbind(port);
            assert!(matches!(driver.delete_binding(&port_dev(port)), Err(Error::NoSuchBinding(_))));
        }
        ports.iter().step_by(2).for_each(bind);
        done.fetch_add(1, Ordering::Release);
    };
    let working = || done.load(Ordering::Acquire) < THREADS;
    let stop = AtomicBool::new(false);
    let last = lab.host.enter(|| {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || work(thread))).collect();
            let redefiner = scope.spawn(|| {
                let mut last = 1000;
                while working() && !stop.load(Ordering::Relaxed) {
                    last += 1;
                    insist(&|| define(&driver, &[accepting("f", last)]));
                }
                last
            });
            let flusher = scope.spawn(|| {
                let flushes: [&[&str]; 4] = [
                    &["iptables", "-F"],
                    &["ebtables", "-t", "nat", "-F"],
                    &["iptables", "-F", "libvirt-in"],
                    &["ebtables", "-t", "nat", "-F", "PREROUTING"],
                ];
                for flush in flushes.iter().cycle().take_while(|_| working() && !stop.load(Ordering::Relaxed))
                {
                    // One of a chain that does not exist yet fails.
                    let _ = lab.host.run(flush);
                    thread::sleep(Duration::from_millis(150));
                }
            });
            let workers: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            stop.store(true, Ordering::Relaxed);
            flusher.join().unwrap();
            let last = redefiner.join().unwrap();
            workers.into_iter().for_each(|worker| worker.unwrap());
            last
        })
    });
    println!("{} redefinitions, {} calls disturbed by a flush", last - 1000, disturbed.into_inner());

    let reloaded = lab.host.enter(|| driver.reload()).unwrap();
    assert!(reloaded.failed.is_empty() && reloaded.removed.is_empty(), "{reloaded:?}");
    let wanted: BTreeSet<_> = (0..PORTS)
        .filter(|index| (index / THREADS).is_multiple_of(2))
        .map(|index| format!("p{index}"))
        .collect();
    let bound: BTreeSet<_> = driver.bindings().unwrap().iter().map(|b| b.port.to_string()).collect();
    assert_eq!(bound, wanted);
    let saved = lab.host.saved().unwrap();
    for port in (0..PORTS).map(|index| format!("p{index}")) {
        let rules = saved.port(&port);
        match wanted.contains(&port) {
            true => assert!(rules.iptables.contains(&format!("--dport {last} ")), "{port}: {rules:?}"),
            false => assert!(rules.is_empty(), "{port}: {rules:?}"),
        }
    }
    let drift = lab.host.enter(|| driver.diff()).unwrap();
    assert!(drift.is_empty() && drift.unmanaged == nwfilter::UnmanagedPorts::default(), "{drift:?}");
}
