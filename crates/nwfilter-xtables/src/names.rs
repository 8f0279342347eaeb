//! The names of chains. No other module makes or parses one.
//!
//! The names are libvirt's. In ebtables' nat table the root chains of a port are `libvirt-I-PORT` and `libvirt-O-PORT`,
//! and a sub-chain is `I-PORT-CHAIN`. libvirt's names of sub-chains are ambiguous (port `web`, chain `arp-mac`; port
//! `web-arp`, chain `mac`). If another port already has the name, the later port gets a numbered one. The jumps in the root
//! chain show which sub-chain a name stands for; [`SubChains`] keeps both one to one.

use std::collections::BTreeSet;

use nwfilter_rules::LogSide;
use nwfilter_xml::{ChainName, PortDev};

use crate::saved::SavedTable;
use crate::tool::TableId;

// ---- the filter tables and the raw tables ----

/// Packets that guests send and the bridge forwards.
pub(crate) const FROM_GUEST: &str = "libvirt-in";
/// Packets that the bridge forwards to guests.
pub(crate) const TO_GUEST: &str = "libvirt-out";
/// Packets from guests that the receiving port's rules did not drop.
pub(crate) const FROM_GUEST_POST: &str = "libvirt-in-post";
/// Packets that guests send to the host itself.
pub(crate) const TO_HOST: &str = "libvirt-host-in";
/// Connections that get a conntrack helper, in the raw tables. libvirt has no such chain.
pub(crate) const HELPERS: &str = "nwfilter-ct";

/// A chain of a port in a filter table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IpChain {
    FromGuest,
    ToGuest,
    ToHost,
}

impl IpChain {
    pub(crate) const ALL: [IpChain; 3] = [IpChain::FromGuest, IpChain::ToGuest, IpChain::ToHost];

    pub(crate) fn of(self, port: &PortDev) -> String {
        let prefix = match self {
            IpChain::FromGuest => "FI",
            IpChain::ToGuest => "FO",
            IpChain::ToHost => "HI",
        };
        format!("{prefix}-{port}")
    }

    /// The chain with the old rules between two steps of a change. libvirt uses these names in the same way. None is left
    /// after the change.
    pub(crate) fn old(self, port: &PortDev) -> String {
        let prefix = match self {
            IpChain::FromGuest => "FJ",
            IpChain::ToGuest => "FP",
            IpChain::ToHost => "HJ",
        };
        format!("{prefix}-{port}")
    }
}

/// The chain of a port's conntrack helpers.
pub(crate) fn helpers(port: &str) -> String {
    format!("CT-{port}")
}

/// The port of such a chain.
pub(crate) fn port_of_helpers(chain: &str) -> Option<&str> {
    chain.strip_prefix("CT-")
}

/// Our base chains, and the built-in chain that must start with a jump to each.
pub(crate) fn hooks(table: TableId) -> &'static [(&'static str, &'static [&'static str])] {
    match table {
        TableId::IptablesFilter | TableId::Ip6tablesFilter => {
            &[("FORWARD", &[FROM_GUEST, TO_GUEST, FROM_GUEST_POST]), ("INPUT", &[TO_HOST])]
        }
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &[("PREROUTING", &[HELPERS]), ("OUTPUT", &[HELPERS])],
        TableId::EbtablesNat => &[],
    }
}

// ---- ebtables' nat table ----

/// The letters of the root chains: frames from the guest and to it. libvirt uses `J` and `P` while it changes a port.
const LETTERS: [char; 4] = ['I', 'O', 'J', 'P'];

/// The direction of an Ethernet chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    FromGuest,
    ToGuest,
}

impl Way {
    fn letter(self) -> char {
        match self {
            Way::FromGuest => 'I',
            Way::ToGuest => 'O',
        }
    }

    /// What logged packets of its chains are said to be.
    pub(crate) fn log_side(self) -> LogSide {
        match self {
            Way::FromGuest => LogSide::FromGuest,
            Way::ToGuest => LogSide::ToGuest,
        }
    }

    /// The root chain of a port.
    pub(crate) fn root(self, port: &PortDev) -> String {
        root(self.letter(), port.as_str())
    }
}

fn root(letter: char, port: &str) -> String {
    format!("libvirt-{letter}-{port}")
}

/// The port of a root chain.
pub(crate) fn port_of_root(chain: &str) -> Option<&str> {
    let (letter, port) = chain.strip_prefix("libvirt-")?.split_once('-')?;
    LETTERS.iter().any(|known| letter.strip_prefix(*known) == Some("")).then_some(port)
}

/// Whether a name is one of a sub-chain.
fn is_sub_chain(name: &str) -> bool {
    LETTERS.iter().any(|letter| name.strip_prefix(*letter).is_some_and(|rest| rest.starts_with('-')))
}

/// The chain that a rule jumps to.
fn target(rule: &str) -> Option<&str> {
    rule.rsplit_once("-j ").map(|(_, target)| target.trim_end())
}

fn jumps_to(saved: &SavedTable, chain: &str, wanted: &str) -> bool {
    saved.get(chain).into_iter().flatten().any(|rule| target(rule) == Some(wanted))
}

/// Assigns names to sub-chains, one to one among all ports of a table and of this batch.
pub(crate) struct SubChains<'a> {
    saved: &'a SavedTable,
    given: BTreeSet<String>,
}

impl<'a> SubChains<'a> {
    /// Starts with the names that a table holds.
    pub(crate) fn beside(saved: &'a SavedTable) -> Self {
        Self { saved, given: BTreeSet::new() }
    }

    /// The name of a port's sub-chain: its current one, else libvirt's, else the first free number.
    pub(crate) fn name(&mut self, way: Way, port: &PortDev, chain: &ChainName) -> String {
        let letter = way.letter();
        let libvirts = format!("{letter}-{port}-{chain}");
        let root = self.saved.get(&way.root(port));
        let held = root.into_iter().flatten().filter_map(|rule| target(rule));
        let held = held.filter(|name| *name == libvirts || is_numbered(name, letter, chain));
        // There are more numbers than chains. The kernel takes 31 bytes: libvirt's limits for chains leave enough.
        let numbered = (0..=u32::MAX).map(|number| format!("{letter}-~{number}-{chain}"));
        let mut candidates = held.map(str::to_owned).chain([libvirts.clone()]).chain(numbered);
        let is_free =
            |name: &String| !self.given.contains(name) && !is_taken(self.saved, name, port.as_str());
        let name = candidates.find(is_free).unwrap_or(libvirts);
        self.given.insert(name.clone());
        name
    }
}

/// Whether a name is a numbered one: `I-~NUMBER-CHAIN`.
fn is_numbered(name: &str, letter: char, chain: &ChainName) -> bool {
    let numbered = name.strip_prefix(letter).and_then(|rest| rest.strip_prefix("-~")?.split_once('-'));
    numbered.is_some_and(|(number, of)| number.parse::<u32>().is_ok() && of == chain.as_str())
}

/// Whether a port other than this one has a sub-chain of that name.
fn is_taken(saved: &SavedTable, name: &str, port: &str) -> bool {
    if !saved.contains_key(name) {
        return false;
    }
    owners(saved, name).any(|owner| owner != port)
}

/// The ports whose root chains jump to a sub-chain.
fn owners<'a>(saved: &'a SavedTable, name: &'a str) -> impl Iterator<Item = &'a str> {
    let letter = name.chars().next().unwrap_or_default();
    // A number does not say whose it is.
    let any = name[1..].starts_with("-~").then(|| saved.keys().filter_map(|chain| port_of_root(chain)));
    let rest = name.get(2..).unwrap_or_default();
    let split = rest.match_indices('-').map(|(index, _)| &rest[..index]);
    let ports = split.chain(any.into_iter().flatten());
    ports.filter(move |port| jumps_to(saved, &root(letter, port), name))
}

// ---- all tables ----

/// Whether a chain holds rules of ports or leads to them. Knows all chains but those of the dispatch trees.
pub(crate) fn concerns(table: TableId, chain: &str) -> bool {
    let prefixes: &[&str] = match table {
        TableId::IptablesFilter | TableId::Ip6tablesFilter => &["FI-", "FO-", "HI-", "FJ-", "FP-", "HJ-"],
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &["CT-"],
        TableId::EbtablesNat => &["libvirt-", "I-", "O-", "J-", "P-"],
    };
    hooks(table).iter().any(|(hook, _)| *hook == chain)
        || prefixes.iter().any(|prefix| chain.starts_with(prefix))
}

/// The chains of a table that belong to a port, with those that libvirt uses during a change. A sub-chain that another
/// port jumps to is not among them, unless that port `goes_too`.
pub(crate) fn owned_chains(
    table: TableId,
    saved: &SavedTable,
    port: &PortDev,
    goes_too: impl Fn(&str) -> bool,
) -> BTreeSet<String> {
    let names: Vec<String> = match table {
        TableId::IptablesFilter | TableId::Ip6tablesFilter => {
            IpChain::ALL.iter().flat_map(|chain| [chain.of(port), chain.old(port)]).collect()
        }
        TableId::IptablesRaw | TableId::Ip6tablesRaw => vec![helpers(port.as_str())],
        TableId::EbtablesNat => LETTERS.iter().map(|letter| root(*letter, port.as_str())).collect(),
    };
    let mut owned: BTreeSet<_> = names.into_iter().filter(|name| saved.contains_key(name)).collect();
    if table != TableId::EbtablesNat {
        return owned;
    }
    // Names of sub-chains are ambiguous, the jumps to them are not.
    let mut waiting: Vec<_> = owned.iter().cloned().collect();
    while let Some(chain) = waiting.pop() {
        for rule in saved.get(&chain).into_iter().flatten() {
            let Some(target) = target(rule).filter(|target| is_sub_chain(target)) else { continue };
            let stays = owners(saved, target).any(|owner| owner != port.as_str() && !goes_too(owner));
            if saved.contains_key(target) && !stays && owned.insert(target.to_owned()) {
                waiting.push(target.to_owned());
            }
        }
    }
    owned
}

/// The ports that have chains in a table.
pub(crate) fn ports(table: TableId, saved: &SavedTable) -> BTreeSet<PortDev> {
    let prefixes: &[&str] = match table {
        TableId::EbtablesNat => &["libvirt-I-", "libvirt-O-"],
        TableId::IptablesFilter | TableId::Ip6tablesFilter => &["FI-", "FO-", "HI-"],
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &["CT-"],
    };
    let names =
        saved.keys().filter_map(|chain| prefixes.iter().find_map(|prefix| chain.strip_prefix(prefix)));
    names.filter_map(|name| name.parse().ok()).collect()
}

/// For each dispatcher of a table, the prefix of the port's chain that its rules lead to. The raw tables drop nothing and have
/// none.
pub(crate) fn dispatched(table: TableId) -> &'static [&'static str] {
    match table {
        TableId::EbtablesNat => &["libvirt-I-", "libvirt-O-"],
        TableId::IptablesFilter | TableId::Ip6tablesFilter => &["FI-", "FO-", "FI-", "HI-"],
        TableId::IptablesRaw | TableId::Ip6tablesRaw => &[],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::btree_set;
    use proptest::prelude::*;

    use super::*;
    use crate::saved::Saved;

    /// Gives names to the sub-chains of ports in one batch after the other, as a table would hold them.
    fn named(
        batches: &[BTreeSet<(PortDev, ChainName)>],
    ) -> (SavedTable, BTreeMap<(PortDev, ChainName), String>) {
        let (mut saved, mut names) = (SavedTable::new(), BTreeMap::new());
        for batch in batches {
            let mut sub_chains = SubChains::beside(&saved);
            let mut of_batch = BTreeMap::new();
            for (port, chain) in batch {
                let name = sub_chains.name(Way::FromGuest, port, chain);
                of_batch.insert((port.clone(), chain.clone()), name);
            }
            let ports: BTreeSet<_> = batch.iter().map(|(port, _)| port.clone()).collect();
            for port in &ports {
                for name in owned_chains(TableId::EbtablesNat, &saved, port, |_| false) {
                    saved.remove(&name);
                }
                saved.insert(Way::FromGuest.root(port), Vec::new());
                names.retain(|(owner, _), _| owner != port);
            }
            for ((port, _), name) in &of_batch {
                saved.insert(name.clone(), Vec::new());
                let rules = saved.entry(Way::FromGuest.root(port)).or_default();
                rules.push(format!("-p 0x0806 -j {name}"));
            }
            names.extend(of_batch);
        }
        (saved, names)
    }

    fn sub_chains() -> impl Strategy<Value = BTreeSet<(PortDev, ChainName)>> {
        let port =
            prop::sample::select(&["a", "a-arp", "a-arp-b", "a-arp-arp", "a-", "arp", "I-a", "a=b"][..]);
        let chain =
            prop::sample::select(&["arp", "arp-b", "arp-arp", "arp-arp-b", "mac", "ipv4-arp", "arp-"][..]);
        btree_set((port, chain), 0..12).prop_map(|pairs| {
            pairs.into_iter().map(|(p, c)| (p.parse().unwrap(), c.parse().unwrap())).collect()
        })
    }

    proptest! {
        #[test]
        fn every_sub_chain_of_every_bound_port_has_a_name_of_its_own(
            batches in prop::collection::vec(sub_chains(), 1..5)
        ) {
            let (saved, names) = named(&batches);
            let distinct: BTreeSet<_> = names.values().collect();
            prop_assert_eq!(distinct.len(), names.len(), "{:?}", names);
            prop_assert!(names.values().all(|name| name.len() <= 31 && is_sub_chain(name)));
            // Bound again, a port keeps its names.
            let mut again = SubChains::beside(&saved);
            for ((port, chain), name) in &names {
                prop_assert_eq!(&again.name(Way::FromGuest, port, chain), name);
            }
            // Each is owned by its port, and by no other.
            for ((port, _), name) in &names {
                prop_assert!(owned_chains(TableId::EbtablesNat, &saved, port, |_| false).contains(name));
                let others = names.keys().filter(|(other, _)| other != port);
                for (other, _) in others {
                    prop_assert!(!owned_chains(TableId::EbtablesNat, &saved, other, |_| false).contains(name));
                }
            }
        }
    }

    #[test]
    fn a_port_without_a_rival_has_libvirts_names() {
        let (port, chain) = ("web-arp".parse().unwrap(), "mac".parse().unwrap());
        let saved = SavedTable::new();
        assert_eq!(SubChains::beside(&saved).name(Way::ToGuest, &port, &chain), "O-web-arp-mac");
    }

    #[test]
    fn a_sub_chain_that_two_ports_share_is_given_up_by_both() {
        let saved = Saved::parse(
            "*nat\n:libvirt-I-web ACCEPT\n:libvirt-I-web-arp ACCEPT\n:I-web-arp-mac ACCEPT\n\
             -A libvirt-I-web -p ARP -j I-web-arp-mac\n-A libvirt-I-web-arp -j I-web-arp-mac\n",
        );
        let saved = saved.table("nat");
        let (web, web_arp): (PortDev, PortDev) = ("web".parse().unwrap(), "web-arp".parse().unwrap());
        let mut names = SubChains::beside(saved);
        let first = names.name(Way::FromGuest, &web, &"arp-mac".parse().unwrap());
        let second = names.name(Way::FromGuest, &web_arp, &"mac".parse().unwrap());
        assert!(first != second && ![&first, &second].contains(&&"I-web-arp-mac".to_owned()));
        let owned = |port, both: bool| owned_chains(TableId::EbtablesNat, saved, port, |_| both);
        assert!(!owned(&web, false).contains("I-web-arp-mac"), "web-arp still jumps there");
        assert!(owned(&web, true).contains("I-web-arp-mac"));
    }

    #[test]
    fn a_sub_chain_is_found_by_the_jump_to_it_not_by_its_name() {
        let saved = Saved::parse(
            "*nat\n:libvirt-I-a ACCEPT\n:libvirt-I-a-b ACCEPT\n:I-a-b-arp ACCEPT\n:I-a-b-c ACCEPT\n\
             -A libvirt-I-a -j I-a-b-c\n-A libvirt-I-a-b -j I-a-b-arp\n",
        );
        let owned = owned_chains(TableId::EbtablesNat, saved.table("nat"), &"a".parse().unwrap(), |_| false);
        assert_eq!(owned, BTreeSet::from(["I-a-b-c".to_owned(), "libvirt-I-a".to_owned()]));
    }
}
