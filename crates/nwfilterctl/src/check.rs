//! `check`: every problem of every document, for people and for programs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use nwfilter::xml::{Diagnostics, Severity, read_binding, read_filter};

use crate::{read, shown};

/// Shows the problems of the documents; exit code 1 if one is refused, or with `strict` has a warning.
pub(crate) fn check(files: &[PathBuf], strict: bool, json: bool) -> Result<ExitCode> {
    let mut documents = Vec::new();
    for file in files {
        collect(file, &mut documents)?;
    }
    let mut found = Vec::new();
    for file in &documents {
        found.push(problems(&shown(file), &read(file)?));
    }
    let count =
        |severity| found.iter().flat_map(|d| &d.items).filter(|item| item.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    if json {
        println!("{}", serde_json::to_string_pretty(&as_json(&found))?);
    } else {
        for diagnostics in found.iter().filter(|diagnostics| !diagnostics.items.is_empty()) {
            eprintln!("{diagnostics}\n");
        }
        println!("{} documents checked, {errors} errors, {warnings} warnings", documents.len());
    }
    let failed = errors > 0 || (strict && warnings > 0);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A file itself, or the *.xml files of a directory and those below it, sorted.
fn collect(path: &Path, documents: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        documents.push(path.to_owned());
        return Ok(());
    }
    let entries = std::fs::read_dir(path).and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>());
    let mut entries = entries.with_context(|| format!("cannot read {}", path.display()))?;
    entries.sort_by_key(std::fs::DirEntry::path);
    for entry in entries.iter().map(std::fs::DirEntry::path) {
        if entry.is_dir() || entry.extension().is_some_and(|extension| extension == "xml") {
            collect(&entry, documents)?;
        }
    }
    Ok(())
}

/// The problems of a document, read as what its root element says it is.
fn problems(document: &str, text: &str) -> Diagnostics {
    let filter = read_filter(document, text);
    if filter.value.is_some() || !text.contains("<filterbinding") {
        return filter.diagnostics;
    }
    read_binding(document, text).diagnostics
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
                "message": item.message,
                "help": item.help,
            })
        })
    });
    serde_json::Value::Array(problems.collect())
}
