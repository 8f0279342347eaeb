//! `nwfilterctl`: the verbs of `virsh nwfilter-*`, and more, over the driver library.

#![forbid(unsafe_code)]

mod advice;
mod archive;
mod check;
mod cli;
mod complete;
mod config;
mod counters;
mod cut;
mod doctor;
mod documents;
mod edit;
mod explain;
mod keep;
mod learn;
mod manuals;
mod output;
mod places;
mod plan;
mod progress;
mod set;
mod status;
mod trace;
mod users;
mod verbs;
mod watch;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Error, Result};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use log::LevelFilter;
use nwfilter::Driver;
use nwfilterctl_shared::{Arguments, ListenOptions, Options, exit_code, warn};

use crate::cli::{Change, Cli, Verb};
use crate::output::Answer;
use crate::progress::Watch;

const NO_DRY_RUN: &str = "--dry-run is for define, undefine, binding-create, binding-delete, import and reload; this verb has none";

fn main() -> ExitCode {
    complete::answer();
    let cli = Cli::parse();
    let level =
        if matches!(cli.verb, Verb::Learn | Verb::Keep(_)) { LevelFilter::Info } else { LevelFilter::Warn };
    exit_code(run(cli, level))
}

fn run(cli: Cli, level: LevelFilter) -> Result<ExitCode> {
    let Cli { arguments, json, dry_run, verb } = cli;
    if let Verb::Manuals { directory } = &verb {
        return manuals::manuals(directory).map(|()| ExitCode::SUCCESS);
    }
    let options = arguments.settle()?;
    options.start_log(level);
    let verb = match verb {
        Verb::Change(change) if dry_run => Verb::Plan { change },
        Verb::Plan { .. } => verb,
        _ if dry_run => Cli::command().error(ErrorKind::ArgumentConflict, NO_DRY_RUN).exit(),
        _ => verb,
    };
    let answer = match verb {
        Verb::Check { files, strict, as_libvirt } => {
            let checks = check::Checks { strict, strictness: documents::strictness(as_libvirt), json };
            check::check(&options.config_dir, &files, checks)?
        }
        Verb::Fmt { files } => verbs::fmt(&files, json)?,
        Verb::Doctor => doctor::doctor(&options, json),
        Verb::Watch => {
            watch::watch(&options, json)?;
            Answer::default()
        }
        Verb::Keep(daemon) => {
            let read = || arguments.settle().map(|options| options.with(|settings| daemon.set(settings)));
            keep::keep(read, json)?;
            Answer::default()
        }
        Verb::Listen(listen) => return Err(become_listener(&arguments, &listen)),
        Verb::Config => config::config(&options.settings, json)?,
        verb => with_driver(&options, verb, json)?,
    };
    answer.print()
}

/// Carries out a verb that needs the stores.
fn with_driver(options: &Options, verb: Verb, json: bool) -> Result<Answer> {
    // Verbs that compare the kernel read it instead of a cache.
    let (builder, watch) = progress::watched(Driver::builder().without_learner());
    let (driver, former) = match verb {
        Verb::Change(Change::Reload) => {
            let (driver, former) = options.open_to_take_over(builder)?;
            (driver, Some(former))
        }
        Verb::Diff | Verb::Status | Verb::Plan { .. } => (options.open(builder)?, None),
        _ => (options.open_for_a_change(builder)?, None),
    };
    if matches!(verb, Verb::List | Verb::BindingList | Verb::Diff | Verb::Change(Change::Reload)) {
        verbs::report_damaged_files(&driver)?;
    }
    let may_need_learner = matches!(
        verb,
        Verb::Edit { .. }
            | Verb::Change(
                Change::Define { .. } | Change::BindingCreate { .. } | Change::Import(_) | Change::Reload
            )
    );
    let answer = carry_out(&driver, &watch, options, verb, json);
    let answer = answer.map_err(|error| places::with_place(&driver, error));
    let answer = answer.map_err(|error| advice::with_advice(&driver, error))?;
    if let Some(former) = former {
        if !answer.is_good() {
            warn("the rules of another backend, if there are any, stay until every port has its rules here");
        } else {
            if let Some((name, ports)) = former.clear()? {
                log::info!("the rules that {name} had for {ports} ports are removed");
            }
            verbs::take_over_from_libvirt(&driver)?;
        }
    }
    if may_need_learner {
        // The verb has done its work, so this is only a warning.
        if let Err(error) = learn::start_if_needed(&driver, options) {
            warn(format_args!("{error:#}; 'nwfilterctl reload' tries again"));
        }
    }
    Ok(answer)
}

fn carry_out(driver: &Driver, watch: &Watch, options: &Options, verb: Verb, json: bool) -> Result<Answer> {
    Ok(match verb {
        Verb::Change(change) => match change {
            Change::Define { files, as_libvirt, cut } => {
                verbs::define(driver, watch, &files, documents::strictness(as_libvirt), cut.cut, json)?
            }
            Change::Undefine { names } => verbs::undefine(driver, &names, json)?,
            Change::BindingCreate { files, cut } => {
                verbs::binding_create(driver, watch, &files, cut.cut, json)?
            }
            Change::BindingDelete { ports } => verbs::binding_delete(driver, &ports, json)?,
            Change::Import(asked) => archive::import(driver, watch, &asked, json)?,
            Change::Reload => verbs::reload(driver, watch, &options.config_dir, json)?,
            Change::Set(change) => set::change(driver, &change, json)?,
        },
        Verb::Plan { change } => plan::plan(driver, change, json)?,
        Verb::Edit { name } => edit::edit(driver, watch, &name, json)?,
        Verb::List => output::filters(driver, json)?,
        Verb::SetList => set::list(driver, json)?,
        Verb::SetDumpxml { name, resolved } => set::dumpxml(driver, &name, resolved, json)?,
        Verb::Dumpxml { name } => verbs::dumpxml(driver, &name, json)?,
        Verb::Export { file } => archive::export(driver, file.as_deref(), json)?,
        Verb::Users { name } => users::users(driver, &name, json)?,
        Verb::BindingList => output::bindings(driver, json)?,
        Verb::BindingDumpxml { port } => verbs::binding_dumpxml(driver, &port, json)?,
        Verb::Render { binding, format } => {
            let as_json = json || format == cli::RenderFormat::Json;
            verbs::render(driver, &binding, options.gives_helpers(), as_json)?
        }
        Verb::Explain(asked) => explain::explain(driver, &asked, options.gives_helpers(), json)?,
        Verb::Trace(asked) => {
            trace::trace(driver, &asked, json)?;
            Answer::default()
        }
        Verb::Counters(asked) => counters::counters(driver, &asked, json)?,
        Verb::Top(asked) => counters::top(driver, &asked, json)?,
        Verb::Diff => verbs::diff(driver, json)?,
        Verb::Status => status::status(driver, options, json)?,
        Verb::Learn => {
            learn::learn(driver)?;
            Answer::default()
        }
        Verb::Check { .. }
        | Verb::Config
        | Verb::Doctor
        | Verb::Fmt { .. }
        | Verb::Keep(_)
        | Verb::Listen(_)
        | Verb::Manuals { .. }
        | Verb::Watch => {
            unreachable!("they need no driver")
        }
    })
}

/// Executes the program of the verb `listen`, which is beside this one. Returns only if that fails.
fn become_listener(arguments: &Arguments, listen: &ListenOptions) -> Error {
    let program = "nwfilterctl-listen";
    let exec = || -> Result<Error> {
        let path = std::env::current_exe()?.with_file_name(program);
        let error = Command::new(&path).args(arguments.to_args()).args(listen.to_args()).exec();
        Ok(Error::new(error).context(format!(
            "cannot run {}, which is built with libvirt (feature 'listen')",
            path.display()
        )))
    };
    exec().unwrap_or_else(|error| error.context(format!("cannot find {program}")))
}
