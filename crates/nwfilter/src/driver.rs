//! The driver: holds filters and bindings, decides which ruleset each port must have, and applies it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nwfilter_rules::{Applied, Backend, Batch, Ruleset};
use nwfilter_xml::{Binding, Filter, FilterName, PortDev, Strictness, read_filter_with};

use crate::config::{Builder, Config};
use crate::counters::Dropped;
use crate::events::Feed;
use crate::files::{Problem, log_warnings};
use crate::group::Queue;
use crate::host::Ports;
use crate::learn::service::Background;
use crate::lock::lock;
use crate::metrics::Meter;
use crate::progress::Reporter;
use crate::stores::Stores;
use crate::{Error, Host, Phase, Transaction};

/// A network-filter driver over two directories and a backend.
///
/// Every change is all or nothing: it succeeds, or returns an error and leaves stores and kernel unchanged.
/// [`Driver::commit`] makes several changes one. A driver may be used from many threads, whose changes are then
/// made together. It works in the network namespace of its configuration, see [`NetworkNamespace`](crate::NetworkNamespace).
/// Other processes may work on the same directories; changes are serialised by a lock in the state
/// directory, and each operation sees what others wrote before it.
///
/// ```no_run
/// use nwfilter::{Config, Driver};
/// use nwfilter_xtables::Xtables;
///
/// let driver = Driver::open(Config::default(), Xtables::default())?;
/// driver.define_filter("ssh.xml", "<filter name='ssh'>
///   <filterref filter='clean-traffic'/>
///   <rule action='accept' direction='in'><tcp dstportstart='22'/></rule>
///   <rule action='drop' direction='inout'><all/></rule>
/// </filter>")?;
/// let binding = nwfilter_xml::read_binding("vnet0.xml", "<filterbinding>
///   <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
///   <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/>
///   <filterref filter='ssh'><parameter name='IP' value='10.0.0.2'/></filterref>
/// </filterbinding>").into_result()?;
/// let done = driver.create_binding(binding)?;
/// for warning in &done.warnings {
///     eprintln!("warning: {warning}");
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Driver {
    shared: Arc<Shared>,
    pub(crate) learner: Background,
    pub(crate) reporter: Reporter,
}

/// The state that a driver shares with its threads. These learn addresses and repair, and change it as callers do.
struct Shared {
    config: Config,
    backend: Box<dyn Backend>,
    /// The stores as they were last read. Locked only to read or replace them, never during a change of the kernel. Only the
    /// thread that leads the queue changes them.
    view: Mutex<Arc<Stores>>,
    /// The requests of callers and of the driver's own threads.
    queue: Queue,
    feed: Feed,
    meter: Meter,
    dropped: Mutex<Dropped>,
}

impl Driver {
    /// Opens a driver that learns addresses by a thread of its own: [`Driver::builder`] without any option.
    pub fn open(config: Config, backend: impl Backend + 'static) -> Result<Self, Error> {
        Self::builder().config(config).open(backend)
    }

    /// Builds a driver with other options.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn with(
        config: Config,
        backend: Box<dyn Backend>,
        reporter: Reporter,
        without_learner: bool,
    ) -> Result<Self, Error> {
        config.network_namespace.run(|| ()).map_err(|source| Error::Namespace { source })?;
        let mut stores = Stores::new(&config);
        stores.refresh()?;
        let meter = Meter::default();
        meter.stores(&stores);
        let shared = Shared {
            config,
            backend,
            view: Mutex::new(Arc::new(stores)),
            queue: Queue::default(),
            feed: Feed::default(),
            meter,
            dropped: Mutex::default(),
        };
        let learner = if without_learner { Background::elsewhere() } else { Background::default() };
        Ok(Self { shared: Arc::new(shared), learner, reporter })
    }

    /// The same driver for one of its own threads, which may carry out requests of others.
    pub(crate) fn for_thread(&self) -> Self {
        let (learner, reporter) = (Background::elsewhere(), self.reporter.clone());
        Self { shared: self.shared.clone(), learner, reporter }
    }

    /// The name of the backend, as users choose it: `xtables`.
    pub fn backend_name(&self) -> &'static str {
        self.backend().name()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.shared.backend
    }

    pub(crate) fn queue(&self) -> &Queue {
        &self.shared.queue
    }

    pub(crate) fn host(&self) -> &Host {
        &self.shared.config.host
    }

    pub(crate) fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.shared.meter
    }

    pub(crate) fn dropped(&self) -> &Mutex<Dropped> {
        &self.shared.dropped
    }

    /// Where the filters and the bindings are.
    pub(crate) fn config(&self) -> &Config {
        &self.shared.config
    }

    // ---- filters ----

    /// Stores a filter. It replaces one of its name, and keeps that one's UUID unless it has its own. Ports that use it are
    /// updated first; if that fails, nothing changes.
    ///
    /// `document` names the text in errors. Ignored and replaced attributes are logged as warnings. A rule that libvirt
    /// would make match more than is written is refused, as [`Strictness::Strict`] says.
    pub fn define_filter(&self, document: &str, text: &str) -> Result<(Arc<Filter>, Applied), Error> {
        self.define_filter_with(document, text, Strictness::Strict)
    }

    /// The same with this strictness.
    pub fn define_filter_with(
        &self,
        document: &str,
        text: &str,
        strictness: Strictness,
    ) -> Result<(Arc<Filter>, Applied), Error> {
        let reading = read_filter_with(document, text, strictness);
        if let Some(warnings) = reading.warnings() {
            log_warnings(warnings);
        }
        let mut transaction = Transaction::new();
        transaction.define_filter(reading.into_result()?);
        let mut done = self.commit(transaction)?;
        let filter = done.filters.pop().ok_or(Error::Abandoned)?;
        Ok((filter, done.applied))
    }

    /// Removes a filter from the store. Refused while a port uses it.
    pub fn undefine_filter(&self, name: &FilterName) -> Result<(), Error> {
        self.alone(|transaction| transaction.undefine_filter(name)).map(drop)
    }

    /// The filter of that name.
    pub fn filter(&self, name: &FilterName) -> Result<Arc<Filter>, Error> {
        let stores = self.look()?;
        stores.filter(name).cloned().ok_or_else(|| Error::NoSuchFilter(name.clone()))
    }

    /// Every filter of the store and every stock filter, sorted by name.
    pub fn filters(&self) -> Result<Vec<Arc<Filter>>, Error> {
        Ok(self.look()?.filter_map().values().cloned().collect())
    }

    /// The filters of the store, sorted by name.
    pub fn stored_filters(&self) -> Result<Vec<Arc<Filter>>, Error> {
        Ok(self.look()?.filters.documents().cloned().collect())
    }

    /// Whether the store has a filter of that name. Stock filters do not count.
    pub fn is_stored(&self, name: &FilterName) -> Result<bool, Error> {
        Ok(self.look()?.filters.get(name.as_str()).is_some())
    }

    // ---- bindings ----

    /// Filters a port. Its network interface must exist, and it must have no binding.
    pub fn create_binding(&self, binding: Binding) -> Result<Applied, Error> {
        self.alone(|transaction| transaction.create_binding(binding))
    }

    /// Filters a port, and replaces its binding if it has one, in one transaction a table. Its network interface must exist. If
    /// the port already has an equal binding, only missing rules are written.
    pub fn replace_binding(&self, binding: Binding) -> Result<Applied, Error> {
        self.alone(|transaction| transaction.replace_binding(binding))
    }

    /// Stops filtering a port, and removes all its rules.
    pub fn delete_binding(&self, port: &PortDev) -> Result<Applied, Error> {
        self.alone(|transaction| transaction.delete_binding(port))
    }

    /// Moves a binding to another port name, which must be an interface without a binding.
    pub(crate) fn rename_binding(&self, from: &PortDev, to: PortDev) -> Result<(), Error> {
        let mut binding = Arc::unwrap_or_clone(self.binding(from)?);
        binding.port = to;
        let mut transaction = Transaction::new();
        transaction.delete_binding(from).create_binding(binding);
        self.commit(transaction).map(drop)
    }

    /// Commits a transaction of one operation.
    fn alone(&self, operation: impl FnOnce(&mut Transaction) -> &mut Transaction) -> Result<Applied, Error> {
        let mut transaction = Transaction::new();
        operation(&mut transaction);
        Ok(self.commit(transaction)?.applied)
    }

    /// The binding of a port.
    pub fn binding(&self, port: &PortDev) -> Result<Arc<Binding>, Error> {
        let stores = self.look()?;
        stores.bindings.get(port.as_str()).cloned().ok_or_else(|| Error::NoSuchBinding(port.clone()))
    }

    /// Every binding, sorted by port.
    pub fn bindings(&self) -> Result<Vec<Arc<Binding>>, Error> {
        Ok(self.look()?.bindings.documents().cloned().collect())
    }

    // ---- the kernel ----

    /// The ruleset that a binding would have now: a provisional one if its address must be learned. Changes nothing.
    pub fn ruleset(&self, binding: &Binding) -> Result<Ruleset, Error> {
        let stores = self.look()?;
        stores.ruleset(&stores.filter_map(), binding)
    }

    /// The files of the stores that are ignored because they are damaged, sorted by path.
    pub fn problems(&self) -> Result<Vec<Problem>, Error> {
        let stores = self.look()?;
        let mut problems: Vec<_> = {
            let problems = stores.filters.problems().chain(stores.bindings.problems());
            problems.chain(stores.sets.problems()).collect()
        };
        problems.sort();
        Ok(problems)
    }

    // ---- inside ----

    /// Runs something in the driver's network namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
        self.config().network_namespace.run(work).map_err(|source| Error::Namespace { source })?
    }

    /// The interfaces of the host now.
    pub(crate) fn ports(&self) -> Result<Ports, Error> {
        self.inside(|| self.host().ports().map_err(|source| Error::Links { source }))
    }

    /// The stores as they are on disk now. Does not wait for a change that another thread makes.
    pub(crate) fn look(&self) -> Result<Arc<Stores>, Error> {
        let mut view = self.view();
        Arc::make_mut(&mut view).refresh()?;
        self.meter().stores(&view);
        Ok(view.clone())
    }

    /// The stores as they were last read.
    pub(crate) fn last_seen(&self) -> Arc<Stores> {
        self.view().clone()
    }

    fn view(&self) -> MutexGuard<'_, Arc<Stores>> {
        // After a panic the stores are at most out of date, and they are read again before each use.
        self.shared.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a change of the thread that leads the queue, under the lock against other processes, on a copy of the stores.
    /// Lookups see the copy when the change is done.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Stores)) -> Result<(), Error> {
        let _lock = lock(&self.shared.config.state_dir, self.shared.config.patience)?;
        let mut stores = Arc::unwrap_or_clone(self.look()?);
        stores.tidy();
        change(&mut stores);
        self.meter().stores(&stores);
        *self.view() = Arc::new(stores);
        Ok(())
    }

    /// Changes several files of the stores. Lookups see all changes or none.
    pub(crate) fn publish<T>(&self, stores: &mut Stores, change: impl FnOnce(&mut Stores) -> T) -> T {
        let mut view = self.view();
        let done = change(stores);
        *view = Arc::new(stores.clone());
        done
    }

    pub(crate) fn apply(&self, batch: &Batch) -> Result<Applied, Error> {
        if batch.is_empty() {
            return Ok(Applied::default());
        }
        self.reporter.report(Phase::Kernel, 0, batch.ports.len());
        let begin = Instant::now();
        let mut applied = self.shared.backend.apply(batch).inspect_err(|_| self.meter().refused())?;
        applied.warnings.extend(self.host().unbridged(batch));
        applied.warnings.sort();
        self.meter().applied(batch, begin.elapsed());
        self.reporter.report(Phase::Kernel, batch.ports.len(), batch.ports.len());
        Ok(applied)
    }
}
