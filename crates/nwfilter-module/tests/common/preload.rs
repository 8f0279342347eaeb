//! A libvirt some of whose functions are a test's: a library that the daemon loads before libvirt.

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

/// A library compiled from C.
pub(crate) struct Preload(TempDir);

impl Preload {
    pub(crate) fn compile(source: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (c, library) = (dir.path().join("preload.c"), dir.path().join("preload.so"));
        fs::write(&c, source)?;
        let output = Command::new("gcc")
            .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
            .arg(library)
            .arg(c)
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(Self(dir))
    }

    /// The environment of a daemon that loads it.
    pub(crate) fn env(&self) -> (OsString, OsString) {
        ("LD_PRELOAD".into(), self.0.path().join("preload.so").into())
    }
}
