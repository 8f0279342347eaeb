//! Reports a plan as typed differences: for each rule the subject, the chain and the filter's rule.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use nwfilter_rules::{Difference, DifferenceKind, Origin, Subject};
use similar::{Algorithm, DiffTag, capture_diff_slices_deadline};

use crate::canonical::canonical;
use crate::dispatch::{Dispatcher, dispatchers};
use crate::plan::{Edit, Plan};

/// How long to search for the shortest difference of two lists. After that any correct one is taken.
const PATIENCE: Duration = Duration::from_secs(1);

/// The differences between a table before and after a plan.
pub(crate) fn differences(plan: &Plan) -> Vec<Difference> {
    let (table, tool) = (plan.table, plan.tool());
    let dispatchers = dispatchers(table);
    let mut found = Vec::new();
    let mut add = |subject, chain: &str, kind, rule: String, origin: Option<&Origin>| {
        found.push(Difference { subject, object: table.chain(chain), kind, rule, origin: origin.cloned() });
    };
    for (name, change) in &plan.chains {
        let (before, after) = (change.before.iter().flatten(), change.after.iter().flatten());
        let held: Vec<_> = before.map(|rule| canonical(tool, rule)).collect();
        let wanted: Vec<_> = after.map(|rule| canonical(tool, rule)).collect();
        let subject = |rule: &str| match &change.port {
            Some(port) => Subject::Port(port.clone()),
            None => dispatched_by(&dispatchers, name, rule),
        };
        let (only_held, only_wanted) = uncommon(&held, &wanted);
        for index in only_held {
            add(subject(&held[index]), name, DifferenceKind::Foreign, held[index].clone(), None);
        }
        for index in only_wanted {
            let rule = wanted[index].clone();
            add(subject(&rule), name, DifferenceKind::Missing, rule, change.origins.get(index));
        }
    }
    for edit in &plan.edits {
        let (chain, rule) = edit.chain_and_rule();
        let kind = match edit {
            Edit::Delete { .. } => DifferenceKind::Foreign,
            Edit::Append { .. } | Edit::Insert { .. } => DifferenceKind::Missing,
        };
        add(dispatched_by(&dispatchers, chain, rule), chain, kind, rule.to_owned(), None);
    }
    found
}

/// The port that a rule of a shared chain leads to.
fn dispatched_by(dispatchers: &[Dispatcher], chain: &str, rule: &str) -> Subject {
    let dispatcher = dispatchers.iter().find(|d| d.chain == chain || d.has_in_tree(chain));
    let port = dispatcher.and_then(|dispatcher| dispatcher.port(rule)?.parse().ok());
    port.map_or(Subject::Host, Subject::Port)
}

/// The indexes of the rules that only one of the two lists has, in order. Takes memory linear in the lists, and bounded
/// time.
fn uncommon<T: Ord + Hash>(a: &[T], b: &[T]) -> (Vec<usize>, Vec<usize>) {
    // Most different rules occur in one list only; they need not be compared with the whole other list.
    let mut counts: HashMap<&T, (usize, usize)> = HashMap::new();
    a.iter().for_each(|item| counts.entry(item).or_default().0 += 1);
    b.iter().for_each(|item| counts.entry(item).or_default().1 += 1);
    let in_both = |item: &T| counts.get(item).is_some_and(|(a, b)| *a > 0 && *b > 0);
    let (both_a, mut only_a): (Vec<_>, Vec<_>) = (0..a.len()).partition(|index| in_both(&a[*index]));
    let (both_b, mut only_b): (Vec<_>, Vec<_>) = (0..b.len()).partition(|index| in_both(&b[*index]));
    let common_a: Vec<_> = both_a.iter().map(|index| &a[*index]).collect();
    let common_b: Vec<_> = both_b.iter().map(|index| &b[*index]).collect();
    let deadline = Some(Instant::now() + PATIENCE);
    for change in capture_diff_slices_deadline(Algorithm::Myers, &common_a, &common_b, deadline) {
        if change.tag() != DiffTag::Equal {
            only_a.extend_from_slice(&both_a[change.old_range()]);
            only_b.extend_from_slice(&both_b[change.new_range()]);
        }
    }
    only_a.sort_unstable();
    only_b.sort_unstable();
    (only_a, only_b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_of_one_list_only_is_found_at_any_place() {
        let list = |text: &str| text.chars().collect::<Vec<_>>();
        for (a, b, only_a, only_b) in [
            ("", "", vec![], vec![]),
            ("abc", "abc", vec![], vec![]),
            ("abc", "", vec![0, 1, 2], vec![]),
            ("abcd", "xbcdy", vec![0], vec![0, 4]),
            ("abab", "ab", vec![2, 3], vec![]),
            ("ab", "ba", vec![1], vec![0]),
        ] {
            assert_eq!(uncommon(&list(a), &list(b)), (only_a, only_b), "{a} {b}");
        }
    }

    #[test]
    fn many_different_rules_take_memory_for_their_number_not_its_square() {
        // A full table of lengths would take 20,000 × 20,000 × 8 bytes.
        let (a, b): (Vec<u32>, Vec<u32>) = ((0..20_000).collect(), (20_000..40_000).collect());
        let (only_a, only_b) = uncommon(&a, &b);
        assert_eq!((only_a.len(), only_b.len()), (20_000, 20_000));
        let reversed: Vec<u32> = (0..20_000).rev().collect();
        let (only_a, only_b) = uncommon(&a, &reversed);
        assert_eq!(only_a.len(), only_b.len());
    }
}
