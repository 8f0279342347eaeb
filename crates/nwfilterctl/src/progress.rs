//! A progress line on the terminal for changes that take long.

use std::io::{IsTerminal, Write, stderr};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nwfilter::{Builder, Progress};
use nwfilterctl_shared::warns;

/// How long a change takes before the line appears.
const LONG: Duration = Duration::from_secs(1);
/// How often the line is written.
const TICK: Duration = Duration::from_millis(200);

/// The last progress of a driver. `None` if stderr is no terminal.
pub(crate) struct Watch(Option<Arc<Mutex<Option<Progress>>>>);

/// Lets the progress of a driver be watched, if stderr is a terminal.
pub(crate) fn watched(builder: Builder) -> (Builder, Watch) {
    if !stderr().is_terminal() || !warns() {
        return (builder, Watch(None));
    }
    let last: Arc<Mutex<Option<Progress>>> = Arc::default();
    let told = last.clone();
    let builder = builder.on_progress(move |progress| {
        *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    });
    (builder, Watch(Some(last)))
}

impl Watch {
    /// Runs a change of the driver and shows its progress. The line is removed at the end.
    pub(crate) fn during<T>(&self, change: impl FnOnce() -> T) -> T {
        let Some(last) = &self.0 else { return change() };
        std::thread::scope(|scope| {
            let (running, ended) = channel::<()>();
            // Without the thread there is no line.
            let line = std::thread::Builder::new().spawn_scoped(scope, move || show(last, &ended));
            let done = change();
            drop(running);
            // A panic of the thread was reported when it happened.
            let _ = line.map(std::thread::ScopedJoinHandle::join);
            done
        })
    }
}

fn show(last: &Mutex<Option<Progress>>, ended: &Receiver<()>) {
    let mut wait = LONG;
    while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
        wait = TICK;
        if let Some(progress) = *last.lock().unwrap_or_else(PoisonError::into_inner) {
            // The terminal may be gone.
            let _ = write!(stderr(), "\r{progress}\x1b[K");
        }
    }
    if wait == TICK {
        let _ = write!(stderr(), "\r\x1b[K");
    }
}
