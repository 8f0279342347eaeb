//! The contents of the tables, as read from the kernel and updated by each commit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{SetChange, SetContent};

use crate::class::Way;
use crate::kernel::expr::{IFNAMSIZ, Verdict};
use crate::kernel::{
    Chain, ChainName, Element, ElementKey, ElementValue, InstalledTable, Object, ObjectName, Operation,
    Place, Rule, Set, SetName, TableFlags, TableId, field,
};
use crate::{host, layout, sets};

/// The contents of both tables: a name tells [which](layout::table_of).
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// Whether the table exists.
    pub(crate) exists: bool,
    /// Its flags.
    pub(crate) flags: TableFlags,
    /// The netlink port of its owner, if it has one.
    pub(crate) owner: Option<u32>,
    /// The table of the host's connections, if it exists.
    pub(crate) host: Option<HostTable>,
    /// The chains and their rules.
    pub(crate) chains: BTreeMap<ChainName, (Chain, Vec<Rule>)>,
    /// The sets and maps.
    pub(crate) sets: BTreeMap<SetName, HeldSet>,
    /// The contents of the sets of the store.
    contents: BTreeMap<SetName, SetContent>,
    /// The helpers.
    pub(crate) objects: BTreeMap<ObjectName, Object>,
    /// The classes that test connections.
    tracking: BTreeSet<String>,
    /// The classes that reject packets.
    rejecting: BTreeSet<String>,
    /// The element of each port in the map of frames on their way to a guest.
    toward: BTreeMap<PortKey, ElementKey>,
    /// The number of map elements that lead to each class.
    users: BTreeMap<String, usize>,
    /// The sets with elements of each port.
    by_port: BTreeMap<Vec<u8>, BTreeSet<SetName>>,
}

/// How the table of the host's connections is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostTable {
    /// Its flags.
    pub(crate) flags: TableFlags,
    /// The netlink port of its owner, if it has one.
    pub(crate) owner: Option<u32>,
}

/// A set of a table.
#[derive(Clone, Debug)]
pub(crate) struct HeldSet {
    pub(crate) set: Set,
    pub(crate) elements: BTreeMap<ElementKey, Element>,
}

impl Model {
    /// What was read.
    pub(crate) fn of(table: Option<InstalledTable>, host: Option<InstalledTable>) -> Self {
        let mut model = Self::default();
        if let Some(table) = table {
            model.exists = true;
            (model.flags, model.owner) = (table.flags, table.owner);
            model.fill(table, |name| !host::is_name(name));
        }
        if let Some(table) = host {
            model.host = Some(HostTable { flags: table.flags, owner: table.owner });
            model.fill(table, host::is_name);
        }
        model
    }

    /// Takes the parts of a table whose names are those of this table.
    fn fill(&mut self, table: InstalledTable, is_of_table: fn(&str) -> bool) {
        let model = self;
        model.objects.extend(table.objects.into_iter().filter(|(name, _)| is_of_table(name.as_str())));
        for (name, chain) in table.chains.into_iter().filter(|(name, _)| is_of_table(name.as_str())) {
            let rules: Vec<Rule> = chain.rules.into_iter().map(|rule| rule.rule).collect();
            rules.iter().for_each(|rule| model.take_note(&name, rule));
            model.chains.insert(name, (chain.chain, rules));
        }
        for (name, set) in table.sets.into_iter().filter(|(name, _)| is_of_table(name.as_str())) {
            // Packets add the elements of these.
            let dynamic = set.set.flags.dynamic;
            if let Some(family) = sets::family_of(&set.set) {
                let ranges = set.elements.iter().filter_map(|e| sets::range_of(family, &e.element));
                model.contents.insert(name.clone(), SetContent::of(family, ranges));
                model.sets.insert(name, HeldSet { set: set.set, elements: BTreeMap::new() });
                continue;
            }
            model.sets.insert(name.clone(), HeldSet { set: set.set, elements: BTreeMap::new() });
            if !dynamic {
                set.elements.into_iter().for_each(|element| model.add_element(&name, element.element));
            }
        }
    }

    /// The tables that exist, with their flags and owners.
    pub(crate) fn tables(&self) -> impl Iterator<Item = (TableId, TableFlags, Option<u32>)> {
        let bridge = self.exists.then(|| (layout::table(), self.flags, self.owner));
        let host = self.host.map(|held| (host::table(), held.flags, held.owner));
        bridge.into_iter().chain(host)
    }

    /// Takes note of a table's owner.
    pub(crate) fn owned(&mut self, table: &TableId, owner: u32) {
        if *table == layout::table() {
            self.owner = Some(owner);
        } else if let Some(held) = &mut self.host {
            held.owner = Some(owner);
        }
    }

    /// The content of a set of the store. `None` if it does not exist, or has another type.
    pub(crate) fn content(&self, set: &SetName) -> Option<&SetContent> {
        self.contents.get(set)
    }

    /// The port's element in a map.
    pub(crate) fn dispatched(&self, way: Way, port: &[u8]) -> Option<&Element> {
        let map = self.sets.get(&layout::dispatch_map(way).name)?;
        map.elements.get(&ElementKey::One(port.to_vec()))
    }

    /// The ports that the maps dispatch.
    pub(crate) fn dispatched_ports(&self) -> BTreeSet<&[u8]> {
        let maps = [Way::FromGuest, Way::ToGuest].map(|way| layout::dispatch_map(way).name.clone());
        let elements = maps.iter().filter_map(|map| self.sets.get(map)).flat_map(|map| map.elements.keys());
        elements.filter_map(port_of).collect()
    }

    /// All ports with elements in sets or maps.
    pub(crate) fn ports(&self) -> impl Iterator<Item = &[u8]> {
        self.by_port.keys().map(Vec::as_slice)
    }

    /// The elements of a port in each set of a class.
    pub(crate) fn values(&self, port: &[u8]) -> BTreeMap<&SetName, BTreeSet<&Element>> {
        self.elements_of(port, |set| layout::class_of(set).is_some())
    }

    /// The servers of a port in each set of ports of the host's table.
    pub(crate) fn servers(&self, port: &[u8]) -> BTreeMap<&SetName, BTreeSet<&Element>> {
        self.elements_of(port, host::is_of_ports)
    }

    fn elements_of(
        &self,
        port: &[u8],
        is_asked: impl Fn(&str) -> bool,
    ) -> BTreeMap<&SetName, BTreeSet<&Element>> {
        let mut elements = BTreeMap::new();
        for name in self.by_port.get(port).into_iter().flatten() {
            let Some(held) = self.sets.get(name).filter(|_| is_asked(name.as_str())) else { continue };
            let behind = held.elements.range(ElementKey::One(port.to_vec())..);
            let own = behind.take_while(|(key, _)| port_of(key) == Some(port));
            elements.insert(name, own.map(|(_, element)| element).collect());
        }
        elements
    }

    /// The number of map elements that lead to a class.
    pub(crate) fn users(&self, class: &str) -> usize {
        self.users.get(class).copied().unwrap_or(0)
    }

    /// The classes with chains or sets.
    pub(crate) fn classes(&self) -> BTreeSet<&str> {
        let chains = self.chains.keys().map(ChainName::as_str);
        let sets = self.sets.keys().map(SetName::as_str);
        chains.chain(sets).filter_map(layout::class_of).collect()
    }

    /// The classes that test connections.
    pub(crate) fn tracking(&self) -> impl Iterator<Item = &str> {
        self.tracking.iter().map(String::as_str)
    }

    /// The classes that reject packets.
    pub(crate) fn rejecting(&self) -> impl Iterator<Item = &str> {
        self.rejecting.iter().map(String::as_str)
    }

    /// The map of frames on their way to a guest.
    pub(crate) fn toward_guests(&self) -> Option<&HeldSet> {
        self.sets.get(&layout::dispatch_map(Way::Ahead).name)
    }

    /// The port's element in the map of frames on their way to a guest.
    pub(crate) fn toward(&self, port: &[u8]) -> Option<&Element> {
        self.toward_guests()?.elements.get(self.toward.get(port)?)
    }

    /// Whether the connections of a bridge are in zone 0.
    pub(crate) fn is_in_zone_0(&self, bridge: &[u8]) -> bool {
        let bridges = self.sets.get(&layout::zone_0().name).map(|held| &held.elements);
        // Without the set, no chain sets zones.
        bridges.is_none_or(|bridges| bridges.contains_key(&ElementKey::One(bridge.to_vec())))
    }

    fn take_note(&mut self, chain: &ChainName, rule: &Rule) {
        let Some(class) = layout::class_of(chain.as_str()) else { return };
        for (classes, is) in [
            (&mut self.tracking, layout::tracks as fn(&Rule) -> bool),
            (&mut self.rejecting, layout::rejects),
        ] {
            if !classes.contains(class) && is(rule) {
                classes.insert(class.into());
            }
        }
    }

    /// The chains of a class.
    pub(crate) fn chains_of<'a>(&'a self, class: &'a str) -> impl Iterator<Item = &'a ChainName> {
        self.chains.keys().filter(move |name| layout::class_of(name.as_str()) == Some(class))
    }

    /// The sets of a class.
    pub(crate) fn sets_of<'a>(&'a self, class: &'a str) -> impl Iterator<Item = &'a SetName> {
        self.sets.keys().filter(move |name| layout::class_of(name.as_str()) == Some(class))
    }

    /// A transaction that recreates a table with these flags: an existing table without an owner cannot be claimed.
    pub(crate) fn made_again(&self, again: &TableId, flags: TableFlags) -> Vec<Operation> {
        let table = || again.clone();
        let is_of_table = |name: &str| host::is_name(name) == (*again == host::table());
        let mut operations =
            vec![Operation::DeleteTable { table: table() }, Operation::AddTable { table: table(), flags }];
        let objects = self.objects.values().filter(|object| is_of_table(object.name().as_str()));
        operations
            .extend(objects.map(|object| Operation::AddObject { table: table(), object: object.clone() }));
        let sets = self.sets.values().filter(|held| is_of_table(held.set.name.as_str()));
        let sets: Vec<_> = sets.map(|held| (Arc::new(held.set.clone()), held)).collect();
        operations.extend(sets.iter().map(|(set, _)| Operation::AddSet { table: table(), set: set.clone() }));
        let chains = || self.chains.iter().filter(|(name, _)| is_of_table(name.as_str()));
        operations.extend(
            chains().map(|(_, (chain, _))| Operation::AddChain { table: table(), chain: chain.clone() }),
        );
        for (name, (_, rules)) in chains() {
            operations.extend(rules.iter().map(|rule| Operation::AddRule {
                table: table(),
                chain: name.clone(),
                place: Place::End,
                rule: rule.clone(),
            }));
        }
        let filled = sets.into_iter().filter(|(_, held)| !held.elements.is_empty());
        operations.extend(filled.map(|(set, held)| {
            let elements = held.elements.values().cloned().collect();
            Operation::AddElements { table: table(), set, elements }
        }));
        operations
    }

    /// Applies a committed transaction.
    pub(crate) fn carry_out(&mut self, operation: Operation) {
        match operation {
            Operation::AddTable { table, flags } if table == host::table() => {
                self.host = Some(HostTable { flags, owner: None });
            }
            Operation::AddTable { flags, .. } => (self.exists, self.flags) = (true, flags),
            Operation::DeleteTable { table } if table == host::table() => {
                self.take_host();
            }
            Operation::DeleteTable { .. } => *self = self.take_host(),
            Operation::AddChain { chain, .. } => {
                self.chains.entry(chain.name.clone()).or_insert_with(|| (chain, Vec::new()));
            }
            Operation::FlushChain { chain, .. } => {
                if let Some((_, rules)) = self.chains.get_mut(&chain) {
                    rules.clear();
                }
            }
            Operation::DeleteChain { chain, .. } => {
                self.chains.remove(&chain);
                // The chains of a class are removed together.
                if let Some(class) = layout::class_of(chain.as_str()) {
                    self.tracking.remove(class);
                    self.rejecting.remove(class);
                }
            }
            Operation::AddRule { chain, rule, .. } => {
                self.take_note(&chain, &rule);
                if let Some((_, rules)) = self.chains.get_mut(&chain) {
                    rules.push(rule);
                }
            }
            Operation::AddSet { set, .. } => {
                if let Some(family) = sets::family_of(&set) {
                    let content = self.contents.entry(set.name.clone());
                    content.or_insert_with(|| SetContent::empty(family));
                }
                let held = HeldSet { set: (*set).clone(), elements: BTreeMap::new() };
                self.sets.entry(set.name.clone()).or_insert(held);
            }
            Operation::DeleteSet { set, .. } => {
                self.contents.remove(&set);
                let elements =
                    self.sets.get(&set).map(|held| held.elements.values().cloned().collect::<Vec<_>>());
                elements.into_iter().flatten().for_each(|element| self.delete_element(&set, &element));
                self.sets.remove(&set);
            }
            Operation::AddElements { set, elements, .. } if self.contents.contains_key(&set.name) => {
                self.change_content(&set, &elements, &[]);
            }
            Operation::DeleteElements { set, elements, .. } if self.contents.contains_key(&set.name) => {
                self.change_content(&set, &[], &elements);
            }
            Operation::AddElements { set, elements, .. } => {
                elements.into_iter().for_each(|element| self.add_element(&set.name, element));
            }
            Operation::DeleteElements { set, elements, .. } => {
                elements.iter().for_each(|element| self.delete_element(&set.name, element));
            }
            Operation::AddObject { object, .. } => {
                self.objects.insert(object.name().clone(), object);
            }
            Operation::DeleteObject { object, .. } => {
                self.objects.remove(object.name());
            }
            // Plans have no other operations.
            _ => {}
        }
    }

    /// Takes the host's table out.
    fn take_host(&mut self) -> Self {
        let mut taken = Self { host: self.host.take(), ..Self::default() };
        (taken.chains, self.chains) =
            std::mem::take(&mut self.chains).into_iter().partition(|(name, _)| host::is_name(name.as_str()));
        (taken.objects, self.objects) =
            std::mem::take(&mut self.objects).into_iter().partition(|(name, _)| host::is_name(name.as_str()));
        let names: Vec<SetName> =
            self.sets.keys().filter(|name| host::is_name(name.as_str())).cloned().collect();
        for name in names {
            let Some(held) = self.sets.get(&name) else { continue };
            let (set, elements) = (held.set.clone(), held.elements.values().cloned().collect::<Vec<_>>());
            elements.iter().for_each(|element| self.delete_element(&name, element));
            self.sets.remove(&name);
            taken.sets.insert(name.clone(), HeldSet { set, elements: BTreeMap::new() });
            elements.into_iter().for_each(|element| taken.add_element(&name, element));
        }
        taken
    }

    fn change_content(&mut self, set: &Set, add: &[Element], delete: &[Element]) {
        let (Some(content), Some(family)) = (self.contents.get_mut(&set.name), sets::family_of(set)) else {
            return;
        };
        let ranges = |elements: &[Element]| {
            elements.iter().filter_map(|element| sets::range_of(family, element)).collect()
        };
        *content = content.changed(&SetChange { add: ranges(add), delete: ranges(delete) });
    }

    fn add_element(&mut self, set: &SetName, element: Element) {
        if let Some(port) = port_in(set, &element) {
            self.by_port.entry(port.to_vec()).or_default().insert(set.clone());
            if set.as_str() == layout::TOWARD_GUEST {
                self.toward.insert(port, element.key.clone());
            }
        }
        if let Some(class) = class_led_to(&element) {
            *self.users.entry(class.into()).or_default() += 1;
        }
        if let Some(held) = self.sets.get_mut(set) {
            held.elements.insert(element.key.clone(), element);
        }
    }

    fn delete_element(&mut self, set: &SetName, element: &Element) {
        let Some(held) = self.sets.get_mut(set) else { return };
        let Some(element) = held.elements.remove(&element.key) else { return };
        if let Some(class) = class_led_to(&element)
            && let Some(users) = self.users.get_mut(class)
        {
            *users -= 1;
        }
        let Some(port) = port_in(set, &element) else { return };
        let has_more = if set.as_str() == layout::TOWARD_GUEST {
            self.toward.remove(&port);
            false
        } else {
            let first = held.elements.range(ElementKey::One(port.to_vec())..).next();
            first.and_then(|(key, _)| port_of(key)) == Some(&port)
        };
        if !has_more && let Some(sets) = self.by_port.get_mut(&port[..]) {
            sets.remove(set);
            if sets.is_empty() {
                self.by_port.remove(&port[..]);
            }
        }
    }
}

/// The name of a port in a key.
type PortKey = [u8; IFNAMSIZ];

/// The port that an element of a set is of.
fn port_in(set: &SetName, element: &Element) -> Option<PortKey> {
    match set.as_str() {
        // A bridge is not a port, nor is a server.
        layout::ZONE_0 => None,
        name if host::is_name(name) && !host::is_of_ports(name) => None,
        layout::TOWARD_GUEST => field::ifname(element.comment.as_ref()?.as_str()),
        _ => port_of(&element.key)?.try_into().ok(),
    }
}

/// The port that a key begins with.
fn port_of(key: &ElementKey) -> Option<&[u8]> {
    match key {
        ElementKey::One(key) => key.get(..IFNAMSIZ),
        ElementKey::Range(..) => None,
    }
}

/// The class that an element of a map leads to.
pub(crate) fn class_led_to(element: &Element) -> Option<&str> {
    match &element.value {
        Some(ElementValue::Verdict(Verdict::Goto(chain) | Verdict::Jump(chain))) => {
            layout::class_of(chain.as_str())
        }
        _ => None,
    }
}

/// The name of a port in a key.
pub(crate) fn port_name(key: &[u8]) -> Option<nwfilter_xml::PortDev> {
    let end = key.iter().position(|byte| *byte == 0).unwrap_or(key.len());
    std::str::from_utf8(key.get(..end)?).ok()?.parse().ok()
}
