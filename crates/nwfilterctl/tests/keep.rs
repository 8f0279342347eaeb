//! `nwfilterctl keep`: the daemon of hosts without libvirt.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nwfilter_nftables::kernel::PacketLog;
use nwfilter_testlab::{Host, Need, skip_unless};
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

struct Lab {
    host: Host,
    dir: TempDir,
}

impl Lab {
    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
        command.env_remove("RUST_LOG");
        command
    }

    fn run(&self, args: &[&str]) {
        let output = self.ctl(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn bind(&self, port: &str, filter: &str) {
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'/></filterbinding>"
        );
        fs::write(self.dir.path().join("b.xml"), binding).unwrap();
        self.run(&["binding-create", "b.xml"]);
    }

    fn metrics(&self) -> String {
        let mut client = UnixStream::connect(self.dir.path().join("metrics")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Starts the daemon and waits until the service manager would start others.
    fn keep(&self) -> Child {
        self.keep_with(&["keep", "--json", "--metrics", "unix:metrics"]).0
    }

    fn keep_with(&self, args: &[&str]) -> (Child, UnixDatagram) {
        self.keep_under(args, &[])
    }

    fn keep_under(&self, args: &[&str], variables: &[(&str, &str)]) -> (Child, UnixDatagram) {
        let socket = self.dir.path().join("notify");
        let notified = UnixDatagram::bind(&socket).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = self.ctl(args);
        let child = command
            .envs(variables.iter().copied())
            .env("NOTIFY_SOCKET", &socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert!(told(&notified).starts_with("READY=1\n"));
        (child, notified)
    }
}

/// What the service manager is told next.
fn told(manager: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let length = manager.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn sighup_reads_the_settings_and_a_file_that_cannot_be_changes_nothing() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
    let _tap = lab.host.tap("tap0").unwrap();
    lab.bind("tap0", "no-mac-spoofing");
    let before = lab.host.saved().unwrap().port("tap0");
    let file = lab.dir.path().join("n.toml");
    fs::write(&file, "metrics = 'unix:other'\n").unwrap();

    let (mut daemon, manager) = lab.keep_with(&["keep", "--config", "n.toml"]);
    let mut log = BufReader::new(daemon.stderr.take().unwrap()).lines().map(Result::unwrap);
    let pid = Pid::from_raw(daemon.id().cast_signed());
    assert!(lab.dir.path().join("other").exists());

    fs::write(&file, "metrics = 'unix:metrics'\nhelpers = 'no'\n").unwrap();
    kill(pid, Signal::SIGHUP).unwrap();
    let refusal = "the old settings stay: n.toml:2:11: helpers cannot be 'no'; it takes true or false";
    assert!(log.any(|line| line.contains(refusal)));
    assert!(!lab.dir.path().join("metrics").exists());

    fs::write(&file, "metrics = 'unix:metrics'\n").unwrap();
    kill(pid, Signal::SIGHUP).unwrap();
    assert!(told(&manager).starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert!(told(&manager).starts_with("READY=1\n"));
    let change = "setting metrics was 'unix:other' and is 'unix:metrics'";
    assert!(log.any(|line| line.contains(change)));
    assert!(lab.metrics().contains("nwfilter_ports{state=\"filtered\"} 1"));
    assert_eq!(lab.host.saved().unwrap().port("tap0").diff(&before), None, "rules stay");

    kill(pid, Signal::SIGHUP).unwrap();
    assert!(log.any(|line| line.contains("no setting has changed")));
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(told(&manager), "STOPPING=1\n");
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn the_daemon_notifies_the_watchdog_while_it_works() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
    let (mut daemon, manager) = lab.keep_under(&["keep"], &[("WATCHDOG_USEC", "300000")]);
    for _ in 0..3 {
        assert_eq!(told(&manager), "WATCHDOG=1\n");
    }
    kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM).unwrap();
    // One more may have been on its way.
    assert!(std::iter::repeat_with(|| told(&manager)).take(2).any(|state| state == "STOPPING=1\n"));
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn what_others_change_is_repaired_and_printed_until_sigterm() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
    let _taps = ["tap0", "tap1"].map(|name| lab.host.tap(name).unwrap());
    fs::write(
        lab.dir.path().join("f.xml"),
        "<filter name='f'><rule action='accept' direction='in'><tcp dstportstart='22'/></rule></filter>",
    )
    .unwrap();
    lab.run(&["define", "f.xml"]);
    lab.bind("tap0", "f");
    let before = lab.host.saved().unwrap().port("tap0");
    lab.host.run(&["iptables", "-F", "FI-tap0"]).unwrap();

    let mut daemon = lab.keep();
    assert_eq!(lab.host.saved().unwrap().port("tap0").diff(&before), None, "it reloads first");
    let mut events = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&events.next().unwrap().unwrap()).unwrap();
    assert_eq!(next(), serde_json::json!({"event": "drift-repaired", "port": "tap0"}));
    lab.bind("tap1", "f");
    lab.host.run(&["iptables", "-F", "FI-tap1"]).unwrap();
    assert_eq!(next(), serde_json::json!({"event": "drift-repaired", "port": "tap1"}));
    lab.host.run(&["iptables", "-F", "FORWARD"]).unwrap();
    assert_eq!(next(), serde_json::json!({"event": "host-repaired"}));

    // The socket is there before the daemon is ready.
    let metrics = lab.metrics();
    assert!(
        metrics.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text;"),
        "{metrics}"
    );
    for line in [
        "nwfilter_ports{state=\"filtered\"} 2",
        "nwfilter_filters 1",
        "nwfilter_repaired_ports_total 2",
        "nwfilter_repaired_host_total 1",
        "# TYPE nwfilter_commit_seconds histogram",
    ] {
        assert!(metrics.lines().any(|other| other == line), "no {line} in {metrics}");
    }
    assert!(metrics.ends_with("\n# EOF\n"), "{metrics}");
    // Who says nothing, or hangs up, does not keep the next one from its answer.
    drop(UnixStream::connect(lab.dir.path().join("metrics")).unwrap());
    assert!(lab.metrics().contains("200 OK"));

    kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert_eq!(lab.host.saved().unwrap().port("tap0").diff(&before), None, "rules stay");
}

#[test]
fn a_group_of_the_packet_log_that_another_program_reads_is_warned_of_and_taken_when_it_is_free() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
    let _tap = lab.host.tap("tap0").unwrap();
    fs::write(lab.dir.path().join("n.toml"), "log-group = 33\n").unwrap();
    lab.bind("tap0", "no-mac-spoofing");
    let file = lab.dir.path().join("b.xml");
    let logged = fs::read_to_string(&file).unwrap().replace(
        "<filterref filter='no-mac-spoofing'/>",
        "<filterref filter='no-mac-spoofing'><parameter name='CTRL_LOG_DROPS' value='yes'/></filterref>",
    );
    fs::write(&file, logged).unwrap();
    lab.run(&["binding-delete", "tap0"]);
    lab.run(&["--config", "n.toml", "binding-create", "b.xml"]);
    let other = lab.host.enter(|| PacketLog::open(33)).unwrap().unwrap();

    let (mut daemon, _manager) = lab.keep_with(&["keep", "--config", "n.toml", "-v"]);
    let mut log = BufReader::new(daemon.stderr.take().unwrap()).lines().map(Result::unwrap);
    let warning = log.find(|line| line.contains("CTRL_LOG_DROPS")).unwrap();
    assert!(warning.contains("another program reads group 33"), "{warning}");
    assert!(warning.contains("setting log-group"), "{warning}");
    drop(other);
    assert!(log.any(|line| line.contains("group 33 of the kernel's packet log is read now")));
    kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}
