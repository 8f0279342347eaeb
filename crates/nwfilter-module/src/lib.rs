//! `libvirt_driver_nwfilter.so`: the driver as the module that libvirtd or virtnwfilterd loads in place of libvirt's.
//!
//! libvirt calls [`nwfilterRegister`] once after loading the file. From then on its public virNWFilter functions call
//! `entry`, which converts between C and Rust and makes every error or panic a libvirt error. `service` does the work.
//!
//! The module does not link libvirt. It looks up libvirt's symbols when it is loaded, so one binary works with every
//! libvirt that has them. If one is missing, libvirt's log names it.

mod abi;
mod choice;
mod definitions;
mod entry;
mod inhibitor;
mod leaving;
mod libvirt;
mod lock;
mod logging;
mod probe;
mod refusal;
mod service;
mod setup;
mod validation;

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::libvirt::{Libvirt, LoadError};

/// Called by libvirt after it has loaded the module.
///
/// Always returns 0, because any other value would end the daemon. If the driver cannot be registered, the daemon runs
/// without it: it refuses to start domains with filters, and serves the others.
// libvirt derives the function's name from the driver's name.
#[allow(non_snake_case)]
#[unsafe(no_mangle)]
pub extern "C" fn nwfilterRegister() -> c_int {
    let registered = catch_unwind(AssertUnwindSafe(register)).map_err(|_| "it panicked".to_owned());
    if let Err(reason) = registered.and_then(|registered| registered.map_err(|error| error.to_string())) {
        let message =
            format!("no domain with filters will start: the nwfilter module is not registered: {reason}");
        match logging::is_ready() {
            true => log::error!("{message}"),
            false => eprintln!("{message}"),
        }
    }
    0
}

fn register() -> Result<(), LoadError> {
    logging::init(Libvirt::log()?);
    Libvirt::load()?.register(entry::driver())
}
