//! What a reload does on a host where not everything is as it should be.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use driver_support::{Lab, accepting, binding, define, explained, names, record, refused};
use nwfilter::rules::Ruleset;
use nwfilter::{Driver, Error, Fake, Fallback};
use nwfilter_testlab::{Need, filter_name, port_dev, skip_unless};
use nwfilter_xtables::{Settings, Xtables};

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore")];

#[test]
fn a_port_without_rules_keeps_what_it_has_or_is_closed_and_the_others_are_brought_in() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let (lab, variable) = (
        Lab::new(4),
        "<filter name='v'><rule action='accept' direction='in'><tcp srcipaddr='$A'/></rule></filter>",
    );
    let driver = lab.driver();
    define(&driver, &[accepting("good", 22), accepting("lost", 80), variable.to_owned()]).unwrap();
    lab.host.enter(|| {
        for (port, filter) in [("p0", "good"), ("p1", "lost"), ("p2", "good")] {
            driver.create_binding(binding(port, filter)).unwrap();
        }
    });
    let (good, lost) = (lab.port("p0"), lab.port("p1"));
    lab.host.run(&["iptables", "-F", "FI-p0"]).unwrap();
    lab.host.run(&["ebtables", "-t", "nat", "-F", "PREROUTING"]).unwrap();
    lab.lose_filter("lost");
    lab.write_binding("p3", "v");
    let drift = lab.host.enter(|| driver.diff()).unwrap();
    assert_eq!(names(drift.failed.iter().map(|failed| &failed.port)), ["p1", "p3"]);
    assert!(drift.differences.iter().any(|difference| difference.subject.to_string() == "p0"), "{drift:?}");

    let done = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!(names(&done.applied.changed), ["p0", "p3"]);
    let [p1, p3] = done.failed.as_slice() else { panic!("{:?}", done.failed) };
    assert_eq!((p1.port.as_str(), p1.filter.as_str(), p1.fallback), ("p1", "lost", Fallback::OldRules));
    assert_eq!(
        explained(p1),
        "port 'p1' does not get filter 'lost' but the rules it has: port 'p1' cannot be filtered by 'lost': \
         no filter is named 'lost'"
    );
    assert_eq!((p3.port.as_str(), p3.fallback), ("p3", Fallback::DropAll));
    assert!(explained(p3).contains("no value for A"), "{}", explained(p3));
    assert!(matches!(*p3.error, Error::Rules { .. }));
    assert_eq!((lab.port("p0"), lab.port("p1")), (good, lost));
    let closed = lab.port("p3");
    assert!(
        closed.contains("-A libvirt-I-p3 -j DROP") && closed.contains("-A libvirt-O-p3 -j DROP"),
        "{closed}"
    );

    let again = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!((again.applied.commits, again.failed.len()), (0, 2));
    assert_eq!(again.failed[1].fallback, Fallback::OldRules, "the drop is what it has");

    // Rules to which nothing leads filter nothing.
    lab.host.run(&["iptables", "-F", "libvirt-in"]).unwrap();
    let closed = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!((closed.failed[0].port.as_str(), closed.failed[0].fallback), ("p1", Fallback::DropAll));
    assert!(lab.port("p1").contains("-A libvirt-I-p1 -j DROP"), "{}", lab.port("p1"));
}

#[test]
fn a_port_whose_rule_the_tools_refuse_is_left_out_and_the_others_are_brought_in() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(5);
    let driver = lab.driver();
    define(&driver, &[accepting("good", 22), refused("bad"), refused("worse")]).unwrap();
    for (port, filter) in [("p0", "bad"), ("p1", "good"), ("p2", "worse"), ("p3", "bad"), ("p4", "good")] {
        lab.write_binding(port, filter);
    }
    let done = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!(names(&done.applied.changed), ["p0", "p1", "p2", "p3", "p4"]);
    assert_eq!(names(done.failed.iter().map(|failed| &failed.port)), ["p0", "p2", "p3"]);
    for failed in &done.failed {
        let told = explained(failed);
        assert!(told.contains(&format!("refused on port {} in iptables: ", failed.port)), "{told}");
        assert!(told.contains(&format!("{}:", failed.filter)), "{told}");
        assert_eq!(failed.fallback, Fallback::DropAll);
        assert!(lab.port(failed.port.as_str()).contains("DROP"));
    }
    assert!(lab.port("p4").contains("--dport 22"));
}

#[test]
fn what_the_host_lacks_keeps_only_the_ports_that_need_it() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(2);
    lab.host.set_bridge_nf(false).unwrap();
    let settings = Settings { enable_bridge_filtering: false, ..Settings::default() };
    let driver =
        Driver::builder().config(lab.config()).without_learner().open(Xtables::new(settings)).unwrap();
    let ethernet = "<filter name='e'><rule action='accept' direction='out'><arp opcode='1'/></rule></filter>";
    define(&driver, &[accepting("ip", 22), ethernet.to_owned()]).unwrap();
    lab.write_binding("p0", "ip");
    lab.write_binding("p1", "e");
    let done = lab.host.enter(|| driver.reload()).unwrap();
    let [p0] = done.failed.as_slice() else { panic!("{:?}", done.failed) };
    assert!(
        p0.port.as_str() == "p0" && explained(p0).contains("bridge-nf-call-iptables"),
        "{}",
        explained(p0)
    );
    assert!(lab.port("p0").contains("-A libvirt-I-p0 -j DROP"));
    assert!(lab.port("p1").contains("--arp-op"), "{}", lab.port("p1"));
}

#[test]
fn only_the_ports_whose_rule_is_refused_fail() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(50), Fake::new());
    let driver = lab.fake_driver(&fake);
    define(&driver, &[accepting("shared", 22), accepting("other", 80)]).unwrap();
    for index in 0..50 {
        lab.write_binding(&format!("p{index}"), if index < 40 { "shared" } else { "other" });
    }
    let asked = record(&fake);
    let refuse = |port: &str| fake.refuse(&port.parse().unwrap(), true);
    ["p1", "p7", "p39"].into_iter().for_each(refuse);
    let done = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!(names(done.failed.iter().map(|failed| &failed.port)), ["p1", "p39", "p7"]);
    assert_eq!(
        asked.lock().unwrap().len(),
        5,
        "all, those with another rule, and those that are alike, twice more"
    );
    assert_eq!(asked.lock().unwrap()[1].len(), 50, "until they are tried, ports without rules are closed");
    let closed = |port: &str| *fake.ruleset(&port_dev(port)).unwrap() == Ruleset::drop_all();
    assert!(closed("p1") && closed("p7") && !closed("p2") && !closed("p45"));

    // Of many refusals not each is asked for.
    (0..40).for_each(|index| refuse(&format!("p{index}")));
    asked.lock().unwrap().clear();
    let done = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!(done.failed.len(), 40);
    assert!(done.failed.iter().all(|failed| failed.fallback == Fallback::OldRules));
    let asked = asked.lock().unwrap().len();
    assert!(asked < 40, "{asked}");
}

#[test]
fn rules_without_binding_go_when_their_interface_is_gone_and_stay_when_it_exists() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(3);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 22)]).unwrap();
    for port in ["p0", "p1", "p2"] {
        lab.host.enter(|| driver.create_binding(binding(port, "f"))).unwrap();
    }
    let rules = lab.port("p1");
    for port in ["p1", "p2"] {
        std::fs::remove_file(lab.bindings().join(format!("{port}.xml"))).unwrap();
    }
    lab.host.ip(&["link del p2"]).unwrap();

    let drift = lab.host.enter(|| driver.diff()).unwrap();
    assert_eq!(names(&drift.unmanaged.unbound), ["p1"]);
    assert!(
        !drift.is_empty()
            && drift.differences.iter().all(|difference| difference.subject.to_string() == "p2"),
        "{drift:?}"
    );
    let done = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!((names(&done.removed), names(&done.unmanaged.unbound)), (vec!["p2"], vec!["p1"]));
    assert_eq!(names(&done.applied.changed), ["p2"]);
    assert!(lab.host.saved().unwrap().port("p2").is_empty());
    assert_eq!(lab.port("p1"), rules);
    assert!(lab.host.enter(|| driver.diff()).unwrap().is_empty());
}

#[test]
fn a_binding_whose_interface_is_gone_stays_and_makes_no_rules() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(2);
    let driver = lab.driver();
    define(&driver, &[accepting("f", 22)]).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p0", "f"))).unwrap();
    lab.host.enter(|| driver.create_binding(binding("p1", "f"))).unwrap();
    let rules = lab.port("p1");
    lab.write_binding("p9", "f");
    lab.host.ip(&["link del p1"]).unwrap();
    let done = lab.host.enter(|| driver.reload()).unwrap();
    assert_eq!(names(&done.unmanaged.absent), ["p1", "p9"]);
    assert_eq!((done.applied.commits, done.failed.len()), (0, 0));
    assert_eq!((lab.port("p1"), lab.host.saved().unwrap().port("p9").is_empty()), (rules.clone(), true));
    // Nor is a filter refused because of it.
    lab.host.enter(|| define(&driver, &[accepting("f", 80)])).unwrap();
    assert_eq!(lab.port("p1"), rules);
    assert!(
        matches!(driver.undefine_filter(&filter_name("f")), Err(Error::FilterInUse { ports, .. }) if ports.len() == 3)
    );
    lab.host.enter(|| driver.delete_binding(&port_dev("p1"))).unwrap();
    assert!(lab.host.saved().unwrap().port("p1").is_empty());
}
