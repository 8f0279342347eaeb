//! Every function with right and wrong arguments, from C, and many threads.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Installed, checked};
use nwfilter_testlab::{Host, Need, skip_unless};
use tempfile::TempDir;

mod common;

/// The functions that the header declares.
fn functions() -> BTreeSet<String> {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/nwfilter.h");
    let header = fs::read_to_string(header).unwrap();
    let code = header.lines().filter(|line| !line.trim_start().starts_with(['*', '/']));
    let names = code.filter_map(|line| {
        let (before, _) = line.split_once('(')?;
        let name = before.rsplit([' ', '*']).next()?;
        name.starts_with("nwf_").then(|| name.to_owned())
    });
    names.collect()
}

/// A directory for a store, in memory where the machine has `/dev/shm`.
fn store() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Runs the program, and gives for each function how often it succeeded and failed.
fn calls(
    installed: &Installed,
    mut command: Command,
    rounds: u32,
    seed: u32,
) -> BTreeMap<String, (u32, u32)> {
    let store = store();
    installed.describe(&mut command);
    command.arg(store.path()).args([rounds.to_string(), seed.to_string()]);
    let said = checked(&mut command);
    let rows = said.lines().map(|line| {
        let mut words = line.split(' ');
        let name = words.next().unwrap().to_owned();
        let mut number = || words.next().unwrap().parse().unwrap();
        (name, (number(), number()))
    });
    rows.collect()
}

#[test]
fn every_function_answers_null_and_random_arguments_with_errors() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"));
    let installed = Installed::new();
    let program = installed.compile("tests/c/contract.c", &["-fsanitize=address,undefined"]);
    let calls = calls(&installed, Command::new(&program), 20_000, 1);
    assert_eq!(calls.keys().cloned().collect::<BTreeSet<_>>(), functions());
    for (name, (succeeded, failed)) in &calls {
        assert!(*succeeded > 0, "{name} never succeeded: {calls:?}");
        let can_fail = name.starts_with("nwf_driver_") || name.starts_with("nwf_transaction_");
        let cannot = ["nwf_transaction_new"];
        assert!(
            *failed > 0 || !can_fail || cannot.contains(&name.as_str()),
            "{name} never failed: {calls:?}"
        );
    }
}

#[test]
fn valgrind_finds_no_invalid_access_and_no_leak_in_any_function() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"), Need::Tool("valgrind"));
    let installed = Installed::new();
    let program = installed.compile("tests/c/contract.c", &[]);
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
    valgrind.arg(&program);
    calls(&installed, valgrind, 1_500, 2);
}

/// Runs eight threads over ports of these names.
fn threads(
    installed: &Installed,
    mut command: Command,
    backend: &str,
    count: u32,
    name: impl Fn(usize) -> String,
) {
    let store = store();
    installed.describe(&mut command);
    command.arg(store.path()).args([backend, &count.to_string()]).args((0..8).map(name));
    assert_eq!(checked(&mut command), format!("{count} operations\n"));
}

#[test]
fn eight_threads_make_ten_thousand_operations_and_every_event_is_told() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"));
    let installed = Installed::new();
    let program = installed.compile("tests/c/threads.c", &[]);
    threads(&installed, Command::new(&program), "fake", 10_016, |number| format!("vnet{number}"));
}

#[test]
fn eight_threads_make_ten_thousand_operations_on_a_kernel() {
    skip_unless!(Need::Root, Need::Tool("gcc"), Need::Tool("pkg-config"));
    let installed = Installed::new();
    let program = installed.compile("tests/c/threads.c", &[]);
    let host = Host::new().unwrap();
    let _taps: Vec<_> = (0..8).map(|number| host.tap(&format!("tap{number}")).unwrap()).collect();
    threads(&installed, host.command(&program), "nftables", 10_016, |number| format!("tap{number}"));
    threads(&installed, host.command(&program), "owner", 1_600, |number| format!("tap{number}"));
}
