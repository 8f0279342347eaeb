//! Tests that find other tools than those of the machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
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

    /// Runs an ignored test of this program in a process of its own, which finds these tools: the search path belongs
    /// to the process.
    pub fn run_test(&self, name: &str) -> Result<()> {
        let path = std::env::var_os("PATH").context("no PATH")?;
        let dirs = std::iter::once(self.path().to_owned()).chain(std::env::split_paths(&path));
        let output = Command::new(std::env::current_exe()?)
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env("PATH", std::env::join_paths(dirs)?)
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success() && said.contains("1 passed"), "{said}");
        Ok(())
    }
}

/// Where the search path finds a program.
pub(crate) fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let file = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    file.with_context(|| format!("no program {name} on the PATH"))
}
