//! A virtualization manager in eighty lines: it filters the ports of a guest while the guest runs.
//!
//! ```text
//! embed-in-manager STORE PORT MAC IP [PORT MAC IP]…
//! ```
//!
//! STORE is a directory for filters and bindings, each PORT a tap device of the guest. The ports are filtered until the
//! program reads the end of its input. It says what changes, and at the end, as JSON, some numbers.

use std::io::Read;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, bail};
use nwfilter::xml::{Binding, Owner, Uuid, read_filter};
use nwfilter::{Config, Driver, Transaction};
use nwfilter_xtables::Xtables;

const WEB_SERVER: &str = "<filter name='web-server'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let Some((store, interfaces)) =
        args.split_first().filter(|(_, rest)| rest.len() > 2 && rest.len() % 3 == 0)
    else {
        bail!("usage: embed-in-manager STORE PORT MAC IP [PORT MAC IP]…")
    };

    // One driver for the life of the manager; it may be used from many threads.
    let store = PathBuf::from(store);
    let config = Config::new(store.join("filters"), store.join("bindings"));
    let driver = Driver::open(config, Xtables::default()).context("cannot open the stores")?;

    // A thread that hears of everything, also of what the driver does by itself, such as learning an address.
    let events = driver.subscribe();
    let listener = thread::spawn(move || events.iter().for_each(|event| println!("{event}")));

    // After a restart: the kernel is brought to what the stores ask for. One bad port does not keep the others.
    for failed in driver.reload()?.failed {
        eprintln!("error: {:#}", anyhow::Error::new(failed));
    }

    // When the guest starts, before it runs: its filter is defined and all of its ports are bound, or nothing is done.
    // Transactions of threads that start guests at the same time share a commit.
    let guest = Owner { name: "guest".to_owned(), uuid: Uuid::new_v4() };
    let bindings: Vec<_> = interfaces.chunks(3).map(|given| binding(&guest, given)).collect::<Result<_>>()?;
    let mut start = Transaction::new();
    start.define_filter(read_filter("web-server", WEB_SERVER).into_result()?);
    for binding in bindings {
        start.replace_binding(binding);
    }
    let started = driver.commit(start)?;
    for warning in &started.applied.warnings {
        eprintln!("warning: {warning}");
    }
    println!("the guest may run: {} transactions of the kernel", started.applied.commits);

    std::io::stdin().read_to_end(&mut Vec::new())?;

    // When the guest is gone.
    let mut end = Transaction::new();
    for given in interfaces.chunks(3) {
        end.delete_binding(&given[0]);
    }
    driver.commit(end)?;

    // Numbers for whoever watches the manager.
    println!("{}", serde_json::to_string(&driver.metrics())?);
    drop(driver);
    listener.join().map_err(|_| anyhow::anyhow!("the listener ended in a panic"))
}

/// What a port of the guest must have.
fn binding(guest: &Owner, given: &[String]) -> Result<Binding> {
    let [port, mac, ip] = given else { bail!("a port needs PORT MAC IP") };
    let binding = Binding::builder().owner(&guest.name, guest.uuid).port(port).mac(mac);
    Ok(binding.filter("web-server").parameter("IP", ip).build()?)
}
