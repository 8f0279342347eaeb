//! A virtualization manager in sixty lines: it filters the ports of a guest while the guest runs.
//! STORE is a directory for its filters and bindings, each PORT a tap device. It ends at the end of its input.

use std::{io::Read, path::Path, thread};

use anyhow::{Context, Result, bail};
use nwfilter::xml::{Binding, Uuid, read_filter};
use nwfilter::{ApplyError, Driver, Error, Transaction};
use nwfilter_xtables::Xtables;

const FILTER: &str = "<filter name='web-server'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let usage = "usage: embed-in-manager STORE PORT MAC IP [PORT MAC IP]…";
    let (store, ports) = args.split_first().filter(|(_, rest)| rest.len() % 3 == 0).context(usage)?;
    let dir = |name| Path::new(store).join(name);
    let builder = Driver::builder().config_dir(dir("filters")).state_dir(dir("bindings"));
    let driver = builder.open(Xtables::default())?;
    // Events come from this driver's calls, and from what it does by itself, such as learning an address.
    let events = driver.subscribe();
    let listener = thread::spawn(move || events.iter().for_each(|event| println!("{event}")));
    start(&driver, ports)?;
    println!("the guest may run");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    stop(&driver, ports)?;
    drop(driver);
    listener.join().map_err(|_| anyhow::anyhow!("the listener ended in a panic"))
}

/// Before the guest runs: defines its filter and binds all of its ports, or changes nothing.
pub(crate) fn start(driver: &Driver, ports: &[String]) -> Result<()> {
    let (mut start, guest) = (Transaction::new(), Uuid::new_v4());
    start.define_filter(read_filter("web-server", FILTER).into_result()?);
    for [port, mac, ip] in ports.as_chunks().0 {
        let binding = Binding::builder().owner("guest", guest).port(port).mac(mac).filter("web-server");
        start.replace_binding(binding.parameter("IP", ip).build()?);
    }
    match driver.commit(start) {
        Ok(done) => done.applied.warnings.iter().for_each(|warning| eprintln!("warning: {warning}")),
        Err(Error::NoSuchPort(port)) => bail!("make the tap device {port} before the guest starts"),
        Err(Error::Apply(ApplyError::Refused(why))) => bail!("the filter asks for the impossible: {why}"),
        Err(error) => bail!(error),
    }
    Ok(())
}

/// When the guest is gone.
pub(crate) fn stop(driver: &Driver, ports: &[String]) -> Result<()> {
    let mut stop = Transaction::new();
    for port in ports.iter().step_by(3) {
        stop.delete_binding(&port.parse()?);
    }
    Ok(driver.commit(stop).map(drop)?)
}
