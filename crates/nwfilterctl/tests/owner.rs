//! Beside a daemon that owns the table of the native backend, the command line changes ports as without it, and goes on
//! when the daemon dies.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, frames, skip_unless};
use tempfile::TempDir;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);
const PATIENCE: Duration = Duration::from_secs(20);

struct Lab {
    host: Host,
    guest: Tap,
    peer: Tap,
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
        let lab = Self { host, guest, peer, dir: tempfile::tempdir().unwrap() };
        for (port, mac) in [("tap0", GUEST), ("tap1", STRANGER)] {
            let binding = format!(
                "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
                 <portdev name='{port}'/><mac address='{mac}'/><filterref filter='f'/></filterbinding>"
            );
            fs::write(lab.dir.path().join(format!("{port}.xml")), binding).unwrap();
        }
        lab.define("0x1234");
        lab
    }

    /// Lets ports send with their own address only, and nothing of a protocol.
    fn define(&self, protocol: &str) {
        let filter = format!(
            "<filter name='f' chain='root'><filterref filter='no-mac-spoofing'/>\
             <rule action='drop' direction='inout'><mac protocolid='{protocol}'/></rule></filter>"
        );
        fs::write(self.dir.path().join("f.xml"), filter).unwrap();
        self.done(&["define", "f.xml"]);
    }

    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]);
        command.args(args).env_remove("RUST_LOG").env("NWFILTER_BACKEND", "nftables");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.ctl(args).output().unwrap()
    }

    fn done(&self, args: &[&str]) {
        let output = self.run(args);
        let told = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&told));
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Starts the daemon and waits until it is ready.
    fn keep(&self) -> Child {
        let socket = self.dir.path().join("notify");
        let _ = fs::remove_file(&socket);
        let notified = UnixDatagram::bind(&socket).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = self.ctl(&["keep"]);
        let child = command.env("NOTIFY_SOCKET", &socket).stdout(Stdio::null()).spawn().unwrap();
        let mut buffer = [0; 256];
        let length = notified.recv(&mut buffer).unwrap();
        assert!(buffer[..length].starts_with(b"READY=1\n"));
        child
    }

    fn flush(&self) {
        self.host.run(&["nft", "flush", "ruleset"]).unwrap();
    }

    fn passes(&self, source: Mac) -> bool {
        let ends = Ends::v4(source, "10.0.0.2".parse().unwrap(), STRANGER, "10.0.0.9".parse().unwrap());
        self.guest.delivers(&self.peer, &frames::udp(&ends, 1000, 2000, b"frame")).unwrap()
    }

    fn is_filtered(&self) -> bool {
        assert!(self.passes(GUEST));
        !self.passes(STRANGER)
    }
}

#[test]
fn the_command_line_works_beside_a_daemon_that_owns_the_table_and_without_it_when_it_dies() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    lab.done(&["binding-create", "tap0.xml"]);
    assert!(lab.is_filtered());
    let mut daemon = lab.keep();
    lab.flush();
    assert!(lab.is_filtered(), "a flush of all rules opened the port");

    // Each change is made by the daemon, and what is refused is refused with the same words.
    lab.done(&["binding-create", "tap1.xml"]);
    lab.define("0x1235");
    lab.done(&["diff"]);
    let listed = lab.host.run(&["nft", "list", "table", "bridge", "nwfilter"]).unwrap();
    assert!(listed.contains("0x1235") && !listed.contains("0x1234") && listed.contains("tap1"), "{listed}");
    fs::write(
        lab.dir.path().join("refused.xml"),
        "<filter name='f'>\n<rule action='drop' direction='in'><all ipset='s' ipsetflags='src'/></rule></filter>",
    )
    .unwrap();
    let refused = lab.refused(&["define", "refused.xml"]);
    assert!(refused.contains("refused.xml:2"), "{refused}");
    lab.done(&["diff"]);
    lab.done(&["binding-delete", "tap1"]);
    lab.done(&["diff"]);

    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(lab.is_filtered());
    lab.done(&["binding-create", "tap1.xml"]);
    lab.define("0x1236");
    lab.done(&["diff"]);
    lab.done(&["binding-delete", "tap1"]);

    // The next daemon owns it again.
    let mut daemon = lab.keep();
    lab.flush();
    assert!(lab.is_filtered(), "a flush of all rules opened the port");
    lab.done(&["diff"]);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    lab.done(&["binding-delete", "tap0"]);
    let listed = lab.host.run(&["nft", "list", "ruleset"]).unwrap();
    assert!(!listed.contains("tap"), "{listed}");
}

#[test]
fn a_command_of_other_stores_is_told_that_the_table_has_an_owner() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    lab.done(&["binding-create", "tap0.xml"]);
    let mut daemon = lab.keep();
    let other = lab.ctl(&["binding-create", "tap1.xml"]).args(["--state-dir", "elsewhere"]).output().unwrap();
    let told = String::from_utf8_lossy(&other.stderr);
    assert_eq!(other.status.code(), Some(1), "{told}");
    assert!(told.contains("use the state directory of that process, or end it"), "{told}");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
