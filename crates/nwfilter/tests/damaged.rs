//! What becomes of files in a store that are no documents.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use driver_support::{Lab, accepting, binding, binding_xml, define, names};
use nwfilter::{Driver, Error, Fake, Layout, ProblemKind};
use nwfilter_testlab::{Need, filter_name, skip_unless};

fn files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

#[test]
fn a_damaged_file_is_reported_and_moved_aside_by_the_first_operation_that_writes() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(2), Fake::new());
    fs::create_dir(lab.filters()).unwrap();
    let write = |name: &str, text: &[u8]| fs::write(lab.filters().join(name), text).unwrap();
    write("broken.xml", b"<filter name='broken'><rule");
    write("broken.xml.damaged", b"an older one");
    write("wrong.xml", b"<filter name='right'/>");
    write("binary.xml", b"\xff\xfe");
    write("good.xml", accepting("good", 22).as_bytes());
    write("note.txt", b"not ours");
    std::os::unix::fs::symlink("/proc/self/mem", lab.filters().join("unreadable.xml")).unwrap();
    // Without blocks on disk, and larger than most memories.
    fs::File::create(lab.filters().join("huge.xml")).unwrap().set_len(1 << 42).unwrap();
    let before = files(&lab.filters());

    let driver = lab.fake_driver(&fake);
    let kinds = |driver: &nwfilter::Driver| {
        let told = driver.problems().unwrap().into_iter();
        told.map(|p| (p.path.file_name().unwrap().to_str().unwrap().to_owned(), p.kind)).collect::<Vec<_>>()
    };
    use ProblemKind::{Damaged, SetAside, Unreadable};
    let expected = [
        ("binary.xml", Damaged),
        ("broken.xml", Damaged),
        ("huge.xml", Unreadable),
        ("unreadable.xml", Unreadable),
        ("wrong.xml", Damaged),
    ];
    assert_eq!(kinds(&driver), expected.map(|(name, kind)| (name.to_owned(), kind)));
    assert_eq!(driver.problems().unwrap()[4].why, "is about 'right', not 'wrong', and ignored");
    driver.filters().unwrap();
    driver.diff().unwrap();
    assert_eq!(files(&lab.filters()), before, "looking moves nothing");

    lab.host.enter(|| driver.create_binding(binding("p0", "good"))).unwrap();
    assert_eq!(
        files(&lab.filters()),
        [
            "binary.xml.damaged",
            "broken.xml.damaged",
            "broken.xml.damaged.1",
            "good.xml",
            "huge.xml",
            "note.txt",
            "unreadable.xml",
            "wrong.xml.damaged",
        ]
    );
    let kept = fs::read_to_string(lab.filters().join("broken.xml.damaged.1")).unwrap();
    assert_eq!(kept, "<filter name='broken'><rule");
    let told = kinds(&driver);
    assert_eq!(told.iter().filter(|(_, kind)| *kind == SetAside).count(), 4, "{told:?}");

    // A document in place of a damaged one ends the matter; one that cannot be read is not overwritten.
    define(&driver, &[accepting("broken", 80), accepting("wrong", 80), accepting("binary", 80)]).unwrap();
    let unread = ["huge.xml", "unreadable.xml"].map(|name| (name.to_owned(), Unreadable));
    assert_eq!(kinds(&driver), unread);
    assert!(matches!(define(&driver, &[accepting("unreadable", 80)]), Err(Error::Store { .. })));
}

#[test]
fn what_a_killed_process_left_is_removed_by_the_first_operation_that_writes() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(0), Fake::default());
    let leftovers = [lab.filters(), lab.bindings()].map(|directory| {
        fs::create_dir(&directory).unwrap();
        let leftover = directory.join(".nwfilter-a1B2c3.new");
        fs::write(&leftover, "<filter").unwrap();
        leftover
    });
    fs::write(lab.filters().join(".mine.new"), "").unwrap();
    let driver = lab.fake_driver(&fake);
    driver.filters().unwrap();
    assert!(leftovers.iter().all(|leftover| leftover.exists()), "looking removes nothing");
    define(&driver, &[accepting("f", 22)]).unwrap();
    assert!(!leftovers.iter().any(|leftover| leftover.exists()));
    assert!(lab.filters().join(".mine.new").exists());
}

#[test]
fn a_filter_whose_name_begins_with_a_dot_is_kept() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(0), Fake::default());
    define(&lab.fake_driver(&fake), &[accepting(".hidden", 22), accepting("...", 22)]).unwrap();
    let driver = lab.fake_driver(&fake);
    assert_eq!(driver.stored_filters().unwrap().len(), 2);
    driver.undefine_filter(&filter_name(".hidden")).unwrap();
    driver.undefine_filter(&filter_name("...")).unwrap();
    assert_eq!(fs::read_dir(lab.filters()).unwrap().count(), 0);
}

#[test]
fn a_damaged_filter_is_not_replaced_by_the_stock_filter_of_its_name() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(1), Fake::new());
    fs::create_dir(lab.filters()).unwrap();
    fs::write(lab.filters().join("allow-arp.xml"), "<filter name='allow-arp'>").unwrap();
    let driver = lab.fake_driver(&fake);
    assert!(matches!(driver.filter(&filter_name("allow-arp")), Err(Error::NoSuchFilter(_))));
    assert!(lab.host.enter(|| driver.create_binding(binding("p0", "allow-arp"))).is_err());
    let aside = lab.filters().join("allow-arp.xml.damaged");
    assert!(aside.exists());
    assert!(matches!(driver.filter(&filter_name("allow-arp")), Err(Error::NoSuchFilter(_))));
    fs::remove_file(aside).unwrap();
    driver.filter(&filter_name("allow-arp")).unwrap();
}

#[test]
fn a_port_whose_binding_is_damaged_keeps_its_rules_and_can_be_bound_anew() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab::new(2);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 22)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();
    let rules = lab.port("p0");
    let file = lab.bindings().join("p0.xml");
    fs::write(&file, &binding_xml("p0", "f")[..100]).unwrap();
    lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!(lab.port("p0"), rules);
    assert!(!file.exists() && lab.bindings().join("p0.xml.damaged").exists());
    lab.host.ip(&["link del p0"]).unwrap();
    let unmanaged = lab.host.enter(|| driver.reload()).unwrap().unmanaged;
    assert_eq!((lab.port("p0"), names(&unmanaged.unbound)), (rules.clone(), vec!["p0"]));
    lab.host.ip(&["tuntap add dev p0 mode tap"]).unwrap();

    // A file that is damaged when its name is taken is moved, not overwritten.
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();
    assert_eq!((lab.port("p0"), driver.problems().unwrap()), (rules, Vec::new()));
}

#[test]
fn in_libvirts_stores_what_was_read_stays_in_force_while_its_file_is_damaged() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(2), Fake::new());
    let mut config = lab.config();
    config.layout = Layout::Libvirt;
    let open = || Driver::builder().config(config.clone()).without_learner().open(fake.clone()).unwrap();
    let driver = open();
    define(&driver, &[accepting("f", 22)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();
    let file = lab.filters().join("f.xml");
    fs::write(&file, "<filter name='f'><rule").unwrap();

    assert!(driver.problems().unwrap()[0].why.contains("what was read before stays in force"));
    assert_eq!(driver.filter(&filter_name("f")).unwrap().entries.len(), 1);
    lab.host.enter(|| driver.create_binding(binding("p1", "f"))).unwrap();
    assert!(open().filter(&filter_name("f")).is_err(), "another process has read nothing before");
    define(&driver, &[accepting("f", 80)]).unwrap();
    assert!(driver.problems().unwrap().is_empty());
    assert_eq!(fs::read_to_string(lab.filters().join("f.xml.damaged")).unwrap(), "<filter name='f'><rule");

    fs::remove_file(&file).unwrap();
    assert!(driver.filter(&filter_name("f")).is_err(), "a file that is gone is no damaged one");
}

#[test]
fn a_file_that_another_process_removes_while_the_store_is_read_is_no_problem() {
    skip_unless!(Need::Root);
    let lab = Lab::new(0);
    fs::create_dir(lab.bindings()).unwrap();
    // Many, so that some are removed between the listing and the reading.
    let paths: Vec<_> = (0..50).map(|port| lab.bindings().join(format!("p{port}.xml"))).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                for (port, path) in paths.iter().enumerate() {
                    fs::write(path, binding_xml(&format!("p{port}"), "allow-arp")).unwrap();
                }
                paths.iter().for_each(|path| fs::remove_file(path).unwrap());
            }
            done.store(true, Relaxed);
        });
        let driver = lab.fake_driver(&Fake::new());
        while !done.load(Relaxed) {
            let problems = driver.problems().unwrap();
            // What is read while it is written is damaged.
            assert!(!problems.iter().any(|problem| problem.kind == ProblemKind::Unreadable), "{problems:?}");
        }
    });
}
