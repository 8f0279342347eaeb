//! Dispatches packets to the chains of their port.
//!
//! A few ports are dispatched by libvirt's list: one rule for each port, and each packet is compared with all of them
//! in turn. Many ports are dispatched by a tree over their names. A chain of the tree holds the rules of a few ports,
//! or jumps to chains for a common prefix of names:
//!
//! ```text
//! -A libvirt-in -j nwfilter-in
//! -A nwfilter-in -m physdev --physdev-in vnet1+ -g nwfilter-in-vnet1
//! -A nwfilter-in -m physdev --physdev-in vnet2 -g FI-vnet2
//! -A nwfilter-in-vnet1 -m physdev --physdev-in vnet1 -g FI-vnet1
//! -A nwfilter-in-vnet1 -m physdev --physdev-in vnet10 -g FI-vnet10
//! ```
//!
//! In the raw table the destination port of the bridge is not known yet. There the tree first branches on the
//! destination ports that have helpers, and tries every port with such a helper. The names only split those into
//! chains, so that a change of one port writes few rules.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::names::{FROM_GUEST, FROM_GUEST_POST, HELPERS, TO_GUEST, TO_HOST, port_of_helpers, port_of_root};
use crate::saved::{SavedRule, SavedTable, Target};
use crate::tool::TableId;

/// How packets are dispatched to the chains of their ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dispatch {
    /// By a tree over port names for 8 ports and more, by libvirt's list for fewer. The cost per packet hardly grows with
    /// the number of ports.
    #[default]
    Tree,
    /// By libvirt's list for any number of ports. libvirt's own driver can take over from it.
    List,
    /// As the table already does. For a process beside the one that decides.
    Keep,
}

/// The smallest number of ports that a tree dispatches.
const TREE_FROM: usize = 8;

/// A chain of the tree with more rules is split further.
const LEAF_RULES: usize = 8;

/// A group of ports with a common prefix gets its own chain from this size on. A chain for two ports would save the
/// others one rule, but would have to be rewritten whenever a third port comes or goes.
const GROUP_FROM: usize = 3;

/// A chain that dispatches its packets to the ports of a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dispatcher {
    /// The chain. It may also hold rules of others, which stay.
    pub(crate) chain: &'static str,
    /// The root chain of the tree; the names of the other chains start with it.
    tree: &'static str,
    by: By,
}

/// How a rule selects the packets of a port.
#[derive(Clone, Copy, Debug)]
enum By {
    /// By bridge port: this option of ebtables.
    Interface(&'static str),
    /// By bridge port: this option of iptables' physdev match, and what follows the port's name.
    Physdev(&'static str, &'static str),
    /// By the connections that the port's helper rules select.
    Helper,
}

/// The dispatching rules of each port in one dispatcher.
pub(crate) type Entries<'a> = BTreeMap<&'a str, Vec<&'a str>>;

/// The rules at the end of the dispatcher's chain, and the chains of its tree.
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

/// Transport protocol and destination port of the connections to which a rule assigns a helper.
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

    /// Whether a rule of the dispatcher's chain dispatches, and so is ours.
    pub(crate) fn is_dispatching(&self, rule: &str) -> bool {
        rule == self.root_rule() || self.port(rule).is_some()
    }

    /// Whether a rule of others in the dispatcher's chain may accept packets of one of these ports before the port's rules
    /// see them. A rule that drops, or continues with the next rule, does not.
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
        ends_well(table, saved, rule)
    }

    /// The port that a rule dispatches to.
    pub(crate) fn port<'a>(&self, rule: &'a str) -> Option<&'a str> {
        let rule = SavedRule::new(rule);
        let target = || rule.target().map(Target::name);
        match self.by {
            // Others have rules in the same hook: only jumps to a chain of the port are ours.
            By::Interface(option) => {
                rule.value(option).filter(|port| target().and_then(port_of_root) == Some(*port))
            }
            By::Physdev(option, _) => rule.value(option).filter(|port| !port.ends_with('+')),
            By::Helper => target().and_then(port_of_helpers),
        }
    }

    /// The dispatching rules that a table holds for each port, in list or tree, without repetitions.
    pub(crate) fn entries<'a>(&self, saved: &'a SavedTable) -> Entries<'a> {
        let mut entries = Entries::new();
        let list = saved.get(self.chain).into_iter().flatten();
        for rule in list.chain(self.tree_chains(saved).flat_map(|(_, rules)| rules)) {
            let Some(port) = self.port(rule) else { continue };
            let rules = entries.entry(port).or_default();
            // A tree has a port with several helpers in several chains.
            if !rules.contains(&rule.as_str()) {
                rules.push(rule);
            }
        }
        entries
    }

    /// The ports that packets can reach from the dispatcher's chain.
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

    /// Whether many ports are dispatched by a tree.
    fn has_tree(&self, saved: &SavedTable, dispatch: Dispatch) -> bool {
        match dispatch {
            Dispatch::Tree => true,
            Dispatch::List => false,
            Dispatch::Keep => self.tree_chains(saved).next().is_some(),
        }
    }

    /// The layout that dispatches to ports with these rules, in a table that holds `saved`. `rules_of` returns the rules of
    /// a port's own chain.
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

    /// Adds the chain `root` and the chains below it to the tree.
    fn plant(&self, root: &str, ports: &[(&str, &[&str])], tree: &mut BTreeMap<String, Vec<String>>) {
        // Each chain with its ports and the length of their common prefix. Port names are ASCII.
        let mut waiting = vec![(root.to_owned(), 0, ports)];
        while let Some((chain, common, ports)) = waiting.pop() {
            let next = |port: &(&str, _)| port.0.as_bytes().get(common).copied();
            let mut rules = Vec::new();
            for group in ports.chunk_by(|a, b| next(a) == next(b)) {
                let divides = ports.len() > LEAF_RULES && group.len() >= GROUP_FROM;
                if let ([(first, _), .., (last, _)], true) = (group, divides) {
                    // The ports are sorted: what the first and last have in common, all have.
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
                // Others changed the port's chain.
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

    /// The rule that sends the packets of ports that match a pattern to a chain.
    fn leading_on(&self, pattern: &str, chain: &str) -> String {
        match self.by {
            By::Interface(option) => format!("{option} {pattern} -j {chain}"),
            // After a goto no other rule of this chain is tried.
            By::Physdev(option, more) => format!("-m physdev {option} {pattern}{more} -g {chain}"),
            By::Helper => format!("-j {chain}"),
        }
    }
}

/// Whether a rule may make a packet leave a built-in chain other than by a drop.
fn ends_well(table: TableId, saved: &SavedTable, rule: &str) -> bool {
    let rule = SavedRule::new(rule);
    let target = match rule.target() {
        // A return from a built-in chain applies its policy.
        Some(Target::Goto(_) | Target::Jump("ACCEPT" | "RETURN" | "NFQUEUE" | "QUEUE")) => return true,
        Some(Target::Jump("DROP" | "REJECT" | "CONTINUE")) | None => return false,
        Some(Target::Jump(target)) => target,
    };
    // A chain of others may accept: one of ebtables by its policy, which is ACCEPT if nobody says otherwise, and any by a
    // rule that is added later, which no watch tells.
    if saved.contains_key(target) {
        return true;
    }
    // ebtables' targets that change a frame then accept it, unless an option says otherwise.
    table == TableId::EbtablesNat
        && ["mark", "snat", "dnat", "redirect", "arpreply"].contains(&target)
        && !rule.words().any(|word| ["CONTINUE", "DROP"].contains(&word))
}

/// The connections to which a rule of a port's own chain assigns a helper.
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

    /// The chain that a packet of a port reaches, and the number of rules it is compared with.
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
