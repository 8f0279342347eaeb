//! Where a rule is written that an error or a difference is about: the file and the line.

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

    /// Where a rule is written, its origin being shown as `web:10`. Stock filters are in no file.
    pub(crate) fn find(&mut self, origin: &impl Display) -> Option<Location> {
        let origin = origin.to_string();
        let (name, line) = origin.rsplit_once(':')?;
        let name: FilterName = name.parse().ok()?;
        let written = self.known.entry(name).or_insert_with_key(|name| self.driver.written(name).ok()?);
        Some(written.as_ref()?.at(line.parse().ok()?))
    }
}

/// The error with the place of the rule that it is about, if it is about one.
pub(crate) fn with_place(driver: &Driver, error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) => match driver.location(&error) {
            Some(place) => Placed { place: place.to_string(), error }.into(),
            None => error.into(),
        },
        Err(other) => other,
    }
}

/// The error with the place of the rule that it is about, if that is in one of the filters that were to be defined from
/// these files.
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
