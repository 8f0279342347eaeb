//! Which tables were changed when, as far as somebody follows it: what nobody touched need not be read again.

use std::collections::{BTreeSet, VecDeque};

use crate::nftables::Generation;
use crate::tool::TableId;

/// How many transactions are known. More between two looks at the tables have them read.
const MOST: usize = 4096;

/// The last transactions of a network namespace, without a gap, and which tables with rules of ours each changed.
#[derive(Debug, Default)]
pub(crate) struct History {
    transactions: VecDeque<(Generation, BTreeSet<TableId>)>,
}

impl History {
    /// Takes note of a transaction, by the generation that it made.
    pub(crate) fn tell(&mut self, generation: Generation, tables: BTreeSet<TableId>) {
        if let Some((last, _)) = self.transactions.back() {
            match last.until(generation) {
                Some(1) => (),
                // Several may follow the same transactions.
                _ if self.transactions.iter().any(|(known, _)| *known == generation) => return,
                _ => self.transactions.clear(),
            }
        }
        self.transactions.push_back((generation, tables));
        if self.transactions.len() > MOST {
            self.transactions.pop_front();
        }
    }

    /// Whoever follows has missed something.
    pub(crate) fn miss(&mut self) {
        self.transactions.clear();
    }

    /// The tables that changed between two generations; `None` if that is not known.
    pub(crate) fn changed(&self, from: Generation, to: Generation) -> Option<BTreeSet<TableId>> {
        let (first, _) = self.transactions.front()?;
        // Where `from` is too long ago, the distance is that the other way around: beyond the end.
        let (begin, count) = (first.until(from.next())? as usize, from.until(to)? as usize);
        let between = begin..begin.checked_add(count)?;
        let known = between.end <= self.transactions.len();
        known.then(|| {
            self.transactions.range(between).flat_map(|(_, tables)| tables.iter().copied()).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(namespace: u64, number: u32) -> Generation {
        Generation { namespace, number }
    }

    #[test]
    fn what_changed_is_known_where_every_transaction_is() {
        let tables = [TableId::IptablesRaw, TableId::IptablesFilter, TableId::EbtablesNat];
        let mut history = History::default();
        assert_eq!(history.changed(at(1, 4), at(1, 5)), None);
        // Numbers begin again after the last.
        for (number, table) in [u32::MAX, 0, 1].into_iter().zip(tables) {
            history.tell(at(1, number), BTreeSet::from([table]));
        }
        history.tell(at(1, 2), BTreeSet::new());
        let changed = |from, to| history.changed(at(1, from), at(1, to)).map(Vec::from_iter);
        assert_eq!(changed(u32::MAX - 1, 2), Some(tables.to_vec()));
        assert_eq!(changed(u32::MAX, 1), Some(tables[1..].to_vec()));
        assert_eq!(changed(0, 1), Some(tables[2..].to_vec()));
        assert_eq!(changed(1, 2), Some(vec![]));
        assert_eq!(changed(u32::MAX - 2, 2), None, "the first is not known");
        assert_eq!(changed(1, 3), None, "the last is not known");
        assert_eq!(changed(2, 1), None, "not forward");
        assert_eq!(history.changed(at(2, 0), at(2, 1)), None, "another namespace");
        assert_eq!(history.changed(at(1, 0), at(2, 1)), None);
    }

    #[test]
    fn a_gap_makes_what_was_before_worthless_and_a_repetition_does_not() {
        let mut history = History::default();
        for number in [1, 2, 1, 2, 3] {
            history.tell(at(1, number), BTreeSet::new());
        }
        assert_eq!(history.changed(at(1, 0), at(1, 3)), Some(BTreeSet::new()));
        history.tell(at(1, 5), BTreeSet::new());
        assert_eq!(history.changed(at(1, 2), at(1, 5)), None);
        assert_eq!(history.changed(at(1, 4), at(1, 5)), Some(BTreeSet::new()));
        history.miss();
        assert_eq!(history.changed(at(1, 4), at(1, 5)), None);
    }

    #[test]
    fn old_transactions_are_forgotten() {
        let mut history = History::default();
        (0..=MOST as u32).for_each(|number| history.tell(at(1, number), BTreeSet::new()));
        assert_eq!(history.changed(at(1, u32::MAX), at(1, MOST as u32)), None);
        assert_eq!(history.changed(at(1, 0), at(1, MOST as u32)), Some(BTreeSet::new()));
    }
}
