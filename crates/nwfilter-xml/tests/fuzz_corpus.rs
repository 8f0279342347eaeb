//! The seeds of the fuzz target, without the fuzzer.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

#[path = "common/invariants.rs"]
mod invariants;

use std::path::Path;

#[test]
fn every_seed_of_the_fuzzer_is_read_without_a_panic() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/read_filter");
    let mut documents = 0;
    for entry in std::fs::read_dir(seeds).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        invariants::hold(&String::from_utf8_lossy(&bytes));
        documents += 1;
    }
    assert!(documents > 20, "{documents}");
}
