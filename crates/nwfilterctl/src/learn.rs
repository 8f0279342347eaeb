//! `learn`: the background process that learns the addresses of guests, because the other verbs end at once.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nwfilter::Driver;
use nwfilterctl_shared::Options;

/// Where the background process says what it learned.
const LOG: &str = "learn.log";
/// Bytes at which the next background process begins the file anew.
const MAX_LOG: u64 = 1 << 20;

/// Starts the background process if a port needs it, and waits until it listens. One that runs already sees by
/// itself what changed; then the new one ends.
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

/// Learns until nothing is left to learn, in a session of its own so that no terminal ends it.
pub(crate) fn learn(driver: &Driver) -> Result<()> {
    // It fails where this process leads a session already.
    let _ = nix::unistd::setsid();
    let listening = || {
        let _ = writeln!(std::io::stdout(), "listening").and_then(|()| std::io::stdout().flush());
    };
    Ok(driver.learn(listening)?)
}
