//! `cargo xtask test`: format, lints, and every test, with nothing skipped where all of them can run.

use std::env;
use std::process::{Command, ExitCode};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::unistd::Uid;

use crate::packages::{DEB, DEMO, LINTIAN, RPM, TEST, ensure_installed};
use crate::vm::{self, Image};

/// Makes a package of each crate but those that are only for this workspace.
const PACKAGE: [&str; 14] = [
    "package",
    "--workspace",
    "--exclude",
    "nwfilter-testlab",
    "--exclude",
    "nwfilter-examples",
    "--exclude",
    "nwfilter-benches",
    "--exclude",
    "xtask",
    "--no-verify",
    "--offline",
    "--allow-dirty",
    "--quiet",
];

/// Runs all checks; the tests come last, so that their summary does.
pub(crate) fn run() -> Result<ExitCode> {
    ensure_installed(&[DEMO, TEST, DEB, LINTIAN, RPM])?;
    let root = Uid::effective().is_root();
    if !root {
        println!("not root: tests that need namespaces say that they are skipped");
    }
    let checks: [&[&str]; 5] = [
        &["fmt", "--all", "--check"],
        &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"],
        // Whether each crate could be published; it is not built from its package.
        &PACKAGE,
        // Tests load the module and run the command line from where cargo puts them.
        &["build", "--workspace", "--quiet"],
        &["test", "--workspace", "--no-fail-fast"],
    ];
    // It takes a while where it is not in the cache; what goes wrong is said when it is needed.
    let mut image = Some(thread::spawn(Image::ensure));
    for arguments in checks {
        if arguments[0] == "test" {
            let _ = image.take().map(JoinHandle::join);
        }
        println!("cargo {}", arguments.join(" "));
        let mut cargo = Command::new(env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
        if root {
            cargo.env("NWFILTER_NO_SKIP", "1");
        }
        let status = cargo.args(arguments).status().context("cannot run cargo")?;
        if !status.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    println!("cargo xtask vm test");
    vm::test_or_skip()
}
