//! What can go wrong between this process and nf_tables.

use std::fmt;
use std::io;

use nix::errno::Errno;

use super::expr::Expr;
use super::table::TableId;

/// Why something could not be asked of the kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no nf_tables, or this process may not use it.
    #[error("nf_tables cannot be used: {why}")]
    Unavailable {
        /// What is missing, and what to do.
        why: String,
        /// What the system said.
        source: io::Error,
    },
    /// Others changed the rules again and again while they were read.
    #[error("the rules of {table} changed while they were read, {times} times")]
    Interrupted {
        /// The table.
        table: TableId,
        /// How often it was tried.
        times: usize,
    },
    /// An answer of the kernel makes no sense.
    #[error("the kernel's answer cannot be read: {0}")]
    Malformed(String),
    /// The kernel refused to be read.
    #[error("the kernel refuses to show {what}")]
    Refused {
        /// What was to be read.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The socket failed.
    #[error("netlink")]
    Io(#[from] io::Error),
}

/// Why a transaction was not carried out. The tables are as they were before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError<T: fmt::Debug = ()> {
    /// The kernel refused operations.
    #[error("{first}")]
    Refused {
        /// The first one that it refused. Others may only have failed with it.
        first: Box<Refusal<T>>,
        /// The others.
        others: Vec<Refusal<T>>,
    },
    /// The kernel refused the transaction as a whole.
    #[error("the kernel refuses the transaction")]
    RefusedWhole(#[source] io::Error),
    /// The rules are of another generation than the transaction was made for: others changed them. Read them again.
    #[error("others changed the rules since they were read")]
    Interrupted,
    /// The transaction is too large. Split it.
    #[error("the transaction has {size} bytes, and may have {limit}")]
    TooLarge {
        /// Bytes of its messages.
        size: usize,
        /// How many there may be.
        limit: usize,
    },
    /// An operation cannot be sent: it is no operation of nf_tables.
    #[error("{what}: {why}")]
    Invalid {
        /// The operation's tag.
        tag: T,
        /// The operation.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel could not be asked. Where that is an error of the socket, it may have carried the transaction out.
    #[error(transparent)]
    Netlink(#[from] Error),
}

/// An operation that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal<T> {
    /// The operation's tag.
    pub tag: T,
    /// The operation, for people: `add rule bridge nwfilter input`.
    pub what: String,
    /// Why.
    pub errno: Errno,
    /// The expression of a rule that it is about, where the kernel says so.
    pub expression: Option<Expr>,
    /// What the kernel says to it, where it says something.
    pub message: Option<String>,
}

impl<T> Refusal<T> {
    /// Whether the kernel cannot do it at all, for example because it lacks a module, so that another try, or other
    /// names, do not help.
    pub fn is_unsupported(&self) -> bool {
        match self.errno {
            Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT | Errno::EPROTO => true,
            // An expression that the kernel does not know. Where it names something, that may be what is not there.
            Errno::ENOENT => self.expression.as_ref().is_some_and(|expr| {
                !matches!(
                    expr,
                    Expr::Lookup(_)
                        | Expr::Dynset(_)
                        | Expr::Object { .. }
                        | Expr::ObjectMap { .. }
                        | Expr::Verdict(_)
                )
            }),
            _ => false,
        }
    }
}

impl<T> fmt::Display for Refusal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.is_unsupported() { "cannot" } else { "refuses to" };
        write!(f, "the kernel {verb} {}", self.what)?;
        if let Some(expression) = &self.expression {
            write!(f, " with '{}'", expression.kind())?;
        }
        write!(f, ": {}", self.errno.desc())?;
        match &self.message {
            Some(message) => write!(f, " ({message})"),
            None => Ok(()),
        }
    }
}
