//! What only C can say: functions in place of some of libvirt's, and a client of functions that virsh does not call.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

/// A library that a daemon loads before libvirt, so that its functions take the place of libvirt's.
pub(crate) struct Preload(TempDir);

impl Preload {
    pub(crate) fn compile(source: &str) -> Result<Self> {
        Ok(Self(compile(source, &["-shared", "-fPIC"], &[])?))
    }

    /// The environment of a daemon that loads it.
    pub(crate) fn env(&self) -> (OsString, OsString) {
        ("LD_PRELOAD".into(), compiled(&self.0).into())
    }
}

/// A program that calls libvirt.
pub(crate) struct Program(TempDir);

impl Program {
    pub(crate) fn compile(source: &str) -> Result<Self> {
        Ok(Self(compile(source, &[], &["-l:libvirt.so.0"])?))
    }

    pub(crate) fn command(&self) -> Command {
        Command::new(compiled(&self.0))
    }
}

fn compile(source: &str, options: &[&str], libraries: &[&str]) -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    let text = dir.path().join("source.c");
    fs::write(&text, source)?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-Wall", "-Werror"]).args(options).arg("-o").arg(compiled(&dir)).arg(text).args(libraries);
    let output = gcc.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(dir)
}

fn compiled(dir: &TempDir) -> PathBuf {
    Path::join(dir.path(), "compiled")
}
