//! `libvirt_driver_nwfilter.so`: the driver as the module that libvirtd or virtnwfilterd loads in place of libvirt's.
//!
//! libvirt calls [`nwfilterRegister`] once after loading the file. From then on its public virNWFilter functions
//! arrive in `entry`, which turns C into Rust and every error or panic into a libvirt error; `service` does the work.
//!
//! Nothing of libvirt is linked: its symbols are looked up when the module is loaded, so that one binary serves every
//! libvirt that has them, and a libvirt that lacks one is told which.

mod abi;
mod entry;
mod leaving;
mod libvirt;
mod logging;
mod refusal;
mod service;

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::libvirt::Libvirt;

/// What libvirt calls after loading the module: 0 when the driver is registered, -1 when it is not.
// The name is libvirt's: it makes it of the driver's.
#[allow(non_snake_case)]
#[unsafe(no_mangle)]
pub extern "C" fn nwfilterRegister() -> c_int {
    catch_unwind(AssertUnwindSafe(register)).unwrap_or(-1)
}

fn register() -> c_int {
    let registered = Libvirt::load().and_then(|libvirt| {
        logging::init(libvirt.log_message);
        libvirt.register(entry::driver())
    });
    match registered {
        Ok(()) => 0,
        Err(error) => {
            // With the logger in place this is a line of libvirt's log, without it one of the daemon's stderr.
            log::error!(
                "the nwfilter module is not registered, and domains with filters will not start: {error}"
            );
            if !logging::is_ready() {
                eprintln!("nwfilter module: not registered: {error}");
            }
            -1
        }
    }
}
