//! The Debian packages that tasks need, and installing what is missing of them.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;

/// A package and a file that is there when it is installed.
type Package = (&'static str, &'static str);

/// What filtering a guest takes.
pub(crate) const DEMO: &[Package] = &[
    ("curl", "/usr/bin/curl"),
    ("ebtables", "/usr/sbin/ebtables"),
    ("iproute2", "/usr/sbin/ip"),
    ("iptables", "/usr/sbin/iptables-restore"),
    ("iputils-ping", "/usr/bin/ping"),
    ("kmod", "/usr/sbin/modprobe"),
    ("nftables", "/usr/sbin/nft"),
    ("vsftpd", "/usr/sbin/vsftpd"),
];

/// What the tests take beside that: libvirt as the oracle, and guests.
pub(crate) const TEST: &[Package] = &[
    ("abigail-tools", "/usr/bin/abidiff"),
    ("conntrack", "/usr/sbin/conntrack"),
    ("dnsmasq-base", "/usr/sbin/dnsmasq"),
    ("g++", "/usr/bin/g++"),
    ("gcc", "/usr/bin/gcc"),
    ("golang-go", "/usr/bin/go"),
    ("ipset", "/usr/sbin/ipset"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("libvirt-clients", "/usr/bin/virsh"),
    ("libvirt-daemon", "/usr/sbin/libvirtd"),
    ("libvirt-daemon-config-nwfilter", "/usr/share/libvirt/nwfilter/clean-traffic.xml"),
    (
        "libvirt-daemon-driver-qemu",
        "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
    ),
    ("libvirt-daemon-system", "/etc/libvirt/libvirtd.conf"),
    ("libvirt-dev", "/usr/include/libvirt/libvirt.h"),
    ("pkg-config", "/usr/bin/pkg-config"),
    ("python3-cffi", "/usr/lib/python3/dist-packages/cffi/__init__.py"),
    ("python3-setuptools", "/usr/lib/python3/dist-packages/setuptools/build_meta.py"),
    ("python3-wheel", "/usr/lib/python3/dist-packages/wheel/__init__.py"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("strace", "/usr/bin/strace"),
    ("valgrind", "/usr/bin/valgrind"),
];

/// What the virtual machine takes.
pub(crate) const VM: &[Package] = &[
    ("binutils", "/usr/bin/strip"),
    ("busybox-static", "/bin/busybox"),
    ("cpio", "/usr/bin/cpio"),
    ("debootstrap", "/usr/sbin/debootstrap"),
    ("e2fsprogs", "/usr/sbin/mke2fs"),
    ("kmod", "/usr/sbin/modprobe"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
];

/// What building Debian packages takes.
pub(crate) const DEB: &[Package] = &[("binutils", "/usr/bin/strip"), ("dpkg-dev", "/usr/bin/dpkg-shlibdeps")];

/// What checks Debian packages.
pub(crate) const LINTIAN: &[Package] = &[("lintian", "/usr/bin/lintian")];

/// What building RPM packages takes.
pub(crate) const RPM: &[Package] = &[("binutils", "/usr/bin/strip"), ("rpm", "/usr/bin/rpmbuild")];

/// What making a chroot takes.
pub(crate) const SUITE: &[Package] = &[("debootstrap", "/usr/sbin/debootstrap")];

/// Installs the packages of `lists` that are missing; where that takes another user, says what to run.
pub(crate) fn ensure_installed(lists: &[&[Package]]) -> Result<()> {
    let missing: Vec<_> = lists
        .concat()
        .into_iter()
        .filter(|(_, file)| !Path::new(file).exists())
        .map(|(name, _)| name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let wanted = missing.join(" ");
    if !Uid::effective().is_root() {
        bail!(
            "these packages are missing; install them with\n  sudo apt-get install --no-install-recommends {wanted}"
        );
    }
    println!("installing {wanted}");
    apt_get(&["update", "--quiet=2"], &[])?;
    apt_get(&["install", "--yes", "--quiet=2", "--no-install-recommends"], &missing)
}

fn apt_get(args: &[&str], packages: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(args)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("cannot run apt-get; this task installs Debian packages")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "apt-get {} failed:\n{said}", args.join(" "));
    Ok(())
}
