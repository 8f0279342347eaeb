//! Keeps an idle daemon running while ports are bound, because changes by others are repaired only while it runs.

use std::ffi::c_void;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::abi::Inhibit;

/// libvirt's inhibitor of this daemon.
struct Inhibitor {
    callback: Inhibit,
    /// libvirt's argument for the callback.
    opaque: usize,
    inhibits: Mutex<bool>,
}

/// Unset if libvirt gave none.
static INHIBITOR: OnceLock<Inhibitor> = OnceLock::new();

/// Stores libvirt's inhibitor.
pub(crate) fn init(callback: Option<Inhibit>, opaque: *mut c_void) {
    if let Some(callback) = callback {
        INHIBITOR.get_or_init(|| Inhibitor {
            callback,
            opaque: opaque as usize,
            inhibits: Mutex::new(false),
        });
    }
}

/// Keeps the daemon running if a port is bound, and lets it end when idle if none is.
pub(crate) fn update(is_bound: impl FnOnce() -> bool) {
    let Some(Inhibitor { callback, opaque, inhibits }) = INHIBITOR.get() else { return };
    let mut inhibits = inhibits.lock().unwrap_or_else(PoisonError::into_inner);
    let is_bound = is_bound();
    if *inhibits != is_bound {
        *inhibits = is_bound;
        // SAFETY: both were given for each other, and the function may be called by any thread.
        unsafe { callback(is_bound, *opaque as *mut c_void) };
    }
}
