//! Plans the table of helpers for connections that the host itself opens to guests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{KernelObject, Origin};
use nwfilter_xml::PortDev;

use super::ports::Changes;
use super::{Cause, Planner, Step, Wanted};
use crate::host::{self, ServerKind};
use crate::kernel::{Element, ElementKey, Operation, Set, TableFlags};
use crate::layout;
use crate::owner::OWNED;

/// What changes for the servers of a kind.
#[derive(Default)]
struct KindChanges<'a> {
    servers: Changes<'a>,
    ports: Changes<'a>,
}

impl<'a> Planner<'a> {
    /// Gives each guest's servers their helpers. The table exists while a port has a server.
    pub(super) fn host_table(&mut self) {
        let has_servers =
            |wanted: &Wanted| matches!(wanted, Wanted::Class(_, _, guest) if !guest.servers.is_empty());
        if self.model.host.is_none() && !self.wanted.values().any(has_servers) {
            return;
        }
        let (mut changes, mut used) = (Vec::new(), Vec::new());
        for kind in ServerKind::all() {
            let of_kind = self.servers_of(kind);
            let held = self.held(&kind.ports()).map_or(0, BTreeMap::len);
            if held + of_kind.ports.add.len() > of_kind.ports.delete.len() {
                used.push(kind);
            }
            changes.push((kind, of_kind));
        }
        if !used.is_empty() {
            self.host_base(&used);
        }
        for (kind, of_kind) in changes {
            for (set, Changes { ports, delete, add }) in
                [(kind.servers(), of_kind.servers), (kind.ports(), of_kind.ports)]
            {
                self.elements(
                    Step::Prepare,
                    set.clone(),
                    Changes { ports: ports.clone(), add, ..Changes::default() },
                );
                self.elements(Step::Clean, set, Changes { ports, delete, ..Changes::default() });
            }
        }
        if used.is_empty() {
            let table = host::table();
            let cause = self.cause(None, KernelObject::Table { table: table.to_string() });
            self.push(Step::Clean, Operation::DeleteTable { table }, cause);
        }
    }

    /// The table, its chain, and the sets and helpers of these kinds.
    fn host_base(&mut self, used: &[ServerKind]) {
        let (table, model) = (host::table(), self.model);
        let cause = self.cause(None, KernelObject::Table { table: table.to_string() });
        if let Some(held) = model.host {
            self.wake(table.clone(), held.flags);
        } else {
            // Who owns the one table owns the other.
            let flags: TableFlags = if model.owner.is_some() { OWNED } else { self.flags };
            self.push(Step::Prepare, Operation::AddTable { table: table.clone(), flags }, cause.clone());
        }
        let is_held = |kind: &ServerKind| model.sets.contains_key(&kind.servers().name);
        let kinds: Vec<ServerKind> =
            ServerKind::all().filter(|kind| used.contains(kind) || is_held(kind)).collect();
        for kind in &kinds {
            let object = kind.object();
            if model.objects.get(object.name()) != Some(&object) && !self.adds_object(&object) {
                let cause = Cause { rule: format!("ct helper {}", kind.helper()), ..cause.clone() };
                self.push(Step::Prepare, Operation::AddObject { table: table.clone(), object }, cause);
            }
            self.set(&kind.servers(), None);
            self.set(&kind.ports(), None);
        }
        let (chain, rules) = host::output(&kinds);
        let rules: Vec<_> = rules.into_iter().map(|rule| (rule, Origin::BUILT_IN)).collect();
        self.chain(chain, &rules, &[]);
    }

    fn held(&self, set: &Set) -> Option<&'a BTreeMap<ElementKey, Element>> {
        self.model.sets.get(&set.name).map(|held| &held.elements)
    }

    /// What changes in the sets of a kind.
    fn servers_of(&self, kind: ServerKind) -> KindChanges<'a> {
        let (wanted, model) = (self.wanted, self.model);
        let (servers, ports) = (kind.servers(), kind.ports());
        let mut changes = KindChanges::default();
        // Elements of the set of servers that ports of the batch ask for, and by whom first.
        let mut asked: BTreeMap<ElementKey, &'a PortDev> = BTreeMap::new();
        for (port, wanted) in wanted {
            let mut stale = model.servers(&layout::port_key(port)).remove(&ports.name).unwrap_or_default();
            let own = match wanted {
                Wanted::Class(_, _, guest) => &guest.servers[..],
                Wanted::Gone => &[],
            };
            let mut add = Vec::new();
            for server in own.iter().filter(|server| server.kind == kind) {
                asked.entry(server.element().key).or_insert(port);
                let element = server.element_of(port);
                if !stale.remove(&element) {
                    add.push(element);
                }
            }
            if !add.is_empty() || !stale.is_empty() {
                changes.ports.take(port, stale.into_iter().cloned().collect(), add);
            }
        }
        changes.servers = self.lookups(&servers, &ports, &changes.ports, &asked);
        changes
    }

    /// What changes in the set that the rule looks into. Elements that no port needs are looked for only where a port gives one
    /// up, or differences are asked for: it takes a look at the servers of all ports.
    fn lookups(
        &self,
        servers: &Arc<Set>,
        ports: &Arc<Set>,
        of_ports: &Changes<'a>,
        asked: &BTreeMap<ElementKey, &'a PortDev>,
    ) -> Changes<'a> {
        let none = BTreeMap::new();
        let held = self.held(servers).unwrap_or(&none);
        let mut by_port: BTreeMap<&'a PortDev, (Vec<Element>, Vec<Element>)> = BTreeMap::new();
        for (key, port) in asked.iter().filter(|(key, _)| !held.contains_key(key)) {
            by_port.entry(port).or_default().1.push(Element::new(key.clone()));
        }
        let Some(first) = self.wanted.keys().next() else { return Changes::default() };
        if !of_ports.delete.is_empty() || self.report {
            let gone: BTreeMap<&ElementKey, &'a PortDev> =
                of_ports.delete.iter().map(|(port, element)| (&element.key, *port)).collect();
            let kept = self.held(ports).into_iter().flat_map(BTreeMap::keys);
            let kept: BTreeSet<ElementKey> =
                kept.filter(|key| !gone.contains_key(key)).filter_map(host::server_key).collect();
            let gone: BTreeMap<ElementKey, &'a PortDev> =
                gone.into_iter().filter_map(|(key, port)| Some((host::server_key(key)?, port))).collect();
            let needed = |key: &ElementKey| kept.contains(key) || asked.contains_key(key);
            for (key, element) in held.iter().filter(|(key, _)| !needed(key)) {
                let port = gone.get(key).copied().unwrap_or(first);
                by_port.entry(port).or_default().0.push(element.clone());
            }
        }
        let mut changes = Changes::default();
        by_port.into_iter().for_each(|(port, (delete, add))| changes.take(port, delete, add));
        changes
    }
}
