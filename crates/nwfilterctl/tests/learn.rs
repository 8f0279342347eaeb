//! Learning through the command line: verbs that end at once, and one background process.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nwfilter_testlab::{Ends, Host, Mac, Need, frames, skip_unless};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nwfilterctl");

/// The state of a process and its parent.
fn stat(pid: u32) -> Option<(String, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

fn mac(number: u8) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 0, number])
}

fn dhcp_message(opcode: u8, address: [u8; 4], options: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 240];
    message[..4].copy_from_slice(&[opcode, 1, 6, 0]);
    message[16..20].copy_from_slice(&address);
    message[28..34].copy_from_slice(&mac(0).octets());
    message[236..].copy_from_slice(&[99, 130, 83, 99]);
    [&message, options].concat()
}

/// The guest at tap0 asks for an address.
fn dhcp_request() -> Vec<u8> {
    let everybody = Ends::v4(mac(0), [0; 4].into(), Mac::BROADCAST, [255; 4].into());
    frames::udp(&everybody, 68, 67, &dhcp_message(1, [0; 4], &[53, 1, 3, 255]))
}

/// A server grants it one.
fn dhcp_ack(seconds: u32, last: u8) -> Vec<u8> {
    let options = [&[53, 1, 5, 51, 4][..], &seconds.to_be_bytes(), &[255]].concat();
    let ends = Ends::v4(mac(99), [10, 0, 0, 254].into(), mac(0), [10, 0, 0, last].into());
    frames::udp(&ends, 67, 68, &dhcp_message(2, [10, 0, 0, last], &options))
}

struct Cli<'a> {
    host: &'a Host,
    dir: &'a Path,
}

impl Cli<'_> {
    fn command(&self, verb: &[&str]) -> Command {
        let mut command = self.host.command(PROGRAM);
        command.arg("--config-dir").arg(self.dir.join("filters"));
        command.arg("--state-dir").arg(self.dir.join("state")).args(verb);
        command
    }

    fn run(&self, verb: &[&str]) -> Result<String> {
        let output = self.command(verb).output()?;
        let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        ensure!(output.status.success(), "{verb:?}: {stdout}{stderr}");
        Ok(stdout)
    }

    fn binding(&self, number: u8, params: &str) -> String {
        format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
             <portdev name='tap{number}'/><mac address='{}'/><filterref filter='clean-traffic'>{params}\
             </filterref></filterbinding>",
            mac(number)
        )
    }

    fn bind(&self, number: u8, params: &str) -> Result<String> {
        let file = self.dir.join("binding.xml");
        fs::write(&file, self.binding(number, params))?;
        self.run(&["binding-create", &file.display().to_string()])
    }

    /// The one background process, if it runs.
    fn learners(&self) -> Vec<u32> {
        let all = self.learners_and_children();
        let is_child = |pid: &u32| stat(*pid).is_some_and(|(_, parent)| all.contains(&parent));
        all.iter().copied().filter(|pid| !is_child(pid)).collect()
    }

    /// What the background process starts looks like itself until it is another program.
    fn learners_and_children(&self) -> Vec<u32> {
        let runs_learn = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"\0learn\0"))
        };
        self.host.pids().into_iter().filter(runs_learn).collect()
    }

    /// Waits until the background process has let go of everything, files too.
    fn wait_for_end(&self, learner: u32) -> Result<()> {
        // Files are let go of by the last thread, which need not be the first.
        let threads = || fs::read_dir(format!("/proc/{learner}/task")).map_or(0, Iterator::count);
        let has_ended = || stat(learner).is_none_or(|(state, _)| state == "Z") && threads() <= 1;
        until("the background process ends", || Ok(has_ended() && self.learners_and_children().is_empty()))
    }

    fn wait_for(&self, verb: &str, text: &str) -> Result<()> {
        until(text, || Ok(String::from_utf8(self.command(&[verb]).output()?.stdout)?.contains(text)))
    }
}

/// Waits until something is so.
fn until(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not within 5 seconds: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[test]
fn binding_create_returns_at_once_and_one_process_learns_for_all_until_nothing_is_left() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let taps = [host.tap("tap0")?, host.tap("tap1")?, host.tap("tap2")?];
    let speak = |number: u8| {
        let addresses = ([10, 0, 0, number].into(), [10, 0, 0, 254].into());
        let ends = Ends::v4(mac(number), addresses.0, mac(99), addresses.1);
        taps[usize::from(number)].send(&frames::udp(&ends, 1000, 2000, b"anything"))
    };

    let start = Instant::now();
    cli.bind(0, "")?;
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    cli.bind(1, "")?;
    cli.bind(2, "<parameter name='IP' value='10.0.0.2'/>")?;
    assert_eq!(cli.learners().len(), 1);
    let list = cli.run(&["binding-list"])?;
    assert_eq!(list.matches("learning IP (any)").count(), 2, "{list}");
    let json = cli.run(&["binding-list", "--json"])?;
    assert!(json.contains(r#""state": "learning""#) && json.contains(r#""state": "filtered""#), "{json}");

    speak(1)?;
    cli.wait_for("binding-list", "10.0.0.1 (ipv4)")?;
    cli.wait_for("diff", "0 differences")?;
    assert!(!cli.run(&["binding-dumpxml", "tap1"])?.contains("10.0.0.1"), "what was given is what is shown");
    let learners = cli.learners();
    assert_eq!(learners.len(), 1, "tap0 still waits");
    cli.run(&["binding-delete", "tap0"])?;
    cli.wait_for_end(learners[0])?;
    let log = fs::read_to_string(dir.path().join("state/learn.log"))?;
    assert_eq!(log.matches("tap1: address 10.0.0.1 learned (ipv4)").count(), 1, "{log}");
    Ok(())
}

#[test]
fn a_lease_is_listed_with_its_remaining_time_and_survives_the_background_process() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let (guest, net) = (host.tap("tap0")?, host.tap("tap1")?);
    cli.bind(0, "<parameter name='CTRL_IP_LEARNING' value='dhcp'/>")?;
    let lease = |seconds: u32, last: u8| {
        guest.send(&dhcp_request())?;
        net.send(&dhcp_ack(seconds, last))
    };
    lease(3600, 7)?;
    cli.wait_for("binding-list", "10.0.0.7 (lease, 3")?;
    let killed = cli.learners();
    assert_eq!(killed.len(), 1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed[0].cast_signed()), nix::sys::signal::SIGKILL)?;
    cli.wait_for_end(killed[0])?;

    cli.wait_for("binding-list", "10.0.0.7 (lease, 3")?;
    cli.run(&["reload"])?;
    let log = fs::read_to_string(dir.path().join("state/learn.log"))?;
    assert_eq!(cli.learners().len(), 1, "{log}");
    lease(7200, 8)?;
    cli.wait_for("binding-list", "10.0.0.8 (lease, 7")?;
    let json = cli.run(&["binding-list", "--json"])?;
    assert!(json.contains(r#""state": "leased""#) && json.contains(r#""server": "10.0.0.254""#), "{json}");
    Ok(())
}

#[test]
fn a_port_is_not_listed_as_learning_while_no_process_learns() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let _tap = host.tap("tap0")?;
    cli.bind(0, "")?;
    assert!(cli.run(&["binding-list"])?.contains(" learning IP (any)"));
    let killed = cli.learners();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed[0].cast_signed()), nix::sys::signal::SIGKILL)?;
    cli.wait_for_end(killed[0])?;
    assert!(cli.run(&["binding-list"])?.contains("not learning IP (any): no learner runs"));
    assert!(cli.run(&["binding-list", "--json"])?.contains(r#""state": "unattended""#));
    cli.run(&["reload"])?;
    assert!(cli.run(&["binding-list"])?.contains(" learning IP (any)"));
    let learners = cli.learners();
    cli.run(&["binding-delete", "tap0"])?;
    cli.wait_for_end(learners[0])
}

#[test]
fn a_port_is_bound_and_learned_where_no_thread_can_be_started() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let tap = host.tap("tap0")?;
    let file = dir.path().join("binding.xml");
    fs::write(&file, cli.binding(0, ""))?;
    let mut create = cli.command(&["binding-create", &file.display().to_string()]);
    // A stack of a petabyte: the kernel refuses it.
    let output = create.env("RUST_MIN_STACK", (1_u64 << 50).to_string()).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ends = Ends::v4(mac(0), [10, 0, 0, 1].into(), mac(99), [10, 0, 0, 254].into());
    tap.send(&frames::udp(&ends, 1000, 2000, b"anything"))?;
    cli.wait_for("binding-list", "10.0.0.1 (ipv4)")?;
    cli.wait_for("diff", "0 differences")
}

#[test]
fn a_guest_whose_dhcp_answers_are_not_believed_is_logged_once() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let (guest, neighbour) = (host.tap("tap0")?, host.tap("tap1")?);
    fs::create_dir(dir.path().join("filters"))?;
    let open = "<filter name='open'><rule action='accept' direction='inout'><all/></rule></filter>";
    fs::write(dir.path().join("filters/open.xml"), open)?;
    fs::write(dir.path().join("binding.xml"), cli.binding(1, "").replace("clean-traffic", "open"))?;
    cli.run(&["binding-create", &dir.path().join("binding.xml").display().to_string()])?;
    cli.bind(0, "<parameter name='CTRL_IP_LEARNING' value='dhcp'/>")?;
    let learners = cli.learners();
    let log = || Ok(fs::read_to_string(dir.path().join("state/learn.log"))?);
    let exchange = || {
        guest.send(&dhcp_request())?;
        neighbour.send(&dhcp_ack(3600, 66))
    };
    until("it is logged", || {
        exchange()?;
        log().map(|log: String| log.contains("tap1: its guest answers DHCP requests of others"))
    })?;
    exchange()?;
    cli.run(&["binding-delete", "tap0"])?;
    cli.wait_for_end(learners[0])?;
    let log: String = log()?;
    assert_eq!(log.matches("not believed").count(), 1, "{log}");
    assert!(!log.contains("10.0.0.66"), "{log}");
    Ok(())
}

#[test]
fn learning_by_dhcp_from_any_server_is_warned_of() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let _taps = [host.tap("tap0")?, host.tap("tap1")?];
    let (method, server) = (
        "<parameter name='CTRL_IP_LEARNING' value='dhcp'/>",
        "<parameter name='DHCPSERVER' value='10.0.0.254'/>",
    );
    let file = dir.path().join("binding.xml");
    for (number, params, warned) in [(0, method.to_owned(), true), (1, format!("{method}{server}"), false)] {
        fs::write(&file, cli.binding(number, &params))?;
        let output = cli.command(&["binding-create", &file.display().to_string()]).output()?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{stderr}");
        assert_eq!(stderr.contains("name the servers in DHCPSERVER"), warned, "{stderr}");
    }
    let learners = cli.learners();
    assert_eq!(learners.len(), 1);
    cli.run(&["binding-delete", "tap0"])?;
    cli.run(&["binding-delete", "tap1"])?;
    cli.wait_for_end(learners[0])
}

#[test]
fn a_binding_whose_creation_cannot_be_told_is_in_force_and_learned() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let cli = Cli { host: &host, dir: dir.path() };
    let _tap = host.tap("tap1")?;
    let file = dir.path().join("binding.xml");
    fs::write(&file, cli.binding(1, ""))?;
    let full = || fs::File::options().write(true).open("/dev/full");
    let mut create = cli.command(&["binding-create", &file.display().to_string()]);
    assert_eq!(create.stdout(full()?).stderr(full()?).status()?.code(), Some(1));
    assert!(cli.run(&["binding-list"])?.contains(" learning IP"));
    let learners = cli.learners();
    assert_eq!(learners.len(), 1);
    cli.run(&["binding-delete", "tap1"])?;
    cli.wait_for_end(learners[0])
}
