//! `cargo xtask test --libvirt SUITE`: the tests of the module with the libvirt of another Debian suite, in a chroot.

use std::env;
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::unistd::Uid;
use serde_json::Value;

use crate::interrupt::interruptible;
use crate::packages::{DEMO, SUITE, TEST, ensure_installed};

const SCRIPT: &str = include_str!("suite.sh");
const MIRROR: &str = "http://deb.debian.org/debian";

/// What the tests take; libvirt's nwfilter driver is part of the daemon's packages.
const PACKAGES: [&str; 16] = [
    "curl",
    "ebtables",
    "gcc",
    "iproute2",
    "ipset",
    "iptables",
    "kmod",
    "libc6-dev",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-config-nwfilter",
    "libvirt-daemon-system",
    "nftables",
    "procps",
    "qemu-system-x86",
    "vsftpd",
];

/// The test targets of the module that run there.
const TARGETS: [&str; 6] = ["access", "backend", "domains", "loading", "session", "surface"];

/// A Debian suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    Bookworm,
    Trixie,
    Sid,
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
        }
    }
}

/// Runs the tests with the libvirt of the suite; its chroot is made where there is none.
pub(crate) fn run(suite: Suite) -> Result<ExitCode> {
    ensure!(Uid::effective().is_root(), "the tests in a chroot need root");
    ensure_installed(&[DEMO, TEST, SUITE])?;
    interruptible(move || {
        let job = tempfile::tempdir()?;
        prepare(job.path())?;
        let root = chroot(suite)?;
        let status = script(&["run"], &root).arg(job.path()).status().context("cannot run the tests")?;
        println!("{} of {}", if status.success() { "passed" } else { "FAILED" }, suite.name());
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// Builds the module and its tests, and puts them beside the program that runs them.
fn prepare(job: &Path) -> Result<()> {
    let package = ["--package", "nwfilter-module"];
    let module = built(&[&["build"], package.as_slice()].concat(), |message| {
        let mut files = message["filenames"].as_array()?.iter().filter_map(Value::as_str);
        let is_module =
            |file: &&str| file.ends_with(".so") && message["target"]["name"] == "virt_driver_nwfilter";
        files.find(is_module).map(PathBuf::from)
    })?;
    fs::copy(module.last().context("cargo does not say where the module is")?, job.join("module.so"))?;

    let targets = TARGETS.iter().flat_map(|target| ["--test", target]);
    let arguments: Vec<_> = ["test", "--no-run"].into_iter().chain(package).chain(targets).collect();
    let tests = built(&arguments, |message| {
        let is_test = message["target"]["kind"].as_array()?.iter().any(|kind| kind == "test");
        is_test.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    })?;
    ensure!(tests.len() == TARGETS.len(), "{} of {} tests were built", tests.len(), TARGETS.len());
    let mut text = "#!/bin/sh\nexport HOME=/root LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         export NWFILTER_NO_SKIP=1 NWFILTER_MODULE=/job/module.so\nlibvirtd --version\nfailed=0\n"
        .to_owned();
    for test in tests {
        let name = test.file_name().context("a test without name")?;
        fs::copy(&test, job.join(name))?;
        let name = name.to_string_lossy();
        writeln!(text, "echo; echo '     Running {name}'; /job/{name} || failed=1")?;
    }
    text += "exit $failed\n";
    fs::write(job.join("run"), text)?;
    Ok(fs::set_permissions(job.join("run"), Permissions::from_mode(0o755))?)
}

/// Runs cargo; what `file` finds in its messages.
fn built(arguments: &[&str], file: impl Fn(&Value) -> Option<PathBuf>) -> Result<Vec<PathBuf>> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo {} failed", arguments.join(" "));
    let messages = String::from_utf8(output.stdout)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(messages.filter_map(|message| file(&message)).collect())
}

/// The chroot of a suite. It is made beside its place and moved there, so that what is there is whole.
fn chroot(suite: Suite) -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME").map_or_else(|| PathBuf::from("/var/cache"), PathBuf::from);
    ensure!(base.is_absolute(), "XDG_CACHE_HOME is not an absolute path");
    let dir = base.join("nwfilter/libvirt");
    let (root, new) = (dir.join(suite.name()), dir.join(format!("{}.new", suite.name())));
    if root.exists() {
        return Ok(root);
    }
    println!("making {}, which takes some minutes", root.display());
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    fs::create_dir_all(&new)?;
    let log = dir.join(format!("{}.log", suite.name()));
    let file = fs::File::create(&log)?;
    let status = script(&["build"], &new)
        .args([suite.name(), MIRROR])
        .args(PACKAGES)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stderr(file.try_clone()?)
        .stdout(file)
        .status()?;
    ensure!(status.success(), "the chroot is not made; see {}", log.display());
    fs::rename(&new, &root)?;
    Ok(root)
}

/// The script, with its first arguments, in a mount namespace of its own.
fn script(action: &[&str], root: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "suite.sh"]).args(action).arg(root).env("LC_ALL", "C");
    command
}
