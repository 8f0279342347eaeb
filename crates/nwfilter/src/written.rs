//! Where the rules of a filter are written: in the store, and in the file that the filter was defined from.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nwfilter_rules::Origin;
use nwfilter_xml::{Entry, Filter, FilterName, MAX_BYTES, Strictness, decode, read_filter_with};

use crate::{Driver, Error};

/// What stands before the name of the file in the comment of a stored document, and after it.
const BEFORE: &str = "To change it: nwfilterctl define ";
const AFTER: &str = " -->";

/// The files that a filter of the store is written in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    path: PathBuf,
    /// The file that the filter was defined from, if it still says the same, and its line for each of the store's.
    source: Option<(PathBuf, BTreeMap<u32, u32>)>,
}

/// The line of a rule or an include: `/etc/nwfilter/web.xml:10 (/root/web.xml:5)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The document in the store.
    pub path: PathBuf,
    /// The line there, which is also the line of what `dumpxml` prints.
    pub line: u32,
    /// The file that the filter was defined from, and the line there, if it still says the same.
    pub source: Option<(PathBuf, u32)>,
}

impl Written {
    /// Where the rule is that an [`Origin`] of this filter names by its line.
    pub fn at(&self, line: u32) -> Location {
        let source = self.source.as_ref().and_then(|(path, lines)| Some((path.clone(), *lines.get(&line)?)));
        Location { path: self.path.clone(), line, source }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)?;
        match &self.source {
            Some((path, line)) => write!(f, " ({}:{line})", path.display()),
            None => Ok(()),
        }
    }
}

impl Driver {
    /// Where the rule of a filter in the store is written that an error is about.
    pub fn location(&self, error: &Error) -> Option<Location> {
        let Origin { filter, line } = error.origin()?;
        let written = self.written(filter.as_ref()?).ok()??;
        (*line > 0).then(|| written.at(*line))
    }

    /// Where a filter is written; `None` if the store has none of that name, as of a stock filter.
    pub fn written(&self, name: &FilterName) -> Result<Option<Written>, Error> {
        let stores = self.look()?;
        let Some(filter) = stores.filters.get(name.as_str()) else { return Ok(None) };
        let path = stores.filters.file(name.as_str());
        let source = source_of(&path).and_then(|source| Some((lines(filter, &read(&source)?)?, source)));
        Ok(Some(Written { path, source: source.map(|(lines, source)| (source, lines)) }))
    }
}

/// The comment of a stored document. It is at the end, so that the lines of the document are those of its canonical form.
pub(crate) fn comment(source: Option<&Path>) -> String {
    let text = source.and_then(Path::to_str);
    // What may be in a comment, and is found again.
    let fits = |text: &&str| !text.contains("--") && !text.ends_with('-') && !text.contains(char::is_control);
    let file = text.filter(fits).unwrap_or("FILE");
    format!("<!-- Written by nwfilter. {BEFORE}{file}{AFTER}\n")
}

fn source_of(stored: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(stored).ok()?;
    let file = text.rsplit_once(BEFORE)?.1.split_once(AFTER)?.0;
    Some(PathBuf::from(file)).filter(|file| file.is_absolute())
}

fn read(source: &Path) -> Option<Filter> {
    // To read a pipe or a terminal could take forever.
    let is_document = |file: &fs::Metadata| file.is_file() && file.len() <= MAX_BYTES as u64;
    fs::metadata(source).ok().filter(is_document)?;
    let bytes = fs::read(source).ok()?;
    read_filter_with("source", decode("source", &bytes).ok()?, Strictness::AsLibvirt).value
}

/// The line of each entry of the stored filter in the document that it was read from, if that still says the same.
fn lines(stored: &Filter, source: &Filter) -> Option<BTreeMap<u32, u32>> {
    let same = Filter { uuid: source.uuid.or(stored.uuid), ..source.clone() };
    let line = |entry: &Entry| match entry {
        Entry::Rule(rule) => rule.place.line,
        Entry::Include(include) => include.place.line,
    };
    let lines =
        || stored.entries.iter().zip(&source.entries).map(|(stored, source)| (line(stored), line(source)));
    (same.without_places() == stored.clone().without_places()).then(|| lines().collect())
}
