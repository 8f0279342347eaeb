//! Iterates over the combinations of variable values of a rule.

use std::collections::HashSet;

use nwfilter_xml::{Access, Params, VarRef};

use crate::error::RulesError;
use crate::ruleset::Origin;

/// Variables that advance together.
struct Together<'a> {
    /// The number in `$NAME[@number]`; `None` for `$NAME[index]`, which never advances.
    id: Option<u16>,
    /// Each variable and its values.
    lists: Vec<(&'a VarRef, &'a [String])>,
    /// The indexes to visit: of repeated combinations the first.
    visited: Vec<usize>,
    /// The position in `visited`.
    at: usize,
}

impl Together<'_> {
    fn skip_repeated(&mut self) {
        let Self { lists, visited, .. } = self;
        match &lists[..] {
            _ if visited.len() < 2 => (),
            [(_, values)] => {
                let mut seen = HashSet::with_capacity(values.len());
                visited.retain(|index| seen.insert(values.get(*index)));
            }
            lists => {
                let mut seen = HashSet::new();
                visited.retain(|index| {
                    seen.insert(lists.iter().map(|(_, values)| values.get(*index)).collect::<Vec<_>>())
                });
            }
        }
    }
}

/// The variables of a rule at one combination of their values. Starts at the first combination.
pub(crate) struct Combination<'a> {
    iterators: Vec<Together<'a>>,
}

impl<'a> Combination<'a> {
    /// `variables` all have values in `params`.
    pub(crate) fn first(
        variables: Vec<&'a VarRef>,
        params: &'a Params,
        origin: &Origin,
    ) -> Result<Self, RulesError> {
        let mut iterators: Vec<Together<'a>> = Vec::new();
        for variable in variables {
            let values = params.get(variable.name.as_str()).unwrap_or(&[]);
            let (id, visited) = match variable.access {
                Access::Element(index) => (None, vec![index as usize]),
                Access::Iterator(id) => (Some(id), (0..values.len()).collect()),
            };
            match iterators.iter_mut().find(|iterator| id.is_some() && iterator.id == id) {
                Some(iterator) => {
                    let (first, first_values) = iterator.lists[0];
                    if first_values.len() != values.len() {
                        return Err(RulesError::UnequalLists {
                            origin: origin.clone(),
                            first: first.name.to_string(),
                            first_len: first_values.len(),
                            second: variable.name.to_string(),
                            second_len: values.len(),
                        });
                    }
                    iterator.lists.push((variable, values));
                }
                None => {
                    let iterator = Together { id, lists: vec![(variable, values)], visited, at: 0 };
                    // Iterator 0 always runs first (libvirt creates it before looking at the variables).
                    let position = if id == Some(0) { 0 } else { iterators.len() };
                    iterators.insert(position, iterator);
                }
            }
        }
        iterators.iter_mut().for_each(Together::skip_repeated);
        Ok(Self { iterators })
    }

    /// The current value of a variable.
    pub(crate) fn value(&self, variable: &VarRef) -> Option<&'a str> {
        self.iterators.iter().find_map(|iterator| {
            let (_, values) = iterator.lists.iter().find(|(listed, _)| *listed == variable)?;
            values.get(*iterator.visited.get(iterator.at)?).map(String::as_str)
        })
    }

    /// Advances to the next combination; the first iterator runs fastest. Returns false after the last.
    pub(crate) fn advance(&mut self) -> bool {
        for iterator in &mut self.iterators {
            iterator.at += 1;
            if iterator.at < iterator.visited.len() {
                return true;
            }
            iterator.at = 0;
        }
        false
    }
}
