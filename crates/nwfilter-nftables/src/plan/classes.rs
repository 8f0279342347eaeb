//! Plans the chains, sets and helpers of classes, and removes those of classes without ports.

use std::collections::{BTreeMap, BTreeSet};

use nwfilter_rules::KernelObject;
use nwfilter_xml::PortDev;

use super::{Cause, Planner, Step, Wanted, chain_object, set_object};
use crate::class::BY_PORT;
use crate::host;
use crate::kernel::{Chain, Expr, Object, ObjectName, Operation};
use crate::layout::{self, Rendered};
use crate::model::{Model, class_led_to};

impl Planner<'_> {
    pub(super) fn classes(&mut self) {
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

    pub(super) fn adds_object(&self, object: &Object) -> bool {
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

    /// Removes classes that no port is of any more.
    pub(super) fn remove_unused(&mut self) {
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
pub(super) fn unused<'a>(model: &'a Model, wanted: &'a BTreeMap<PortDev, Wanted>) -> BTreeSet<&'a str> {
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
