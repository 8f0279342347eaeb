//! Tests that find other tools than those of the machine.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// Programs that come before those of the search path.
#[derive(Debug)]
pub struct Tools(TempDir);

impl Tools {
    /// None yet.
    pub fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    /// iptables and ip6tables of the legacy variant.
    pub fn legacy() -> Result<Self> {
        let tools = Self::new()?;
        for tool in ["iptables", "ip6tables"] {
            for part in ["", "-save", "-restore"] {
                let legacy = fs::canonicalize(find(&format!("{tool}-legacy{part}"))?)?;
                symlink(legacy, tools.path().join(format!("{tool}{part}")))?;
            }
        }
        Ok(tools)
    }

    /// Those that have to do with rules, in place of all programs of `/usr/sbin`, but one is missing.
    pub fn without(missing: &str) -> Result<Self> {
        let tools = Self::new()?;
        let families = ["iptables", "ip6tables", "ebtables"];
        let names = families
            .iter()
            .flat_map(|family| ["", "-save", "-restore"].map(|part| format!("{family}{part}")));
        for name in names.chain(["modprobe".to_owned()]).filter(|name| name != missing) {
            fs::copy(find(&name)?, tools.path().join(name))?;
        }
        Ok(tools)
    }

    /// Has a command, and what it starts, find these tools first.
    pub fn come_first(&self, command: &mut Command) -> Result<()> {
        with_mounts(command, &[(self.path().to_owned(), FIRST.into())])
    }

    /// Has a command, and what it starts, find these tools in place of those of `/usr/sbin`.
    pub fn replace_all(&self, command: &mut Command) -> Result<()> {
        with_mounts(command, &[(self.path().to_owned(), "/usr/sbin".into())])
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds a program that is a text for `sh`, in which `$REAL` stands for the one of the search path.
    pub fn script(&self, name: &str, text: &str) -> Result<()> {
        let file = self.path().join(name);
        fs::write(&file, format!("#!/bin/sh\nREAL={}\n{text}", find(name)?.display()))?;
        Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
    }

    /// Runs an ignored test of this program in a process of its own, which finds these tools.
    pub fn run_test(&self, name: &str) -> Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", name, "--ignored", "--nocapture"]).env(TOOLS, self.path());
        self.come_first(&mut command)?;
        let output = command.output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success() && said.contains("1 passed"), "{said}");
        Ok(())
    }

    /// Where the tools are that the process of [`Tools::run_test`] finds first.
    pub fn of_this_test() -> Result<PathBuf> {
        Ok(std::env::var_os(TOOLS).context("not run with other tools")?.into())
    }
}

/// The variable that tells a test where its tools are.
const TOOLS: &str = "NWFILTER_TEST_TOOLS";

/// The directory of the search path of tools ([`SEARCH_PATH`](nwfilter_xtables::process::SEARCH_PATH)) that comes first.
const FIRST: &str = "/usr/local/sbin";

/// Has a command see files and directories in place of others: each pair is what it sees and where.
pub(crate) fn with_mounts(command: &mut Command, mounts: &[(PathBuf, PathBuf)]) -> Result<()> {
    let c_string = |path: &PathBuf| CString::new(path.as_os_str().as_bytes());
    let pairs = mounts.iter().map(|(source, target)| Ok((c_string(source)?, c_string(target)?)));
    let mounts = pairs.collect::<Result<Vec<_>>>()?;
    // SAFETY: the closure makes nothing but system calls, with strings made before the fork.
    unsafe {
        command.pre_exec(move || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, c"/", None::<&str>, private, None::<&str>)?;
            for (source, target) in &mounts {
                let (source, target) = (Some(source.as_c_str()), target.as_c_str());
                mount(source, target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            }
            Ok(())
        });
    }
    Ok(())
}

/// Where the search path finds a program.
pub(crate) fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let file = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    file.with_context(|| format!("no program {name} on the PATH"))
}
