//! `learn`: the background process that learns addresses of guests, because other verbs do not stay.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nwfilter::Driver;
use nwfilterctl_shared::Options;

/// The log file of the background process.
const LOG: &str = "learn.log";
/// The size in bytes from which the next background process truncates the file.
const MAX_LOG: u64 = 1 << 20;

/// Starts the background process if a port needs it, and waits until it listens. If one is running, it notices the change by
/// itself, and the new one ends.
pub(crate) fn start_if_needed(driver: &Driver, options: &Options) -> Result<()> {
    if !driver.has_to_learn()? {
        return Ok(());
    }
    let mut child = command(options)
        .and_then(|mut command| Ok(command.spawn()?))
        .context("the guest's address is not learned: cannot start nwfilterctl learn")?;
    if let Some(output) = child.stdout.take() {
        // A line when it listens, or the end of the output; either way the waiting is over.
        let _ = BufReader::new(output).read_line(&mut String::new());
    }
    Ok(())
}

fn command(options: &Options) -> Result<Command> {
    let log = options.state_dir.join(LOG);
    let grown = fs::metadata(&log).is_ok_and(|file| file.len() > MAX_LOG);
    let opened = File::options().create(true).append(!grown).write(true).truncate(grown).open(&log);
    let opened = opened.with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(options.to_args()?)
        .arg("learn")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(opened);
    Ok(command)
}

/// Learns until nothing is left to learn. Runs in a session of its own, so that closing a terminal does not end it.
pub(crate) fn learn(driver: &Driver) -> Result<()> {
    // This fails if the process already leads a session.
    let _ = nix::unistd::setsid();
    let listening = || {
        let _ = writeln!(std::io::stdout(), "listening").and_then(|()| std::io::stdout().flush());
    };
    Ok(driver.learn(listening)?)
}
