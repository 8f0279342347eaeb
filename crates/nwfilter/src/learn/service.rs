//! The driver's side of learning: which ports need it, what is known, and applying what is learned.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nwfilter_xml::{Binding, PortDev};

use super::BindingState;
use super::engine::{self, Until, Waker};
use super::known::{Change, GuestKey, Lease};
use super::port::is_complete;
use super::serving::serves_dhcp;
use super::taken::Taken;
use super::wanted::{Need, Past, needed, wanted};
use super::{Family, Learning, Method, PortStatus};
use crate::group::Request;
use crate::stores::{FilterMap, Stores};
use crate::{Driver, Error};

/// The learner's thread. It is started when a port needs it.
#[derive(Debug, Default)]
pub(crate) struct Background {
    /// Whether this driver leaves learning to another one.
    elsewhere: bool,
    running: Mutex<Option<(Arc<Waker>, JoinHandle<()>)>>,
}

impl Background {
    /// For a driver that starts no learner.
    pub(crate) fn elsewhere() -> Self {
        Self { elsewhere: true, running: Mutex::default() }
    }

    /// If a port needs it, starts the thread, or makes it read the stores. Then the thread listens on the port.
    pub(crate) fn listen_if_needed(&self, driver: &Driver) {
        if self.elsewhere || driver.last_seen().needs().is_empty() {
            return;
        }
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        match running.as_ref().filter(|(_, thread)| !thread.is_finished()) {
            Some((waker, _)) => waker.wake_and_wait(),
            None => match driver.inside(|| start(driver)) {
                Ok(started) => *running = Some(started),
                Err(error) => log::error!("addresses cannot be learned: {error}"),
            },
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some((waker, thread)) = running.take() {
            waker.stop();
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Starts a thread that works with the same driver, in the network namespace of the calling thread.
fn start(driver: &Driver) -> Result<(Arc<Waker>, JoinHandle<()>), Error> {
    let failed = |source| Error::Learner { source };
    let waker = Waker::new().map_err(failed)?;
    let theirs = (driver.for_thread(), waker.clone());
    let (ready, is_ready) = std::sync::mpsc::channel::<()>();
    let learn = move || {
        let (driver, waker) = theirs;
        engine::keep_running(&driver, &waker, || drop(ready));
    };
    let thread = std::thread::Builder::new().name("nwfilter-learn".into()).spawn(learn).map_err(failed)?;
    // Nothing is sent: this waits until the sender is dropped. Another process may be the learner.
    let _ = is_ready.recv_timeout(std::time::Duration::from_secs(1));
    Ok((waker, thread))
}

/// What each binding means for learning. Cached until the binding or a filter changes.
#[derive(Default)]
pub(crate) struct NeedCache {
    filters: FilterMap,
    roles: BTreeMap<PortDev, Role>,
}

/// What a binding means for learning.
#[derive(Clone)]
struct Role {
    binding: Arc<Binding>,
    /// The address that it does not give, whether it is known or not.
    need: Option<Need>,
    /// Whether its guest may serve DHCP.
    serves_dhcp: bool,
}

impl NeedCache {
    fn refresh<'a>(
        &mut self,
        filters: FilterMap,
        bindings: impl Iterator<Item = &'a Arc<Binding>>,
        learning: &Learning,
    ) {
        let same = self.filters.len() == filters.len()
            && self.filters.values().zip(filters.values()).all(|(old, new)| Arc::ptr_eq(old, new));
        let mut old = std::mem::take(&mut self.roles);
        for binding in bindings {
            let known = old.remove(&binding.port).filter(|old| same && Arc::ptr_eq(&old.binding, binding));
            let role = known.unwrap_or_else(|| Role {
                binding: binding.clone(),
                // The error of a binding without rules was reported when its rules were made.
                need: needed(&filters, binding, learning).ok().flatten(),
                serves_dhcp: serves_dhcp(&filters, &binding.filter),
            });
            self.roles.insert(binding.port.clone(), role);
        }
        self.filters = filters;
    }
}

impl Stores {
    /// The bindings whose addresses are still to be learned.
    pub(crate) fn needs(&self) -> Vec<(Arc<Binding>, Need)> {
        let mut needs = self.roles(|role| Some((role.binding.clone(), role.need.clone()?)));
        needs.retain(|(binding, need)| {
            let learned = self.known.learned(&binding.port, GuestKey::of(binding), need.family);
            need.method == Method::Dhcp || !learned.is_some_and(|learned| is_complete(&learned.addresses))
        });
        needs
    }

    /// The bound ports whose guests must not serve DHCP.
    pub(crate) fn closed_to_dhcp(&self) -> Vec<PortDev> {
        self.roles(|role| (!role.serves_dhcp).then(|| role.binding.port.clone()))
    }

    fn roles<T>(&self, pick: impl Fn(&Role) -> Option<T>) -> Vec<T> {
        let mut cache = self.need_cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.refresh(self.filter_map(), self.bindings.documents(), &self.learning);
        cache.roles.values().filter_map(pick).collect()
    }
}

/// Addresses of guests.
impl Driver {
    /// Whether the filter of a port is in force, and with which addresses.
    pub fn binding_state(&self, port: &PortDev) -> Result<BindingState, Error> {
        let stores = self.look()?;
        let binding = stores.bindings.get(port.as_str()).ok_or_else(|| Error::NoSuchBinding(port.clone()))?;
        let wanted = wanted(&stores.filter_map(), binding, &stores, Past::Counts)?;
        self.attended(wanted.state)
    }

    /// The status of every bound port, sorted by port.
    pub fn port_statuses(&self) -> Result<Vec<PortStatus>, Error> {
        let stores = self.look()?;
        let filters = stores.filter_map();
        let failed = |source| Error::Links { source };
        let ports = self.ports()?;
        let status = |binding: &Arc<Binding>| {
            let wanted = wanted(&filters, binding, &stores, Past::Counts);
            let attachment = ports.attachment(&binding.port).map_err(failed)?;
            let (binding, state) = (binding.clone(), wanted.and_then(|wanted| self.attended(wanted.state)));
            Ok(PortStatus { binding, state, attachment })
        };
        stores.bindings.documents().map(status).collect()
    }

    /// The state, or [`BindingState::Unattended`] if no process learns the address.
    fn attended(&self, state: BindingState) -> Result<BindingState, Error> {
        match state {
            BindingState::Learning { family, method } if !engine::is_attended(&self.config().state_dir)? => {
                Ok(BindingState::Unattended { family, method })
            }
            state => Ok(state),
        }
    }

    /// Whether any port waits for an address, or has a leased one.
    pub fn has_to_learn(&self) -> Result<bool, Error> {
        Ok(!self.look()?.needs().is_empty())
    }

    /// Learns for all ports of the binding store, including those that are bound meanwhile. Returns when no port needs it, or
    /// immediately if another process already does it.
    ///
    /// Calls `ready` once, when it listens on the ports.
    pub fn learn(&self, ready: impl FnOnce() + Send) -> Result<(), Error> {
        let waker = Waker::new().map_err(|source| Error::Learner { source })?;
        self.inside(|| engine::run(self, &waker, Until::Idle, ready))
    }

    /// The time at which the next lease of these ports' guests ends, in seconds since the epoch.
    pub(crate) fn next_expiry<'a>(
        &self,
        ports: impl Iterator<Item = &'a PortDev>,
    ) -> Result<Option<u64>, Error> {
        let stores = self.look()?;
        let leases = ports.flat_map(|port| stores.leases(port));
        Ok(leases.filter_map(|(_, lease)| lease.expires).min())
    }

    /// The leases of these ports' guests that have expired.
    pub(crate) fn expired<'a>(
        &self,
        ports: impl Iterator<Item = &'a PortDev>,
    ) -> Result<Vec<(PortDev, Change)>, Error> {
        let stores = self.look()?;
        let now = stores.known.now();
        let ended = |port: &'a PortDev| {
            let leases = stores.leases(port).filter(|(_, lease)| !lease.holds_at(now));
            let change = |(guest, lease): (_, &Lease)| Change::Expired { guest, address: lease.address };
            leases.map(|lease| (port.clone(), change(lease))).collect::<Vec<_>>()
        };
        Ok(ports.flat_map(ended).collect())
    }

    /// Stores changes, and applies the rules of `ports` and of the ports whose guests have other addresses now.
    pub(crate) fn learned(
        &self,
        changes: &[(PortDev, Change)],
        ports: &BTreeSet<PortDev>,
    ) -> Result<Settled, Error> {
        self.ask(|answer| Request::Learn(changes.to_vec(), ports.clone(), answer))
    }
}

/// The result of applied changes.
pub(crate) struct Settled {
    /// The ports for which nothing is left to learn.
    pub(crate) complete: Vec<PortDev>,
    /// Addresses that were refused because they belong to others.
    pub(crate) refused: Vec<(PortDev, IpAddr)>,
}

/// Stored changes, before the rules are applied.
pub(crate) struct Learned {
    /// The ports whose rules must be made again.
    pub(crate) ports: BTreeSet<PortDev>,
    /// Addresses that were refused because they belong to others.
    pub(crate) refused: Vec<(PortDev, IpAddr)>,
}

/// Changes, without those that no longer concern a guest and those that would give a guest the address of another.
struct Judged {
    changes: Vec<(PortDev, Change)>,
    refused: Vec<(PortDev, IpAddr)>,
}

impl Stores {
    /// Stores changes, whether or not rules can be made of them. The rules of `ports` are made again in any case.
    pub(crate) fn learn(
        &mut self,
        changes: &[(PortDev, Change)],
        mut ports: BTreeSet<PortDev>,
    ) -> Result<Learned, Error> {
        let Judged { changes, refused } = self.judge(changes)?;
        ports.extend(self.known.record(&changes)?);
        Ok(Learned { ports, refused })
    }

    fn judge(&self, changes: &[(PortDev, Change)]) -> Result<Judged, Error> {
        let mut judged = Judged { changes: Vec::new(), refused: Vec::new() };
        let failed = |source| Error::Links { source };
        let mut taken = None;
        for (port, change) in changes {
            let guest = change.guest();
            // Since the observation, the binding may have been deleted or given to another guest.
            let binding = self.bindings.get(port.as_str()).filter(|binding| GuestKey::of(binding) == guest);
            let Some(binding) = binding else { continue };
            let Some(address) = self.new_address(change) else {
                judged.changes.push((port.clone(), change.clone()));
                continue;
            };
            let taken = match &mut taken {
                Some(taken) => taken,
                None => taken.insert(Taken::now(self).map_err(failed)?),
            };
            match taken.by(binding, address).map_err(failed)? {
                None => {
                    taken.add(binding, address);
                    judged.changes.push((port.clone(), change.clone()));
                }
                Some(holder) => {
                    log::warn!(nwfilter_port = port.as_str(); "{port}: address {address} is not the guest's: {holder} has it");
                    judged.refused.push((port.clone(), address));
                    if let Change::Learned { .. } = change {
                        judged.changes.push((port.clone(), Change::Refused { guest, address }));
                    }
                }
            }
        }
        Ok(judged)
    }

    /// The address that a change would give to a guest that does not have it yet.
    fn new_address(&self, change: &Change) -> Option<IpAddr> {
        match change {
            Change::Learned { address, .. } => Some(*address),
            Change::Granted { guest, lease } => {
                let mut leases = self.known.leases(*guest, Family::of(lease.address));
                leases.all(|known| known.address != lease.address).then_some(lease.address)
            }
            _ => None,
        }
    }

    /// The leases of a port's guest, of both families.
    fn leases<'a>(&'a self, port: &PortDev) -> impl Iterator<Item = (GuestKey, &'a Lease)> + use<'a> {
        let guest = self.bindings.get(port.as_str()).map(|binding| GuestKey::of(binding));
        guest.into_iter().flat_map(|guest| {
            let leases = [Family::Ipv4, Family::Ipv6].map(|family| self.known.leases(guest, family));
            leases.into_iter().flatten().map(move |lease| (guest, lease))
        })
    }
}
