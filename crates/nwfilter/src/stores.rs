//! The documents of a driver, and the rulesets that they define.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nwfilter_rules::{Filters, LogGroup, Ruleset};
use nwfilter_xml::{
    Binding, Filter, FilterName, FilterSet, Reading, SetFamily, SetName, Strictness, read_binding,
    read_filter, read_filter_with, read_set,
};

use crate::Error;
use crate::config::{Config, Layout};
use crate::files::Directory;
use crate::learn::Learning;
use crate::learn::known::Known;
use crate::learn::service::NeedCache;
use crate::learn::wanted::{Past, wanted};
use crate::stock::stock_filters;

/// Filters by name, stock filters included, and the sets that their rules may name.
#[derive(Clone, Default)]
pub(crate) struct FilterMap {
    filters: BTreeMap<FilterName, Arc<Filter>>,
    /// The sets that rules may name, and what they hold.
    pub(crate) sets: BTreeMap<SetName, SetFamily>,
}

impl Deref for FilterMap {
    type Target = BTreeMap<FilterName, Arc<Filter>>;

    fn deref(&self) -> &Self::Target {
        &self.filters
    }
}

impl DerefMut for FilterMap {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.filters
    }
}

impl Filters for FilterMap {
    fn filter(&self, name: &FilterName) -> Option<&Filter> {
        self.filters.get(name).map(Arc::as_ref)
    }

    fn set(&self, name: &SetName) -> Option<SetFamily> {
        self.sets.get(name).copied()
    }
}

/// The directory of the filter store that the sets are in.
const SETS: &str = "sets";

/// The stores as they were last read.
#[derive(Clone)]
pub(crate) struct Stores {
    pub(crate) filters: Directory<Filter>,
    pub(crate) bindings: Directory<Binding>,
    pub(crate) sets: Directory<FilterSet>,
    /// The addresses of guests that their bindings do not give.
    pub(crate) known: Known,
    pub(crate) need_cache: Arc<Mutex<NeedCache>>,
    /// Where rules report what they stop.
    pub(crate) log_group: LogGroup,
    /// How addresses are learned for bindings that do not say it.
    pub(crate) learning: Learning,
}

impl Stores {
    /// The stores of these directories. Reads nothing.
    pub(crate) fn new(config: &Config) -> Self {
        let state_dir: &Path = &config.state_dir;
        // libvirt made rules from its files as it reads them, and guests run with these rules.
        let read = if config.layout == Layout::Libvirt { read_as_libvirt } else { read_filter };
        Self {
            filters: Directory::new(&config.config_dir, config.layout, read, |filter| {
                filter.name.to_string()
            }),
            bindings: Directory::new(state_dir, config.layout, read_binding, |binding| {
                binding.port.to_string()
            }),
            sets: Directory::new(&config.config_dir.join(SETS), Layout::Own, read_set, |set| {
                set.name.to_string()
            }),
            known: Known::new(state_dir, config.clock.clone()),
            need_cache: Arc::default(),
            log_group: config.log_group,
            learning: config.learning.clone(),
        }
    }

    /// Reads the changes of others since the last call.
    pub(crate) fn refresh(&mut self) -> Result<(), Error> {
        self.filters.refresh()?;
        self.bindings.refresh()?;
        self.sets.refresh()?;
        self.known.refresh()
    }

    /// Renames damaged files, and removes files that killed processes left. The caller holds the lock.
    pub(crate) fn tidy(&mut self) {
        self.filters.remove_leftovers();
        self.bindings.remove_leftovers();
        self.sets.remove_leftovers();
        self.filters.set_damaged_aside();
        self.bindings.set_damaged_aside();
        self.sets.set_damaged_aside();
    }

    /// The filter of a name, from the store or a stock filter. A stock filter does not replace a damaged file.
    pub(crate) fn filter(&self, name: &FilterName) -> Option<&Arc<Filter>> {
        let stock = || stock_filters().get(name).filter(|_| !self.filters.is_lost(name.as_str()));
        self.filters.get(name.as_str()).or_else(stock)
    }

    /// The filters that names refer to.
    pub(crate) fn filter_map(&self) -> FilterMap {
        let mut filters = stock_filters().clone();
        filters.retain(|name, _| !self.filters.is_lost(name.as_str()));
        filters.extend(self.filters.documents().map(|filter| (filter.name.clone(), filter.clone())));
        let sets = self.sets.documents().map(|set| (set.name.clone(), set.family)).collect();
        FilterMap { filters, sets }
    }

    /// The ruleset of a binding with these filters.
    pub(crate) fn ruleset(&self, filters: &FilterMap, binding: &Binding) -> Result<Ruleset, Error> {
        Ok(wanted(filters, binding, self, Past::Counts)?.ruleset)
    }
}

fn read_as_libvirt(document: &str, text: &str) -> Reading<Filter> {
    read_filter_with(document, text, Strictness::AsLibvirt)
}
