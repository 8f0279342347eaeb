//! A live libvirtd in the network namespace of a host, with state of its own.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::Host;
use crate::netns::{Netns, Process, checked, scratch, unique};
use crate::tools::with_mounts;

/// The directories a daemon sees its own of, and the names they have in its state directory.
const MOUNTS: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("run", "/run/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("log", "/var/log/libvirt"),
    ("cache", "/var/cache/libvirt"),
];

/// At its start libvirt writes the rules of all ports, 2 seconds each, before it serves anybody.
const START_TIMEOUT: Duration = Duration::from_secs(300);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

const LIBVIRTD_CONF: &str = r#"auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "1:file:/var/log/libvirt/libvirtd.log"
"#;

const QEMU_CONF: &str = r#"security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"#;

/// How a [`Libvirtd`] is to be run.
#[derive(Clone, Debug)]
pub struct LibvirtdOptions {
    /// Where the daemon loads its driver modules from, instead of the directory built into it.
    pub driver_dir: Option<PathBuf>,
    /// Whether to configure the QEMU driver so that a guest of type `qemu` starts here, as root
    /// and without cgroups. Then virsh connects to `qemu:///system`, as users do.
    pub qemu_conf: bool,
    /// Whether libvirt's stock filters are there from the start; by default they are.
    pub keep_stock_filters: bool,
    /// libvirtd.conf's `log_filters`, such as `1:nwfilter 1:util.firewall`.
    pub log_filters: Option<String>,
    /// After how many seconds without client the daemon ends.
    pub idle_timeout: Option<u32>,
    /// More environment variables of the daemon.
    pub env: Vec<(OsString, OsString)>,
    /// Files and directories that the daemon, and what it starts, sees in place of others: what it sees, and where.
    pub mounts: Vec<(PathBuf, PathBuf)>,
}

impl Default for LibvirtdOptions {
    fn default() -> Self {
        Self {
            driver_dir: None,
            qemu_conf: false,
            keep_stock_filters: true,
            log_filters: None,
            idle_timeout: None,
            env: Vec::new(),
            mounts: Vec::new(),
        }
    }
}

impl LibvirtdOptions {
    /// The driver that virsh connects to.
    fn connect(&self) -> Connect {
        if self.qemu_conf { Connect::Qemu } else { Connect::Nwfilter }
    }
}

/// The libvirt driver that a connection is opened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// `nwfilter:///system`
    Nwfilter,
    /// `qemu:///system`
    Qemu,
}

/// A libvirtd with its own `/etc/libvirt`, `/run/libvirt`, and so on, so that several run side by
/// side and the machine's own stays as it is. It is ended when dropped; the rules it made stay in
/// the host.
///
/// ```
/// # use nwfilter_testlab::{Host, Libvirtd, Need, skip_unless};
/// # fn main() -> anyhow::Result<()> {
/// # skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
/// let host = Host::new()?;
/// let daemon = Libvirtd::start(&host)?;
/// daemon.define("<filter name='mine'><rule action='drop' direction='in'/></filter>")?;
/// assert!(daemon.dumpxml("mine")?.contains("<uuid>"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Libvirtd {
    process: Option<Process>,
    options: LibvirtdOptions,
    state: State,
    netns: Netns,
}

impl Libvirtd {
    /// Starts a daemon with the default options.
    pub fn start(host: &Host) -> Result<Self> {
        Self::start_with(host, LibvirtdOptions::default())
    }

    /// Starts a daemon and waits until it answers.
    pub fn start_with(host: &Host, options: LibvirtdOptions) -> Result<Self> {
        let state = State::new(&options)?;
        let mut daemon = Self { process: None, options, state, netns: host.netns().clone() };
        daemon.start_again()?;
        Ok(daemon)
    }

    /// Starts the daemon with the state it had when it ended.
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "libvirtd runs already");
        let process = self.process.insert(self.netns.spawn_command(self.daemon()?)?);
        let result = wait_ready(process, &self.state, self.options.connect());
        result.with_context(|| format!("libvirtd does not answer; its log:\n{}", self.log()))
    }

    /// Ends the daemon in order.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("libvirtd does not run")?;
        process.stop(STOP_TIMEOUT)?;
        Ok(())
    }

    /// Ends the daemon with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("libvirtd does not run")?;
        process.kill()?;
        Ok(())
    }

    /// Ends the daemon in order and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.start_again()
    }

    /// The process id, while the daemon runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Whether the daemon has ended by itself.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.as_mut().map(Process::ended).transpose()?.flatten().is_some())
    }

    /// What the daemon logged: its stdout, stderr and log file.
    pub fn log(&self) -> String {
        let output = self.process.as_ref().map(Process::log).unwrap_or_default();
        let file = self.state.0.join("log/libvirtd.log");
        output + &fs::read_to_string(file).unwrap_or_default()
    }

    /// The URI at which any process of this machine reaches this daemon.
    pub fn uri(&self, driver: Connect) -> String {
        self.state.uri(driver)
    }

    /// A `virsh` connected to this daemon, to add a command to.
    pub fn virsh_command(&self, driver: Connect) -> Command {
        self.state.virsh(driver)
    }

    /// Runs a virsh command and returns its stdout; a failure carries virsh's stderr. It connects to `qemu:///system`
    /// where the daemon has that driver, else to `nwfilter:///system`.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        self.virsh_on(self.options.connect(), args)
    }

    /// Runs a virsh command at the given driver.
    pub fn virsh_on(&self, driver: Connect, args: &[&str]) -> Result<String> {
        checked(self.virsh_command(driver).args(args), None)
    }

    /// Runs many virsh commands, each as [`Libvirtd::virsh`] does, with few processes; each has its own
    /// result. A command with bad syntax, one that virsh does not know, fails the whole batch.
    pub fn virsh_batch(&self, commands: &[Vec<String>]) -> Result<Vec<Result<String>>> {
        let mut results = Vec::with_capacity(commands.len());
        for commands in commands.chunks(200) {
            results.extend(self.virsh_chunk(commands)?);
        }
        Ok(results)
    }

    fn virsh_chunk(&self, commands: &[Vec<String>]) -> Result<Vec<Result<String>>> {
        const MARK: &str = "%end of command%";
        let quoted = |command: &Vec<String>| {
            command.iter().map(|word| format!("'{word}' ")).collect::<String>()
                + &format!("; echo '{MARK}'; echo --err '{MARK}'; ")
        };
        let quote = commands.iter().flatten().find(|word| word.contains('\''));
        ensure!(quote.is_none(), "a quote in a virsh argument: {quote:?}");

        let script: String = commands.iter().map(quoted).collect();
        let output = self.virsh_command(self.options.connect()).arg(script).output()?;
        let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        let err_mark = format!("error: {MARK}\n");
        let complete = stderr.matches(&err_mark).count();
        ensure!(complete == commands.len(), "virsh ran {complete} of {} commands:\n{stderr}", commands.len());

        let pairs = stdout.split(MARK).zip(stderr.split(&err_mark)).take(commands.len());
        let results = pairs.zip(commands).map(|((stdout, stderr), command)| {
            if stderr.lines().any(|line| line.starts_with("error:")) {
                bail!("virsh {}:\n{}", command.join(" "), stderr.trim_end());
            }
            Ok(stdout.trim_start_matches('\n').to_owned())
        });
        Ok(results.collect())
    }

    /// Defines a filter.
    pub fn define(&self, xml: &str) -> Result<()> {
        self.with_xml("nwfilter-define", xml)
    }

    /// Undefines a filter.
    pub fn undefine(&self, name: &str) -> Result<()> {
        self.virsh(&["nwfilter-undefine", name]).map(drop)
    }

    /// The XML of a filter.
    pub fn dumpxml(&self, name: &str) -> Result<String> {
        self.virsh(&["nwfilter-dumpxml", name])
    }

    /// Creates a binding, that is, filters a port.
    pub fn bind(&self, xml: &str) -> Result<()> {
        self.with_xml("nwfilter-binding-create", xml)
    }

    /// Deletes the binding of a port.
    pub fn unbind(&self, port: &str) -> Result<()> {
        self.virsh(&["nwfilter-binding-delete", port]).map(drop)
    }

    /// The XML of a port's binding.
    pub fn binding_dumpxml(&self, port: &str) -> Result<String> {
        self.virsh(&["nwfilter-binding-dumpxml", port])
    }

    /// Runs a virsh command that reads XML from a file.
    fn with_xml(&self, command: &str, xml: &str) -> Result<()> {
        checked(self.virsh_command(self.options.connect()).args([command, "/dev/stdin"]), Some(xml)).map(drop)
    }

    /// Reads a file of the daemon, such as `/etc/libvirt/nwfilter/mine.xml`, also when it does not
    /// run.
    pub fn read_file(&self, path: &str) -> Result<String> {
        let file = self.path(path)?;
        fs::read_to_string(file).with_context(|| format!("cannot read the daemon's {path}"))
    }

    /// Writes a file of the daemon, and the directories above it.
    pub fn write_file(&self, path: &str, content: &str) -> Result<()> {
        let file = self.path(path)?;
        file.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(file, content).with_context(|| format!("cannot write the daemon's {path}"))
    }

    /// Where a file below `/etc/libvirt`, `/run/libvirt`, `/var/lib/libvirt`, `/var/log/libvirt`
    /// or `/var/cache/libvirt` of the daemon really is.
    pub fn path(&self, path: &str) -> Result<PathBuf> {
        let below = |(dir, target): &(&str, &str)| {
            Some(self.state.0.join(dir).join(Path::new(path).strip_prefix(target).ok()?))
        };
        MOUNTS.iter().find_map(below).with_context(|| format!("{path} is not the daemon's own"))
    }

    /// The command that becomes the daemon.
    fn daemon(&self) -> Result<Command> {
        let mut command = self.netns.command("libvirtd");
        command
            .args(["-f", "/etc/libvirt/libvirtd.conf", "-p", "/run/libvirt/libvirtd.pid"])
            .args(
                self.options
                    .idle_timeout
                    .iter()
                    .flat_map(|seconds| ["--timeout".to_owned(), seconds.to_string()]),
            )
            // No service of this machine shall act on behalf of the daemon.
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
            .envs(self.options.driver_dir.iter().map(|dir| ("LIBVIRT_DRIVER_DIR", dir)))
            .envs(self.options.env.iter().map(|(key, value)| (key, value)));
        with_mounts(&mut command, &[self.state.mounts(), self.options.mounts.clone()].concat())?;
        Ok(command)
    }
}

fn wait_ready(process: &mut Process, state: &State, driver: Connect) -> Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline {
        if let Some(status) = process.ended()? {
            bail!("libvirtd ended: {status}");
        }
        if state.socket().exists() && answers(state.virsh(driver).arg("uri"), deadline)? {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("no answer within {START_TIMEOUT:?}")
}

/// Whether a command succeeds, which it may take until the deadline for.
fn answers(command: &mut Command, deadline: Instant) -> Result<bool> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
}

/// The directory with all files of a daemon, which outlives the daemon's processes.
#[derive(Debug)]
struct State(PathBuf);

impl State {
    fn new(options: &LibvirtdOptions) -> Result<Self> {
        let state = Self(scratch().join(unique("libvirtd")));
        for (dir, target) in MOUNTS {
            fs::create_dir_all(state.0.join(dir))?;
            fs::create_dir_all(target)?;
        }
        let etc = state.0.join("etc");
        let filters = options.log_filters.iter().map(|filters| format!("log_filters = \"{filters}\"\n"));
        fs::write(etc.join("libvirtd.conf"), LIBVIRTD_CONF.to_owned() + &filters.collect::<String>())?;
        if options.qemu_conf {
            fs::write(etc.join("qemu.conf"), QEMU_CONF)?;
        }
        if options.keep_stock_filters {
            copy_files(Path::new("/etc/libvirt/nwfilter"), &etc.join("nwfilter"))?;
        }
        Ok(state)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("run/libvirt-sock")
    }

    fn uri(&self, driver: Connect) -> String {
        let scheme = match driver {
            Connect::Nwfilter => "nwfilter",
            Connect::Qemu => "qemu",
        };
        format!("{scheme}+unix:///system?socket={}", self.socket().display())
    }

    fn virsh(&self, driver: Connect) -> Command {
        let mut command = Command::new("virsh");
        command.env("LC_ALL", "C").args(["-q", "-c", &self.uri(driver)]);
        command
    }

    fn mounts(&self) -> Vec<(PathBuf, PathBuf)> {
        MOUNTS.iter().map(|(dir, target)| (self.0.join(dir), PathBuf::from(target))).collect()
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
