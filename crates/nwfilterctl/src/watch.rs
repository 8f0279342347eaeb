//! `watch`: prints changes of the stores and the kernel as they happen, whichever process makes them.
//!
//! The kernel notifies of changed files and of rules that others write. Then the stores are read again and compared with
//! their last state. When no more changes come for [`QUIET`], the kernel is compared with the desired state.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nwfilter::rules::Watch;
use nwfilter::xml::{Binding, Filter, FilterName, PortDev};
use nwfilter::{Driver, Event, ForeignChange, with_causes};
use nwfilterctl_shared::{Options, warn};
use serde_json::{Value, json};

use crate::keep::as_value;
use crate::output::{address_text, number_of};

/// The time without changes after which the kernel is compared. A change is written table by table, and then stored.
const QUIET: Duration = Duration::from_millis(300);
/// How often the existence of a missing directory is checked.
const ABSENT: Duration = Duration::from_secs(1);

/// Prints changes, one a line, until a signal or until the output is closed.
pub(crate) fn watch(options: &Options, as_json: bool) -> Result<()> {
    let driver = options.open(Driver::builder().without_learner())?;
    let (_, [backend, _]) = options.open_to_examine(Driver::builder().without_learner());
    let kernel = backend.watch().unwrap_or_else(|error| {
        warn(format_args!("changes of the kernel are not reported: {}", with_causes(&error)));
        None
    });
    let files = Files::open(options)?;
    // The stores are read after the watches are set up, so that nothing is missed.
    let seen = Seen::look(&driver)?;
    let mut watcher = Watcher { driver, kernel, files, seen, differences: None, pending: None, as_json };
    watcher.print(
        json!({"event": "watching", "filters": watcher.seen.filters.len(), "ports": watcher.seen.ports.len()}),
        format_args!(
            "watching {} and {}",
            number_of(watcher.seen.filters.len(), "filter"),
            number_of(watcher.seen.ports.len(), "port")
        ),
    )?;
    watcher.compare()?;
    loop {
        watcher.step()?;
    }
}

/// The directories of the stores.
struct Files {
    inotify: Inotify,
    /// Each directory, with its watch if it exists.
    directories: [(PathBuf, Option<WatchDescriptor>); 2],
}

impl Files {
    fn open(options: &Options) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .context("cannot follow changes of files")?;
        let directories =
            [&options.config_dir, &options.state_dir].map(|directory| (directory.clone(), None));
        let mut files = Self { inotify, directories };
        files.have_changed();
        Ok(files)
    }

    /// Whether each directory exists and is followed.
    fn are_followed(&self) -> bool {
        self.directories.iter().all(|(_, watch)| watch.is_some())
    }

    /// Whether anything changed since the last call. A directory that appears, and is followed from now on, may hold files.
    fn have_changed(&mut self) -> bool {
        let mut changed = false;
        while self.inotify.read_events().is_ok() {
            changed = true;
        }
        let events = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF;
        for (directory, watch) in &mut self.directories {
            // A directory that is already watched keeps its watch. A replaced one gets another.
            let found = self.inotify.add_watch(directory.as_path(), events).ok();
            changed |= found != *watch;
            *watch = found;
        }
        changed
    }
}

/// The last seen state of the stores.
struct Seen {
    filters: BTreeMap<FilterName, Arc<Filter>>,
    /// The binding of each port, and its guest's address.
    ports: BTreeMap<PortDev, (Arc<Binding>, String)>,
}

impl Seen {
    fn look(driver: &Driver) -> Result<Self> {
        let filters = driver.stored_filters()?;
        let filters = filters.into_iter().map(|filter| (filter.name.clone(), filter)).collect();
        let ports = driver.port_statuses()?.into_iter().map(|status| {
            let address = address_text(&status);
            (status.binding.port.clone(), (status.binding, address))
        });
        Ok(Self { filters, ports: ports.collect() })
    }

    /// The changes from this state to `new`, each as JSON and as text.
    fn changes(&self, new: &Self) -> Vec<(Value, String)> {
        let mut events = Vec::new();
        for (name, filter) in &new.filters {
            if self.filters.get(name) != Some(filter) {
                events.push(Event::FilterDefined(name.clone()));
            }
        }
        for (port, (binding, _)) in &new.ports {
            match self.ports.get(port) {
                None => events.push(Event::BindingCreated(port.clone())),
                Some((old, _)) if old != binding => events.push(Event::BindingReplaced(port.clone())),
                Some(_) => (),
            }
        }
        let gone = self.ports.keys().filter(|port| !new.ports.contains_key(*port));
        events.extend(gone.map(|port| Event::BindingDeleted(port.clone())));
        let gone = self.filters.keys().filter(|name| !new.filters.contains_key(*name));
        events.extend(gone.map(|name| Event::FilterUndefined(name.clone())));
        let mut lines: Vec<_> = events.iter().map(|event| (as_value(event), event.to_string())).collect();
        for (port, (_, address)) in &new.ports {
            let old = self.ports.get(port).map(|(_, address)| address.as_str());
            if old.unwrap_or_default() != address {
                let state = if address.is_empty() { "filtered" } else { address };
                let value = json!({"event": "address-changed", "port": port.as_str(), "state": state});
                lines.push((value, format!("port '{port}': {state}")));
            }
        }
        lines
    }
}

struct Watcher {
    driver: Driver,
    kernel: Option<Box<dyn Watch>>,
    files: Files,
    seen: Seen,
    /// The number of differing rules at the last comparison. `None` if that failed.
    differences: Option<usize>,
    /// The time of the last change, if the kernel was not compared since.
    pending: Option<Instant>,
    as_json: bool,
}

impl Watcher {
    /// Waits for a change, and prints it.
    fn step(&mut self) -> Result<()> {
        self.wait()?;
        if self.files.have_changed() {
            let new = Seen::look(&self.driver)?;
            for (value, text) in self.seen.changes(&new) {
                self.print(value, text)?;
            }
            self.seen = new;
            self.pending = Some(Instant::now());
        }
        let changes = self.kernel.as_mut().map(|kernel| kernel.changes()).transpose();
        let changes = changes.context("the kernel cannot be followed any longer")?.unwrap_or_default();
        for change in &changes {
            self.print(foreign(change), change)?;
            self.pending = Some(Instant::now());
        }
        if self.pending.is_some_and(|last| last.elapsed() >= QUIET) {
            self.compare()?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        let waits = [
            self.pending.map(|last| QUIET.saturating_sub(last.elapsed())),
            (!self.files.are_followed()).then_some(ABSENT),
            self.kernel.as_ref().and_then(|kernel| kernel.interval()),
        ];
        let timeout = match waits.into_iter().flatten().min() {
            // One millisecond more, so that the time is over when poll returns.
            Some(wait) => PollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        let mut files = vec![PollFd::new(self.files.inotify.as_fd(), PollFlags::POLLIN)];
        files.extend(self.kernel.as_ref().map(|kernel| PollFd::new(kernel.as_fd(), PollFlags::POLLIN)));
        match poll(&mut files, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("cannot wait for changes"),
        }
    }

    /// Compares the kernel with the desired state, and prints the result if it has changed.
    fn compare(&mut self) -> Result<()> {
        self.pending = None;
        let differences = match self.driver.diff() {
            Ok(drift) => Some(drift.differences.len()),
            Err(error) => {
                warn(format_args!("the kernel cannot be compared: {}", with_causes(&error)));
                None
            }
        };
        if let Some(count) = differences.filter(|_| differences != self.differences) {
            let text = match count {
                0 => "the kernel is as the bindings ask for".to_owned(),
                _ => format!("the kernel is not as the bindings ask for: {}", number_of(count, "difference")),
            };
            self.print(json!({"event": "kernel", "differences": count}), text)?;
        }
        self.differences = differences;
        Ok(())
    }

    fn print(&self, value: Value, text: impl std::fmt::Display) -> Result<()> {
        let mut out = stdout().lock();
        let written = if self.as_json { writeln!(out, "{value}") } else { writeln!(out, "{text}") };
        written.and_then(|()| out.flush()).context("the events cannot be written")
    }
}

fn foreign(change: &ForeignChange) -> Value {
    let by = change.by.as_ref().map(|process| json!({"name": process.name, "process": process.id}));
    json!({"event": "rules-changed", "by": by, "objects": change.objects, "more": change.more})
}
