//! `watch`: changes of the stores and of the kernel by other processes, as they happen.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nwfilter_testlab::{Host, Need, skip_unless};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='allow-arp'/>
</filterbinding>
";

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

    fn watch(&self, args: &[&str]) -> Watching {
        let mut watch = self.ctl(&[&["watch"], args].concat());
        let mut child = watch.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Watching { child, lines }
    }
}

struct Watching {
    child: Child,
    lines: Receiver<String>,
}

impl Watching {
    fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("an event")
    }

    /// Waits for an event of which `fits` is true.
    fn wait_for(&self, fits: impl Fn(&Value) -> bool) -> Value {
        loop {
            let event: Value = serde_json::from_str(&self.line()).unwrap();
            if fits(&event) {
                return event;
            }
        }
    }

    fn until(&self, event: Value) {
        self.wait_for(|found| *found == event);
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn changes_of_other_processes_are_printed_as_they_happen() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
    let tap = lab.host.tap("tap0").unwrap();
    fs::write(lab.dir.path().join("f.xml"), "<filter name='f'/>").unwrap();
    fs::write(lab.dir.path().join("tap0.xml"), BINDING).unwrap();
    let watching = lab.watch(&["--json"]);
    watching.until(json!({"event": "watching", "filters": 0, "ports": 0}));
    watching.until(json!({"event": "kernel", "differences": 0}));

    lab.run(&["define", "f.xml"]);
    watching.until(json!({"event": "filter-defined", "filter": "f"}));
    lab.run(&["binding-create", "tap0.xml"]);
    watching.until(json!({"event": "binding-created", "port": "tap0"}));

    lab.host.run(&["ebtables", "-t", "nat", "-F", "libvirt-I-tap0"]).unwrap();
    let change =
        watching.wait_for(|event| event["event"] == "rules-changed" && event["by"]["name"] == "ebtables");
    assert_eq!(change["objects"][0], json!({"table": "ebtables", "chain": "libvirt-I-tap0"}));
    watching.wait_for(|event| event["event"] == "kernel" && event["differences"].as_u64() > Some(0));
    lab.run(&["reload"]);
    watching.until(json!({"event": "kernel", "differences": 0}));

    lab.run(&["binding-delete", "tap0"]);
    watching.until(json!({"event": "binding-deleted", "port": "tap0"}));
    lab.run(&["undefine", "f"]);
    watching.until(json!({"event": "filter-undefined", "filter": "f"}));
    drop(tap);
}

#[test]
fn watch_ends_when_its_output_is_closed_and_prints_sentences_without_json() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab { host: Host::new().unwrap(), dir: tempfile::tempdir().unwrap() };
    fs::write(lab.dir.path().join("f.xml"), "<filter name='f'/>").unwrap();
    let mut deaf = lab.ctl(&["watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let watching = lab.watch(&[]);
    assert_eq!(watching.line(), "watching 0 filters and 0 ports");
    assert_eq!(watching.line(), "the kernel is as the bindings ask for");
    let mut first = String::new();
    BufReader::with_capacity(1, deaf.stdout.take().unwrap()).read_line(&mut first).unwrap();
    lab.run(&["define", "f.xml"]);
    assert_eq!(watching.line(), "filter 'f' defined");
    let output = deaf.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: the events cannot be written\n  because: Broken pipe"), "{said}");
}
