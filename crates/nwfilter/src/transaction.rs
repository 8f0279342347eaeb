//! Transactions: changes that are all made or none.

mod sets;
mod undo;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nwfilter_rules::{Applied, Batch, Desired, RulesError, includes_itself, reachable};
use nwfilter_xml::{
    Binding, Filter, FilterName, FilterSet, PortDev, SetEntry, SetName, SetRange, Uuid, VarName,
    write_binding_status, write_filter, write_set,
};

use crate::files::Step;
use crate::learn::wanted::{Past, Wanted, wanted};
use crate::progress::Reporter;
use crate::sets::EntryChange;
use crate::stock::stock_filters;
use crate::stores::{FilterMap, Stores};
use crate::written::comment;
use crate::{Cut, Error, Event, Host, Phase};

use self::sets::Touched;
use self::undo::Undo;

/// Changes of stores and kernel that [`Driver::commit`](crate::Driver::commit) makes all or none.
///
/// Each operation is checked against the result of those before it; rules are made from the result of all. So one transaction
/// can define a filter and bind a port to it, or change a filter's parameters and the bindings that pass them.
///
/// ```no_run
/// # use nwfilter::{Driver, Error, Transaction, xml};
/// # fn start(driver: &Driver, guest: Vec<xml::Binding>, filter: xml::Filter) -> Result<(), Error> {
/// let mut transaction = Transaction::new();
/// transaction.define_filter(filter);
/// for binding in guest {
///     transaction.create_binding(binding);
/// }
/// driver.commit(transaction)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    operations: Vec<Operation>,
    /// Whether connections that the new rules refuse are ended.
    pub(crate) cuts: bool,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Operation {
    Define(Filter, Option<PathBuf>),
    Undefine(FilterName),
    Create(Binding),
    Replace(Binding),
    Delete(PortDev),
    DefineSet(FilterSet),
    ChangeSet(SetName, EntryChange),
    UndefineSet(SetName),
}

/// What a transaction did.
#[derive(Clone, Debug, Default)]
pub struct Committed {
    /// The filters that were defined, as they are in the store, in the order of their operations.
    pub filters: Vec<Arc<Filter>>,
    /// The sets that were defined or changed, as they are in the store, in the order of their operations.
    pub sets: Vec<Arc<FilterSet>>,
    /// What was written for the transaction's ports. The commits may have included transactions of other threads.
    pub applied: Applied,
    /// The connections that were ended, if [`Transaction::cut_connections`] asked for it.
    pub cut: Cut,
    /// What the transaction concerns, if connections are still to be ended for it.
    pub(crate) concerned: Option<Concerned>,
}

/// What connections may have ended for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Concerned {
    /// The ports whose rules may have changed.
    pub(crate) ports: BTreeSet<PortDev>,
    /// The sets whose content may have changed.
    pub(crate) sets: BTreeSet<SetName>,
}

impl Transaction {
    /// A transaction that changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stores a filter. It replaces one of its name, and keeps that one's UUID unless it has its own. Ports that use it are
    /// updated, if their interfaces exist.
    pub fn define_filter(&mut self, filter: Filter) -> &mut Self {
        self.with(Operation::Define(filter, None))
    }

    /// The same for a filter that was read from a file. The store remembers which, so that [`Driver::written`] finds the
    /// rules there.
    ///
    /// [`Driver::written`]: crate::Driver::written
    pub fn define_filter_from(&mut self, file: &Path, filter: Filter) -> &mut Self {
        self.with(Operation::Define(filter, std::path::absolute(file).ok()))
    }

    /// Removes a filter from the store. Refused while a port uses it.
    pub fn undefine_filter(&mut self, name: &FilterName) -> &mut Self {
        self.with(Operation::Undefine(name.clone()))
    }

    /// Filters a port. Its network interface must exist, and it must have no binding.
    pub fn create_binding(&mut self, binding: Binding) -> &mut Self {
        self.with(Operation::Create(binding))
    }

    /// Filters a port, and replaces its binding if it has one. Its network interface must exist. If the port already has an
    /// equal binding, only missing rules are written.
    pub fn replace_binding(&mut self, binding: Binding) -> &mut Self {
        self.with(Operation::Replace(binding))
    }

    /// Stops filtering a port, and removes all its rules.
    pub fn delete_binding(&mut self, port: &PortDev) -> &mut Self {
        self.with(Operation::Delete(port.clone()))
    }

    /// How many bindings it makes or replaces.
    pub(crate) fn bound_ports(&self) -> usize {
        let binds =
            |operation: &&Operation| matches!(operation, Operation::Create(_) | Operation::Replace(_));
        self.operations.iter().filter(binds).count()
    }

    /// Stores a set, and its content in the kernel. It replaces one of its name. The sets that it includes must exist and have
    /// its family. The family of a set in use cannot change.
    pub fn define_set(&mut self, set: FilterSet) -> &mut Self {
        self.with(Operation::DefineSet(set))
    }

    /// Adds entries to a set. An entry that it already has only gets the new comment.
    pub fn add_to_set(&mut self, name: &SetName, entries: Vec<SetEntry>) -> &mut Self {
        self.with(Operation::ChangeSet(name.clone(), EntryChange::Add(entries)))
    }

    /// Removes entries from a set. Each must be an entry of the set itself.
    pub fn remove_from_set(&mut self, name: &SetName, entries: Vec<SetRange>) -> &mut Self {
        self.with(Operation::ChangeSet(name.clone(), EntryChange::Remove(entries)))
    }

    /// Replaces all entries of a set. Its includes and tags stay.
    pub fn replace_in_set(&mut self, name: &SetName, entries: Vec<SetEntry>) -> &mut Self {
        self.with(Operation::ChangeSet(name.clone(), EntryChange::Replace(entries)))
    }

    /// Removes a set from the store and the kernel. Refused while a filter, another set or a port uses it.
    pub fn undefine_set(&mut self, name: &SetName) -> &mut Self {
        self.with(Operation::UndefineSet(name.clone()))
    }

    /// Also ends the connections of the ports concerned that go on by a rule on established ones although the new rules
    /// would not let them begin. That is done after the commit, and [`Committed::cut`] says which were ended.
    ///
    /// Concerned are the ports that are bound, those that use a filter which is defined, and those whose rules ask a set that
    /// changes. A connection is looked at only if it is one of such a port: an address of the port's guest is at one of its
    /// ends, and it is in the conntrack zone of the port's bridge.
    pub fn cut_connections(&mut self) -> &mut Self {
        self.cuts = true;
        self
    }

    fn with(&mut self, operation: Operation) -> &mut Self {
        self.operations.push(operation);
        self
    }
}

/// The changes of transactions.
#[derive(Default)]
pub(crate) struct Change {
    /// The filters to store, and `None` for those to remove.
    filters: BTreeMap<FilterName, Option<Arc<Filter>>>,
    /// The files that some of them were read from.
    sources: BTreeMap<FilterName, PathBuf>,
    /// The same for bindings.
    bindings: BTreeMap<PortDev, Option<Arc<Binding>>>,
    /// The same for sets.
    sets: BTreeMap<SetName, Option<Arc<FilterSet>>>,
    /// The ports whose learned addresses are forgotten.
    pub(crate) forgotten: BTreeSet<PortDev>,
    /// The desired state of ports.
    pub(crate) batch: Batch,
}

/// The stores as transactions will leave them.
pub(crate) struct Draft<'a> {
    stores: &'a Stores,
    host: &'a Host,
    reporter: &'a Reporter,
    /// The filters that names refer to.
    filters: FilterMap,
    change: Change,
    /// What takes back the changes of the last transaction, in their order.
    undo: Vec<Undo>,
}

/// What one unit of a draft concerns.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) filters: Vec<Arc<Filter>>,
    pub(crate) sets: Vec<Arc<FilterSet>>,
    /// The sets whose content it may change.
    pub(crate) changed_sets: BTreeSet<SetName>,
    /// The ports whose rules it may change.
    pub(crate) ports: BTreeSet<PortDev>,
    /// The events to publish when it is done.
    pub(crate) events: Vec<Event>,
    /// The ports that already had an equal binding.
    pub(crate) confirmed: BTreeSet<PortDev>,
    /// The watched ports whose guests have no address left to learn.
    pub(crate) complete: Vec<PortDev>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(stores: &'a Stores, host: &'a Host, reporter: &'a Reporter) -> Self {
        let (filters, change) = (stores.filter_map(), Change::default());
        Self { stores, host, reporter, filters, change, undo: Vec::new() }
    }

    pub(crate) fn into_change(self) -> Change {
        self.change
    }

    /// Adds a transaction. One that is refused leaves the draft as it was.
    pub(crate) fn add(&mut self, transaction: &Transaction) -> Result<Outcome, Error> {
        self.undo.clear();
        self.try_to_add(transaction).inspect_err(|_| self.take_back())
    }

    /// Leaves the changes made so far where it fails.
    fn try_to_add(&mut self, transaction: &Transaction) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let mut defined = BTreeSet::new();
        let mut touched = Touched::default();
        for operation in &transaction.operations {
            match operation {
                Operation::Define(filter, source) => {
                    let filter = self.define(filter.clone(), source.as_ref())?;
                    defined.insert(filter.name.clone());
                    outcome.events.push(Event::FilterDefined(filter.name.clone()));
                    outcome.filters.push(filter);
                }
                Operation::Undefine(name) => {
                    self.undefine(name)?;
                    outcome.events.push(Event::FilterUndefined(name.clone()));
                }
                Operation::Create(binding) if self.binding(&binding.port).is_some() => {
                    return Err(Error::BindingExists(binding.port.clone()));
                }
                Operation::Create(binding) | Operation::Replace(binding) => {
                    outcome.ports.insert(binding.port.clone());
                    touched.port(self.binding(&binding.port), Some(binding));
                    match self.bind(binding.clone())? {
                        Some(event) => outcome.events.push(event),
                        None => drop(outcome.confirmed.insert(binding.port.clone())),
                    }
                }
                Operation::Delete(port) => {
                    touched.port(self.binding(port), None);
                    self.unbind(port)?;
                    outcome.events.push(Event::BindingDeleted(port.clone()));
                    outcome.ports.insert(port.clone());
                }
                Operation::DefineSet(set) => self.define_set(set, &mut touched, &mut outcome)?,
                Operation::ChangeSet(set, change) => {
                    self.change_set(set, change, &mut touched, &mut outcome)?;
                }
                Operation::UndefineSet(set) => self.undefine_set(set, &mut touched, &mut outcome)?,
            }
        }
        defined.extend(self.filters_with(&touched.renamed));
        outcome.ports.extend(self.present_users(&defined));
        self.make_rules(&outcome.ports)?;
        self.settle_sets(touched, &mut outcome)?;
        Ok(outcome)
    }

    /// Makes the rules of ports again after addresses were learned. A port whose rules cannot be made keeps its rules.
    pub(crate) fn follow(&mut self, ports: &BTreeSet<PortDev>) -> Outcome {
        let (mut outcome, mut touched) = (Outcome::default(), Touched::default());
        for port in ports.difference(&self.change.forgotten) {
            let Some(binding) = self.binding(port) else { continue };
            touched.port(Some(binding), None);
            match wanted(&self.filters, binding, self.stores, Past::Counts) {
                Ok(Wanted { ruleset, state }) => {
                    if state.is_complete() {
                        outcome.complete.push(port.clone());
                    }
                    self.change.batch.filter(port.clone(), Arc::new(ruleset));
                    outcome.ports.insert(port.clone());
                    outcome.events.push(Event::AddressChanged { port: port.clone(), state });
                }
                Err(error) => {
                    log::error!(nwfilter_port = port.as_str(); "{error}; it keeps the rules it has")
                }
            }
        }
        if let Err(error) = self.settle_sets(touched, &mut outcome) {
            log::error!("{error}; it keeps what it holds");
        }
        outcome
    }

    fn define(&mut self, mut filter: Filter, source: Option<&PathBuf>) -> Result<Arc<Filter>, Error> {
        filter.uuid = Some(self.settle_uuid(&filter)?);
        if let Some(cycle) = includes_itself(&self.filters, &filter) {
            let source = Box::new(RulesError::IncludesItself { cycle });
            return Err(Error::IncludesItself { name: filter.name, source });
        }
        let filter = Arc::new(filter);
        self.put(|draft| &mut draft.filters, filter.name.clone(), Some(filter.clone()));
        self.put(|draft| &mut draft.change.filters, filter.name.clone(), Some(Some(filter.clone())));
        self.put(|draft| &mut draft.change.sources, filter.name.clone(), source.cloned());
        Ok(filter)
    }

    /// The UUID of a filter that is to be stored: its own, else that of the one it replaces, else a new one.
    fn settle_uuid(&self, filter: &Filter) -> Result<Uuid, Error> {
        let old = self.stored_filter(&filter.name).and_then(|old| old.uuid);
        let Some(uuid) = filter.uuid else { return Ok(old.unwrap_or_else(Uuid::new_v4)) };
        let conflict = |conflict| Err(Error::UuidConflict { name: filter.name.clone(), uuid, conflict });
        if let Some(old) = old.filter(|old| *old != uuid) {
            return conflict(format!("the store has it with {old}"));
        }
        let others = self.filters.keys().filter(|name| **name != filter.name);
        match others.filter_map(|name| self.stored_filter(name)).find(|other| other.uuid == Some(uuid)) {
            Some(other) => conflict(format!("that is the one of '{}'", other.name)),
            None => Ok(uuid),
        }
    }

    fn undefine(&mut self, name: &FilterName) -> Result<(), Error> {
        if !self.filters.contains_key(name) {
            return Err(Error::NoSuchFilter(name.clone()));
        }
        if self.stored_filter(name).is_none() {
            return Err(Error::StockFilter(name.clone()));
        }
        let ports: Vec<_> =
            self.users(&BTreeSet::from([name.clone()])).map(|user| user.port.clone()).collect();
        if !ports.is_empty() {
            return Err(Error::FilterInUse { name: name.clone(), ports });
        }
        self.put(|draft| &mut draft.filters, name.clone(), stock_filters().get(name).cloned());
        self.put(|draft| &mut draft.change.filters, name.clone(), Some(None));
        Ok(())
    }

    /// `None` if the port already has an equal binding.
    fn bind(&mut self, mut binding: Binding) -> Result<Option<Event>, Error> {
        let port = binding.port.clone();
        if !self.host.has(&port) {
            return Err(Error::NoSuchPort(port));
        }
        binding.pass_mac();
        let (event, is_known) = match self.binding(&port) {
            Some(old) if **old == binding => return Ok(None),
            Some(old) => (Event::BindingReplaced(port.clone()), differ_by_tags_only(old, &binding)),
            None => (Event::BindingCreated(port.clone()), false),
        };
        if !is_known {
            self.forget(&port);
        }
        self.put(|draft| &mut draft.change.bindings, port, Some(Some(Arc::new(binding))));
        Ok(Some(event))
    }

    fn unbind(&mut self, port: &PortDev) -> Result<(), Error> {
        if self.binding(port).is_none() {
            return Err(Error::NoSuchBinding(port.clone()));
        }
        self.forget(port);
        self.put(|draft| &mut draft.change.bindings, port.clone(), Some(None));
        Ok(())
    }

    /// Makes the rules of ports again. Ports without a binding have none.
    fn make_rules(&mut self, ports: &BTreeSet<PortDev>) -> Result<(), Error> {
        for (done, port) in ports.iter().enumerate() {
            self.reporter.report(Phase::Rules, done, ports.len());
            let Some(binding) = self.binding(port) else {
                self.put(|draft| &mut draft.change.batch.ports, port.clone(), Some(Desired::Gone));
                continue;
            };
            let past = if self.change.forgotten.contains(port) { Past::Forgotten } else { Past::Counts };
            let wanted = wanted(&self.filters, binding, self.stores, past)?;
            if past == Past::Forgotten {
                wanted.warn(binding, &self.stores.learning);
            }
            let desired = Desired::Filtered(Arc::new(wanted.ruleset));
            self.put(|draft| &mut draft.change.batch.ports, port.clone(), Some(desired));
        }
        Ok(())
    }

    // ---- the stores with the change ----

    /// The filter of that name in the store.
    fn stored_filter(&self, name: &FilterName) -> Option<&Arc<Filter>> {
        match self.change.filters.get(name) {
            Some(changed) => changed.as_ref(),
            None => self.stores.filters.get(name.as_str()),
        }
    }

    fn binding(&self, port: &PortDev) -> Option<&Arc<Binding>> {
        match self.change.bindings.get(port) {
            Some(changed) => changed.as_ref(),
            None => self.stores.bindings.get(port.as_str()),
        }
    }

    fn bindings(&self) -> impl Iterator<Item = &Arc<Binding>> {
        let kept = self.stores.bindings.documents();
        let kept = kept.filter(|binding| !self.change.bindings.contains_key(&binding.port));
        kept.chain(self.change.bindings.values().flatten())
    }

    /// The bindings whose ports need one of these filters.
    fn users(&self, names: &BTreeSet<FilterName>) -> impl Iterator<Item = &Arc<Binding>> {
        let mut needed = BTreeMap::new();
        if !names.is_empty() {
            for binding in self.bindings() {
                needed
                    .entry(&binding.filter)
                    .or_insert_with(|| !reachable(&self.filters, &binding.filter).is_disjoint(names));
            }
        }
        self.bindings().filter(move |binding| needed.get(&binding.filter) == Some(&true))
    }

    /// Those of the ports that have an interface.
    fn present_users(&self, names: &BTreeSet<FilterName>) -> BTreeSet<PortDev> {
        // Most transactions change no filter: they need not look at all bindings.
        if names.is_empty() {
            return BTreeSet::new();
        }
        self.users(names).map(|user| user.port.clone()).filter(|port| self.host.has(port)).collect()
    }
}

impl Change {
    /// The steps in the stores; the documents are already on disk. In this order a binding never names a missing filter, even
    /// if the process is killed in between.
    pub(crate) fn prepare(&self, stores: &Stores) -> Result<Vec<Step>, Error> {
        let mut steps = Vec::new();
        for (name, set) in &self.sets {
            if let Some(set) = set {
                steps.push(stores.sets.write(name.as_str(), &write_set(set))?);
            }
        }
        for (name, filter) in &self.filters {
            if let Some(filter) = filter {
                steps.push(
                    stores.filters.write(name.as_str(), &stored_filter(filter, self.sources.get(name)))?,
                );
            }
        }
        for (port, binding) in &self.bindings {
            steps.push(match binding {
                Some(binding) => stores.bindings.write(port.as_str(), &stored_binding(binding))?,
                None => stores.bindings.remove(port.as_str()),
            });
        }
        let gone = self.filters.iter().filter(|(_, filter)| filter.is_none());
        steps.extend(gone.map(|(name, _)| stores.filters.remove(name.as_str())));
        let gone = self.sets.iter().filter(|(_, set)| set.is_none());
        steps.extend(gone.map(|(name, _)| stores.sets.remove(name.as_str())));
        Ok(steps)
    }

    /// Updates the stores in memory after the steps; `is_stored` says whether these succeeded.
    pub(crate) fn take_note(&self, stores: &mut Stores, is_stored: bool) -> Result<(), Error> {
        self.filters.keys().try_for_each(|name| stores.filters.refresh_one(name.as_str()))?;
        for (name, set) in &self.sets {
            match set {
                Some(set) if is_stored => stores.sets.is_written(name.as_str(), set)?,
                _ => stores.sets.refresh_one(name.as_str())?,
            }
        }
        self.bindings.keys().try_for_each(|port| stores.bindings.refresh_one(port.as_str()))
    }
}

/// Whether two bindings of a port differ by its tags only, so that what was learned of its guest still counts.
fn differ_by_tags_only(old: &Binding, new: &Binding) -> bool {
    let without_tags = |binding: &Binding| {
        let mut binding = binding.clone();
        binding.params.remove(VarName::CTRL_TAGS);
        binding
    };
    without_tags(old) == without_tags(new)
}

fn stored_filter(filter: &Filter, source: Option<&PathBuf>) -> String {
    write_filter(filter) + &comment(source.map(PathBuf::as_path))
}

fn stored_binding(binding: &Binding) -> String {
    write_binding_status(binding) + "<!-- Written by nwfilter. It is gone when the port is. -->\n"
}
