//! The daemon of a user other than root has no filters and takes none, as with libvirt's module.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nwfilter_testlab::{Host, Need, skip_unless};

use common::{Module, driver_dir, eventually};

const NOBODY: u32 = 65534;

/// What a client of an unprivileged daemon sees: for each command and URI what virsh says, but for the text of messages.
fn seen(module: Module) -> Result<Vec<String>> {
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["modules", "run", "home"] {
        fs::create_dir(path(name))?;
    }
    // The user must be able to read the modules.
    let modules = driver_dir(module)?;
    for entry in fs::read_dir(modules.options().driver_dir.context("a directory of modules")?)? {
        let entry = entry?;
        fs::copy(entry.path(), Path::new(&path("modules")).join(entry.file_name()))?;
    }
    fs::write(path("conf"), format!("log_outputs = \"1:file:{}\"\n", path("home/log")))?;
    fs::write(path("filter.xml"), "<filter name='x'/>")?;
    fs::write(path("invalid.xml"), "<filter")?;
    fs::write(
        path("binding.xml"),
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='x'/></filterbinding>",
    )?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    for name in ["run", "home"] {
        std::os::unix::fs::chown(path(name), Some(NOBODY), Some(NOBODY))?;
    }
    let variables = [
        format!("HOME={}", path("home")),
        format!("XDG_RUNTIME_DIR={}", path("run")),
        format!("XDG_CONFIG_HOME={}", path("home")),
        format!("XDG_CACHE_HOME={}", path("home")),
        format!("LIBVIRT_DRIVER_DIR={}", path("modules")),
        "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent".to_owned(),
    ];
    let mut words = vec!["env"];
    words.extend(variables.iter().map(String::as_str));
    let conf = path("conf");
    words.extend(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
    words.extend(["libvirtd", "-f", &conf]);
    let _daemon = host.spawn(&words)?;
    let socket = path("run/libvirt/libvirt-sock");
    let virsh = |uri: &str, words: &str| {
        let mut virsh = Command::new("virsh");
        virsh.env("LC_ALL", "C").args(["-q", "-c", &format!("{uri}?socket={socket}")]).args(words.split(' '));
        virsh.output()
    };
    eventually("the daemon serves", Duration::from_secs(30), || {
        Ok(virsh("qemu+unix:///session", "uri")?.status.success())
    })?;

    let mut all = Vec::new();
    for uri in ["qemu+unix:///session", "nwfilter+unix:///system", "nwfilter+unix:///session"] {
        for words in [
            "nwfilter-list".to_owned(),
            "nwfilter-binding-list".to_owned(),
            "nwfilter-dumpxml clean-traffic".to_owned(),
            "nwfilter-dumpxml 99999999-2222-4333-8444-555555555555".to_owned(),
            "nwfilter-binding-dumpxml tap0".to_owned(),
            format!("nwfilter-define {}", path("filter.xml")),
            format!("nwfilter-define {}", path("invalid.xml")),
            format!("nwfilter-binding-create {}", path("binding.xml")),
        ] {
            let output = virsh(uri, &words)?;
            let stderr = String::from_utf8(output.stderr)?;
            let codes =
                stderr.lines().filter_map(|line| Some(line.rsplit_once("error: ")?.1.split_once(": ")?.0));
            let said = String::from_utf8(output.stdout)? + &codes.collect::<Vec<_>>().join(", ");
            let command = words.split(' ').next().unwrap_or_default();
            all.push(format!("{uri} {command}: {} {said}", output.status));
        }
    }
    Ok(all)
}

#[test]
fn the_daemon_of_a_user_answers_as_with_libvirts_module() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("setpriv"));
    assert_eq!(seen(Module::Ours)?, seen(Module::Libvirts)?);
    Ok(())
}
