//! Finds the file and line of a rule that an error or a difference is about.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::PathBuf;

use nwfilter::rules::Origin;
use nwfilter::xml::FilterName;
use nwfilter::{Driver, Error, Location, Written};

use crate::documents::shown;

/// An error about a rule, with the place where that is written.
#[derive(Debug)]
pub(crate) struct Placed {
    place: String,
    error: Error,
}

impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  at: {}", self.error, self.place)
    }
}

impl std::error::Error for Placed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// The filters that were looked up.
pub(crate) struct Places<'a> {
    driver: &'a Driver,
    known: BTreeMap<FilterName, Option<Written>>,
}

impl<'a> Places<'a> {
    pub(crate) fn new(driver: &'a Driver) -> Self {
        Self { driver, known: BTreeMap::new() }
    }

    /// The place of a rule, given its origin, which is shown as `web:10`. Stock filters are in no file.
    pub(crate) fn find(&mut self, origin: &impl Display) -> Option<Location> {
        let origin = origin.to_string();
        let (name, line) = origin.rsplit_once(':')?;
        let name: FilterName = name.parse().ok()?;
        let written = self.known.entry(name).or_insert_with_key(|name| self.driver.written(name).ok()?);
        Some(written.as_ref()?.at(line.parse().ok()?))
    }
}

/// Adds the place of the rule to an error about a rule.
pub(crate) fn with_place(driver: &Driver, error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) => match driver.location(&error) {
            Some(place) => Placed { place: place.to_string(), error }.into(),
            None => error.into(),
        },
        Err(other) => other,
    }
}

/// The same for a rule of a filter that was to be defined from one of these files.
pub(crate) fn in_files(error: Error, files: &BTreeMap<String, PathBuf>) -> anyhow::Error {
    let place = |Origin { filter, line }: &Origin| {
        let file = files.get(filter.as_ref()?.as_str())?;
        Some(format!("{}:{line}", shown(file)))
    };
    match error.origin().and_then(place) {
        Some(place) => Placed { place, error }.into(),
        None => error.into(),
    }
}
