//! Plans the transactions from the current tables to the desired state.

mod classes;
mod host_table;
mod ports;
mod store;
mod transactions;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{DesiredSet, Difference, DifferenceKind, KernelObject, Origin, Subject, Warning};
use nwfilter_xml::{MacAddr, PortDev, SetName};

use classes::unused;
pub(crate) use transactions::taken_back;
use transactions::{joined, parted};

use crate::bridges;
use crate::class::{BY_PORT, Class, Values, Way};
use crate::host::{Server, ServerKind};
use crate::kernel::{
    Chain, ChainName, Element, ElementKey, Expr, Operation, Place, Rule, Set, SetName as TableSet,
    TableFlags, TableId, Transaction,
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

/// Operations, and elements, of one transaction. The kernel takes up to 12 µs for each, and lets nobody else change rules
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
    let of_new_sets = desired_sets.iter().map(|(name, desired)| match desired {
        DesiredSet::Holds(content) | DesiredSet::Present(content)
            if model.content(&sets::kernel_name(name)).is_none() =>
        {
            content.len()
        }
        _ => 0,
    });
    let is_huge = parts.chain(of_new_sets).sum::<usize>() > MANY;
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
        } else {
            self.wake(table, self.model.flags);
        }
        for way in BY_PORT {
            self.set(&layout::dispatch_map(way), None);
        }
        for (chain, rules) in layout::base_chains(self.rejects()) {
            let rules: Vec<_> = rules.into_iter().map(|rule| (rule, Origin::BUILT_IN)).collect();
            self.chain(chain, &rules, &[]);
        }
    }

    /// Wakes a table that another program made dormant, so that none of its chains is asked.
    fn wake(&mut self, table: TableId, held: TableFlags) {
        if !held.dormant {
            return;
        }
        let object = KernelObject::Table { table: table.to_string() };
        self.difference(Subject::Host, &object, DifferenceKind::Foreign, &"flags dormant", None);
        let (flags, cause) = (TableFlags { dormant: false, ..held }, self.cause(None, object));
        self.push(Step::Prepare, Operation::AddTable { table, flags }, cause);
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
