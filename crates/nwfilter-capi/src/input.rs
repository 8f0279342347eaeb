//! What a caller passes in: pointers, texts with their lengths, and structures with their sizes.

use std::ffi::{CStr, c_char};
use std::mem::{MaybeUninit, size_of};
use std::ptr;

use crate::error::Failure;

/// In place of a length: the text ends at its first zero byte.
pub const NWF_ZERO_TERMINATED: usize = usize::MAX;

/// Bytes that a document, a question or a name may have.
const MAX_TEXT: usize = 16 << 20;

/// What a handle points to.
pub(crate) unsafe fn handle<'a, T>(handle: *const T, what: &str) -> Result<&'a T, Failure> {
    // SAFETY: by the contract of the header a handle is null, or was made by this library and not freed yet. What it
    // points to is only changed behind locks.
    unsafe { handle.as_ref() }.ok_or_else(|| Failure::argument(format!("{what} is null")))
}

/// A text of the caller.
pub(crate) unsafe fn text<'a>(data: *const c_char, length: usize, what: &str) -> Result<&'a str, Failure> {
    if data.is_null() {
        return Err(Failure::argument(format!("{what} is null")));
    }
    let bytes = if length == NWF_ZERO_TERMINATED {
        // SAFETY: by the contract of the header the text ends with a zero byte where no length is given.
        unsafe { CStr::from_ptr(data) }.to_bytes()
    } else {
        if length > MAX_TEXT {
            let why = format!("{what} is said to have {length} bytes; it may have {MAX_TEXT}");
            return Err(Failure::argument(why));
        }
        // SAFETY: by the contract of the header so many bytes can be read, and do not change during the call.
        unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length) }
    };
    std::str::from_utf8(bytes).map_err(|error| Failure::argument(format!("{what} is not UTF-8: {error}")))
}

/// The same, where null stands for a text that is not given.
pub(crate) unsafe fn optional_text<'a>(
    data: *const c_char,
    length: usize,
    what: &str,
) -> Result<Option<&'a str>, Failure> {
    // SAFETY: the same contract.
    if data.is_null() { Ok(None) } else { unsafe { text(data, length, what) }.map(Some) }
}

/// A structure that begins with its size, and of which all bytes may be zero. What the caller does not know of it is zero.
pub(crate) unsafe fn sized<T: Structure>(given: *const T, what: &str) -> Result<T, Failure> {
    // SAFETY: the same contract as of `size_of_output`.
    let size = unsafe { declared_size(given, what) }?;
    if size > size_of::<T>() {
        let why = format!("{what} has {size} bytes, of which this library knows {}", size_of::<T>());
        return Err(Failure::argument(why));
    }
    let mut known = MaybeUninit::<T>::zeroed();
    // SAFETY: so many bytes can be read, and there is room for them. Every T may be of any bytes.
    unsafe {
        ptr::copy_nonoverlapping(given.cast::<u8>(), known.as_mut_ptr().cast::<u8>(), size);
        Ok(known.assume_init())
    }
}

/// Fills a structure of the caller, as far as the caller knows it. What only the caller knows is set to zero.
pub(crate) unsafe fn fill<T: Structure>(out: *mut T, mut value: T, what: &str) -> Result<(), Failure> {
    // SAFETY: by the contract of the header the structure begins with its size, which can be read.
    let size = unsafe { declared_size(out, what) }?;
    value.set_size(size);
    let known = size.min(size_of::<T>());
    // SAFETY: by the contract so many bytes can be written, and the value has at least as many as are copied.
    unsafe {
        ptr::write_bytes(out.cast::<u8>(), 0, size);
        ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), out.cast::<u8>(), known);
    }
    Ok(())
}

unsafe fn declared_size<T: Structure>(given: *const T, what: &str) -> Result<usize, Failure> {
    if given.is_null() {
        return Err(Failure::argument(format!("{what} is null")));
    }
    // SAFETY: it is not null, and by the contract of the header it begins with a size_t. It may be less than a whole T.
    let size = unsafe { given.cast::<usize>().read_unaligned() };
    if !(T::FIRST_SIZE..=MAX_STRUCT).contains(&size) {
        let why = format!("{what} has no valid size ({size}): set its field size to sizeof");
        return Err(Failure::argument(why));
    }
    Ok(size)
}

/// Bytes that any structure will ever have.
const MAX_STRUCT: usize = 4096;

/// A structure of the interface that begins with its size, and is made of numbers and pointers only.
///
/// # Safety
///
/// It is `repr(C)`, its first field is a `usize`, its size, and all its fields may be of any bytes.
pub(crate) unsafe trait Structure {
    /// The size it had in the first version of the interface.
    const FIRST_SIZE: usize;

    fn set_size(&mut self, size: usize);
}
