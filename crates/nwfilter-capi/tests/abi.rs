//! The interface is the recorded one: abi/VERSION.txt for people, abi/VERSION.abi for abidiff.
//!
//! What is recorded for a version never changes. What is added is recorded by NWFILTER_BLESS=1; anything else takes a new
//! version: NWF_ABI_VERSION, `build.rs`, `Cargo.toml` and `xtask/src/install_capi.rs`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::checked;
use nwfilter_capi::NWF_ABI_VERSION;
use nwfilter_testlab::{Need, skip_unless};

mod common;

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn recorded(extension: &str) -> PathBuf {
    crate_dir().join(format!("abi/{NWF_ABI_VERSION}.{extension}"))
}

fn blesses() -> bool {
    std::env::var_os("NWFILTER_BLESS").is_some_and(|value| value == "1")
}

/// The header without comments and directives, a declaration a line.
fn declarations() -> Vec<String> {
    let header = fs::read_to_string(crate_dir().join("include/nwfilter.h")).unwrap();
    let is_code =
        |line: &&str| !line.trim_start().starts_with(['*', '/', '#']) && !line.contains("extern \"C\"");
    let mut declarations = vec![String::new()];
    let mut depth = 0;
    for line in header.lines().filter(is_code) {
        let last = declarations.last_mut().unwrap();
        writeln!(last, "{}", line.trim()).unwrap();
        depth += line.matches('{').count();
        depth -= line.matches('}').count();
        if depth == 0 && line.trim_end().ends_with(';') {
            *last = last.split_whitespace().collect::<Vec<_>>().join(" ");
            declarations.push(String::new());
        }
    }
    declarations
}

/// The prototypes of all functions.
fn prototypes() -> Vec<String> {
    let declarations = declarations();
    let is_function = |text: &&String| text.contains("(") && !text.contains('{');
    declarations.iter().filter(is_function).map(|text| text.trim_end_matches(';').to_owned()).collect()
}

/// What programs depend on, a fact a line.
fn interface() -> String {
    let header = fs::read_to_string(crate_dir().join("include/nwfilter.h")).unwrap();
    let mut facts = String::new();
    for line in header.lines().filter(|line| line.starts_with("#define NWF_")) {
        writeln!(facts, "{line}").unwrap();
    }
    let mut program = "#include <nwfilter.h>\n#include <stdio.h>\nint main(void) {\n".to_owned();
    for text in declarations() {
        let Some((head, body)) = text.split_once(" { ") else { continue };
        let body = body.split_once('}').unwrap().0;
        if let Some(name) = head.strip_prefix("enum ") {
            let name = name.split(' ').next().unwrap();
            let numbers = body.split(',').map(str::trim).filter(|number| !number.is_empty());
            numbers.for_each(|number| writeln!(facts, "enum {name}: {number}").unwrap());
        } else if let Some(name) = head.strip_prefix("typedef struct ") {
            for field in body.split(';').map(str::trim).filter(|field| !field.is_empty()) {
                let field_name = field.rsplit([' ', '*']).next().unwrap().split('[').next().unwrap();
                writeln!(
                    program,
                    "printf(\"struct {name}: %zu {field}\\n\", offsetof({name}, {field_name}));"
                )
                .unwrap();
            }
        }
    }
    program += "}\n";
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("layout.c"), dir.path().join("layout"));
    fs::write(&source, program).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.arg("-I").arg(crate_dir().join("include")).arg(&source).arg("-o").arg(&binary);
    checked(&mut gcc);
    facts += &checked(&mut Command::new(binary));
    prototypes().iter().for_each(|prototype| writeln!(facts, "{prototype}").unwrap());
    facts
}

/// Panics if the interface lacks anything that is recorded.
fn check_that_nothing_is_gone(interface: &str) {
    let record = fs::read_to_string(recorded("txt")).unwrap_or_default();
    let now: BTreeSet<_> = interface.lines().collect();
    let gone: Vec<_> = record.lines().filter(|fact| !now.contains(fact)).collect();
    assert!(
        gone.is_empty(),
        "programs that were built for version {NWF_ABI_VERSION} of the ABI depend on this:\n{}\n\
         take it back, or raise NWF_ABI_VERSION",
        gone.join("\n")
    );
}

#[test]
fn the_interface_is_the_recorded_one() {
    skip_unless!(Need::Tool("gcc"));
    let (interface, file) = (interface(), recorded("txt"));
    check_that_nothing_is_gone(&interface);
    if blesses() {
        fs::write(&file, &interface).unwrap();
    }
    let is_current = fs::read_to_string(&file).is_ok_and(|record| record == interface);
    assert!(is_current, "the interface has grown: record it by this test with NWFILTER_BLESS=1");
}

#[test]
fn the_shared_library_has_the_functions_of_the_header_and_no_others() {
    skip_unless!(Need::Tool("nm"), Need::Tool("objdump"));
    let library = std::env::current_exe().unwrap().with_file_name("libnwfilter_capi.so");
    let symbols = checked(Command::new("nm").args(["-D", "--defined-only", "-P"]).arg(&library));
    let symbols: BTreeSet<_> = symbols.lines().filter_map(|line| line.split(' ').next()).collect();
    let prototypes = prototypes();
    let functions: BTreeSet<_> = prototypes
        .iter()
        .filter_map(|prototype| prototype.split_once('(')?.0.rsplit([' ', '*']).next())
        .collect();
    assert_eq!(symbols, functions);
    let headers = checked(Command::new("objdump").arg("-p").arg(&library));
    let name = format!("libnwfilter.so.{NWF_ABI_VERSION}");
    let words: Vec<_> = headers.split_whitespace().collect();
    assert!(words.windows(2).any(|pair| pair == ["SONAME", name.as_str()]), "{headers}");
    let manifest = fs::read_to_string(crate_dir().join("Cargo.toml")).unwrap();
    assert!(manifest.contains(&format!("\nversion = \"{NWF_ABI_VERSION}.")), "cargo-c names the library so");
}

/// The types of Rust's debug information are not C's, so abidiff compares functions without a body, of the header's types.
#[test]
fn abidiff_finds_no_change_of_the_recorded_interface() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("abidw"), Need::Tool("abidiff"));
    let dir = tempfile::tempdir().unwrap();
    let (source, library) = (dir.path().join("interface.c"), dir.path().join("libnwfilter.so"));
    let bodies: String =
        prototypes().iter().map(|prototype| format!("{prototype} {{ __builtin_trap(); }}\n")).collect();
    fs::write(&source, format!("#include <nwfilter.h>\n{bodies}")).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-g", "-shared", "-fPIC", "-I"]).arg(crate_dir().join("include")).arg(&source);
    checked(gcc.arg("-o").arg(&library));
    let file = recorded("abi");
    if blesses() {
        check_that_nothing_is_gone(&interface());
        let mut abidw = Command::new("abidw");
        abidw.args(["--no-comp-dir-path", "--no-corpus-path", "--no-show-locs", "--out-file"]).arg(&file);
        checked(abidw.arg(&library));
    }
    let output = Command::new("abidiff").arg("--no-show-locs").arg(&file).arg(&library).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "if it has grown, record the interface by this test with NWFILTER_BLESS=1\n{report}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
