//! What goes wrong, as errors of the backend.

use std::path::Path;

use nix::errno::Errno;
use nwfilter_rules::{ApplyError, Refused, Scope};

use crate::kernel::expr::Load;
use crate::kernel::{CommitError, Error, Expr, Refusal};
use crate::layout;
use crate::owner;
use crate::plan::{self, Cause};
use crate::relay::AskError;

/// Why a change was not carried out.
pub(super) enum CommitFailure {
    /// The kernel has no such helper.
    NoHelper(String),
    Apply(ApplyError),
}

impl From<ApplyError> for CommitFailure {
    fn from(error: ApplyError) -> Self {
        Self::Apply(error)
    }
}

impl CommitFailure {
    pub(super) fn into_error(self) -> ApplyError {
        match self {
            Self::NoHelper(helper) => unavailable(Error::Malformed(format!("helper {helper}"))),
            Self::Apply(error) => error,
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

pub(super) fn unavailable(error: Error) -> ApplyError {
    let why = with_causes(&error);
    ApplyError::Unavailable { scope: Scope::Everything, what: "nftables".into(), why }
}

/// Whether the kernel refuses because somebody else owns the table.
pub(super) fn is_owned(error: &CommitError<Cause>) -> bool {
    matches!(error, CommitError::Refused { first, .. } if first.errno == Errno::EPERM)
}

/// The table's owner does not do what it is asked for.
pub(super) fn owned(directory: Option<&Path>, error: &AskError) -> ApplyError {
    let place = match directory {
        Some(directory) => format!(" at {}", owner::socket(directory).display()),
        None => String::new(),
    };
    let why = with_causes(error);
    let why = format!(
        "another process owns it, and is asked for changes{place}, but {why}; use the state directory of that process, or \
         end it"
    );
    ApplyError::Unavailable { scope: Scope::Everything, what: format!("table {}", layout::TABLE), why }
}

pub(super) fn failure(error: CommitError<Cause>) -> CommitFailure {
    let lacking = |scope, what: &str, why: String| {
        CommitFailure::Apply(ApplyError::Unavailable { scope, what: what.into(), why })
    };
    match error {
        CommitError::Refused { first, others } => {
            let helper = std::iter::once(&*first).chain(&others).find_map(lacking_helper);
            match helper {
                Some(helper) => CommitFailure::NoHelper(helper),
                None => refused(*first),
            }
        }
        CommitError::Invalid { tag, why, .. } => CommitFailure::Apply(refusal(tag, why)),
        CommitError::Netlink(error) => CommitFailure::Apply(unavailable(error)),
        other => {
            let why = match std::error::Error::source(&other) {
                Some(source) => format!("{other}: {source}"),
                None => other.to_string(),
            };
            lacking(Scope::Everything, "nftables", why)
        }
    }
}

/// The helper of an object that the kernel lacks a module for.
fn lacking_helper(refusal: &Refusal<Cause>) -> Option<String> {
    (refusal.errno == Errno::ENOENT)
        .then(|| refusal.tag.rule.strip_prefix("ct helper ").map(String::from))
        .flatten()
}

fn refused(refusal_: Refusal<Cause>) -> CommitFailure {
    let unsupported = refusal_.is_unsupported();
    let lacks = |scope, what: &str, why: &str| {
        CommitFailure::Apply(ApplyError::Unavailable { scope, what: what.into(), why: why.into() })
    };
    let no_tracking = || {
        lacks(
            Scope::IpRules,
            "tracking of bridged connections",
            "this kernel has no nf_conntrack_bridge (Linux 5.3 and newer): use the backend xtables, or filters without \
             rules on states",
        )
    };
    // For the rule that sets zones the kernel does not name the right expression.
    let for_zones = refusal_.tag.object == plan::chain_object(&layout::zones().0.name);
    match &refusal_.expression {
        Some(Expr::Load { load: Load::Ct { .. }, .. } | Expr::Dynset(_)) if unsupported => no_tracking(),
        _ if unsupported && for_zones => no_tracking(),
        Some(Expr::Reject(_)) if unsupported => lacks(
            Scope::IpRules,
            "rejecting bridged packets",
            "this kernel has no nft_reject_bridge: use the backend xtables, or drop instead of reject",
        ),
        _ if refusal_.errno == Errno::EPERM => lacks(
            Scope::Everything,
            "table bridge nwfilter",
            "this process may not change it (CAP_NET_ADMIN), or another one owns it",
        ),
        _ => {
            let why = match &refusal_.message {
                Some(message) => format!("{} ({message})", refusal_.errno.desc()),
                None => format!("{}: {}", refusal_.what, refusal_.errno.desc()),
            };
            CommitFailure::Apply(refusal(refusal_.tag, why))
        }
    }
}

fn refusal(cause: Cause, why: String) -> ApplyError {
    let Cause { port, origin, object, rule, set } = cause;
    if let Some(set) = set {
        return ApplyError::Set { set, why };
    }
    match port {
        Some(port) => ApplyError::Refused(Box::new(Refused { port, origin, object, rule, why })),
        None => ApplyError::Unavailable { scope: Scope::Everything, what: object.to_string(), why },
    }
}
