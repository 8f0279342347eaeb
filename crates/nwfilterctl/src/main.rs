//! `nwfilterctl`: the verbs of `virsh nwfilter-*`, and more, over the driver library.

mod check;
mod learn;
mod output;
mod progress;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Error, Result};
use clap::{Parser, Subcommand, ValueEnum};
use nwfilter::xml::{
    DocumentKind, PortDev, Reading, Strictness, decode, read_binding, read_filter, read_filter_with,
    write_binding, write_filter,
};
use nwfilter::{Applied, Committed, Driver, FailedPort, OddPorts, ProblemKind, Reloaded, Transaction};
use nwfilterctl_shared::{ListenOptions, Options, exit_code, start_log, with_causes};

use crate::output::{print_bindings, print_differences, print_filters};

/// Filters the traffic of guests as libvirt's nwfilter documents say.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Put filters into the store, all or none, in place of those of their names; ports that use them are updated
    Define {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Take rules with elements and attributes that do not exist; they then match more than is written
        #[arg(long)]
        as_libvirt: bool,
    },
    /// Take a filter out of the store
    Undefine { name: String },
    /// List the filters of the store and the stock filters
    List {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Print a filter in canonical form
    Dumpxml { name: String },
    /// Filter ports, all or none
    BindingCreate {
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Stop filtering a port
    BindingDelete { port: String },
    /// List the ports that are filtered
    BindingList {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Print a port's binding in canonical form
    BindingDumpxml { port: String },
    /// Read documents and show every problem in them; directories are searched for *.xml
    Check {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Count warnings (what libvirt ignores or replaces) as errors
        #[arg(long)]
        strict: bool,
        /// Warn of elements and attributes in rules that do not exist, instead of refusing them
        #[arg(long)]
        as_libvirt: bool,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Print a filter or binding in canonical form, as virsh nwfilter-dumpxml does
    Fmt { file: PathBuf },
    /// Print the rules a binding means, without touching the kernel
    Render {
        /// The binding
        #[arg(long, value_name = "FILE")]
        binding: PathBuf,
        /// The restore tools' input, or the typed ruleset
        #[arg(long, default_value = "restore")]
        format: RenderFormat,
    },
    /// Compare the kernel with what the bindings ask for; exit 1 if they differ
    Diff {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Bring the kernel to what the bindings ask for
    Reload,
    /// Keep the bindings in step with the guests of a libvirt, until SIGTERM
    Listen(ListenOptions),
    /// Learn the addresses of guests until none is left to learn
    #[command(hide = true)]
    Learn,
}

#[derive(Clone, Copy, ValueEnum)]
enum RenderFormat {
    Restore,
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(if matches!(cli.verb, Verb::Learn) { "info" } else { "warn" });
    exit_code(run(cli))
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.verb {
        Verb::Check { files, strict, as_libvirt, json } => {
            let checks = check::Checks { strict, strictness: strictness(as_libvirt), json };
            return check::check(&cli.options.config_dir, &files, checks);
        }
        Verb::Fmt { file } => return fmt(&file),
        Verb::Listen(listen) => return Err(become_listener(&cli.options, &listen)),
        _ => (),
    }
    // Who asks whether the kernel is as it should be wants it asked.
    let driver = match cli.verb {
        Verb::Diff { .. } | Verb::Reload => cli.options.open()?,
        _ => cli.options.open_for_a_change()?,
    };
    let driver = driver.without_learner();
    if matches!(cli.verb, Verb::List { .. } | Verb::BindingList { .. } | Verb::Diff { .. } | Verb::Reload) {
        tell_of_files(&driver)?;
    }
    let changes = matches!(cli.verb, Verb::Define { .. } | Verb::BindingCreate { .. } | Verb::Reload);
    let (driver, watch) = progress::watched(driver);
    let mut done = true;
    match cli.verb {
        Verb::Check { .. } | Verb::Fmt { .. } | Verb::Listen(_) => (),
        Verb::Define { files, as_libvirt } => {
            let mut transaction = Transaction::new();
            for file in &files {
                let reading = read_filter_with(&shown(file), &read(file)?, strictness(as_libvirt));
                transaction.define_filter(accepted(reading)?);
            }
            let Committed { filters, applied } = watch.during(|| driver.commit(transaction))?;
            warn(&applied);
            let ports = applied.changed.len();
            let updated = if ports > 0 { format!(", {ports} ports updated") } else { String::new() };
            for (index, (filter, file)) in filters.iter().zip(&files).enumerate() {
                let updated = if index + 1 == files.len() { &updated } else { "" };
                println!("Network filter {} defined from {}{updated}", filter.name, file.display());
            }
        }
        Verb::Undefine { name } => {
            driver.undefine_filter(&name)?;
            println!("Network filter {name} undefined");
        }
        Verb::List { json } => print_filters(&driver, json)?,
        Verb::Dumpxml { name } => print!("{}", write_filter(&*driver.filter(&name)?)),
        Verb::BindingCreate { files } => {
            let mut transaction = Transaction::new();
            let mut ports = Vec::new();
            for file in &files {
                let binding = accepted(read_binding(&shown(file), &read(file)?))?;
                ports.push(binding.port.clone());
                transaction.create_binding(binding);
            }
            warn(&watch.during(|| driver.commit(transaction))?.applied);
            for (port, file) in ports.iter().zip(&files) {
                println!("Network filter binding on {port} created from {}", file.display());
            }
        }
        Verb::BindingDelete { port } => {
            driver.delete_binding(&port)?;
            println!("Network filter binding on {port} deleted");
        }
        Verb::BindingList { json } => print_bindings(&driver, json)?,
        Verb::BindingDumpxml { port } => print!("{}", write_binding(&*driver.binding(&port)?)),
        Verb::Render { binding, format } => {
            let binding = accepted(read_binding(&shown(&binding), &read(&binding)?))?;
            let ruleset = driver.ruleset(&binding)?;
            match format {
                RenderFormat::Restore => print!("{}", nwfilter::restore_text(&binding.port, &ruleset)),
                RenderFormat::Json => println!("{}", serde_json::to_string_pretty(&ruleset)?),
            }
        }
        Verb::Diff { json } => {
            let drift = driver.diff()?;
            print_differences(&drift.differences, json)?;
            tell_of_ports(&drift.failed, &drift.odd);
            return Ok(if drift.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Verb::Learn => learn::learn(&driver)?,
        Verb::Reload => {
            let Reloaded { applied, failed, removed, odd } = watch.during(|| driver.reload())?;
            warn(&applied);
            let back = applied.changed.iter().filter(|port| !removed.contains(port)).count();
            println!("{back} ports brought back, {} in all", driver.bindings()?.len());
            if !removed.is_empty() {
                println!("{} ports that do not exist any more removed", removed.len());
            }
            tell_of_ports(&failed, &odd);
            done = failed.is_empty();
        }
    }
    if changes {
        // The verb has done its work: what is missing now can be made good.
        if let Err(error) = learn::start_if_needed(&driver, &cli.options) {
            eprintln!("warning: {error:#}; 'nwfilterctl reload' tries again");
        }
    }
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Becomes the program of the verb `listen`, which stands beside this one; comes back only if that fails.
fn become_listener(options: &Options, listen: &ListenOptions) -> Error {
    let program = "nwfilterctl-listen";
    let exec = || -> Result<Error> {
        let path = std::env::current_exe()?.with_file_name(program);
        let error = Command::new(&path).args(options.to_args()?).args(listen.to_args()).exec();
        Ok(Error::new(error).context(format!(
            "cannot run {}, which is built with libvirt (feature 'listen')",
            path.display()
        )))
    };
    exec().unwrap_or_else(|error| error.context(format!("cannot find {program}")))
}

fn fmt(file: &Path) -> Result<ExitCode> {
    let (text, document) = (read(file)?, shown(file));
    let canonical = match DocumentKind::of(&text) {
        DocumentKind::Binding => write_binding(&accepted(read_binding(&document, &text))?),
        _ => write_filter(&accepted(read_filter(&document, &text))?),
    };
    print!("{canonical}");
    Ok(ExitCode::SUCCESS)
}

/// Says which damaged files were moved aside earlier. Those that are found damaged are in the log, on stderr.
fn tell_of_files(driver: &Driver) -> Result<()> {
    let aside = driver.problems()?.into_iter().filter(|problem| problem.kind == ProblemKind::SetAside);
    aside.for_each(|problem| eprintln!("warning: {problem}"));
    Ok(())
}

/// Says of each port why it is not as its binding asks for, or why it is left alone.
fn tell_of_ports(failed: &[FailedPort], odd: &OddPorts) {
    for port in failed {
        eprintln!("error: {}", with_causes(anyhow::Chain::new(port)));
    }
    tell_of_many(&odd.unbound, "has rules but no binding here; they are left as they are");
    tell_of_many(&odd.absent, "has a binding, but there is no network interface of that name");
}

/// Says the same of some ports, and how many more there are.
fn tell_of_many(ports: &[PortDev], what: &str) {
    const SHOWN: usize = 10;
    ports.iter().take(SHOWN).for_each(|port| eprintln!("warning: port '{port}' {what}"));
    if ports.len() > SHOWN {
        eprintln!("warning: so it is with {} more", ports.len() - SHOWN);
    }
}

/// What a document says. Where part of it is ignored or replaced, as libvirt does, that is told.
fn accepted<T>(reading: Reading<T>) -> Result<T> {
    if let Some(warnings) = reading.warnings() {
        eprintln!("{warnings}\n");
    }
    Ok(reading.into_result()?)
}

fn warn(applied: &Applied) {
    for warning in &applied.warnings {
        eprintln!("warning: {warning}");
    }
}

fn strictness(as_libvirt: bool) -> Strictness {
    if as_libvirt { Strictness::AsLibvirt } else { Strictness::Strict }
}

fn shown(file: &Path) -> String {
    file.display().to_string()
}

fn read(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(decode(&shown(file), &bytes)?.to_owned())
}
