//! `cargo xtask`: the automation of this workspace. Each task installs what it needs.

mod compare;
mod demo;
mod docs;
mod install_capi;
mod install_module;
mod interrupt;
mod manuals;
mod package;
mod packages;
mod suite;
mod test;
mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
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
    /// Install libnwfilter for C: shared and static library, nwfilter.h and nwfilter.pc
    InstallCapi {
        /// Where it will be used
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
        /// The directory of libraries below it
        #[arg(long, default_value = "lib")]
        libdir: PathBuf,
        /// A directory that stands for /, as packages are made in one
        #[arg(long, default_value = "/")]
        destdir: PathBuf,
    },
    /// Check the book and every link of the documentation, and make HTML of the book where mdBook is installed
    Docs,
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
    /// Build the Debian packages
    Deb {
        /// Where to; without it, below target
        directory: Option<PathBuf>,
        /// Of programs that are compiled without optimisation, as for tests
        #[arg(long)]
        dev: bool,
    },
    /// Build the RPM packages
    Rpm {
        /// Where to; without it, below target
        directory: Option<PathBuf>,
        /// Of programs that are compiled without optimisation, as for tests
        #[arg(long)]
        dev: bool,
    },
    /// Write the manual pages and the completions of shells
    Manuals {
        /// Where to; without it, below target
        directory: Option<PathBuf>,
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
        Task::Docs => docs::run(),
        Task::Conformance { seed, count } => conformance(seed, count),
        Task::Demo { vm: false } => demo::run(),
        Task::Demo { vm: true } => vm::demo(),
        Task::InstallCapi { prefix, libdir, destdir } => {
            install_capi(&install_capi::Place { destdir, prefix, libdir })
        }
        Task::Deb { directory, dev } => package::run(package::Kind::Deb, directory, profile(dev)),
        Task::Rpm { directory, dev } => package::run(package::Kind::Rpm, directory, profile(dev)),
        Task::InstallModule { dir } => install_module::run(install_module::Step::Install, dir),
        Task::UninstallModule { dir } => install_module::run(install_module::Step::Uninstall, dir),
        Task::Manuals { directory } => manuals::run(&directory.unwrap_or_else(manuals::default_directory)),
        Task::Test { libvirt: Some(suite) } => suite::run(suite),
        Task::Test { libvirt: None } => test::run(),
        Task::Vm { verb } => vm::run(verb),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn install_capi(place: &install_capi::Place) -> Result<ExitCode> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["build", "--release", "--package", "nwfilter-capi", "--message-format", "json"];
    let output = Command::new(cargo).args(arguments).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "libnwfilter does not build");
    let text = String::from_utf8(output.stdout)?;
    let library = text.split('"').rfind(|word| word.ends_with("/libnwfilter_capi.so"));
    let built = library.map(Path::new).and_then(Path::parent);
    let built = built.context("cargo does not say where the library is")?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/nwfilter-capi");
    install_capi::install(built, &sources, env!("CARGO_PKG_VERSION"), place)
        .with_context(|| format!("cannot install below {}", place.destdir.join(&place.prefix).display()))?;
    println!("libnwfilter is installed in {}: pkg-config --cflags --libs nwfilter", place.prefix.display());
    Ok(ExitCode::SUCCESS)
}

fn profile(dev: bool) -> package::Profile {
    if dev { package::Profile::Dev } else { package::Profile::Release }
}

/// Two daemons at a time: one costs a core most of the time.
const ORACLES: usize = 2;

fn conformance(seed: u64, count: usize) -> Result<ExitCode> {
    packages::ensure_installed(&[packages::DEMO, packages::TEST])?;
    let report = nwfilter_testlab::conformance::run(seed, count, ORACLES, |line| eprintln!("{line}"))?;
    println!("{report}");
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
