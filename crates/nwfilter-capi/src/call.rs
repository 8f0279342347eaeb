//! The frame of every function: no panic gets out, and an error becomes a code and a handle.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::ptr;

use crate::code::nwf_code;
use crate::error::{Failure, nwf_error};
use crate::text::nwf_text;

/// Calls `body`, and tells the caller by the code and, where it wants one, by an error handle how it went.
pub(crate) unsafe fn call(
    error: *mut *mut nwf_error,
    body: impl FnOnce() -> Result<(), Failure>,
) -> nwf_code {
    let outcome = guarded(body).unwrap_or_else(|| Err(Failure::panic()));
    let (code, handle) = match outcome {
        Ok(()) => (nwf_code::NWF_OK, ptr::null_mut()),
        Err(failure) if error.is_null() => (failure.code(), ptr::null_mut()),
        Err(failure) => (failure.code(), failure.into_handle()),
    };
    if !error.is_null() {
        // SAFETY: by the contract of the header it can be written if it is not null.
        unsafe { error.write(handle) };
    }
    code
}

/// Calls `body`; `None` if it panics.
fn guarded<T>(body: impl FnOnce() -> T) -> Option<T> {
    // What the driver keeps behind locks stays whole when a call panics: it is written in single steps.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(value) => Some(value),
        Err(payload) => {
            // The drop of a payload could panic itself.
            std::mem::forget(payload);
            None
        }
    }
}

/// Hands a new handle out.
pub(crate) unsafe fn put<T>(out: *mut *mut T, value: T) {
    // SAFETY: the caller of this has checked with `room` that it is not null; by the contract it can be written.
    unsafe { out.write(Box::into_raw(Box::new(value))) };
}

/// Refuses a place for a handle that is null, and says there that there is none yet.
pub(crate) unsafe fn room<T>(out: *mut *mut T, what: &str) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::argument(format!("the place for {what} is null")));
    }
    // SAFETY: by the contract of the header it can be written if it is not null.
    unsafe { out.write(ptr::null_mut()) };
    Ok(())
}

/// Says that there is no report yet, if the caller wants one.
pub(crate) unsafe fn no_report(out: *mut *mut nwf_text) {
    if !out.is_null() {
        // SAFETY: it is not null, and by the contract of the header it can be written.
        unsafe { out.write(ptr::null_mut()) };
    }
}

/// Hands a text out, if the caller wants it.
pub(crate) unsafe fn report(out: *mut *mut nwf_text, text: impl FnOnce() -> String) {
    if !out.is_null() {
        // SAFETY: it is not null, and by the contract of the header it can be written.
        unsafe { put(out, nwf_text::new(text())) };
    }
}

/// Frees a handle. `free` gets nothing if it is null.
pub(crate) unsafe fn free<T>(handle: *mut T, free: impl FnOnce(T)) {
    if !handle.is_null() {
        // SAFETY: by the contract of the header it was made by `put` and is freed once.
        let value = unsafe { Box::from_raw(handle) };
        let _ = guarded(|| free(*value));
    }
}

/// The process that made a handle. Threads of a driver do not live on in a child, and locks that they held are never
/// let go there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maker(u32);

impl Maker {
    pub(crate) fn this() -> Self {
        Self(process::id())
    }

    pub(crate) fn is_this(self) -> bool {
        self.0 == process::id()
    }

    pub(crate) fn check(self) -> Result<(), Failure> {
        if self.is_this() { Ok(()) } else { Err(Failure::forked()) }
    }
}
