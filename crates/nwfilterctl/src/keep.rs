//! `keep`: the daemon for hosts without libvirt, which keeps the kernel in the desired state.

use std::io::{Write, stdout};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;

use anyhow::{Context, Result};
use nwfilter::xml::{FilterName, PortDev, SetName};
use nwfilter::{Driver, Event};
use nwfilterctl_shared::daemon::{End, Signals, notify, restart};
use nwfilterctl_shared::{Options, with_causes};
use sd_notify::NotifyState;
use serde_json::{Value, json};

/// Reloads, then repairs and learns until SIGTERM or SIGINT. Prints events, one a line. `read` reads the settings, again on
/// SIGHUP.
pub(crate) fn keep(read: impl Fn() -> Result<Options>, as_json: bool) -> Result<()> {
    let options = read()?;
    let (driver, signals) = (Arc::new(options.open_to_stay(Driver::builder())?), Signals::block()?);
    options.serve_metrics(&driver)?;
    let events = driver.subscribe();
    let print = move || print(&events, as_json);
    let printing =
        thread::Builder::new().name("print".into()).spawn(print).context("cannot start a thread")?;
    let reloaded = driver.reload()?;
    reloaded
        .applied
        .warnings
        .iter()
        .for_each(|warning| log::warn!(nwfilter_port = warning.port().as_str(); "{warning}"));
    for failed in &reloaded.failed {
        log::error!("{}", with_causes(anyhow::Chain::new(failed)));
    }
    for failed in &reloaded.failed_sets {
        log::error!("{}", with_causes(anyhow::Chain::new(failed)));
    }
    let reconciler = driver.keep()?;
    notify(&[NotifyState::Ready, NotifyState::Status("the bindings are enforced")]);
    let is_alive = || {
        // A driver that hangs does not return. One that returns an error works.
        let _ = driver.bindings();
        reconciler.is_running()
    };
    let end = signals.wait(&options, read, is_alive)?;
    end.notify();
    drop(reconciler);
    drop(driver);
    // The thread ends with the driver. A panic was reported when it happened.
    let _ = printing.join();
    match end {
        End::Stop => Ok(()),
        End::Restart => Err(restart()),
    }
}

/// Prints events until the driver ends or the output is closed.
fn print(events: &Receiver<Event>, as_json: bool) {
    for event in events {
        let line = if as_json { as_value(&event).to_string() } else { event.to_string() };
        let mut out = stdout().lock();
        if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
            log::error!("events are not printed any more: {error}");
            return;
        }
    }
}

/// An event as one line of JSON.
pub(crate) fn as_value(event: &Event) -> Value {
    let of_filter = |event: &str, name: &FilterName| json!({"event": event, "filter": name.as_str()});
    let of_set = |event: &str, name: &SetName| json!({"event": event, "set": name.as_str()});
    let of_port = |event: &str, port: &PortDev| json!({"event": event, "port": port.as_str()});
    match event {
        Event::FilterDefined(name) => of_filter("filter-defined", name),
        Event::FilterUndefined(name) => of_filter("filter-undefined", name),
        Event::SetDefined(name) => of_set("set-defined", name),
        Event::SetChanged(name) => of_set("set-changed", name),
        Event::SetUndefined(name) => of_set("set-undefined", name),
        Event::SetFailed(name) => of_set("set-failed", name),
        Event::BindingCreated(port) => of_port("binding-created", port),
        Event::BindingReplaced(port) => of_port("binding-replaced", port),
        Event::BindingDeleted(port) => of_port("binding-deleted", port),
        Event::DriftRepaired(port) => of_port("drift-repaired", port),
        Event::HostRepaired => json!({"event": "host-repaired"}),
        Event::AddressChanged { port, state } => {
            json!({"event": "address-changed", "port": port.as_str(), "state": state.to_string()})
        }
        Event::PacketDropped(dropped) => {
            let mut value = json!(**dropped);
            value["event"] = json!("packet-dropped");
            value
        }
        Event::DropsSuppressed { port, at_least } => {
            json!({"event": "drops-suppressed", "port": port.as_str(), "at_least": at_least})
        }
        Event::Lost(count) => json!({"event": "lost", "count": count}),
        other => json!({"event": "other", "text": other.to_string()}),
    }
}
