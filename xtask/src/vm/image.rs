//! Kernel, initramfs and root image, built once and kept outside of the work tree.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use uuid::Uuid;

use crate::packages::{VM, ensure_installed};

const BUILD: &str = include_str!("build.sh");
const INIT: &str = include_str!("init.sh");
const SYSTEMD: &str = include_str!("systemd.sh");
const BOOT: &str = include_str!("boot.sh");
const BOOT_SYSTEMD: &str = include_str!("boot-systemd.sh");

/// The release that the programs which are built here run on, as it is likely the one they are built on.
const SUITE: &str = "bookworm";
const MIRROR: &str = "http://deb.debian.org/debian";

/// What is in the root image beside a minimal Debian.
const PACKAGES: [&str; 15] = [
    "busybox-static",
    "conntrack",
    "curl",
    "dnsmasq-base",
    "ebtables",
    "ipset",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-config-nwfilter",
    "nftables",
    "vsftpd",
];

/// What a host with libvirt has beside that, and systemd as its first process.
const HOST_PACKAGES: [&str; 9] = [
    "dbus",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "man-db",
    "polkitd",
    "procps",
    "qemu-system-x86",
    "systemd-sysv",
    "udev",
];

/// What the machine boots from.
#[derive(Debug)]
pub(crate) struct Image {
    /// Kernel and initramfs.
    dir: PathBuf,
    root: PathBuf,
    /// What the initramfs starts.
    boot: &'static str,
}

impl Image {
    /// Where the image for this version of the build is, or will be.
    pub(crate) fn wanted() -> Result<Self> {
        let dir = cache()?.join(key());
        Ok(Self { root: dir.join("root.img"), dir, boot: BOOT })
    }

    /// A host with systemd, libvirt and QEMU, which is made of the image where it is not there.
    pub(crate) fn ensure_host() -> Result<Self> {
        let base = Self::ensure()?;
        let (cache, key) = (cache()?, host_key());
        let dir = cache.join(&key);
        let host = Self { dir: base.dir.clone(), root: dir.join("root.img"), boot: BOOT_SYSTEMD };
        if dir.exists() {
            return Ok(host);
        }
        ensure!(Uid::effective().is_root(), "making the host of the virtual machine needs root");
        let _lock = lock(&cache)?;
        if !dir.exists() {
            let script = |scripts: &Path, new: &Path| -> Result<Vec<OsString>> {
                let script = scripts.join("systemd.sh");
                fs::write(&script, SYSTEMD)?;
                let arguments = [script.into(), new.into(), base.root().into()];
                Ok(arguments.into_iter().chain(HOST_PACKAGES.map(OsString::from)).collect())
            };
            build(&dir, script)?;
        }
        Ok(host)
    }

    /// The image, which is built where it is not there.
    pub(crate) fn ensure() -> Result<Self> {
        ensure_installed(&[VM])?;
        let image = Self::wanted()?;
        if image.dir.exists() {
            return Ok(image);
        }
        ensure!(
            Uid::effective().is_root(),
            "building the virtual machine needs root; run `sudo -E env PATH=$PATH cargo xtask vm build` once"
        );
        let _lock = lock(&cache()?)?;
        // Another process may have built it meanwhile.
        if !image.dir.exists() {
            image.build()?;
        }
        Ok(image)
    }

    /// The directory of its files.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub(crate) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.gz")
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.root.clone()
    }

    /// The script that is the machine's first process.
    pub(super) fn boot(&self) -> &'static str {
        self.boot
    }

    fn build(&self) -> Result<()> {
        let cache = cache()?;
        build(&self.dir, |scripts, new| {
            let [script, init] = ["build.sh", "init.sh"].map(|name| scripts.join(name));
            fs::write(&script, BUILD)?;
            fs::write(&init, INIT)?;
            let words = [SUITE, MIRROR].map(OsString::from);
            let rest = [cache.join("debs").into(), init.into(), PACKAGES.join(",").into()];
            Ok([script.into(), new.into()].into_iter().chain(words).chain(rest).collect())
        })
    }
}

/// Has a script fill a directory beside its place and moves it there, so that what is there is whole. `script` writes the
/// script into the first directory and gives the words that have it fill the second.
fn build(dir: &Path, script: impl FnOnce(&Path, &Path) -> Result<Vec<OsString>>) -> Result<()> {
    eprintln!("building the virtual machine in {}", dir.display());
    let start = Instant::now();
    let new = cache()?.join("new");
    remove(&new)?;
    fs::create_dir(&new)?;
    let scripts = tempfile::tempdir()?;
    let words = script(scripts.path(), &new)?;
    let mut unshare = Command::new("unshare");
    // SAFETY: prctl is a bare system call, which a child may make between fork and exec.
    unsafe {
        unshare.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
    }
    // What the script mounts and starts is gone when it ends, and it ends with this thread.
    let status = unshare
        .args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh"])
        .args(words)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot run unshare")?;
    ensure!(status.success(), "the virtual machine is not built; see {}", new.join("log").display());
    fs::rename(&new, dir)?;
    eprintln!("built in {:.0?}", start.elapsed());
    Ok(())
}

/// Changes with everything that the image is made of.
fn key() -> String {
    digest(&[BUILD, INIT, SUITE, MIRROR, &PACKAGES.join(",")])
}

/// Changes with everything that the host is made of.
fn host_key() -> String {
    digest(&[&key(), SYSTEMD, &HOST_PACKAGES.join(",")])
}

fn digest(parts: &[&str]) -> String {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, parts.join("\0").as_bytes()).simple().to_string()
}

/// Where images are kept: `vm` in the cache directory of nwfilter.
fn cache() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME").map_or_else(|| PathBuf::from("/var/cache"), PathBuf::from);
    ensure!(base.is_absolute(), "XDG_CACHE_HOME is not an absolute path");
    Ok(base.join("nwfilter/vm"))
}

/// Removes all images, and the packages they were made of.
pub(crate) fn clean() -> Result<()> {
    let cache = cache()?;
    if !cache.exists() {
        return Ok(());
    }
    let _lock = lock(&cache)?;
    remove(&cache)
}

fn lock(cache: &Path) -> Result<Flock<File>> {
    fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let file = OpenOptions::new().create(true).append(true).open(cache.join("lock"))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).context("cannot lock the cache")
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
