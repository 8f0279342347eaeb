//! A command that is killed before any of its messages to the kernel opens no port, and the next reload ends its work.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::libc::SIGKILL;
use nwfilter_testlab::stream::{Stream, while_streaming};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, frames, skip_unless};
use tempfile::TempDir;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);
/// More than any of these commands sends or starts.
const MANY: usize = 200;

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
        for number in 0..2 {
            let filter = format!(
                "<filter name='f' chain='root'><filterref filter='no-mac-spoofing'/>\
                 <rule action='drop' direction='inout'><mac protocolid='0x123{number}'/></rule></filter>"
            );
            fs::write(lab.dir.path().join(format!("{number}.xml")), filter).unwrap();
        }
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
             <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='f'/></filterbinding>"
        );
        fs::write(lab.dir.path().join("tap0.xml"), binding).unwrap();
        lab
    }

    fn command(&self, program: &str) -> Command {
        let mut command = self.host.command(program);
        command.current_dir(self.dir.path()).env_remove("RUST_LOG").env_remove("NWFILTER_BACKEND");
        command
    }

    fn done(&self, backend: &str, args: &[&str]) {
        let mut command = self.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        let output = command.args(options(backend)).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs a command that is killed when it begins its system call of this name and number.
    fn killed_at(&self, call: &str, number: usize, backend: &str, args: &[&str]) -> ExitStatus {
        let mut command = self.command("strace");
        command.args(["-qq", "-o", "strace.log", "-e"]).arg(format!("trace={call}"));
        command.arg("-e").arg(format!("inject={call}:signal=KILL:when={number}"));
        command.arg(env!("CARGO_BIN_EXE_nwfilterctl")).args(options(backend)).args(args);
        command.output().unwrap().status
    }

    fn streams(&self) -> [Stream<'_>; 1] {
        let frame = |source, text: &[u8]| {
            let ends = Ends::v4(source, "10.0.0.2".parse().unwrap(), STRANGER, "10.0.0.9".parse().unwrap());
            frames::udp(&ends, 1000, 2000, text)
        };
        [Stream {
            from: &self.guest,
            to: &self.peer,
            allowed: Box::new(move |number| frame(GUEST, &number.to_be_bytes())),
            forbidden: vec![frame(STRANGER, b"spoofed")],
            rest: Duration::ZERO,
        }]
    }

    /// Kills the command at each of its calls, after `begin` and before `end`; gives how often it was killed.
    fn kill_at_each(
        &self,
        call: &str,
        backend: &str,
        args: &[&str],
        begin: impl Fn(),
        end: impl Fn(),
    ) -> usize {
        begin();
        let mut kills = 0;
        let tally = while_streaming(&self.streams(), |streaming| {
            for number in 1..MANY {
                let status = self.killed_at(call, number, backend, args);
                let tally = streaming.take()?;
                assert_eq!((tally.lost, tally.leaked), (0, 0), "killed at {call} {number}: {tally:?}");
                let was_killed = status.signal() == Some(SIGKILL);
                assert!(was_killed || status.success(), "{status}");
                end();
                if !was_killed {
                    break;
                }
                kills += 1;
                begin();
            }
            streaming.take()
        })
        .unwrap();
        assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
        assert!(kills < MANY - 1, "the command is not through after {MANY} calls");
        kills
    }

    fn classes(&self) -> usize {
        let listed = self.host.run(&["nft", "list", "table", "bridge", "nwfilter"]).unwrap();
        listed.lines().filter(|line| line.starts_with("\tchain f-") && line.ends_with(".from {")).count()
    }
}

fn options(backend: &str) -> [&str; 6] {
    ["--config-dir", "etc", "--state-dir", "run", "--backend", backend]
}

#[test]
fn a_redefinition_that_is_killed_at_any_message_to_the_kernel_opens_nothing_and_is_ended_by_a_reload() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"), Need::Tool("strace"));
    let lab = Lab::new();
    lab.done("nftables", &["define", "0.xml"]);
    lab.done("nftables", &["binding-create", "tap0.xml"]);
    let kills = lab.kill_at_each(
        "sendto",
        "nftables",
        &["define", "1.xml"],
        || lab.done("nftables", &["define", "0.xml"]),
        || {
            lab.done("nftables", &["reload"]);
            lab.done("nftables", &["diff"]);
            assert_eq!(lab.classes(), 1);
        },
    );
    // The three transactions, and what is read before them.
    assert!(kills > 5, "{kills}");
}

#[test]
fn a_change_of_backend_that_is_killed_at_any_step_opens_nothing_and_is_ended_by_a_reload() {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("nft"),
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("strace")
    );
    let lab = Lab::new();
    lab.done("nftables", &["define", "0.xml"]);
    lab.done("nftables", &["binding-create", "tap0.xml"]);
    // Messages of netlink for the native backend, and the programs that the other one starts.
    for (call, backend, other) in [
        ("sendto", "nftables", "xtables"),
        ("clone3", "nftables", "xtables"),
        ("clone3", "xtables", "nftables"),
    ] {
        let kills = lab.kill_at_each(
            call,
            backend,
            &["reload"],
            || lab.done(other, &["reload"]),
            || {
                lab.done(backend, &["reload"]);
                lab.done(backend, &["diff"]);
                let native = lab.host.run(&["nft", "list", "tables", "bridge"]).unwrap().contains("nwfilter");
                let tables = lab.host.saved().unwrap().ebtables.contains("libvirt-I-tap0");
                assert_eq!((native, tables), (backend == "nftables", backend == "xtables"));
            },
        );
        eprintln!("{call} {backend}: {kills}");
        assert!(kills > 1, "{call} {backend}: {kills}");
    }
}
