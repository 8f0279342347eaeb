//! `cargo xtask vm`: a virtual machine with Debian's own kernel, which has what the kernel of a test machine may lack.

mod image;
mod machine;
mod suites;

use std::env;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Subcommand;

use crate::interrupt::interruptible;
use crate::package;
pub(crate) use image::Image;
pub(crate) use machine::Job;

/// Seconds that the tests in the machine may take.
const TEST_TIMEOUT: u64 = 15 * 60;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Build kernel, initramfs and root image, where they are not in the cache
    Build,
    /// Print the directory that they are in
    Path,
    /// Remove everything from the cache
    Clean,
    /// Run a command as root in the machine, in the directory /job; its exit status is this command's
    Run {
        /// A file or directory that is to be there: SOURCE, for /job/NAME, or SOURCE:/TARGET
        #[arg(long = "file", value_name = "SOURCE[:TARGET]")]
        files: Vec<String>,
        /// After how many seconds the machine is stopped
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// On a host with systemd, libvirt and QEMU, when its services have started
        #[arg(long)]
        host: bool,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Install the Debian packages on a host with systemd and libvirt, run services and guests
    Packages,
    /// Run the tests that are made for the machine: the targets vm_*, and some others
    Test {
        /// Only these targets, whatever they are made for
        targets: Vec<String>,
        /// After how many seconds the machine is stopped
        #[arg(long, default_value_t = TEST_TIMEOUT)]
        timeout: u64,
        /// Arguments for the test programs
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

pub(crate) fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Build => interruptible(|| {
            println!("{}", Image::ensure()?.dir().display());
            Ok(ExitCode::SUCCESS)
        }),
        Verb::Path => {
            println!("{}", Image::wanted()?.dir().display());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Clean => image::clean().map(|()| ExitCode::SUCCESS),
        Verb::Test { targets, timeout, arguments } => {
            interruptible(move || suites::run(&targets, &arguments, Duration::from_secs(timeout)))
        }
        Verb::Packages => package::run_booted(),
        Verb::Run { files, timeout, host, command } => interruptible(move || {
            let mut job = Job::new(Duration::from_secs(timeout));
            for file in files {
                let (source, target) = source_and_target(&file)?;
                job.add(source, target);
            }
            let image = if host { Image::ensure_host()? } else { Image::ensure()? };
            job.run(&image, &quoted(&command), to_stdout).map(ExitCode::from)
        }),
    }
}

/// Runs the demonstration in the machine.
pub(crate) fn demo() -> Result<ExitCode> {
    interruptible(|| {
        let mut job = Job::new(Duration::from_secs(600));
        job.add(env::current_exe()?, "/job/xtask");
        job.run(&Image::ensure()?, "./xtask demo", to_stdout).map(ExitCode::from)
    })
}

/// Runs the tests that are made for the machine. Where there can be none, says so, which is a failure with NWFILTER_NO_SKIP.
pub(crate) fn test_or_skip() -> Result<ExitCode> {
    if let Err(reason) = Image::ensure() {
        let must = env::var_os("NWFILTER_NO_SKIP").is_some_and(|value| value == "1");
        ensure!(!must, "NWFILTER_NO_SKIP is set, yet there is no virtual machine: {reason:#}");
        println!("skipped: the tests in the virtual machine: {reason:#}");
        return Ok(ExitCode::SUCCESS);
    }
    interruptible(|| suites::run(&[], &[], Duration::from_secs(TEST_TIMEOUT)))
}

/// Passes on what the machine prints.
pub(crate) fn to_stdout(output: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(output)?;
    Ok(stdout.flush()?)
}

fn source_and_target(file: &str) -> Result<(PathBuf, PathBuf)> {
    if let Some((source, target)) = file.split_once(":/") {
        return Ok((source.into(), PathBuf::from("/").join(target)));
    }
    let source = PathBuf::from(file);
    let name = source.file_name().with_context(|| format!("{file} has no name"))?;
    let target = PathBuf::from("/job").join(name);
    Ok((source, target))
}

/// The words as one line for a shell.
pub(crate) fn quoted(words: &[String]) -> String {
    words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        let words = ["echo", "a b", "it's"].map(String::from);
        assert_eq!(quoted(&words), r"'echo' 'a b' 'it'\''s'");
    }

    #[test]
    fn a_file_lands_in_the_job_directory_unless_a_target_is_given() {
        let target = |file| source_and_target(file).map(|(_, target)| target.display().to_string()).ok();
        assert_eq!(target("some/dir/name"), Some("/job/name".to_owned()));
        assert_eq!(target("name:/etc/other"), Some("/etc/other".to_owned()));
        assert_eq!(target("/"), None);
    }
}
