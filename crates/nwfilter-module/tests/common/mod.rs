//! Live libvirtd with either driver module, and domains to run in it.

// Each test file uses its part.
#![allow(dead_code)]

pub(crate) mod compiled;
pub(crate) mod traffic;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nwfilter_testlab::{Connect, DriverDir, Host, Libvirtd, LibvirtdOptions, Mac};

const FILE: &str = "libvirt_driver_nwfilter.so";

/// Whose nwfilter driver a libvirtd has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Module {
    Libvirts,
    Ours,
}

/// Puts one driver in the place of the other, for the next start of a daemon.
pub(crate) fn install(dir: &DriverDir, module: Module) -> Result<()> {
    match module {
        Module::Libvirts => dir.install_libvirts(),
        Module::Ours => dir.install(built()?),
    }
}

/// A directory of driver modules with this nwfilter driver.
pub(crate) fn driver_dir(module: Module) -> Result<DriverDir> {
    let dir = DriverDir::without_nwfilter()?;
    install(&dir, module)?;
    Ok(dir)
}

/// A libvirtd that runs domains, with one of the modules.
pub(crate) fn libvirtd(host: &Host, module: Module) -> Result<(DriverDir, Libvirtd)> {
    let dir = driver_dir(module)?;
    let daemon = Libvirtd::start_with(host, options(&dir))?;
    Ok((dir, daemon))
}

pub(crate) fn options(dir: &DriverDir) -> LibvirtdOptions {
    LibvirtdOptions { log_filters: Some("1:nwfilter".into()), ..dir.options() }
}

/// A domain with one interface at the bridge.
#[derive(Clone, Debug)]
pub(crate) struct Domain {
    pub(crate) name: String,
    pub(crate) number: u8,
    pub(crate) filterref: String,
}

impl Domain {
    /// Domain number `number`, with the filter it is to have or none.
    pub(crate) fn new(number: u8, filter: Option<&str>) -> Self {
        let ip = format!("10.0.0.{number}");
        let filterref = filter.map(|filter| {
            format!("<filterref filter='{filter}'><parameter name='IP' value='{ip}'/></filterref>")
        });
        Self { name: format!("vm{number}"), number, filterref: filterref.unwrap_or_default() }
    }

    pub(crate) fn clean(number: u8) -> Self {
        Self::new(number, Some("clean-traffic"))
    }

    /// The MAC address of its interface.
    pub(crate) fn mac(&self) -> Mac {
        Mac::new([0x52, 0x54, 0, 0, 1, self.number])
    }

    /// The name that its port is asked to have; that is also libvirt's own for its first domains.
    pub(crate) fn port(&self) -> String {
        format!("tap{}", self.number)
    }

    pub(crate) fn interface(&self) -> String {
        interface(self.mac(), &self.port(), &self.filterref)
    }

    pub(crate) fn xml(&self) -> String {
        format!(
            "<domain type='qemu'><name>{}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='q35'>hvm</type></os>
             <on_poweroff>destroy</on_poweroff><devices>
             <controller type='pci' model='pcie-root'/><controller type='pci' model='pcie-root-port'/>
             <controller type='pci' model='pcie-root-port'/><controller type='pci' model='pcie-root-port'/>
             <controller type='pci' model='pcie-root-port'/>
             {}<memballoon model='none'/></devices></domain>",
            self.name,
            self.interface()
        )
    }

    /// Starts the domain, which is gone when it is destroyed.
    pub(crate) fn start(&self, daemon: &Libvirtd) -> Result<()> {
        with_xml(daemon, &["create"], &self.xml())
    }

    pub(crate) fn destroy(&self, daemon: &Libvirtd) -> Result<()> {
        daemon.virsh_on(Connect::Qemu, &["destroy", &self.name]).map(drop)
    }

    pub(crate) fn is_running(&self, daemon: &Libvirtd) -> bool {
        daemon.virsh_on(Connect::Qemu, &["domstate", &self.name]).is_ok_and(|state| state.trim() == "running")
    }
}

/// An interface at the bridge. It has two queues so that a test can open a third, and be the guest.
pub(crate) fn interface(mac: Mac, port: &str, filterref: &str) -> String {
    format!(
        "<interface type='bridge'><source bridge='br0'/><mac address='{mac}'/><target dev='{port}'/>
         <model type='virtio'/><driver name='qemu' queues='2'/>{filterref}</interface>"
    )
}

/// Runs a virsh command of the QEMU driver that reads a document, whose path is put after the words.
pub(crate) fn with_xml(daemon: &Libvirtd, words: &[&str], xml: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(&file, xml)?;
    let path = file.path().to_str().context("a path that is no text")?;
    daemon.virsh_on(Connect::Qemu, &[words, &[path]].concat()).map(drop)
}

/// Waits until something is so.
pub(crate) fn eventually(
    what: &str,
    patience: Duration,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The variable that says where the module is, where cargo cannot be asked to build it.
const MODULE: &str = "NWFILTER_MODULE";

/// The module, built as this test was.
fn built() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    built.as_deref().map_err(|error| anyhow!("the module does not build: {error}"))
}

fn build() -> Result<PathBuf> {
    if let Some(module) = std::env::var_os(MODULE) {
        return Ok(module.into());
    }
    let test = std::env::current_exe()?;
    let profile_dir = test.ancestors().nth(2).context("a test outside of a target directory")?;
    let target_dir = profile_dir.parent().context("a test outside of a target directory")?;
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "-p", "nwfilter-module", "--target-dir"]).arg(target_dir);
    if profile_dir.ends_with("release") {
        build.arg("--release");
    }
    ensure!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status()?.success(), "cargo build failed");
    Ok(profile_dir.join(FILE))
}
