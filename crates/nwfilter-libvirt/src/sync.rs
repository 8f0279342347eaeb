//! Compares the bindings with those that guests ask for, and binds and unbinds ports.

use std::collections::{BTreeMap, BTreeSet};

use nwfilter::{Attachment, Committed, Driver, Error, Transaction};
use nwfilter_xml::{Binding, Domain, NoBinding, PortDev, Uuid};

/// A guest, as libvirt knows it.
#[derive(Clone, Debug)]
pub enum Guest {
    /// It runs. The domain has what it asks for.
    Running(Domain),
    /// It does not run, or does not exist any more.
    Ended(Uuid),
}

/// The changes that lead from the present bindings to those that guests ask for.
///
/// Bindings of other owners are left alone, because another program may have made them, unless their port does not exist
/// any more.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    bind: Vec<Binding>,
    unbind: Vec<PortDev>,
}

/// What a [`Plan`] did.
#[derive(Debug, Default)]
pub struct Synced {
    /// The ports that are bound now.
    pub bound: Vec<PortDev>,
    /// The ports that were unbound.
    pub unbound: Vec<PortDev>,
    /// The ports whose changes were refused. They are as they were.
    pub refused: Vec<Refused>,
}

/// A port whose change was refused.
#[derive(Debug, thiserror::Error)]
#[error("port '{port}' of guest '{guest}'")]
pub struct Refused {
    /// The port.
    pub port: PortDev,
    /// The name of the guest.
    pub guest: String,
    /// The guest's UUID.
    pub uuid: Uuid,
    /// Why.
    pub source: Error,
}

impl Plan {
    /// Plans the changes for these guests.
    pub fn new<'a>(driver: &Driver, guests: impl IntoIterator<Item = &'a Guest>) -> Result<Self, Error> {
        let mut owners = BTreeSet::new();
        let mut wanted = BTreeMap::new();
        for guest in guests {
            match guest {
                Guest::Running(domain) => {
                    owners.extend(domain.uuid);
                    wanted.extend(bindings(domain).map(|binding| (binding.port.clone(), binding)));
                }
                Guest::Ended(uuid) => {
                    owners.insert(*uuid);
                }
            }
        }
        let present = driver.bindings()?;
        let exists = |port: &PortDev| exists(driver, port);
        let renamed = wanted.values().filter(|binding| !exists(&binding.port)).filter_map(|binding| {
            let now = present.iter().find(|other| {
                is_of_one(other, binding) && !wanted.contains_key(&other.port) && exists(&other.port)
            })?;
            Some((binding.port.clone(), now.port.clone()))
        });
        for (old, new) in renamed.collect::<Vec<_>>() {
            if let Some(mut binding) = wanted.remove(&old) {
                binding.port = new.clone();
                wanted.insert(new, binding);
            }
        }
        let is_obsolete = |binding: &Binding| {
            let ours = owners.contains(&binding.owner.uuid);
            !wanted.contains_key(&binding.port) && (ours || !exists(&binding.port))
        };
        let unbind = present.iter().filter(|binding| is_obsolete(binding));
        let unbind = unbind.map(|binding| binding.port.clone()).collect();
        Ok(Self { bind: wanted.into_values().collect(), unbind })
    }

    /// The ports that will have no binding.
    pub fn unbinds(&self) -> &[PortDev] {
        &self.unbind
    }

    /// Carries out the plan for all ports together. A refused port does not affect the others.
    pub fn carry_out(self, driver: &Driver) -> Synced {
        let transaction = |change: &dyn Fn(&mut Transaction)| {
            let mut transaction = Transaction::new();
            change(&mut transaction);
            transaction
        };
        let unbind = self.unbind.iter().map(|port| transaction(&|t| _ = t.delete_binding(port)));
        let bind = self.bind.iter().map(|binding| transaction(&|t| _ = t.replace_binding(binding.clone())));
        let mut done = driver.commit_each(unbind.chain(bind)).into_iter();
        let mut synced = Synced::default();
        for (port, done) in self.unbind.into_iter().zip(&mut done) {
            match done {
                Ok(_) | Err(Error::NoSuchBinding(_)) => synced.unbound.push(port),
                Err(error) => {
                    log::error!(nwfilter_port = port.as_str(); "port '{port}' is still bound: {error}")
                }
            }
        }
        for (Binding { port, owner, .. }, done) in self.bind.into_iter().zip(&mut done) {
            match done {
                Ok(Committed { applied, .. }) => {
                    applied
                        .warnings
                        .iter()
                        .for_each(|warning| log::warn!(nwfilter_port = warning.port().as_str(); "{warning}"));
                    synced.bound.push(port);
                }
                Err(source) => {
                    synced.refused.push(Refused { port, guest: owner.name, uuid: owner.uuid, source });
                }
            }
        }
        synced
    }
}

/// The bindings that a running guest asks for. Interfaces that cannot be bound are logged.
fn bindings(domain: &Domain) -> impl Iterator<Item = Binding> {
    domain.interfaces.iter().filter_map(|interface| match domain.binding(interface) {
        Ok(binding) => Some(binding),
        Err(NoBinding::Filter) => None,
        Err(why) => {
            log::warn!("guest '{}', interface at {}: not filtered: {why}", domain.name, interface.place);
            None
        }
    })
}

/// Whether two bindings are of one interface of a guest, which may have another name than libvirt knows: see
/// [`Driver::keep`].
fn is_of_one(present: &Binding, wanted: &Binding) -> bool {
    (present.owner.uuid, present.mac) == (wanted.owner.uuid, wanted.mac)
}

/// Whether an interface exists. If that is not known, it may.
fn exists(driver: &Driver, port: &PortDev) -> bool {
    driver.attachment(port).map_or(true, |attachment| attachment != Attachment::Absent)
}
