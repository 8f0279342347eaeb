//! What others change in the kernel is brought back by itself, and nothing else is touched.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use nwfilter::rules::{ApplyError, Batch, Installed, Planned, Ruleset, Scope, Unsupported};
use nwfilter::xml::read_binding;
use nwfilter::{Applied, Backend, Config, Difference, Driver, Fake, ForeignChange, Reconciler, Watch};
use nwfilter_testlab::{Host, Need, Saved, Tap, port_dev, skip_unless};
use nwfilter_xtables::Xtables;
use nwfilter_xtables::generation;

const NEEDS: [Need; 4] =
    [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"), Need::Tool("nft")];
/// How long something that must happen may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Repairs that are no fight.
const FEW: u64 = 10;

/// Has rules in each of the tables that the backend writes.
const FILTER: &str = "<filter name='f'><filterref filter='no-mac-spoofing'/>
  <rule action='accept' direction='in'><tcp dstportstart='21'/></rule>
  <rule action='accept' direction='in'><tcp-ipv6 dstportstart='21'/></rule>
  <rule action='accept' direction='out' statematch='false'><all state='ESTABLISHED,RELATED'/></rule>
  <rule action='drop' direction='inout'><all/></rule></filter>";

/// A host with two filtered ports.
struct Lab {
    host: Host,
    driver: Driver,
    dir: tempfile::TempDir,
    _taps: [Tap; 2],
}

impl Lab {
    /// The names of the ports start with `prefix`, which tells the log of one test from that of another.
    fn new(prefix: &str) -> Self {
        Self::with_backend(prefix, Xtables::default())
    }

    fn with_backend(prefix: &str, backend: impl Backend + 'static) -> Self {
        let host = Host::new().unwrap();
        let names = [format!("{prefix}0"), format!("{prefix}1")];
        let taps = names.each_ref().map(|name| host.tap(name).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let driver = Driver::open(config(dir.path().into()), backend).unwrap();
        host.enter(|| driver.define_filter("f.xml", FILTER)).unwrap();
        for (number, port) in names.iter().enumerate() {
            let binding = format!(
                "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
                 <portdev name='{port}'/><mac address='52:54:00:7b:35:0{number}'/>
                 <filterref filter='f'><parameter name='IP' value='10.0.0.{number}'/></filterref></filterbinding>"
            );
            host.enter(|| driver.create_binding(read_binding("b.xml", &binding).into_result().unwrap()))
                .unwrap();
        }
        Self { host, driver, dir, _taps: taps }
    }

    fn keep(&self) -> Reconciler {
        let reconciler = self.host.enter(|| self.driver.keep()).unwrap();
        assert_eq!(reconciler.repairs(), 0);
        reconciler
    }

    /// Runs a program to its end, and tells what process it was.
    fn run(&self, command: &str) -> u32 {
        let mut process = self.host.spawn(&command.split(' ').collect::<Vec<_>>()).unwrap();
        assert!(process.wait(PATIENCE).unwrap().success(), "{command}: {}", process.log());
        process.pid()
    }

    fn saved(&self) -> Saved {
        self.host.saved().unwrap()
    }

    fn generation(&self) -> u32 {
        self.host.enter(generation).unwrap()
    }

    fn is_kept(&self) -> bool {
        self.host.enter(|| self.driver.diff()).unwrap().is_empty()
    }
}

fn config(dir: PathBuf) -> Config {
    Config::new(dir.join("filters"), dir.join("bindings"))
}

#[track_caller]
fn eventually<T: Debug>(what: impl Fn() -> T, is_so: impl Fn(&T) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = what();
        if is_so(&now) {
            return;
        }
        assert!(Instant::now() < deadline, "still {now:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The log of all tests of this file.
struct Records(Mutex<Vec<(log::Level, String)>>);

static RECORDS: Records = Records(Mutex::new(Vec::new()));

impl log::Log for Records {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push((record.level(), record.args().to_string()));
    }

    fn flush(&self) {}
}

/// Records that are at least warnings and contain a text.
fn logged(text: &str) -> Vec<(log::Level, String)> {
    let records = RECORDS.0.lock().unwrap();
    records
        .iter()
        .filter(|(level, said)| *level <= log::Level::Warn && said.contains(text))
        .cloned()
        .collect()
}

fn record_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&RECORDS).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
}

#[test]
fn any_lost_or_foreign_rule_is_repaired_and_the_log_names_the_process() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3]);
    record_log();
    let lab = Lab::new("any");
    let before = lab.saved();
    assert!(before.iptables.contains("CT-any0") && before.ip6tables.contains("FI-any1"), "{before:?}");
    let mut reconciler = lab.keep();
    for (damage, said) in [
        ("iptables -F", "- host iptables: FORWARD -j libvirt-in"),
        ("iptables -F FORWARD", "- host iptables: FORWARD -j libvirt-in"),
        ("iptables -D FORWARD 1", "- host iptables: FORWARD -j libvirt-in"),
        ("iptables -F libvirt-out", "- any0 iptables: libvirt-out"),
        ("iptables -I FI-any0 1 -j ACCEPT", "+ any0 iptables: FI-any0 -j ACCEPT"),
        ("iptables -D FO-any1 1", "- any1 iptables: FO-any1"),
        ("ip6tables -F INPUT", "- host ip6tables: INPUT -j libvirt-host-in"),
        ("iptables -t raw -F", "- host iptables raw: PREROUTING -j nwfilter-ct"),
        ("ebtables -t nat -F", "ebtables: PREROUTING -i any0 -j libvirt-I-any0"),
        ("nft flush chain bridge nat libvirt-I-any1", "- any1 ebtables: libvirt-I-any1"),
        ("nft delete table ip6 filter", "- any0 ip6tables: FI-any0"),
        ("nft flush ruleset", "more"),
    ] {
        if reconciler.repairs() == FEW {
            drop(reconciler);
            reconciler = lab.keep();
        }
        let (number, program, begin) =
            (reconciler.repairs() + 1, damage.split(' ').next().unwrap(), Instant::now());
        let process = lab.run(damage);
        eventually(|| (reconciler.repairs(), lab.saved()), |now| *now == (number, before.clone()));
        eprintln!("{damage}: repaired within {:?}", begin.elapsed());
        let logged = logged(&format!("{program} (process {process}) "));
        let [(log::Level::Warn, text)] = &logged[..] else { panic!("{damage}: {logged:#?}") };
        assert!(text.starts_with("repaired what "), "{text}");
        assert!(text.contains(said), "{damage}: {said:?} is not in {text}");
        assert!(text.lines().count() <= 12, "{text}");
    }
}

#[test]
fn bridged_packets_that_iptables_does_not_see_any_more_are_shown_to_it_again() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3]);
    record_log();
    let lab = Lab::new("off");
    let off = |differences: &[Difference]| differences.iter().map(ToString::to_string).collect::<Vec<_>>();
    let expected = [
        "- host sysctl: net.bridge.bridge-nf-call-ip6tables = 1",
        "- host sysctl: net.bridge.bridge-nf-call-iptables = 1",
    ];
    lab.host.set_bridge_nf(false).unwrap();
    assert_eq!(off(&lab.host.enter(|| lab.driver.diff()).unwrap().differences), expected);
    let reconciler = lab.keep();
    eventually(|| (lab.is_kept(), reconciler.repairs()), |now| *now == (true, 1));
    lab.host.set_bridge_nf(false).unwrap();
    eventually(|| (lab.is_kept(), reconciler.repairs()), |now| *now == (true, 2));
    let logged = logged(expected[0]);
    assert!(logged.iter().all(|(_, text)| text.starts_with("repaired what somebody changed")), "{logged:?}");
}

#[test]
fn ours_come_first_again_before_what_others_put_there() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new("first");
    lab.run("iptables -A FORWARD -s 192.0.2.1 -j ACCEPT");
    let reconciler = lab.keep();
    lab.run("iptables -I FORWARD 1 -s 192.0.2.2 -j ACCEPT");
    eventually(|| reconciler.repairs(), |repairs| *repairs == 1);
    let saved = lab.host.run(&["iptables-save", "-t", "filter"]).unwrap();
    let forward: Vec<_> = saved.lines().filter_map(|line| line.strip_prefix("-A FORWARD ")).collect();
    let theirs = ["-s 192.0.2.2/32 -j ACCEPT", "-s 192.0.2.1/32 -j ACCEPT"];
    assert_eq!(forward, [&["-j libvirt-in", "-j libvirt-out", "-j libvirt-in-post"][..], &theirs].concat());
}

#[test]
fn a_program_that_writes_its_whole_ruleset_anew_loses_nothing_of_its_own() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new("anew");
    let before = lab.saved();
    let reconciler = lab.keep();
    let theirs = "*raw\nCOMMIT\n*filter\n:theirs - [0:0]\n-A theirs -j DROP\n-A FORWARD -j theirs\nCOMMIT\n";
    lab.host.run_with_stdin(&["iptables-restore"], theirs).unwrap();
    eventually(|| (reconciler.repairs(), lab.is_kept()), |(repairs, kept)| *repairs > 0 && *kept);
    lab.run("iptables -D FORWARD -j theirs");
    lab.run("iptables -F theirs");
    lab.run("iptables -X theirs");
    assert_eq!(before.diff(&lab.saved()), None);
}

#[test]
fn what_leaves_the_ports_as_they_are_causes_no_write() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3]);
    let lab = Lab::new("calm");
    let reconciler = lab.keep();
    let begin = lab.generation();
    let theirs = [
        "iptables -N theirs",
        "iptables -A theirs -j DROP",
        "iptables -A FORWARD -j theirs",
        "iptables -t mangle -A FORWARD -j ACCEPT",
        "ebtables -t nat -A PREROUTING -i other -j ACCEPT",
        "nft add table inet theirs",
    ];
    for command in theirs {
        lab.run(command);
    }
    // Everything before it has been looked at when this one is repaired.
    std::thread::sleep(Duration::from_secs(1));
    lab.run("iptables -F libvirt-in");
    eventually(|| reconciler.repairs(), |repairs| *repairs == 1);
    // One of the tables is written for the repair.
    assert_eq!(lab.generation() - begin, theirs.len() as u32 + 1 + 1);
}

#[test]
fn what_is_there_already_is_looked_at_first_and_an_empty_store_asks_for_nothing() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new("early");
    let before = lab.saved();
    lab.run("iptables -F FI-early0");
    let reconciler = lab.keep();
    eventually(|| (reconciler.repairs(), lab.saved()), |now| *now == (1, before.clone()));
    for port in ["early0", "early1"] {
        lab.host.enter(|| lab.driver.delete_binding(&port_dev(port))).unwrap();
    }
    let begin = lab.generation();
    lab.run("iptables -F");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((reconciler.repairs(), lab.generation()), (1, begin + 1));
}

#[test]
fn changes_by_the_driver_and_by_others_at_the_same_time_end_in_order() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new("both");
    // A second reconciler of the same store, as in another process.
    let other = Driver::open(config(lab.dir.path().into()), Xtables::default()).unwrap();
    let _keepers = [lab.keep(), lab.host.enter(|| other.keep()).unwrap()];
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Not without end, so that a failure ends the test.
            for _ in 0..200 {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                // A tool whose table changes while it works on it may fail: theirs here, ours below.
                let _ = lab.host.run(&["iptables", "-F"]);
                let _ = lab.host.run(&["ebtables", "-t", "nat", "-F"]);
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        for port in (1000..1020).chain([21]) {
            let filter = FILTER.replace("'21'", &format!("'{port}'"));
            let define = || lab.host.enter(|| lab.driver.define_filter("f.xml", &filter)).err();
            eventually(define, Option::is_none);
        }
        end.store(true, Ordering::Relaxed);
    });
    eventually(|| lab.is_kept(), |kept| *kept);
    assert!(lab.saved().iptables.contains("--dport 21"));
    // What one reconciler repairs is none of the other's business.
    std::thread::sleep(Duration::from_secs(1));
    let generation = lab.generation();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(lab.generation(), generation);
}

#[test]
fn repairs_become_rare_when_a_program_undoes_them_again_and_again() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    record_log();
    let lab = Lab::new("fight");
    let reconciler = lab.keep();
    let mut fighter = 0;
    for repair in 1..=11 {
        fighter = lab.run("iptables -F FI-fight0");
        eventually(|| reconciler.repairs(), |repairs| *repairs == repair);
    }
    let advice = |process: u32| {
        let logged = logged(&format!("iptables (process {process}) changes again and again"));
        logged.into_iter().map(|(level, _)| level).collect::<Vec<_>>()
    };
    eventually(|| advice(fighter), |levels| *levels == [log::Level::Error]);
    // It is made good none the less, later.
    fighter = lab.run("iptables -F FI-fight0");
    eventually(|| reconciler.repairs(), |repairs| *repairs == 12);
    eventually(|| advice(fighter), |levels| *levels == [log::Level::Error]);
    lab.run("iptables -F FI-fight0");
    // It ends while it rests.
    drop(reconciler);
    assert!(!lab.is_kept());
}

/// A backend that fails once to apply, or to report what others change, when it is told to.
#[derive(Clone, Default)]
struct Failing {
    backend: Arc<Xtables>,
    apply: Arc<AtomicBool>,
    changes: Arc<AtomicBool>,
}

struct FailingWatch(Box<dyn Watch>, Arc<AtomicBool>);

fn fail_once(flag: &AtomicBool) -> Result<(), ApplyError> {
    match flag.swap(false, Ordering::Relaxed) {
        true => Err(ApplyError::Unavailable {
            scope: Scope::Everything,
            what: "the test".into(),
            why: "fails once".into(),
        }),
        false => Ok(()),
    }
}

impl Backend for Failing {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn check(&self, ruleset: &Ruleset) -> Result<(), Unsupported> {
        self.backend.check(ruleset)
    }

    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError> {
        self.backend.plan(batch)
    }

    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        fail_once(&self.apply)?;
        self.backend.apply(batch)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        self.backend.installed()
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        let watch = self.backend.watch()?;
        Ok(watch.map(|watch| Box::new(FailingWatch(watch, self.changes.clone())) as _))
    }

    fn clear(&self) -> Result<Applied, ApplyError> {
        self.backend.clear()
    }
}

impl Watch for FailingWatch {
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError> {
        fail_once(&self.1)?;
        self.0.changes()
    }

    fn interval(&self) -> Option<Duration> {
        self.0.interval()
    }
}

impl AsFd for FailingWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[test]
fn what_could_not_be_repaired_is_tried_again() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    record_log();
    let backend = Failing::default();
    let lab = Lab::with_backend("retry", backend.clone());
    let reconciler = lab.keep();
    let failures = [
        (
            &backend.apply,
            "what others changed is not repaired yet: the rules were not applied: the test: fails once",
        ),
        (&backend.changes, "the test: fails once"),
    ];
    for (number, (fails, said)) in (1..).zip(failures) {
        fails.store(true, Ordering::Relaxed);
        lab.run("iptables -F FI-retry0");
        eventually(|| reconciler.repairs(), |repairs| *repairs == number);
        assert!(lab.is_kept());
        assert!(logged(said).iter().any(|(level, text)| *level == log::Level::Error && text == said));
    }
    // It follows what happens after the failures.
    lab.run("iptables -F FI-retry0");
    eventually(|| reconciler.repairs(), |repairs| *repairs == 3);
}

#[test]
fn keep_refuses_a_backend_that_cannot_watch_and_names_it() {
    let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
    fake.stop_watching();
    let driver = Driver::open(config(dir.path().into()), fake).unwrap();
    let error = driver.keep().unwrap_err();
    assert_eq!(
        nwfilter::with_causes(&error),
        "changes of others cannot be repaired: backend 'fake' cannot watch for changes"
    );
}
