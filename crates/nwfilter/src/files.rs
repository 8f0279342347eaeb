//! A directory of XML documents, one in each file: reads changes, writes atomically, and renames damaged files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nwfilter_xml::{Diagnostics, MAX_SET_BYTES, Reading, decode};
use tempfile::NamedTempFile;

use crate::config::Layout;
use crate::{Error, atomic};

/// Identifies the version of a file that was read.
type Stamp = (u64, i64, i64, u64);

/// The suffix of a damaged file's name.
const DAMAGED: &str = ".damaged";
/// The most damaged files of one name that are kept.
const MAX_DAMAGED: u32 = 100;

/// A file of a store that is ignored, because it contains no document of its name.
///
/// The next operation that writes renames a damaged file: `NAME.xml` becomes `NAME.xml.damaged`, or `NAME.xml.damaged.1` and so
/// on if that exists. Its content stays as it is. Operations that only read rename nothing. In libvirt's own stores
/// ([`Layout::Libvirt`]) a file stays where it is, because libvirt may be able to read it; it is renamed only before a new
/// document of its name is stored. A process that has read the document before continues to use it. A file that cannot be read
/// is neither renamed nor overwritten.
///
/// A stock filter does not replace a damaged filter of its name until the filter is defined again or the file is removed: ports
/// that use it keep their rules.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub kind: ProblemKind,
    /// The same as text of one line or several.
    pub why: String,
}

/// What is wrong with a file of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ProblemKind {
    /// It is not a valid document, or contains another name.
    Damaged,
    /// It cannot be read.
    Unreadable,
    /// It was damaged and renamed, and is not yet replaced.
    SetAside,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path.display(), self.why)
    }
}

/// A directory in which each file `NAME.xml` contains one document, and its documents as last read.
#[derive(Clone)]
pub(crate) struct Directory<T> {
    path: PathBuf,
    layout: Layout,
    read: fn(&str, &str) -> Reading<T>,
    name_of: fn(&T) -> String,
    loaded: BTreeMap<String, (Stamp, Content<T>)>,
    /// The renamed damaged files, by their original name.
    aside: BTreeMap<String, BTreeSet<PathBuf>>,
    /// Temporary files that killed processes left.
    leftovers: Vec<PathBuf>,
}

/// The content of a file.
#[derive(Clone)]
enum Content<T> {
    Document(Arc<T>),
    None {
        problem: Problem,
        /// Its content before.
        last: Option<Arc<T>>,
    },
}

/// A pending change of one file.
pub(crate) struct Step {
    target: PathBuf,
    /// The document, on disk under a temporary name; `None` to remove the file.
    content: Option<NamedTempFile>,
    /// Whether a damaged file has this name.
    over_damaged: bool,
}

impl<T> Directory<T> {
    pub(crate) fn new(
        path: &Path,
        layout: Layout,
        read: fn(&str, &str) -> Reading<T>,
        name_of: fn(&T) -> String,
    ) -> Self {
        let (loaded, aside, leftovers) = Default::default();
        Self { path: path.to_owned(), layout, read, name_of, loaded, aside, leftovers }
    }

    /// Reads changes since the last call. A missing directory is empty. Damaged files are logged.
    pub(crate) fn refresh(&mut self) -> Result<(), Error> {
        let mut previous = std::mem::take(&mut self.loaded);
        let listed = list(&self.path)?;
        for (name, path, stamp) in listed.documents {
            let content = match previous.remove(&name) {
                Some((known, content)) if known == stamp => content,
                other => {
                    let last = other.and_then(|(_, content)| content.document().cloned());
                    match self.load(&name, &path, last) {
                        Some(content) => content,
                        None => continue,
                    }
                }
            };
            self.loaded.insert(name, (stamp, content));
        }
        self.aside = listed.aside;
        self.leftovers = listed.leftovers;
        Ok(())
    }

    /// Reads one file that was written or removed here.
    pub(crate) fn refresh_one(&mut self, name: &str) -> Result<(), Error> {
        let path = self.file(name);
        match not_found_is(fs::metadata(&path).map(Some), None) {
            Ok(Some(file)) => {
                let last = self.get(name).cloned();
                match self.load(name, &path, last) {
                    Some(content) => drop(self.loaded.insert(name.to_owned(), (stamp_of(&file), content))),
                    None => drop(self.loaded.remove(name)),
                }
            }
            Ok(None) => drop(self.loaded.remove(name)),
            Err(source) => return Err(Error::Store { path, source }),
        }
        Ok(())
    }

    /// Records a document that was written here, without reading it.
    pub(crate) fn is_written(&mut self, name: &str, document: &Arc<T>) -> Result<(), Error> {
        let path = self.file(name);
        let file = fs::metadata(&path).map_err(|source| Error::Store { path, source })?;
        self.loaded.insert(name.to_owned(), (stamp_of(&file), Content::Document(document.clone())));
        Ok(())
    }

    /// Reads a file, of which `last` was read before. `None` if another process has removed it meanwhile.
    fn load(&self, name: &str, path: &Path, last: Option<Arc<T>>) -> Option<Content<T>> {
        let document = path.display().to_string();
        // libvirt, too, continues with the loaded document. In other stores the file is renamed.
        let last = last.filter(|_| self.layout == Layout::Libvirt);
        let ignored = if last.is_some() { "ignored; what was read before stays in force" } else { "ignored" };
        let (kind, why) = match File::open(path).and_then(|file| read_at_most(file, MAX_SET_BYTES)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => (ProblemKind::Unreadable, format!("cannot be read and is {ignored}: {error}")),
            Ok(bytes) => match decode(&document, &bytes).and_then(|text| self.read_text(&document, text)) {
                Ok(document) if (self.name_of)(&document) == name => {
                    return Some(Content::Document(Arc::new(document)));
                }
                Ok(document) => {
                    let about = (self.name_of)(&document);
                    (ProblemKind::Damaged, format!("is about '{about}', not '{name}', and {ignored}"))
                }
                Err(diagnostics) => {
                    (ProblemKind::Damaged, format!("is damaged and {ignored}:\n{diagnostics}"))
                }
            },
        };
        let problem = Problem { path: path.to_owned(), kind, why };
        log::error!("{problem}");
        Some(Content::None { problem, last })
    }

    fn read_text(&self, document: &str, text: &str) -> Result<T, Diagnostics> {
        let reading = (self.read)(document, text);
        if let Some(warnings) = reading.warnings().filter(|found| found.widen_a_rule()) {
            log_warnings(warnings);
        }
        reading.into_result()
    }

    /// The files without a document of their name, sorted by name.
    pub(crate) fn problems(&self) -> impl Iterator<Item = Problem> {
        let present = self.loaded.values().filter_map(|(_, content)| match content {
            Content::Document(_) => None,
            Content::None { problem, .. } => Some(problem.clone()),
        });
        let unanswered = self.aside.iter().filter(|(name, _)| !self.loaded.contains_key(*name));
        let aside = unanswered.flat_map(|(_, paths)| paths).map(|path| Problem {
            path: path.clone(),
            kind: ProblemKind::SetAside,
            why: "is damaged and was moved aside".to_owned(),
        });
        present.chain(aside)
    }

    /// Whether only a damaged file of this name is left.
    pub(crate) fn is_lost(&self, name: &str) -> bool {
        match self.loaded.get(name) {
            Some((_, content)) => content.document().is_none(),
            None => self.aside.contains_key(name),
        }
    }

    /// Renames damaged files, if the directory is not libvirt's. One that cannot be renamed stays.
    pub(crate) fn set_damaged_aside(&mut self) {
        if self.layout == Layout::Libvirt {
            return;
        }
        let mut moved = Vec::new();
        for (name, (stamp, content)) in &self.loaded {
            let Content::None { problem: Problem { path, kind: ProblemKind::Damaged, .. }, .. } = content
            else {
                continue;
            };
            // It may have been corrected since it was read.
            if fs::metadata(path).is_ok_and(|file| stamp_of(&file) == *stamp) {
                match set_aside(path) {
                    Ok(aside) => moved.push((name.clone(), aside)),
                    Err(error) => log::error!("{} cannot be moved aside: {error}", path.display()),
                }
            }
        }
        for (name, aside) in moved {
            self.loaded.remove(&name);
            self.aside.entry(name).or_default().insert(aside);
        }
    }

    /// Removes files that killed processes left. The caller holds the lock, so no process is writing.
    pub(crate) fn remove_leftovers(&mut self) {
        for path in self.leftovers.drain(..) {
            if let Err(error) = not_found_is(fs::remove_file(&path), ()) {
                log::warn!("{} cannot be removed: {error}", path.display());
            }
        }
    }

    /// The documents, in the order of their names.
    pub(crate) fn documents(&self) -> impl Iterator<Item = &Arc<T>> {
        self.loaded.values().filter_map(|(_, content)| content.document())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.loaded.get(name)?.1.document()
    }

    /// Writes a document under a temporary name. The step renames it.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<Step, Error> {
        let failed = |source| Error::Store { path: self.path.clone(), source };
        let over_damaged = match self.loaded.get(name) {
            Some((
                _,
                Content::None { problem: Problem { path, kind: ProblemKind::Unreadable, why }, .. },
            )) => {
                return Err(Error::Store { path: path.clone(), source: io::Error::other(why.clone()) });
            }
            Some((_, content)) => matches!(content, Content::None { .. }),
            None => false,
        };
        make_directory(&self.path)?;
        let file = atomic::prepare(&self.path, text.as_bytes()).map_err(failed)?;
        Ok(Step { target: self.file(name), content: Some(file), over_damaged })
    }

    /// The removal of a document. A missing file is not an error.
    pub(crate) fn remove(&self, name: &str) -> Step {
        Step { target: self.file(name), content: None, over_damaged: false }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.xml"))
    }
}

impl<T> Content<T> {
    fn document(&self) -> Option<&Arc<T>> {
        match self {
            Self::Document(document) => Some(document),
            Self::None { last, .. } => last.as_ref(),
        }
    }
}

impl Step {
    fn carry_out(self) -> io::Result<()> {
        match self.content {
            Some(content) => {
                if self.over_damaged {
                    set_aside(&self.target)?;
                }
                content.persist(&self.target).map(drop).map_err(|error| error.error)
            }
            None => not_found_is(fs::remove_file(&self.target), ()),
        }
    }
}

/// Carries out steps in order, and reverts them if one fails.
pub(crate) fn carry_out(steps: Vec<Step>) -> Result<(), Error> {
    let mut taken: Vec<(PathBuf, Option<Vec<u8>>)> = Vec::new();
    let mut directories = BTreeSet::new();
    let take_all = |taken: &mut Vec<_>| {
        for step in steps {
            let path = step.target.clone();
            let failed = |source| Error::Store { path: path.clone(), source };
            let old = not_found_is(fs::read(&path).map(Some), None).map_err(failed)?;
            directories.extend(path.parent().map(Path::to_owned));
            step.carry_out().map_err(failed)?;
            taken.push((path, old));
        }
        let sync = |path: &PathBuf| {
            sync_directory(path).map_err(|source| Error::Store { path: path.clone(), source })
        };
        directories.iter().try_for_each(sync)
    };
    take_all(&mut taken).inspect_err(|_| {
        for (path, old) in taken.into_iter().rev() {
            if let Err(error) = put_back(&path, old.as_deref()) {
                log::error!("{} cannot be brought back: {error}", path.display());
            }
        }
    })
}

/// Gives a file the content that it had.
fn put_back(path: &Path, content: Option<&[u8]>) -> io::Result<()> {
    let Some(content) = content else { return not_found_is(fs::remove_file(path), ()) };
    atomic::replace(path, content)
}

/// Reads all bytes of a source. Fails with [`io::ErrorKind::FileTooLarge`] if there are more than `limit`.
pub fn read_at_most(source: impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    match bytes.len() > limit {
        true => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("has more than {} MiB, which is the limit", limit >> 20),
        )),
        false => Ok(bytes),
    }
}

fn not_found_is<T>(result: io::Result<T>, value: T) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(value),
        result => result,
    }
}

pub(crate) fn make_directory(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| Error::Store { path: path.to_owned(), source })
}

/// A new name is durable only after its directory is synced.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Renames a damaged file to a free name.
fn set_aside(path: &Path) -> io::Result<PathBuf> {
    for number in 0..MAX_DAMAGED {
        let mut aside = path.as_os_str().to_owned();
        aside.push(DAMAGED);
        if number > 0 {
            aside.push(format!(".{number}"));
        }
        let aside = PathBuf::from(aside);
        match renameat2(AT_FDCWD, path, AT_FDCWD, &aside, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => {
                log::error!("{} is damaged and was moved to {}", path.display(), aside.display());
                path.parent().map_or(Ok(()), sync_directory)?;
                return Ok(aside);
            }
            Err(Errno::EEXIST) => (),
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other(format!("{MAX_DAMAGED} damaged files of its name are there already")))
}

/// Logs the ignored and replaced parts of a document: as errors if a rule matches more than is written.
pub(crate) fn log_warnings(warnings: &Diagnostics) {
    log::log!(if warnings.widen_a_rule() { log::Level::Error } else { log::Level::Warn }, "{warnings}");
}

/// The files of a directory.
#[derive(Default)]
struct Listed {
    /// Every `NAME.xml`.
    documents: Vec<(String, PathBuf, Stamp)>,
    /// Every `NAME.xml.damaged` and `NAME.xml.damaged.NUMBER`.
    aside: BTreeMap<String, BTreeSet<PathBuf>>,
    leftovers: Vec<PathBuf>,
}

fn list(directory: &Path) -> Result<Listed, Error> {
    let failed = |source| Error::Store { path: directory.to_owned(), source };
    let mut listed = Listed::default();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listed),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let Some(file) = path.file_name().and_then(|file| file.to_str()) else { continue };
        if atomic::is_leftover(file) {
            listed.leftovers.push(path);
        } else if let Some(name) = file.strip_suffix(".xml").filter(|name| !name.is_empty()) {
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => {
                    listed.documents.push((name.to_owned(), path.clone(), stamp_of(&metadata)));
                }
                // Somebody else's directory, or a file that vanished since the listing.
                _ => (),
            }
        } else if let Some((name, number)) = file.rsplit_once(&format!(".xml{DAMAGED}"))
            && (number.is_empty() || number.strip_prefix('.').is_some_and(|n| n.parse::<u32>().is_ok()))
        {
            listed.aside.entry(name.to_owned()).or_default().insert(path.clone());
        }
    }
    Ok(listed)
}

fn stamp_of(file: &fs::Metadata) -> Stamp {
    (file.ino(), file.mtime(), file.mtime_nsec(), file.size())
}
