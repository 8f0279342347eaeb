//! Test programs of the workspace in the virtual machine: all that are chosen in one boot.

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::machine::checked;
use super::{Image, Job, quoted, to_stdout};

/// Test targets whose names begin so are made for the machine.
const PREFIX: &str = "vm_";

/// Test targets that run in it too, by package and name. Their comparisons with libvirtd are left out: that is slow there, and
/// the test machine has done it.
const ALSO: [(&str, &str); 2] = [("nwfilter", "seed"), ("nwfilter-testlab", "probes")];

/// Variables of the environment that the tests are told.
const PASSED_ON: [&str; 3] = ["NWFILTER_TREES", "NWFILTER_REDEFINITIONS", "NWFILTER_SWITCHES"];

/// A program that cargo built.
struct Program {
    package: PathBuf,
    target: String,
    is_test: bool,
    file: PathBuf,
}

/// Runs the test targets in the machine, or only those that are named; `arguments` are for the test programs.
pub(crate) fn run(named: &[String], arguments: &[String], timeout: Duration) -> Result<ExitCode> {
    let programs = build(named)?;
    let image = Image::ensure()?;
    let stripped = tempfile::tempdir()?;
    let mut script = "export NWFILTER_VM=1 NWFILTER_NO_SKIP=1\nfailed=\n".to_owned();
    for name in PASSED_ON {
        if let Ok(value) = env::var(name) {
            writeln!(script, "export {name}={}", quoted(&[value]))?;
        }
    }
    let mut job = Job::new(timeout);
    for (number, program) in programs.iter().enumerate() {
        let file = stripped.path().join(number.to_string());
        checked(Command::new("strip").arg("--strip-debug").arg("-o").arg(&file).arg(&program.file))?;
        job.add(file, &program.file);
        if program.is_test {
            let package = program.package.file_name().unwrap_or_default().to_string_lossy();
            let name = format!("{package}/{}", program.target);
            let dir = program.package.display();
            let mut command = vec![program.file.display().to_string()];
            command.extend_from_slice(arguments);
            if named.is_empty() && !program.target.starts_with(PREFIX) {
                command.extend(["--skip", "libvirt"].map(String::from));
            }
            writeln!(script, "echo; echo '     Running {name} in the virtual machine'; mkdir -p '{dir}'")?;
            writeln!(script, "(cd '{dir}' && {}) || failed=\"$failed {name}\"", quoted(&command))?;
        }
    }
    script += "[ -z \"$failed\" ] || { echo; echo \"failed in the virtual machine:$failed\"; exit 1; }\n";
    let fixtures = workspace()?.join("xml-fixtures");
    job.add(&fixtures, &fixtures);
    job.run(&image, &script, to_stdout).map(ExitCode::from)
}

/// Builds the test programs, and the programs of the packages they are of.
fn build(named: &[String]) -> Result<Vec<Program>> {
    let also = ALSO.map(|(_, target)| target);
    let targets: BTreeSet<&str> = match named {
        [] => [also.as_slice(), &["vm_*"]].concat().into_iter().collect(),
        named => named.iter().map(String::as_str).collect(),
    };
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    targets.iter().for_each(|target| {
        cargo.args(["--test", target]);
    });
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the tests for the virtual machine do not build");
    let text = String::from_utf8(output.stdout)?;
    let mut programs: Vec<_> =
        text.lines().filter_map(program).filter(|program| is_chosen(program, named)).collect();
    // Others load br_netfilter, which those that are made for the machine do without.
    programs.sort_by_key(|program| (!program.target.starts_with(PREFIX), program.target.clone()));
    ensure!(programs.iter().any(|program| program.is_test), "there are no such tests");
    Ok(programs)
}

/// The program that a message of cargo is about.
fn program(message: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(message).ok()?;
    let kinds = message["target"]["kind"].as_array()?;
    Some(Program {
        package: Path::new(message["manifest_path"].as_str()?).parent()?.to_owned(),
        target: message["target"]["name"].as_str()?.to_owned(),
        is_test: kinds.iter().any(|kind| kind == "test"),
        file: message["executable"].as_str()?.into(),
    })
}

fn is_chosen(program: &Program, named: &[String]) -> bool {
    let also = || {
        ALSO.iter().any(|(package, target)| program.package.ends_with(package) && program.target == *target)
    };
    !program.is_test || !named.is_empty() || program.target.starts_with(PREFIX) || also()
}

fn workspace() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here.parent().context("xtask is not in a workspace")?.to_owned())
}
