//! Checks that libvirt's own definitions of filters and bindings begin as those that its access checks get from here. Has
//! libvirt parse one of each.
//!
//! With another layout, an access check would be about a wrong name, or would follow a wrong pointer.

use std::ffi::{CStr, c_char, c_uchar, c_uint, c_void};
use std::ptr::null;

use crate::abi::{BindingIdentity, FilterIdentity};
use crate::libvirt::{LoadError, symbol};

/// virNWFilterDefParse(xml, file, flags) and virNWFilterBindingDefParse
type Parse<T> = unsafe extern "C" fn(*const c_char, *const c_char, c_uint) -> *mut T;
/// virNWFilterDefFree and virNWFilterBindingDefFree
type Free<T> = unsafe extern "C" fn(*mut T);

const UUID: [c_uchar; 16] = *b"\x6e\x77\x66\x69\x6c\x74\x45\x72\x81\x23\x45\x67\x89\xab\xcd\xef";
const MAC: [c_uchar; 6] = *b"\x52\x54\x00\x12\x34\x56";

/// Checks both kinds.
pub(crate) fn check() -> Result<(), LoadError> {
    if filter()? && binding()? { Ok(()) } else { Err(LoadError::Definitions) }
}

fn filter() -> Result<bool, LoadError> {
    let parse = symbol!("virNWFilterDefParse" as Parse<FilterIdentity>);
    let free = symbol!("virNWFilterDefFree" as Free<FilterIdentity>);
    let xml = c"<filter name='name'><uuid>6e776669-6c74-4572-8123-456789abcdef</uuid></filter>";
    // SAFETY: the text lives through the call, and libvirt takes a null pointer for a text that is of no file.
    let filter = unsafe { parse(xml.as_ptr(), null(), 0) };
    if filter.is_null() {
        return Ok(false);
    }
    // SAFETY: a definition is not shorter than these fields in any libvirt. Only they are read, whatever they are.
    let (name, uuid) = unsafe { ((*filter).name, (*filter).uuid) };
    let known = is(name, c"name") && uuid == UUID;
    // SAFETY: it was made above and is not used any more.
    unsafe { free(filter) };
    Ok(known)
}

fn binding() -> Result<bool, LoadError> {
    let parse = symbol!("virNWFilterBindingDefParse" as Parse<BindingIdentity>);
    let free = symbol!("virNWFilterBindingDefFree" as Free<BindingIdentity>);
    let xml = c"<filterbinding>
          <owner><name>owner</name><uuid>6e776669-6c74-4572-8123-456789abcdef</uuid></owner>
          <portdev name='port'/><linkdev name='link'/><mac address='52:54:00:12:34:56'/><filterref filter='filter'/>
        </filterbinding>";
    // SAFETY: as above.
    let binding = unsafe { parse(xml.as_ptr(), null(), 0) };
    if binding.is_null() {
        return Ok(false);
    }
    // SAFETY: as above.
    let (owner, port, link, filter) =
        unsafe { ((*binding).owner_name, (*binding).port, (*binding).link, (*binding).filter) };
    // SAFETY: as above.
    let (uuid, mac) = unsafe { ((*binding).owner_uuid, (*binding).mac) };
    let texts = [(owner, c"owner"), (port, c"port"), (link, c"link"), (filter, c"filter")];
    let known = texts.into_iter().all(|(pointer, text)| is(pointer, text)) && uuid == UUID && mac == MAC;
    // SAFETY: it was made above and is not used any more.
    unsafe { free(binding) };
    Ok(known)
}

/// Whether a pointer, which may be invalid, points to this text.
fn is(pointer: *const c_char, text: &CStr) -> bool {
    let expected = text.to_bytes_with_nul();
    let mut found = vec![0_u8; expected.len()];
    let here = libc::iovec { iov_base: found.as_mut_ptr().cast(), iov_len: found.len() };
    let there = libc::iovec { iov_base: pointer.cast_mut().cast::<c_void>(), iov_len: found.len() };
    // SAFETY: the kernel writes into `found`, and reads at the pointer only what this process may read.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &raw const here, 1, &raw const there, 1, 0) };
    usize::try_from(read) == Ok(expected.len()) && found == expected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_null_pointer_is_refused_as_text() {
        assert!(is(c"name".as_ptr(), c"name") && !is(c"names".as_ptr(), c"name"));
        for address in [0, 1, 0x6e77_6669, usize::MAX] {
            assert!(!is(std::ptr::without_provenance(address), c"name"), "{address}");
        }
    }
}
