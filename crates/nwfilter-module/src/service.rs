//! What each function of the driver does, in safe Rust: filters and bindings in, documents out.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nwfilter::{Applied, Driver, Error, Reconciler, Reloaded, Transaction, with_causes};
use nwfilter_xml::{
    Binding, Filter, FilterName, PortDev, Strictness, Uuid, read_binding, read_filter_with, write_binding,
    write_filter,
};

use crate::choice::Choice;
use crate::inhibitor;
use crate::leaving::Leaving;
use crate::libvirt::{LoadError, uuid_of};
use crate::lock;
use crate::refusal::{Code, Refusal};
use crate::setup::Setup;
use crate::validation::{Validation, valid};

/// The driver behind every connection.
pub(crate) struct Service {
    /// `None` in the daemon of a user other than root.
    driver: Option<Arc<Driver>>,
    /// How it was opened.
    setup: Setup,
    leaving: Leaving,
    /// `None` while changes of others cannot be followed.
    reconciler: Mutex<Option<Reconciler>>,
}

static SERVICE: Mutex<Option<Arc<Service>>> = Mutex::new(None);

/// Unset until libvirt has started the driver.
static ROLE: OnceLock<Result<Role, LoadError>> = OnceLock::new();

/// What daemon the driver is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// root's, which filters the host's ports.
    System,
    /// That of another user, which has neither filters nor bindings and takes none.
    Session,
}

fn running() -> MutexGuard<'static, Option<Arc<Service>>> {
    SERVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// Lets calls be served from now on, or has them refused with the reason.
    pub(crate) fn start(role: Result<Role, LoadError>) -> Result<(), Refusal> {
        if matches!(role, Ok(Role::System)) {
            lock::take().map_err(|reason| Refusal::new(Code::Internal, reason))?;
        }
        ROLE.get_or_init(|| role);
        Ok(())
    }

    /// The service of this process. The first call opens the stores and brings the kernel to what they ask for; if
    /// that is impossible, the next call tries again.
    pub(crate) fn get() -> Result<Arc<Service>, Refusal> {
        let role = match ROLE.get() {
            None => return Err(Refusal::new(Code::Internal, "libvirt has not started the nwfilter driver")),
            Some(Err(error)) => {
                return Err(Refusal::new(Code::Internal, format!("nothing is filtered: {error}")));
            }
            Some(Ok(role)) => *role,
        };
        let mut service = running();
        if let Some(service) = &*service {
            return Ok(service.clone());
        }
        let opened = Arc::new(Self::open(role)?);
        *service = Some(opened.clone());
        Ok(opened)
    }

    /// Ends the service, if there is one, and leaves the rules in a form that libvirt's own driver can take over.
    pub(crate) fn hand_over() -> Result<(), Refusal> {
        let Some(service) = running().take() else { return Ok(()) };
        if let Some(driver) = &service.driver {
            service.leaving.take_all().iter().for_each(|port| remove(driver, port));
        }
        service.reconciler.lock().unwrap_or_else(PoisonError::into_inner).take();
        let setup = service.setup.clone();
        // Ends what it learns too, unless a call is still running.
        drop(service);
        let left = match setup.choice {
            Choice::Xtables => setup.open_as_list().and_then(|driver| driver.reload().map(drop)),
            // libvirt's driver has no part in this table, which stays in force.
            Choice::Nftables => Ok(()),
        };
        lock::release();
        Ok(left?)
    }

    fn open(role: Role) -> Result<Self, Refusal> {
        let setup = match role {
            Role::System => Setup::of_host().map_err(|why| Refusal::new(Code::Internal, why))?,
            Role::Session => Setup::of_session(),
        };
        let driver = match role {
            Role::System => Some(Arc::new(setup.open(Driver::builder())?)),
            Role::Session => None,
        };
        // What can be served must be: a host whose tables cannot be read now may have them read later.
        let begun = driver.as_ref().map(|driver| {
            let reloaded = driver.reload()?;
            let all_filtered = reloaded.is_complete();
            tell(reloaded);
            if all_filtered {
                let bound = driver.bindings()?.iter().map(|binding| binding.port.clone()).collect();
                setup.choice.take_over(&bound, setup.state_dir());
            }
            Ok::<(), Error>(())
        });
        if let Some(Err(error)) = begun {
            log::error!("the kernel is not what the bindings ask for: {}", with_causes(&error));
        }
        if let Some(driver) = &driver {
            setup.serve_metrics(driver);
        }
        let service = Self { driver, setup, leaving: Leaving::default(), reconciler: Mutex::default() };
        service.keep();
        service.stay_while_bound();
        Ok(service)
    }

    /// The driver, for what changes something; refused in the daemon of a user other than root.
    pub(crate) fn driver(&self) -> Result<&Arc<Driver>, Refusal> {
        let session =
            || Refusal::new(Code::OperationInvalid, "the daemon of a user other than root filters nothing");
        self.driver.as_ref().ok_or_else(session)
    }

    /// Brings the kernel to what the stores ask for. Settings take effect when the daemon starts.
    pub(crate) fn reload(&self) -> Result<(), Refusal> {
        self.setup.compare_with_host();
        let reloaded = self.driver()?.reload().map(tell);
        self.stay_while_bound();
        Ok(reloaded?)
    }

    /// Keeps the daemon from ending by itself while ports are bound.
    fn stay_while_bound(&self) {
        if let Some(driver) = &self.driver {
            stay_while_bound(driver);
        }
    }

    /// Has what others change in the kernel repaired, if that is not so yet.
    fn keep(&self) {
        let Some(driver) = &self.driver else { return };
        let mut reconciler = self.reconciler.lock().unwrap_or_else(PoisonError::into_inner);
        if reconciler.is_none() {
            *reconciler = driver.keep().map_err(|error| log::error!("{}", with_causes(&error))).ok();
        }
    }

    // ---- filters ----

    /// The filters of the store. The stock filters that the library embeds serve references, but are not listed:
    /// libvirt's list is that of its directory.
    pub(crate) fn filters(&self) -> Result<Vec<Arc<Filter>>, Refusal> {
        self.driver.as_ref().map_or(Ok(Vec::new()), |driver| Ok(driver.stored_filters()?))
    }

    pub(crate) fn filter(&self, name: &FilterName) -> Result<Arc<Filter>, Refusal> {
        match &self.driver {
            Some(driver) => Ok(driver.filter(name)?),
            None => Err(Error::NoSuchFilter(name.clone()).into()),
        }
    }

    pub(crate) fn filter_by_uuid(&self, uuid: Uuid) -> Result<Arc<Filter>, Refusal> {
        let filters = self.driver.as_ref().map_or(Ok(Vec::new()), |driver| driver.filters())?;
        let found = filters.into_iter().find(|filter| uuid_of(filter) == uuid);
        found.ok_or_else(|| Refusal::new(Code::NoFilter, format!("no filter has the UUID {uuid}")))
    }

    /// Reads a filter without putting it into the store.
    pub(crate) fn read_filter(&self, text: &str, validation: Validation) -> Result<Filter, Refusal> {
        valid(read_filter_with("filter", text, Strictness::AsLibvirt), validation)
    }

    pub(crate) fn define(&self, filter: Filter) -> Result<Arc<Filter>, Refusal> {
        let mut transaction = Transaction::new();
        transaction.define_filter(filter);
        let mut done = self.driver()?.commit(transaction)?;
        warn(&done.applied);
        done.filters.pop().ok_or_else(|| Refusal::new(Code::Internal, "no filter was defined"))
    }

    pub(crate) fn undefine(&self, name: &FilterName) -> Result<(), Refusal> {
        // To libvirt their bindings are deleted, so they do not use the filter.
        let driver = self.driver()?;
        self.leaving.take_all().iter().for_each(|port| remove(driver, port));
        Ok(driver.undefine_filter(name)?)
    }

    pub(crate) fn filter_xml(&self, filter: &Filter) -> String {
        write_filter(&Filter { uuid: Some(uuid_of(filter)), ..filter.clone() })
    }

    // ---- bindings ----

    pub(crate) fn bindings(&self) -> Result<Vec<Arc<Binding>>, Refusal> {
        // In this order: what has left by the second look is not in the first, or was leaving then.
        let leaving = self.leaving.names();
        let mut bindings = self.driver.as_ref().map_or(Ok(Vec::new()), |driver| driver.bindings())?;
        bindings.retain(|binding| !leaving.contains(&binding.port));
        Ok(bindings)
    }

    pub(crate) fn binding(&self, port: &PortDev) -> Result<Arc<Binding>, Refusal> {
        match &self.driver {
            Some(driver) if !self.leaving.contains(port) => Ok(driver.binding(port)?),
            _ => Err(Error::NoSuchBinding(port.clone()).into()),
        }
    }

    /// Reads a binding without filtering its port.
    pub(crate) fn read_binding(&self, text: &str, validation: Validation) -> Result<Binding, Refusal> {
        valid(read_binding("filterbinding", text), validation)
    }

    pub(crate) fn bind(&self, binding: Binding) -> Result<Arc<Binding>, Refusal> {
        let (driver, port) = (self.driver()?, binding.port.clone());
        let bound = match self.leaving.stay(&port) {
            true => driver.replace_binding(binding).inspect_err(|_| self.leave(driver, &port)),
            false => driver.create_binding(binding),
        };
        warn(&bound.map_err(|error| Refusal::at(&error, driver.location(&error)))?);
        self.stay_while_bound();
        self.keep();
        self.binding(&port)
    }

    /// Stops filtering a port: at once if it is gone, else in a moment, unless it is bound again.
    pub(crate) fn unbind(&self, port: &PortDev) -> Result<(), Refusal> {
        let driver = self.driver()?;
        match exists(port) {
            true => self.leave(driver, port),
            false => {
                warn(&driver.delete_binding(port)?);
                stay_while_bound(driver);
            }
        }
        Ok(())
    }

    fn leave(&self, driver: &Arc<Driver>, port: &PortDev) {
        let (driver, name) = (driver.clone(), port.clone());
        self.leaving.leave(port, move || remove(&driver, &name));
    }

    pub(crate) fn binding_xml(&self, binding: &Binding) -> String {
        write_binding(binding)
    }
}

/// What a reload did, in libvirt's log.
fn tell(reloaded: Reloaded) {
    match reloaded.applied.changed.len() {
        0 => log::debug!("nothing had to be written"),
        ports => log::info!("{ports} ports were brought to what their bindings ask for"),
    }
    warn(&reloaded.applied);
    reloaded.failed.iter().for_each(|failed| log::error!("{}", with_causes(failed)));
    reloaded.failed_sets.iter().for_each(|failed| log::error!("{}", with_causes(failed)));
    for port in &reloaded.unmanaged.unbound {
        log::warn!(nwfilter_port = port.as_str(); "port '{port}' has rules but no binding; they are left as they are");
    }
    for port in &reloaded.unmanaged.absent {
        log::warn!(nwfilter_port = port.as_str(); "port '{port}' has a binding, but there is no network interface of that name");
    }
}

fn warn(applied: &Applied) {
    for warning in &applied.warnings {
        log::warn!(nwfilter_port = warning.port().as_str(); "{warning}");
    }
}

fn exists(port: &PortDev) -> bool {
    nix::net::if_::if_nametoindex(port.as_str()).is_ok()
}

/// Removes a binding that libvirt has deleted; there is nobody to tell any more that it failed.
fn remove(driver: &Driver, port: &PortDev) {
    if let Err(error) = driver.delete_binding(port) {
        log::error!(nwfilter_port = port.as_str(); "port '{port}' is still filtered: {}", with_causes(&error));
    }
    stay_while_bound(driver);
}

fn stay_while_bound(driver: &Driver) {
    // If the bindings cannot be read, there may be some.
    inhibitor::update(|| driver.bindings().map_or(true, |bindings| !bindings.is_empty()));
}
