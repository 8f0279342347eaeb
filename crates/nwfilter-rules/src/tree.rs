//! Follows includes: cycles, the filters of a tree, and how much a tree expands to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::sync::Arc;

use nwfilter_xml::{Filter, FilterName, SetFamily, SetName};

use crate::error::RulesError;
use crate::ruleset::Origin;

/// The limit for the rules of a port, for the includes of its filter tree, and for the parameters that these pass on.
///
/// Lists of values and repeated includes multiply rules. Within this limit a tree is expanded, or refused, in less than
/// 100 ms.
pub const MAX_EXPANSION: usize = 100_000;

/// Where included filters are looked up, and the sets that rules name.
pub trait Filters {
    /// The filter of that name.
    fn filter(&self, name: &FilterName) -> Option<&Filter>;

    /// What the set of that name holds. An `ipset` that names none is one of the host.
    fn set(&self, _name: &SetName) -> Option<SetFamily> {
        None
    }
}

impl Filters for BTreeMap<FilterName, Filter> {
    fn filter(&self, name: &FilterName) -> Option<&Filter> {
        self.get(name)
    }
}

impl Filters for BTreeMap<FilterName, Arc<Filter>> {
    fn filter(&self, name: &FilterName) -> Option<&Filter> {
        self.get(name).map(Arc::as_ref)
    }
}

impl<S: BuildHasher> Filters for HashMap<FilterName, Filter, S> {
    fn filter(&self, name: &FilterName) -> Option<&Filter> {
        self.get(name)
    }
}

/// The cycle of includes that would exist if `filter` replaced the filter of its name; its first name is also its last.
/// Missing filters include nothing.
pub fn includes_itself(filters: &impl Filters, filter: &Filter) -> Option<Vec<FilterName>> {
    let includes = |filter: &Filter| filter.includes().map(|include| include.filter.clone()).collect();
    cycle(&filter.name, includes(filter), |name| filters.filter(name).map(includes))
}

/// The cycle by which a document includes itself; its first name is also its last. `includes_of` returns the names that the
/// document of a name includes; `None` if it is missing.
pub fn cycle<N: Clone + Ord>(
    goal: &N,
    includes: Vec<N>,
    includes_of: impl Fn(&N) -> Option<Vec<N>>,
) -> Option<Vec<N>> {
    let mut seen = BTreeSet::new();
    // The path from the first document to the current one, each with the includes that are still to follow. This does not
    // recurse, because chains of includes may be deeper than the stack.
    let mut path = vec![(goal.clone(), includes.into_iter())];
    while let Some((_, includes)) = path.last_mut() {
        let Some(name) = includes.next() else {
            path.pop();
            continue;
        };
        if name == *goal {
            return Some(path.into_iter().map(|(name, _)| name).chain([name]).collect());
        }
        if !seen.contains(&name)
            && let Some(next) = includes_of(&name)
        {
            seen.insert(name.clone());
            path.push((name, next.into_iter()));
        }
    }
    None
}

/// The names of all filters that a port with this filter needs, including itself.
pub fn reachable(filters: &impl Filters, name: &FilterName) -> BTreeSet<FilterName> {
    let mut seen = BTreeSet::new();
    let mut waiting = vec![name];
    while let Some(name) = waiting.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        if let Some(filter) = filters.filter(name) {
            waiting.extend(
                filter.includes().map(|include| &include.filter).filter(|name| !seen.contains(*name)),
            );
        }
    }
    seen
}

/// The error if a filter expands to more than [`MAX_EXPANSION`]. Lists of values may multiply rules further.
pub fn too_large(filters: &impl Filters, name: &FilterName) -> Option<RulesError> {
    let too_large = |error: &RulesError| {
        matches!(error, RulesError::TooLarge { .. } | RulesError::TooManyIncludes { .. })
    };
    sizes(filters, name).err().filter(too_large)
}

/// What a filter and its includes expand to, before lists of values multiply its rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) rules: usize,
    /// The includes that lead to them.
    pub(crate) includes: usize,
}

impl Size {
    /// Adds the counts of an include. An include without rules is not followed.
    fn include(&mut self, included: Size) {
        self.rules = self.rules.saturating_add(included.rules);
        self.includes = self.includes.saturating_add(1);
        if included.rules > 0 {
            self.includes = self.includes.saturating_add(included.includes);
        }
    }
}

/// The sizes of a filter and of its includes. Visits each filter once, so that a tree that is too large is refused without
/// expanding it.
pub(crate) fn sizes<'a>(
    filters: &'a impl Filters,
    name: &FilterName,
) -> Result<HashMap<&'a FilterName, Size>, RulesError> {
    let find = |name: &FilterName, by: &dyn Fn() -> Option<Origin>| {
        filters.filter(name).ok_or_else(|| RulesError::NoSuchFilter { name: name.clone(), by: by() })
    };
    let open = |filter: &'a Filter| {
        let size = Size { rules: filter.rules().count(), includes: 0 };
        (filter, filter.includes(), size)
    };
    let mut sizes = HashMap::new();
    let mut seen = 0;
    // The path from the first filter to the current one, each with the includes that are still to follow.
    let mut path = vec![open(find(name, &|| None)?)];
    let mut entered: BTreeSet<&FilterName> = path.iter().map(|(filter, ..)| &filter.name).collect();
    while let Some((filter, includes, size)) = path.last_mut() {
        let filter = *filter;
        if let Some(include) = includes.next() {
            seen += 1;
            if seen > MAX_EXPANSION {
                return Err(RulesError::TooManyIncludes {
                    filter: filter.name.clone(),
                    limit: MAX_EXPANSION,
                });
            }
            let by = || {
                let filter = Some(Arc::new(filter.name.clone()));
                Some(Origin { filter, line: include.place.line })
            };
            let next = find(&include.filter, &by)?;
            if let Some(included) = sizes.get(&next.name) {
                size.include(*included);
            } else if entered.insert(&next.name) {
                path.push(open(next));
            } else {
                let names = path.iter().map(|(filter, ..)| &filter.name);
                let circle = names.skip_while(|name| **name != next.name).chain([&next.name]);
                return Err(RulesError::IncludesItself { cycle: circle.cloned().collect() });
            }
        } else {
            let size = *size;
            if size.rules > MAX_EXPANSION {
                return Err(RulesError::TooLarge { filter: filter.name.clone(), limit: MAX_EXPANSION });
            }
            if size.includes > MAX_EXPANSION {
                return Err(RulesError::TooManyIncludes {
                    filter: filter.name.clone(),
                    limit: MAX_EXPANSION,
                });
            }
            sizes.insert(&filter.name, size);
            entered.remove(&filter.name);
            path.pop();
            if let Some((_, _, outer)) = path.last_mut() {
                outer.include(size);
            }
        }
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Filters of which each includes the next, and what the last one includes.
    fn chain(length: usize, last: &str) -> BTreeMap<FilterName, Filter> {
        let text = |n: usize| match n + 1 < length {
            true => format!("<filter name='f{n}'><filterref filter='f{}'/></filter>", n + 1),
            false => format!("<filter name='f{n}'>{last}</filter>"),
        };
        let filters = (0..length).map(|n| nwfilter_xml::read_filter("f.xml", &text(n)).value);
        filters.flatten().map(|filter| (filter.name.clone(), filter)).collect()
    }

    #[test]
    fn a_chain_of_includes_may_be_longer_than_a_stack_is_deep() {
        const LENGTH: usize = 50_000;
        let straight = chain(LENGTH, "");
        assert_eq!(includes_itself(&straight, &straight["f0"]), None);
        let circle = chain(LENGTH, "<filterref filter='f0'/>");
        let found = includes_itself(&circle, &circle["f0"]).map(|cycle| cycle.len());
        assert_eq!(found, Some(LENGTH + 1));
    }
}
