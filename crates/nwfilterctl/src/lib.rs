//! Code that the programs `nwfilterctl` and `nwfilterctl-listen` share: options and error messages.
//!
//! They are two programs because only one needs libvirt. Loading its library takes longer than most verbs, and
//! `nwfilterctl` runs on hosts without it.

#![forbid(unsafe_code)]

mod choice;
pub mod daemon;
mod journal;

use std::ffi::OsString;
use std::fmt::Display;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf, absolute};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{ArgAction, Args, ValueEnum};
use log::LevelFilter;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat, geteuid};
use nwfilter::rules::LogGroup;
use nwfilter::{Backend, Builder, Config, Driver, Layout, Learning, serve_metrics};
use nwfilter_nftables::Nftables;
use nwfilter_settings::{Key, MAX_SECONDS, Settings};
use nwfilter_xtables::{Dispatch, Xtables};

pub use crate::choice::{BackendName, Former};
use crate::choice::{Choice, choose};

const CANNOT_OPEN: &str = "cannot open the stores";

/// The options of every verb, as they were given. The others are taken from the host's settings.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// The settings of the host [env: NWFILTER_CONFIG] [default: /etc/nwfilter/nwfilter.toml]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// The filter store [env: NWFILTER_CONFIG_DIR] [default: /etc/nwfilter]
    #[arg(long, value_name = "DIR", global = true)]
    config_dir: Option<PathBuf>,
    /// The binding store [env: NWFILTER_STATE_DIR] [default: /run/nwfilter]
    #[arg(long, value_name = "DIR", global = true)]
    state_dir: Option<PathBuf>,
    /// What enforces the rules [env: NWFILTER_BACKEND] [default: xtables]
    #[arg(long, global = true)]
    backend: Option<BackendName>,
    /// Refuse IP rules where bridge-nf-call-iptables is off, instead of switching it on
    #[arg(long, global = true, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    keep_bridge_nf: Option<bool>,
    /// Give no connection a conntrack helper
    #[arg(long, global = true, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_helpers: Option<bool>,
    /// How packets find their port: through a tree, or through libvirt's list, which its driver can take over [default: a
    /// tree; with libvirt's own stores, what is there]
    #[arg(long, global = true)]
    dispatch: Option<DispatchName>,
    /// Give up a change after this many seconds if another process keeps the stores locked [default: wait]
    #[arg(long, value_name = "SECONDS", global = true, value_parser = clap::value_parser!(u64).range(..=MAX_SECONDS))]
    timeout: Option<u64>,
    /// Log more; twice for debugging
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Print errors only, no warnings
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

/// The options of every verb, with what the settings of the host add.
#[derive(Clone, Debug)]
pub struct Options {
    /// The filter store.
    pub config_dir: PathBuf,
    /// The binding store.
    pub state_dir: PathBuf,
    /// Every setting, and where it comes from.
    pub settings: Settings,
    config: Option<PathBuf>,
    verbose: u8,
    quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DispatchName {
    Tree,
    List,
}

/// The options of daemons.
#[derive(Args, Clone, Debug)]
pub struct DaemonOptions {
    /// Serve metrics as OpenMetrics text by HTTP, at HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
}

impl DaemonOptions {
    /// Lets these options come before the settings.
    pub fn set(&self, settings: &mut Settings) {
        if let Some(address) = &self.metrics {
            settings.set(Key::Metrics, address, "--metrics");
        }
    }
}

/// The options of the verb `listen`.
#[derive(Args, Clone, Debug)]
pub struct ListenOptions {
    /// Those of every daemon
    #[command(flatten)]
    pub daemon: DaemonOptions,
    /// The URI of libvirt [default: libvirt's own default]
    #[arg(long, value_name = "URI")]
    pub connect: Option<String>,
    /// Close bridge ports whose names begin with this until they have a binding
    #[arg(long, value_name = "PREFIX")]
    pub guard: Option<String>,
}

impl Arguments {
    /// Adds the settings of the host for options that are not given.
    pub fn settle(&self) -> Result<Options> {
        let mut settings = Settings::load(self.config.as_deref())?;
        let dispatch = self.dispatch.map(|dispatch| dispatch.as_str());
        let given = [
            (Key::Backend, "--backend", self.backend.map(|backend| backend.as_str().to_owned())),
            (Key::Dispatch, "--dispatch", dispatch.map(str::to_owned)),
            (Key::Helpers, "--no-helpers", self.no_helpers.map(|no| (!no).to_string())),
            (Key::KeepBridgeNf, "--keep-bridge-nf", self.keep_bridge_nf.map(|keep| keep.to_string())),
            (Key::Timeout, "--timeout", self.timeout.map(|seconds| seconds.to_string())),
            (Key::ConfigDir, "--config-dir", self.config_dir.as_ref().map(|dir| dir.display().to_string())),
            (Key::StateDir, "--state-dir", self.state_dir.as_ref().map(|dir| dir.display().to_string())),
        ];
        for (key, option, value) in given {
            if let Some(value) = value {
                settings.set(key, value, option);
            }
        }
        let dir = |given: &Option<PathBuf>, key| {
            given.clone().unwrap_or_else(|| settings.get(key).unwrap_or_default().into())
        };
        Ok(Options {
            config_dir: dir(&self.config_dir, Key::ConfigDir),
            state_dir: dir(&self.state_dir, Key::StateDir),
            config: self.config.clone(),
            verbose: self.verbose,
            quiet: self.quiet,
            settings,
        })
    }

    /// The arguments by which another program gets the same options.
    pub fn to_args(&self) -> Vec<OsString> {
        let paths = [
            ("--config", &self.config),
            ("--config-dir", &self.config_dir),
            ("--state-dir", &self.state_dir),
        ];
        let words = [
            ("--backend", self.backend.map(|backend| backend.as_str().to_owned())),
            ("--dispatch", self.dispatch.map(|dispatch| dispatch.as_str().to_owned())),
            ("--keep-bridge-nf", self.keep_bridge_nf.map(|keep| keep.to_string())),
            ("--no-helpers", self.no_helpers.map(|no| no.to_string())),
            ("--timeout", self.timeout.map(|seconds| seconds.to_string())),
        ];
        let paths = paths.into_iter().filter_map(|(name, path)| Some([name.into(), path.as_ref()?.into()]));
        let words = words.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?).into()));
        paths.flatten().chain(words).chain(levels(self.verbose, self.quiet)).collect()
    }
}

/// The arguments that decide what is logged.
fn levels(verbose: u8, quiet: bool) -> impl Iterator<Item = OsString> {
    let verbose = std::iter::repeat_n("--verbose".into(), verbose.into());
    verbose.chain(quiet.then(|| "--quiet".into()))
}

impl DispatchName {
    fn as_str(self) -> &'static str {
        match self {
            DispatchName::Tree => "tree",
            DispatchName::List => "list",
        }
    }
}

impl Options {
    /// Adds settings from more options.
    pub fn with(mut self, set: impl FnOnce(&mut Settings)) -> Self {
        set(&mut self.settings);
        self
    }

    /// Opens the driver that the options describe. It reads the tables from the kernel.
    pub fn open(&self, with: Builder) -> Result<Driver> {
        let choice = self.choose(self.native(), None);
        choice.refuse_a_second_backend()?;
        self.open_with(with, choice.backend)
    }

    /// The same for a daemon, which owns the table of the native backend.
    pub fn open_to_stay(&self, with: Builder) -> Result<Driver> {
        let choice = self.choose(Nftables::new().owning(&self.state_dir), None);
        choice.refuse_a_second_backend()?;
        self.open_with(with, choice.backend)
    }

    /// The same for a reload, which may change the backend. The rules of the former one are removed when every port has its new
    /// rules.
    pub fn open_to_take_over(&self, with: Builder) -> Result<(Driver, Former)> {
        let (backend, former) = self.choose(self.native(), None).into_parts();
        Ok((self.open_with(with, backend)?, former))
    }

    /// The same for a process that makes one change and ends. It starts with the cache of the tables that the previous process
    /// left, if nothing has changed since.
    pub fn open_for_a_change(&self, with: Builder) -> Result<Driver> {
        let choice = self.choose(self.native(), Some(&self.state_dir));
        choice.refuse_a_second_backend()?;
        self.open_with(with, choice.backend)
    }

    /// The driver that the options describe, for reading only, and both backends, the chosen one first. It opens even if the
    /// other backend filters ports too.
    pub fn open_to_examine(&self, with: Builder) -> (Result<Driver>, [Box<dyn Backend>; 2]) {
        let (backend, _) = self.choose(self.native(), None).into_parts();
        (self.open_with(with, backend), self.choose(self.native(), None).into_backends())
    }

    fn open_with(&self, builder: Builder, backend: Box<dyn Backend>) -> Result<Driver> {
        // One message instead of one for each file.
        [&self.config_dir, &self.state_dir]
            .into_iter()
            .try_for_each(|dir| check_readable(dir))
            .context(CANNOT_OPEN)?;
        builder.config(self.config()).open(backend).context(CANNOT_OPEN)
    }

    /// Starts the log: in the journal if stderr is that, else on stderr. A program logs at `level` and above, unless options, settings or
    /// RUST_LOG ask for other levels.
    pub fn start_log(&self, level: LevelFilter) {
        let level = self.settings.get(Key::Log).and_then(|level| level.parse().ok()).unwrap_or(level);
        let level = if self.quiet { LevelFilter::Error } else { level };
        let level = LevelFilter::iter().nth(level as usize + usize::from(self.verbose));
        let level = level.unwrap_or(LevelFilter::Trace);
        let logger =
            env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level.as_str()))
                .format_timestamp(None)
                .format_target(false)
                .build();
        journal::start(logger);
    }

    /// Whether connections get conntrack helpers.
    pub fn gives_helpers(&self) -> bool {
        self.settings.is_on(Key::Helpers)
    }

    fn config(&self) -> Config {
        let mut config = Config::new(&self.config_dir, &self.state_dir);
        let servers = self.settings.get(Key::LearningServers);
        // Both were checked when they were read.
        let learning =
            self.settings.get(Key::LearningMethod).and_then(|word| Learning::from_words(word, servers));
        config.learning = learning.unwrap_or_default();
        if let Some(group) = self.number(Key::LogGroup).and_then(|group| u16::try_from(group).ok()) {
            config.log_group = LogGroup(group);
        }
        config.patience = self.number(Key::Timeout).map(Duration::from_secs);
        if [&self.config_dir, &self.state_dir].into_iter().any(|dir| is_libvirts(dir)) {
            config.layout = Layout::Libvirt;
        }
        config
    }

    /// Refuses the chosen backend while the other one filters ports.
    pub fn check_backend(&self) -> Result<()> {
        self.choose(self.native(), None).refuse_a_second_backend()
    }

    fn number(&self, key: Key) -> Option<u64> {
        self.settings.get(key).and_then(|number| number.parse().ok())
    }

    /// Serves the metrics of a daemon, if the settings ask for it.
    pub fn serve_metrics(&self, driver: &Arc<Driver>) -> Result<()> {
        let address = self.settings.get(Key::Metrics);
        address.map_or(Ok(()), |address| {
            serve_metrics(address, driver).with_context(|| format!("cannot serve metrics at {address}"))
        })
    }

    /// Chooses the backend. xtables keeps a cache of the tables in `remembering_in`, if given.
    fn choose(&self, nftables: Nftables, remembering_in: Option<&Path>) -> Choice {
        let xtables = Xtables::new(nwfilter_xtables::Settings {
            enable_bridge_filtering: !self.settings.is_on(Key::KeepBridgeNf),
            conntrack_helpers: self.gives_helpers(),
            dispatch: self.dispatch(),
        });
        let xtables = match remembering_in {
            Some(directory) => xtables.remembering_in(directory),
            None => xtables,
        };
        choose(self.backend(), nftables, xtables, || self.config().names_an_ip_set())
    }

    /// The native backend, which asks the owner of the table, if any, to make changes.
    fn native(&self) -> Nftables {
        Nftables::new().beside(&self.state_dir)
    }

    fn backend(&self) -> BackendName {
        let name = self.settings.get(Key::Backend).unwrap_or_default();
        BackendName::from_str(name, false).unwrap_or(BackendName::Xtables)
    }

    /// The dispatch. With libvirt's stores, libvirt's own driver may be at work, which could not delete chains that a tree
    /// refers to.
    fn dispatch(&self) -> Dispatch {
        match self.settings.get(Key::Dispatch) {
            Some("list") => Dispatch::List,
            None if is_libvirts(&self.state_dir) => Dispatch::Keep,
            _ => Dispatch::Tree,
        }
    }

    /// The arguments by which another process gets the same options, in any working directory.
    pub fn to_args(&self) -> Result<Vec<OsString>> {
        let paths = [
            ("--config", self.config.as_ref()),
            ("--config-dir", Some(&self.config_dir)),
            ("--state-dir", Some(&self.state_dir)),
        ];
        let mut args: Vec<OsString> = Vec::new();
        for (name, path) in paths {
            if let Some(path) = path {
                args.extend([name.into(), absolute(path)?.into()]);
            }
        }
        let words = [
            ("--backend", self.settings.get(Key::Backend)),
            ("--dispatch", self.settings.get(Key::Dispatch)),
            ("--keep-bridge-nf", self.settings.get(Key::KeepBridgeNf)),
            ("--no-helpers", Some(if self.gives_helpers() { "false" } else { "true" })),
            ("--timeout", self.settings.get(Key::Timeout)),
        ];
        let words = words.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?).into()));
        args.extend(words.chain(levels(self.verbose, self.quiet)));
        Ok(args)
    }
}

/// Whether a store is libvirt's own.
fn is_libvirts(directory: &Path) -> bool {
    ["/etc/libvirt", "/run/libvirt", "/var/run/libvirt"]
        .iter()
        .any(|libvirts| directory.starts_with(libvirts))
}

impl ListenOptions {
    /// Lets these options come before the settings.
    pub fn set(&self, settings: &mut Settings) {
        self.daemon.set(settings);
        for (key, option, value) in
            [(Key::Connect, "--connect", &self.connect), (Key::Guard, "--guard", &self.guard)]
        {
            if let Some(value) = value {
                settings.set(key, value, option);
            }
        }
    }

    /// The arguments by which another process gets the same options.
    pub fn to_args(&self) -> Vec<OsString> {
        let options =
            [("--connect", &self.connect), ("--guard", &self.guard), ("--metrics", &self.daemon.metrics)];
        let given =
            options.into_iter().filter_map(|(name, value)| Some([name.into(), value.as_ref()?.into()]));
        given.flatten().collect()
    }
}

/// The exit code of a program. Prints an error on stderr.
pub fn exit_code(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        say(format_args!("error: {}", with_causes(error.chain())));
        let mut io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
        if let Some(help) = io_errors.find_map(|error| help(error.kind())) {
            say(format_args!("  help: {help}"));
        }
        ExitCode::FAILURE
    })
}

/// Advice for an error of the system.
fn help(kind: ErrorKind) -> Option<&'static str> {
    match kind {
        ErrorKind::PermissionDenied if !geteuid().is_root() => Some("run it as root"),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some("make room there"),
        ErrorKind::ReadOnlyFilesystem => {
            Some("mount it so that it can be written, or name other directories")
        }
        _ => None,
    }
}

/// Prints a line on stderr. Ignores errors, because there is no other place for them.
pub fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether warnings are printed.
pub fn warns() -> bool {
    log::max_level() >= LevelFilter::Warn
}

/// Warns on stderr, unless only errors are logged.
pub fn warn(text: impl Display) {
    if warns() {
        say(format_args!("warning: {text}"));
    }
}

/// Refuses a store that this user may not read, because its documents would seem not to exist.
pub fn check_readable(store: &Path) -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    let Ok(entries) = fs::read_dir(store) else { return Ok(()) };
    let mut documents = entries.flatten().map(|entry| entry.path());
    let refusal = |file: &PathBuf| {
        let is_document = file.extension().is_some_and(|extension| extension == "xml");
        let access = || faccessat(AT_FDCWD, file, AccessFlags::R_OK, AtFlags::AT_EACCESS);
        if is_document { access().err().filter(|errno| *errno == Errno::EACCES) } else { None }
    };
    match documents.find_map(|file| refusal(&file).map(|errno| (file, errno))) {
        Some((file, errno)) => {
            Err(io::Error::from(errno)).with_context(|| format!("cannot read {}", file.display()))
        }
        None => Ok(()),
    }
}

/// An error with its causes, a line each.
pub fn with_causes(chain: anyhow::Chain<'_>) -> String {
    chain.map(|error| without_numbers(&error.to_string())).collect::<Vec<_>>().join("\n  because: ")
}

/// Removes error numbers and names of temporary files from a message.
pub fn without_numbers(text: &str) -> String {
    without(&without(text, " (os error ", ")"), " at path \"", "\"")
}

/// Removes the parts of a text that are between `begin` and `end`.
fn without(text: &str, begin: &str, end: &str) -> String {
    let mut parts = text.split(begin);
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain += part.split_once(end).map_or(part, |(_, rest)| rest);
    }
    plain
}
