//! Runs a program of the host with a deadline, in an environment and a process group of its own.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};

/// The search path for programs, and their `PATH`: that of systemd's services. The caller's own `PATH` is not used, because a
/// daemon, a shell and `sudo` differ.
pub const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long to wait for a killed program to end.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Why a program has no output.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No directory of [`SEARCH_PATH`] has it.
    #[error("not found in {SEARCH_PATH}")]
    NotFound,
    /// It or a child of it still held its output open at the deadline. All were killed.
    #[error("no answer within {} s, so it was killed", .0.as_secs())]
    Late(Duration),
    /// It cannot be run, or its pipes fail.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs a program to its end and returns what it wrote.
///
/// It is looked for in [`SEARCH_PATH`]. Its environment is `PATH` and `LC_ALL=C` and nothing else. It leads a process
/// group, which is killed as a whole if the program or a child of it is not done after `patience`; the call then returns
/// in any case. `started` gets the process id before the program reads input.
pub fn run(
    patience: Duration,
    program: &str,
    args: &[&str],
    input: Option<&str>,
    started: impl FnOnce(u32),
) -> Result<Output, Failure> {
    let deadline = Instant::now() + patience;
    let mut child = Command::new(find(program).ok_or(Failure::NotFound)?)
        .args(args)
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("LC_ALL", "C")
        .process_group(0)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    started(child.id());
    let finished = talk(&mut child, input.unwrap_or_default(), deadline).and_then(|said| {
        let Some((stdout, stderr)) = said else { return Ok(None) };
        Ok(wait_until(deadline, &mut child)?.map(|status| Output { status, stdout, stderr }))
    });
    match finished {
        Ok(Some(output)) => Ok(output),
        Ok(None) => {
            kill(child);
            Err(Failure::Late(patience))
        }
        Err(error) => {
            kill(child);
            Err(error.into())
        }
    }
}

/// The executable file of a program's name.
fn find(program: &str) -> Option<PathBuf> {
    let files = SEARCH_PATH.split(':').map(|dir| Path::new(dir).join(program));
    files.into_iter().find(|file| file.is_file() && access(file, AccessFlags::X_OK).is_ok())
}

/// Serves the three pipes of a child at the same time, because the child may write before it has read everything. `None`
/// if a pipe is still open at the deadline.
fn talk(child: &mut Child, input: &str, deadline: Instant) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
    let mut stdin = child.stdin.take().map(|pipe| pipe_of(pipe.into())).transpose()?;
    let mut stdout = child.stdout.take().map(|pipe| pipe_of(pipe.into())).transpose()?;
    let mut stderr = child.stderr.take().map(|pipe| pipe_of(pipe.into())).transpose()?;
    let (mut input, mut said) = (input.as_bytes(), (Vec::new(), Vec::new()));
    while stdout.is_some() || stderr.is_some() {
        if !wait_for(
            &[(&stdin, PollFlags::POLLOUT), (&stdout, PollFlags::POLLIN), (&stderr, PollFlags::POLLIN)],
            deadline,
        )? {
            return Ok(None);
        }
        write_to(&mut stdin, &mut input);
        read_from(&mut stdout, &mut said.0)?;
        read_from(&mut stderr, &mut said.1)?;
    }
    Ok(Some(said))
}

/// A non-blocking pipe.
fn pipe_of(pipe: OwnedFd) -> io::Result<File> {
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(File::from(pipe))
}

/// Waits until a pipe is ready. Returns whether one was before the deadline.
fn wait_for(pipes: &[(&Option<File>, PollFlags)], deadline: Instant) -> io::Result<bool> {
    let open = pipes.iter().filter_map(|(pipe, flags)| Some(PollFd::new(pipe.as_ref()?.as_fd(), *flags)));
    let mut open: Vec<_> = open.collect();
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(false);
    }
    // A millisecond more, so that the deadline has passed when the wait ends.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut open, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Writes as much as the pipe takes, and closes it after the last byte. A program that refuses a line stops reading and
/// explains it on stderr.
fn write_to(pipe: &mut Option<File>, input: &mut &[u8]) {
    while let Some(open) = pipe {
        match open.write(input) {
            Ok(written) if written < input.len() => *input = &input[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => (),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Ok(_) | Err(_) => *pipe = None,
        }
    }
}

/// Reads what is available, and closes the pipe at end of file.
fn read_from(pipe: &mut Option<File>, text: &mut Vec<u8>) -> io::Result<()> {
    let Some(open) = pipe else { return Ok(()) };
    match open.read_to_end(text) {
        Ok(_) => *pipe = None,
        Err(error) if error.kind() == ErrorKind::WouldBlock => (),
        Err(error) => return Err(error),
    }
    Ok(())
}

/// The exit status of a child. `None` if it still runs at the deadline.
fn wait_until(deadline: Instant, child: &mut Child) -> io::Result<Option<ExitStatus>> {
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// Kills the process group of a child. If the child does not end soon, a thread waits for it.
fn kill(mut child: Child) {
    // Until the child is waited for, its process group id cannot be reused.
    if let Err(errno) = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL) {
        log::warn!("process group {} cannot be killed: {errno}", child.id());
    }
    if !matches!(wait_until(Instant::now() + LAST_WAIT, &mut child), Ok(Some(_))) {
        // Without the thread it stays a zombie, which holds no resources.
        let _ = thread::Builder::new().spawn(move || child.wait());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// How long a call may take that returns at once unless it hangs.
    const HANG: Duration = Duration::from_secs(30);

    /// Runs a program on a thread of its own, so that a call that hangs fails the test.
    fn run_within(patience: Duration, script: &'static str) -> Result<Output, Failure> {
        let (sender, result) = channel();
        thread::spawn(move || sender.send(run(patience, "sh", &["-c", script], None, |_| ())));
        result.recv_timeout(HANG).expect("the call does not return")
    }

    fn processes_in_group(group: u32) -> usize {
        let group = group.to_string();
        let stats = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let text = std::fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
            let fields: Vec<_> = text.rsplit_once(") ")?.1.split(' ').map(str::to_owned).collect();
            (fields[2] == group && fields[0] != "Z").then_some(())
        });
        stats.count()
    }

    #[test]
    fn a_program_whose_child_keeps_the_pipe_is_killed_with_the_child_at_the_deadline() {
        let (sender, result) = channel();
        thread::spawn(move || {
            let mut group = 0;
            let args = ["-c", "sleep 100000; true"];
            let output = run(Duration::from_millis(50), "sh", &args, None, |process| group = process);
            sender.send((group, output))
        });
        let (group, output) = result.recv_timeout(HANG).expect("the call does not return");
        assert!(matches!(output, Err(Failure::Late(_))), "{output:?}");
        let deadline = Instant::now() + HANG;
        while processes_in_group(group) > 0 {
            assert!(Instant::now() < deadline, "the child of the program still runs");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_program_that_ends_and_leaves_a_child_with_its_pipe_is_late() {
        let output = run_within(Duration::from_millis(50), "sleep 100000 & echo done");
        assert!(matches!(output, Err(Failure::Late(_))), "{output:?}");
    }

    #[test]
    fn a_program_gets_nothing_of_the_caller_s_environment() {
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some(), "the caller has an environment");
        let output = run(HANG, "env", &[], None, |_| ()).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut variables: Vec<_> = text.lines().collect();
        variables.sort_unstable();
        assert_eq!(variables, ["LC_ALL=C", &format!("PATH={SEARCH_PATH}")]);
    }

    #[test]
    fn a_program_that_writes_while_it_reads_does_not_block() {
        let input = "0123456789abcdef".repeat(100_000);
        let output = run(HANG, "cat", &[], Some(&input), |_| ()).unwrap();
        assert_eq!(output.stdout.len(), input.len());
    }

    #[test]
    fn the_output_of_a_program_that_does_not_read_its_input_is_kept() {
        let input = "0123456789abcdef".repeat(100_000);
        let args = ["-c", "exec <&-; echo refused >&2; exit 3"];
        let output = run(HANG, "sh", &args, Some(&input), |_| ()).unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(3), &b"refused\n"[..]));
    }

    #[test]
    fn a_program_that_no_directory_of_the_search_path_has_is_not_found() {
        let output = run(HANG, "no-such-program", &[], None, |_| ());
        assert!(matches!(output, Err(Failure::NotFound)), "{output:?}");
    }
}
