//! The network namespace in which a driver works.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::{panic, thread};

use nix::sched::{CloneFlags, setns};

/// That of the calling thread.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// Where a driver finds interfaces, writes rules and listens to guests.
///
/// ```no_run
/// use nwfilter::{Driver, Fake, NetworkNamespace};
///
/// let blue = NetworkNamespace::open("/run/netns/blue")?;
/// let driver = Driver::builder().network_namespace(blue).open(Fake::new())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct NetworkNamespace(Option<Arc<File>>);

/// What identifies a namespace: device and inode of its file.
pub(crate) type Id = (u64, u64);

impl NetworkNamespace {
    /// That of the thread which calls the driver, at each call. A thread of the driver has that of the call which started
    /// it.
    pub fn of_caller() -> Self {
        Self::default()
    }

    /// That of the calling thread now, whoever calls the driver later.
    pub fn current() -> io::Result<Self> {
        Self::open(CURRENT)
    }

    /// That of a file, as `/run/netns/NAME` or `/proc/PID/ns/net`. It exists as long as the value.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self::of(File::open(path)?))
    }

    /// That of an open file.
    pub fn of(file: File) -> Self {
        Self(Some(Arc::new(file)))
    }

    /// Runs something in the namespace: on the calling thread if that is in it, else on a thread that ends with it, so that
    /// the calling thread never leaves its own.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Some(file) = &self.0 else { return Ok(work()) };
        if id(&file.metadata()?) == id(&std::fs::metadata(CURRENT)?) {
            return Ok(work());
        }
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("nwfilter-netns".into()).spawn_scoped(scope, || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// What identifies the namespace, for the calling thread; `None` if that is not known.
    pub(crate) fn id(&self) -> Option<Id> {
        let file = match &self.0 {
            Some(file) => file.metadata(),
            None => std::fs::metadata(CURRENT),
        };
        file.ok().map(|file| id(&file))
    }
}

fn id(file: &std::fs::Metadata) -> Id {
    (file.dev(), file.ino())
}

impl fmt::Debug for NetworkNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str("NetworkNamespace::of_caller()"),
            Some(file) => f.debug_tuple("NetworkNamespace").field(file).finish(),
        }
    }
}
