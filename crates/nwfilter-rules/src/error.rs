//! Errors about a filter tree and its binding.

use nwfilter_xml::FilterName;

use crate::ruleset::Origin;

/// Why a filter tree and a binding do not make a ruleset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RulesError {
    /// The binding, or a filter it needs, names a filter that does not exist.
    #[error("no filter is named '{name}'{}", by.as_ref().map(|by| format!(", which {by} includes")).unwrap_or_default())]
    NoSuchFilter {
        /// The name.
        name: FilterName,
        /// The filter that names it; `None` if the binding does.
        by: Option<Origin>,
    },
    /// A filter includes itself, directly or through others.
    #[error("filter '{}' includes itself: {}", cycle[0], join(cycle, " → "))]
    IncludesItself {
        /// The filters of the cycle; the first is also the last.
        cycle: Vec<FilterName>,
    },
    /// Variables of the filter tree have no value.
    #[error("no value for {}: give it as a parameter of the filterref", join(names, ", "))]
    MissingVariables {
        /// As they are written in the filters without the `$`, sorted.
        names: Vec<String>,
    },
    /// A variable's value does not fit where the variable stands.
    #[error("{origin}: ${variable} is '{value}' here, but {attribute} needs {expected}")]
    BadValue {
        /// The rule.
        origin: Origin,
        /// The attribute the variable stands in.
        attribute: &'static str,
        /// The variable.
        variable: String,
        /// Its value.
        value: String,
        /// What the attribute needs.
        expected: &'static str,
    },
    /// Variables that advance together have lists of different length.
    #[error(
        "{origin}: ${first} has {first_len} values and ${second} has {second_len}, \
         but both are iterated together: give them equally many, or another iterator (as ${second}[@1])"
    )]
    UnequalLists {
        /// The rule.
        origin: Origin,
        /// One variable.
        first: String,
        /// How many values it has.
        first_len: usize,
        /// The other.
        second: String,
        /// How many values it has.
        second_len: usize,
    },
    /// A rule that no kernel table can express.
    #[error("{origin}: {why}")]
    Inexpressible {
        /// The rule.
        origin: Origin,
        /// Why not, and what to write instead.
        why: String,
    },
    /// The binding names conntrack helpers that do not exist.
    #[error(
        "CTRL_CT_HELPERS: '{value}' is no helper: use none, auto, or {known}, each with a port as in ftp:2121"
    )]
    UnknownHelper {
        /// What was given.
        value: String,
        /// The helpers there are.
        known: String,
    },
    /// Filters that are included more than once multiply the rules of a filter to more than a port can have.
    #[error("filter '{filter}' expands, with the filters that it includes, to more than {limit} rules")]
    TooLarge {
        /// The innermost filter that does.
        filter: FilterName,
        /// The limit.
        limit: usize,
    },
    /// A tree has more includes than are followed.
    #[error("filter '{filter}' expands to more than {limit} includes")]
    TooManyIncludes {
        /// The innermost filter that does.
        filter: FilterName,
        /// The limit.
        limit: usize,
    },
    /// The includes of a tree pass more parameters on than are followed.
    #[error("the includes of filter '{filter}' and those before it pass more than {limit} parameters on")]
    PassesTooMuch {
        /// The filter whose include went over the limit.
        filter: FilterName,
        /// The limit.
        limit: usize,
    },
    /// Lists of values multiply the rules of the tree to more than a port can have.
    #[error("{origin}: the filter expands to more than {limit} rules")]
    TooManyRules {
        /// The rule that went over the limit.
        origin: Origin,
        /// The limit.
        limit: usize,
    },
}

impl RulesError {
    /// The rule or the include that it is about.
    pub fn origin(&self) -> Option<&Origin> {
        match self {
            Self::NoSuchFilter { by, .. } => by.as_ref(),
            Self::BadValue { origin, .. }
            | Self::UnequalLists { origin, .. }
            | Self::Inexpressible { origin, .. }
            | Self::TooManyRules { origin, .. } => Some(origin),
            _ => None,
        }
    }
}

fn join<T: ToString>(items: &[T], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}
