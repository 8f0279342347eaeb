//! `export` and `import`: the stores as one file.
//!
//! The file is JSON and holds each document as XML. An import is one transaction: everything in the file is stored and
//! enforced, or nothing is.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nwfilter::xml::{
    Binding, Filter, FilterSet, PortDev, read_binding, read_filter, read_set, write_binding, write_filter,
    write_set,
};
use nwfilter::{Driver, Transaction};
use nwfilterctl_shared::warn;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::NamedTempFile;

use crate::cli::Import;
use crate::documents::{accepted, is_stdin, read_bytes, shown};
use crate::output::{Answer, number_of};
use crate::progress::Watch;
use crate::verbs::{names, warn_all, warnings};

/// The value of `format` in the file.
const FORMAT: &str = "nwfilter";
/// The largest file that is imported, in bytes.
const MAX_ARCHIVE: usize = 1 << 30;
/// The version of the format that is written and read.
const VERSION: u32 = 1;

/// The content of the file. Documents are sorted by name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Archive {
    format: String,
    version: u32,
    filters: Vec<Document>,
    #[serde(default)]
    sets: Vec<Document>,
    bindings: Vec<Document>,
}

/// A filter, a set, or the binding of a port.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    /// The name of the filter, set or port.
    name: String,
    xml: String,
}

// ---- export ----

/// Writes the stores to a file, or prints them. The exit code is 1 if a damaged file of the stores is left out.
pub(crate) fn export(driver: &Driver, file: Option<&Path>, as_json: bool) -> Result<Answer> {
    let filters = driver.stored_filters()?;
    let sets = driver.sets()?;
    let bindings = driver.bindings()?;
    let document = |name: &str, xml| Document { name: name.to_owned(), xml };
    let archive = Archive {
        format: FORMAT.to_owned(),
        version: VERSION,
        filters: filters.iter().map(|filter| document(filter.name.as_str(), write_filter(filter))).collect(),
        sets: sets.iter().map(|set| document(set.name.as_str(), write_set(set))).collect(),
        bindings: bindings
            .iter()
            .map(|binding| document(binding.port.as_str(), write_binding(binding)))
            .collect(),
    };
    let problems = driver.problems()?;
    for problem in &problems {
        warn(format_args!("{} is not in the export, because it is damaged", problem.path.display()));
    }
    let text = serde_json::to_string_pretty(&archive)? + "\n";
    let answer = match file.filter(|file| !is_stdin(file)) {
        None => Answer::text(text),
        Some(file) => {
            replace(file, &text).with_context(|| format!("cannot write {}", file.display()))?;
            if as_json {
                Answer::json(&json!({
                    "file": file,
                    "filters": archive.filters.len(),
                    "sets": archive.sets.len(),
                    "bindings": archive.bindings.len(),
                }))
            } else {
                let counts = [archive.filters.len(), archive.sets.len(), archive.bindings.len()];
                Answer::lines([format!("{} exported to {}", counted(counts), file.display())])
            }
        }
    };
    Ok(answer.good_if(problems.is_empty()))
}

fn counted([filters, sets, bindings]: [usize; 3]) -> String {
    format!(
        "{}, {} and {}",
        number_of(filters, "filter"),
        number_of(sets, "set"),
        number_of(bindings, "binding")
    )
}

/// Replaces the content of a file atomically.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = fs::File::open(directory)?;
    let mut new = NamedTempFile::new_in(directory)?;
    new.write_all(text.as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(file).map_err(|error| error.error)?;
    parent.sync_all()
}

// ---- import ----

/// What an import does.
pub(crate) struct Imported {
    pub(crate) transaction: Transaction,
    filters: Vec<String>,
    sets: Vec<String>,
    ports: Vec<PortDev>,
    /// The number of documents that are equal to those of the stores.
    unchanged: usize,
}

pub(crate) fn import(driver: &Driver, watch: &Watch, asked: &Import, as_json: bool) -> Result<Answer> {
    let Imported { transaction, filters, sets, ports, unchanged } = imports(driver, asked)?;
    let applied = watch.during(|| driver.commit(transaction))?.applied;
    warn_all(&applied.warnings);
    if as_json {
        return Ok(Answer::json(&json!({
            "filters": filters,
            "sets": sets,
            "bindings": names(&ports),
            "updated": names(&applied.changed),
            "unchanged": unchanged,
            "warnings": warnings(&applied),
        })));
    }
    let counts = counted([filters.len(), sets.len(), ports.len()]);
    let file = shown(&asked.file);
    Ok(Answer::lines([format!("{counts} imported from {file}, {unchanged} unchanged")]))
}

/// Makes the transaction that stores the content of a file.
pub(crate) fn imports(driver: &Driver, asked: &Import) -> Result<Imported> {
    let source = shown(&asked.file);
    let content = read_bytes(&asked.file, MAX_ARCHIVE).with_context(|| format!("cannot read {source}"))?;
    let archive = parse(&source, &content)?;
    let mut imported = Imported {
        transaction: Transaction::new(),
        filters: vec![],
        sets: vec![],
        ports: vec![],
        unchanged: 0,
    };
    let mut conflicts = Vec::new();
    let mut sets = Vec::new();
    for (index, document) in archive.sets.iter().enumerate() {
        let place = format!("{source}: sets[{index}]");
        let set = accepted(read_set(&place, &document.xml))?;
        check_name(&place, &document.name, set.name.as_str())?;
        sets.push(set);
    }
    for set in included_first(sets) {
        imported.set(driver, set, asked.replace, &mut conflicts)?;
    }
    for (index, document) in archive.filters.iter().enumerate() {
        let place = format!("{source}: filters[{index}]");
        let filter = accepted(read_filter(&place, &document.xml))?;
        check_name(&place, &document.name, filter.name.as_str())?;
        imported.filter(driver, filter, asked.replace, &mut conflicts)?;
    }
    let bindings = if asked.filters_only { &[][..] } else { &archive.bindings };
    for (index, document) in bindings.iter().enumerate() {
        let place = format!("{source}: bindings[{index}]");
        let binding = accepted(read_binding(&place, &document.xml))?;
        check_name(&place, &document.name, binding.port.as_str())?;
        imported.binding(driver, binding, asked.replace, &mut conflicts)?;
    }
    ensure!(
        conflicts.is_empty(),
        "the stores have other documents of the same names: {}\n  help: --replace puts those of {source} in their place",
        conflicts.join(", ")
    );
    Ok(imported)
}

/// Orders sets so that each comes after those that it includes. Sets that include each other come last, and the driver
/// refuses them.
fn included_first(mut sets: Vec<FilterSet>) -> Vec<FilterSet> {
    let mut ordered = Vec::with_capacity(sets.len());
    loop {
        let waiting: BTreeSet<_> = sets.iter().map(|set| set.name.clone()).collect();
        let (later, next): (Vec<_>, Vec<_>) =
            sets.into_iter().partition(|set| set.includes.iter().any(|name| waiting.contains(name)));
        let is_stuck = next.is_empty();
        ordered.extend(next);
        sets = later;
        if is_stuck {
            ordered.extend(sets);
            return ordered;
        }
    }
}

impl Imported {
    fn set(
        &mut self,
        driver: &Driver,
        set: FilterSet,
        replace: bool,
        conflicts: &mut Vec<String>,
    ) -> Result<()> {
        match driver.set(&set.name) {
            Ok(old) if write_set(&old) == write_set(&set) => {
                self.unchanged += 1;
                return Ok(());
            }
            Ok(_) if !replace => conflicts.push(format!("set '{}'", set.name)),
            Ok(_) | Err(nwfilter::Error::NoSuchSet(_)) => (),
            Err(error) => return Err(error.into()),
        }
        self.sets.push(set.name.to_string());
        self.transaction.define_set(set);
        Ok(())
    }

    fn filter(
        &mut self,
        driver: &Driver,
        mut filter: Filter,
        replace: bool,
        conflicts: &mut Vec<String>,
    ) -> Result<()> {
        let name = filter.name.clone();
        if driver.is_stored(&name)? {
            let old = driver.filter(&name)?;
            // A filter keeps its UUID while it is in a store.
            let uuid = if replace { old.uuid } else { filter.uuid.or(old.uuid) };
            filter.uuid = uuid;
            if write_filter(&old) == write_filter(&filter) {
                self.unchanged += 1;
                return Ok(());
            }
            if !replace {
                conflicts.push(format!("filter '{name}'"));
            }
        }
        self.transaction.define_filter(filter);
        self.filters.push(name.to_string());
        Ok(())
    }

    fn binding(
        &mut self,
        driver: &Driver,
        binding: Binding,
        replace: bool,
        conflicts: &mut Vec<String>,
    ) -> Result<()> {
        let port = binding.port.clone();
        match driver.binding(&port) {
            Ok(old) if write_binding(&old) == write_binding(&binding) => {
                self.unchanged += 1;
                return Ok(());
            }
            Ok(_) if !replace => conflicts.push(format!("the binding of port '{port}'")),
            Ok(_) | Err(nwfilter::Error::NoSuchBinding(_)) => (),
            Err(error) => return Err(error.into()),
        }
        self.transaction.replace_binding(binding);
        self.ports.push(port);
        Ok(())
    }
}

fn parse(source: &str, content: &[u8]) -> Result<Archive> {
    let help = "a file that 'nwfilterctl export' wrote is expected";
    let archive: Archive =
        serde_json::from_slice(content).with_context(|| format!("{source} is not an export: {help}"))?;
    ensure!(archive.format == FORMAT, "{source} has the format '{}': {help}", archive.format);
    if archive.version != VERSION {
        bail!("{source} has version {} of the format, and only {VERSION} is known here", archive.version);
    }
    Ok(archive)
}

fn check_name(place: &str, wanted: &str, found: &str) -> Result<()> {
    ensure!(wanted == found, "{place} is named '{wanted}', but its document is about '{found}'");
    Ok(())
}
