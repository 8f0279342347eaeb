//! `cargo xtask`: the automation of this workspace. Each task installs what it needs.

mod demo;
mod packages;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    Demo,
    /// Check format and lints, and run every test
    Test,
}

fn main() -> ExitCode {
    let outcome: Result<ExitCode> = match Cli::parse().task {
        Task::Demo => demo::run(),
        Task::Test => test::run(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
