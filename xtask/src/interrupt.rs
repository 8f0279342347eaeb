//! Work that leaves nothing behind when it is interrupted.

use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};

/// What ends the work early.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Does the work on a thread of its own. A signal ends it: the namespaces and temporary files it made are removed, and
/// the processes it started die with this one.
pub(crate) fn interruptible(work: impl FnOnce() -> Result<ExitCode> + Send + 'static) -> Result<ExitCode> {
    let signals: SigSet = SIGNALS.into_iter().collect();
    // Blocked in every thread made from here on, so that they come to `wait` alone.
    signals.thread_block().context("cannot block signals")?;
    let files = tempfile::tempdir()?;
    ensure!(
        tempfile::env::override_temp_dir(files.path()).is_ok(),
        "another part set the temporary directory"
    );
    let (sender, ended) = mpsc::channel();
    let finished = sender.clone();
    thread::spawn(move || finished.send(Some(work())));
    thread::spawn(move || signals.wait().map(|_| sender.send(None)));
    match ended.recv().context("the work broke off")? {
        Some(outcome) => outcome,
        None => {
            nwfilter_testlab::remove_all();
            files.close()?;
            println!("\ninterrupted; everything that was made is removed");
            // 128 and the number of the signal, as shells have it.
            Ok(ExitCode::from(130))
        }
    }
}
