//! The units of systemd in `dist/`: what they allow is what the daemons need, and little more.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nwfilter_testlab::{Host, Need, skip_unless};
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

const UNITS: [&str; 2] = ["nwfilter.service", "nwfilter-listen.service"];

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist").join(name)
}

/// The values of a setting of a unit, in their order.
fn values(name: &str, setting: &str) -> Vec<String> {
    let text = fs::read_to_string(unit(name)).unwrap();
    let values = text.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

/// The system calls of a word of `SystemCallFilter`.
fn system_calls(word: &str) -> BTreeSet<String> {
    if !word.starts_with('@') {
        return BTreeSet::from([word.to_owned()]);
    }
    let output = Command::new("systemd-analyze").args(["syscall-filter", word]).output().unwrap();
    assert!(output.status.success(), "{word}");
    let text = String::from_utf8(output.stdout).unwrap();
    let members =
        text.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    members.flat_map(system_calls).collect()
}

/// The system calls that a unit allows.
fn allowed(name: &str) -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    for value in values(name, "SystemCallFilter") {
        match value.strip_prefix('~') {
            Some(denied) => {
                let denied: BTreeSet<_> = denied.split(' ').flat_map(system_calls).collect();
                allowed.retain(|call| !denied.contains(call));
            }
            None => allowed.extend(value.split(' ').flat_map(system_calls)),
        }
    }
    allowed
}

/// A host with a port that learns, and one that counts on a helper.
struct Lab {
    host: Host,
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
        let filter = "<filter name='f'><filterref filter='clean-traffic'/>
            <rule action='accept' direction='in'><tcp dstportstart='21' state='NEW'/></rule>
            <rule action='accept' direction='inout'><all state='ESTABLISHED,RELATED'/></rule></filter>";
        let binding = |port: &str, parameter: &str| {
            format!("<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
            <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'>{parameter}</filterref>
            </filterbinding>")
        };
        fs::create_dir(lab.dir.path().join("etc")).unwrap();
        fs::create_dir(lab.dir.path().join("run")).unwrap();
        fs::write(lab.dir.path().join("etc/f.xml"), filter).unwrap();
        let address = "<parameter name='IP' value='10.0.0.3'/>";
        for (port, parameter) in [("tap0", ""), ("tap1", address)] {
            fs::write(lab.dir.path().join(format!("run/{port}.xml")), binding(port, parameter)).unwrap();
        }
        lab
    }

    fn ctl(&self, args: &[&str]) -> Output {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]);
        command.args(args).output().unwrap()
    }

    /// Runs `keep` by another program until it has repaired something, and then ends it.
    fn keeps_under(&self, program: &str, args: &[&str], meanwhile: impl Fn()) {
        let mut command = self.host.command(program);
        command.current_dir(self.dir.path()).args(args).arg(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.args([
            "--config-dir",
            "etc",
            "--state-dir",
            "run",
            "keep",
            "--json",
            "--metrics",
            "unix:metrics",
        ]);
        let mut daemon = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut events = BufReader::new(daemon.stdout.take().unwrap()).lines();
        // It repairs what differs when it begins, too.
        self.wait_for_rules(&mut daemon);
        self.host.run(&["iptables", "-F", "FI-tap1"]).unwrap();
        let is_repair =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["event"] == "drift-repaired";
        assert!(events.any(|line| is_repair(&line.unwrap())));
        meanwhile();
        self.end(&mut daemon);
    }

    fn wait_for_rules(&self, daemon: &mut Child) {
        let begin = Instant::now();
        while self.host.run(&["iptables", "-S", "FI-tap1"]).is_err() {
            assert!(daemon.try_wait().unwrap().is_none(), "it has ended");
            assert!(begin.elapsed() < PATIENCE, "there are no rules");
            std::thread::yield_now();
        }
    }

    /// Ends the daemon, which is the process with that name in the namespace.
    fn end(&self, daemon: &mut Child) {
        let pid = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.id())).unwrap();
        let pid = pid.split_whitespace().next().map_or(daemon.id(), |pid| pid.parse().unwrap());
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success());
    }
}

#[test]
fn units_are_exposed_to_less_than_three_of_ten() {
    skip_unless!(Need::Tool("systemd-analyze"));
    for name in UNITS {
        let mut command = Command::new("systemd-analyze");
        command.args(["security", "--no-pager", "--offline=yes", "--threshold=29"]).arg(unit(name));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn both_daemons_may_do_the_same() {
    for setting in ["SystemCallFilter", "CapabilityBoundingSet", "RestrictAddressFamilies", "WatchdogSec"] {
        assert_eq!(values(UNITS[0], setting), values(UNITS[1], setting), "{setting}");
        assert!(!values(UNITS[0], setting).is_empty(), "{setting}");
    }
}

#[test]
fn each_system_call_of_the_daemon_is_one_that_its_unit_allows() {
    skip_unless!(Need::Root, Need::Tool("systemd-analyze"), Need::Tool("strace"), Need::Tool("iptables"));
    let lab = Lab::new();
    let _taps = ["tap0", "tap1"].map(|name| lab.host.tap(name).unwrap());
    let trace = lab.dir.path().join("trace");
    let trace = trace.to_str().unwrap();
    // Not slowed down by what happens thousands of times.
    lab.keeps_under("strace", &["-f", "-qq", "-o", trace, "--trace=!read,write,close,fstat,mmap"], || ());
    let text = fs::read_to_string(trace).unwrap();
    let call = |line: &str| {
        let (_, call) = line.trim().split_once(' ')?;
        let (name, _) = call.trim_start().split_once('(')?;
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_').then(|| name.to_owned())
    };
    let called: BTreeSet<_> = text.lines().filter_map(call).collect();
    assert!(called.contains("bpf") && called.contains("execve"), "{called:?}");
    let allowed = allowed(UNITS[0]);
    let denied: Vec<_> = called.difference(&allowed).collect();
    assert!(denied.is_empty(), "{denied:?}");
}

#[test]
fn the_daemon_learns_with_no_capability_but_those_of_its_unit() {
    skip_unless!(Need::Root, Need::Tool("setpriv"), Need::Tool("iptables"));
    let lab = Lab::new();
    let _taps = ["tap0", "tap1"].map(|name| lab.host.tap(name).unwrap());
    let capabilities = values(UNITS[0], "CapabilityBoundingSet").join(" ");
    let kept = capabilities.split(' ').map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase());
    let set = kept.fold("-all".to_owned(), |set, name| format!("{set},+{name}"));
    lab.keeps_under("setpriv", &["--no-new-privs", "--bounding-set", &set, "--"], || {
        let listed: Value = serde_json::from_slice(&lab.ctl(&["binding-list", "--json"]).stdout).unwrap();
        assert_eq!(listed[0]["port"], "tap0");
        assert_eq!(listed[0]["address"]["state"], "learning", "{listed}");
    });
}
