//! `nwfilterctl listen`: the daemon that keeps bindings in step with the guests of a libvirt, and the kernel with the
//! bindings.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use log::LevelFilter;
use nwfilter::Driver;
use nwfilter_libvirt::{Guard, Listener, Status, Stopper};
use nwfilterctl_shared::daemon::{ending_signals, notify};
use nwfilterctl_shared::{ListenOptions, Options, exit_code};
use sd_notify::NotifyState;

/// Keeps the bindings in step with the guests of a libvirt, until SIGTERM.
#[derive(Parser)]
#[command(name = "nwfilterctl-listen", version)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    listen: ListenOptions,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.options.start_log(LevelFilter::Info);
    let done = cli.options.open(Driver::builder()).and_then(|driver| listen(&Arc::new(driver), &cli.listen));
    exit_code(done.map(|()| ExitCode::SUCCESS))
}

/// Listens until SIGTERM or SIGINT. Ports stay filtered, and guarded, after that.
fn listen(driver: &Arc<Driver>, options: &ListenOptions) -> Result<()> {
    let guard = options.guard.as_deref().map(Guard::new).transpose()?;
    let listener = Listener::new(options.connect.as_deref(), guard);
    stop_at_signals(listener.stopper())?;
    options.daemon.serve(driver)?;
    let mut reconciler = None;
    listener.run(driver, |status| {
        if reconciler.is_none() {
            // Without it the listener does all its other work.
            reconciler = driver.keep().map_err(|error| log::error!("{:#}", anyhow::Error::from(error))).ok();
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
    notify(&[NotifyState::Stopping]);
    log::info!("ended; what is bound stays filtered");
    Ok(())
}

/// Has a thread wait for the signals, which no other thread then gets.
fn stop_at_signals(stopper: Stopper) -> Result<()> {
    let signals = ending_signals()?;
    let wait = move || match signals.wait() {
        Ok(_) => stopper.stop(),
        Err(error) => log::error!("signals are not handled: {error}"),
    };
    std::thread::Builder::new().spawn(wait).context("cannot start the thread that waits for signals")?;
    Ok(())
}
