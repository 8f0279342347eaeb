//! `nwfilterctl listen` beside a live libvirtd that has no nwfilter driver, with QEMU guests.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nwfilter_testlab::{Connect, DriverDir, Host, Libvirtd, Mac, Need, Process, Saved, Tap, skip_unless};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

/// A host, a libvirtd without nwfilter driver, and a place for the listener's files.
struct World {
    libvirtd: Libvirtd,
    _modules: DriverDir,
    dir: TempDir,
    probe: Tap,
    host: Host,
}

impl World {
    fn new() -> Result<Self> {
        let host = Host::new()?;
        let dir = tempfile::tempdir()?;
        let modules = DriverDir::without_nwfilter()?;
        let libvirtd = Libvirtd::start_with(&host, modules.options())?;
        let probe = host.tap("probe")?;
        Ok(Self { libvirtd, _modules: modules, dir, probe, host })
    }

    fn ctl(&self, words: &[&str]) -> std::process::Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.arg("--config-dir").arg(self.dir.path().join("etc"));
        command.arg("--state-dir").arg(self.dir.path().join("run")).args(words);
        command
    }

    /// Starts a listener and waits until it says that it is ready and follows the guests.
    fn listen(&self, words: &[&str]) -> Result<Daemon> {
        let socket = self.dir.path().join("notify");
        let _ = fs::remove_file(&socket);
        let notified = UnixDatagram::bind(&socket)?;
        notified.set_read_timeout(Some(PATIENCE))?;
        let uri = self.libvirtd.uri(Connect::Qemu);
        let args = ["listen", "--connect", &uri];
        let mut command = self.ctl(&[&args, words].concat());
        command.env("NOTIFY_SOCKET", &socket);
        let process = self.spawn(command)?;
        let daemon = Daemon { process, notified };
        ensure!(daemon.next_state()?.starts_with("READY=1\n"));
        daemon.wait_for("STATUS=following")?;
        Ok(daemon)
    }

    fn spawn(&self, command: std::process::Command) -> Result<Process> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut words = vec!["env".to_owned()];
        let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
        words.extend(variables.map(|(name, value)| format!("{}={}", name.display(), value.display())));
        words.push(program);
        words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.host.spawn(&words)
    }

    fn is_filtered(&self, port: &str) -> Result<bool> {
        Ok(self.host.saved()?.port(port) != Saved::default())
    }

    fn eventually_filtered(&self, port: &str, filtered: bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.is_filtered(port)? != filtered {
            ensure!(Instant::now() < deadline, "{port} is never filtered={filtered}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn virsh(&self, words: &[&str], xml: &str) -> Result<()> {
        let file = self.dir.path().join("document.xml");
        fs::write(&file, xml)?;
        let path = file.to_str().context("a path that is no text")?;
        self.libvirtd.virsh_on(Connect::Qemu, &[words, &[path]].concat()).map(drop)
    }

    fn start(&self, guest: &Guest) -> Result<()> {
        self.virsh(&["create"], &guest.xml())
    }

    fn destroy(&self, guest: &Guest) -> Result<()> {
        self.libvirtd.virsh_on(Connect::Qemu, &["destroy", &guest.name()]).map(drop)
    }

    /// Whether a frame from this address arrives at the bridge within the time.
    fn hears(&self, mac: Mac, patience: Duration) -> Result<bool> {
        let from = |frame: &[u8]| frame.get(6..12) == Some(&mac.octets()[..]);
        Ok(self.probe.expect(patience, from)?.is_some())
    }
}

/// A listener that runs.
struct Daemon {
    process: Process,
    notified: UnixDatagram,
}

impl Daemon {
    fn next_state(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = self.notified.recv(&mut buffer).with_context(|| self.process.log())?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    fn wait_for(&self, begin: &str) -> Result<()> {
        while !self.next_state()?.starts_with(begin) {}
        Ok(())
    }

    fn wait_for_log(&self, is_there: impl Fn(&str) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !is_there(&self.process.log()) {
            ensure!(Instant::now() < deadline, "the log has only: {}", self.process.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

const IP: (&str, &str) = ("IP", "10.0.0.2");

/// A guest whose firmware asks for an address as soon as it runs.
struct Guest(u8);

impl Guest {
    fn name(&self) -> String {
        format!("vm{}", self.0)
    }

    fn mac(&self) -> Mac {
        Mac::new([0x52, 0x54, 0, 0, 2, self.0])
    }

    fn port(&self) -> String {
        format!("tap{}", self.0)
    }

    fn interface(mac: Mac, port: &str) -> String {
        format!(
            "<interface type='bridge'><source bridge='br0'/><mac address='{mac}'/><target dev='{port}'/>
             <model type='virtio'/></interface>"
        )
    }

    fn filterref(mac: Mac, filter: &str, parameter: (&str, &str)) -> String {
        let (name, value) = parameter;
        format!(
            "<nwf:interface mac='{mac}'><nwf:filterref filter='{filter}'>
             <nwf:parameter name='{name}' value='{value}'/></nwf:filterref></nwf:interface>"
        )
    }

    fn xml(&self) -> String {
        self.xml_with("allow-dhcp", IP)
    }

    fn xml_with(&self, filter: &str, parameter: (&str, &str)) -> String {
        format!(
            "<domain type='qemu'><name>{}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
             <metadata><nwf:filterrefs xmlns:nwf='{}'>{}</nwf:filterrefs></metadata>
             <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='network'/></os><devices>
             <controller type='pci' model='pcie-root'/><controller type='pci' model='pcie-root-port'/>
             <controller type='pci' model='pcie-root-port'/><controller type='pci' model='pcie-root-port'/>
             {}<memballoon model='none'/></devices></domain>",
            self.name(),
            nwfilter_xml::METADATA_NAMESPACE,
            Self::filterref(self.mac(), filter, parameter),
            Self::interface(self.mac(), &self.port()),
        )
    }
}

#[test]
fn guests_are_filtered_across_their_life_a_hot_plug_and_restarts_of_both_daemons() -> Result<()> {
    skip_unless!(Need::Root, Need::Qemu, Need::Tool("nft"));
    let mut world = World::new()?;
    let guest = Guest(1);
    let mut listener = world.listen(&[])?;
    world.start(&guest)?;
    world.eventually_filtered("tap1", true)?;

    let second = Mac::new([0x52, 0x54, 0, 0, 3, 1]);
    world.virsh(&["attach-device", "vm1"], &Guest::interface(second, "tap9"))?;
    // libvirt declares the prefix of --key itself, so the document needs another.
    let filterrefs = format!(
        "<f:filterrefs xmlns:f='{}'><f:tag name='web'/>{}{}</f:filterrefs>",
        nwfilter_xml::METADATA_NAMESPACE,
        Guest::filterref(guest.mac(), "allow-dhcp", IP).replace("nwf:", "f:"),
        Guest::filterref(second, "clean-traffic", IP).replace("nwf:", "f:"),
    );
    let uri = nwfilter_xml::METADATA_NAMESPACE;
    let words = ["metadata", "vm1", "--uri", uri, "--key", "nwf", "--set", &filterrefs, "--live"];
    world.libvirtd.virsh_on(Connect::Qemu, &words)?;
    world.eventually_filtered("tap9", true)?;
    let binding = world.ctl(&["binding-dumpxml", "tap9"]).output()?;
    let binding = String::from_utf8(binding.stdout)?;
    assert!(binding.contains("<parameter name='CTRL_TAGS' value='web'/>"), "{binding}");

    world.host.run(&["nft", "flush", "ruleset"])?;
    for port in ["tap1", "tap9"] {
        world.eventually_filtered(port, true)?;
    }

    world.libvirtd.kill()?;
    listener.wait_for("STATUS=no connection")?;
    assert!(world.is_filtered("tap1")?);
    world.libvirtd.start_again()?;
    listener.wait_for("STATUS=following 1")?;

    let saved = world.host.saved()?;
    let ended = listener.process.stop(PATIENCE)?;
    assert!(ended.success(), "{}", listener.process.log());
    assert_eq!(saved.diff(&world.host.saved()?), None);

    let late = Guest(2);
    world.start(&late)?;
    let _listener = world.listen(&[])?;
    assert!(world.is_filtered("tap2")?);
    world.destroy(&guest)?;
    world.eventually_filtered("tap1", false)?;
    world.eventually_filtered("tap9", false)?;
    assert!(world.is_filtered("tap2")?);
    let list = world.ctl(&["binding-list"]).output()?;
    assert_eq!(String::from_utf8_lossy(&list.stdout).matches("tap").count(), 1);
    Ok(())
}

#[test]
fn behind_the_guard_a_guest_is_silent_until_its_filter_lets_it_speak() -> Result<()> {
    skip_unless!(Need::Root, Need::Qemu, Need::Tool("nft"));
    let world = World::new()?;
    let guest = Guest(1);
    let mut listener = world.listen(&["--guard", "tap"])?;
    listener.process.kill()?;

    // Nobody listens, so nobody opens the port of a guest that asks for an address.
    world.start(&guest)?;
    assert!(!world.hears(guest.mac(), Duration::from_secs(8))?);

    let _listener = world.listen(&["--guard", "tap"])?;
    assert!(world.is_filtered("tap1")?);
    assert!(world.hears(guest.mac(), Duration::from_secs(30))?, "the guest is not heard behind its filter");
    Ok(())
}

#[test]
fn sighup_has_the_listener_read_its_settings_and_begin_anew_with_its_guests_filtered() -> Result<()> {
    skip_unless!(Need::Root, Need::Qemu, Need::Tool("nft"));
    let world = World::new()?;
    let file = world.dir.path().join("nwfilter.toml");
    fs::write(&file, "log = 'info'\n")?;
    let config = file.to_str().context("a path that is no text")?.to_owned();
    let mut listener = world.listen(&["--config", &config])?;
    world.start(&Guest(3))?;
    world.eventually_filtered("tap3", true)?;
    let has_guard =
        || world.host.run(&["nft", "list", "tables"]).map(|tables| tables.contains("nwfilter_guard"));
    assert!(!has_guard()?);
    let (pid, rules) = (Pid::from_raw(listener.process.pid().try_into()?), world.host.saved()?.port("tap3"));

    // A wrong value, and one that only the guard refuses.
    for wrong in ["guard = 7\n", "guard = 'a name that no interface can have'\n"] {
        fs::write(&file, wrong)?;
        let before = listener.process.log().matches("the old settings stay: ").count();
        kill(pid, Signal::SIGHUP)?;
        listener.wait_for_log(|log| log.matches("the old settings stay: ").count() > before)?;
    }
    assert!(!has_guard()?);

    fs::write(&file, "guard = 'tap'\n")?;
    kill(pid, Signal::SIGHUP)?;
    listener.wait_for("RELOADING=1\nMONOTONIC_USEC=")?;
    listener.wait_for("READY=1\n")?;
    listener.wait_for("STATUS=following")?;
    listener.wait_for_log(|log| log.contains("setting guard was nothing and is 'tap'"))?;
    assert!(has_guard()?);
    assert_eq!(world.host.saved()?.port("tap3").diff(&rules), None, "rules stay");

    kill(pid, Signal::SIGHUP)?;
    listener.wait_for_log(|log| log.contains("no setting has changed"))?;
    world.destroy(&Guest(3))?;
    world.eventually_filtered("tap3", false)?;
    ensure!(listener.process.stop(PATIENCE)?.success());
    Ok(())
}

#[test]
fn the_address_that_a_guest_is_leased_is_learned() -> Result<()> {
    skip_unless!(Need::Root, Need::Qemu, Need::Tool("nft"), Need::Tool("dnsmasq"));
    let world = World::new()?;
    let server = world.host.guest("dhcp", Mac::new([0x52, 0x54, 0, 0, 4, 1])).addr("10.0.0.1/24").start()?;
    let _dnsmasq = server.dhcp_server(world.dir.path())?;
    let _listener = world.listen(&[])?;
    let guest = Guest(1);
    world.virsh(&["create"], &guest.xml_with("clean-traffic", ("CTRL_IP_LEARNING", "dhcp")))?;
    world.eventually_filtered("tap1", true)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let leased = loop {
        ensure!(Instant::now() < deadline, "nothing is learned");
        let list = String::from_utf8(world.ctl(&["binding-list"]).output()?.stdout)?;
        match list.split_once("10.0.0.") {
            Some((_, rest)) => break format!("10.0.0.{}", rest.split(' ').next().unwrap_or_default()),
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    let may_speak = format!("-A I-tap1-ipv4-ip -p IPv4 --ip-src {leased} -j RETURN");
    let rules = world.host.saved()?.ebtables;
    assert!(rules.contains(&may_speak), "{leased}: {rules}");
    Ok(())
}
