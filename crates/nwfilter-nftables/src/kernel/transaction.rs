//! What a transaction does, operation by operation.

use std::fmt;
use std::sync::Arc;

use super::name::{ChainName, SetName};
use super::rule::Rule;
use super::set::{Element, Set};
use super::table::{Chain, Object, TableFlags, TableId};

/// Operations that the kernel carries out all, in this order, or none. Each has a tag that its refusal carries.
#[derive(Clone, Debug)]
pub struct Transaction<T = ()> {
    operations: Vec<(Operation, T)>,
}

impl<T> Transaction<T> {
    /// One that does nothing.
    pub fn new() -> Self {
        Self { operations: Vec::new() }
    }

    /// Adds an operation.
    pub fn push(&mut self, operation: Operation, tag: T) {
        self.operations.push((operation, tag));
    }

    /// The operations and their tags.
    pub fn operations(&self) -> &[(Operation, T)] {
        &self.operations
    }

    /// The operations and their tags, to be kept.
    pub fn into_operations(self) -> Vec<(Operation, T)> {
        self.operations
    }

    /// Whether it does nothing.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }
}

impl<T> Default for Transaction<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Extend<(Operation, T)> for Transaction<T> {
    fn extend<I: IntoIterator<Item = (Operation, T)>>(&mut self, operations: I) {
        self.operations.extend(operations);
    }
}

/// One change of a table.
///
/// "Add" is nft's: what is there already is no error if it is the same. To delete what is not there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Adds a table, or sets the flags of one.
    AddTable {
        /// The table.
        table: TableId,
        /// Its flags.
        flags: TableFlags,
    },
    /// Deletes a table with all that is in it.
    DeleteTable {
        /// The table.
        table: TableId,
    },
    /// Adds a chain, or sets the policy of a base chain.
    AddChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: Chain,
    },
    /// Deletes the rules of a chain.
    FlushChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: ChainName,
    },
    /// Deletes a chain, with its rules. Refused (`EBUSY`) while something leads to it.
    DeleteChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: ChainName,
    },
    /// Adds a rule.
    AddRule {
        /// The table.
        table: TableId,
        /// The chain.
        chain: ChainName,
        /// Where in the chain.
        place: Place,
        /// The rule.
        rule: Rule,
    },
    /// Puts a rule in the place of another.
    ReplaceRule {
        /// The table.
        table: TableId,
        /// The chain.
        chain: ChainName,
        /// The handle of the rule that goes.
        handle: u64,
        /// The rule that comes. It gets a handle of its own.
        rule: Rule,
    },
    /// Deletes a rule.
    DeleteRule {
        /// The table.
        table: TableId,
        /// The chain.
        chain: ChainName,
        /// Its handle.
        handle: u64,
    },
    /// Adds a set or map without elements.
    AddSet {
        /// The table.
        table: TableId,
        /// The set.
        set: Arc<Set>,
    },
    /// Deletes all elements of a set.
    FlushSet {
        /// The table.
        table: TableId,
        /// The set.
        set: SetName,
    },
    /// Deletes a set. Refused (`EBUSY`) while a rule uses it.
    DeleteSet {
        /// The table.
        table: TableId,
        /// The set.
        set: SetName,
    },
    /// Adds elements to a set. Refused (`EEXIST`) where a map has another value for a key, or a range overlaps another.
    AddElements {
        /// The table.
        table: TableId,
        /// The set as it was added.
        set: Arc<Set>,
        /// The elements; as many as there are, they are sent in messages that fit.
        elements: Vec<Element>,
    },
    /// Deletes elements of a set. Refused (`ENOENT`) where one is not there.
    DeleteElements {
        /// The table.
        table: TableId,
        /// The set as it was added.
        set: Arc<Set>,
        /// The elements. Only their keys count.
        elements: Vec<Element>,
    },
    /// Adds an object.
    AddObject {
        /// The table.
        table: TableId,
        /// The object.
        object: Object,
    },
    /// Deletes an object. Refused (`EBUSY`) while a rule or map uses it.
    DeleteObject {
        /// The table.
        table: TableId,
        /// The object, of which kind and name count.
        object: Object,
    },
}

impl Operation {
    /// The table that it changes.
    pub fn table(&self) -> &TableId {
        match self {
            Self::AddTable { table, .. }
            | Self::DeleteTable { table }
            | Self::AddChain { table, .. }
            | Self::FlushChain { table, .. }
            | Self::DeleteChain { table, .. }
            | Self::AddRule { table, .. }
            | Self::ReplaceRule { table, .. }
            | Self::DeleteRule { table, .. }
            | Self::AddSet { table, .. }
            | Self::FlushSet { table, .. }
            | Self::DeleteSet { table, .. }
            | Self::AddElements { table, .. }
            | Self::DeleteElements { table, .. }
            | Self::AddObject { table, .. }
            | Self::DeleteObject { table, .. } => table,
        }
    }
}

impl fmt::Display for Operation {
    /// As nft would be told, without what is added: `add rule bridge nwfilter input`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table();
        match self {
            Self::AddTable { .. } => write!(f, "add table {table}"),
            Self::DeleteTable { .. } => write!(f, "delete table {table}"),
            Self::AddChain { chain, .. } => write!(f, "add chain {table} {}", chain.name),
            Self::FlushChain { chain, .. } => write!(f, "flush chain {table} {chain}"),
            Self::DeleteChain { chain, .. } => write!(f, "delete chain {table} {chain}"),
            Self::AddRule { chain, .. } => write!(f, "add rule {table} {chain}"),
            Self::ReplaceRule { chain, handle, .. } => {
                write!(f, "replace rule {table} {chain} handle {handle}")
            }
            Self::DeleteRule { chain, handle, .. } => {
                write!(f, "delete rule {table} {chain} handle {handle}")
            }
            Self::AddSet { set, .. } => write!(f, "add {} {table} {}", set_word(set), set.name),
            Self::FlushSet { set, .. } => write!(f, "flush set {table} {set}"),
            Self::DeleteSet { set, .. } => write!(f, "delete set {table} {set}"),
            Self::AddElements { set, .. } => write!(f, "add element {table} {}", set.name),
            Self::DeleteElements { set, .. } => write!(f, "delete element {table} {}", set.name),
            Self::AddObject { object, .. } => write!(f, "add {} {table} {}", object.kind(), object.name()),
            Self::DeleteObject { object, .. } => {
                write!(f, "delete {} {table} {}", object.kind(), object.name())
            }
        }
    }
}

fn set_word(set: &Set) -> &'static str {
    if set.data.is_some() { "map" } else { "set" }
}

/// Where a rule is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the end of the chain.
    End,
    /// At its beginning.
    Beginning,
    /// Behind the rule of this handle.
    After(u64),
    /// Before the rule of this handle.
    Before(u64),
}
