//! What the driver promises beside the rules themselves: all or nothing, in the kernel and on disk.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver, Error};
use nwfilter_testlab::{Host, Need, Tap, filter_name, port_dev, skip_unless};
use nwfilter_xtables::Xtables;

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore")];

/// A host with two taps, and a driver with stores of its own.
struct Lab {
    host: Host,
    driver: Driver,
    dir: tempfile::TempDir,
    _taps: [Tap; 2],
}

impl Lab {
    fn new() -> Self {
        Self::with_bridge_nf(true)
    }

    fn with_bridge_nf(bridge_nf: bool) -> Self {
        let host = Host::builder().bridge_nf(bridge_nf).build().unwrap();
        let taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
        let driver = Driver::open(config, Xtables::default()).unwrap();
        Self { host, driver, dir, _taps: taps }
    }

    fn define(&self, xml: &str) -> Result<(), Error> {
        self.host.enter(|| self.driver.define_filter("test.xml", xml).map(drop))
    }

    fn bind(&self, port: &str, filter: &str) -> Result<(), Error> {
        let xml = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'/></filterbinding>"
        );
        let binding = read_binding("binding.xml", &xml).into_result()?;
        self.host.enter(|| self.driver.create_binding(binding).map(drop))
    }

    /// Everything that must stay as it is when something is refused.
    fn state(&self) -> (String, Vec<(String, String)>) {
        let saved = self.host.saved().unwrap();
        let mut files = Vec::new();
        for sub in ["filters", "bindings"] {
            for entry in fs::read_dir(self.dir.path().join(sub)).into_iter().flatten().flatten() {
                let text = fs::read_to_string(entry.path()).unwrap();
                files.push((entry.path().display().to_string(), text));
            }
        }
        files.sort();
        (format!("{saved:?}"), files)
    }
}

fn accepting(port: u16) -> String {
    format!(
        "<filter name='f'><rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule></filter>"
    )
}

/// An error with its causes, as the command line shows it.
fn explained(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[test]
fn redefining_a_filter_changes_the_ports_that_use_it_also_through_another() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.define(&accepting(22)).unwrap();
    lab.define("<filter name='outer'><filterref filter='f'/></filter>").unwrap();
    lab.bind("tap0", "outer").unwrap();
    assert!(lab.host.saved().unwrap().iptables.contains("--dport 22"));
    lab.define(&accepting(80)).unwrap();
    let saved = lab.host.saved().unwrap();
    assert!(saved.iptables.contains("--dport 80") && !saved.iptables.contains("--dport 22"));
}

#[test]
fn redefining_a_filter_keeps_its_uuid() {
    skip_unless!(NEEDS[0]);
    let lab = Lab::new();
    lab.define(&accepting(22)).unwrap();
    let first = lab.driver.filter(&filter_name("f")).unwrap().uuid;
    lab.define(&accepting(80)).unwrap();
    assert_eq!(lab.driver.filter(&filter_name("f")).unwrap().uuid, first);
    let other = accepting(80).replace("<rule", "<uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid><rule");
    assert!(matches!(lab.define(&other), Err(Error::UuidConflict { .. })));
}

#[test]
fn a_filter_in_use_is_not_undefined() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.define(&accepting(22)).unwrap();
    lab.define("<filter name='outer'><filterref filter='f'/></filter>").unwrap();
    lab.bind("tap0", "outer").unwrap();
    for name in ["f", "outer"] {
        let error = lab.driver.undefine_filter(&filter_name(name)).unwrap_err();
        assert_eq!(error.to_string(), format!("filter '{name}' is in use by tap0"));
    }
    lab.host.enter(|| lab.driver.delete_binding(&port_dev("tap0"))).unwrap();
    lab.driver.undefine_filter(&filter_name("outer")).unwrap();
    lab.driver.undefine_filter(&filter_name("f")).unwrap();
    assert!(matches!(lab.driver.filter(&filter_name("f")), Err(Error::NoSuchFilter(_))));
}

#[test]
fn a_filter_that_would_include_itself_is_not_defined() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
    let driver = Driver::open(config, Xtables::default()).unwrap();
    let filter = |name: &str, includes: &str| {
        let text = format!("<filter name='{name}'><filterref filter='{includes}'/></filter>");
        driver.define_filter("test.xml", &text)
    };
    let direct = filter("a", "a").unwrap_err();
    assert_eq!(explained(&direct), "filter 'a' cannot be defined: filter 'a' includes itself: a → a");
    filter("a", "b").unwrap();
    filter("b", "c").unwrap();
    let circle = filter("c", "a").unwrap_err();
    assert!(explained(&circle).ends_with("includes itself: c → a → b → c"), "{}", explained(&circle));
    assert!(driver.filter(&filter_name("c")).is_err());
}

#[test]
fn what_the_kernel_refuses_changes_nothing_and_the_error_names_the_rule() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.define(&accepting(22)).unwrap();
    lab.bind("tap0", "f").unwrap();
    let before = lab.state();
    let broken = "<filter name='f'>
      <rule action='accept' direction='in'><mac protocolid='ipv4'/></rule>
      <rule action='accept' direction='in'><udp dstportstart='53'/></rule>
      <rule action='drop' direction='in'><tcp ipset='no-such-set'/></rule>
    </filter>";
    let error = explained(&lab.define(broken).unwrap_err());
    for part in ["f:4", "tap0", "iptables", "no-such-set"] {
        assert!(error.contains(part), "{part:?} is missing in: {error}");
    }
    assert_eq!(lab.state(), before);
    lab.define(&broken.replace("'f'", "'g'")).unwrap();
    let before = lab.state();
    lab.bind("tap1", "g").unwrap_err();
    assert_eq!(lab.state(), before);
}

#[test]
fn a_second_tool_that_refuses_takes_back_what_the_first_committed() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.define(&accepting(22)).unwrap();
    lab.bind("tap0", "f").unwrap();
    let before = lab.state();
    let broken = "<filter name='f'>
      <rule action='accept' direction='in'><udp dstportstart='53'/></rule>
      <rule action='drop' direction='in'><tcp-ipv6 ipset='no-such-set'/></rule>
    </filter>";
    let error = explained(&lab.define(broken).unwrap_err());
    assert!(error.contains("ip6tables"), "{error}");
    assert_eq!(lab.state(), before);
}

#[test]
fn bad_bindings_are_refused_with_a_reason() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.define("<filter name='v'><rule action='accept' direction='in'><tcp srcipaddr='$A' dstportstart='$B'/></rule></filter>")
        .unwrap();
    let before = lab.state();
    for (port, filter, expected) in [
        ("nosuch0", "clean-traffic", "there is no network interface 'nosuch0' on this host"),
        ("tap0", "nosuch", "no filter is named 'nosuch'"),
        ("tap0", "v", "no value for A, B"),
        ("../etc", "v", "cannot be a port device"),
        ("vnet+", "v", "cannot be a port device"),
    ] {
        let error = explained(&lab.bind(port, filter).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(lab.state(), before);
    lab.define(&accepting(22)).unwrap();
    lab.bind("tap0", "f").unwrap();
    assert!(matches!(lab.bind("tap0", "f"), Err(Error::BindingExists(_))));
    assert!(matches!(
        lab.host.enter(|| lab.driver.delete_binding(&port_dev("tap1"))),
        Err(Error::NoSuchBinding(_))
    ));
}

#[test]
fn applying_twice_changes_nothing_and_a_flush_is_repaired() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.define(&accepting(22)).unwrap();
    lab.bind("tap0", "f").unwrap();
    let before = lab.state();
    let again = lab.host.enter(|| lab.driver.reload()).unwrap();
    assert_eq!((again.applied.commits, again.applied.changed.len()), (0, 0));
    lab.host.run(&["iptables", "-F", "FI-tap0"]).unwrap();
    lab.host.run(&["iptables", "-A", "FO-tap0", "-j", "ACCEPT"]).unwrap();
    let drift = lab.host.enter(|| lab.driver.diff()).unwrap();
    let shown: Vec<_> = drift.differences.iter().map(ToString::to_string).collect();
    assert_eq!(shown.len(), 2, "{shown:#?}");
    assert!(shown.iter().any(|line| line.starts_with("- tap0 iptables: FI-tap0")), "{shown:#?}");
    assert!(shown.iter().any(|line| line == "+ tap0 iptables: FO-tap0 -j ACCEPT"), "{shown:#?}");
    lab.host.enter(|| lab.driver.reload()).unwrap();
    assert_eq!(lab.state(), before);
    lab.host.run(&["iptables", "-F"]).unwrap();
    lab.host.enter(|| lab.driver.reload()).unwrap();
    assert_eq!(lab.state(), before);
}

#[test]
fn rules_of_others_stay_and_ours_come_before_them() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    lab.host.run(&["iptables", "-A", "FORWARD", "-s", "192.0.2.1", "-j", "ACCEPT"]).unwrap();
    lab.host.run(&["ebtables", "-t", "nat", "-A", "PREROUTING", "-i", "other", "-j", "ACCEPT"]).unwrap();
    lab.define(&accepting(22)).unwrap();
    lab.bind("tap0", "f").unwrap();
    let saved = lab.host.run(&["iptables-save", "-t", "filter"]).unwrap();
    let forward: Vec<_> = saved.lines().filter(|line| line.starts_with("-A FORWARD")).collect();
    assert_eq!(
        forward,
        [
            "-A FORWARD -j libvirt-in",
            "-A FORWARD -j libvirt-out",
            "-A FORWARD -j libvirt-in-post",
            "-A FORWARD -s 192.0.2.1/32 -j ACCEPT",
        ]
    );
    lab.host.enter(|| lab.driver.delete_binding(&port_dev("tap0"))).unwrap();
    let saved = lab.host.saved().unwrap();
    assert!(saved.iptables.contains("192.0.2.1") && saved.ebtables.contains("-i other"));
}

#[test]
fn bridge_filtering_is_switched_on_before_ip_rules_count_or_they_are_refused() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::with_bridge_nf(false);
    let switch =
        || lab.host.enter(|| fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").unwrap());
    lab.define(&accepting(22)).unwrap();
    let forbidding = nwfilter_xtables::Settings { enable_bridge_filtering: false, ..Default::default() };
    let config = Config::new(lab.dir.path().join("filters"), lab.dir.path().join("other"));
    let strict = Driver::open(config, Xtables::new(forbidding)).unwrap();
    let binding =
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap1'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/></filterbinding>";
    let binding = read_binding("b.xml", binding).into_result().unwrap();
    let error = explained(&lab.host.enter(|| strict.create_binding(binding)).unwrap_err());
    assert!(error.contains("bridge-nf-call-iptables is 0"), "{error}");
    assert_eq!(switch().trim(), "0");
    lab.bind("tap0", "f").unwrap();
    assert_eq!(switch().trim(), "1");
}

#[test]
fn another_process_on_the_same_stores_is_seen() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    let config = Config::new(lab.dir.path().join("filters"), lab.dir.path().join("bindings"));
    let other = Driver::open(config, Xtables::default()).unwrap();
    other.define_filter("test.xml", &accepting(22)).unwrap();
    lab.bind("tap0", "f").unwrap();
    assert!(matches!(other.undefine_filter(&filter_name("f")), Err(Error::FilterInUse { .. })));
}

#[test]
fn a_damaged_file_is_ignored_and_the_rest_of_the_store_works() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
    fs::create_dir(&config.config_dir).unwrap();
    fs::write(config.config_dir.join("broken.xml"), "<filter name='broken'><rule").unwrap();
    fs::write(config.config_dir.join("wrong.xml"), "<filter name='right'/>").unwrap();
    fs::write(config.config_dir.join("good.xml"), "<filter name='good'/>").unwrap();
    let driver = Driver::open(config.clone(), Xtables::default()).unwrap();
    let names: Vec<_> = driver.filters().unwrap().iter().map(|filter| filter.name.to_string()).collect();
    assert!(
        names.contains(&"good".to_owned()) && !names.iter().any(|name| name == "broken" || name == "right")
    );
    assert!(config.config_dir.join("broken.xml").exists(), "nothing is lost");
}
