//! What daemons share: the signals that end them, and telling the service manager how they are.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use sd_notify::NotifyState;

/// SIGTERM and SIGINT, blocked for this thread and those that it starts from here on; `wait` gets them.
pub fn ending_signals() -> Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("cannot block signals")?;
    Ok(signals)
}

/// Tells the service manager, where there is one.
pub fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!("the service manager is not told: {error}");
    }
}
