//! What is left when a tool fails or the process is killed: nothing half done, and no port open.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, Tools, frames, skip_unless};
use tempfile::TempDir;

const OLD: &str = "<filter name='f'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='accept' direction='out'><udp-ipv6 dstportstart='53'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

const TOOLS: [&str; 6] = [
    "iptables-restore",
    "ip6tables-restore",
    "ebtables-restore",
    "iptables-save",
    "ip6tables-save",
    "ebtables-save",
];

/// A host with four ports, three of them filtered, and the command line on stores of its own.
struct Lab {
    host: Host,
    taps: Vec<Tap>,
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let taps = (0..4).map(|index| host.tap(&format!("tap{index}")).unwrap()).collect();
        let lab = Self { host, taps, dir: tempfile::tempdir().unwrap() };
        lab.write("old.xml", OLD);
        let ethernet =
            "<rule action='accept' direction='out' priority='-900'><arp opcode='9'/></rule><filterref";
        let new = OLD.replace("'53'", "'54'").replace("<filterref", ethernet);
        lab.write("new.xml", &new);
        lab.write("old2.xml", &OLD.replace("'f'", "'f2'"));
        lab.write("new2.xml", &new.replace("'f'", "'f2'"));
        assert!(lab.run(&["define", "old.xml"]).status.success());
        for index in 0..4 {
            lab.write(&format!("b{index}.xml"), &binding(index));
            if index < 3 {
                assert!(lab.run(&["binding-create", &format!("b{index}.xml")]).status.success());
            }
        }
        lab
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What one process leaves of the tables for the next.
    fn remembered(&self) -> PathBuf {
        self.dir.path().join("run/.tables")
    }

    /// Kernel and stores.
    fn state(&self) -> (String, Vec<(PathBuf, String)>) {
        let mut files = Vec::new();
        for store in ["etc", "run"] {
            for entry in fs::read_dir(self.dir.path().join(store)).unwrap().flatten() {
                if entry.path() != self.remembered() {
                    files.push((entry.path(), fs::read_to_string(entry.path()).unwrap()));
                }
            }
        }
        files.sort();
        (format!("{:?}", self.host.saved().unwrap()), files)
    }

    /// Whether a frame that neither the old nor the new filter allows gets out of a port.
    fn leaks(&self, index: usize) -> bool {
        let (from, to) = (mac(index), Mac::new([0x52, 0x54, 0, 0, 1, 1]));
        let spoofed = Ends::v4(from, [10, 0, 0, 99].into(), to, [10, 0, 0, 250].into());
        self.taps[index].delivers(&self.taps[3], &frames::udp(&spoofed, 1000, 53, b"x")).unwrap()
    }
}

fn mac(index: usize) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 0, index as u8])
}

fn binding(index: usize) -> String {
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
        <portdev name='tap{index}'/><mac address='{}'/>
        <filterref filter='f'><parameter name='IP' value='10.0.0.{index}'/></filterref></filterbinding>",
        mac(index)
    )
}

/// A tool that does nothing but fail.
fn failing(tool: &str) -> Tools {
    let tools = Tools::new().unwrap();
    tools.script(tool, "echo 'out of order' >&2\nexit 4\n").unwrap();
    tools
}

#[test]
fn a_tool_that_fails_or_is_missing_changes_nothing() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab::new();
    let before = lab.state();
    for tool in TOOLS {
        for missing in [false, true] {
            let tools = if missing { Tools::without(tool).unwrap() } else { failing(tool) };
            for args in [["binding-create", "b3.xml"], ["define", "new.xml"], ["binding-delete", "tap0"]] {
                // So that it needs the tools that read, too.
                let _ = fs::remove_file(lab.remembered());
                let mut command = lab.command(&args);
                match missing {
                    true => tools.replace_all(&mut command).unwrap(),
                    false => tools.come_first(&mut command).unwrap(),
                }
                let output = command.output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!(output.status.code(), Some(1), "{tool} missing: {missing}, {args:?}: {said}");
                assert!(said.contains(tool), "{said}");
                assert!(said.contains(if missing { "not found" } else { "out of order" }), "{said}");
                let after = lab.state();
                assert_eq!(after.1, before.1, "{tool} missing: {missing}, {args:?}");
                assert_eq!(
                    after.0.replace("\\n", "\n"),
                    before.0.replace("\\n", "\n"),
                    "{tool} missing: {missing}, {args:?}"
                );
            }
        }
    }
}

#[test]
fn a_change_that_takes_long_shows_its_progress_on_a_terminal() {
    skip_unless!(
        Need::Root,
        Need::Tool("iptables-restore"),
        Need::Tool("ebtables-restore"),
        Need::Tool("script")
    );
    let lab = Lab::new();
    let tools = Tools::new().unwrap();
    tools.script("ebtables-restore", "/bin/sleep 2\nexec $REAL \"$@\"\n").unwrap();
    let define = format!("{} --config-dir etc --state-dir run define", env!("CARGO_BIN_EXE_nwfilterctl"));
    let mut command = lab.host.command("script");
    command.current_dir(lab.dir.path()).args(["-qec", &format!("{define} new.xml"), "/dev/null"]);
    tools.come_first(&mut command).unwrap();
    let seen = String::from_utf8(command.stdin(Stdio::null()).output().unwrap().stdout).unwrap();
    assert!(seen.contains("\rwriting rules of 3 ports\x1b[K"), "{seen:?}");
    assert!(seen.contains("\r\x1b[KNetwork filter f defined"), "the line is gone: {seen:?}");
    let mut command = lab.host.command("sh");
    command.current_dir(lab.dir.path()).args(["-c", &format!("{define} old.xml")]);
    tools.come_first(&mut command).unwrap();
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn a_killed_process_leaves_no_port_open_and_a_reload_ends_in_the_desired_state() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = Lab::new();
    for attempt in 0..40u64 {
        let files = if attempt % 2 == 0 { ["new.xml", "new2.xml"] } else { ["old.xml", "old2.xml"] };
        let mut child = lab
            .command(&["define", files[0], files[1]])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        sleep(Duration::from_micros(attempt * 800));
        child.kill().unwrap();
        child.wait().unwrap();
        if attempt % 8 == 0 {
            assert!((0..3).all(|index| !lab.leaks(index)), "killed after {attempt} steps");
        }
        let kernel = lab.host.saved().unwrap();
        for index in 0..3 {
            let port = kernel.port(&format!("tap{index}"));
            assert!(
                port.ebtables.contains("-A PREROUTING") && port.iptables.contains("-A libvirt-in "),
                "{port:?}"
            );
        }
        let reloaded = lab.run(&["reload"]);
        assert_eq!(String::from_utf8_lossy(&reloaded.stderr), "", "each document is whole");
        assert!(reloaded.status.success());
        assert!(lab.run(&["diff"]).status.success());
    }
    for attempt in 0..20u64 {
        let mut child = lab.command(&["binding-create", "b3.xml"]).stderr(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_micros(attempt * 1500));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(lab.run(&["reload"]).status.success());
        let bound = lab.run(&["binding-dumpxml", "tap3"]).status.success();
        if !bound {
            assert!(lab.run(&["binding-create", "b3.xml"]).status.success());
        }
        assert!(lab.run(&["diff"]).status.success());
        assert!(lab.run(&["binding-delete", "tap3"]).status.success());
    }
    for directory in ["etc", "run"] {
        let entries = fs::read_dir(lab.dir.path().join(directory)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = names.filter(|name| name.ends_with(".new")).collect();
        assert!(left.is_empty(), "left in {directory}: {left:?}");
    }
}

#[test]
fn a_store_that_cannot_be_written_refuses_and_the_kernel_stays() {
    skip_unless!(
        Need::Root,
        Need::Tool("iptables-restore"),
        Need::Tool("ebtables-restore"),
        Need::Tool("mount")
    );
    let lab = Lab::new();
    let before = lab.host.saved().unwrap();
    // A mount namespace of its own, in which the file system of the filters is full.
    let script = "mount --make-rprivate / && mount -t tmpfs -o size=4k tmpfs etc && cat old.xml > etc/f.xml; \
                  exec \"$0\" --config-dir etc --state-dir run define new.xml";
    let mut command = lab.host.command("unshare");
    command.current_dir(lab.dir.path()).args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_nwfilterctl")]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(lab.host.saved().unwrap().diff(&before), None);
}
