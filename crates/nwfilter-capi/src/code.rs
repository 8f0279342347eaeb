//! The kinds of errors, as numbers.

use std::ffi::{CStr, c_char};

use nwfilter::{ApplyError, Error};

/// What a function says about how it went. New numbers may be added at the end.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nwf_code {
    /// It is done.
    NWF_OK = 0,
    /// An argument breaks its contract: a pointer is null, a text is not UTF-8, a size or a number is not known.
    NWF_INVALID_ARGUMENT = 1,
    /// The handle was made before a fork of the process. A child opens its own driver.
    NWF_FORKED = 2,
    /// A bug of the library. The driver can be used on: a change was made as a whole or not at all.
    NWF_PANIC = 3,
    /// Another error; the message says which.
    NWF_OTHER = 4,
    /// A document is not valid: the error has diagnostics.
    NWF_INVALID_DOCUMENT = 5,
    /// No filter has that name.
    NWF_NO_SUCH_FILTER = 6,
    /// A filter that is built in cannot be removed.
    NWF_STOCK_FILTER = 7,
    /// Ports use the filter.
    NWF_FILTER_IN_USE = 8,
    /// A filter's UUID and name do not belong together.
    NWF_UUID_CONFLICT = 9,
    /// A filter would include itself.
    NWF_INCLUDES_ITSELF = 10,
    /// The port has no binding.
    NWF_NO_SUCH_BINDING = 11,
    /// The port has a binding already.
    NWF_BINDING_EXISTS = 12,
    /// A name cannot be one of a filter or of a network interface.
    NWF_INVALID_NAME = 13,
    /// There is no such network interface.
    NWF_NO_SUCH_PORT = 14,
    /// The filter makes no rules for the port: a variable has no value, an included filter does not exist.
    NWF_NO_RULES = 15,
    /// A parameter that steers how addresses are learned has a value it cannot have.
    NWF_INVALID_PARAMETER = 16,
    /// The kernel refused a rule or a set.
    NWF_REFUSED = 17,
    /// The backend cannot express the filter.
    NWF_UNSUPPORTED = 18,
    /// The host lacks a tool, a module of the kernel or a permission.
    NWF_UNAVAILABLE = 19,
    /// A file could not be read or written.
    NWF_IO = 20,
    /// Another process keeps the stores locked for longer than the driver waits.
    NWF_LOCKED = 21,
    /// The thread that carried out this change together with others failed.
    NWF_ABANDONED = 22,
    /// A packet to explain is not understood.
    NWF_INVALID_QUESTION = 23,
    /// Another backend filters ports of this host.
    NWF_OTHER_BACKEND = 24,
    /// The driver is keeping the kernel already.
    NWF_ALREADY_KEEPING = 25,
    /// No set has that name.
    NWF_NO_SUCH_SET = 26,
    /// Filters, other sets or ports use the set.
    NWF_SET_IN_USE = 27,
    /// A set cannot be so: an entry is of another family or is none, an included set does not exist, it holds too much.
    NWF_INVALID_SET = 28,
}

use nwf_code::*;

/// Every code with its name.
const NAMES: [(nwf_code, &CStr); 29] = [
    (NWF_OK, c"NWF_OK"),
    (NWF_INVALID_ARGUMENT, c"NWF_INVALID_ARGUMENT"),
    (NWF_FORKED, c"NWF_FORKED"),
    (NWF_PANIC, c"NWF_PANIC"),
    (NWF_OTHER, c"NWF_OTHER"),
    (NWF_INVALID_DOCUMENT, c"NWF_INVALID_DOCUMENT"),
    (NWF_NO_SUCH_FILTER, c"NWF_NO_SUCH_FILTER"),
    (NWF_STOCK_FILTER, c"NWF_STOCK_FILTER"),
    (NWF_FILTER_IN_USE, c"NWF_FILTER_IN_USE"),
    (NWF_UUID_CONFLICT, c"NWF_UUID_CONFLICT"),
    (NWF_INCLUDES_ITSELF, c"NWF_INCLUDES_ITSELF"),
    (NWF_NO_SUCH_BINDING, c"NWF_NO_SUCH_BINDING"),
    (NWF_BINDING_EXISTS, c"NWF_BINDING_EXISTS"),
    (NWF_INVALID_NAME, c"NWF_INVALID_NAME"),
    (NWF_NO_SUCH_PORT, c"NWF_NO_SUCH_PORT"),
    (NWF_NO_RULES, c"NWF_NO_RULES"),
    (NWF_INVALID_PARAMETER, c"NWF_INVALID_PARAMETER"),
    (NWF_REFUSED, c"NWF_REFUSED"),
    (NWF_UNSUPPORTED, c"NWF_UNSUPPORTED"),
    (NWF_UNAVAILABLE, c"NWF_UNAVAILABLE"),
    (NWF_IO, c"NWF_IO"),
    (NWF_LOCKED, c"NWF_LOCKED"),
    (NWF_ABANDONED, c"NWF_ABANDONED"),
    (NWF_INVALID_QUESTION, c"NWF_INVALID_QUESTION"),
    (NWF_OTHER_BACKEND, c"NWF_OTHER_BACKEND"),
    (NWF_ALREADY_KEEPING, c"NWF_ALREADY_KEEPING"),
    (NWF_NO_SUCH_SET, c"NWF_NO_SUCH_SET"),
    (NWF_SET_IN_USE, c"NWF_SET_IN_USE"),
    (NWF_INVALID_SET, c"NWF_INVALID_SET"),
];

/// The name of a code, such as "NWF_NO_SUCH_FILTER"; "NWF_OTHER" for a number that is none. The text is part of the
/// library.
#[unsafe(no_mangle)]
pub extern "C" fn nwf_code_name(code: i32) -> *const c_char {
    let row = NAMES.iter().find(|(known, _)| *known as i32 == code);
    row.map_or(c"NWF_OTHER", |(_, name)| *name).as_ptr()
}

impl nwf_code {
    pub(crate) fn of(error: &Error) -> Self {
        match error {
            Error::Invalid(_) => NWF_INVALID_DOCUMENT,
            Error::NoSuchFilter(_) => NWF_NO_SUCH_FILTER,
            Error::StockFilter(_) => NWF_STOCK_FILTER,
            Error::FilterInUse { .. } => NWF_FILTER_IN_USE,
            Error::UuidConflict { .. } => NWF_UUID_CONFLICT,
            Error::IncludesItself { .. } => NWF_INCLUDES_ITSELF,
            Error::NoSuchSet(_) => NWF_NO_SUCH_SET,
            Error::SetInUse { .. } => NWF_SET_IN_USE,
            Error::Set { .. } => NWF_INVALID_SET,
            Error::NoSuchBinding(_) => NWF_NO_SUCH_BINDING,
            Error::BindingExists(_) => NWF_BINDING_EXISTS,
            Error::Name(_) => NWF_INVALID_NAME,
            Error::NoSuchPort(_) => NWF_NO_SUCH_PORT,
            Error::Rules { .. } => NWF_NO_RULES,
            Error::Parameter { .. } => NWF_INVALID_PARAMETER,
            Error::Apply(error) => Self::of_apply(error),
            Error::Learner { .. } | Error::Links { .. } | Error::Events { .. } | Error::Store { .. } => {
                NWF_IO
            }
            Error::Reconciler { .. } => NWF_UNAVAILABLE,
            Error::Locked { .. } => NWF_LOCKED,
            Error::Abandoned => NWF_ABANDONED,
            _ => NWF_OTHER,
        }
    }

    fn of_apply(error: &ApplyError) -> Self {
        match error {
            ApplyError::Refused(_) | ApplyError::Set { .. } => NWF_REFUSED,
            ApplyError::Unsupported { .. } => NWF_UNSUPPORTED,
            ApplyError::Unavailable { .. } => NWF_UNAVAILABLE,
            ApplyError::Io { .. } => NWF_IO,
            _ => NWF_OTHER,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_name_and_its_place_in_the_table() {
        for (number, (code, name)) in NAMES.iter().enumerate() {
            assert_eq!(*code as usize, number);
            assert_eq!(format!("{code:?}"), name.to_str().unwrap());
        }
    }
}
