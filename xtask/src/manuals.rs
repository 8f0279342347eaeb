//! `cargo xtask manuals`: the manual pages and the completions of shells, as the command line itself writes them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

/// Writes them into a directory.
pub(crate) fn run(directory: &Path) -> Result<ExitCode> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "--package", "nwfilterctl", "--bin", "nwfilterctl", "--", "manuals"]);
    ensure!(command.arg(directory).status().context("cannot run cargo")?.success(), "nwfilterctl failed");
    println!("man {}", directory.join("man/nwfilterctl.8").display());
    Ok(ExitCode::SUCCESS)
}

/// Where they go without another word.
pub(crate) fn default_directory() -> PathBuf {
    PathBuf::from(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())).join("manuals")
}
