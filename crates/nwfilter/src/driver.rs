//! The driver: holds filters and bindings, decides which ruleset each port must have, and brings the kernel there.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nwfilter_rules::{Applied, Backend, Batch, RulesError, Ruleset, includes_itself};
use nwfilter_xml::{Binding, Filter, Uuid, VarName, read_filter, write_binding_status, write_filter};

use crate::Error;
use crate::files::{Problem, lock};
use crate::learn::known::Known;
use crate::learn::now;
use crate::learn::service::Background;
use crate::learn::wanted::wanted;
use crate::stores::{FilterMap, Stores, interface_exists};

/// Where a driver keeps its filters and bindings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The filter store. libvirt's is `/etc/libvirt/nwfilter`.
    pub config_dir: PathBuf,
    /// The binding store. libvirt's is `/run/libvirt/nwfilter-binding`.
    pub state_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { config_dir: "/etc/nwfilter".into(), state_dir: "/run/nwfilter".into() }
    }
}

/// A network-filter driver over two directories and a backend.
///
/// Every operation is all or nothing: it either does all it says, or returns an error and leaves stores and kernel
/// as they were. Other processes may work on the same directories; changes are serialised by a lock in the state
/// directory, and each operation sees what others wrote before it.
///
/// ```no_run
/// use nwfilter::{Config, Driver, Xtables};
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
    config: Config,
    backend: Arc<dyn Backend>,
    stores: Mutex<Stores>,
    pub(crate) learner: Background,
}

impl Driver {
    /// Opens the stores. Nothing is written, neither to disk nor to the kernel.
    pub fn open(config: Config, backend: impl Backend + 'static) -> Result<Self, Error> {
        Self::over(config, Arc::new(backend), Background::default())
    }

    /// Another driver over the same stores and backend, which leaves learning to others.
    pub(crate) fn over_same_stores(&self) -> Result<Self, Error> {
        Self::over(self.config.clone(), self.backend.clone(), Background::elsewhere())
    }

    fn over(config: Config, backend: Arc<dyn Backend>, learner: Background) -> Result<Self, Error> {
        let mut stores = Stores::new(&config);
        stores.refresh()?;
        Ok(Self { config, backend, stores: Mutex::new(stores), learner })
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Where the filters and the bindings are.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    // ---- filters ----

    /// Reads a filter and puts it into the store, in place of one of its name, whose UUID it then keeps unless it
    /// names one. Ports that use it are updated first; if that fails, nothing changes.
    ///
    /// `document` names the text in errors.
    pub fn define_filter(&self, document: &str, text: &str) -> Result<(Arc<Filter>, Applied), Error> {
        let filter = read_filter(document, text).into_result()?;
        self.change(|stores| {
            let mut filter = filter;
            let old = stores.filters.get(filter.name.as_str());
            filter.uuid = Some(settle_uuid(stores, &filter, old.and_then(|old| old.uuid))?);
            let filter = Arc::new(filter);
            let mut filters = stores.filter_map();
            if let Some(cycle) = includes_itself(&filters, &filter) {
                let name = filter.name.clone();
                return Err(Error::IncludesItself {
                    name,
                    source: Box::new(RulesError::IncludesItself { cycle }),
                });
            }
            filters.insert(filter.name.clone(), filter.clone());
            // A port without an interface has its binding for nothing.
            let users = stores.users(&filters, &filter.name).filter(|user| interface_exists(&user.port));
            let batch = self.batch(&filters, &stores.known, users)?;
            let file = stores.filters.prepare(filter.name.as_str(), &stored_filter(&filter))?;
            let applied = self.apply(&batch)?;
            match file.publish() {
                Ok(()) => Ok((filter, applied)),
                Err(error) => Err(self.take_back(stores, &batch, error)),
            }
        })
    }

    /// Removes a filter from the store. Refused while a port uses it.
    pub fn undefine_filter(&self, name: &str) -> Result<(), Error> {
        self.change(|stores| {
            let filters = stores.filter_map();
            let filter = filters.get(name).ok_or_else(|| Error::NoSuchFilter(name.to_owned()))?;
            if stores.filters.get(name).is_none() {
                return Err(Error::StockFilter(filter.name.clone()));
            }
            let ports: Vec<_> =
                stores.users(&filters, &filter.name).map(|binding| binding.port.clone()).collect();
            if !ports.is_empty() {
                return Err(Error::FilterInUse { name: filter.name.clone(), ports });
            }
            stores.filters.remove(name)
        })
    }

    /// The filter of that name.
    pub fn filter(&self, name: &str) -> Result<Arc<Filter>, Error> {
        let stores = self.look()?;
        stores.filter(name).cloned().ok_or_else(|| Error::NoSuchFilter(name.to_owned()))
    }

    /// Every filter of the store and every stock filter, sorted by name.
    pub fn filters(&self) -> Result<Vec<Arc<Filter>>, Error> {
        Ok(self.look()?.filter_map().into_values().collect())
    }

    /// The filters of the store, sorted by name.
    pub fn stored_filters(&self) -> Result<Vec<Arc<Filter>>, Error> {
        Ok(self.look()?.filters.documents().cloned().collect())
    }

    /// Whether the store has a filter of that name; a stock filter alone is none.
    pub fn is_stored(&self, name: &str) -> Result<bool, Error> {
        Ok(self.look()?.filters.get(name).is_some())
    }

    // ---- bindings ----

    /// Filters a port. Its network interface must exist, and it must have no binding.
    pub fn create_binding(&self, binding: Binding) -> Result<Applied, Error> {
        self.change(|stores| match stores.bindings.get(binding.port.as_str()) {
            Some(_) => Err(Error::BindingExists(binding.port)),
            None => self.bind(stores, binding),
        })
    }

    /// Filters a port, whatever it had before: one ruleset takes the place of the other in a single transaction a
    /// table. Its network interface must exist. If the port has this very binding already, only what the kernel lost
    /// of it is written.
    pub fn replace_binding(&self, binding: Binding) -> Result<Applied, Error> {
        self.change(|stores| self.bind(stores, binding))
    }

    fn bind(&self, stores: &mut Stores, mut binding: Binding) -> Result<Applied, Error> {
        let port = binding.port.clone();
        if !interface_exists(&port) {
            return Err(Error::NoSuchPort(port));
        }
        if binding.params.get(VarName::MAC).is_none()
            && let Ok(name) = VarName::MAC.parse()
        {
            binding.params.push(name, &binding.mac.to_string());
        }
        match stores.bindings.get(port.as_str()) {
            Some(old) if **old == binding => {
                let batch = self.batch(&stores.filter_map(), &stores.known, [&binding].into_iter())?;
                return self.apply(&batch);
            }
            _ => stores.known.forget(&port)?,
        }
        let batch = self.batch(&stores.filter_map(), &stores.known, [&binding].into_iter())?;
        let file = stores.bindings.prepare(port.as_str(), &stored_binding(&binding))?;
        let applied = self.apply(&batch)?;
        match file.publish() {
            Ok(()) => Ok(applied),
            Err(error) => Err(self.take_back(stores, &batch, error)),
        }
    }

    /// Stops filtering a port; no trace of it is left in the kernel.
    pub fn delete_binding(&self, port: &str) -> Result<Applied, Error> {
        self.change(|stores| {
            let binding = stores.bindings.get(port).ok_or_else(|| Error::NoSuchBinding(port.to_owned()))?;
            let port_dev = binding.port.clone();
            let mut batch = Batch::default();
            batch.remove(port_dev.clone());
            let applied = self.apply(&batch)?;
            match stores.bindings.remove(port).and_then(|()| stores.known.forget(&port_dev)) {
                Ok(()) => Ok(applied),
                Err(error) => Err(self.take_back(stores, &batch, error)),
            }
        })
    }

    /// The binding of a port.
    pub fn binding(&self, port: &str) -> Result<Arc<Binding>, Error> {
        self.look()?.bindings.get(port).cloned().ok_or_else(|| Error::NoSuchBinding(port.to_owned()))
    }

    /// Every binding, sorted by port.
    pub fn bindings(&self) -> Result<Vec<Arc<Binding>>, Error> {
        Ok(self.look()?.bindings.documents().cloned().collect())
    }

    // ---- the kernel ----

    /// The ruleset a binding would have now, without touching anything: a provisional one where it lacks an address
    /// that would be learned.
    pub fn ruleset(&self, binding: &Binding) -> Result<Ruleset, Error> {
        let stores = self.look()?;
        Ok(wanted(&stores.filter_map(), binding, &stores.known, now())?.ruleset)
    }

    /// The files of the stores that are as if they were not there, sorted by their paths.
    pub fn problems(&self) -> Result<Vec<Problem>, Error> {
        let stores = self.look()?;
        let mut problems: Vec<_> = stores.filters.problems().chain(stores.bindings.problems()).collect();
        problems.sort();
        Ok(problems)
    }

    // ---- inside ----

    /// The stores as they are on disk now.
    pub(crate) fn look(&self) -> Result<MutexGuard<'_, Stores>, Error> {
        // A panic while the stores were held left them at most out of date, and they are read again here.
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        stores.refresh()?;
        Ok(stores)
    }

    /// Runs a change while no other thread or process makes one.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Stores) -> Result<T, Error>) -> Result<T, Error> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = lock(&self.config.state_dir)?;
        stores.refresh()?;
        stores.set_damaged_aside();
        let done = change(&mut stores)?;
        stores.refresh()?;
        drop(lock);
        self.learner.listen_if_needed(self, &mut stores);
        Ok(done)
    }

    /// The rulesets that bindings ask for.
    fn batch<'a>(
        &self,
        filters: &FilterMap,
        known: &Known,
        bindings: impl Iterator<Item = &'a Binding>,
    ) -> Result<Batch, Error> {
        let now = now();
        let mut batch = Batch::default();
        for binding in bindings {
            let ruleset = wanted(filters, binding, known, now)?.ruleset;
            batch.filter(binding.port.clone(), Arc::new(ruleset));
        }
        Ok(batch)
    }

    pub(crate) fn apply(&self, batch: &Batch) -> Result<Applied, Error> {
        if batch.ports.is_empty() {
            return Ok(Applied::default());
        }
        Ok(self.backend.apply(batch)?)
    }

    /// Brings the ports of a batch back to what the stores say, because the change could not be stored.
    fn take_back(&self, stores: &Stores, batch: &Batch, error: Error) -> Error {
        let filters = stores.filter_map();
        let mut old = Batch::default();
        for port in batch.ports.keys() {
            let binding = stores.bindings.get(port.as_str());
            match binding.map(|binding| wanted(&filters, binding, &stores.known, now())) {
                Some(Ok(wanted)) => old.filter(port.clone(), Arc::new(wanted.ruleset)),
                Some(Err(_)) => old.filter(port.clone(), Arc::new(Ruleset::drop_all())),
                None => old.remove(port.clone()),
            }
        }
        if let Err(failed) = self.backend.apply(&old) {
            log::error!("taking back what could not be stored: {failed}");
        }
        error
    }
}

/// The UUID of a filter that is to be stored: its own, else that of the one it replaces, else a new one.
fn settle_uuid(stores: &Stores, filter: &Filter, old: Option<Uuid>) -> Result<Uuid, Error> {
    let Some(uuid) = filter.uuid else { return Ok(old.unwrap_or_else(Uuid::new_v4)) };
    let conflict = |conflict| Err(Error::UuidConflict { name: filter.name.clone(), uuid, conflict });
    match old {
        Some(old) if old != uuid => return conflict(format!("the store has it with {old}")),
        _ => (),
    }
    match stores.filters.documents().find(|other| other.uuid == Some(uuid) && other.name != filter.name) {
        Some(other) => conflict(format!("that is the one of '{}'", other.name)),
        None => Ok(uuid),
    }
}

fn stored_filter(filter: &Filter) -> String {
    format!("<!-- Written by nwfilter. To change it: nwfilterctl define FILE -->\n\n{}", write_filter(filter))
}

fn stored_binding(binding: &Binding) -> String {
    format!("<!-- Written by nwfilter. It is gone when the port is. -->\n\n{}", write_binding_status(binding))
}
