//! `libvirt_driver_nwfilter.so`: the driver as the module that libvirtd or virtnwfilterd loads in place of libvirt's.
//!
//! libvirt calls [`nwfilterRegister`] once after loading the file. From then on its public virNWFilter functions
//! arrive in `entry`, which turns C into Rust and every error or panic into a libvirt error; `service` does the work.
//!
//! Nothing of libvirt is linked: its symbols are looked up when the module is loaded, so that one binary serves every
//! libvirt that has them, and where one is missing libvirt's log says which.

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
mod validation;

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::libvirt::{Libvirt, LoadError};

/// What libvirt calls after loading the module.
///
/// Where the driver cannot be registered, the daemon goes on without: it starts no domain with filters then, but serves
/// the others. An answer other than 0 would end it.
// The name is libvirt's: it makes it of the driver's.
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
