//! Plans the transactions from the current tables to the desired state.

mod host_table;

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::sync::Arc;

use nwfilter_rules::{
    DesiredSet, Difference, DifferenceKind, KernelObject, NoAnswer, Origin, SetContent, Subject, Warning,
    set_differences,
};
use nwfilter_xml::{MacAddr, PortDev, SetName};

use crate::bridges;
use crate::class::{BY_PORT, Class, Values, Way};
use crate::host::{self, Server, ServerKind};
use crate::kernel::{
    Chain, ChainName, Element, ElementKey, Expr, Object, ObjectName, Operation, Place, Rule, Set,
    SetName as TableSet, TableFlags, TableId, Transaction,
};
use crate::layout::{self, Rendered};
use crate::model::{Model, class_led_to};
use crate::sets;

/// The desired state of a port.
pub(crate) enum Wanted {
    /// The rules of a class, with these values, for this guest.
    Class(Arc<Rendered>, Values, Guest),
    /// No rules.
    Gone,
}

/// What is known of a guest.
#[derive(Default)]
pub(crate) struct Guest {
    /// Its MAC address.
    pub(crate) mac: Option<MacAddr>,
    /// Its servers that need conntrack helpers, sorted.
    pub(crate) servers: Vec<Server>,
}

/// The classes of a batch, each once.
#[derive(Default)]
pub(crate) struct Classes(BTreeMap<u64, Arc<Rendered>>);

impl Classes {
    pub(crate) fn rendered(&mut self, class: &Class) -> Arc<Rendered> {
        self.0.entry(class.digest()).or_insert_with(|| Arc::new(layout::render(class))).clone()
    }
}

/// The cause of an operation, for refusals and differences.
#[derive(Clone, Debug)]
pub(crate) struct Cause {
    /// The first port that needs it; `None` for shared objects.
    pub(crate) port: Option<PortDev>,
    /// The filter's rule.
    pub(crate) origin: Origin,
    /// The object.
    pub(crate) object: KernelObject,
    /// The rule.
    pub(crate) rule: String,
    /// The set of the store that it changes.
    pub(crate) set: Option<SetName>,
}

/// A plan.
///
/// What the kernel does not do at once for a frame on its way is done in several transactions. A frame takes the rules of a
/// chain as they were when it came to the hook, but elements of sets as they are when it is looked up. So where ports move
/// from one class to another, the class must be there before a port is led to it, and the port's values of the former class
/// must stay until nothing leads there: a frame would else find a chain without rules, or not find its own address.
#[derive(Default)]
pub(crate) struct Plan {
    /// What is to be done, one transaction after the other; none is empty.
    pub(crate) transactions: Vec<Transaction<Cause>>,
    /// How many of them, from the first on, are the change. The others remove what no frame comes to any more.
    pub(crate) needed: usize,
    /// The ports that it is done for.
    pub(crate) changed: BTreeSet<PortDev>,
    /// The sets of the store that it changes.
    pub(crate) changed_sets: BTreeSet<SetName>,
    /// What differs, sorted.
    pub(crate) differences: Vec<Difference>,
    /// What ports do not get.
    pub(crate) warnings: Vec<Warning>,
}

struct Planner<'a> {
    model: &'a Model,
    wanted: &'a BTreeMap<PortDev, Wanted>,
    /// Classes that no port is of any more.
    unused: BTreeSet<&'a str>,
    desired_sets: &'a BTreeMap<SetName, DesiredSet>,
    report: bool,
    /// How the table is held, where it is made.
    flags: TableFlags,
    plan: Plan,
    /// Whether it is too much for one transaction.
    is_huge: bool,
    /// The operations of each step.
    steps: [Transaction<Cause>; 3],
}

/// Operations, and elements, of one transaction. The kernel takes some 12 µs for each, and lets nobody else change rules
/// meanwhile.
const MANY: usize = 10_000;
/// Ports whose elements of a set are changed by one operation, where there are many.
const PORTS_AT_ONCE: usize = 2_500;

/// What is done before what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// What no frame comes to yet.
    Prepare,
    /// What leads frames another way.
    Switch,
    /// What no frame comes to any more.
    Clean,
}

/// Plans what gives each port, and each set of the store, what it must have.
pub(crate) fn plan(
    model: &Model,
    wanted: &BTreeMap<PortDev, Wanted>,
    desired_sets: &BTreeMap<SetName, DesiredSet>,
    flags: TableFlags,
    report: bool,
) -> Plan {
    let wrong = wrong_sets(model, wanted);
    if !wrong.is_empty() {
        return mended(model, &wrong, |model| self::plan(model, wanted, desired_sets, flags, report));
    }
    let unused = unused(model, wanted);
    let parts = wanted.values().map(|wanted| match wanted {
        // A place in both maps, and the values.
        Wanted::Class(_, values, guest) => {
            2 + values.iter().map(BTreeSet::len).sum::<usize>() + 2 * guest.servers.len()
        }
        Wanted::Gone => 2,
    });
    let is_huge = parts.sum::<usize>() > MANY;
    let (plan, steps) = Default::default();
    let mut planner = Planner { model, wanted, unused, desired_sets, report, flags, is_huge, plan, steps };
    let filters_any = wanted.values().any(|wanted| matches!(wanted, Wanted::Class(..)))
        || desired_sets.values().any(|desired| *desired != DesiredSet::Gone);
    if filters_any || model.exists {
        planner.base();
        planner.zones();
        planner.sets_of_store();
        planner.classes();
        planner.values();
        planner.dispatch();
        planner.answers();
        planner.remove_unused();
        planner.sets_that_go();
    }
    planner.host_table();
    let in_steps = is_huge || wanted.iter().any(|(port, wanted)| moves(model, port, wanted));
    let Planner { mut plan, steps, .. } = planner;
    if in_steps {
        let [prepare, switch, clean] = steps.map(parted);
        plan.needed = prepare.len() + switch.len();
        plan.transactions = [prepare, switch, clean].concat();
    } else {
        plan.transactions = vec![joined(steps)];
        plan.transactions.retain(|transaction| !transaction.is_empty());
        plan.needed = plan.transactions.len();
    }
    plan.differences.sort();
    plan
}

/// The sets of the table that are others than those of their names that are wanted: somebody made them again.
fn wrong_sets(model: &Model, wanted: &BTreeMap<PortDev, Wanted>) -> BTreeSet<TableSet> {
    let shared = [
        layout::dispatch_map(Way::FromGuest),
        layout::dispatch_map(Way::ToGuest),
        layout::same_bytes().0,
        layout::zone_0(),
    ];
    let classes = wanted.values().filter_map(|wanted| match wanted {
        Wanted::Class(class, ..) => Some(class),
        Wanted::Gone => None,
    });
    let own = classes.flat_map(|class| class.sets.iter().chain(&class.counted));
    let of_host = match model.host {
        Some(_) => ServerKind::all().flat_map(|kind| [kind.servers(), kind.ports()]).collect(),
        None => Vec::new(),
    };
    let is_wrong = |set: &&Arc<Set>| model.sets.get(&set.name).is_some_and(|held| held.set != ***set);
    shared.iter().chain(own).chain(&of_host).filter(is_wrong).map(|set| set.name.clone()).collect()
}

/// What `plan` makes of the table without these sets and the rules of chains that look into them, all of which go first.
fn mended(model: &Model, wrong: &BTreeSet<TableSet>, plan: impl FnOnce(&Model) -> Plan) -> Plan {
    let (mut mended, mut first) = (model.clone(), Transaction::new());
    let looks = |rule: &Rule| {
        rule.exprs.iter().any(|expr| match expr {
            Expr::Lookup(lookup) => wrong.contains(&lookup.set),
            Expr::Dynset(dynset) => wrong.contains(&dynset.set),
            _ => false,
        })
    };
    let chains = model.chains.iter().filter(|(_, (_, rules))| rules.iter().any(looks));
    let flushed = chains.map(|(name, _)| {
        let operation = Operation::FlushChain { table: layout::table_of(name.as_str()), chain: name.clone() };
        (operation, chain_object(name))
    });
    let deleted = wrong.iter().map(|set| {
        let table = layout::table_of(set.as_str());
        let object = KernelObject::Set { table: table.to_string(), set: set.to_string() };
        (Operation::DeleteSet { table, set: set.clone() }, object)
    });
    for (operation, object) in flushed.chain(deleted) {
        mended.carry_out(operation.clone());
        first.push(
            operation,
            Cause { port: None, set: None, origin: Origin::BUILT_IN, object, rule: String::new() },
        );
    }
    let mut plan = plan(&mended);
    match plan.transactions.first_mut() {
        Some(transaction) => *transaction = joined([first, std::mem::take(transaction)]),
        None => plan.transactions.push(first),
    }
    plan.needed = plan.needed.max(1);
    plan
}

/// Transactions as one.
fn joined(transactions: impl IntoIterator<Item = Transaction<Cause>>) -> Transaction<Cause> {
    let mut joined = Transaction::new();
    transactions.into_iter().for_each(|transaction| joined.extend(transaction.into_operations()));
    joined
}

/// A transaction as several that are not huge. What changes the way of a frame stays together: a chain and all its rules, and
/// the elements of a set that go with those that come for them.
fn parted(transaction: Transaction<Cause>) -> Vec<Transaction<Cause>> {
    let (mut parts, mut part, mut size) = (Vec::new(), Transaction::new(), 0);
    for (operation, cause) in transaction.into_operations() {
        let weight = match &operation {
            Operation::AddElements { elements, .. } | Operation::DeleteElements { elements, .. } => {
                elements.len()
            }
            _ => 1,
        };
        let last = part.operations().last().map(|(operation, _): &(Operation, _)| operation);
        let belongs_to_last = match (last, &operation) {
            (Some(Operation::FlushChain { chain: flushed, .. }), Operation::AddChain { chain, .. }) => {
                *flushed == chain.name
            }
            (Some(Operation::AddChain { .. } | Operation::AddRule { .. }), Operation::AddRule { .. }) => true,
            (Some(Operation::DeleteElements { set: held, .. }), Operation::AddElements { set, .. }) => {
                held.name == set.name
            }
            _ => false,
        };
        if size + weight > MANY && !belongs_to_last && size > 0 {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        part.push(operation, cause);
        size += weight;
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// Whether rules do the same. On which line of its filter a rule stands, its comment says, but a document that a filter is
/// defined from has other lines than the one in the store.
fn does_the_same(held: &Rule, wanted: &Rule) -> bool {
    held == wanted || without_line(held) == without_line(wanted)
}

/// What a rule does, and its comment without the line in `web:10`.
fn without_line(rule: &Rule) -> (&[Expr], Option<(&str, &str)>) {
    let comment = rule.comment.as_ref().map(|comment| {
        let text = comment.as_str();
        let parts = text.match_indices(':').find_map(|(colon, _)| {
            let (name, rest) = (&text[..colon], &text[colon + 1..]);
            let said = rest.trim_start_matches(|c: char| c.is_ascii_digit());
            (said.len() < rest.len() && (said.is_empty() || said.starts_with(' '))).then_some((name, said))
        });
        parts.unwrap_or((text, ""))
    });
    (&rule.exprs, comment)
}

/// Whether a port is filtered, and will be by another class.
fn moves(model: &Model, port: &PortDev, wanted: &Wanted) -> bool {
    let Wanted::Class(class, ..) = wanted else { return false };
    let key = layout::port_key(port);
    let held = BY_PORT.into_iter().filter_map(|way| model.dispatched(way, &key));
    held.into_iter().any(|element| class_led_to(element) != Some(class.name.as_str()))
}

/// What takes a transaction back that leads frames elsewhere, or adds what they are led to.
pub(crate) fn taken_back(transaction: &Transaction<Cause>, before: &Model) -> Transaction<Cause> {
    let mut back: [Vec<(Operation, Cause)>; 6] = Default::default();
    let mut transaction_back = Transaction::new();
    let is_new = |of: &TableId| before.tables().all(|(held, ..)| held != *of);
    for (operation, cause) in transaction.operations() {
        let table = operation.table().clone();
        if is_new(&table) {
            // What is in a table goes with it.
            if matches!(operation, Operation::AddTable { .. }) {
                transaction_back.push(Operation::DeleteTable { table }, cause.clone());
            }
            continue;
        }
        let (order, operation) = match operation {
            Operation::AddElements { set, elements, .. } if before.sets.contains_key(&set.name) => {
                (0, Operation::DeleteElements { table, set: set.clone(), elements: elements.clone() })
            }
            Operation::DeleteElements { set, elements, .. } => {
                (1, Operation::AddElements { table, set: set.clone(), elements: elements.clone() })
            }
            Operation::AddChain { chain, .. } if !before.chains.contains_key(&chain.name) => {
                let chain = chain.name.clone();
                let deleted =
                    (Operation::DeleteChain { table: table.clone(), chain: chain.clone() }, cause.clone());
                if back[3].iter().any(|(operation, _)| *operation == deleted.0) {
                    continue;
                }
                back[3].push(deleted);
                (2, Operation::FlushChain { table, chain })
            }
            Operation::AddSet { set, .. } if !before.sets.contains_key(&set.name) => {
                (4, Operation::DeleteSet { table, set: set.name.clone() })
            }
            Operation::AddObject { object, .. } if !before.objects.contains_key(object.name()) => {
                (5, Operation::DeleteObject { table, object: object.clone() })
            }
            _ => continue,
        };
        back[order].push((operation, cause.clone()));
    }
    transaction_back.extend(back.into_iter().flatten());
    transaction_back
}

pub(crate) fn chain_object(chain: &ChainName) -> KernelObject {
    KernelObject::Chain { table: layout::table_of(chain.as_str()).to_string(), chain: chain.to_string() }
}

fn set_object(set: &Set) -> KernelObject {
    KernelObject::Set { table: layout::table_of(set.name.as_str()).to_string(), set: set.name.to_string() }
}

impl Planner<'_> {
    fn cause(&self, port: Option<&PortDev>, object: KernelObject) -> Cause {
        Cause { port: port.cloned(), origin: Origin::BUILT_IN, object, rule: String::new(), set: None }
    }

    fn push(&mut self, step: Step, operation: Operation, cause: Cause) {
        self.steps[step as usize].push(operation, cause);
    }

    fn difference(
        &mut self,
        subject: Subject,
        object: &KernelObject,
        kind: DifferenceKind,
        rule: &dyn std::fmt::Display,
        origin: Option<&Origin>,
    ) {
        if self.report {
            let origin = origin.filter(|origin| **origin != Origin::BUILT_IN).cloned();
            let difference =
                Difference { subject, object: object.clone(), kind, rule: rule.to_string(), origin };
            self.plan.differences.push(difference);
        }
    }

    // ---- what all share ----

    fn base(&mut self) {
        let table = layout::table();
        let object = KernelObject::Table { table: layout::TABLE.into() };
        if !self.model.exists {
            let cause = self.cause(None, object);
            self.push(Step::Prepare, Operation::AddTable { table, flags: self.flags }, cause);
        }
        for way in BY_PORT {
            self.set(&layout::dispatch_map(way), None);
        }
        for (chain, rules) in layout::base_chains(self.rejects()) {
            let rules: Vec<_> = rules.into_iter().map(|rule| (rule, Origin::BUILT_IN)).collect();
            self.chain(chain, &rules, &[]);
        }
    }

    /// Keeps the connections of bridges apart as long as a class asks about connections.
    fn zones(&mut self) {
        let (chain, rules) = layout::zones();
        let (set, table) = (layout::zone_0(), layout::table());
        let mut wanted = self.wanted.values();
        let begins = wanted.any(|wanted| matches!(wanted, Wanted::Class(class, ..) if class.tracks));
        if begins || self.model.tracking().any(|class| !self.unused.contains(class)) {
            // Which bridge is in zone 0 is decided once: its connections would be new ones in another.
            if !self.set(&set, None)
                && let Some(bridge) = bridges::first_of(self.wanted.keys())
            {
                let elements = vec![Element::new(ElementKey::One(bridge.to_vec()))];
                let cause = self.cause(None, set_object(&set));
                self.push(Step::Prepare, Operation::AddElements { table, set, elements }, cause);
            }
            let rules: Vec<_> = rules.into_iter().map(|rule| (rule, Origin::BUILT_IN)).collect();
            self.chain(chain, &rules, &[]);
        } else {
            self.remove_base(chain.name, &set);
        }
    }

    /// Removes a base chain that is there and the set that it looks into.
    fn remove_base(&mut self, name: ChainName, set: &Set) {
        if !self.model.chains.contains_key(&name) {
            return;
        }
        let (cause, table) = (self.cause(None, chain_object(&name)), layout::table());
        self.steps[Step::Clean as usize].extend([
            (Operation::FlushChain { table: table.clone(), chain: name.clone() }, cause.clone()),
            (Operation::DeleteChain { table: table.clone(), chain: name }, cause.clone()),
            (Operation::DeleteSet { table, set: set.name.clone() }, cause),
        ]);
    }

    /// Whether a class answers packets that will be there.
    fn rejects(&self) -> bool {
        let mut wanted = self.wanted.values();
        wanted.any(|wanted| matches!(wanted, Wanted::Class(class, ..) if class.rejects))
            || self.model.rejecting().any(|class| !self.unused.contains(class))
    }

    /// Adds a set that is not there; tells whether it was.
    fn set(&mut self, set: &Arc<Set>, port: Option<&PortDev>) -> bool {
        if self.model.sets.contains_key(&set.name) {
            return true;
        }
        let cause = self.cause(port, set_object(set));
        let table = layout::table_of(set.name.as_str());
        self.push(Step::Prepare, Operation::AddSet { table, set: set.clone() }, cause);
        false
    }

    /// Gives a chain its rules. `ports` are those that it is for; none for all of them.
    fn chain(&mut self, chain: Chain, rules: &[(Rule, Origin)], ports: &[&PortDev]) {
        let name = chain.name.clone();
        let object = chain_object(&name);
        let (table, model) = (layout::table_of(name.as_str()), self.model);
        let held = model.chains.get(&name);
        if held.is_some_and(|(held, held_rules)| {
            *held == chain
                && held_rules.len() == rules.len()
                && held_rules.iter().zip(rules).all(|(held, (rule, _))| does_the_same(held, rule))
        }) {
            return;
        }
        self.plan.changed.extend(ports.iter().map(|port| (*port).clone()));
        let subjects: Vec<Subject> = match ports {
            [] => vec![Subject::Host],
            ports => ports.iter().map(|port| Subject::Port((*port).clone())).collect(),
        };
        if self.report {
            self.chain_differences(&subjects, &object, held.map_or(&[], |(_, rules)| rules), rules);
        }
        let cause = self.cause(ports.first().copied(), object.clone());
        if let Some((_, held_rules)) = held
            && !held_rules.is_empty()
        {
            self.push(
                Step::Prepare,
                Operation::FlushChain { table: table.clone(), chain: name.clone() },
                cause.clone(),
            );
        }
        self.push(Step::Prepare, Operation::AddChain { table: table.clone(), chain }, cause.clone());
        for (rule, origin) in rules {
            let cause = Cause { origin: origin.clone(), rule: rule.to_string(), ..cause.clone() };
            let (table, chain, rule) = (table.clone(), name.clone(), rule.clone());
            self.push(Step::Prepare, Operation::AddRule { table, chain, place: Place::End, rule }, cause);
        }
    }

    fn chain_differences(
        &mut self,
        subjects: &[Subject],
        object: &KernelObject,
        held: &[Rule],
        rules: &[(Rule, Origin)],
    ) {
        let held_set: BTreeSet<_> = held.iter().map(without_line).collect();
        let wanted_set: BTreeSet<_> = rules.iter().map(|(rule, _)| without_line(rule)).collect();
        for subject in subjects {
            for (rule, origin) in rules.iter().filter(|(rule, _)| !held_set.contains(&without_line(rule))) {
                self.difference(subject.clone(), object, DifferenceKind::Missing, rule, Some(origin));
            }
            for rule in held.iter().filter(|rule| !wanted_set.contains(&without_line(rule))) {
                self.difference(subject.clone(), object, DifferenceKind::Foreign, rule, None);
            }
        }
    }

    // ---- sets of the store ----

    fn sets_of_store(&mut self) {
        for (name, desired) in self.desired_sets {
            if let DesiredSet::Holds(content) | DesiredSet::Present(content) = desired {
                self.set_of_store(name, content);
            }
            let set = sets::kernel_name(name);
            let held = self.model.content(&set);
            if self.report {
                let object = KernelObject::Set { table: layout::TABLE.into(), set: set.to_string() };
                self.plan.differences.extend(set_differences(name, &object, held, &held_anyway(desired)));
            }
        }
    }

    /// A new set is there before the rules that ask it. What one holds changes together with the way of the frames.
    fn set_of_store(&mut self, name: &SetName, content: &SetContent) {
        let set = sets::kernel_set(name, content.family());
        let (table, cause) = (layout::table(), self.set_cause(name));
        let none = SetContent::empty(content.family());
        let held = self.model.content(&set.name).filter(|held| held.family() == content.family());
        let step = if held.is_some() { Step::Switch } else { Step::Prepare };
        if held.is_none() {
            if self.model.sets.contains_key(&set.name) {
                let (table, set) = (table.clone(), set.name.clone());
                self.push(step, Operation::DeleteSet { table, set }, cause.clone());
            }
            self.push(step, Operation::AddSet { table: table.clone(), set: set.clone() }, cause.clone());
        }
        let change = content.change_from(held.unwrap_or(&none));
        if held.is_none() || !change.is_empty() {
            self.plan.changed_sets.insert(name.clone());
        }
        if !change.delete.is_empty() {
            let elements = sets::elements(&change.delete);
            let (table, set) = (table.clone(), set.clone());
            self.push(step, Operation::DeleteElements { table, set, elements }, cause.clone());
        }
        if !change.add.is_empty() {
            let elements = sets::elements(&change.add);
            self.push(step, Operation::AddElements { table, set, elements }, cause);
        }
    }

    /// Removes sets that no rule asks any more.
    fn sets_that_go(&mut self) {
        for (name, desired) in self.desired_sets {
            let set = sets::kernel_name(name);
            if *desired == DesiredSet::Gone && self.model.sets.contains_key(&set) {
                let cause = self.set_cause(name);
                self.plan.changed_sets.insert(name.clone());
                self.push(Step::Clean, Operation::DeleteSet { table: layout::table(), set }, cause);
            }
        }
    }

    fn set_cause(&self, name: &SetName) -> Cause {
        let set = sets::kernel_name(name).to_string();
        let cause = self.cause(None, KernelObject::Set { table: layout::TABLE.into(), set });
        Cause { set: Some(name.clone()), ..cause }
    }

    // ---- classes ----

    fn classes(&mut self) {
        let wanted = self.wanted;
        let mut classes: BTreeMap<&str, (&Rendered, Vec<&PortDev>)> = BTreeMap::new();
        for (port, wanted) in wanted {
            if let Wanted::Class(class, ..) = wanted {
                classes.entry(&class.name).or_insert_with(|| (class, Vec::new())).1.push(port);
            }
        }
        for (class, ports) in classes.values() {
            self.class(class, ports);
        }
    }

    fn class(&mut self, class: &Rendered, ports: &[&PortDev]) {
        let (table, first) = (layout::table(), ports.first().copied());
        for kind in &class.helpers {
            let object = layout::helper(*kind);
            if self.model.objects.get(object.name()) != Some(&object) && !self.adds_object(&object) {
                let cause = self.cause(first, KernelObject::Table { table: layout::TABLE.into() });
                let cause = Cause { rule: format!("ct helper {}", kind.name), ..cause };
                self.push(Step::Prepare, Operation::AddObject { table: table.clone(), object }, cause);
            }
        }
        if class.needs_same_bytes && !self.model.sets.contains_key(&layout::same_bytes().0.name) {
            self.same_bytes(first);
        }
        for set in class.sets.iter().chain(&class.counted) {
            self.set(set, first);
        }
        // Rules lead to chains that come later.
        let cause = self.cause(first, KernelObject::Table { table: layout::TABLE.into() });
        for (name, _) in class.chains.iter().filter(|(name, _)| !self.model.chains.contains_key(name)) {
            let chain = Chain::regular(name.clone());
            self.push(Step::Prepare, Operation::AddChain { table: table.clone(), chain }, cause.clone());
        }
        for (name, rules) in &class.chains {
            self.chain(Chain::regular(name.clone()), rules, ports);
        }
    }

    fn adds_object(&self, object: &Object) -> bool {
        let mut operations = self.steps[Step::Prepare as usize].operations().iter();
        operations.any(|(operation, _)| matches!(operation, Operation::AddObject { object: added, .. } if added == object))
    }

    fn same_bytes(&mut self, port: Option<&PortDev>) {
        let (set, elements) = layout::same_bytes();
        let added = |(operation, _): &(Operation, _)| matches!(operation, Operation::AddSet { set: added, .. } if added.name == set.name);
        if self.steps[Step::Prepare as usize].operations().iter().any(added) {
            return;
        }
        self.set(&set, port);
        let cause = self.cause(port, set_object(&set));
        self.push(Step::Prepare, Operation::AddElements { table: layout::table(), set, elements }, cause);
    }

    // ---- ports ----

    fn values(&mut self) {
        let (wanted, model) = (self.wanted, self.model);
        let mut changes: BTreeMap<(Step, &str), (Arc<Set>, Changes<'_>)> = BTreeMap::new();
        for (port, wanted) in wanted {
            let (come, go) = match self.is_huge || moves(model, port, wanted) {
                true => (Step::Prepare, Step::Clean),
                false => (Step::Switch, Step::Switch),
            };
            let key = layout::port_key(port);
            let mut held = model.values(&key);
            let (class, values) = match wanted {
                Wanted::Class(class, values, _) => (Some(class), &values[..]),
                Wanted::Gone => (None, &[][..]),
            };
            let sets = class.map_or(&[][..], |class| &class.sets);
            for (set, values) in sets.iter().zip(values) {
                let mut stale = held.remove(&set.name).unwrap_or_default();
                let mut add = Vec::new();
                for fields in values {
                    let element = layout::value_element(port, fields);
                    if !stale.remove(&element) {
                        add.push(element);
                    }
                }
                let delete: Vec<Element> = stale.into_iter().cloned().collect();
                for (step, delete, add) in [(come, Vec::new(), add), (go, delete, Vec::new())] {
                    if !add.is_empty() || !delete.is_empty() {
                        let entry = changes
                            .entry((step, set.name.as_str()))
                            .or_insert_with(|| (set.clone(), Changes::default()));
                        entry.1.take(port, delete, add);
                    }
                }
            }
            for (name, stale) in held {
                let Some(set) = model.sets.get(name) else { continue };
                let entry = changes
                    .entry((go, name.as_str()))
                    .or_insert_with(|| (Arc::new(set.set.clone()), Changes::default()));
                entry.1.take(port, stale.into_iter().cloned().collect(), Vec::new());
            }
        }
        for ((step, _), (set, changes)) in changes {
            self.elements(step, set, changes);
        }
    }

    fn dispatch(&mut self) {
        let (wanted, model) = (self.wanted, self.model);
        for way in BY_PORT {
            let mut changes = Changes::default();
            for (port, wanted) in wanted {
                let held = model.dispatched(way, &layout::port_key(port));
                let chain = match wanted {
                    Wanted::Class(class, ..) => class.entries.iter().find(|(of, _)| *of == way),
                    Wanted::Gone => None,
                };
                let element = chain.map(|(_, chain)| layout::dispatch_element(port, chain));
                if held != element.as_ref() {
                    let (delete, add) = (held.cloned().into_iter().collect(), element.into_iter().collect());
                    changes.take(port, delete, add);
                }
            }
            self.elements(Step::Switch, layout::dispatch_map(way), changes);
        }
    }

    /// Leads frames on their way to guests to what answers them.
    fn answers(&mut self) {
        let (wanted, model) = (self.wanted, self.model);
        let (chain, rules) = layout::toward();
        let map = layout::dispatch_map(Way::Ahead);
        let answering: BTreeMap<&PortDev, (&ChainName, Option<MacAddr>)> = wanted
            .iter()
            .filter_map(|(port, wanted)| match wanted {
                Wanted::Class(class, _, guest) => Some((port, (class.toward.as_ref()?, guest.mac))),
                Wanted::Gone => None,
            })
            .collect();
        let stays = || {
            let mut held = model.toward_guests().into_iter().flat_map(|held| held.elements.values());
            held.any(|element| class_led_to(element).is_some_and(|class| !self.unused.contains(class)))
        };
        let is_used = !answering.is_empty() || stays();
        if is_used {
            self.set(&map, None);
            let rules: Vec<_> = rules.into_iter().map(|rule| (rule, Origin::BUILT_IN)).collect();
            self.chain(chain.clone(), &rules, &[]);
        }
        let bridges =
            if answering.is_empty() { BTreeMap::new() } else { bridges::of(answering.keys().copied()) };
        let mut taken: BTreeMap<ElementKey, &PortDev> = BTreeMap::new();
        let mut changes = Changes::default();
        for port in wanted.keys() {
            let held = model.toward(&layout::port_key(port));
            let element = answering.get(port).zip(bridges.get(port)).and_then(|((chain, mac), bridge)| {
                Some(layout::toward_element(port, *bridge, (*mac)?, chain))
            });
            // One guest of a bridge can have an address.
            let element = element.filter(|element| {
                let others = || model.toward_guests()?.elements.get(&element.key)?.comment.as_ref();
                let is_free = taken.get(&element.key).is_none_or(|by| *by == port)
                    && others().is_none_or(|of| {
                        of.as_str() == port.as_str() || wanted.keys().any(|port| port.as_str() == of.as_str())
                    });
                if is_free {
                    taken.insert(element.key.clone(), port);
                }
                is_free
            });
            if element.is_none() && answering.contains_key(port) && bridges.contains_key(port) {
                let why = match answering[port].1 {
                    Some(_) => NoAnswer::MacShared,
                    None => NoAnswer::MacUnknown,
                };
                self.plan.warnings.push(Warning::NoAnswer { port: port.clone(), why });
            }
            if held != element.as_ref() {
                changes.take(port, held.cloned().into_iter().collect(), element.into_iter().collect());
            }
        }
        self.elements(Step::Switch, map.clone(), changes);
        if !is_used {
            self.remove_base(chain.name, &map);
        }
    }

    fn elements(&mut self, step: Step, set: Arc<Set>, changes: Changes<'_>) {
        let object = set_object(&set);
        let Some(first) = changes.ports.first().copied() else { return };
        for port in &changes.ports {
            self.plan.changed.insert((*port).clone());
        }
        if self.report {
            let of = |elements: &[(&PortDev, Element)], kind| {
                elements
                    .iter()
                    .map(|(port, element)| (Subject::Port((*port).clone()), kind, set.show(element)))
                    .collect::<Vec<_>>()
            };
            let all =
                [of(&changes.delete, DifferenceKind::Foreign), of(&changes.add, DifferenceKind::Missing)];
            for (subject, kind, text) in all.into_iter().flatten() {
                self.difference(subject, &object, kind, &text, None);
            }
        }
        let cause = self.cause(Some(first), object);
        let Changes { mut ports, delete, add } = changes;
        ports.dedup();
        let at_once = if self.is_huge { PORTS_AT_ONCE } else { usize::MAX };
        let (mut delete, mut add) = (delete.into_iter().peekable(), add.into_iter().peekable());
        // The ports are sorted, and so are their elements.
        for group in ports.chunks(at_once) {
            let of_group = |elements: &mut Peekable<std::vec::IntoIter<(&PortDev, Element)>>| {
                let belongs = |(port, _): &(&PortDev, Element)| group.last().is_none_or(|last| port <= last);
                std::iter::from_fn(|| elements.next_if(belongs))
                    .map(|(_, element)| element)
                    .collect::<Vec<_>>()
            };
            let (delete, add) = (of_group(&mut delete), of_group(&mut add));
            let (table, set, cause) = (layout::table_of(set.name.as_str()), set.clone(), cause.clone());
            if !delete.is_empty() {
                let (table, set) = (table.clone(), set.clone());
                self.push(step, Operation::DeleteElements { table, set, elements: delete }, cause.clone());
            }
            if !add.is_empty() {
                self.push(step, Operation::AddElements { table, set, elements: add }, cause);
            }
        }
    }

    // ---- what nobody needs ----

    /// Removes classes that no port is of any more.
    fn remove_unused(&mut self) {
        let unused = std::mem::take(&mut self.unused);
        for class in &unused {
            self.remove_class(class);
        }
        if !unused.is_empty() {
            self.remove_helpers(&unused);
        }
    }

    /// Removes helpers that only rules of these classes assign.
    fn remove_helpers(&mut self, unused: &BTreeSet<&str>) {
        let model = self.model;
        let wanted = self.wanted.values().filter_map(|wanted| match wanted {
            Wanted::Class(class, ..) => {
                Some(class.helpers.iter().map(|kind| layout::helper(*kind).name().clone()))
            }
            Wanted::Gone => None,
        });
        let mut used: BTreeSet<ObjectName> = wanted.flatten().collect();
        for (name, (_, rules)) in &model.chains {
            if layout::class_of(name.as_str()).is_some_and(|class| unused.contains(class)) {
                continue;
            }
            used.extend(rules.iter().flat_map(|rule| &rule.exprs).filter_map(|expr| match expr {
                Expr::Object { name, .. } => Some(name.clone()),
                _ => None,
            }));
        }
        let is_unused =
            |object: &&Object| !host::is_name(object.name().as_str()) && !used.contains(object.name());
        for object in model.objects.values().filter(is_unused) {
            let cause = self.cause(None, KernelObject::Table { table: layout::TABLE.into() });
            self.push(
                Step::Clean,
                Operation::DeleteObject { table: layout::table(), object: object.clone() },
                cause,
            );
        }
    }

    fn remove_class(&mut self, class: &str) {
        let (model, table) = (self.model, layout::table());
        for chain in model.chains_of(class) {
            let cause = self.cause(None, chain_object(chain));
            self.push(
                Step::Clean,
                Operation::FlushChain { table: table.clone(), chain: chain.clone() },
                cause,
            );
        }
        for chain in model.chains_of(class) {
            let cause = self.cause(None, chain_object(chain));
            self.push(
                Step::Clean,
                Operation::DeleteChain { table: table.clone(), chain: chain.clone() },
                cause,
            );
        }
        for name in model.sets_of(class) {
            let Some(held) = model.sets.get(name) else { continue };
            let cause = self.cause(None, set_object(&held.set));
            self.push(Step::Clean, Operation::DeleteSet { table: table.clone(), set: name.clone() }, cause);
        }
    }
}

/// The classes that no port is of any more.
fn unused<'a>(model: &'a Model, wanted: &'a BTreeMap<PortDev, Wanted>) -> BTreeSet<&'a str> {
    let used: BTreeSet<&str> = wanted
        .values()
        .filter_map(|wanted| match wanted {
            Wanted::Class(class, ..) => Some(class.name.as_str()),
            Wanted::Gone => None,
        })
        .collect();
    // How many elements of the maps that lead to a class go.
    let mut gone: BTreeMap<&str, usize> = BTreeMap::new();
    for port in wanted.keys() {
        let key = layout::port_key(port);
        let held = BY_PORT.into_iter().filter_map(|way| model.dispatched(way, &key));
        for class in held.chain(model.toward(&key)).filter_map(class_led_to) {
            *gone.entry(class).or_default() += 1;
        }
    }
    let classes = model.classes().into_iter();
    classes
        .filter(|class| !used.contains(class) && model.users(class) == gone.get(class).copied().unwrap_or(0))
        .collect()
}

/// What the table holds is known, so a set that only has to be there is brought to its content, too.
fn held_anyway(desired: &DesiredSet) -> DesiredSet {
    match desired {
        DesiredSet::Present(content) => DesiredSet::Holds(content.clone()),
        other => other.clone(),
    }
}

/// Elements of a set that go and come.
#[derive(Default)]
struct Changes<'a> {
    ports: Vec<&'a PortDev>,
    delete: Vec<(&'a PortDev, Element)>,
    add: Vec<(&'a PortDev, Element)>,
}

impl<'a> Changes<'a> {
    fn take(&mut self, port: &'a PortDev, delete: Vec<Element>, add: Vec<Element>) {
        self.ports.push(port);
        self.delete.extend(delete.into_iter().map(|element| (port, element)));
        self.add.extend(add.into_iter().map(|element| (port, element)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use nwfilter_rules::{EthernetSide, EthernetTest, Match, Rule as FilterRule, Ruleset, Verdict};

    use super::*;
    use crate::class;
    use crate::kernel::Comment;

    /// Ports that send with their own address only, and nothing of a protocol. Each third has a server that needs a helper.
    fn wanted(ports: u16, protocol: u16) -> BTreeMap<PortDev, Wanted> {
        let mut classes = Classes::default();
        let ports = (0..ports).map(|number| {
            let [high, low] = number.to_be_bytes();
            let mac: nwfilter_xml::MacAddr = format!("52:54:00:00:{high:02x}:{low:02x}").parse().unwrap();
            let rules = [
                FilterRule::built_in([Match::is_not(EthernetTest::SrcMac(mac.into()))], Verdict::Drop),
                FilterRule::built_in([Match::is(EthernetTest::EtherType(protocol))], Verdict::Drop),
            ];
            let mut ruleset = Ruleset::default();
            ruleset.ethernet.from_guest = Some(EthernetSide::of_rules(rules));
            let (class, values) = class::of(&ruleset).unwrap();
            let kind = ServerKind::all().next().unwrap();
            let address = std::net::Ipv4Addr::new(10, 0, high, low).into();
            let server = (number % 3 == 0).then_some(Server { kind, address, port: protocol });
            let guest = Guest { mac: None, servers: server.into_iter().collect() };
            (format!("vnet{number}").parse().unwrap(), Wanted::Class(classes.rendered(&class), values, guest))
        });
        ports.collect()
    }

    fn plan_of(model: &Model, wanted: &BTreeMap<PortDev, Wanted>) -> Plan {
        plan(model, wanted, &BTreeMap::new(), TableFlags::default(), false)
    }

    fn carry_out(model: &mut Model, transaction: &Transaction<Cause>) {
        transaction.operations().iter().for_each(|(operation, _)| model.carry_out(operation.clone()));
    }

    fn content(model: &Model) -> String {
        format!("{:?}", (model.exists, &model.host, &model.chains, &model.sets, &model.objects))
    }

    #[test]
    fn a_change_of_many_ports_is_parted_and_every_part_can_be_taken_back() {
        const PORTS: u16 = 9_000;
        let (old, new) = (wanted(PORTS, 0x1234), wanted(PORTS, 0x1235));
        let mut model = Model::default();
        for (wanted, least) in [(&old, 2), (&new, 3)] {
            let begin = content(&model);
            let plan = plan_of(&model, wanted);
            assert!(plan.needed >= least, "{}", plan.needed);
            let mut undo = Vec::new();
            for (index, transaction) in plan.transactions.iter().enumerate() {
                let sizes = transaction.operations().iter().map(|(operation, _)| match operation {
                    Operation::AddElements { elements, .. } | Operation::DeleteElements { elements, .. } => {
                        elements.len()
                    }
                    _ => 1,
                });
                assert!(sizes.sum::<usize>() <= MANY + PORTS_AT_ONCE);
                if index < plan.needed {
                    undo.push(taken_back(transaction, &model));
                }
                carry_out(&mut model, transaction);
                if index < plan.needed {
                    let mut back = model.clone();
                    undo.iter().rev().for_each(|transaction| carry_out(&mut back, transaction));
                    assert_eq!(content(&back), begin, "after {index}");
                    // Whoever is filtered is led to a class all the time.
                    let led = if begin == content(&Model::default()) { 0 } else { usize::from(PORTS) };
                    assert!(model.dispatched_ports().len() >= led);
                }
            }
            assert!(plan_of(&model, wanted).transactions.is_empty());
            assert_eq!(model.classes().len(), 1);
        }
    }

    #[test]
    fn rules_that_differ_in_the_line_of_their_filter_only_do_the_same() {
        let rule = |comment: &str| Rule::new().counter().comment(Comment::new(comment));
        for (one, other, same) in [
            ("web:10", "web:4", true),
            ("web:10 web: 8080", "web:4 web: 8080", true),
            ("web:10 ssh", "web:4 http", false),
            ("web:10", "ssh:10", false),
            ("a:1:10", "a:1:12", true),
            ("a:1:10", "a:2:10", false),
            ("jump", "jump", true),
        ] {
            assert_eq!(does_the_same(&rule(one), &rule(other)), same, "{one} {other}");
        }
        assert!(!does_the_same(&rule("web:10"), &Rule::new().comment(Comment::new("web:10"))));
    }
}
