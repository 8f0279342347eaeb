//! The file: TOML with one key for each setting, read with the place of everything that cannot be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::{Key, Kind, MAX_FILE, Problem, Source};

/// The text of a file of no more than [`MAX_FILE`] bytes.
pub(crate) fn read(path: &Path) -> io::Result<String> {
    let (file, mut text) = (File::open(path)?, String::new());
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    file.take(MAX_FILE + 1).read_to_string(&mut text)?;
    match text.len() as u64 > MAX_FILE {
        true => Err(io::Error::new(ErrorKind::FileTooLarge, format!("it has more than {MAX_FILE} bytes"))),
        false => Ok(text),
    }
}

/// The values of a text, and what is wrong with it.
pub(crate) fn parse(path: &Path, text: &str) -> (BTreeMap<Key, (String, Source)>, Vec<Problem>) {
    let (mut values, mut problems) = (BTreeMap::new(), Vec::new());
    let place = |offset: usize| {
        let (line, column) = line_and_column(text, offset);
        format!("{}:{line}:{column}", path.display())
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let offset = error.span().map_or(0, |span| span.start);
        problems.push(Problem { place: place(offset), what: error.message().to_owned() });
    }
    if !problems.is_empty() {
        return (values, problems);
    }
    // A table such as [learning] has settings whose names begin with its own.
    let mut entries: Vec<_> = Vec::new();
    for (name, value) in table.get_ref().iter() {
        match value.get_ref() {
            DeValue::Table(inner) if Key::ALL.iter().any(|key| key.is_in_table(name.get_ref())) => {
                let inner = inner.iter();
                entries.extend(
                    inner.map(|(key, value)| (format!("{}.{}", name.get_ref(), key.get_ref()), key, value)),
                );
            }
            _ => entries.push((name.get_ref().to_string(), name, value)),
        }
    }
    entries.sort_by_key(|(_, name, _)| name.span().start);
    for (full, name, value) in entries {
        let Some(key) = Key::from_name(&full) else {
            let nearest = Key::nearest(&full);
            let advice = nearest.map_or_else(
                || "; 'nwfilterctl config' lists the settings".to_owned(),
                |nearest| format!("; the nearest is '{nearest}'"),
            );
            let what = format!("there is no setting '{full}'{advice}");
            problems.push(Problem { place: place(name.span().start), what });
            continue;
        };
        match text_of(key, value.get_ref()).filter(|value| key.takes(value)) {
            Some(value) => {
                let (line, _) = line_and_column(text, name.span().start);
                values.insert(key, (value, Source::File { path: path.to_owned(), line }));
            }
            None => {
                let given = text.get(value.span()).unwrap_or_default();
                let quoted = if matches!(key.kind(), Kind::Word(_)) { ", in quotes" } else { "" };
                let what = format!("{} cannot be {given}; it takes {}{quoted}", key.name(), key.expected());
                problems.push(Problem { place: place(value.span().start), what });
            }
        }
    }
    (values, problems)
}

/// A value as text, if it has the TOML type that the setting takes.
fn text_of(key: Key, value: &DeValue<'_>) -> Option<String> {
    match (key.kind(), value) {
        (Kind::Directory | Kind::Word(_) | Kind::Text, DeValue::String(text)) => Some(text.to_string()),
        (Kind::Switch, DeValue::Boolean(on)) => Some(on.to_string()),
        (Kind::Seconds | Kind::Group, DeValue::Integer(number)) => {
            u64::from_str_radix(number.as_str(), number.radix()).ok().map(|seconds| seconds.to_string())
        }
        (Kind::Addresses, DeValue::Array(addresses)) => {
            let texts = addresses.iter().map(|address| match address.get_ref() {
                DeValue::String(text) => Some(text.as_ref()),
                _ => None,
            });
            Some(texts.collect::<Option<Vec<_>>>()?.join(","))
        }
        _ => None,
    }
}

/// The line and the column, in characters, of a byte; both from 1.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let begin = before.rfind('\n').map_or(0, |end| end + 1);
    (line, before[begin..].chars().count() + 1)
}
