//! What an operator sees of what rules have counted.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use nwfilter_testlab::{Host, Mac, Need, Tap, frames, skip_unless};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);

const FILTER: &str = "<filter name='web' chain='root'>
  <rule action='drop' direction='out'><mac match='no' srcmacaddr='$MAC'/></rule>
  <rule action='accept' direction='out'><mac/></rule>
</filter>";

struct Lab {
    host: Host,
    ports: [Tap; 2],
    peer: Tap,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let (ports, peer) = (["tap0", "tap1"].map(|name| host.tap(name).unwrap()), host.tap("tap9").unwrap());
        let lab = Self { host, ports, peer, dir: tempfile::tempdir().unwrap() };
        fs::write(lab.path("web.xml"), FILTER).unwrap();
        lab.run(&["define", &lab.path("web.xml")]);
        for port in ["tap0", "tap1"] {
            let binding = format!(
                "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
                 <portdev name='{port}'/><mac address='{GUEST}'/><filterref filter='web'/></filterbinding>"
            );
            fs::write(lab.path("binding.xml"), binding).unwrap();
            lab.run(&["binding-create", &lab.path("binding.xml")]);
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

    /// What a verb prints, with paths as they are on every run.
    fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        text.replace(&self.path("filters"), "/etc/nwfilter").replace(&self.path(""), "/root/")
    }

    /// Sends frames with a wrong address from a guest, and waits until they were dropped.
    fn spoof(&self, port: &Tap, times: usize) {
        for _ in 0..times {
            port.send(&frames::ethernet(PEER, PEER, 0x88b5, &[0; 46])).unwrap();
        }
        assert!(port.delivers(&self.peer, &frames::ethernet(GUEST, PEER, 0x88b5, b"end")).unwrap());
    }
}

#[test]
fn rules_that_drop_are_counted_by_port_by_filter_and_in_order() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let lab = Lab::new();
    assert_eq!(lab.run(&["top"]), "no rule has stopped a packet\n");
    lab.spoof(&lab.ports[0], 3);
    lab.spoof(&lab.ports[1], 4);
    let mut text = String::new();
    for args in [&["counters", "tap1"][..], &["counters", "--filter", "web"], &["top"], &["top", "-n", "1"]] {
        text += &format!("$ nwfilterctl {}\n{}\n", args.join(" "), lab.run(args));
    }
    insta::assert_snapshot!(text);
    let rows: serde_json::Value = serde_json::from_str(&lab.run(&["--json", "counters", "tap1"])).unwrap();
    assert_eq!(rows[0]["packets"], 4);
    assert_eq!(rows[0]["ports"], serde_json::json!(["tap1"]));
    let top: serde_json::Value = serde_json::from_str(&lab.run(&["--json", "top"])).unwrap();
    assert_eq!((&top["rules"][0]["packets"], &top["ports"][0]["ports"][0]), (&7.into(), &"tap1".into()));
}

#[test]
fn watching_shows_what_was_counted_meanwhile() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let lab = Lab::new();
    lab.spoof(&lab.ports[0], 3);
    let mut watch =
        lab.command(&["--json", "counters", "tap0", "--watch"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    // After the first look at the latest.
    assert_eq!(lines.next().unwrap().unwrap(), "[]");
    lab.spoof(&lab.ports[0], 2);
    let counted = lines.map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
    let dropped = |rows: serde_json::Value| rows.as_array()?.iter().find(|row| row["stops"] == true).cloned();
    let sum = counted.filter_map(dropped).map(|row| row["packets"].as_u64().unwrap());
    let mut seen = 0;
    sum.take_while(|packets| {
        seen += packets;
        seen < 2
    })
    .for_each(drop);
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert_eq!(seen, 2, "the three before are not shown");
}

#[test]
fn a_port_without_binding_and_an_unknown_filter_have_no_counters() {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let lab = Lab::new();
    for (args, expected) in [
        (&["counters", "tap3"][..], "error: port 'tap3' has no binding"),
        (&["counters", "--filter", "wbe"], "did you mean 'web'?"),
        (&["counters"], "<PORT>"),
        (&["counters", "tap0", "--watch", "0"], "--watch needs at least a second"),
    ] {
        let output = lab.command(args).output().unwrap();
        assert!(!output.status.success());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains(expected), "{args:?}: {error}");
    }
}
