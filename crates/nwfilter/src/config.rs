//! The configuration of a driver: its stores, its host, and how long it waits.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_rules::{Backend, LogGroup};
use nwfilter_xml::{Field, Literal, SetName, Strictness, Value, read_filter_with};

use crate::progress::Reporter;
use crate::{Clock, Driver, Error, Host, Learning, NetworkNamespace, Progress};

/// The stores of a driver, its host, and its limits.
///
/// ```
/// use nwfilter::Config;
///
/// let config = Config::new("/srv/filters", "/run/filters");
/// assert_eq!(config.state_dir.to_str(), Some("/run/filters"));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The filter store.
    pub config_dir: PathBuf,
    /// The binding store.
    pub state_dir: PathBuf,
    /// The layout of the stores.
    pub layout: Layout,
    /// Where the interfaces of ports are.
    pub host: Host,
    /// The network namespace of the ports. By default that of the calling thread.
    pub network_namespace: NetworkNamespace,
    /// The clock by which leases end.
    pub clock: Clock,
    /// The group of the kernel's packet log to which rules report what they stop at ports whose bindings have
    /// `CTRL_LOG_DROPS`. [`Driver::keep`] reads it.
    pub log_group: LogGroup,
    /// How addresses are learned for bindings that do not say it.
    pub learning: Learning,
    /// How long a change waits for another process that has locked the stores, before it fails with [`Error::Locked`]. `None`
    /// waits without limit. After a second a log message names the process.
    pub patience: Option<Duration>,
}

/// Whose stores a driver works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// The driver's own: damaged files are renamed, and dangerous constructs in stored filters are refused.
    #[default]
    Own,
    /// libvirt's, which its own driver reads too: files stay where they are and are read as libvirt reads them.
    Libvirt,
}

impl Config {
    /// The driver's own stores in these directories, which it creates when necessary.
    pub fn new(config_dir: impl Into<PathBuf>, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            config_dir: config_dir.into(),
            state_dir: state_dir.into(),
            layout: Layout::Own,
            host: Host::kernel(),
            network_namespace: NetworkNamespace::of_caller(),
            clock: Clock::system(),
            log_group: LogGroup::default(),
            learning: Learning::default(),
            patience: None,
        }
    }

    /// libvirt's own stores: `/etc/libvirt/nwfilter` and `/run/libvirt/nwfilter-binding`.
    pub fn libvirt() -> Self {
        let config = Self::new("/etc/libvirt/nwfilter", "/run/libvirt/nwfilter-binding");
        Self { layout: Layout::Libvirt, ..config }
    }

    /// Whether a stored filter names an ipset of the host, for a choice of the backend before the driver is opened: one that is
    /// no set of the store, or that a variable names, which may be either. Files that cannot be read do not count: opening the
    /// driver reports them.
    pub fn names_an_ip_set(&self) -> bool {
        let files = fs::read_dir(&self.config_dir).into_iter().flatten().flatten();
        let mut texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        texts.any(|text| text.contains("ipset") && self.names_one_of_the_host(&text))
    }

    fn names_one_of_the_host(&self, filter: &str) -> bool {
        let Some(filter) = read_filter_with("filter", filter, Strictness::AsLibvirt).value else {
            return false;
        };
        let mut named =
            filter.rules().filter_map(|rule| Some(&rule.matches.as_ref()?.get(Field::IpSet)?.value));
        named.any(|value| match value {
            Value::Literal(Literal::IpSet(name)) => name.parse().map_or(true, |name| !self.stores_set(&name)),
            _ => true,
        })
    }

    fn stores_set(&self, name: &SetName) -> bool {
        self.config_dir.join("sets").join(format!("{name}.xml")).exists()
    }
}

impl Default for Config {
    /// `/etc/nwfilter` and `/run/nwfilter`.
    fn default() -> Self {
        Self::new("/etc/nwfilter", "/run/nwfilter")
    }
}

/// Opens a [`Driver`] step by step: [`Driver::builder`].
#[derive(Clone, Default)]
pub struct Builder {
    config: Config,
    reporter: Reporter,
    without_learner: bool,
}

impl Builder {
    /// Uses this configuration.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Uses this filter store instead of `/etc/nwfilter`.
    pub fn config_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.config.config_dir = directory.into();
        self
    }

    /// Uses this binding store instead of `/run/nwfilter`.
    pub fn state_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.config.state_dir = directory.into();
        self
    }

    /// Uses the ports of this host instead of the kernel's interfaces.
    pub fn host(mut self, host: Host) -> Self {
        self.config.host = host;
        self
    }

    /// Works in this network namespace instead of that of the calling thread. Needs `CAP_SYS_ADMIN`.
    pub fn network_namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.config.network_namespace = namespace;
        self
    }

    /// Uses this clock instead of the system's.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.config.clock = clock;
        self
    }

    /// Limits how long a change waits for other processes: see [`Config::patience`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.config.patience = Some(patience);
        self
    }

    /// Calls `report` with the progress of changes. The change waits for it: it must return soon and must not call the driver.
    pub fn on_progress(mut self, report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.reporter = Reporter(Some(Arc::new(report)));
        self
    }

    /// Starts no learner thread: another process learns, with [`Driver::learn`].
    pub fn without_learner(mut self) -> Self {
        self.without_learner = true;
        self
    }

    /// Opens the driver and reads the stores. Fails if they cannot be read, or if the network namespace cannot be entered. Writes
    /// nothing to disk or kernel.
    pub fn open(self, backend: impl Backend + 'static) -> Result<Driver, Error> {
        Driver::with(self.config, Box::new(backend), self.reporter, self.without_learner)
    }
}
