//! What the tests share: the fixtures.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

use std::path::{Path, PathBuf};

/// A directory of fixtures.
pub(crate) fn directory(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-fixtures").join(below)
}

/// Name and text of every document in a directory of fixtures, sorted by name.
pub(crate) fn fixtures(below: &str) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(directory(below)).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "xml"));
    paths.sort();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}
