//! Sets of the store: what they hold in all, by includes and by the tags of ports, and who uses them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{Applied, SetContent, cycle};
use nwfilter_xml::{
    Binding, Field, Filter, FilterSet, Literal, MAX_SET_ENTRIES, SetEntry, SetName, SetRange, Tag, Value,
    VarName, read_set,
};

use crate::learn::known::Known;
use crate::learn::wanted::{Past, addresses};
use crate::stores::Stores;
use crate::{Driver, Error, Transaction};

/// The parameter of a binding that names the tags of its port.
pub const CTRL_TAGS: &str = VarName::CTRL_TAGS;

/// The tags of a port: the values of the parameter `CTRL_TAGS`, of which each may be several with `:` between them.
/// What is no tag is left out.
pub fn tags_of(binding: &Binding) -> BTreeSet<Tag> {
    let values = binding.params.get(CTRL_TAGS).unwrap_or_default();
    values.iter().flat_map(|value| value.split(':')).filter_map(|tag| tag.parse().ok()).collect()
}

/// What the ports with each tag add to sets.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members(BTreeMap<Tag, Vec<SetRange>>);

impl Members {
    /// Adds a bound port. Whether what was learned of its guest counts is `past`.
    pub(crate) fn add(&mut self, binding: &Binding, known: &Known, past: Past) {
        let tags = tags_of(binding);
        if tags.is_empty() {
            return;
        }
        let mut ranges = vec![SetRange::of_mac(binding.mac)];
        ranges.extend(addresses(known, binding, past).into_iter().map(SetRange::of_ip));
        for tag in tags {
            self.0.entry(tag).or_default().extend(&ranges);
        }
    }

    /// Those of all bindings of the stores.
    pub(crate) fn of(stores: &Stores) -> Self {
        let mut members = Self::default();
        for binding in stores.bindings.documents() {
            members.add(binding, &stores.known, Past::Counts);
        }
        members
    }
}

/// Sets by name.
pub(crate) trait Sets {
    fn set(&self, name: &SetName) -> Option<&Arc<FilterSet>>;
}

/// What a set holds in all, or why it cannot be.
///
/// Each included set is looked at once, however often it is included.
pub(crate) fn content(sets: &impl Sets, members: &Members, set: &FilterSet) -> Result<SetContent, Error> {
    let refused = |why: String| Error::Set { set: set.name.clone(), why };
    let (mut ranges, mut seen) = (Vec::new(), BTreeSet::from([&set.name]));
    let mut waiting = vec![set];
    while let Some(next) = waiting.pop() {
        if next.family != set.family {
            let (name, holds) = (&next.name, next.family.holds());
            return Err(refused(format!(
                "it includes '{name}', which holds {holds}, not {}",
                set.family.holds()
            )));
        }
        ranges.extend(next.entries.iter().map(|entry| entry.range));
        let of_tags = next.tags.iter().filter_map(|tag| members.0.get(tag)).flatten();
        ranges.extend(of_tags.filter(|range| range.family() == set.family));
        if ranges.len() > MAX_SET_ENTRIES {
            let why = format!("with its includes and tags it has more than {MAX_SET_ENTRIES} entries");
            return Err(refused(why));
        }
        for name in &next.includes {
            if seen.insert(name) {
                let included = sets
                    .set(name)
                    .ok_or_else(|| refused(format!("it includes '{name}', which does not exist")))?;
                waiting.push(included);
            }
        }
    }
    Ok(SetContent::of(set.family, ranges))
}

/// The cycle of includes that a set closes; its first name is also its last.
pub(crate) fn includes_itself(sets: &impl Sets, set: &FilterSet) -> Option<Vec<SetName>> {
    cycle(&set.name, set.includes.clone(), |name| sets.set(name).map(|set| set.includes.clone()))
}

/// How a filter names a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// By a rule's `ipset`.
    Surely,
    /// Perhaps by a variable.
    Perhaps,
}

/// Whether rules of a filter name a set, or may do so.
pub(crate) fn names(filter: &Filter, set: &SetName) -> Option<Names> {
    let values = filter.rules().filter_map(|rule| rule.matches.as_ref()?.get(Field::IpSet));
    let mut perhaps = None;
    for item in values {
        match &item.value {
            Value::Literal(Literal::IpSet(name)) if *name == set.as_str() => return Some(Names::Surely),
            Value::Variable(_) => perhaps = Some(Names::Perhaps),
            Value::Literal(_) => {}
        }
    }
    perhaps
}

/// A change of the entries of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EntryChange {
    /// Adds entries; those that are there already get the comment that is given with them.
    Add(Vec<SetEntry>),
    /// Takes entries out, which must be there.
    Remove(Vec<SetRange>),
    /// Puts entries in the place of all.
    Replace(Vec<SetEntry>),
}

impl EntryChange {
    /// The set with the change.
    pub(crate) fn of(&self, old: &FilterSet) -> Result<FilterSet, Error> {
        let refused = |why: String| Error::Set { set: old.name.clone(), why };
        let is_other = |range: &&SetRange| range.family() != old.family;
        let other = match self {
            Self::Add(entries) | Self::Replace(entries) => {
                entries.iter().map(|entry| &entry.range).find(is_other)
            }
            Self::Remove(ranges) => ranges.iter().find(is_other),
        };
        if let Some(other) = other {
            return Err(refused(format!("it holds {}, and '{other}' is none", old.family.holds())));
        }
        let mut set = old.clone();
        match self {
            Self::Replace(entries) => {
                let mut known = BTreeSet::new();
                set.entries = entries.iter().filter(|entry| known.insert(entry.range)).cloned().collect();
            }
            Self::Add(entries) => {
                let mut new: BTreeMap<SetRange, (usize, &SetEntry)> = BTreeMap::new();
                for (index, entry) in entries.iter().enumerate() {
                    new.entry(entry.range).or_insert((index, entry));
                }
                for held in &mut set.entries {
                    if let Some((_, entry)) = new.remove(&held.range)
                        && entry.comment.is_some()
                    {
                        held.comment.clone_from(&entry.comment);
                    }
                }
                // In the order in which they are given.
                let mut new: Vec<_> = new.into_values().collect();
                new.sort_unstable_by_key(|(index, _)| *index);
                set.entries.extend(new.into_iter().map(|(_, entry)| entry.clone()));
            }
            Self::Remove(ranges) => {
                let mut gone: BTreeSet<SetRange> = ranges.iter().copied().collect();
                set.entries.retain(|entry| !gone.remove(&entry.range));
                if let Some(missing) = gone.first() {
                    let covering = old.entries.iter().find(|entry| entry.range.covers(*missing));
                    return Err(refused(match covering {
                        Some(entry) => {
                            format!("'{missing}' is no entry of its own, but a part of '{}'", entry.range)
                        }
                        None => format!("'{missing}' is no entry"),
                    }));
                }
            }
        }
        if set.entries.len() > MAX_SET_ENTRIES {
            return Err(refused(format!("it would have more than {MAX_SET_ENTRIES} entries")));
        }
        Ok(set)
    }
}

impl Sets for Stores {
    fn set(&self, name: &SetName) -> Option<&Arc<FilterSet>> {
        self.sets.get(name.as_str())
    }
}

impl Stores {
    /// What each set of the store holds in all, or why it cannot be.
    pub(crate) fn contents(&self) -> BTreeMap<SetName, Result<Arc<SetContent>, Error>> {
        let members = Members::of(self);
        let content = |set: &Arc<FilterSet>| content(self, &members, set).map(Arc::new);
        self.sets.documents().map(|set| (set.name.clone(), content(set))).collect()
    }
}

/// These sets, and all that include one of them.
pub(crate) fn with_includers(sets: &[&Arc<FilterSet>], names: BTreeSet<SetName>) -> BTreeSet<SetName> {
    let mut found = names;
    loop {
        let more: Vec<_> = sets
            .iter()
            .filter(|set| !found.contains(&set.name) && set.includes.iter().any(|name| found.contains(name)))
            .map(|set| set.name.clone())
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// Sets of addresses that rules of many filters share.
impl Driver {
    /// Reads a set and puts it into the store, in place of one of its name. What it holds is in the kernel when this
    /// returns, and no rule was touched for it. `document` names the text in errors.
    pub fn define_set(&self, document: &str, text: &str) -> Result<(Arc<FilterSet>, Applied), Error> {
        let mut transaction = Transaction::new();
        transaction.define_set(read_set(document, text).into_result()?);
        let mut done = self.commit(transaction)?;
        let set = done.sets.pop().ok_or(Error::Abandoned)?;
        Ok((set, done.applied))
    }

    /// The set of that name.
    pub fn set(&self, name: &SetName) -> Result<Arc<FilterSet>, Error> {
        self.look()?.sets.get(name.as_str()).cloned().ok_or_else(|| Error::NoSuchSet(name.clone()))
    }

    /// Every set, sorted by name.
    pub fn sets(&self) -> Result<Vec<Arc<FilterSet>>, Error> {
        Ok(self.look()?.sets.documents().cloned().collect())
    }

    /// What a set holds in all: its entries, those of the sets that it includes, and the known addresses of the ports
    /// with its tags.
    pub fn set_content(&self, name: &SetName) -> Result<SetContent, Error> {
        let stores = self.look()?;
        let set = stores.sets.get(name.as_str()).ok_or_else(|| Error::NoSuchSet(name.clone()))?;
        content(&*stores, &Members::of(&stores), set)
    }
}
