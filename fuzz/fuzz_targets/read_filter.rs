//! Whatever a document holds, reading it ends and does not panic, its diagnostics point inside it, and what it says is
//! the same after it was written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/nwfilter-xml/tests/common/invariants.rs"]
mod invariants;

fuzz_target!(|data: &[u8]| {
    invariants::hold(&String::from_utf8_lossy(data));
});
