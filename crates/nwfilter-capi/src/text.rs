//! Texts that the library hands out.

use std::ffi::{CString, c_char};
use std::ptr;

use crate::call;

/// A text that a function handed out: UTF-8, followed by a zero byte. It belongs to the caller, who frees it with
/// nwf_text_free. It never changes, so that threads may read it at the same time.
pub struct nwf_text(CString);

impl nwf_text {
    pub(crate) fn new(text: String) -> Self {
        Self(c_text(text))
    }
}

/// The text for C. A zero byte in it, which no document can hold, becomes U+FFFD.
pub(crate) fn c_text(text: String) -> CString {
    let escape = |error: std::ffi::NulError| {
        let text = String::from_utf8_lossy(&error.into_vec()).replace('\0', "\u{fffd}");
        CString::new(text).unwrap_or_default()
    };
    CString::new(text).unwrap_or_else(escape)
}

/// The bytes of a text, and their number without the zero byte in *length unless that is null. They are there until the
/// text is freed. Null if the text is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_text_data(text: *const nwf_text, length: *mut usize) -> *const c_char {
    // SAFETY: by the contract of the header a handle is null or valid.
    let text = unsafe { text.as_ref() }.map(|text| &text.0);
    // SAFETY: `length` can be written if it is not null.
    unsafe { hand_out(text, length) }
}

/// Frees a text; nothing if it is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_text_free(text: *mut nwf_text) {
    // SAFETY: by the contract of the header the handle is null, or valid and freed once.
    unsafe { call::free(text, drop) }
}

/// Hands out a text that the library keeps.
pub(crate) unsafe fn hand_out(text: Option<&CString>, length: *mut usize) -> *const c_char {
    if !length.is_null() {
        // SAFETY: it is not null, and by the contract of the header it can be written.
        unsafe { length.write(text.map_or(0, |text| text.count_bytes())) };
    }
    text.map_or(ptr::null(), |text| text.as_ptr())
}
