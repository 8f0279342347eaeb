//! What a driver is opened with: where its documents are, whose host it filters, how long it waits.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nwfilter_rules::Backend;

use crate::progress::Reporter;
use crate::{Clock, Driver, Error, Host, NetworkNamespace, Progress};

/// Where a driver keeps its documents, and what it takes for its host.
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
    /// Whose stores these are.
    pub layout: Layout,
    /// Where the interfaces of ports are.
    pub host: Host,
    /// The network namespace in which the ports are: that of the thread which calls, unless one is named.
    pub network_namespace: NetworkNamespace,
    /// The clock by which leases end.
    pub clock: Clock,
    /// How long a change waits for another process that keeps the stores locked; then it fails with
    /// [`Error::Locked`]. Without a limit it waits, and a log message names the process after a second.
    pub patience: Option<Duration>,
}

/// Whose stores a driver works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// The driver's own: a damaged file is moved aside, and what is dangerous in a stored filter is refused.
    #[default]
    Own,
    /// libvirt's, which its own driver reads too: files stay where they are, and are read as libvirt reads them.
    Libvirt,
}

impl Config {
    /// Stores of the driver's own in these directories, which it makes when it needs them.
    pub fn new(config_dir: impl Into<PathBuf>, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            config_dir: config_dir.into(),
            state_dir: state_dir.into(),
            layout: Layout::Own,
            host: Host::kernel(),
            network_namespace: NetworkNamespace::of_caller(),
            clock: Clock::system(),
            patience: None,
        }
    }

    /// libvirt's own stores: `/etc/libvirt/nwfilter` and `/run/libvirt/nwfilter-binding`.
    pub fn libvirt() -> Self {
        let config = Self::new("/etc/libvirt/nwfilter", "/run/libvirt/nwfilter-binding");
        Self { layout: Layout::Libvirt, ..config }
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
    /// With the directories, the layout, the host and the patience of a configuration.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// With this filter store, instead of `/etc/nwfilter`.
    pub fn config_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.config.config_dir = directory.into();
        self
    }

    /// With this binding store, instead of `/run/nwfilter`.
    pub fn state_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.config.state_dir = directory.into();
        self
    }

    /// With the ports of this host, instead of the kernel's interfaces.
    pub fn host(mut self, host: Host) -> Self {
        self.config.host = host;
        self
    }

    /// With the ports of this network namespace, instead of that of the thread which calls the driver. To enter it takes
    /// `CAP_SYS_ADMIN`.
    pub fn network_namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.config.network_namespace = namespace;
        self
    }

    /// With this clock, instead of the system's.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.config.clock = clock;
        self
    }

    /// With a limit to how long a change waits for other processes: see [`Config::patience`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.config.patience = Some(patience);
        self
    }

    /// Reports the progress of changes. A change waits while it reports: `report` must return soon, and must not call
    /// the driver.
    pub fn on_progress(mut self, report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.reporter = Reporter(Some(Arc::new(report)));
        self
    }

    /// Starts no thread that learns addresses: another process does it, with [`Driver::learn`].
    pub fn without_learner(mut self) -> Self {
        self.without_learner = true;
        self
    }

    /// Opens the stores: reads them, and fails where they cannot be read, or where the network namespace cannot be entered.
    /// Nothing is written, neither to disk nor to the kernel.
    pub fn open(self, backend: impl Backend + 'static) -> Result<Driver, Error> {
        Driver::with(self.config, Box::new(backend), self.reporter, self.without_learner)
    }
}
