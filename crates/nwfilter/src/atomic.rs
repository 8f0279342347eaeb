//! Files that are replaced as a whole: under a name that nobody reads until all of the new content is on disk.

use std::io::{self, Write};
use std::path::Path;

use tempfile::NamedTempFile;

const PREFIX: &str = ".nwfilter-";
const SUFFIX: &str = ".new";

/// Puts content on disk. The file gets its name when it is persisted, and is removed when it is dropped.
pub(crate) fn prepare(directory: &Path, content: &[u8]) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new().prefix(PREFIX).suffix(SUFFIX).tempfile_in(directory)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// Gives a file this content, whether it exists or not.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let file = prepare(path.parent().unwrap_or(Path::new(".")), content)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// Whether a file of that name is one that a killed process did not give its name.
pub(crate) fn is_leftover(name: &str) -> bool {
    name.starts_with(PREFIX) && name.ends_with(SUFFIX)
}
