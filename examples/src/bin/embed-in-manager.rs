//! A virtualization manager in fifty lines: it filters the port of a guest while the guest runs.
//!
//! ```text
//! embed-in-manager STORE PORT MAC IP
//! ```
//!
//! STORE is a directory for filters and bindings, PORT the guest's tap device. The port is filtered until the program
//! reads the end of its input.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use nwfilter::xml::{Binding, Owner, Params, Uuid};
use nwfilter::{Config, Driver, Xtables};

const WEB_SERVER: &str = "<filter name='web-server'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [store, port, mac, ip] = args.as_slice() else { bail!("usage: embed-in-manager STORE PORT MAC IP") };

    // One driver for the life of the manager; it may be used from many threads.
    let store = PathBuf::from(store);
    let config = Config { config_dir: store.join("filters"), state_dir: store.join("bindings") };
    let driver = Driver::open(config, Xtables::default()).context("cannot open the stores")?;

    // A filter is defined once; defining it again updates every port that uses it.
    driver.define_filter("web-server", WEB_SERVER)?;

    // When the guest starts, before it runs: its port is bound to the filter.
    let mut params = Params::new();
    if !params.push("IP".parse()?, ip) {
        bail!("'{ip}' cannot be the value of a parameter");
    }
    let binding = Binding {
        owner: Owner { name: "guest".to_owned(), uuid: Uuid::new_v4() },
        port: port.parse()?,
        link: None,
        mac: mac.parse()?,
        filter: "web-server".parse()?,
        params,
    };
    let applied = driver.create_binding(binding)?;
    for warning in &applied.warnings {
        eprintln!("warning: {warning}");
    }
    println!("{port} is filtered, {} transactions", applied.commits);

    std::io::stdin().read_to_end(&mut Vec::new())?;

    // When the guest is gone.
    driver.delete_binding(port)?;
    println!("{port} is not filtered any more");
    Ok(())
}
