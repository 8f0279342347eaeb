//! `cargo xtask`: the automation of this workspace. Each task installs what it needs.

mod compare;
mod demo;
mod install_module;
mod interrupt;
mod packages;
mod suite;
mod test;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::suite::Suite;

/// The automation of the nwfilter workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Filter a guest that serves FTP, and show what passes and what is dropped
    Demo {
        /// In a virtual machine with Debian's own kernel
        #[arg(long)]
        vm: bool,
    },
    /// Measure libvirtd and this driver on the same jobs, and write docs/performance.md
    Compare {
        /// How many ports
        #[arg(long, default_value_t = 60)]
        ports: usize,
    },
    /// Compare the rules of generated filter trees with those of a live libvirtd; show a failing tree as small as it gets
    Conformance {
        /// Which trees; the same number makes the same ones
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many
        #[arg(long, default_value_t = 200)]
        count: usize,
    },
    /// Put the driver module in the place of libvirt's, which is kept
    InstallModule {
        /// The driver directory, where it is not the distribution's
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Put libvirt's module back
    UninstallModule {
        /// The driver directory, where it is not the distribution's
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Check format and lints, and run every test
    Test {
        /// Only the tests of the module, with the libvirt of this Debian suite, in a chroot that is kept
        #[arg(long, value_name = "SUITE")]
        libvirt: Option<Suite>,
    },
    /// Run things in a virtual machine with Debian's own kernel, under QEMU without KVM
    Vm {
        #[command(subcommand)]
        verb: vm::Verb,
    },
}

fn main() -> ExitCode {
    let outcome: Result<ExitCode> = match Cli::parse().task {
        Task::Compare { ports } => compare::run(ports),
        Task::Conformance { seed, count } => conformance(seed, count),
        Task::Demo { vm: false } => demo::run(),
        Task::Demo { vm: true } => vm::demo(),
        Task::InstallModule { dir } => install_module::run(install_module::Step::Install, dir),
        Task::UninstallModule { dir } => install_module::run(install_module::Step::Uninstall, dir),
        Task::Test { libvirt: Some(suite) } => suite::run(suite),
        Task::Test { libvirt: None } => test::run(),
        Task::Vm { verb } => vm::run(verb),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Two daemons at a time: one costs a core most of the time.
const ORACLES: usize = 2;

fn conformance(seed: u64, count: usize) -> Result<ExitCode> {
    packages::ensure_installed(&[packages::DEMO, packages::TEST])?;
    let report = nwfilter_testlab::conformance::run(seed, count, ORACLES, |line| eprintln!("{line}"))?;
    println!("{report}");
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
