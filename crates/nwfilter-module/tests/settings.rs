//! The module does what the settings of the host say, and filters nothing while they cannot be understood.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nwfilter_testlab::{DriverDir, Host, Libvirtd, Need, Tap, skip_unless};

use common::{Module, driver_dir, options};

/// A host with ports, and a directory with the settings of a daemon.
struct Lab {
    host: Host,
    dir: DriverDir,
    place: tempfile::TempDir,
    _taps: Vec<Tap>,
}

impl Lab {
    fn new(ports: usize, bridge_nf: bool) -> Result<Self> {
        let host = Host::builder().bridge_nf(bridge_nf).build()?;
        let taps = (0..ports).map(|port| host.tap(&format!("tap{port}"))).collect::<Result<_>>()?;
        Ok(Self { host, dir: driver_dir(Module::Ours)?, place: tempfile::tempdir()?, _taps: taps })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn set(&self, settings: &str) -> Result<()> {
        Ok(fs::write(self.path("nwfilter.toml"), settings)?)
    }

    fn libvirtd(&self, settings: &str) -> Result<Libvirtd> {
        self.set(settings)?;
        let mut options = options(&self.dir);
        options.env.push(("NWFILTER_CONFIG".into(), self.path("nwfilter.toml").into()));
        Libvirtd::start_with(&self.host, options)
    }
}

fn binding(port: usize, filter: &str) -> String {
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap{port}'/><mac address='52:54:00:00:00:{port:02x}'/><filterref filter='{filter}'><parameter name='IP' value='10.0.0.1{port}'/></filterref></filterbinding>"
    )
}

fn lists_of(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !is_so() {
        ensure!(begin.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// What needs the daemon's driver to be there.
macro_rules! skip {
    () => {
        skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("ebtables"), Need::Tool("iptables"))
    };
}

#[test]
fn filters_and_bindings_are_in_the_directories_that_are_set() -> Result<()> {
    skip!();
    let lab = Lab::new(1, true)?;
    let (filters, bindings) = (lab.path("filters"), lab.path("bindings"));
    let settings = format!("config-dir = '{}'\nstate-dir = '{}'\n", filters.display(), bindings.display());
    let daemon = lab.libvirtd(&settings)?;
    daemon.define("<filter name='mine'><filterref filter='no-mac-spoofing'/></filter>")?;
    daemon.bind(&binding(0, "mine"))?;
    assert!(lists_of(&filters).contains(&"mine.xml".to_owned()), "{}", daemon.log());
    assert!(lists_of(&bindings).contains(&"tap0.xml".to_owned()), "{}", daemon.log());
    assert!(daemon.read_file("/run/libvirt/nwfilter-binding/tap0.xml").is_err());
    Ok(())
}

#[test]
fn ports_are_found_by_the_list_if_that_is_set_and_else_by_a_tree() -> Result<()> {
    skip!();
    const PORTS: usize = 9;
    let lab = Lab::new(PORTS, true)?;
    let direct = || lab.host.saved().unwrap().ebtables.matches("-A PREROUTING -i tap").count();
    let mut daemon = lab.libvirtd("dispatch = 'list'\n")?;
    for port in 0..PORTS {
        daemon.bind(&binding(port, "no-mac-spoofing"))?;
    }
    assert_eq!(direct(), PORTS, "{}", daemon.log());
    lab.set("")?;
    daemon.restart()?;
    daemon.virsh(&["nwfilter-binding-list"])?;
    assert!(direct() < PORTS, "{}", lab.host.saved()?.ebtables);
    Ok(())
}

#[test]
fn connections_get_no_helpers_if_that_is_set() -> Result<()> {
    skip!();
    const FTP: &str =
        "<filter name='ftp'><rule action='accept' direction='in'><tcp dstportstart='21' state='NEW'/></rule>
        <rule action='accept' direction='inout'><all state='ESTABLISHED,RELATED'/></rule></filter>";
    let lab = Lab::new(1, true)?;
    let has_helpers = || lab.host.run(&["iptables-save", "-t", "raw"]).unwrap().contains("nwfilter-ct");
    let mut daemon = lab.libvirtd("helpers = false\n")?;
    daemon.define(FTP)?;
    daemon.bind(&binding(0, "ftp"))?;
    assert!(!has_helpers(), "{}", daemon.log());
    lab.set("helpers = true\n")?;
    daemon.restart()?;
    daemon.virsh(&["nwfilter-binding-list"])?;
    assert!(has_helpers(), "{}", daemon.log());
    Ok(())
}

#[test]
fn ip_rules_are_refused_instead_of_switching_bridge_nf_on_if_that_is_set() -> Result<()> {
    skip!();
    const IP: &str =
        "<filter name='ip'><rule action='drop' direction='in'><tcp dstportstart='21'/></rule></filter>";
    let lab = Lab::new(1, false)?;
    let mut daemon = lab.libvirtd("keep-bridge-nf = true\n")?;
    daemon.define(IP)?;
    let refused = daemon.bind(&binding(0, "ip")).unwrap_err().to_string();
    assert!(refused.contains("bridge-nf-call-iptables"), "{refused}");
    lab.set("")?;
    daemon.restart()?;
    daemon.bind(&binding(0, "ip"))?;
    Ok(())
}

#[test]
fn metrics_are_served_where_the_setting_says_and_a_place_that_is_taken_is_only_logged() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("ebtables"), Need::Tool("curl"));
    let lab = Lab::new(1, true)?;
    let socket = lab.path("run/metrics");
    let settings = format!("metrics = 'unix:{}'\n", socket.display());
    let daemon = lab.libvirtd(&settings)?;
    daemon.bind(&binding(0, "no-mac-spoofing"))?;
    let get = [
        "curl",
        "--silent",
        "--fail",
        "--unix-socket",
        &socket.to_string_lossy(),
        "http://localhost/metrics",
    ]
    .map(str::to_owned);
    let get: Vec<_> = get.iter().map(String::as_str).collect();
    let metrics = lab.host.run(&get)?;
    assert!(metrics.contains("nwfilter_ports 1") || metrics.contains("nwfilter_ports{"), "{metrics}");

    // A second daemon, on a host of its own.
    let other = Lab::new(1, true)?;
    let second = other.libvirtd(&settings)?;
    second.bind(&binding(0, "no-mac-spoofing"))?;
    assert!(second.log().contains("cannot serve metrics at unix:"), "{}", second.log());
    assert!(lab.host.run(&get)?.contains("nwfilter_ports"), "the first one still answers");
    Ok(())
}

#[test]
fn no_more_is_logged_than_the_level_that_is_set() -> Result<()> {
    skip!();
    let lab = Lab::new(1, true)?;
    let mut daemon = lab.libvirtd("")?;
    daemon.bind(&binding(0, "no-mac-spoofing"))?;
    assert!(daemon.log().contains("backend Xtables"), "{}", daemon.log());
    daemon.stop()?;
    let quiet = Lab::new(1, true)?;
    let daemon = quiet.libvirtd("log = 'error'\n")?;
    daemon.bind(&binding(0, "no-mac-spoofing"))?;
    assert!(!daemon.log().contains("backend Xtables"), "{}", daemon.log());
    Ok(())
}

#[test]
fn a_change_waits_no_longer_than_is_set_for_a_process_that_keeps_the_stores_locked() -> Result<()> {
    skip!();
    let lab = Lab::new(1, true)?;
    let bindings = lab.path("bindings");
    let daemon = lab.libvirtd(&format!("timeout = 1\nstate-dir = '{}'\n", bindings.display()))?;
    daemon.bind(&binding(0, "no-mac-spoofing"))?;
    let file = File::options().append(true).open(bindings.join(".lock"))?;
    let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    const FILTER: &str = "<filter name='mine'><filterref filter='no-mac-spoofing'/></filter>";
    let refused = daemon.define(FILTER).unwrap_err().to_string();
    assert!(refused.contains("was not free within 1 s"), "{refused}");
    drop(lock);
    daemon.define(FILTER)
}

#[test]
fn addresses_are_learned_as_the_settings_say_where_a_binding_does_not() -> Result<()> {
    skip!();
    let lab = Lab::new(1, true)?;
    let without_address = binding(0, "clean-traffic").replace("<parameter name='IP' value='10.0.0.10'/>", "");
    let mut daemon = lab.libvirtd("[learning]\nmethod = 'none'\n")?;
    let refused = daemon.bind(&without_address).unwrap_err().to_string();
    assert!(refused.contains("IP"), "{refused}");

    // Until there is a lease only DHCP passes, from any server or from those that are set.
    let servers = || lab.host.saved().unwrap().ebtables.contains("10.0.0.250");
    lab.set("[learning]\nmethod = 'dhcp'\n")?;
    daemon.restart()?;
    daemon.bind(&without_address)?;
    assert!(daemon.log().contains("whoever answers"), "{}", daemon.log());
    assert!(!servers());
    lab.set("[learning]\nmethod = 'dhcp'\ndhcp-servers = ['10.0.0.250', 'fd00::1']\n")?;
    daemon.restart()?;
    daemon.virsh(&["nwfilter-binding-list"])?;
    assert!(servers(), "{}", lab.host.saved()?.ebtables);
    Ok(())
}

#[test]
fn a_file_that_cannot_be_understood_is_refused_with_its_place_until_it_is_mended() -> Result<()> {
    skip!();
    let lab = Lab::new(1, true)?;
    let mut daemon = lab.libvirtd("")?;
    daemon.bind(&binding(0, "no-mac-spoofing"))?;
    lab.set("\nbakend = 'xtables'\nhelpers = 'no'\n")?;
    daemon.restart()?;
    let refused = daemon.virsh(&["nwfilter-binding-list"]).unwrap_err().to_string();
    assert!(refused.contains("nwfilter.toml:2:1: there is no setting 'bakend'"), "{refused}");
    assert!(daemon.log().contains("nwfilter.toml:3:11"), "{}", daemon.log());
    assert!(lab.host.saved()?.ebtables.contains("libvirt-I-tap0"), "the port keeps its rules");
    lab.set("helpers = false\n")?;
    assert!(daemon.virsh(&["nwfilter-binding-list"])?.contains("tap0"));
    Ok(())
}

#[test]
fn sighup_logs_what_takes_effect_with_the_next_start() -> Result<()> {
    skip!();
    let lab = Lab::new(1, true)?;
    let daemon = lab.libvirtd("")?;
    daemon.bind(&binding(0, "no-mac-spoofing"))?;
    lab.set("helpers = false\n")?;
    let pid = Pid::from_raw(daemon.pid().unwrap().try_into()?);
    kill(pid, Signal::SIGHUP)?;
    eventually("the difference is logged", || {
        daemon.log().contains("setting helpers was 'true' and is 'false'")
    })?;
    lab.set("helpers = maybe\n")?;
    kill(pid, Signal::SIGHUP)?;
    eventually("the error is logged", || daemon.log().contains("the old settings stay: "))?;
    assert!(daemon.virsh(&["nwfilter-binding-list"])?.contains("tap0"));
    Ok(())
}
