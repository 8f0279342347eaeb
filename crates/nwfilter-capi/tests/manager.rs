//! The manager in C: built by pkg-config alone, without a kernel, with one, and under checkers of memory.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};

use common::Installed;
use nwfilter_testlab::{Host, Need, skip_unless};

mod common;

const PORTS: [&str; 6] = ["tap0", "52:54:00:00:00:01", "10.0.0.1", "tap1", "52:54:00:00:00:02", "10.0.0.2"];

/// Runs a manager to its end, and checks what it told.
fn run(installed: &Installed, mut command: Command, backend: &str) {
    installed.describe(&mut command);
    let store = tempfile::tempdir().unwrap();
    command.arg(store.path()).arg(backend).args(PORTS).stdin(Stdio::null());
    let output = command.output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{said}{errors}", output.status);
    let events = ["filter-defined web-server", "binding-created tap0", "binding-created tap1"];
    let told = events.into_iter().chain(["binding-deleted tap0", "binding-deleted tap1"]);
    for event in told {
        assert_eq!(said.lines().filter(|line| *line == event).count(), 1, "{event}: {said}{errors}");
    }
    assert!(said.contains(&format!("the guest may run, filtered by {backend}\n")), "{said}");
}

#[test]
fn a_manager_in_c_is_built_by_pkg_config_alone_and_runs_without_root() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"));
    let installed = Installed::new();
    let manager = installed.compile("examples/manager.c", &[]);
    run(&installed, Command::new(&manager), "fake");
    let usage = Command::new(&manager).env("LD_LIBRARY_PATH", installed.lib()).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_manager_in_c_filters_two_ports_of_a_host() {
    skip_unless!(
        Need::Root,
        Need::Tool("gcc"),
        Need::Tool("pkg-config"),
        Need::Tool("iptables-restore"),
        Need::Tool("ebtables-restore"),
    );
    let installed = Installed::new();
    let manager = installed.compile("examples/manager.c", &[]);
    let host = Host::new().unwrap();
    let _taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    run(&installed, host.command(&manager), "xtables");
    assert!(host.saved().unwrap().port("tap0").is_empty());
}

#[test]
fn a_manager_in_c_leaks_nothing_and_accesses_nothing_invalid() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"), Need::Tool("valgrind"));
    let installed = Installed::new();
    let manager = installed.compile("examples/manager.c", &["-fsanitize=address,undefined"]);
    let mut command = Command::new(&manager);
    command.env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0");
    run(&installed, command, "fake");
    let manager = installed.compile("examples/manager.c", &[]);
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
    valgrind.arg(&manager);
    run(&installed, valgrind, "fake");
}
