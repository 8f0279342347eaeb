//! A directory of XML documents, one file each: reading it again when it changes, writing it atomically.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};
use nwfilter_xml::Reading;
use tempfile::NamedTempFile;

use crate::Error;

/// What tells whether a file is still the one that was read.
type Stamp = (u64, i64, i64, u64);

/// A directory in which each file `NAME.xml` holds one document, kept in step with what is on disk.
pub(crate) struct Directory<T> {
    path: PathBuf,
    read: fn(&str, &str) -> Reading<T>,
    name_of: fn(&T) -> String,
    loaded: BTreeMap<String, (Stamp, Option<Arc<T>>)>,
}

/// A document that is on disk, but not yet under its name.
pub(crate) struct Prepared {
    file: NamedTempFile,
    target: PathBuf,
}

impl<T> Directory<T> {
    pub(crate) fn new(path: &Path, read: fn(&str, &str) -> Reading<T>, name_of: fn(&T) -> String) -> Self {
        Self { path: path.to_owned(), read, name_of, loaded: BTreeMap::new() }
    }

    /// Reads what changed since the last call. A directory that does not exist is empty. A file that is no document
    /// is left alone, said in the log, and otherwise as if it were not there.
    pub(crate) fn refresh(&mut self) -> Result<(), Error> {
        let mut previous = std::mem::take(&mut self.loaded);
        for (name, path, stamp) in list(&self.path)? {
            let entry = match previous.remove(&name) {
                Some((known, document)) if known == stamp => (stamp, document),
                _ => (stamp, self.load(&name, &path)),
            };
            self.loaded.insert(name, entry);
        }
        Ok(())
    }

    fn load(&self, name: &str, path: &Path) -> Option<Arc<T>> {
        let shown = path.display();
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                log::error!("{shown}: {error}; the file is ignored");
                return None;
            }
        };
        match (self.read)(&shown.to_string(), &text).into_result() {
            Ok(document) if (self.name_of)(&document) == name => Some(Arc::new(document)),
            Ok(document) => {
                log::error!(
                    "{shown} is about '{}', not '{name}'; the file is ignored",
                    (self.name_of)(&document)
                );
                None
            }
            Err(diagnostics) => {
                log::error!("{shown} is damaged and ignored:\n{diagnostics}");
                None
            }
        }
    }

    /// The documents, in the order of their names.
    pub(crate) fn documents(&self) -> impl Iterator<Item = &Arc<T>> {
        self.loaded.values().filter_map(|(_, document)| document.as_ref())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.loaded.get(name)?.1.as_ref()
    }

    /// Puts a document's text on disk, without anybody seeing it yet.
    pub(crate) fn prepare(&self, name: &str, text: &str) -> Result<Prepared, Error> {
        let failed = |source| Error::Store { path: self.path.clone(), source };
        make_directory(&self.path)?;
        let mut file =
            tempfile::Builder::new().prefix(".").suffix(".new").tempfile_in(&self.path).map_err(failed)?;
        file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
        Ok(Prepared { file, target: self.file(name) })
    }

    /// Removes a document. One that is gone already is no error.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.file(name);
        match fs::remove_file(&path).and_then(|()| sync_directory(&self.path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::Store { path, source: error })
            }
            _ => Ok(()),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.xml"))
    }
}

impl Prepared {
    /// Makes the document the one of its name.
    pub(crate) fn publish(self) -> Result<(), Error> {
        let Self { file, target } = self;
        let failed = |source| Error::Store { path: target.clone(), source };
        file.persist(&target).map_err(|error| failed(error.error))?;
        target.parent().map_or(Ok(()), sync_directory).map_err(failed)
    }
}

/// Holds the directory for this process; others wait. Dropping the value lets go.
pub(crate) fn lock(directory: &Path) -> Result<Flock<File>, Error> {
    make_directory(directory)?;
    let path = directory.join(".lock");
    let failed = |source| Error::Store { path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))
}

pub(crate) fn make_directory(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| Error::Store { path: path.to_owned(), source })
}

/// A name that was made is only safe once its directory is on disk.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Every `NAME.xml` of a directory.
fn list(directory: &Path) -> Result<Vec<(String, PathBuf, Stamp)>, Error> {
    let failed = |source| Error::Store { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".xml"));
        let Some(name) = name.filter(|name| !name.starts_with('.')) else { continue };
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                let stamp = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.size());
                found.push((name.to_owned(), path.clone(), stamp));
            }
            // Somebody else's directory, or a file that vanished since the listing.
            _ => (),
        }
    }
    Ok(found)
}
