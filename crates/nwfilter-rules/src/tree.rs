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
    let goal = &filter.name;
    let mut seen = BTreeSet::new();
    // The filters from the first to the one that is looked at, each with its includes that are still to follow. A
    // store may have chains of includes that are longer than a stack is deep.
    let mut path = vec![(filter, filter.includes())];
    while let Some((_, includes)) = path.last_mut() {
        let Some(include) = includes.next() else {
            path.pop();
            continue;
        };
        if include.filter == *goal {
            let names = path.iter().map(|(filter, _)| &filter.name);
            return Some(names.chain([goal]).cloned().collect());
        }
        if let Some(next) = filters.filter(&include.filter)
            && seen.insert(&next.name)
        {
            path.push((next, next.includes()));
        }
    }
    None
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
