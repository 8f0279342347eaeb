//! A libvirt hook that filters guests from before their first instruction to their end.
//!
//! Installed as `/etc/libvirt/hooks/qemu`, or `/etc/libvirt/hooks/lxc`, with a restart of the libvirt daemon. libvirt
//! runs it as `qemu GUEST OPERATION SUB-OPERATION EXTRA` with the guest's XML on stdin, and waits for it. If it fails
//! at `start`, the guest does not start, and libvirt's error and log have what it said. It never calls libvirt, which
//! could not answer while it waits.
//!
//! The filters are those of `/etc/nwfilter`, or the stock ones; the bindings are in `/run/nwfilter`. The environment
//! variables `NWFILTER_CONFIG_DIR` and `NWFILTER_STATE_DIR` name other directories.

use std::io::Read;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nwfilter::{Config, Driver};
use nwfilter_libvirt::HookCall;
use nwfilter_xtables::Xtables;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nwfilter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let call = HookCall::from_args(std::env::args().skip(1))?;
    if !call.operation.concerns_filters() {
        return Ok(());
    }
    let mut xml = String::new();
    std::io::stdin().read_to_string(&mut xml).context("the guest's XML")?;
    let mut config = Config::default();
    for (variable, dir) in
        [("NWFILTER_CONFIG_DIR", &mut config.config_dir), ("NWFILTER_STATE_DIR", &mut config.state_dir)]
    {
        if let Some(other) = std::env::var_os(variable) {
            *dir = other.into();
        }
    }
    // This process ends at once: it leaves what it knows of the tables to the next one, so that not every guest that
    // starts has to wait until they are read, and learning addresses to `nwfilterctl learn`.
    let backend = Xtables::default().remembering_in(&config.state_dir);
    let driver = Driver::builder().config(config).without_learner().open(backend)?;
    call.run(&driver, &xml).with_context(|| format!("guest '{}'", call.guest))
}
