//! Filters, rules and includes as values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Error;
use crate::names::{ChainName, FilterName, MacAddr, Priority, VarName};
use crate::place::Place;
use crate::schema::{Attribute, Field, Protocol};
use crate::set::Tag;
use crate::text::serde_as_text;
use crate::value::{Literal, Value, VarRef};

/// A `<filter>` document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

macro_rules! text_from_names {
    ($($type:ident $what:literal),+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let name = Self::NAMES.iter().find(|(value, _)| value == self).map_or("", |(_, name)| name);
                f.write_str(name)
            }
        }

        impl FromStr for $type {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                let row = Self::NAMES.iter().find(|(_, name)| *name == text);
                row.map(|(value, _)| *value).ok_or_else(|| Error::name($what, text, "it has no such name"))
            }
        }
    )+};
}
text_from_names!(Action "action", Direction "direction");
serde_as_text!(Action, Direction);

/// A `<rule>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    #[serde(default)]
    pub place: Place,
}

/// What a rule matches: the attributes of its protocol elements taken together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MatchesText", into = "MatchesText")]
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

impl Item {
    /// The value as it is written in XML, without escapes.
    pub fn text(&self) -> String {
        match &self.value {
            Value::Variable(variable) => variable.to_string(),
            Value::Literal(literal) => {
                let mut text = String::new();
                self.attribute.kind.write(literal, &mut text);
                text
            }
        }
    }
}

/// As in XML: `dstportstart='80'`.
impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}='{}'", self.attribute.name, self.text())
    }
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Include {
    /// The filter it stands for.
    pub filter: FilterName,
    /// What it passes down.
    #[serde(default)]
    pub params: Params,
    /// Where it stands.
    #[serde(default)]
    pub place: Place,
}

/// Values of variables. A value is never empty and has only `[a-zA-Z0-9_.:]`.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<VarName, Vec<String>>", into = "BTreeMap<VarName, Vec<String>>")]
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

    /// Adds a value to a variable's list. Nothing changes if it cannot be a value.
    pub fn insert(&mut self, name: VarName, value: &str) -> Result<(), Error> {
        if !Self::is_valid_value(value) {
            return Err(Error::name("value", value, "it needs one or more letters, digits and _ . :"));
        }
        Arc::make_mut(self.0.entry(name).or_default()).push(value.to_owned());
        Ok(())
    }

    /// Gives a variable this value, unless it has one.
    pub(crate) fn set_default(&mut self, name: VarName, value: &MacAddr) {
        self.0.entry(name).or_insert_with(|| Arc::new(vec![value.to_string()]));
    }

    /// Adds tags to those of the parameter `CTRL_TAGS`.
    pub(crate) fn add_tags<'a>(&mut self, tags: impl Iterator<Item = &'a Tag>) {
        let mut tags = tags.peekable();
        if tags.peek().is_some() {
            let values = Arc::make_mut(self.0.entry(VarName::ctrl_tags()).or_default());
            let has: BTreeSet<_> = values.iter().cloned().collect();
            values.extend(tags.map(Tag::to_string).filter(|tag| !has.contains(tag)));
        }
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

impl From<Params> for BTreeMap<VarName, Vec<String>> {
    fn from(params: Params) -> Self {
        params.0.into_iter().map(|(name, values)| (name, Arc::unwrap_or_clone(values))).collect()
    }
}

impl TryFrom<BTreeMap<VarName, Vec<String>>> for Params {
    type Error = Error;
    fn try_from(lists: BTreeMap<VarName, Vec<String>>) -> Result<Self, Error> {
        let mut params = Self::new();
        for (name, values) in lists {
            values.iter().try_for_each(|value| params.insert(name.clone(), value))?;
        }
        Ok(params)
    }
}

/// [`Matches`] as text: a value says what it is only together with the protocol and the attribute.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MatchesText {
    protocol: Protocol,
    #[serde(default)]
    items: Vec<ItemText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ItemText {
    attribute: String,
    value: String,
    #[serde(default)]
    negated: bool,
    #[serde(default)]
    place: Place,
}

impl From<Matches> for MatchesText {
    fn from(Matches { protocol, items }: Matches) -> Self {
        let text = |item: Item| ItemText {
            attribute: item.attribute.name.to_owned(),
            value: item.text(),
            negated: item.negated,
            place: item.place,
        };
        Self { protocol, items: items.into_iter().map(text).collect() }
    }
}

impl TryFrom<MatchesText> for Matches {
    type Error = Error;
    fn try_from(MatchesText { protocol, items: texts }: MatchesText) -> Result<Self, Error> {
        let mut items: Vec<Item> = Vec::new();
        for ItemText { attribute: name, value, negated, place } in texts {
            let attribute = protocol.spec().attributes.iter().find(|attribute| attribute.name == name);
            let attribute = attribute
                .ok_or_else(|| Error::name("condition", &name, "the protocol has no such attribute"))?;
            if items.iter().any(|item| item.attribute.field == attribute.field) {
                return Err(Error::name("second condition", &name, "a rule has each attribute once"));
            }
            let value = match value.strip_prefix('$') {
                Some(variable) => VarRef::parse(variable).map(Value::Variable).ok(),
                None => attribute.kind.parse(&value).map(Value::Literal),
            }
            .ok_or_else(|| Error::name(attribute.name, &value, attribute.kind.expected()))?;
            items.push(Item { attribute, negated, value, place });
        }
        let row =
            |item: &Item| protocol.spec().attributes.iter().position(|row| row.field == item.attribute.field);
        items.sort_by_key(row);
        Ok(Self { protocol, items })
    }
}
