//! A network namespace with a name, the processes in it, and the removal of both.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

const NAMED: &str = "/run/netns";

/// A network namespace named `nwf-<pid>-<n>-<label>`, removed with all processes in it once the
/// last value that uses it is dropped.
///
/// [`Host`](crate::Host) and [`Guest`](crate::Guest) dereference to it.
#[derive(Clone, Debug)]
pub struct Netns(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
}

impl Netns {
    pub(crate) fn new(label: &str) -> Result<Self> {
        let name = unique(label);
        checked(Command::new("ip").args(["netns", "add", &name]), None)?;
        let path = Path::new(NAMED).join(&name);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let netns = Self(Arc::new(Inner { name, file }));
        netns.run(&["ip", "link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A command that will run in the namespace, with the mounts of this process.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let inner = Arc::clone(&self.0);
        let mut command = Command::new(program);
        // SAFETY: setns is a bare system call, which a child may make between fork and exec.
        unsafe {
            command.pre_exec(move || Ok(setns(&inner.file, CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    /// Runs a program to its end and returns its stdout; a failure carries its stderr.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.checked(args, None)
    }

    /// Like [`run`](Self::run), with `input` on stdin.
    pub fn run_with_stdin(&self, args: &[&str], input: &str) -> Result<String> {
        self.checked(args, Some(input))
    }

    fn checked(&self, args: &[&str], input: Option<&str>) -> Result<String> {
        let (program, args) = args.split_first().context("no program to run")?;
        checked(self.command(program).args(args), input)
    }

    /// Starts a program in the background; it is killed when the handle is dropped.
    pub fn spawn(&self, args: &[&str]) -> Result<Process> {
        let (program, args) = args.split_first().context("no program to spawn")?;
        let mut command = self.command(program);
        command.args(args);
        self.spawn_command(command)
    }

    pub(crate) fn spawn_command(&self, mut command: Command) -> Result<Process> {
        let log = tempfile::tempfile()?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Process { child, log, _files: None, _netns: self.clone() })
    }

    /// Runs a closure on a fresh thread in the namespace, so that what it opens and what it spawns
    /// acts there; `/proc/sys/net` and `/proc/thread-self/net` are those of the namespace too.
    ///
    /// # Panics
    ///
    /// When the namespace cannot be entered, or when the closure panics.
    pub fn enter<R: Send>(&self, closure: impl FnOnce() -> R + Send) -> R {
        let inside = || {
            if let Err(error) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
                panic!("cannot enter the network namespace {}: {error}", self.name());
            }
            closure()
        };
        thread::scope(|scope| {
            scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sets a sysctl of the namespace, such as `net.ipv4.ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.enter(|| fs::write(&path, value))
            .with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    /// Runs several `ip` commands with one process; the first that fails ends them.
    pub fn ip<S: AsRef<str>>(&self, commands: &[S]) -> Result<()> {
        let batch: String = commands.iter().map(|line| format!("{}\n", line.as_ref())).collect();
        self.run_with_stdin(&["ip", "-batch", "-"], &batch)
            .with_context(|| format!("ip commands:\n{batch}"))?;
        Ok(())
    }

    /// The pids of all other processes in the namespace.
    pub fn pids(&self) -> Vec<u32> {
        self.0.pids()
    }
}

impl Inner {
    fn pids(&self) -> Vec<u32> {
        let Ok(ours) = self.file.metadata() else { return Vec::new() };
        let lives_here = |pid: &u32| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|theirs| (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()))
        };
        let me = std::process::id();
        processes().filter(|&pid| pid != me).filter(lives_here).collect()
    }

    fn kill_all(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let pids = self.pids();
            if pids.is_empty() || Instant::now() > deadline {
                return;
            }
            for pid in pids {
                let _ = kill(raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.kill_all();
        let path = Path::new(NAMED).join(&self.name);
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&path);
    }
}

/// A program running in a namespace, killed with its process group when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: File,
    _files: Option<TempDir>,
    _netns: Netns,
}

impl Process {
    /// Keeps files of the program as long as it runs.
    pub(crate) fn keep(&mut self, files: TempDir) {
        self._files = Some(files);
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the program wrote to stdout and stderr up to now.
    pub fn log(&self) -> String {
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
        let read = self.log.read_at(&mut text, 0).unwrap_or(0);
        String::from_utf8_lossy(&text[..read]).into_owned()
    }

    /// How the program ended, or `None` while it runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for the program to end by itself, at most for `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "still running; its output:\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the program to end with SIGTERM, then with SIGKILL after `patience`.
    pub fn stop(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        self.wait(patience).or_else(|_| self.kill())
    }

    /// Ends the program with SIGKILL.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL);
        Ok(self.child.wait()?)
    }

    fn signal(&mut self, signal: Signal) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = killpg(raw(self.child.id()), signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Removes what a test process that was killed left behind: namespaces named `nwf-<pid>-…`, the
/// processes in them, and directories of daemons, whose `<pid>` does not exist any more.
pub fn sweep() {
    remove(|pid| !Path::new("/proc").join(pid.to_string()).exists());
}

/// Removes what this process made, whatever still uses it: for a process that ends early.
pub fn remove_all() {
    remove(|pid| pid == std::process::id());
}

fn remove(of: impl Fn(u32) -> bool) {
    for name in made_by(Path::new(NAMED), &of) {
        if let Ok(file) = File::open(Path::new(NAMED).join(&name)) {
            drop(Inner { name, file });
        }
    }
    for name in made_by(&scratch(), &of) {
        let _ = fs::remove_dir_all(scratch().join(name));
    }
}

/// The entries of a directory that are named after a process.
fn made_by(dir: &Path, of: impl Fn(u32) -> bool) -> Vec<String> {
    let owner = |name: &str| name.strip_prefix("nwf-")?.split('-').next()?.parse::<u32>().ok();
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| owner(name).is_some_and(&of))
        .collect()
}

/// Where daemons keep their state: in memory where the machine has `/dev/shm`.
pub(crate) fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// A name no other lab uses, which tells [`sweep`] whose it is.
pub(crate) fn unique(label: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("nwf-{}-{number}-{label}", std::process::id())
}

/// Runs a command to its end and returns its stdout; a failure carries its stderr.
pub(crate) fn checked(command: &mut Command, input: Option<&str>) -> Result<String> {
    let output = output(command, input).with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{}{}", output.status, stdout, stderr.trim_end());
    }
    Ok(stdout)
}

fn output(command: &mut Command, input: Option<&str>) -> Result<Output> {
    let Some(input) = input else {
        return Ok(command.stdin(Stdio::null()).output()?);
    };
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stdin = child.stdin.take();
    thread::scope(|scope| {
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        Ok(child.wait_with_output()?)
    })
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn raw(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed())
}
