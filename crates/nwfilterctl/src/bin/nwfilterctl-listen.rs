//! `listen`: the daemon that keeps bindings in step with the guests of a libvirt, and the kernel with the bindings.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nwfilter::Driver;
use nwfilter_libvirt::{Guard, Listener, Status, Stopper};

/// Listens until SIGTERM or SIGINT. Ports stay filtered, and guarded, after that.
pub(crate) fn listen(driver: &Driver, uri: Option<&str>, guard: Option<&str>) -> Result<()> {
    let guard = guard.map(Guard::new).transpose()?;
    let listener = Listener::new(uri, guard);
    stop_at_signals(listener.stopper())?;
    let mut keeper = None;
    listener.run(driver, |status| {
        if keeper.is_none() {
            // Without it the listener does all its other work.
            keeper = driver.keep().map_err(|error| log::error!("{:#}", anyhow::Error::from(error))).ok();
        }
        match &status {
            Status::Disconnected { .. } => log::warn!("{status}"),
            _ => log::info!("{status}"),
        }
        let ready = if status == Status::Ready { "READY=1\n" } else { "" };
        notify(&format!("{ready}STATUS={status}"));
    })?;
    notify("STOPPING=1");
    log::info!("ended; what is bound stays filtered");
    Ok(())
}

/// Has a thread wait for the signals, which no other thread then gets.
fn stop_at_signals(stopper: Stopper) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("cannot block signals")?;
    std::thread::spawn(move || match signals.wait() {
        Ok(_) => stopper.stop(),
        Err(error) => log::error!("signals are not handled: {error}"),
    });
    Ok(())
}

/// Tells the service manager, where there is one: sd_notify(3).
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let abstract_name = path.to_str().and_then(|path| path.strip_prefix('@'));
    let address = match abstract_name {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        log::debug!("{}: {error}", path.display());
    }
}
