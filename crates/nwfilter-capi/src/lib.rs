//! libnwfilter: [`nwfilter::Driver`] for C, and for every language that calls C.
//!
//! The functions are documented in `include/nwfilter.h`, which is made of this crate. docs/c.md says how to build and link
//! with it. The crate exists for its C interface; a program in Rust uses [`nwfilter`] itself.
//!
//! Every function does three things: it checks its arguments (`input`), calls the driver, and turns what comes back,
//! a panic included, into a code and a handle (`call`). `unsafe` is in this crate only, where pointers of the caller are
//! read and written. What the caller promises about them is said once, at the top of the header.

#![allow(non_camel_case_types)] // The names are C's.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::invalid_html_tags)] // The comments are those of the C header.
#![allow(clippy::missing_safety_doc)] // The contract of all functions is at the top of the header.

mod backend;
mod call;
mod code;
mod driver;
mod error;
mod event;
mod input;
mod json;
mod options;
mod set;
mod text;
mod transaction;

pub use code::*;
pub use driver::*;
pub use error::*;
pub use event::*;
pub use input::NWF_ZERO_TERMINATED;
pub use options::*;
pub use set::*;
pub use text::*;
pub use transaction::*;

/// The version of this interface. It is raised when a symbol, a type or a number changes or goes away, and is the number
/// in the name of the shared library.
pub const NWF_ABI_VERSION: u32 = 1;

/// The version of the interface that the loaded library has: NWF_ABI_VERSION when it was built.
#[unsafe(no_mangle)]
pub extern "C" fn nwf_abi_version() -> u32 {
    NWF_ABI_VERSION
}

/// The version of the loaded library, such as "0.1.0". The text is part of the library.
#[unsafe(no_mangle)]
pub extern "C" fn nwf_version() -> *const std::ffi::c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
