//! Transactions as one, in parts, and taken back.

use super::{Cause, MANY};
use crate::kernel::{Operation, TableId, Transaction};
use crate::model::Model;

/// Transactions as one.
pub(super) fn joined(transactions: impl IntoIterator<Item = Transaction<Cause>>) -> Transaction<Cause> {
    let mut joined = Transaction::new();
    transactions.into_iter().for_each(|transaction| joined.extend(transaction.into_operations()));
    joined
}

/// A transaction as several that are not huge. What changes the way of a frame stays together: a chain and all its rules, and
/// the elements of a set that go with those that come for them.
pub(super) fn parted(transaction: Transaction<Cause>) -> Vec<Transaction<Cause>> {
    let (mut parts, mut part, mut size) = (Vec::new(), Transaction::new(), 0);
    for (operation, cause) in transaction.into_operations() {
        let weight = match &operation {
            Operation::AddElements { elements, .. } | Operation::DeleteElements { elements, .. } => {
                elements.len()
            }
            _ => 1,
        };
        let last = part.operations().last().map(|(operation, _): &(Operation, _)| operation);
        let belongs_to_last = match (last, &operation) {
            (Some(Operation::FlushChain { chain: flushed, .. }), Operation::AddChain { chain, .. }) => {
                *flushed == chain.name
            }
            (Some(Operation::AddChain { .. } | Operation::AddRule { .. }), Operation::AddRule { .. }) => true,
            (Some(Operation::DeleteElements { set: held, .. }), Operation::AddElements { set, .. }) => {
                held.name == set.name
            }
            _ => false,
        };
        if size + weight > MANY && !belongs_to_last && size > 0 {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        part.push(operation, cause);
        size += weight;
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// What takes a transaction back that leads frames elsewhere, or adds what they are led to.
pub(crate) fn taken_back(transaction: &Transaction<Cause>, before: &Model) -> Transaction<Cause> {
    let mut back: [Vec<(Operation, Cause)>; 6] = Default::default();
    let mut transaction_back = Transaction::new();
    let is_new = |of: &TableId| before.tables().all(|(held, ..)| held != *of);
    for (operation, cause) in transaction.operations() {
        let table = operation.table().clone();
        if is_new(&table) {
            // What is in a table goes with it.
            if matches!(operation, Operation::AddTable { .. }) {
                transaction_back.push(Operation::DeleteTable { table }, cause.clone());
            }
            continue;
        }
        let (order, operation) = match operation {
            Operation::AddElements { set, elements, .. } if before.sets.contains_key(&set.name) => {
                (0, Operation::DeleteElements { table, set: set.clone(), elements: elements.clone() })
            }
            Operation::DeleteElements { set, elements, .. } => {
                (1, Operation::AddElements { table, set: set.clone(), elements: elements.clone() })
            }
            Operation::AddChain { chain, .. } if !before.chains.contains_key(&chain.name) => {
                let chain = chain.name.clone();
                let deleted =
                    (Operation::DeleteChain { table: table.clone(), chain: chain.clone() }, cause.clone());
                if back[3].iter().any(|(operation, _)| *operation == deleted.0) {
                    continue;
                }
                back[3].push(deleted);
                (2, Operation::FlushChain { table, chain })
            }
            Operation::AddSet { set, .. } if !before.sets.contains_key(&set.name) => {
                (4, Operation::DeleteSet { table, set: set.name.clone() })
            }
            Operation::AddObject { object, .. } if !before.objects.contains_key(object.name()) => {
                (5, Operation::DeleteObject { table, object: object.clone() })
            }
            _ => continue,
        };
        back[order].push((operation, cause.clone()));
    }
    transaction_back.extend(back.into_iter().flatten());
    transaction_back
}
