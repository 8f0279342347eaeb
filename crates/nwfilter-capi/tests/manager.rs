//! The managers in C, Go and Python: built by pkg-config alone, without a kernel, with one, and under checkers of memory.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Installed, checked};
use nwfilter_testlab::{Host, Need, skip_unless};

mod common;

const PORTS: [&str; 6] = ["tap0", "52:54:00:00:00:01", "10.0.0.1", "tap1", "52:54:00:00:00:02", "10.0.0.2"];

const IPTABLES: Need = Need::Tool("iptables-restore");
const EBTABLES: Need = Need::Tool("ebtables-restore");
/// The interpreter that Debian's packages for Python are for, which need not be the first on the PATH.
const PYTHON: &str = "/usr/bin/python3";
const PYTHON_CFFI: Need = Need::File("/usr/lib/python3/dist-packages/cffi/__init__.py");

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
fn a_manager_in_c_is_linked_with_the_static_library() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"));
    let installed = Installed::new();
    let manager = installed.dir().join("static-manager");
    let mut gcc = Command::new("gcc");
    gcc.args(installed.pkg_config(&["--cflags"])).arg(crate_dir().join("examples/manager.c"));
    let libraries = installed.pkg_config(&["--static", "--libs"]);
    let library = installed.lib().join("libnwfilter.a").display().to_string();
    gcc.args(libraries.iter().map(|name| if name == "-lnwfilter" { &library } else { name }));
    checked(gcc.arg("-o").arg(&manager));
    let needed = checked(Command::new("objdump").arg("-p").arg(&manager));
    assert!(!needed.contains("libnwfilter"), "{needed}");
    run(&installed, Command::new(&manager), "fake");
}

#[test]
fn a_manager_in_c_filters_two_ports_of_a_host() {
    skip_unless!(Need::Root, Need::Tool("gcc"), Need::Tool("pkg-config"), IPTABLES, EBTABLES,);
    let installed = Installed::new();
    let manager = installed.compile("examples/manager.c", &[]);
    let host = Host::new().unwrap();
    let _taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    run(&installed, host.command(&manager), "xtables");
    assert!(host.saved().unwrap().port("tap0").is_empty());
}

#[test]
fn a_manager_in_go_is_built_by_cgo_and_pkg_config_and_runs_without_root() {
    skip_unless!(Need::Tool("gcc"), Need::Tool("pkg-config"), Need::Tool("go"));
    let installed = Installed::new();
    let manager = go_manager(&installed);
    run(&installed, Command::new(manager), "fake");
}

#[test]
fn a_manager_in_go_filters_two_ports_of_a_host() {
    skip_unless!(
        Need::Root,
        Need::Tool("gcc"),
        Need::Tool("pkg-config"),
        Need::Tool("go"),
        IPTABLES,
        EBTABLES
    );
    let installed = Installed::new();
    let manager = go_manager(&installed);
    let host = Host::new().unwrap();
    let _taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    run(&installed, host.command(&manager), "xtables");
}

fn go_manager(installed: &Installed) -> PathBuf {
    let (sources, manager) = (crate_dir().join("examples/go"), installed.dir().join("go-manager"));
    let mut go = Command::new("go");
    installed.describe(&mut go);
    // Nothing is fetched, and what is cached goes with the directory.
    go.env("GOFLAGS", "-mod=mod").env("GOPROXY", "off").env("GOCACHE", installed.dir().join("go-cache"));
    checked(go.arg("build").arg("-o").arg(&manager).arg(".").current_dir(sources));
    manager
}

#[test]
fn a_manager_in_python_runs_without_root() {
    skip_unless!(PYTHON_CFFI);
    run(&Installed::new(), python("examples/manager.py"), "fake");
}

#[test]
fn a_manager_in_python_filters_two_ports_of_a_host() {
    skip_unless!(Need::Root, PYTHON_CFFI, IPTABLES, EBTABLES);
    let host = Host::new().unwrap();
    let _taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    let python = python("examples/manager.py");
    let mut command = host.command(PYTHON);
    command.args(python.get_args()).env("PYTHONPATH", package().join("src"));
    run(&Installed::new(), command, "xtables");
}

#[test]
fn the_python_package_passes_its_own_tests() {
    skip_unless!(PYTHON_CFFI);
    let (installed, mut python) = (Installed::new(), python("tests/test_nwfilter.py"));
    installed.describe(&mut python);
    checked(&mut python);
}

#[test]
fn the_python_package_is_installed_with_the_header_by_setuptools_alone() {
    skip_unless!(PYTHON_CFFI);
    let (installed, target) = (Installed::new(), tempfile::tempdir().unwrap());
    // Setuptools writes beside the sources.
    let copy = target.path().join("python");
    checked(Command::new("cp").arg("-rL").arg(package()).arg(&copy));
    let build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))";
    let said = checked(Command::new(PYTHON).args(["-c", build]).current_dir(&copy));
    let wheel = copy.join(said.lines().last().unwrap());
    let mut import = Command::new(PYTHON);
    installed.describe(&mut import);
    import.args(["-c", "import nwfilter; print(nwfilter.__file__, nwfilter.version())"]);
    let unpacked = target.path().join("unpacked");
    checked(Command::new(PYTHON).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked));
    let said = checked(import.env("PYTHONPATH", &unpacked).current_dir("/"));
    let expected =
        format!("{} {}\n", unpacked.join("nwfilter/__init__.py").display(), env!("CARGO_PKG_VERSION"));
    assert_eq!(said, expected);
}

/// A program of the package, with the Python that Debian's cffi is for.
fn python(program: &str) -> Command {
    let mut python = Command::new(PYTHON);
    python.args(["-B", "-W", "error"]).arg(package().join(program)).env("PYTHONPATH", package().join("src"));
    python
}

fn package() -> PathBuf {
    crate_dir().join("../../python")
}

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
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
