//! Libvirts that the module does not know: it refuses what it does not understand, and the daemon serves the rest.

mod common;

use std::fs::{File, OpenOptions};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nwfilter_testlab::{Connect, DriverDir, Host, Libvirtd, LibvirtdOptions, Need, skip_unless};

use common::compiled::{Preload, Program};
use common::{Domain, Module, driver_dir, options};

/// A libvirt that says it has another version.
fn version(number: u32) -> String {
    format!(
        "int virGetVersion(unsigned long *version, const char *type, unsigned long *of_type) {{
             *version = {number}; return 0;
         }}"
    )
}

/// A daemon with our module and a libvirt whose functions are partly those of a text in C.
fn daemon(host: &Host, source: &str) -> Result<(DriverDir, Preload, Libvirtd)> {
    let (dir, preload) = (driver_dir(Module::Ours)?, Preload::compile(source)?);
    let daemon = Libvirtd::start_with(host, LibvirtdOptions { env: vec![preload.env()], ..options(&dir) })?;
    Ok((dir, preload, daemon))
}

/// Domains without filters start, those with filters do not, and the reason is in the daemon's log.
fn serves_all_but_filters(daemon: &Libvirtd, reason: &str) -> Result<()> {
    ensure!(daemon.log().contains(reason), "{}", daemon.log());
    Domain::new(1, None).start(daemon)?;
    let error = Domain::clean(2).start(daemon).err().context("a domain started without its filter")?;
    ensure!(daemon.virsh(&["list", "--name"])?.trim() == "vm1", "{error:#}");
    ensure!(daemon.virsh(&["nwfilter-list"]).is_err());
    Ok(())
}

#[test]
fn a_libvirt_that_is_too_old_serves_all_but_filters() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let host = Host::new()?;
    let (_dir, _preload, daemon) = daemon(&host, &version(8_009_000))?;
    serves_all_but_filters(
        &daemon,
        "the nwfilter module is not registered: libvirt 8.9.0 is older than 9.0.0",
    )
}

#[test]
fn a_libvirt_that_is_newer_than_any_that_was_tried_is_checked_and_served() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let host = Host::new()?;
    let (_dir, _preload, daemon) = daemon(&host, &version(99_000_000))?;
    Domain::clean(1).start(&daemon)?;
    ensure!(daemon.log().contains("libvirt 99.0.0 is newer than 12.8.0"), "{}", daemon.log());
    ensure!(host.saved()?.ebtables.contains("libvirt-I-tap1"));
    Ok(())
}

#[test]
fn a_libvirt_that_calls_another_function_than_it_should_serves_all_but_filters() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let host = Host::new()?;
    // As if a function had been put into the table before this one.
    let moved = "#define _GNU_SOURCE
        #include <dlfcn.h>
        typedef void *(*by_text)(void *, const char *);
        void *virNWFilterBindingLookupByPortDev(void *connect, const char *port) {
            return ((by_text) dlsym(RTLD_NEXT, \"virNWFilterLookupByName\"))(connect, port);
        }";
    let (_dir, _preload, daemon) = daemon(&host, moved)?;
    serves_all_but_filters(&daemon, "calls [LookupByName] of the driver where it should call BindingLookup")?;
    let error = daemon.virsh(&["nwfilter-list"]).err().context("filters are listed")?;
    ensure!(format!("{error:#}").contains("nothing is filtered: this libvirt calls"), "{error:#}");
    Ok(())
}

#[test]
fn a_libvirt_whose_access_checks_read_another_layout_serves_all_but_filters() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let host = Host::new()?;
    let other = "#include <stdlib.h>
        #include <string.h>
        struct filter { unsigned char uuid[16]; const char *name; void *more[16]; };
        void *virNWFilterDefParse(const char *xml, const char *file, unsigned int flags) {
            struct filter *filter = calloc(1, sizeof *filter);
            memset(filter->uuid, 0x22, sizeof filter->uuid);
            filter->name = \"name\";
            return filter;
        }
        void virNWFilterDefFree(void *filter) { free(filter); }";
    let (_dir, _preload, daemon) = daemon(&host, other)?;
    serves_all_but_filters(
        &daemon,
        "the definitions of filters and bindings of this libvirt have an unknown layout",
    )
}

#[test]
fn connections_report_the_same_security_as_with_libvirts_module() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let client = Program::compile(
        "#include <stdio.h>
         void *virConnectOpen(const char *);
         int virConnectIsSecure(void *), virConnectIsEncrypted(void *), virConnectIsAlive(void *);
         int main(int count, char **words) {
             void *connect = virConnectOpen(words[1]);
             printf(\"%d %d %d\", virConnectIsSecure(connect), virConnectIsEncrypted(connect),
                    virConnectIsAlive(connect));
             return !connect;
         }",
    )?;
    let asked = |module| -> Result<String> {
        let host = Host::new()?;
        let (_dir, daemon) = common::libvirtd(&host, module)?;
        let output = client.command().arg(daemon.uri(Connect::Nwfilter)).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8(output.stderr)?);
        Ok(String::from_utf8(output.stdout)?)
    };
    let libvirts = asked(Module::Libvirts)?;
    assert_eq!(libvirts, "1 0 1");
    assert_eq!(asked(Module::Ours)?, libvirts);
    Ok(())
}

/// Locks the first byte of a file as another daemon would; whether nobody else had.
fn lock(file: &File) -> bool {
    let first_byte = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLK(&first_byte)).is_ok()
}

#[test]
fn a_daemon_does_not_start_while_another_filters_the_host_as_with_libvirts_module() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    for module in [Module::Libvirts, Module::Ours] {
        let host = Host::new()?;
        let (_dir, mut daemon) = common::libvirtd(&host, module)?;
        let path = daemon.path("/run/libvirt/nwfilter/driver.pid")?;
        let written = std::fs::read_to_string(&path)?;
        assert_eq!(written.trim(), daemon.pid().context("it runs")?.to_string(), "{module:?}");
        let open = || OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        ensure!(!lock(&open()?), "a daemon with {module:?} holds no lock");
        daemon.stop()?;
        let other = open()?;
        ensure!(lock(&other), "a daemon with {module:?} has kept the lock");
        let error = daemon.start_again().err().context("a second daemon runs")?;
        ensure!(format!("{error:#}").contains("driver.pid"), "{error:#}");
    }
    Ok(())
}
