//! Many changes in one transaction, and the transactions of many threads in one commit.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use driver_support::{Lab, Sleepers, accepting, binding, define, explained, names, record, refused};
use nix::fcntl::{Flock, FlockArg};
use nwfilter::rules::ApplyError;
use nwfilter::xml::{Filter, FilterSet, Uuid, read_filter, read_set};
use nwfilter::{Driver, Error, Fake, Host, Transaction};
use nwfilter_testlab::{Need, filter_name, port_dev, skip_unless};

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore")];

fn filter(text: &str) -> Filter {
    read_filter("test.xml", text).into_result().unwrap()
}

fn commit(
    lab: &Lab,
    driver: &Driver,
    fill: impl FnOnce(&mut Transaction),
) -> Result<nwfilter::Committed, Error> {
    let mut transaction = Transaction::new();
    fill(&mut transaction);
    lab.host.enter(|| driver.commit(transaction))
}

/// Keeps every driver from changing anything, as another process would.
fn hold(lab: &Lab) -> Flock<fs::File> {
    let file = fs::File::options().create(true).append(true).open(lab.bindings().join(".lock")).unwrap();
    Flock::lock(file, FlockArg::LockExclusive).unwrap()
}

#[test]
fn a_transaction_is_judged_by_what_all_of_it_leaves_and_is_one_batch() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(3), Fake::new());
    let driver = lab.fake_driver(&fake);
    define(&driver, &[accepting("old", 22)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "old"))).unwrap();
    let asked = record(&fake);
    let done = commit(&lab, &driver, |transaction| {
        transaction.define_filter(filter(&accepting("new", 80)));
        transaction.create_binding(binding("p1", "outer")).create_binding(binding("p2", "new"));
        transaction.define_filter(filter("<filter name='outer'><filterref filter='new'/></filter>"));
        transaction.replace_binding(binding("p0", "new")).undefine_filter(&filter_name("old"));
        transaction.delete_binding(&port_dev("p2"));
    })
    .unwrap();
    assert_eq!(*asked.lock().unwrap(), [["p0", "p1", "p2"]]);
    assert_eq!(names(&done.applied.changed), ["p0", "p1"]);
    let defined: Vec<_> = done.filters.iter().map(|filter| filter.name.as_str()).collect();
    assert_eq!(defined, ["new", "outer"]);
    let stored: Vec<_> =
        driver.stored_filters().unwrap().iter().map(|filter| filter.name.to_string()).collect();
    assert_eq!(stored, ["new", "outer"]);
    assert_eq!(driver.bindings().unwrap().len(), 2);
    assert!(done.filters[0].uuid.is_some());
}

#[test]
fn an_operation_that_is_refused_refuses_all_of_its_transaction() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(3);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 22)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();
    let before = lab.state();
    type Fill = fn(&mut Transaction);
    let cases: [(Fill, &str); 7] = [
        (|t| _ = t.create_binding(binding("p0", "f")), "port 'p0' has a binding already"),
        (|t| _ = t.create_binding(binding("p8", "f")), "there is no network interface 'p8'"),
        (|t| _ = t.create_binding(binding("p2", "nosuch")), "no filter is named 'nosuch'"),
        (|t| _ = t.undefine_filter(&filter_name("f")), "filter 'f' is in use by p0, p1"),
        (|t| _ = t.delete_binding(&port_dev("p2")), "port 'p2' has no binding"),
        (|t| _ = t.define_filter(filter(&refused("f"))), "no-such-set"),
        (
            |t| _ = t.define_filter(filter("<filter name='f'><filterref filter='f'/></filter>")),
            "filter 'f' includes itself",
        ),
    ];
    for (fill, expected) in cases {
        let error = commit(&lab, &driver, |transaction| {
            transaction.define_filter(filter(&accepting("f", 443))).define_filter(filter(&accepting("g", 1)));
            transaction.create_binding(binding("p1", "f"));
            fill(transaction);
        });
        let told = explained(&error.unwrap_err());
        assert!(told.contains(expected), "{told}");
        assert_eq!(lab.state(), before, "{expected}");
    }
}

#[test]
fn a_document_that_cannot_be_stored_takes_the_whole_transaction_back() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(3);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 22), accepting("g", 80)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();
    let before = lab.state();
    // Nothing can get the name of a directory.
    let obstacle = lab.bindings().join("p2.xml");
    fs::create_dir(&obstacle).unwrap();
    let error = commit(&lab, &driver, |transaction| {
        transaction.define_filter(filter(&accepting("f", 443))).define_filter(filter(&accepting("h", 1)));
        transaction.undefine_filter(&filter_name("g"));
        transaction
            .delete_binding(&port_dev("p0"))
            .create_binding(binding("p1", "f"))
            .create_binding(binding("p2", "h"));
    });
    assert!(matches!(&error, Err(Error::Store { path, .. }) if *path == obstacle), "{error:?}");
    fs::remove_dir(&obstacle).unwrap();
    assert_eq!(lab.state(), before);
    assert!(lab.host.enter(|| driver.diff()).unwrap().is_empty());
}

#[test]
fn threads_that_bind_at_the_same_time_share_commits() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(40), Fake::new());
    let driver = lab.fake_driver(&fake);
    define(&driver, &[accepting("f", 22)]).unwrap();
    let asked = record(&fake);
    let sleepers = &Sleepers::default();
    let commits = lab.host.enter(|| {
        thread::scope(|scope| {
            let held = hold(&lab);
            let bind = |index: usize| {
                sleepers.join();
                driver.create_binding(binding(&format!("p{index}"), "f"))
            };
            let threads: Vec<_> = (0..40).map(|index| scope.spawn(move || bind(index).unwrap())).collect();
            sleepers.wait_for(40);
            drop(held);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    });
    let asked = asked.lock().unwrap().clone();
    assert!(asked.len() <= 2, "{asked:?}");
    assert_eq!(asked.iter().map(Vec::len).sum::<usize>(), 40);
    for (index, applied) in commits.iter().enumerate() {
        assert_eq!(names(&applied.changed), [format!("p{index}")], "each is told of its own port");
    }
    assert_eq!(driver.bindings().unwrap().len(), 40);
}

#[test]
fn a_refusal_in_a_group_commit_refuses_only_the_transaction_that_caused_it() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(12);
    let driver = lab.driver();
    define(&driver, &[accepting("good", 22), refused("bad")]).unwrap();
    let sleepers = &Sleepers::default();
    let results = lab.host.enter(|| {
        thread::scope(|scope| {
            let held = hold(&lab);
            let threads: Vec<_> = (0..12)
                .map(|index| {
                    let filter = ["good", "bad", "nosuch"][index % 3];
                    let port = format!("p{index}");
                    let driver = &driver;
                    scope.spawn(move || {
                        sleepers.join();
                        driver.create_binding(binding(&port, filter))
                    })
                })
                .collect();
            sleepers.wait_for(12);
            drop(held);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    });
    for (index, result) in results.iter().enumerate() {
        let port = format!("p{index}");
        let bound = driver.binding(&port_dev(&port)).is_ok();
        match (index % 3, result) {
            (0, Ok(_)) => assert!(bound && lab.port(&port).contains("--dport 22")),
            (1, Err(error @ Error::Apply(_))) => {
                assert!(
                    !bound && explained(error).contains(&format!("refused on port {port} ")),
                    "{error:?}"
                );
                assert!(lab.host.saved().unwrap().port(&port).is_empty());
            }
            (2, Err(Error::Rules { .. })) => assert!(!bound),
            _ => panic!("{port}: {result:?}"),
        }
    }
    assert!(lab.host.enter(|| driver.diff()).unwrap().is_empty());
}

#[test]
fn transactions_that_are_handed_in_together_share_batches_and_each_refusal_goes_to_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let builder = Driver::builder().config_dir(dir.path().join("f")).state_dir(dir.path().join("s"));
    let driver = builder.host(Host::fake()).open(fake.clone()).unwrap();
    define(&driver, &[accepting("shared", 22), accepting("other", 80)]).unwrap();
    let asked = record(&fake);
    let bind = |index: usize| {
        let mut transaction = Transaction::new();
        let filter = if index < 40 { "shared" } else { "other" };
        transaction.replace_binding(binding(&format!("p{index}"), filter));
        transaction
    };
    let refused_of = |done: &[Result<nwfilter::Committed, Error>]| -> Vec<_> {
        let refused = |(index, done): (usize, &Result<_, _>)| match done {
            Ok(_) => None,
            Err(Error::Apply(ApplyError::Refused(refused))) => {
                assert_eq!(refused.port.as_str(), format!("p{index}"), "it is told of its own port");
                Some(index)
            }
            Err(error) => panic!("{error:?}"),
        };
        done.iter().enumerate().filter_map(refused).collect()
    };

    [1, 7, 39].into_iter().for_each(|index| fake.refuse(&port_dev(&format!("p{index}")), true));
    assert_eq!(refused_of(&driver.commit_each((0..50).map(bind))), [1, 7, 39]);
    assert_eq!(driver.bindings().unwrap().len(), 47);
    assert_eq!(
        asked.lock().unwrap().iter().map(Vec::len).collect::<Vec<_>>(),
        [50, 10, 1, 39, 1, 38, 1, 37],
        "all, those with another rule, and in turn the refused one alone and those that are alike together"
    );

    // There is a limit to how often those alike are tried together.
    (0..40).for_each(|index| fake.refuse(&port_dev(&format!("p{index}")), true));
    let all = driver.bindings().unwrap();
    let unbind = all.iter().map(|binding| {
        let mut transaction = Transaction::new();
        transaction.delete_binding(&binding.port);
        transaction
    });
    assert!(driver.commit_each(unbind).iter().all(Result::is_ok));
    asked.lock().unwrap().clear();
    assert_eq!(refused_of(&driver.commit_each((0..50).map(bind))), (0..40).collect::<Vec<_>>());
    let groups = asked.lock().unwrap().iter().filter(|ports| ports.len() > 1).count();
    assert!(groups <= 33, "{groups}");
}

#[test]
fn a_refused_transaction_leaves_nothing_to_those_that_are_committed_with_it() {
    fn with_uuid(name: &str, number: u128, port: u16) -> Filter {
        Filter { uuid: Some(Uuid::from_u128(number)), ..filter(&accepting(name, port)) }
    }
    fn set(name: &str, entry: &str) -> FilterSet {
        let text = format!("<filterset name='{name}' family='ipv4'><entry value='{entry}'/></filterset>");
        read_set("s.xml", &text).into_result().unwrap()
    }
    type Fill = fn(&mut Transaction);
    let first: Fill = |t| {
        t.define_filter(with_uuid("f", 1, 22)).define_filter(with_uuid("g", 2, 80));
        t.define_set(set("s", "10.0.0.1"));
        t.create_binding(binding("p0", "f"));
    };
    let refused: Fill = |t| {
        t.define_filter_from(Path::new("/f.xml"), with_uuid("f", 1, 443)).undefine_filter(&filter_name("g"));
        t.define_filter(with_uuid("h", 3, 25)).define_set(set("x", "10.0.0.3"));
        t.define_set(set("s", "10.0.0.2"));
        t.delete_binding(&port_dev("p0")).create_binding(binding("p1", "h"));
        t.undefine_set(&"x".parse().unwrap()).create_binding(binding("p2", "nosuch"));
    };
    let last: Fill = |t| _ = t.create_binding(binding("p2", "g"));
    let committed = |fills: &[Fill]| {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let builder = Driver::builder().config_dir(dir.path().join("f")).state_dir(dir.path().join("s"));
        let driver = builder.host(Host::fake()).without_learner().open(fake.clone()).unwrap();
        let asked = record(&fake);
        let transaction = |fill: &Fill| {
            let mut transaction = Transaction::new();
            fill(&mut transaction);
            transaction
        };
        let done = driver.commit_each(fills.iter().map(transaction));
        let rules: Vec<_> = ["p0", "p1", "p2"].map(|port| fake.ruleset(&port_dev(port))).into();
        let sets: Vec<_> = ["s", "x"].map(|name| fake.set(name)).into();
        let stored = (driver.stored_filters().unwrap(), driver.sets().unwrap(), driver.bindings().unwrap());
        let source = fs::read_to_string(dir.path().join("f/f.xml")).unwrap();
        let refused: Vec<_> = done.iter().map(Result::is_err).collect();
        let asked = asked.lock().unwrap().clone();
        (refused, (rules, sets, stored, source, asked))
    };
    let (with, without) = (committed(&[first, refused, last]), committed(&[first, last]));
    assert_eq!((with.0, without.0), (vec![false, true, false], vec![false, false]));
    assert_eq!(with.1, without.1);
}

#[test]
fn transactions_of_other_network_namespaces_are_not_carried_out_here() {
    skip_unless!(Need::Root);
    let (here, there, fake) = (Lab::new(1), Lab::new(3), Fake::new());
    let driver = here.fake_driver(&fake);
    define(&driver, &[accepting("f", 22)]).unwrap();
    let sleepers = Sleepers::default();
    let bind = |lab: &Lab, port: &str| {
        lab.host.enter(|| {
            sleepers.join();
            driver.create_binding(binding(port, "f"))
        })
    };
    thread::scope(|scope| {
        let held = hold(&here);
        let near = scope.spawn(|| bind(&here, "p2"));
        let far = scope.spawn(|| bind(&there, "p1"));
        sleepers.wait_for(2);
        drop(held);
        assert!(matches!(near.join().unwrap(), Err(Error::NoSuchPort(_))), "p2 is in the other one only");
        far.join().unwrap().unwrap();
    });
}

#[test]
fn a_panic_of_the_backend_ends_no_other_thread_and_holds_nothing_up() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(8), Fake::new());
    let driver = lab.fake_driver(&fake);
    define(&driver, &[accepting("f", 22)]).unwrap();
    let first = AtomicBool::new(true);
    fake.before_apply(move |_| assert!(!first.swap(false, Ordering::Relaxed), "the backend has a bug"));
    let sleepers = &Sleepers::default();
    let results: Vec<_> = lab.host.enter(|| {
        thread::scope(|scope| {
            let held = hold(&lab);
            let bind = |index: usize| {
                sleepers.join();
                driver.create_binding(binding(&format!("p{index}"), "f"))
            };
            let threads: Vec<_> = (0..8).map(|index| scope.spawn(move || bind(index))).collect();
            sleepers.wait_for(8);
            drop(held);
            threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        })
    });
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1, "the thread that had the panic");
    for (index, result) in results.iter().enumerate() {
        let bound = driver.binding(&port_dev(&format!("p{index}"))).is_ok();
        match result {
            Ok(Ok(_)) => assert!(bound),
            Ok(Err(Error::Abandoned)) | Err(_) => assert!(!bound),
            Ok(Err(error)) => panic!("{error:?}"),
        }
    }
    lab.host.enter(|| driver.reload()).unwrap();
}
