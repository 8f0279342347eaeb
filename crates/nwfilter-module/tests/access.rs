//! What libvirt's access control forbids, the module refuses.

mod common;

use std::process::Output;

use anyhow::{Result, ensure};
use nwfilter_testlab::{Connect, Host, Libvirtd, LibvirtdOptions, Need, skip_unless};

use common::compiled::Preload;
use common::{Module, driver_dir, options};

const DENIED: &str = "22222222-2222-2222-2222-222222222222";

/// Forbids to define the filter with the UUID [`DENIED`], as a polkit rule on `nwfilter_uuid` would.
const ACCESS: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
struct filter { const char *name; unsigned char uuid[16]; };
typedef void (*report_error)(int, int, const char *, const char *, size_t, const char *, ...);
int virNWFilterDefineXMLFlagsEnsureACL(void *connect, const struct filter *filter) {
    unsigned char denied[16];
    memset(denied, 0x22, sizeof denied);
    if (memcmp(filter->uuid, denied, sizeof denied))
        return 0;
    ((report_error) dlsym(RTLD_DEFAULT, "virReportErrorHelper"))(33, 88, "f", "f", 0, "%s", filter->name);
    return -1;
}
int virNWFilterDefineXMLEnsureACL(void *connect, const struct filter *filter) {
    return virNWFilterDefineXMLFlagsEnsureACL(connect, filter);
}
"#;

fn define(daemon: &Libvirtd, xml: &str) -> Result<Output> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(&file, xml)?;
    Ok(daemon.virsh_command(Connect::Qemu).arg("nwfilter-define").arg(file.path()).output()?)
}

#[test]
fn a_filter_that_a_user_may_not_define_is_not_replaced_by_one_without_uuid() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let preload = Preload::compile(ACCESS)?;
    let host = Host::new()?;
    let dir = driver_dir(Module::Ours)?;
    let daemon = Libvirtd::start_with(&host, LibvirtdOptions { env: vec![preload.env()], ..options(&dir) })?;
    daemon.write_file(
        "/etc/libvirt/nwfilter/locked.xml",
        &format!("<filter name='locked'><uuid>{DENIED}</uuid></filter>"),
    )?;
    let before = daemon.dumpxml("locked")?;
    for xml in [
        "<filter name='locked'><rule action='accept' direction='inout'/></filter>".to_owned(),
        format!(
            "<filter name='locked'><uuid>{DENIED}</uuid><rule action='accept' direction='inout'/></filter>"
        ),
        format!("<filter name='another'><uuid>{DENIED}</uuid></filter>"),
        "<filter name='locked'><uuid>11111111-1111-1111-1111-111111111111</uuid></filter>".to_owned(),
    ] {
        let output = define(&daemon, &xml)?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success() && stderr.contains("access denied"), "{xml}: {stderr}");
        assert_eq!(daemon.dumpxml("locked")?, before);
    }
    let output = define(&daemon, "<filter name='free'/>")?;
    ensure!(output.status.success(), "{}", String::from_utf8(output.stderr)?);
    Ok(())
}

#[test]
fn a_filter_that_is_defined_again_without_uuid_keeps_the_one_that_clients_have_seen() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = common::libvirtd(&host, Module::Ours)?;
    // The package's files have no UUID.
    daemon.write_file("/etc/libvirt/nwfilter/packaged.xml", "<filter name='packaged'/>")?;
    let uuid = |xml: String| xml.lines().find(|line| line.contains("<uuid>")).map(str::to_owned);
    let before = uuid(daemon.dumpxml("packaged")?);
    ensure!(before.is_some());
    daemon.define("<filter name='packaged'><rule action='drop' direction='in'/></filter>")?;
    assert_eq!(uuid(daemon.dumpxml("packaged")?), before);
    Ok(())
}
