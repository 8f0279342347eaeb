//! `nwfilterctl listen`: the daemon that keeps bindings in step with the guests of a libvirt, and the kernel with the
//! bindings.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use clap::Parser;
use log::LevelFilter;
use nwfilter::{Driver, Reconciler};
use nwfilter_libvirt::{Guard, Listener, Pulse, Status, Stopper};
use nwfilter_settings::Key;
use nwfilterctl_shared::daemon::{End, Signals, notify, restart};
use nwfilterctl_shared::{Arguments, ListenOptions, Options, exit_code};
use sd_notify::NotifyState;

/// Keeps the bindings in step with the guests of a libvirt, until SIGTERM.
#[derive(Parser)]
#[command(name = "nwfilterctl-listen", version)]
struct Cli {
    #[command(flatten)]
    arguments: Arguments,
    #[command(flatten)]
    listen: ListenOptions,
}

fn main() -> ExitCode {
    exit_code(run(Cli::parse()))
}

fn run(cli: Cli) -> Result<ExitCode> {
    let options = cli.read()?;
    options.start_log(LevelFilter::Info);
    let driver = Arc::new(options.open_to_stay(Driver::builder())?);
    match listen(&driver, &options, cli)? {
        End::Stop => Ok(ExitCode::SUCCESS),
        End::Restart => Err(restart()),
    }
}

impl Cli {
    fn read(&self) -> Result<Options> {
        Ok(self.arguments.settle()?.with(|settings| self.listen.set(settings)))
    }
}

/// Listens until SIGTERM or SIGINT. Ports stay filtered, and guarded, after that.
fn listen(driver: &Arc<Driver>, options: &Options, cli: Cli) -> Result<End> {
    let listener = Listener::new(options.settings.get(Key::Connect), guard(options)?);
    let reconciler = Arc::new(Mutex::new(None));
    let is_alive = alive(listener.pulse(), reconciler.clone());
    let ending = stop_at_signals(listener.stopper(), options.clone(), cli, is_alive)?;
    options.serve_metrics(driver)?;
    listener.run(driver, |status| {
        let mut reconciler = reconciler.lock().unwrap_or_else(PoisonError::into_inner);
        if reconciler.is_none() {
            // Without a reconciler the listener does all its other work.
            *reconciler = driver.keep().map_err(|error| log::error!("{:#}", anyhow::Error::from(error))).ok();
        }
        match &status {
            Status::Disconnected { .. } => log::warn!("{status}"),
            _ => log::info!("{status}"),
        }
        let text = status.to_string();
        match status {
            Status::Ready => notify(&[NotifyState::Ready, NotifyState::Status(&text)]),
            _ => notify(&[NotifyState::Status(&text)]),
        }
    })?;
    // Nothing else stops the listener.
    let end = ending.join().unwrap_or(End::Stop);
    end.notify();
    log::info!("ended; what is bound stays filtered");
    Ok(end)
}

fn guard(options: &Options) -> Result<Option<Guard>> {
    Ok(options.settings.get(Key::Guard).map(Guard::new).transpose()?)
}

/// Whether the listener has made progress since the last call, and the reconciler runs if it was started.
fn alive(pulse: Pulse, reconciler: Arc<Mutex<Option<Reconciler>>>) -> impl FnMut() -> bool + Send + 'static {
    let mut last = None;
    move || {
        let beats = pulse.beats();
        let is_beating = last.replace(beats) != Some(beats);
        let reconciler = reconciler.lock().unwrap_or_else(PoisonError::into_inner);
        is_beating && reconciler.as_ref().is_none_or(Reconciler::is_running)
    }
}

/// Starts a thread that waits for the signals, which no other thread gets.
fn stop_at_signals(
    stopper: Stopper,
    options: Options,
    cli: Cli,
    is_alive: impl FnMut() -> bool + Send + 'static,
) -> Result<JoinHandle<End>> {
    let signals = Signals::block()?;
    let wait = move || {
        let read = || cli.read().and_then(|options| guard(&options).map(|_| options));
        let end = signals.wait(&options, read, is_alive).unwrap_or_else(|error| {
            log::error!("signals are not handled: {error:#}");
            End::Stop
        });
        stopper.stop();
        end
    };
    std::thread::Builder::new().spawn(wait).context("cannot start the thread that waits for signals")
}
