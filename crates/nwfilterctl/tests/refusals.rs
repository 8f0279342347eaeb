//! What the host does not let the command line do: write its output, read the stores, lock them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::fcntl::{Flock, FlockArg};
use nwfilter_testlab::{Need, skip_unless};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_nwfilterctl");
const FILTER: &str = "<filter name='f'><rule action='drop' direction='inout'/></filter>";
const NOBODY: u32 = 65534;

fn command(program: &Path, dir: &TempDir, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(dir: &TempDir, args: &[&str]) -> Output {
    command(Path::new(PROGRAM), dir, args).output().unwrap()
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

/// A pipe that nobody reads.
fn closed() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

#[test]
fn an_output_that_is_closed_or_full_is_an_error_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f.xml"), FILTER).unwrap();
    for args in
        [&["list"][..], &["list", "--json"], &["define", "f.xml"], &["fmt", "f.xml"], &["check", "f.xml"]]
    {
        for (stdout, why) in
            [(Stdio::from(full()), "No space left on device"), (Stdio::from(closed()), "Broken pipe")]
        {
            let output = command(Path::new(PROGRAM), &dir, args).stdout(stdout).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
            let expected = "error: the verb is done, but its output cannot be written\n  because: ";
            assert!(said.starts_with(expected) && said.contains(why), "{said}");
        }
    }
    assert!(dir.path().join("etc/f.xml").exists());
}

#[test]
fn a_closed_stderr_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f.xml"), FILTER.replace("<rule", "<rule prio='1'")).unwrap();
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/broken.xml"), "<filter").unwrap();
    for args in [["list", "--json"], ["define", "f.xml"], ["fmt", "f.xml"], ["check", "f.xml"]] {
        let status = command(Path::new(PROGRAM), &dir, &args).stdout(Stdio::null()).stderr(full()).status();
        assert!(status.unwrap().success(), "{args:?}");
    }
    let status = command(Path::new(PROGRAM), &dir, &["dumpxml", "none"]).stderr(full()).status();
    assert_eq!(status.unwrap().code(), Some(1));
}

#[test]
fn warnings_are_not_printed_when_only_errors_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f.xml"), FILTER.replace("<rule", "<rule prio='1'")).unwrap();
    let said = |args: &[&str]| {
        let output = run(&dir, args);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said(&["fmt", "f.xml"]).contains("warning[NWF0027]"));
    assert_eq!(said(&["fmt", "f.xml", "-q"]), "");
    assert_eq!(run(&dir, &["list", "-q", "-v"]).status.code(), Some(2));
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/broken.xml"), "<filter").unwrap();
    assert!(said(&["list", "-q"]).contains("is damaged"), "an error is an error");
}

#[test]
fn a_user_who_may_not_read_the_stores_gets_one_error() {
    skip_unless!(Need::Root);
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("nwfilterctl");
    // By another process: a test that forks meanwhile would keep the copy open, and what is open for writing cannot run.
    assert!(Command::new("cp").arg(PROGRAM).arg(&program).status().unwrap().success());
    for directory in ["etc", "run"] {
        fs::create_dir(dir.path().join(directory)).unwrap();
        for name in ["a", "b"] {
            let file = dir.path().join(format!("{directory}/{name}.xml"));
            fs::write(&file, FILTER.replace("'f'", &format!("'{name}'"))).unwrap();
            fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        }
    }
    for path in [dir.path().to_owned(), dir.path().join("etc"), dir.path().join("run"), program.clone()] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let run = |args: &[&str]| {
        let output = command(&program, &dir, args).uid(NOBODY).gid(NOBODY).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{args:?}: {said}");
        assert_eq!(said.matches("error:").count(), 1, "{said}");
        assert!(said.contains("Permission denied") && said.ends_with("  help: run it as root\n"), "{said}");
        said
    };
    for verb in ["list", "binding-list", "diff", "reload"] {
        assert!(run(&[verb]).contains("cannot read etc/"));
    }
    let checked = dir.path().join("check.xml");
    fs::write(&checked, "<filter name='c'><filterref filter='allow-arp'/></filter>").unwrap();
    fs::set_permissions(&checked, Permissions::from_mode(0o644)).unwrap();
    let checked = command(&program, &dir, &["check", "check.xml"]).uid(NOBODY).gid(NOBODY).output().unwrap();
    let said = String::from_utf8(checked.stderr).unwrap();
    assert!(checked.status.success() && said.matches("Permission denied").count() == 1, "{said}");

    fs::set_permissions(dir.path().join("etc"), Permissions::from_mode(0o700)).unwrap();
    for verb in ["list", "binding-list"] {
        assert!(run(&[verb]).starts_with("error: cannot open the stores\n"));
    }
}

#[test]
fn a_wait_for_the_lock_names_its_holder_and_can_be_given_up() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f.xml"), FILTER).unwrap();
    fs::create_dir(dir.path().join("run")).unwrap();
    let file = File::create(dir.path().join("run/.lock")).unwrap();
    let held = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    let holder = format!("(process {})", std::process::id());

    assert!(run(&dir, &["list"]).status.success(), "looking needs no lock");
    let refused = run(&dir, &["define", "f.xml", "--timeout", "0"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: run/.lock is held by ") && said.contains(&holder), "{said}");
    assert!(!dir.path().join("etc").exists());

    let mut waiting = command(Path::new(PROGRAM), &dir, &["define", "f.xml"]);
    let mut waiting = waiting.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(waiting.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("waiting for run/.lock") && line.contains(&holder), "{line}");
    drop(held);
    assert!(waiting.wait().unwrap().success());
    assert!(dir.path().join("etc/f.xml").exists());
}
