//! Filters, rules and includes as values.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use crate::names::{ChainName, FilterName, Priority, VarName};
use crate::place::Place;
use crate::schema::{Attribute, Field, Protocol};
use crate::value::{Literal, Value, VarRef};

/// A `<filter>` document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its name, unique in a store.
    pub name: FilterName,
    /// Its UUID, where it has one.
    pub uuid: Option<Uuid>,
    /// The chain its Ethernet rules go to.
    pub chain: ChainName,
    /// The priority of that chain.
    pub priority: Priority,
    /// Rules and includes in document order.
    pub entries: Vec<Entry>,
}

impl Filter {
    /// Its includes, in document order.
    pub fn includes(&self) -> impl Iterator<Item = &Include> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Include(include) => Some(include),
            Entry::Rule(_) => None,
        })
    }

    /// The same filter, as if it had not been read from a document: what it says is compared without where it says it.
    #[must_use]
    pub fn without_places(mut self) -> Self {
        for entry in &mut self.entries {
            match entry {
                Entry::Include(include) => include.place = Place::default(),
                Entry::Rule(rule) => {
                    rule.place = Place::default();
                    let items = rule.matches.iter_mut().flat_map(|matches| &mut matches.items);
                    items.for_each(|item| item.place = Place::default());
                }
            }
        }
        self
    }

    /// Its rules, in document order.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Rule(rule) => Some(rule),
            Entry::Include(_) => None,
        })
    }
}

/// One child of a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `<rule>`
    Rule(Rule),
    /// `<filterref>`
    Include(Include),
}

/// What happens to a packet that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The packet vanishes.
    Drop,
    /// The packet passes; nothing more is asked.
    Accept,
    /// The packet is dropped and, where the layer can, its sender told.
    Reject,
    /// Evaluation goes on in the chain that jumped here.
    Return,
    /// Evaluation goes on with the next rule.
    Continue,
}

impl Action {
    /// Every action and its name.
    pub const NAMES: [(Action, &'static str); 5] = [
        (Action::Drop, "drop"),
        (Action::Accept, "accept"),
        (Action::Reject, "reject"),
        (Action::Return, "return"),
        (Action::Continue, "continue"),
    ];
}

/// Which traffic of the port a rule is about, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the guest.
    In,
    /// From the guest.
    Out,
    /// Both.
    InOut,
}

impl Direction {
    /// Every direction and its name.
    pub const NAMES: [(Direction, &'static str); 3] =
        [(Direction::In, "in"), (Direction::Out, "out"), (Direction::InOut, "inout")];

    /// Whether traffic to the guest is meant.
    pub fn is_in(self) -> bool {
        self != Direction::Out
    }

    /// Whether traffic from the guest is meant.
    pub fn is_out(self) -> bool {
        self != Direction::In
    }
}

macro_rules! display_from_names {
    ($($type:ident),+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let name = Self::NAMES.iter().find(|(value, _)| value == self).map_or("", |(_, name)| name);
                f.write_str(name)
            }
        }
    )+};
}
display_from_names!(Action, Direction);

/// A `<rule>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What happens to what it matches.
    pub action: Action,
    /// Which traffic it is about.
    pub direction: Direction,
    /// When it is evaluated.
    pub priority: Priority,
    /// Whether IP rules match on the connection's state and direction by themselves.
    pub statematch: bool,
    /// What it matches; `None` matches every frame.
    pub matches: Option<Matches>,
    /// Where it stands.
    pub place: Place,
}

/// What a rule matches: the attributes of its protocol elements taken together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matches {
    /// The protocol.
    pub protocol: Protocol,
    /// At most one for each attribute of the protocol, in the order of the table.
    pub items: Vec<Item>,
}

impl Matches {
    /// The item for a field.
    pub fn get(&self, field: Field) -> Option<&Item> {
        self.items.iter().find(|item| item.attribute.field == field)
    }
}

/// One attribute with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its row of the table.
    pub attribute: &'static Attribute,
    /// True if a packet must not have this value.
    pub negated: bool,
    /// The value.
    pub value: Value<Literal>,
    /// Where it stands.
    pub place: Place,
}

impl Rule {
    /// The variables it refers to, in the order of its attributes, each once.
    pub fn variables(&self) -> Vec<&VarRef> {
        let mut variables = Vec::new();
        for item in self.matches.iter().flat_map(|matches| &matches.items) {
            if let Value::Variable(variable) = &item.value
                && !variables.contains(&variable)
            {
                variables.push(variable);
            }
        }
        variables
    }
}

/// A `<filterref>` in a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Include {
    /// The filter it stands for.
    pub filter: FilterName,
    /// What it passes down.
    pub params: Params,
    /// Where it stands.
    pub place: Place,
}

/// Values of variables. A value is never empty and has only `[a-zA-Z0-9_.:]`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Params(BTreeMap<VarName, Arc<Vec<String>>>);

impl Params {
    /// No values.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a text can be a value.
    pub fn is_valid_value(value: &str) -> bool {
        !value.is_empty() && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:".contains(&b))
    }

    /// Adds a value to a variable's list; false, and nothing changed, if it cannot be a value.
    pub fn push(&mut self, name: VarName, value: &str) -> bool {
        let valid = Self::is_valid_value(value);
        if valid {
            Arc::make_mut(self.0.entry(name).or_default()).push(value.to_owned());
        }
        valid
    }

    /// The values of a variable.
    pub fn get(&self, name: &str) -> Option<&[String]> {
        self.0.get(name).map(|values| values.as_slice())
    }

    /// Takes a variable away.
    pub fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// How many variables there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no variable.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names and values, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&VarName, &[String])> {
        self.0.iter().map(|(name, values)| (name, values.as_slice()))
    }

    /// These values, with those of `outer` in place of those both have. Lists of values are shared, not copied.
    pub fn overlaid_by(&self, outer: &Params) -> Params {
        let mut merged = self.0.clone();
        merged.extend(outer.0.clone());
        Params(merged)
    }
}
