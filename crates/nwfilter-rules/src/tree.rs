//! Filters that include filters.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::sync::Arc;

use nwfilter_xml::{Filter, FilterName};

/// Where included filters are looked up.
pub trait Filters {
    /// The filter of that name.
    fn filter(&self, name: &FilterName) -> Option<&Filter>;
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

/// The circle of includes that `filter` would close if it took the place of the one of its name; its first name is
/// also its last. Filters that do not exist include nothing.
pub fn includes_itself(filters: &impl Filters, filter: &Filter) -> Option<Vec<FilterName>> {
    fn search(
        filters: &impl Filters,
        goal: &FilterName,
        filter: &Filter,
        path: &mut Vec<FilterName>,
        seen: &mut BTreeSet<FilterName>,
    ) -> bool {
        path.push(filter.name.clone());
        for include in filter.includes() {
            if include.filter == *goal {
                path.push(goal.clone());
                return true;
            }
            let next = filters.filter(&include.filter).filter(|next| seen.insert(next.name.clone()));
            if next.is_some_and(|next| search(filters, goal, next, path, seen)) {
                return true;
            }
        }
        path.pop();
        false
    }
    let mut path = Vec::new();
    search(filters, &filter.name, filter, &mut path, &mut BTreeSet::new()).then_some(path)
}

/// The names of all filters that a port with this filter needs, itself among them.
pub fn reachable(filters: &impl Filters, name: &FilterName) -> BTreeSet<FilterName> {
    let mut seen = BTreeSet::new();
    let mut waiting = vec![name.clone()];
    while let Some(name) = waiting.pop() {
        if let Some(filter) = filters.filter(&name) {
            waiting.extend(
                filter.includes().map(|include| include.filter.clone()).filter(|n| !seen.contains(n)),
            );
        }
        seen.insert(name);
    }
    seen
}
