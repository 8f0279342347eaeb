//! Records which chains others changed in which transaction, so that only those are read again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::nftables::Generation;
use crate::tool::TableId;

/// How many transactions are kept. After more between two readings, the tables are read as a whole.
const MOST: usize = 4096;

/// How many changed chains of a table are recorded. Reading more one by one takes as long as reading the table.
const FEW: usize = 16;

/// What changed in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Rules in these chains.
    Chains(BTreeSet<String>),
    /// Possibly everything.
    Whole,
}

/// What changed in each table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes(pub(crate) BTreeMap<TableId, Part>);

impl Changes {
    pub(crate) fn whole(&mut self, table: TableId) {
        self.0.insert(table, Part::Whole);
    }

    pub(crate) fn chain(&mut self, table: TableId, chain: &str) {
        let part = self.0.entry(table).or_insert_with(|| Part::Chains(BTreeSet::new()));
        let Part::Chains(chains) = part else { return };
        if !chains.contains(chain) {
            chains.insert(chain.to_owned());
            if chains.len() > FEW {
                *part = Part::Whole;
            }
        }
    }

    fn add(&mut self, more: &Changes) {
        for (table, part) in &more.0 {
            match part {
                Part::Whole => self.whole(*table),
                Part::Chains(chains) => chains.iter().for_each(|chain| self.chain(*table, chain)),
            }
        }
    }
}

/// The latest transactions of a network namespace, without a gap, and what each changed in the tables of this backend.
#[derive(Debug, Default)]
pub(crate) struct History {
    transactions: VecDeque<(Generation, Changes)>,
}

impl History {
    /// Records a transaction by the generation it made.
    pub(crate) fn tell(&mut self, generation: Generation, changes: Changes) {
        if let Some((last, _)) = self.transactions.back() {
            match last.until(generation) {
                Some(1) => (),
                // Another watch may have recorded it already.
                _ if self.transactions.iter().any(|(known, _)| *known == generation) => return,
                _ => self.transactions.clear(),
            }
        }
        self.transactions.push_back((generation, changes));
        if self.transactions.len() > MOST {
            self.transactions.pop_front();
        }
    }

    /// Forgets everything: the watch lost notifications.
    pub(crate) fn miss(&mut self) {
        self.transactions.clear();
    }

    /// What changed between two generations. `None` if not all of it is recorded.
    pub(crate) fn changed(&self, from: Generation, to: Generation) -> Option<Changes> {
        let (first, _) = self.transactions.front()?;
        // If `from` is too old, the distance wraps around and is beyond the end.
        let (begin, count) = (first.until(from.next())? as usize, from.until(to)? as usize);
        let between = begin..begin.checked_add(count)?;
        if between.end > self.transactions.len() {
            return None;
        }
        let mut changes = Changes::default();
        self.transactions.range(between).for_each(|(_, more)| changes.add(more));
        Some(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(namespace: u64, number: u32) -> Generation {
        Generation { namespace, number }
    }

    fn whole(tables: &[TableId]) -> Changes {
        Changes(tables.iter().map(|table| (*table, Part::Whole)).collect())
    }

    #[test]
    fn few_chains_are_told_apart_and_many_are_the_whole_table() {
        let mut history = History::default();
        for number in 1..=FEW as u32 + 1 {
            let mut changes = Changes::default();
            changes.chain(TableId::IptablesFilter, &format!("chain{number}"));
            changes.chain(TableId::EbtablesNat, "PREROUTING");
            history.tell(at(1, number), changes);
        }
        let changed = |to| history.changed(at(1, 0), at(1, to)).unwrap().0;
        let chains = |table, to| match changed(to).remove(&table) {
            Some(Part::Chains(chains)) => Some(chains.len()),
            _ => None,
        };
        assert_eq!(chains(TableId::IptablesFilter, FEW as u32), Some(FEW));
        assert_eq!(chains(TableId::IptablesFilter, FEW as u32 + 1), None);
        assert_eq!(chains(TableId::EbtablesNat, FEW as u32 + 1), Some(1));
        let mut changes = whole(&[TableId::EbtablesNat]);
        changes.chain(TableId::EbtablesNat, "PREROUTING");
        assert_eq!(changes, whole(&[TableId::EbtablesNat]));
    }

    #[test]
    fn what_changed_is_known_where_every_transaction_is() {
        let tables = [TableId::IptablesRaw, TableId::IptablesFilter, TableId::EbtablesNat];
        let mut history = History::default();
        assert_eq!(history.changed(at(1, 4), at(1, 5)), None);
        // Generations wrap around.
        for (number, table) in [u32::MAX, 0, 1].into_iter().zip(tables) {
            history.tell(at(1, number), whole(&[table]));
        }
        history.tell(at(1, 2), Changes::default());
        let changed = |from, to| history.changed(at(1, from), at(1, to));
        assert_eq!(changed(u32::MAX - 1, 2), Some(whole(&tables)));
        assert_eq!(changed(u32::MAX, 1), Some(whole(&tables[1..])));
        assert_eq!(changed(0, 1), Some(whole(&tables[2..])));
        assert_eq!(changed(1, 2), Some(whole(&[])));
        assert_eq!(changed(u32::MAX - 2, 2), None, "the first is not known");
        assert_eq!(changed(1, 3), None, "the last is not known");
        assert_eq!(changed(2, 1), None, "not forward");
        assert_eq!(history.changed(at(2, 0), at(2, 1)), None, "another namespace");
        assert_eq!(history.changed(at(1, 0), at(2, 1)), None);
    }

    #[test]
    fn a_gap_forgets_what_was_before_and_a_repetition_does_not() {
        let mut history = History::default();
        for number in [1, 2, 1, 2, 3] {
            history.tell(at(1, number), Changes::default());
        }
        assert_eq!(history.changed(at(1, 0), at(1, 3)), Some(Changes::default()));
        history.tell(at(1, 5), Changes::default());
        assert_eq!(history.changed(at(1, 2), at(1, 5)), None);
        assert_eq!(history.changed(at(1, 4), at(1, 5)), Some(Changes::default()));
        history.miss();
        assert_eq!(history.changed(at(1, 4), at(1, 5)), None);
    }

    #[test]
    fn old_transactions_are_forgotten() {
        let mut history = History::default();
        (0..=MOST as u32).for_each(|number| history.tell(at(1, number), Changes::default()));
        assert_eq!(history.changed(at(1, u32::MAX), at(1, MOST as u32)), None);
        assert_eq!(history.changed(at(1, 0), at(1, MOST as u32)), Some(Changes::default()));
    }
}
