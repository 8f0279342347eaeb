//! The settings of a host that filters guests: the file `/etc/nwfilter/nwfilter.toml`, environment variables, and the options of
//! a program, each of which comes before those named earlier.
//!
//! ```
//! use nwfilter_settings::{Key, Settings, Source};
//!
//! let text = "backend = 'nftables'\ntimeout = 30\n";
//! let settings = Settings::read("nwfilter.toml".as_ref(), text, |_| None)?;
//! assert_eq!(settings.get(Key::Backend), Some("nftables"));
//! assert_eq!(settings.source(Key::Timeout).to_string(), "nwfilter.toml:2");
//! assert_eq!(settings.source(Key::StateDir), &Source::Default);
//!
//! let refused = Settings::read("nwfilter.toml".as_ref(), "bakend = 'nftables'", |_| None);
//! assert_eq!(
//!     refused.err().map(|error| error.to_string()).as_deref(),
//!     Some("nwfilter.toml:1:1: there is no setting 'bakend'; the nearest is 'backend'")
//! );
//! # Ok::<(), nwfilter_settings::Error>(())
//! ```

#![forbid(unsafe_code)]

mod file;
mod key;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use crate::key::{Key, Kind, MAX_SECONDS};

/// The file of a host.
pub const FILE: &str = "/etc/nwfilter/nwfilter.toml";
/// The environment variable that names another file.
pub const FILE_VARIABLE: &str = "NWFILTER_CONFIG";
/// How many bytes the file may have.
pub const MAX_FILE: u64 = 64 << 10;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// This line of the file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// This environment variable.
    Environment(&'static str),
    /// This option of the program.
    Option(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File { path, line } => write!(f, "{}:{line}", path.display()),
            Source::Environment(variable) => f.write_str(variable),
            Source::Option(option) => f.write_str(option),
        }
    }
}

/// Why settings are refused. All of them are then: a host filters as its file says, or as it did before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read, or is too large.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Keys or values that cannot be, each with its place.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Problem>),
}

/// One key or value that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `FILE:LINE:COLUMN`, or the name of an environment variable.
    pub place: String,
    /// What is wrong, and what can be instead.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// A value that differs between two readings of the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which.
    pub key: Key,
    /// What it was.
    pub before: Option<String>,
    /// What it is.
    pub after: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<String>| value.as_ref().map_or("nothing".into(), |v| format!("'{v}'"));
        write!(f, "{} was {} and is {}", self.key.name(), shown(&self.before), shown(&self.after))
    }
}

/// Every setting with its value and where that comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    file: PathBuf,
    values: BTreeMap<Key, (String, Source)>,
}

impl Settings {
    /// The settings of this process: those of `file`, or of the file that the environment names, which then has to be there; else
    /// those of [`FILE`], where there is one. Environment variables come before both.
    pub fn load(file: Option<&Path>) -> Result<Self, Error> {
        let variable = std::env::var_os(FILE_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        let named = file.map(PathBuf::from).or(variable);
        let path = named.clone().unwrap_or_else(|| FILE.into());
        let text = match file::read(&path) {
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|source| Error::Unreadable { path: path.clone(), source })?,
        };
        Self::read(&path, &text, std::env::var_os)
    }

    /// The settings of a file with this text, under an environment.
    pub fn read(
        path: &Path,
        text: &str,
        environment: impl Fn(&'static str) -> Option<OsString>,
    ) -> Result<Self, Error> {
        let (mut values, mut problems) = file::parse(path, text);
        for &key in Key::ALL {
            let variable = key.variable();
            let Some(value) = environment(variable).filter(|value| !value.is_empty()) else { continue };
            match value.to_str().filter(|value| key.takes(value)) {
                Some(value) => {
                    values.insert(key, (value.to_owned(), Source::Environment(variable)));
                }
                None => {
                    let value = value.to_string_lossy();
                    let what = format!("'{value}' cannot be; it takes {}", key.expected());
                    problems.push(Problem { place: variable.to_owned(), what });
                }
            }
        }
        if !problems.is_empty() {
            return Err(Error::Invalid(problems));
        }
        Ok(Self { file: path.to_owned(), values })
    }

    /// The file they were read from, whether or not it is there.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The value of a setting: what was set, or its default.
    pub fn get(&self, key: Key) -> Option<&str> {
        self.values.get(&key).map(|(value, _)| value.as_str()).or(key.default())
    }

    /// Whether a switch is on.
    pub fn is_on(&self, key: Key) -> bool {
        self.get(key) == Some("true")
    }

    /// Where the value comes from.
    pub fn source(&self, key: Key) -> &Source {
        self.values.get(&key).map_or(&Source::Default, |(_, source)| source)
    }

    /// Sets a value that an option of the program gives, which comes before all others.
    pub fn set(&mut self, key: Key, value: impl Into<String>, option: &'static str) {
        self.values.insert(key, (value.into(), Source::Option(option)));
    }

    /// What is otherwise in `newer`, sorted by name.
    pub fn differences(&self, newer: &Settings) -> Vec<Difference> {
        let differs = |key: &&Key| self.get(**key) != newer.get(**key);
        let difference = |&key: &Key| Difference {
            key,
            before: self.get(key).map(str::to_owned),
            after: newer.get(key).map(str::to_owned),
        };
        Key::ALL.iter().filter(differs).map(difference).collect()
    }
}
