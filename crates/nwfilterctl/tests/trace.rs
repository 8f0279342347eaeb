//! What an operator sees of packets on their way.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nwfilter_testlab::{Host, Mac, Need, Tap, frames, skip_unless};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
const PATIENCE: Duration = Duration::from_secs(20);

const FILTER: &str = "<filter name='web' chain='root'>
  <rule action='drop' direction='out'><mac match='no' srcmacaddr='$MAC'/></rule>
  <rule action='accept' direction='out'><mac/></rule>
</filter>";

struct Lab {
    host: Host,
    port: Tap,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let port = host.tap("tap0").unwrap();
        let lab = Self { host, port, dir: tempfile::tempdir().unwrap() };
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='web'/></filterbinding>"
        );
        fs::write(lab.path("web.xml"), FILTER).unwrap();
        fs::write(lab.path("binding.xml"), binding).unwrap();
        for args in [["define", "web.xml"], ["binding-create", "binding.xml"]] {
            assert!(lab.command(&[args[0], &lab.path(args[1])]).status().unwrap().success());
        }
        lab
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.args(["--config-dir", &self.path("filters"), "--state-dir", &self.path("bindings")]);
        command.args(args);
        command
    }

    fn is_tracing(&self) -> bool {
        self.host.run(&["nft", "list", "tables"]).unwrap().contains("nwfilter-trace-")
    }

    fn wait(&self, tracing: bool) {
        let begin = Instant::now();
        while self.is_tracing() != tracing {
            assert!(begin.elapsed() < PATIENCE, "it does not become {tracing}");
            sleep(Duration::from_millis(20));
        }
    }

    /// Starts a trace, and waits until packets are followed.
    fn trace(&self, args: &[&str]) -> Child {
        let child = self.command(args).stdout(Stdio::piped()).spawn().unwrap();
        self.wait(true);
        child
    }
}

#[test]
fn a_dropped_packet_is_shown_with_the_line_of_the_filter() {
    skip_unless!(Need::Root, Need::Tool("ebtables"), Need::Tool("iptables"), Need::Tool("nft"));
    let lab = Lab::new();
    let spoofed = frames::ethernet(PEER, PEER, 0x88b5, &[0; 46]);
    let child = lab.trace(&["trace", "tap0", "-n", "1"]);
    lab.port.send(&spoofed).unwrap();
    let text = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let place = format!("{}:3 ({}:2)", lab.path("filters/web.xml"), lab.path("web.xml"));
    let line = format!("  > Ethernet: web:3: drop at {place}\n");
    assert!(
        text.starts_with("tap0 out: ") && text.contains(" is dropped\n") && text.ends_with(&line),
        "{text}"
    );

    let child = lab.trace(&["--json", "trace", "tap0", "-n", "1"]);
    lab.port.send(&spoofed).unwrap();
    let text = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let packet: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&packet["outcome"], &packet["steps"][0]["at"]["line"]),
        (&"dropped".into(), &3.into()),
        "{text}"
    );
}

#[test]
fn dropped_packets_alone_are_shown_with_the_guest_and_at_most_ten_of_them_in_a_second() {
    skip_unless!(Need::Root, Need::Tool("ebtables"), Need::Tool("iptables"), Need::Tool("nft"));
    let lab = Lab::new();
    let child = lab.trace(&["--json", "trace", "tap0", "--drops", "--for", "3s"]);
    let begin = Instant::now();
    for number in 0..30 {
        lab.port.send(&frames::ethernet(GUEST, PEER, 0x88b5, &[number; 46])).unwrap();
        lab.port.send(&frames::ethernet(PEER, PEER, 0x88b5, &[number; 46])).unwrap();
    }
    let seconds = begin.elapsed().as_secs() as usize + 2;
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let packets: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!((1..=10 * seconds).contains(&packets.len()), "{}", packets.len());
    assert!(packets.iter().all(|packet| packet["outcome"] == "dropped" && packet["guest"] == "vm"), "{text}");
}

#[test]
fn a_trace_that_is_killed_leaves_nothing_behind() {
    skip_unless!(Need::Root, Need::Tool("ebtables"), Need::Tool("iptables"), Need::Tool("nft"));
    let lab = Lab::new();
    let mut child = lab.trace(&["trace", "tap0"]);
    lab.port.send(&frames::ethernet(PEER, PEER, 0x88b5, &[0; 46])).unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("tap0 out: "));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.wait(false);
}

#[test]
fn a_trace_ends_after_its_time_and_wrong_questions_get_an_example() {
    skip_unless!(Need::Root, Need::Tool("ebtables"), Need::Tool("iptables"), Need::Tool("nft"));
    let lab = Lab::new();
    let output = lab.command(&["trace", "tap0", "--for", "10ms"]).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
    for (args, expected) in [
        (&["trace", "tap3"][..], "port 'tap3' has no binding"),
        (&["trace", "tap0", "--for", "soon"], "for example 10s"),
        (&["trace", "tap0", "--match", "tcp to :eighty"], "for example: tcp from 192.0.2.7 to :80"),
    ] {
        let output = lab.command(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(expected), "{args:?}: {error}");
    }
}
