//! `cargo xtask deb` and `cargo xtask rpm`: packages of what is built here.
//!
//! [`contents`] says what is in which package, for both kinds. dpkg-deb and rpmbuild make the packages of it; both are in Debian, so
//! that nothing has to be compiled for them, and neither needs anything but the files and a description.

mod contents;
mod deb;
mod rpm;
mod stage;
#[cfg(test)]
mod tests;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::interrupt::interruptible;
use crate::package::stage::{Build, Layout};
use crate::packages::{DEB, RPM, ensure_installed};
use crate::vm::{Image, Job, to_stdout};

const BOOTED: &str = include_str!("package/booted.sh");
/// How long the host with the packages may run.
const BOOTED_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// A kind of package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Deb,
    Rpm,
}

/// How the programs are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    Release,
    /// As the tests are, which takes no time where they have been compiled.
    Dev,
}

/// Builds all packages of a kind and puts them into a directory, or below target.
pub(crate) fn run(kind: Kind, directory: Option<PathBuf>, profile: Profile) -> Result<ExitCode> {
    ensure_installed(&[if kind == Kind::Deb { DEB } else { RPM }])?;
    let name = if kind == Kind::Deb { "deb" } else { "rpm" };
    let directory = directory.unwrap_or_else(|| target_directory().join(name));
    for package in make(kind, &directory, &build(profile)?, profile)? {
        println!("{}", package.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Installs the Debian packages on a booted host with systemd and libvirt, in the virtual machine, and walks through what an
/// administrator does there.
pub(crate) fn run_booted() -> Result<ExitCode> {
    ensure_installed(&[DEB])?;
    interruptible(|| {
        let debs =
            make(Kind::Deb, &target_directory().join("test-deb"), &build(Profile::Dev)?, Profile::Dev)?;
        let mut job = Job::new(BOOTED_TIMEOUT);
        for deb in &debs {
            job.add(deb, Path::new("/job").join(deb.file_name().unwrap_or_default()));
        }
        job.run(&Image::ensure_host()?, BOOTED, to_stdout).map(ExitCode::from)
    })
}

/// Makes the packages in a directory; their files, sorted by name.
fn make(kind: Kind, directory: &Path, build: &Build, profile: Profile) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let layout = if kind == Kind::Deb { Layout::debian()? } else { Layout::fedora() };
    let mut made = Vec::new();
    for package in &contents::PACKAGES {
        let root = tempfile::tempdir()?;
        stage::stage(package, &layout, build, root.path())?;
        made.push(match kind {
            Kind::Deb => deb::build(package, root.path(), directory, &layout, profile)?,
            Kind::Rpm => rpm::build(package, root.path(), directory, profile)?,
        });
    }
    Ok(made)
}

/// Compiles what is packaged, and has the command line write its manuals.
fn build(profile: Profile) -> Result<Build> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "nwfilterctl", "--package", "nwfilter-module"]);
    cargo.args(["--package", "nwfilter-examples"]);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    ensure!(cargo.current_dir(workspace()).status()?.success(), "the programs do not build");
    let programs = target_directory().join(if profile == Profile::Release { "release" } else { "debug" });
    let manuals = tempfile::tempdir()?;
    succeed(Command::new(programs.join("nwfilterctl")).arg("manuals").arg(manuals.path()))?;
    Ok(Build { programs, manuals, workspace: workspace() })
}

/// The root of the work tree.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| ".".into(), Path::to_owned)
}

fn target_directory() -> PathBuf {
    workspace().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Runs a command; what it printed, or what it says is wrong.
fn succeed(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {program}"))?;
    let said = [output.stdout.as_slice(), &output.stderr].concat();
    ensure!(output.status.success(), "{program} failed:\n{}", String::from_utf8_lossy(&said));
    Ok(String::from_utf8(output.stdout)?)
}
