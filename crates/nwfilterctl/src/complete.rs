//! Completion in shells. The shell asks this program for candidates, so filters and ports are those of the host.
//!
//! An argument named `NAME` completes to filters, and one named `PORT` to ports, in every verb.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::PathBuf;

use clap::{Arg, Command, CommandFactory};
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use nwfilter::STOCK;
use nwfilter_settings::{Key, Settings};

use crate::cli::Cli;

/// The environment variable that a shell sets to ask for candidates.
const VARIABLE: &str = "COMPLETE";
/// The most names that are offered.
const MOST: usize = 1000;

/// Answers a shell and ends the process, if a shell asks.
pub(crate) fn answer() {
    CompleteEnv::with_factory(|| with_names(Cli::command())).var(VARIABLE).complete();
}

/// The completion scripts of shells: the name of the shell, the name of the file, its text.
pub(crate) fn scripts() -> std::io::Result<Vec<(&'static str, &'static str, Vec<u8>)>> {
    let program = "nwfilterctl";
    let files = [("bash", program), ("zsh", "_nwfilterctl"), ("fish", "nwfilterctl.fish")];
    let shells = Shells::builtins();
    let mut scripts = Vec::new();
    for (shell, file) in files {
        let mut text = Vec::new();
        if let Some(completer) = shells.completer(shell) {
            completer.write_registration(VARIABLE, program, program, program, &mut text)?;
        }
        if shell == "zsh" {
            // zsh reads the file at the first completion, which must be answered too.
            text.extend(b"[ \"$funcstack[1]\" = _nwfilterctl ] && _clap_dynamic_completer_nwfilterctl\n");
        }
        scripts.push((shell, file, text));
    }
    Ok(scripts)
}

fn with_names(command: Command) -> Command {
    // The names of the set verbs are those of sets.
    let is_of_filters = !command.get_name().starts_with("set-");
    let command = command.mut_args(|arg| match arg.get_id().as_str() {
        "name" | "names" if is_of_filters => offering(arg, Key::ConfigDir),
        "port" | "ports" => offering(arg, Key::StateDir),
        _ => arg,
    });
    command.mut_subcommands(with_names)
}

/// An argument that names a document of this store.
fn offering(arg: Arg, store: Key) -> Arg {
    arg.add(ArgValueCompleter::new(move |word: &OsStr| candidates(store, word)))
}

fn candidates(store: Key, word: &OsStr) -> Vec<CompletionCandidate> {
    let Some(begin) = word.to_str() else { return Vec::new() };
    let files = directory(store).and_then(|directory| fs::read_dir(directory).ok());
    let files = files.into_iter().flatten().flatten().map(|entry| entry.file_name());
    let stored = files.filter_map(|file| Some(file.to_str()?.strip_suffix(".xml")?.to_owned()));
    let stock = STOCK.iter().filter(|_| store == Key::ConfigDir).map(|(name, _)| (*name).to_owned());
    let mut names: Vec<_> = stored.chain(stock).filter(|name| name.starts_with(begin)).collect();
    names.sort();
    names.dedup();
    names.into_iter().take(MOST).map(CompletionCandidate::new).collect()
}

/// The directory that the command line names, or the settings.
fn directory(store: Key) -> Option<PathBuf> {
    let option = OsString::from(format!("--{}", store.name()));
    let named = std::env::args_os().skip_while(|arg| *arg != option).nth(1).map(PathBuf::from);
    named.or_else(|| Settings::load(None).ok()?.get(store).map(PathBuf::from))
}
