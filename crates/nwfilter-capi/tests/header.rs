//! The header is made of the sources, and is C and C++ that compiles without a warning.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use nwfilter_testlab::{Need, skip_unless};

#[test]
fn the_header_says_what_the_sources_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(root).with_config(config).generate().unwrap();
    let mut made = Vec::new();
    bindings.write(&mut made);
    let (made, file) = (String::from_utf8(made).unwrap(), root.join("include/nwfilter.h"));
    if std::env::var_os("NWFILTER_BLESS").is_some_and(|value| value == "1") {
        fs::write(&file, &made).unwrap();
    }
    let is_current = fs::read_to_string(&file).is_ok_and(|header| header == made);
    assert!(is_current, "include/nwfilter.h is out of date: run this test with NWFILTER_BLESS=1");
}

#[test]
fn the_header_compiles_alone_as_c() {
    skip_unless!(Need::Tool("gcc"));
    compile("gcc", "c");
}

#[test]
fn the_header_compiles_alone_as_cpp() {
    skip_unless!(Need::Tool("g++"));
    compile("g++", "c++");
}

fn compile(compiler: &str, language: &str) {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/nwfilter.h");
    let flags = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic", "-x", language];
    let compiled = Command::new(compiler).args(flags).arg(&header).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}
