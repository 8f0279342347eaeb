//! Reads the documents that are named on the command line.

use std::fs::File;
use std::io::stdin;
use std::path::Path;

use anyhow::{Context, Error, Result, anyhow, bail};
use nwfilter::read_at_most;
use nwfilter::xml::{
    Binding, Filter, MAX_SET_BYTES, Reading, Strictness, decode, read_binding, read_filter_with,
};
use nwfilterctl_shared::{say, warns};

/// The file name that stands for standard input.
const STDIN: &str = "-";

pub(crate) fn is_stdin(file: &Path) -> bool {
    file == Path::new(STDIN)
}

/// How a document is named in messages.
pub(crate) fn shown(file: &Path) -> String {
    if is_stdin(file) { "<stdin>".to_owned() } else { file.display().to_string() }
}

/// The filter in a file.
pub(crate) fn filter_in(file: &Path, strictness: Strictness) -> Result<Filter> {
    accepted(read_filter_with(&shown(file), &read(file)?, strictness)).map_err(|error| {
        with_right_verb(error, "filterbinding", "'nwfilterctl binding-create' takes bindings")
    })
}

/// The binding in a file.
pub(crate) fn binding_in(file: &Path) -> Result<Binding> {
    accepted(read_binding(&shown(file), &read(file)?))
        .map_err(|error| with_right_verb(error, "filter", "'nwfilterctl define' takes filters"))
}

/// Adds advice to an error if the document is of another kind.
fn with_right_verb(error: Error, kind: &str, help: &str) -> Error {
    match error.to_string() {
        text if text.contains(&format!("the document is a <{kind}>,")) => anyhow!("{text}\n  help: {help}"),
        _ => error,
    }
}

/// The text of a document.
pub(crate) fn read(file: &Path) -> Result<String> {
    if file.is_dir() {
        let shown = file.display();
        bail!(
            "{shown} is a directory\n  help: name its files: {shown}/*.xml; only 'check' takes directories"
        );
    }
    let bytes = read_bytes(file, MAX_SET_BYTES).with_context(|| format!("cannot read {}", shown(file)))?;
    Ok(decode(&shown(file), &bytes)?.to_owned())
}

/// The content of a file or of standard input, if it is not longer than `limit` bytes.
pub(crate) fn read_bytes(file: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
    match is_stdin(file) {
        true => read_at_most(stdin(), limit),
        false => read_at_most(File::open(file)?, limit),
    }
}

/// Returns what was read, and prints its warnings.
pub(crate) fn accepted<T>(reading: Reading<T>) -> Result<T> {
    if let Some(warnings) = reading.warnings().filter(|_| warns()) {
        say(format_args!("{warnings}\n"));
    }
    Ok(reading.into_result()?)
}

pub(crate) fn strictness(as_libvirt: bool) -> Strictness {
    if as_libvirt { Strictness::AsLibvirt } else { Strictness::Strict }
}
