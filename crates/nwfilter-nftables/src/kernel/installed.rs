//! What a table holds, as it was read from the kernel.

use std::collections::BTreeMap;

use super::name::{ChainName, ObjectName, SetName};
use super::rule::Rule;
use super::set::{Element, Set};
use super::table::{Chain, Object, TableFlags};

/// A table and all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledTable {
    /// The generation of the rules of the network namespace when it was read.
    pub generation: u32,
    /// Its flags.
    pub flags: TableFlags,
    /// The netlink port of its owner, for an owned table that has one.
    pub owner: Option<u32>,
    /// Its chains.
    pub chains: BTreeMap<ChainName, InstalledChain>,
    /// Its sets and maps.
    pub sets: BTreeMap<SetName, InstalledSet>,
    /// Its objects, as far as this crate writes their kind.
    pub objects: BTreeMap<ObjectName, Object>,
}

/// A chain and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledChain {
    /// The chain.
    pub chain: Chain,
    /// Its rules, first to last.
    pub rules: Vec<InstalledRule>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledRule {
    /// What it is changed by. No two rules of a table ever have the same.
    pub handle: u64,
    /// What it does, equal to what was written.
    pub rule: Rule,
    /// What its counters have counted, first to last.
    pub counts: Vec<Count>,
}

/// A set or map and its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledSet {
    /// The set, equal to what was written.
    pub set: Set,
    /// Its elements in the order of their keys.
    pub elements: Vec<InstalledElement>,
}

/// An element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledElement {
    /// The element, equal to what was written.
    pub element: Element,
    /// Milliseconds until it goes, where it has a timeout.
    pub expires: Option<u64>,
    /// What its counters have counted, first to last.
    pub counts: Vec<Count>,
}

/// What a counter has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Their bytes, from the IP header on; in the bridge family without the Ethernet header.
    pub bytes: u64,
}
