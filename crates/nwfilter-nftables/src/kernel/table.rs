//! Tables, chains and objects.

use std::fmt;

use super::expr::ObjectKind;
use super::name::{ChainName, ObjectName, TableName};
use super::rule::Comment;

/// The family of a table: which packets its chains see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Frames that pass a bridge.
    Bridge,
    /// IPv4 and IPv6 packets of the host.
    Inet,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bridge => "bridge",
            Self::Inet => "inet",
        })
    }
}

/// A table of the network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId {
    /// Its family.
    pub family: Family,
    /// Its name.
    pub name: TableName,
}

impl TableId {
    /// A table of the bridge family.
    pub fn bridge(name: TableName) -> Self {
        Self { family: Family::Bridge, name }
    }

    /// A table of the inet family.
    pub fn inet(name: TableName) -> Self {
        Self { family: Family::Inet, name }
    }
}

impl fmt::Display for TableId {
    /// As nft writes it: `bridge nwfilter`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// How a table is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableFlags {
    /// Its base chains are not hooked: no packet passes them.
    pub dormant: bool,
    /// Only the socket that made it can change it, and it goes when that socket is closed. Since Linux 5.12.
    pub owner: bool,
    /// An owned table outlives its owner, and the next socket that adds it with [`owner`](Self::owner) owns it. Since
    /// Linux 6.9; older kernels refuse it.
    pub persist: bool,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain {
    /// Its name.
    pub name: ChainName,
    /// Where packets enter it by themselves; `None` for a chain that rules lead to.
    pub base: Option<BaseChain>,
}

impl Chain {
    /// A chain that rules lead to.
    pub fn regular(name: ChainName) -> Self {
        Self { name, base: None }
    }
}

/// How a base chain is hooked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseChain {
    /// What it may do.
    pub kind: ChainType,
    /// The point of a packet's way.
    pub hook: Hook,
    /// Its place among the base chains of the hook: lower numbers come first. Bridge conntrack works after -200.
    pub priority: i32,
    /// What happens to a packet at the end of the chain.
    pub policy: Policy,
}

/// What a base chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ChainType {
    /// `type filter`
    Filter,
}

/// A point of a packet's way, `NF_INET_*` and `NF_BR_*`, which have the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Before it is decided where the packet goes.
    Prerouting,
    /// Packets to the host.
    Input,
    /// Packets from one port to another.
    Forward,
    /// Packets of the host.
    Output,
    /// Before the packet leaves.
    Postrouting,
}

/// What happens to a packet at the end of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// It goes on.
    Accept,
    /// It is dropped.
    Drop,
}

/// A stateful object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Object {
    /// `ct helper`
    CtHelper(CtHelper),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::CtHelper(_) => ObjectKind::CtHelper,
        }
    }

    /// Its name.
    pub fn name(&self) -> &ObjectName {
        match self {
            Self::CtHelper(helper) => &helper.name,
        }
    }
}

/// A conntrack helper that rules assign to connections.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CtHelper {
    /// The name of the object.
    pub name: ObjectName,
    /// The kernel's name of the helper, such as `ftp`; at most 15 bytes. The kernel loads its module.
    pub helper: String,
    /// The transport protocol, such as 6.
    pub protocol: u8,
    /// `NFPROTO_*` of the connections; `None` for those of both IPv4 and IPv6, as the table's family has it.
    pub l3proto: Option<u16>,
    /// Shown by `nft list`.
    pub comment: Option<Comment>,
}
