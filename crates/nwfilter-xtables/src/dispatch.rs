//! How a packet finds the chains of its port.
//!
//! A few ports are a list of rules, one for each port, as libvirt has it: each packet is compared with one after the
//! other. For more ports the rules are the leaves of a tree over the ports' names. A chain of the tree holds the rules
//! of a few ports, or sends on what comes from ports whose names begin alike:
//!
//! ```text
//! -A libvirt-in -j nwfilter-in
//! -A nwfilter-in -m physdev --physdev-in vnet1+ -g nwfilter-in-vnet1
//! -A nwfilter-in -m physdev --physdev-in vnet2 -g FI-vnet2
//! -A nwfilter-in-vnet1 -m physdev --physdev-in vnet1 -g FI-vnet1
//! -A nwfilter-in-vnet1 -m physdev --physdev-in vnet10 -g FI-vnet10
//! ```
//!
//! In the raw table, where a packet does not tell to which port it will go, the tree first divides by the destination
//! ports that have helpers. Below, all ports with such a helper are tried; the names only divide them into chains, so
//! that few rules are written when one port changes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::names::{FROM_GUEST, FROM_GUEST_POST, HELPERS, TO_GUEST, TO_HOST, port_of_helpers, port_of_root};
use crate::saved::{SavedRule, SavedTable, Target};
use crate::tool::TableId;

/// How packets are dispatched to the chains of their ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dispatch {
    /// By a tree over the names of the ports where there are 8 ports or more, by libvirt's list below: the cost of a
    /// packet hardly grows with the number of ports.
    #[default]
    Tree,
    /// By libvirt's list, however many ports there are. libvirt's own driver can take over from it.
    List,
    /// As it is: by a tree where there is one, else by the list. For a process beside the one that decides.
    Keep,
}

/// The number of ports from which on there is a tree.
const TREE_FROM: usize = 8;

/// The most rules a chain of the tree has before it is divided further.
const LEAF_RULES: usize = 8;

/// The fewest ports for which it is divided. A chain for two of them would spare the others one rule, and be there to be
/// rewritten for every third that comes or goes.
const GROUP_FROM: usize = 3;

/// A chain whose packets are dispatched to the ports of a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dispatcher {
    /// The chain. It may hold rules of others, which stay.
    pub(crate) chain: &'static str,
    /// The root of the tree. Chains further down are named after it.
    tree: &'static str,
    by: By,
}

/// What tells to which port a packet belongs.
#[derive(Clone, Copy, Debug)]
enum By {
    /// An interface of the bridge: an option of ebtables.
    Interface(&'static str),
    /// A port of the bridge: an option of iptables' physdev match, and what stands behind the port.
    Physdev(&'static str, &'static str),
    /// The conntrack helper that the port has rules for.
    Helper,
}

/// The rules of each port, in one dispatcher.
pub(crate) type Entries<'a> = BTreeMap<&'a str, Vec<&'a str>>;

/// What dispatches to the ports: rules at the end of the dispatcher's chain, and the chains of the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) rules: Vec<String>,
    pub(crate) tree: BTreeMap<String, Vec<String>>,
}

/// The dispatchers of a table.
pub(crate) fn dispatchers(table: TableId) -> Vec<Dispatcher> {
    const IN: By = By::Physdev("--physdev-in", "");
    const OUT: By = By::Physdev("--physdev-out", " --physdev-is-bridged");
    let all: &[(&str, &str, By)] = match table {
        TableId::EbtablesNat => &[
            ("PREROUTING", "nwfilter-in", By::Interface("-i")),
            ("POSTROUTING", "nwfilter-out", By::Interface("-o")),
        ],
        TableId::IptablesFilter | TableId::Ip6tablesFilter => &[
            (FROM_GUEST, "nwfilter-in", IN),
            (TO_GUEST, "nwfilter-out", OUT),
            (FROM_GUEST_POST, "nwfilter-post", IN),
            (TO_HOST, "nwfilter-host", IN),
        ],
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &[(HELPERS, "CTD", By::Helper)],
    };
    all.iter().map(|(chain, tree, by)| Dispatcher { chain, tree, by: *by }).collect()
}

/// The transport protocol and the destination port of connections that a rule gives a helper.
type HelperKey = (String, String);

impl Dispatcher {
    /// Whether a chain belongs to the tree.
    pub(crate) fn has_in_tree(&self, chain: &str) -> bool {
        chain.strip_prefix(self.tree).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// The chains of the tree that a table holds.
    pub(crate) fn tree_chains<'a>(
        &self,
        saved: &'a SavedTable,
    ) -> impl Iterator<Item = (&'a String, &'a Vec<String>)> {
        let from_here = saved.range::<str, _>((Bound::Included(self.tree), Bound::Unbounded));
        from_here
            .take_while(|(name, _)| name.starts_with(self.tree))
            .filter(|(name, _)| self.has_in_tree(name))
    }

    /// Whether a rule of the dispatcher's chain is there to dispatch.
    pub(crate) fn is_dispatching(&self, rule: &str) -> bool {
        rule == self.root_rule() || self.port(rule).is_some()
    }

    /// Whether a rule of others in the dispatcher's chain may let packets of one of these ports pass without their
    /// rules. One that drops them, or goes on to the next rule, does not.
    pub(crate) fn may_bypass(
        &self,
        table: TableId,
        saved: &SavedTable,
        rule: &str,
        ports: &BTreeSet<&str>,
    ) -> bool {
        if let By::Interface(option) = self.by
            && let Some(interface) = SavedRule::new(rule).value(option)
            && interface != "!"
            && !interface.ends_with('+')
            && !ports.contains(interface)
        {
            return false;
        }
        ends_well(table, saved, rule, &mut BTreeSet::new())
    }

    /// The port whose packets a rule leads into the port's chains.
    pub(crate) fn port<'a>(&self, rule: &'a str) -> Option<&'a str> {
        let rule = SavedRule::new(rule);
        let target = || rule.target().map(Target::name);
        match self.by {
            // Only jumps to a chain of the port are ours: the hook is shared with everybody.
            By::Interface(option) => {
                rule.value(option).filter(|port| target().and_then(port_of_root) == Some(*port))
            }
            By::Physdev(option, _) => rule.value(option).filter(|port| !port.ends_with('+')),
            By::Helper => target().and_then(port_of_helpers),
        }
    }

    /// The rules that a table holds for each port, in a list or in a tree, repeated ones once.
    pub(crate) fn entries<'a>(&self, saved: &'a SavedTable) -> Entries<'a> {
        let mut entries = Entries::new();
        let list = saved.get(self.chain).into_iter().flatten();
        for rule in list.chain(self.tree_chains(saved).flat_map(|(_, rules)| rules)) {
            let Some(port) = self.port(rule) else { continue };
            let rules = entries.entry(port).or_default();
            // In a tree a port with several helpers is in several chains.
            if !rules.contains(&rule.as_str()) {
                rules.push(rule);
            }
        }
        entries
    }

    /// The ports to whose rules packets get from the dispatcher's chain.
    pub(crate) fn reached<'a>(&self, saved: &'a SavedTable) -> BTreeSet<&'a str> {
        let (mut reached, mut seen) = (BTreeSet::new(), BTreeSet::new());
        let mut waiting = vec![self.chain];
        while let Some(rules) = waiting.pop().and_then(|chain| saved.get(chain)) {
            for rule in rules {
                reached.extend(self.port(rule));
                let target = SavedRule::new(rule).target().map(Target::name);
                let target = target.filter(|target| self.has_in_tree(target));
                waiting.extend(target.filter(|target| saved.contains_key(*target) && seen.insert(*target)));
            }
        }
        reached
    }

    /// Whether ports are to be dispatched by a tree if they are many.
    fn has_tree(&self, saved: &SavedTable, dispatch: Dispatch) -> bool {
        match dispatch {
            Dispatch::Tree => true,
            Dispatch::List => false,
            Dispatch::Keep => self.tree_chains(saved).next().is_some(),
        }
    }

    /// How ports with these rules are dispatched in a table that holds `saved`. `rules_of` gives the rules of a port's own chain.
    pub(crate) fn layout<'a>(
        &self,
        entries: &Entries<'_>,
        (saved, dispatch): (&SavedTable, Dispatch),
        rules_of: impl Fn(&str) -> Vec<&'a str>,
    ) -> Layout {
        let mut layout = Layout::default();
        if entries.len() < TREE_FROM || !self.has_tree(saved, dispatch) {
            layout.rules = entries.values().flatten().map(|rule| (*rule).to_owned()).collect();
            return layout;
        }
        layout.rules.push(self.root_rule());
        match self.by {
            By::Helper => self.plant_helpers(entries, rules_of, &mut layout.tree),
            By::Interface(_) | By::Physdev(..) => {
                let ports: Vec<_> = entries.iter().map(|(port, rules)| (*port, rules.as_slice())).collect();
                self.plant(self.tree, &ports, &mut layout.tree);
            }
        }
        layout
    }

    /// Adds the chain `root` and those below it, which are named after it.
    fn plant(&self, root: &str, ports: &[(&str, &[&str])], tree: &mut BTreeMap<String, Vec<String>>) {
        // Chains with the ports in them, and for how many bytes the names of those begin alike. Port names are ASCII.
        let mut waiting = vec![(root.to_owned(), 0, ports)];
        while let Some((chain, common, ports)) = waiting.pop() {
            let next = |port: &(&str, _)| port.0.as_bytes().get(common).copied();
            let mut rules = Vec::new();
            for group in ports.chunk_by(|a, b| next(a) == next(b)) {
                let divides = ports.len() > LEAF_RULES && group.len() >= GROUP_FROM;
                if let ([(first, _), .., (last, _)], true) = (group, divides) {
                    // In order, so that what the ends have in common all have.
                    let alike = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
                    let below = format!("{root}-{}", &first[..alike]);
                    rules.push(self.leading_on(&format!("{}+", &first[..alike]), &below));
                    waiting.push((below, alike, group));
                } else {
                    rules.extend(group.iter().flat_map(|(_, rules)| *rules).map(|rule| (*rule).to_owned()));
                }
            }
            tree.insert(chain, rules);
        }
    }

    fn plant_helpers<'a>(
        &self,
        entries: &Entries<'_>,
        rules_of: impl Fn(&str) -> Vec<&'a str>,
        tree: &mut BTreeMap<String, Vec<String>>,
    ) {
        let mut root = Vec::new();
        let mut by_key: BTreeMap<HelperKey, Vec<(&str, &[&str])>> = BTreeMap::new();
        for (port, rules) in entries {
            let keys: Option<BTreeSet<_>> = rules_of(port).into_iter().map(helper_key).collect();
            match keys.filter(|keys| !keys.is_empty()) {
                Some(keys) => {
                    keys.into_iter().for_each(|key| by_key.entry(key).or_default().push((port, rules)))
                }
                // Somebody changed the port's chain.
                None => root.extend(rules.iter().map(|rule| (*rule).to_owned())),
            }
        }
        for ((protocol, port), ports) in by_key {
            let chain = format!("{}-{protocol}-{port}", self.tree);
            root.push(format!("-p {protocol} -m {protocol} --dport {port} -j {chain}"));
            self.plant(&chain, &ports, tree);
        }
        tree.insert(self.tree.to_owned(), root);
    }

    fn root_rule(&self) -> String {
        format!("-j {}", self.tree)
    }

    /// The rule that sends on the packets of interfaces that match a pattern.
    fn leading_on(&self, pattern: &str, chain: &str) -> String {
        match self.by {
            By::Interface(option) => format!("{option} {pattern} -j {chain}"),
            // Behind a goto no other rule of the chain is tried.
            By::Physdev(option, more) => format!("-m physdev {option} {pattern}{more} -g {chain}"),
            By::Helper => format!("-j {chain}"),
        }
    }
}

/// Whether a rule may end the way of a packet through a built-in chain without dropping it. `seen` are the chains that
/// were looked into.
fn ends_well(table: TableId, saved: &SavedTable, rule: &str, seen: &mut BTreeSet<String>) -> bool {
    let rule = SavedRule::new(rule);
    let target = match rule.target() {
        // A return from a built-in chain is the chain's policy.
        Some(Target::Goto(_) | Target::Jump("ACCEPT" | "RETURN" | "NFQUEUE" | "QUEUE")) => return true,
        Some(Target::Jump("DROP" | "REJECT" | "CONTINUE")) | None => return false,
        Some(Target::Jump(target)) => target,
    };
    if let Some(rules) = saved.get(target) {
        // A return from a chain of others goes on behind the jump.
        let returns = |rule: &str| SavedRule::new(rule).target() == Some(Target::Jump("RETURN"));
        return seen.insert(target.to_owned())
            && rules.iter().any(|rule| !returns(rule) && ends_well(table, saved, rule, seen));
    }
    // Those of ebtables that change a frame accept it then, unless they are told something else.
    table == TableId::EbtablesNat
        && ["mark", "snat", "dnat", "redirect", "arpreply"].contains(&target)
        && !rule.words().any(|word| ["CONTINUE", "DROP"].contains(&word))
}

/// What the rule of a port's own chain gives a helper to.
fn helper_key(rule: &str) -> Option<HelperKey> {
    let rule = SavedRule::new(rule);
    let protocol = match rule.value("-p")? {
        "tcp" | "6" => "tcp",
        "udp" | "17" => "udp",
        _ => return None,
    };
    Some((protocol.to_owned(), rule.value("--dport")?.to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::collection::btree_set;
    use proptest::prelude::*;

    use super::*;

    fn dispatcher() -> Dispatcher {
        dispatchers(TableId::IptablesFilter)[0]
    }

    fn layout(rules: &[(String, String)], dispatch: Dispatch) -> Layout {
        let mut entries = Entries::new();
        rules.iter().for_each(|(port, rule)| entries.entry(port).or_default().push(rule));
        dispatcher().layout(&entries, (&SavedTable::new(), dispatch), |_| Vec::new())
    }

    fn rules<'a>(ports: impl IntoIterator<Item = &'a String>) -> Vec<(String, String)> {
        let rule = |port: &String| (port.clone(), format!("-m physdev --physdev-in {port} -g FI-{port}"));
        ports.into_iter().map(rule).collect()
    }

    /// Where a packet of a port gets, and how many rules it is compared with on the way.
    fn walk<'a>(layout: &'a Layout, port: &str) -> (Option<&'a str>, usize) {
        let (mut rules, mut compared) = (&layout.rules, 0);
        'chain: loop {
            for rule in rules {
                let words: Vec<_> = rule.split(' ').collect();
                let target = *words.last().unwrap();
                compared += 1;
                let matches = match words[..] {
                    ["-j", _] => true,
                    ["-m", "physdev", "--physdev-in", name, "-g", _] => match name.strip_suffix('+') {
                        Some(prefix) => port.starts_with(prefix),
                        None => port == name,
                    },
                    _ => panic!("{rule}"),
                };
                match layout.tree.get(target) {
                    Some(chain) if matches => {
                        rules = chain;
                        continue 'chain;
                    }
                    _ if matches => return (Some(target), compared),
                    _ => (),
                }
            }
            return (None, compared);
        }
    }

    proptest! {
        #[test]
        fn every_port_gets_to_its_chain_and_nobody_else_to_any(
            ports in btree_set("(vnet|tap|v|web-)[0-9a-z.-]{0,4}", 0..60),
            other in "(vnet|tap|v|web-)[0-9a-z.-]{0,4}",
        ) {
            let layout = layout(&rules(&ports), Dispatch::Tree);
            for port in &ports {
                prop_assert_eq!(walk(&layout, port).0.map(str::to_owned), Some(format!("FI-{port}")));
            }
            if !ports.contains(&other) {
                prop_assert_eq!(walk(&layout, &other).0, None);
            }
            for (chain, rules) in &layout.tree {
                prop_assert!(chain.len() <= 28 && !rules.is_empty(), "{}", chain);
            }
        }

        #[test]
        fn a_tree_is_read_back_as_the_list_it_stands_for(
            ports in btree_set("vnet[0-9]{1,3}", 0..60)
        ) {
            let wanted = rules(&ports);
            let layout = layout(&wanted, Dispatch::Tree);
            let mut saved = SavedTable::from([(FROM_GUEST.to_owned(), layout.rules)]);
            saved.extend(layout.tree);
            let read: Vec<_> = dispatcher().entries(&saved).into_iter().collect();
            let expected: Vec<_> = wanted.iter().map(|(port, rule)| (port.as_str(), vec![rule.as_str()])).collect();
            prop_assert_eq!(read, expected);
            let reached: Vec<_> = dispatcher().reached(&saved).into_iter().map(str::to_owned).collect();
            prop_assert_eq!(reached, ports.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn below_eight_ports_and_where_it_is_asked_for_there_is_a_list() {
        let ports: Vec<_> = (0..8).map(|number| format!("vnet{number}")).collect();
        assert!(layout(&rules(&ports[..7]), Dispatch::Tree).tree.is_empty());
        assert!(!layout(&rules(&ports), Dispatch::Tree).tree.is_empty());
        let list = layout(&rules(&ports), Dispatch::List);
        assert_eq!((list.rules.len(), list.tree.len()), (8, 0));
    }

    #[test]
    fn a_packet_is_compared_with_few_rules_however_many_ports_there_are() {
        let ports: Vec<_> = (0..1000).map(|number| format!("vnet{number}")).collect();
        let layout = layout(&rules(&ports), Dispatch::Tree);
        let most = ports.iter().map(|port| walk(&layout, port).1).max();
        assert!(most <= Some(35), "{most:?}");
    }

    #[test]
    fn names_as_long_as_they_get_make_chains_that_the_tools_take() {
        let ports: Vec<_> = (0..10).map(|number| format!("vnet-abcdefghi{number}")).collect();
        assert_eq!(ports[0].len(), 15);
        for table in TableId::ALL {
            for dispatcher in dispatchers(table) {
                let mut entries = Entries::new();
                ports.iter().for_each(|port| entries.entry(port).or_default().push("-j CT-x"));
                let layout = dispatcher.layout(&entries, (&SavedTable::new(), Dispatch::Tree), |_| {
                    vec!["-p udp -m udp --dport 65535"]
                });
                assert!(layout.tree.keys().all(|chain| chain.len() <= 28), "{:?}", layout.tree.keys());
            }
        }
    }

    #[test]
    fn ports_that_have_a_helper_are_found_by_the_port_of_the_connection() {
        let dispatcher = dispatchers(TableId::IptablesRaw)[0];
        let ports: Vec<_> =
            (0..9).map(|number| (format!("vnet{number}"), format!("-j CT-vnet{number}"))).collect();
        let mut entries = Entries::new();
        ports.iter().for_each(|(port, rule)| entries.entry(port).or_default().push(rule));
        let layout = dispatcher.layout(&entries, (&SavedTable::new(), Dispatch::Tree), |port| match port {
            "vnet0" => vec![
                "-p tcp -m tcp --dport 21 -j CT --helper ftp",
                "-p udp -m udp --dport 69 -j CT --helper tftp",
            ],
            _ => vec!["-d 10.0.0.1/32 -p tcp -m tcp --dport 21 -j CT --helper ftp"],
        });
        assert_eq!(layout.rules, ["-j CTD"]);
        assert_eq!(
            layout.tree["CTD"],
            ["-p tcp -m tcp --dport 21 -j CTD-tcp-21", "-p udp -m udp --dport 69 -j CTD-udp-69"]
        );
        assert_eq!(layout.tree["CTD-tcp-21"], ["-j CTD-tcp-21-vnet"]);
        assert_eq!(layout.tree["CTD-tcp-21-vnet"].len(), 9);
        assert_eq!(layout.tree["CTD-udp-69"], ["-j CT-vnet0"]);
    }
}
