//! Errors: what went wrong, where it is written, and why.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::ffi::{CString, c_char};
use std::ptr;

use nwfilter::rules::Origin;
use nwfilter::xml::{Diagnostic, Diagnostics, FilterName, Severity};
use nwfilter::{Driver, Error, Location};

use crate::call;
use crate::code::nwf_code;
use crate::input::{self, Structure};
use crate::text::{c_text, hand_out};

/// Why a call failed. It belongs to the caller, who frees it with nwf_error_free. It never changes, so that threads may
/// read it at the same time, and it outlives its driver.
pub struct nwf_error {
    code: nwf_code,
    message: CString,
    causes: Vec<CString>,
    place: Option<Place>,
    diagnostics: Vec<Item>,
}

struct Place {
    document: CString,
    line: u32,
    column: u32,
    length: u32,
}

struct Item {
    severity: nwf_severity,
    line: u32,
    column: u32,
    length: u32,
    code: CString,
    message: CString,
    help: Option<CString>,
}

/// How bad a problem of a document is.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nwf_severity {
    /// What is meant is ignored or replaced.
    NWF_WARNING = 1,
    /// The document is refused.
    NWF_ERROR = 2,
}

/// Where the text is that an error is about. The caller sets size.
#[repr(C)]
pub struct nwf_place {
    /// sizeof(nwf_place)
    pub size: usize,
    /// The document as the caller named it; the file of a stored filter; or the name of a filter. It is there until the
    /// error is freed.
    pub document: *const c_char,
    /// The bytes of document.
    pub document_length: usize,
    /// The line, from 1.
    pub line: u32,
    /// The column in characters, from 1; 0 if only the line is known.
    pub column: u32,
    /// How many characters are meant; 0 if only the line is known.
    pub length: u32,
    /// Always 0.
    pub reserved: u32,
}

/// A problem of a document. The caller sets size. The texts are there until the error is freed.
#[repr(C)]
pub struct nwf_diagnostic {
    /// sizeof(nwf_diagnostic)
    pub size: usize,
    /// What kind of problem it is, such as "NWF0012": docs/diagnostics.md.
    pub code: *const c_char,
    /// The bytes of code.
    pub code_length: usize,
    /// What is wrong.
    pub message: *const c_char,
    /// The bytes of message.
    pub message_length: usize,
    /// What to do about it; null if nothing is known.
    pub help: *const c_char,
    /// The bytes of help.
    pub help_length: usize,
    /// How bad it is: an nwf_severity.
    pub severity: i32,
    /// The line, from 1.
    pub line: u32,
    /// The column in characters, from 1.
    pub column: u32,
    /// How many characters of the line it covers.
    pub length: u32,
}

// SAFETY: it is repr(C), begins with its size, and is made of numbers and pointers.
unsafe impl Structure for nwf_place {
    const FIRST_SIZE: usize = 40;

    fn set_size(&mut self, size: usize) {
        self.size = size;
    }
}

// SAFETY: it is repr(C), begins with its size, and is made of numbers and pointers.
unsafe impl Structure for nwf_diagnostic {
    const FIRST_SIZE: usize = 72;

    fn set_size(&mut self, size: usize) {
        self.size = size;
    }
}

/// An error on its way out.
#[derive(Debug)]
pub(crate) enum Failure {
    /// One that the library finds itself.
    Own(nwf_code, String),
    /// One of the driver, and where the rule is written that it is about.
    Driver(Box<Error>, Option<(String, u32)>),
}

impl Failure {
    pub(crate) fn argument(what: impl Into<String>) -> Self {
        Self::Own(nwf_code::NWF_INVALID_ARGUMENT, what.into())
    }

    pub(crate) fn panic() -> Self {
        let what = "a bug of the library: the call panicked, and what it says is on stderr";
        Self::Own(nwf_code::NWF_PANIC, what.into())
    }

    pub(crate) fn forked() -> Self {
        let what = "this handle was made by the parent of this process: open a driver after the fork";
        Self::Own(nwf_code::NWF_FORKED, what.into())
    }

    /// An error of this driver, with the place of the rule that it is about. `documents` are those of the filters that
    /// were to be defined.
    pub(crate) fn of(driver: &Driver, error: Error, documents: &BTreeMap<FilterName, String>) -> Self {
        let place = error.origin().and_then(|origin| place_of(driver, &error, origin, documents));
        Self::Driver(Box::new(error), place)
    }

    pub(crate) fn code(&self) -> nwf_code {
        match self {
            Self::Own(code, _) => *code,
            Self::Driver(error, _) => nwf_code::of(error),
        }
    }

    pub(crate) fn into_handle(self) -> *mut nwf_error {
        let code = self.code();
        let error = match self {
            Self::Own(_, message) => nwf_error {
                code,
                message: c_text(message),
                causes: Vec::new(),
                place: None,
                diagnostics: Vec::new(),
            },
            Self::Driver(error, place) => {
                let (mut causes, mut next) = (Vec::new(), error.source());
                while let Some(cause) = next {
                    causes.push(c_text(cause.to_string()));
                    next = cause.source();
                }
                let found = match &*error {
                    Error::Invalid(diagnostics) => Some(diagnostics),
                    _ => None,
                };
                let place = place.map(|(document, line)| Place {
                    document: c_text(document),
                    line,
                    column: 0,
                    length: 0,
                });
                nwf_error {
                    code,
                    message: c_text(error.to_string()),
                    causes,
                    place: found.and_then(first_place).or(place),
                    diagnostics: found.map_or_else(Vec::new, |found| found.items.iter().map(item).collect()),
                }
            }
        };
        Box::into_raw(Box::new(error))
    }
}

impl From<Diagnostics> for Failure {
    fn from(diagnostics: Diagnostics) -> Self {
        Self::Driver(Box::new(Error::Invalid(diagnostics)), None)
    }
}

/// Where a rule is written: in a document of the caller, in a file, or at least in which filter.
fn place_of(
    driver: &Driver,
    error: &Error,
    origin: &Origin,
    documents: &BTreeMap<FilterName, String>,
) -> Option<(String, u32)> {
    let Origin { filter: Some(filter), line: line @ 1.. } = origin else { return None };
    if let Some(document) = documents.get(&**filter) {
        return Some((document.clone(), *line));
    }
    Some(match driver.location(error) {
        Some(Location { source: Some((path, line)), .. } | Location { path, line, source: None }) => {
            (path.display().to_string(), line)
        }
        None => (filter.to_string(), *line),
    })
}

fn first_place(diagnostics: &Diagnostics) -> Option<Place> {
    let first = diagnostics.items.iter().find(|item| item.severity == Severity::Error)?;
    Some(Place {
        document: c_text(diagnostics.document.clone()),
        line: first.place.line,
        column: first.place.column,
        length: first.length,
    })
}

fn item(diagnostic: &Diagnostic) -> Item {
    Item {
        severity: match diagnostic.severity {
            Severity::Warning => nwf_severity::NWF_WARNING,
            Severity::Error => nwf_severity::NWF_ERROR,
        },
        line: diagnostic.place.line,
        column: diagnostic.place.column,
        length: diagnostic.length,
        code: c_text(diagnostic.code.to_string()),
        message: c_text(diagnostic.message.clone()),
        help: diagnostic.help.clone().map(c_text),
    }
}

/// What kind of error it is; NWF_OK if the error is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_code(error: *const nwf_error) -> nwf_code {
    // SAFETY: by the contract of the header a handle is null or valid.
    unsafe { error.as_ref() }.map_or(nwf_code::NWF_OK, |error| error.code)
}

/// What went wrong, and its bytes in *length unless that is null. The text is there until the error is freed. Null if the
/// error is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_message(error: *const nwf_error, length: *mut usize) -> *const c_char {
    // SAFETY: by the contract of the header a handle is null or valid.
    let error = unsafe { error.as_ref() };
    // SAFETY: `length` can be written if it is not null.
    unsafe { hand_out(error.map(|error| &error.message), length) }
}

/// How many causes the error has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_cause_count(error: *const nwf_error) -> usize {
    // SAFETY: by the contract of the header a handle is null or valid.
    unsafe { error.as_ref() }.map_or(0, |error| error.causes.len())
}

/// A cause of the error: number 0 is that of the message, number 1 the cause of that. Null where there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_cause(
    error: *const nwf_error,
    number: usize,
    length: *mut usize,
) -> *const c_char {
    // SAFETY: by the contract of the header a handle is null or valid.
    let error = unsafe { error.as_ref() };
    // SAFETY: `length` can be written if it is not null.
    unsafe { hand_out(error.and_then(|error| error.causes.get(number)), length) }
}

/// Where the text is that the error is about: 1 if *place is filled, 0 if no place is known or size is not set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_place(error: *const nwf_error, place: *mut nwf_place) -> i32 {
    // SAFETY: by the contract of the header a handle is null or valid.
    let Some(found) = (unsafe { error.as_ref() }).and_then(|error| error.place.as_ref()) else { return 0 };
    let value = nwf_place {
        size: 0,
        document: found.document.as_ptr(),
        document_length: found.document.count_bytes(),
        line: found.line,
        column: found.column,
        length: found.length,
        reserved: 0,
    };
    // SAFETY: by the contract of the header the structure begins with its size and can be written.
    i32::from(unsafe { input::fill(place, value, "place") }.is_ok())
}

/// How many problems of the document the error has; 0 unless its code is NWF_INVALID_DOCUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_diagnostic_count(error: *const nwf_error) -> usize {
    // SAFETY: by the contract of the header a handle is null or valid.
    unsafe { error.as_ref() }.map_or(0, |error| error.diagnostics.len())
}

/// A problem of the document, in the order of the document, from 0: 1 if *diagnostic is filled, 0 if there is none of that
/// number or size is not set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_diagnostic(
    error: *const nwf_error,
    number: usize,
    diagnostic: *mut nwf_diagnostic,
) -> i32 {
    // SAFETY: by the contract of the header a handle is null or valid.
    let Some(item) = (unsafe { error.as_ref() }).and_then(|error| error.diagnostics.get(number)) else {
        return 0;
    };
    let value = nwf_diagnostic {
        size: 0,
        code: item.code.as_ptr(),
        code_length: item.code.count_bytes(),
        message: item.message.as_ptr(),
        message_length: item.message.count_bytes(),
        help: item.help.as_ref().map_or(ptr::null(), |help| help.as_ptr()),
        help_length: item.help.as_ref().map_or(0, |help| help.count_bytes()),
        severity: item.severity as i32,
        line: item.line,
        column: item.column,
        length: item.length,
    };
    // SAFETY: by the contract of the header the structure begins with its size and can be written.
    i32::from(unsafe { input::fill(diagnostic, value, "diagnostic") }.is_ok())
}

/// Frees an error; nothing if it is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_error_free(error: *mut nwf_error) {
    // SAFETY: by the contract of the header the handle is null, or valid and freed once.
    unsafe { call::free(error, drop) }
}
