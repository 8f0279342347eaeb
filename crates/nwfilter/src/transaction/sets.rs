//! The operations of a transaction on sets, and what sets hold when it is carried out.

use std::collections::BTreeSet;
use std::sync::Arc;

use nwfilter_rules::{Desired, DesiredSet, SetContent, sets_of};
use nwfilter_xml::{Binding, FilterName, FilterSet, SetName, Tag};

use super::{Draft, Outcome};
use crate::learn::wanted::{Past, wanted};
use crate::sets::{
    EntryChange, Members, Names, Sets, content, includes_itself, names, tags_of, with_includers,
};
use crate::{Error, Event};

/// What the operations of a transaction say of sets.
#[derive(Default)]
pub(super) struct Touched {
    /// The sets that it defines, changes or removes.
    sets: BTreeSet<SetName>,
    /// Those of them that rules understand in another way than before.
    pub(super) renamed: BTreeSet<SetName>,
    /// The tags of ports that come, go or change.
    tags: BTreeSet<Tag>,
}

impl Touched {
    /// A port is bound, bound anew or unbound.
    pub(super) fn port(&mut self, old: Option<&Arc<Binding>>, new: Option<&Binding>) {
        self.tags.extend(old.into_iter().flat_map(|binding| tags_of(binding)));
        self.tags.extend(new.into_iter().flat_map(tags_of));
    }
}

impl Sets for Draft<'_> {
    fn set(&self, name: &SetName) -> Option<&Arc<FilterSet>> {
        match self.change.sets.get(name) {
            Some(changed) => changed.as_ref(),
            None => self.stores.sets.get(name.as_str()),
        }
    }
}

impl Draft<'_> {
    pub(super) fn define_set(
        &mut self,
        set: &FilterSet,
        touched: &mut Touched,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        let old = self.set(&set.name).cloned();
        if old.as_ref().is_some_and(|old| old.family != set.family) {
            self.unused(&set.name)?;
        }
        if old.is_none_or(|old| old.family != set.family) {
            touched.renamed.insert(set.name.clone());
        }
        if let Some(cycle) = includes_itself(self, set) {
            let names: Vec<_> = cycle.iter().map(SetName::as_str).collect();
            let why = format!("it would include itself: {}", names.join(" → "));
            return Err(Error::Set { set: set.name.clone(), why });
        }
        outcome.events.push(Event::SetDefined(set.name.clone()));
        self.put_set(Arc::new(set.clone()), touched, outcome);
        Ok(())
    }

    pub(super) fn change_set(
        &mut self,
        name: &SetName,
        change: &EntryChange,
        touched: &mut Touched,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        let old = self.set(name).ok_or_else(|| Error::NoSuchSet(name.clone()))?;
        let new = change.of(old)?;
        if new != **old {
            outcome.events.push(Event::SetChanged(name.clone()));
        }
        self.put_set(Arc::new(new), touched, outcome);
        Ok(())
    }

    pub(super) fn undefine_set(
        &mut self,
        name: &SetName,
        touched: &mut Touched,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        if self.set(name).is_none() {
            return Err(Error::NoSuchSet(name.clone()));
        }
        self.unused(name)?;
        self.put(|draft| &mut draft.filters.sets, name.clone(), None);
        self.put(|draft| &mut draft.change.sets, name.clone(), Some(None));
        touched.sets.insert(name.clone());
        touched.renamed.insert(name.clone());
        outcome.events.push(Event::SetUndefined(name.clone()));
        Ok(())
    }

    fn put_set(&mut self, set: Arc<FilterSet>, touched: &mut Touched, outcome: &mut Outcome) {
        self.put(|draft| &mut draft.filters.sets, set.name.clone(), Some(set.family));
        self.put(|draft| &mut draft.change.sets, set.name.clone(), Some(Some(set.clone())));
        touched.sets.insert(set.name.clone());
        outcome.sets.push(set);
    }

    /// Refuses a change for which nobody may use a set.
    fn unused(&self, name: &SetName) -> Result<(), Error> {
        let including = self.all_sets().into_iter().filter(|set| set.includes.contains(name));
        let mut users: Vec<_> = including.map(|set| format!("set '{}'", set.name)).collect();
        let (surely, perhaps) = self.filters_that_name(name);
        users.extend(surely.iter().map(|filter| format!("filter '{filter}'")));
        for binding in self.users(&perhaps) {
            let wanted = wanted(&self.filters, binding, self.stores, Past::Counts);
            if wanted.is_ok_and(|wanted| sets_of(&wanted.ruleset).any(|(set, _)| set == name)) {
                users.push(format!("port '{}'", binding.port));
            }
        }
        match users.is_empty() {
            true => Ok(()),
            false => Err(Error::SetInUse { name: name.clone(), users }),
        }
    }

    /// The filters of which rules name a set, and those of which they may do so by a variable.
    fn filters_that_name(&self, set: &SetName) -> (BTreeSet<FilterName>, BTreeSet<FilterName>) {
        let (mut surely, mut perhaps) = (BTreeSet::new(), BTreeSet::new());
        for filter in self.filters.values() {
            match names(filter, set) {
                Some(Names::Surely) => drop(surely.insert(filter.name.clone())),
                Some(Names::Perhaps) => drop(perhaps.insert(filter.name.clone())),
                None => {}
            }
        }
        (surely, perhaps)
    }

    /// The filters that may have rules on these sets.
    pub(super) fn filters_with(&self, sets: &BTreeSet<SetName>) -> BTreeSet<FilterName> {
        let named = sets.iter().map(|set| self.filters_that_name(set));
        named.flat_map(|(surely, perhaps)| surely.into_iter().chain(perhaps)).collect()
    }

    fn all_sets(&self) -> Vec<&Arc<FilterSet>> {
        let kept = self.stores.sets.documents().filter(|set| !self.change.sets.contains_key(&set.name));
        kept.chain(self.change.sets.values().flatten()).collect()
    }

    /// Says what the sets must hold that a transaction touches, and that rules of its ports ask.
    pub(super) fn settle_sets(&mut self, touched: Touched, outcome: &mut Outcome) -> Result<(), Error> {
        let all = self.all_sets();
        let Touched { sets, tags, .. } = touched;
        let tagged = all.iter().filter(|set| set.tags.iter().any(|tag| tags.contains(tag)));
        let begin = sets.iter().cloned().chain(tagged.map(|set| set.name.clone())).collect();
        let changed = with_includers(&all, begin);
        let mut asked = BTreeSet::new();
        for port in &outcome.ports {
            if let Some(Desired::Filtered(ruleset)) = self.change.batch.ports.get(port) {
                asked.extend(sets_of(ruleset).map(|(set, _)| set.clone()));
            }
        }
        asked.retain(|name| !changed.contains(name) && !self.change.batch.sets.contains_key(name));
        if changed.is_empty() && asked.is_empty() {
            return Ok(());
        }
        let members = self.members();
        let content = |name: &SetName| -> Result<Option<Arc<SetContent>>, Error> {
            let Some(set) = self.set(name) else { return Ok(None) };
            content(self, &members, set).map(|content| Some(Arc::new(content)))
        };
        let mut desired = Vec::new();
        for name in &changed {
            let is = content(name)?.map_or(DesiredSet::Gone, DesiredSet::Holds);
            desired.push((name.clone(), is));
        }
        for name in asked {
            desired.extend(content(&name)?.map(|content| (name, DesiredSet::Present(content))));
        }
        for (name, desired) in desired {
            self.put(|draft| &mut draft.change.batch.sets, name, Some(desired));
        }
        outcome.changed_sets = changed;
        Ok(())
    }

    fn members(&self) -> Members {
        let mut members = Members::default();
        for binding in self.bindings() {
            let is_forgotten = self.change.forgotten.contains(&binding.port);
            let past = if is_forgotten { Past::Forgotten } else { Past::Counts };
            members.add(binding, &self.stores.known, past);
        }
        members
    }
}
