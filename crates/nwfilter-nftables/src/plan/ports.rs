//! Plans the elements of ports: their values, and what leads their frames to their class.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::sync::Arc;

use nwfilter_rules::{DifferenceKind, NoAnswer, Origin, Subject, Warning};
use nwfilter_xml::{MacAddr, PortDev};

use super::{PORTS_AT_ONCE, Planner, Step, Wanted, moves, set_object};
use crate::bridges;
use crate::class::{BY_PORT, Way};
use crate::kernel::{ChainName, Element, ElementKey, Operation, Set};
use crate::layout;
use crate::model::class_led_to;

impl Planner<'_> {
    pub(super) fn values(&mut self) {
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

    pub(super) fn dispatch(&mut self) {
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
    pub(super) fn answers(&mut self) {
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

    pub(super) fn elements(&mut self, step: Step, set: Arc<Set>, changes: Changes<'_>) {
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
}

/// Elements of a set that go and come.
#[derive(Default)]
pub(super) struct Changes<'a> {
    pub(super) ports: Vec<&'a PortDev>,
    pub(super) delete: Vec<(&'a PortDev, Element)>,
    pub(super) add: Vec<(&'a PortDev, Element)>,
}

impl<'a> Changes<'a> {
    pub(super) fn take(&mut self, port: &'a PortDev, delete: Vec<Element>, add: Vec<Element>) {
        self.ports.push(port);
        self.delete.extend(delete.into_iter().map(|element| (port, element)));
        self.add.extend(add.into_iter().map(|element| (port, element)));
    }
}
