//! nf_tables in types: what a table holds, the transactions that change it, reading it back, and who changed it.
//!
//! A [`Transaction`] collects [`Operation`]s, each with a tag of the caller. It is sent as one batch that the kernel
//! takes whole or not at all, and a refusal ([`CommitError`]) carries the tag of its operation. A table is read back
//! into the same types ([`InstalledTable`]), so that desired and installed compare with `==`.

mod batch;
mod connection;
#[cfg(test)]
mod encoding;
mod error;
pub mod expr;
mod expr_wire;
pub mod field;
mod installed;
mod listener;
mod monitor;
mod name;
mod packet_log;
mod read;
mod rule;
mod set;
mod set_wire;
mod table;
mod text;
mod tracer;
mod transaction;
mod udata;
mod wire;

pub use batch::{BatchHead, check_batch};
pub use connection::{Answers, Connection, MAX_TRANSACTION};
pub use error::{CommitError, Error, Refusal};
pub use expr::Expr;
pub use installed::{Count, InstalledChain, InstalledElement, InstalledRule, InstalledSet, InstalledTable};
pub use monitor::{Change, Event, Monitor, Part};
pub use name::{ChainName, InvalidName, ObjectName, SetName, TableName};
pub use packet_log::{Logged, LoggedPacket, PacketLog};
pub use rule::{Comment, Rule};
pub use set::{Datatype, Element, ElementKey, ElementValue, MapData, Set, SetFlags};
pub use table::{BaseChain, Chain, ChainType, CtHelper, Family, Hook, Object, Policy, TableFlags, TableId};
pub use tracer::{Traced, TracedFrame, TracedRule, Tracer};
pub use transaction::{Operation, Place, Transaction};
