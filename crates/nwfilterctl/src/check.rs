//! `check`: reports every problem of every document, as text or JSON.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use nwfilter::rules::{includes_itself, too_large};
use nwfilter::stock_filters;
use nwfilter::xml::{
    Code, Diagnostics, DocumentKind, Filter, FilterName, MAX_SET_BYTES, Place, Reading, Severity, Strictness,
    decode, nearest, read_binding, read_domain, read_filter_with, read_set,
};
use nwfilterctl_shared::{check_readable, say, warn, with_causes, without_numbers};

use crate::documents::{read_bytes, shown};
use crate::output::{Answer, number_of};

/// How documents are checked.
pub(crate) struct Checks {
    /// Whether warnings count as errors.
    pub(crate) strict: bool,
    pub(crate) strictness: Strictness,
    /// Whether the problems are printed as JSON.
    pub(crate) json: bool,
}

/// Reports the problems of the documents. The exit code is 1 if one is refused, or with `strict` has a warning.
///
/// Included filters are looked up among the documents, in the store and among the stock filters.
pub(crate) fn check(store: &Path, files: &[PathBuf], checks: Checks) -> Result<Answer> {
    let (mut paths, mut found) = (Vec::new(), Vec::new());
    files.iter().for_each(|file| collect(file, &mut paths, &mut found));
    let documents: Vec<_> = paths.iter().map(|path| Document::read(path, checks.strictness)).collect();
    let mut filters = stock_filters().clone();
    match stored_filters(store) {
        Ok(stored) => filters.extend(stored),
        Err(error) => warn(format_args!(
            "the store {} cannot be read, and includes are not looked up in it: {error}",
            store.display()
        )),
    }
    if let Err(error) = check_readable(store) {
        warn(format_args!("filters of the store are not looked up: {}", with_causes(error.chain())));
    }
    let given = documents.iter().filter_map(|document| document.filter.clone());
    filters.extend(given.map(|filter| (filter.name.clone(), filter)));
    let checked = documents.len();
    found.extend(documents.into_iter().map(|document| document.with_references_checked(&filters)));

    let count =
        |severity| found.iter().flat_map(|d| &d.items).filter(|item| item.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let answer = if checks.json {
        Answer::json(&as_json(&found))
    } else {
        for diagnostics in found.iter().filter(|diagnostics| !diagnostics.items.is_empty()) {
            say(format_args!("{diagnostics}\n"));
        }
        let counts = [(checked, "document"), (errors, "error"), (warnings, "warning")];
        let [checked, errors, warnings] = counts.map(|(count, noun)| number_of(count, noun));
        Answer::lines([format!("{checked} checked, {errors}, {warnings}")])
    };
    let failed = errors > 0 || (checks.strict && warnings > 0);
    Ok(answer.good_if(!failed))
}

/// Adds a file itself, or the *.xml files of a directory and those below it, sorted. Links to directories are not followed.
fn collect(path: &Path, files: &mut Vec<PathBuf>, unread: &mut Vec<Diagnostics>) {
    if !path.is_dir() {
        files.push(path.to_owned());
        return;
    }
    let entries = std::fs::read_dir(path).and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>());
    let mut entries = entries.unwrap_or_else(|error| {
        unread.push(unreadable(path, &error));
        Vec::new()
    });
    entries.sort_by_key(std::fs::DirEntry::path);
    for entry in entries {
        let (path, is_directory) = (entry.path(), entry.file_type().is_ok_and(|kind| kind.is_dir()));
        if is_directory {
            collect(&path, files, unread);
        } else if path.extension().is_some_and(|extension| extension == "xml") && !path.is_dir() {
            files.push(path);
        }
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Diagnostics {
    let start = (Place { line: 1, column: 1 }, 1);
    let message = format!("cannot be read: {}", without_numbers(&error.to_string()));
    Diagnostics::error(&shown(path), "", Code::CannotRead, start, message, None)
}

/// The filters of a store, as far as they can be read. A store that does not exist has none.
fn stored_filters(store: &Path) -> std::io::Result<BTreeMap<FilterName, Arc<Filter>>> {
    let entries = match std::fs::read_dir(store) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries?,
    };
    let mut filters = BTreeMap::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "xml")
            && let Some(filter) = Document::read(&path, Strictness::AsLibvirt).filter
        {
            filters.insert(filter.name.clone(), filter);
        }
    }
    Ok(filters)
}

/// The most missing filters that are reported for a document.
const MAX_MISSING: usize = 200;

/// A document that was read.
struct Document {
    text: String,
    diagnostics: Diagnostics,
    /// The filter, if it is a valid one.
    filter: Option<Arc<Filter>>,
    /// The filters it names, and where.
    references: Vec<(FilterName, Place)>,
}

impl Document {
    fn read(path: &Path, strictness: Strictness) -> Self {
        let document = shown(path);
        let text = match read_bytes(path, MAX_SET_BYTES) {
            Ok(bytes) => decode(&document, &bytes).map(str::to_owned),
            Err(error) => Err(unreadable(path, &error)),
        };
        let text = match text {
            Ok(text) => text,
            Err(diagnostics) => {
                return Self { text: String::new(), diagnostics, filter: None, references: Vec::new() };
            }
        };
        let (mut filter, mut references) = (None, Vec::new());
        let diagnostics = match DocumentKind::of(&text) {
            DocumentKind::Binding => {
                let Reading { value, diagnostics, .. } = read_binding(&document, &text);
                references.extend(value.map(|binding| (binding.filter, place_of_filterref(&text))));
                diagnostics
            }
            DocumentKind::Domain => {
                let Reading { value, diagnostics, .. } = read_domain(&document, &text);
                let interfaces = value.into_iter().flat_map(|domain| domain.interfaces);
                let includes = interfaces.filter_map(|interface| interface.filter);
                references.extend(includes.map(|include| (include.filter, include.place)));
                diagnostics
            }
            DocumentKind::Set => read_set(&document, &text).diagnostics,
            _ => {
                let Reading { value, diagnostics, .. } = read_filter_with(&document, &text, strictness);
                let includes = value.iter().flat_map(Filter::includes);
                references.extend(includes.map(|include| (include.filter.clone(), include.place)));
                filter = value.map(Arc::new);
                diagnostics
            }
        };
        Self { text, diagnostics, filter, references }
    }

    /// The problems of the document, including those of its references to filters.
    fn with_references_checked(self, filters: &BTreeMap<FilterName, Arc<Filter>>) -> Diagnostics {
        let Self { text, mut diagnostics, filter, references } = self;
        let document = diagnostics.document.clone();
        let error = |code, place, message, help| {
            Diagnostics::error(&document, &text, code, (place, "<filterref".len()), message, help)
        };
        let mut wrong = Vec::new();
        let missing: Vec<_> = references.iter().filter(|(name, _)| !filters.contains_key(name)).collect();
        diagnostics.omitted += missing.len().saturating_sub(MAX_MISSING);
        for (name, place) in missing.into_iter().take(MAX_MISSING) {
            let near = nearest(name.as_str(), filters.keys().map(FilterName::as_str));
            let help = near.map(|near| format!("did you mean '{near}'?"));
            let message = format!(
                "no filter is named '{name}', neither in the checked files nor in the store nor among the stock filters"
            );
            wrong.push(error(Code::NoSuchFilter, *place, message, help));
        }
        if let Some(too_large) = filter.as_ref().and_then(|filter| too_large(filters, &filter.name)) {
            let place = references.first().map_or(Place { line: 1, column: 1 }, |(_, place)| *place);
            wrong.push(error(Code::TooLarge, place, too_large.to_string(), None));
        }
        if let Some(cycle) = filter.and_then(|filter| includes_itself(filters, &filter)) {
            let closes = references.iter().find(|(name, _)| cycle.get(1) == Some(name));
            let place = closes.map_or(Place { line: 1, column: 1 }, |(_, place)| *place);
            let names: Vec<_> = cycle.iter().map(FilterName::as_str).collect();
            let message = format!("filter '{}' includes itself: {}", names[0], names.join(" → "));
            wrong.push(error(Code::IncludesItself, place, message, None));
        }
        wrong.into_iter().for_each(|wrong| diagnostics.merge(wrong));
        diagnostics
    }
}

/// Where the `<filterref>` of a binding is.
fn place_of_filterref(text: &str) -> Place {
    let before = text.split_once("<filterref").map_or("", |(before, _)| before);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    let narrow = |number| u32::try_from(number).unwrap_or(u32::MAX);
    Place { line: narrow(line), column: narrow(column) }
}

fn as_json(found: &[Diagnostics]) -> serde_json::Value {
    let problems = found.iter().flat_map(|diagnostics| {
        diagnostics.items.iter().map(|item| {
            serde_json::json!({
                "file": diagnostics.document,
                "line": item.place.line,
                "column": item.place.column,
                "length": item.length,
                "severity": item.severity.to_string(),
                "code": item.code.to_string(),
                "message": item.message,
                "help": item.help,
            })
        })
    });
    serde_json::Value::Array(problems.collect())
}
