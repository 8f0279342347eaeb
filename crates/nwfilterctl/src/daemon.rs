//! Code that the daemons share: signals, and notifications of the service manager.
//!
//! On SIGHUP the settings are read again. If they are invalid, the old ones stay. If they differ, the daemon ends as on
//! SIGTERM and then executes itself again, so that settings take effect in one way only. Rules stay meanwhile.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Error, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;

use crate::{Options, with_causes};

/// SIGTERM, SIGINT and SIGHUP, which only [`Signals::wait`] receives.
pub struct Signals(SigSet);

/// Why a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A signal asked for it.
    Stop,
    /// Its settings have changed: it must be [restarted](restart).
    Restart,
}

impl Signals {
    /// Blocks the signals for this thread and the threads that it starts from now on.
    pub fn block() -> Result<Self> {
        let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
        signals.thread_block().context("cannot block signals")?;
        Ok(Self(signals))
    }

    /// Waits until a daemon with these options must end. `read` reads the options again. If the service manager has a watchdog,
    /// notifies it while `is_alive` returns true.
    pub fn wait(
        &self,
        options: &Options,
        read: impl Fn() -> Result<Options>,
        mut is_alive: impl FnMut() -> bool,
    ) -> Result<End> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&self.0, flags).context("cannot wait for signals")?;
        let pause = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        let timeout =
            pause.map_or(PollTimeout::NONE, |pause| PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX));
        loop {
            if pause.is_some() && is_alive() {
                notify(&[NotifyState::Watchdog]);
            }
            match poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => (),
                Err(errno) => return Err(errno).context("cannot wait for signals"),
            }
            let Some(signal) = signals.read_signal().context("cannot read a signal")? else { continue };
            if signal.ssi_signo != Signal::SIGHUP as u32 {
                return Ok(End::Stop);
            }
            let read = read().and_then(|new| new.check_backend().map(|()| new));
            match read.map(|new| options.settings.differences(&new.settings)) {
                Err(error) => log::error!("the old settings stay: {}", with_causes(error.chain())),
                Ok(differences) if differences.is_empty() => log::info!("no setting has changed"),
                Ok(differences) => {
                    differences.iter().for_each(|difference| log::info!("setting {difference}"));
                    return Ok(End::Restart);
                }
            }
        }
    }
}

impl End {
    /// Notifies the service manager that the daemon ends or restarts.
    pub fn notify(self) {
        match self {
            End::Stop => notify(&[NotifyState::Stopping]),
            End::Restart => {
                // Newer service managers need the time.
                let since = NotifyState::monotonic_usec_now();
                notify(&[Some(NotifyState::Reloading), since.ok()].into_iter().flatten().collect::<Vec<_>>());
            }
        }
    }
}

/// Executes this program again with the same arguments. Returns only if that fails.
pub fn restart() -> Error {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    let error = Command::new(&program).args(args).exec();
    Error::new(error).context(format!("cannot run {} again", program.display()))
}

/// Notifies the service manager, if there is one.
pub fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!("the service manager is not told: {error}");
    }
}
