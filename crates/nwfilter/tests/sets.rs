//! Sets of the store: operations, what they hold, who uses them, and that the kernel follows.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;

use nwfilter::rules::SetContent;
use nwfilter::xml::{Binding, FilterSet, SetEntry, SetFamily, SetName, SetRange, read_binding, read_set};
use nwfilter::{Config, Driver, Error, Event, Fake, Host, Transaction};
use proptest::prelude::*;
use proptest::sample::select;

/// A driver over a kernel in memory.
struct Lab {
    dir: tempfile::TempDir,
    fake: Fake,
    driver: Driver,
}

impl Lab {
    fn new() -> Self {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let driver = open(&dir, &fake);
        Self { dir, fake, driver }
    }

    fn define(&self, xml: &str) -> Result<Arc<FilterSet>, Error> {
        self.driver.define_set("s.xml", xml).map(|(set, _)| set)
    }

    fn filter(&self, rules: &str) {
        self.driver.define_filter("f.xml", &format!("<filter name='f'>{rules}</filter>")).unwrap();
    }

    fn commit(&self, add: impl FnOnce(&mut Transaction) -> &mut Transaction) -> Result<(), Error> {
        let mut transaction = Transaction::new();
        add(&mut transaction);
        self.driver.commit(transaction).map(drop)
    }

    /// What the kernel has in a set.
    fn held(&self, name: &str) -> Option<Vec<String>> {
        let content = self.fake.set(name)?;
        Some(content.ranges().iter().map(ToString::to_string).collect())
    }

    /// The files of the sets and the kernel's content: what must stay where something is refused.
    fn state(&self) -> Vec<(String, String)> {
        let directory = self.dir.path().join("filters/sets");
        let files = fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path());
        let mut state: Vec<_> =
            files.map(|path| (path.display().to_string(), fs::read_to_string(&path).unwrap())).collect();
        let installed = nwfilter::Backend::installed(&self.fake).unwrap();
        state.extend(
            installed.sets.iter().map(|set| (set.to_string(), format!("{:?}", self.held(set.as_str())))),
        );
        state.sort();
        state
    }
}

fn open(dir: &tempfile::TempDir, fake: &Fake) -> Driver {
    let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
    Driver::builder().config(config).host(Host::fake()).without_learner().open(fake.clone()).unwrap()
}

fn set(family: &str, name: &str, members: &str) -> String {
    format!("<filterset name='{name}' family='{family}'>{members}</filterset>")
}

fn binding(port: &str, parameters: &str) -> Binding {
    let text = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='{port}'/><mac address='52:54:00:00:00:01'/>
         <filterref filter='f'>{parameters}</filterref></filterbinding>"
    );
    read_binding("b.xml", &text).into_result().unwrap()
}

fn name(name: &str) -> SetName {
    name.parse().unwrap()
}

fn ranges(entries: &[&str]) -> Vec<SetRange> {
    entries.iter().map(|entry| SetRange::parse(SetFamily::Ipv4, entry).unwrap()).collect()
}

fn entries(texts: &[&str]) -> Vec<SetEntry> {
    ranges(texts).into_iter().map(SetEntry::from).collect()
}

const ASKING: &str = "<rule action='accept' direction='in'><tcp ipset='admins' ipsetflags='src'/></rule>";

#[test]
fn a_set_is_defined_changed_and_removed_in_store_and_kernel() {
    let lab = Lab::new();
    let events = lab.driver.subscribe();
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.1' comment='gateway'/>")).unwrap();
    assert_eq!(lab.held("admins").unwrap(), ["10.0.0.1"]);
    lab.commit(|t| t.add_to_set(&name("admins"), entries(&["10.0.0.0/31", "10.0.0.1"]))).unwrap();
    assert_eq!(lab.held("admins").unwrap(), ["10.0.0.0/31"]);
    let stored = lab.driver.set(&name("admins")).unwrap();
    assert_eq!(stored.entries.len(), 2);
    assert_eq!(stored.entries[0].comment.as_deref(), Some("gateway"));
    lab.commit(|t| t.remove_from_set(&name("admins"), ranges(&["10.0.0.0/31"]))).unwrap();
    lab.commit(|t| t.replace_in_set(&name("admins"), entries(&["10.0.0.8/29"]))).unwrap();
    assert_eq!(lab.held("admins").unwrap(), ["10.0.0.8/29"]);
    // Another process sees the same, and a driver that has just been opened.
    assert_eq!(open(&lab.dir, &lab.fake).sets().unwrap(), lab.driver.sets().unwrap());
    lab.commit(|t| t.undefine_set(&name("admins"))).unwrap();
    assert_eq!((lab.held("admins"), lab.driver.sets().unwrap().len()), (None, 0));
    let (defined, changed) = (Event::SetDefined(name("admins")), Event::SetChanged(name("admins")));
    let expected = [defined, changed.clone(), changed.clone(), changed, Event::SetUndefined(name("admins"))];
    assert_eq!(events.try_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn wrong_input_is_refused_and_changes_nothing() {
    let lab = Lab::new();
    lab.define(&set("ipv4", "a", "<entry value='10.0.0.0/24'/>")).unwrap();
    lab.define(&set("ipv4", "b", "<include set='a'/>")).unwrap();
    lab.define(&set("ipv6", "six", "<entry value='fd00::1'/>")).unwrap();
    let before = lab.state();
    let many: String =
        (0..200_000u32).map(|n| format!("<entry value='{}'/>", Ipv4Addr::from(n * 2))).collect();
    let refused = |result: Result<(), Error>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(lab.state(), before);
    };
    let define = |xml: &str| lab.define(xml).map(drop);
    refused(define(&set("ipv4", "a", "<entry value='fd00::1'/>")), "'fd00::1' is no entry of this set");
    refused(define(&set("ipv4", "a", "<include set='b'/>")), "it would include itself: a → b → a");
    refused(define(&set("ipv4", "c", "<include set='none'/>")), "it includes 'none', which does not exist");
    refused(define(&set("ipv4", "c", "<include set='six'/>")), "'six', which holds IPv6 addresses, not IPv4");
    refused(define(&set("ipv6", "a", "")), "set 'a' is in use by set 'b'");
    let remove = |entry| lab.commit(|t| t.remove_from_set(&name("a"), ranges(&[entry])));
    refused(remove("10.0.0.7"), "'10.0.0.7' is no entry of its own, but a part of '10.0.0.0/24'");
    refused(remove("10.1.0.7"), "'10.1.0.7' is no entry");
    refused(lab.commit(|t| t.add_to_set(&name("six"), entries(&["10.0.0.1"]))), "it holds IPv6 addresses");
    refused(lab.commit(|t| t.add_to_set(&name("none"), entries(&["10.0.0.1"]))), "no set is named 'none'");
    refused(lab.commit(|t| t.undefine_set(&name("a"))), "set 'a' is in use by set 'b'");
    // All or nothing: the second operation of two is refused.
    refused(
        lab.commit(|t| t.add_to_set(&name("a"), entries(&["10.9.0.0/16"])).undefine_set(&name("none"))),
        "no set is named 'none'",
    );
    // Two sets together are too large, where each is not.
    define(&set("ipv4", "large", &many)).unwrap();
    let error = define(&set("ipv4", "larger", &format!("{many}<include set='large'/>"))).unwrap_err();
    assert!(
        error.to_string().contains("with its includes and tags it has more than 262144 entries"),
        "{error}"
    );
}

#[test]
fn a_set_that_a_filter_uses_comes_with_the_port_and_cannot_go() {
    let lab = Lab::new();
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.1'/>")).unwrap();
    lab.filter(ASKING);
    lab.driver.create_binding(binding("p0", "")).unwrap();
    let asks = |fake: &Fake| {
        format!("{:?}", fake.ruleset(&"p0".parse().unwrap()).unwrap().ipv4).contains("Set { name: \"admins\"")
    };
    assert!(asks(&lab.fake));
    let refused = lab.commit(|t| t.undefine_set(&name("admins"))).unwrap_err().to_string();
    assert_eq!(refused, "set 'admins' is in use by filter 'f'");
    // A kernel that lost everything gets rules and sets back, and a new driver brings the set of a port along.
    nwfilter::Backend::clear(&lab.fake).unwrap();
    lab.driver.reload().unwrap();
    assert!(asks(&lab.fake) && lab.held("admins").is_some());
    assert!(lab.driver.diff().unwrap().is_empty());
    nwfilter::Backend::clear(&lab.fake).unwrap();
    lab.driver.create_binding(binding("p1", "")).unwrap();
    assert_eq!(lab.held("admins").unwrap(), ["10.0.0.1"]);
}

#[test]
fn a_filter_names_an_ipset_of_the_host_until_there_is_a_set_of_the_name() {
    let lab = Lab::new();
    lab.fake.add_ip_set("admins");
    lab.filter(ASKING);
    lab.driver.create_binding(binding("p0", "")).unwrap();
    let rules = || format!("{:?}", lab.fake.ruleset(&"p0".parse().unwrap()).unwrap().ipv4);
    assert!(rules().contains("IpSet {"), "{}", rules());
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.1'/>")).unwrap();
    assert!(!rules().contains("IpSet {"), "{}", rules());
    // A set that does not fit the rule would leave the port without its filter.
    let before = lab.state();
    lab.driver.delete_binding(&"p0".parse().unwrap()).unwrap();
    lab.filter("");
    lab.commit(|t| t.undefine_set(&name("admins"))).unwrap();
    lab.filter(ASKING);
    lab.driver.create_binding(binding("p0", "")).unwrap();
    assert!(lab.define(&set("ipv6", "admins", "")).is_err());
    assert_ne!(lab.state(), before);
    assert_eq!(lab.held("admins"), None);
}

#[test]
fn a_set_of_a_variables_name_is_in_use_by_the_port() {
    let lab = Lab::new();
    lab.define(&set("ipv4", "admins", "")).unwrap();
    lab.filter("<rule action='accept' direction='in'><tcp ipset='$WHO' ipsetflags='src'/></rule>");
    lab.driver.create_binding(binding("p0", "<parameter name='WHO' value='admins'/>")).unwrap();
    let refused = lab.commit(|t| t.undefine_set(&name("admins"))).unwrap_err().to_string();
    assert_eq!(refused, "set 'admins' is in use by port 'p0'");
}

#[test]
fn a_damaged_set_is_reported_and_leaves_the_kernels_content() {
    let lab = Lab::new();
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.1'/>")).unwrap();
    fs::write(lab.dir.path().join("filters/sets/admins.xml"), "<filterset name='admins'").unwrap();
    assert_eq!(lab.driver.problems().unwrap().len(), 1);
    lab.driver.reload().unwrap();
    assert_eq!(lab.held("admins").unwrap(), ["10.0.0.1"]);
}

#[test]
fn packets_are_explained_by_what_a_set_holds() {
    let lab = Lab::new();
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.0/24'/>")).unwrap();
    lab.filter(&format!("{ASKING}<rule action='drop' direction='in'><all/></rule>"));
    lab.driver.create_binding(binding("p0", "<parameter name='IP' value='10.1.0.1'/>")).unwrap();
    let port = lab.driver.explain(&"p0".parse().unwrap()).unwrap();
    let outcome = |from: &str| {
        let words = ["in", "tcp", "from", from, "to", ":22"];
        let question = nwfilter::explain::Question::read(&port.guest(), &words).unwrap();
        port.explainer().explain(question.way, &question.packet).unwrap().outcome.to_string()
    };
    assert_ne!(outcome("10.0.0.9"), outcome("10.0.1.9"));
}

/// What happens to ports with tags.
#[derive(Clone, Debug)]
enum Step {
    Bind { port: u8, tags: Vec<&'static str>, ip: u8 },
    Unbind { port: u8 },
    Add { entry: u8 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tags = prop::collection::vec(select(vec!["web", "db", "other"]), 0..3);
    let bind = (0u8..50, tags, 1u8..250).prop_map(|(port, tags, ip)| Step::Bind { port, tags, ip });
    let step = prop_oneof![6 => bind, 2 => (0u8..50).prop_map(|port| Step::Unbind { port }),
        1 => (1u8..250).prop_map(|entry| Step::Add { entry })];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_kernel_has_the_addresses_of_the_ports_with_a_tag_after_each_step(steps in steps()) {
        let lab = Lab::new();
        lab.filter("<rule action='accept' direction='in'><tcp ipset='all' ipsetflags='src'/></rule>");
        lab.define(&set("ipv4", "web", "<tag name='web'/>")).unwrap();
        lab.define(&set("ipv4", "all", "<include set='web'/><tag name='db'/>")).unwrap();
        let mut model: Vec<Option<(Vec<&str>, u8)>> = vec![None; 50];
        let mut own = BTreeSet::new();
        for step in steps {
            match step {
                Step::Bind { port, tags, ip } => {
                    // Several values, or one with several tags.
                    let value = match &tags[..] {
                        [a, b] if ip % 2 == 0 => format!("<parameter name='CTRL_TAGS' value='{a}:{b}'/>"),
                        tags => tags.iter().map(|tag| format!("<parameter name='CTRL_TAGS' value='{tag}'/>")).collect(),
                    };
                    let text = format!("<parameter name='IP' value='10.0.0.{ip}'/>{value}");
                    lab.driver.replace_binding(binding(&format!("p{port}"), &text)).unwrap();
                    model[usize::from(port)] = Some((tags, ip));
                }
                Step::Unbind { port } => {
                    let bound = model[usize::from(port)].take().is_some();
                    let name = format!("p{port}").parse().unwrap();
                    prop_assert_eq!(lab.driver.delete_binding(&name).is_ok(), bound);
                }
                Step::Add { entry } => {
                    let entry = format!("10.0.1.{entry}");
                    lab.commit(|t| t.add_to_set(&name("web"), entries(&[&entry]))).unwrap();
                    own.insert(entry);
                }
            }
            let of = |tag: &str| -> Vec<String> {
                let ports = model.iter().flatten().filter(|(tags, _)| tags.contains(&tag));
                ports.map(|(_, ip)| format!("10.0.0.{ip}")).collect()
            };
            let expected = |texts: Vec<String>| {
                let texts: Vec<_> = texts.iter().map(String::as_str).collect();
                SetContent::of(SetFamily::Ipv4, ranges(&texts))
            };
            let web: Vec<_> = of("web").into_iter().chain(own.iter().cloned()).collect();
            prop_assert_eq!(&*lab.fake.set("web").unwrap(), &expected(web.clone()));
            let all = web.into_iter().chain(of("db")).collect();
            prop_assert_eq!(&*lab.fake.set("all").unwrap(), &expected(all));
        }
        prop_assert!(lab.driver.diff().unwrap().is_empty());
    }
}

#[test]
fn a_set_of_mac_addresses_has_those_of_the_ports_with_its_tag() {
    let lab = Lab::new();
    lab.filter("");
    lab.define(&set("mac", "known", "<tag name='web'/>")).unwrap();
    lab.driver.create_binding(binding("p0", "<parameter name='CTRL_TAGS' value='web'/>")).unwrap();
    assert_eq!(lab.held("known").unwrap(), ["52:54:00:00:00:01"]);
    lab.driver.delete_binding(&"p0".parse().unwrap()).unwrap();
    assert_eq!(lab.held("known").unwrap(), [""; 0]);
}

#[test]
fn sets_are_in_a_directory_of_their_own_beside_filters_that_stay_as_they_are() {
    let lab = Lab::new();
    lab.filter(ASKING);
    let filter = fs::read(lab.dir.path().join("filters/f.xml")).unwrap();
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.1'/>")).unwrap();
    assert_eq!(fs::read(lab.dir.path().join("filters/f.xml")).unwrap(), filter);
    let text = fs::read_to_string(lab.dir.path().join("filters/sets/admins.xml")).unwrap();
    assert_eq!(read_set("s.xml", &text).into_result().unwrap().entries.len(), 1);
}

#[test]
fn a_set_that_cannot_be_is_an_error_of_a_reload_and_blocks_nothing() {
    let lab = Lab::new();
    lab.filter(ASKING);
    lab.define(&set("ipv4", "admins", "<entry value='10.0.0.1'/>")).unwrap();
    lab.driver.create_binding(binding("p0", "")).unwrap();
    let broken = set("ipv4", "broken", "<include set='gone'/>");
    fs::write(lab.dir.path().join("filters/sets/broken.xml"), broken).unwrap();
    let events = lab.driver.subscribe();
    let reloaded = lab.driver.reload().unwrap();
    assert!(!reloaded.is_complete() && reloaded.failed.is_empty());
    let [failed] = &reloaded.failed_sets[..] else { panic!("{reloaded:?}") };
    assert_eq!(
        nwfilter::with_causes(failed),
        "set 'broken' does not hold in the kernel what it must: set 'broken': it includes 'gone', which does not exist"
    );
    assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::SetFailed(name("broken"))]);
    let drift = lab.driver.diff().unwrap();
    assert!(!drift.is_empty() && drift.differences.is_empty());
    assert_eq!(lab.held("admins").unwrap(), ["10.0.0.1"]);
}

#[test]
fn only_ipsets_that_are_no_sets_of_the_store_speak_for_a_backend_that_has_ipsets() {
    let lab = Lab::new();
    let config = Config::new(lab.dir.path().join("filters"), lab.dir.path().join("bindings"));
    let names = |value: &str| {
        lab.filter(&ASKING.replace("admins", value));
        config.names_an_ip_set()
    };
    assert!(names("admins"));
    lab.define(&set("ipv4", "admins", "")).unwrap();
    assert!(!names("admins"));
    assert!(names("admins2") && names("$SET"));
    lab.filter("<rule action='accept' direction='in'><all comment='no ipset='/></rule>");
    assert!(!config.names_an_ip_set());
}
