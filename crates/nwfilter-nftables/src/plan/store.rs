//! Plans the sets of the store.

use nwfilter_rules::{DesiredSet, KernelObject, SetContent, set_differences};
use nwfilter_xml::SetName;

use super::{Cause, MANY, Planner, Step};
use crate::kernel::Operation;
use crate::layout;
use crate::sets;

impl Planner<'_> {
    pub(super) fn sets_of_store(&mut self) {
        for (name, desired) in self.desired_sets {
            if let DesiredSet::Holds(content) | DesiredSet::Present(content) = desired {
                self.set_of_store(name, content);
            }
            let set = sets::kernel_name(name);
            let held = self.model.content(&set);
            if self.report {
                let object = KernelObject::Set { table: layout::TABLE.into(), set: set.to_string() };
                self.plan.differences.extend(set_differences(name, &object, held, &held_anyway(desired)));
            }
        }
    }

    /// A new set is there before the rules that ask it. What one holds changes together with the way of the frames.
    fn set_of_store(&mut self, name: &SetName, content: &SetContent) {
        let set = sets::kernel_set(name, content.family());
        let (table, cause) = (layout::table(), self.set_cause(name));
        let none = SetContent::empty(content.family());
        let held = self.model.content(&set.name).filter(|held| held.family() == content.family());
        let step = if held.is_some() { Step::Switch } else { Step::Prepare };
        if held.is_none() {
            if self.model.sets.contains_key(&set.name) {
                let (table, set) = (table.clone(), set.name.clone());
                self.push(step, Operation::DeleteSet { table, set }, cause.clone());
            }
            self.push(step, Operation::AddSet { table: table.clone(), set: set.clone() }, cause.clone());
        }
        let change = content.change_from(held.unwrap_or(&none));
        if held.is_none() || !change.is_empty() {
            self.plan.changed_sets.insert(name.clone());
        }
        if !change.delete.is_empty() {
            let elements = sets::elements(&change.delete);
            let (table, set) = (table.clone(), set.clone());
            self.push(step, Operation::DeleteElements { table, set, elements }, cause.clone());
        }
        // No rule asks a new set yet, so it can be filled in several transactions.
        let at_once = if held.is_none() { MANY } else { change.add.len().max(1) };
        for part in change.add.chunks(at_once) {
            let (table, set, elements) = (table.clone(), set.clone(), sets::elements(part));
            self.push(step, Operation::AddElements { table, set, elements }, cause.clone());
        }
    }

    /// Removes sets that no rule asks any more.
    pub(super) fn sets_that_go(&mut self) {
        for (name, desired) in self.desired_sets {
            let set = sets::kernel_name(name);
            if *desired == DesiredSet::Gone && self.model.sets.contains_key(&set) {
                let cause = self.set_cause(name);
                self.plan.changed_sets.insert(name.clone());
                self.push(Step::Clean, Operation::DeleteSet { table: layout::table(), set }, cause);
            }
        }
    }

    fn set_cause(&self, name: &SetName) -> Cause {
        let set = sets::kernel_name(name).to_string();
        let cause = self.cause(None, KernelObject::Set { table: layout::TABLE.into(), set });
        Cause { set: Some(name.clone()), ..cause }
    }
}

/// What the table holds is known, so a set that only has to be there is brought to its content, too.
fn held_anyway(desired: &DesiredSet) -> DesiredSet {
    match desired {
        DesiredSet::Present(content) => DesiredSet::Holds(content.clone()),
        other => other.clone(),
    }
}
