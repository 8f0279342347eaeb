//! Repairs what others change in the kernel where rules of ports are, or lead to them.
//!
//! A thread follows the backend's [`Watch`]. When a change was reported and no other follows for a moment, the thread asks
//! for a [`Driver::reload`], which writes what differs. Two programs that undo each other's changes do not spin: the
//! repairs become rarer.
//!
//! The thread follows the network interfaces too: a bound interface that comes back is filtered without delay, and when one
//! is renamed, its binding follows.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_rules::{Applied, Difference, Process, Watch};
use nwfilter_xml::PortDev;

use crate::drops::DropReader;
use crate::error::with_causes;
use crate::learn::engine::Waker;
use crate::link_watch::{LinkChange, LinkWatch};
use crate::{Driver, Error, Reloaded};

/// A change is handled after this time without another one, because tools write table by table.
const QUIET: Duration = Duration::from_millis(100);
/// A change is handled after this time in any case.
const LATEST: Duration = Duration::from_millis(500);
/// More repairs than this within [`A_WHILE`] mean that another program undoes them.
const MANY: usize = 10;
const A_WHILE: Duration = Duration::from_secs(60);
/// The first and the longest pause between such repairs, or after a failure. Each pause is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// The most differences, and programs, that the log names for one repair.
const SHOWN: usize = 10;
/// The name for an unknown process.
const SOMEBODY: &str = "somebody";

/// Keeps the kernel in the desired state until it is dropped. The rules stay after that.
#[derive(Debug)]
pub struct Reconciler {
    waker: Arc<Waker>,
    repairs: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
    /// `None` if the host is a fake.
    _drops: Option<DropReader>,
}

impl Reconciler {
    /// The number of repairs so far.
    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Relaxed)
    }

    /// Whether its thread runs. It ends only by a panic.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        self.waker.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Driver {
    /// Applies all bindings, and keeps the kernel so until the returned value is dropped. A change by others is repaired after
    /// 100 to 500 ms and the time of a [`Driver::reload`], and logged as a warning with the process that made it.
    ///
    /// A thread does this for all bindings of the store, including those that other processes make. Unrelated rule changes are
    /// ignored. A bound interface that comes back gets its rules without that delay, and the binding of a renamed interface
    /// follows it. After more than ten repairs within a minute the next ones wait, at most for 30 s.
    ///
    /// Another thread reports the packets that the rules of ports with `CTRL_LOG_DROPS` stop: see [`Event::PacketDropped`](crate::Event::PacketDropped).
    pub fn keep(&self) -> Result<Reconciler, Error> {
        // A thread is in the namespace in which it is started.
        self.inside(|| self.start_reconciler())
    }

    fn start_reconciler(&self) -> Result<Reconciler, Error> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Reconciler { source };
        let watch = self.backend().watch().map_err(|error| failed(Box::new(error)))?;
        let watch = watch.ok_or_else(|| {
            failed(format!("backend '{}' cannot watch for changes", self.backend().name()).into())
        })?;
        let follows = self.host().is_kernel().then(LinkWatch::open).transpose();
        let links = follows.map_err(|error| failed(Box::new(error)))?;
        let waker = Waker::new().map_err(|error| failed(Box::new(error)))?;
        let reader = self.host().is_kernel().then(|| DropReader::start(self.for_thread())).transpose();
        let drops = reader.map_err(|error| failed(Box::new(error)))?;
        let (repairs, driver) = (Arc::new(AtomicU64::new(0)), self.for_thread());
        let worker = Worker::new(driver, watch, links, waker.clone(), repairs.clone());
        let thread = std::thread::Builder::new().name("nwfilter-keep".into()).spawn(|| worker.run());
        let thread = thread.map_err(|error| failed(Box::new(error)))?;
        Ok(Reconciler { waker, repairs, thread: Some(thread), _drops: drops })
    }
}

/// What the thread works with.
struct Worker {
    driver: Driver,
    /// `None` after it failed, until it is replaced.
    watch: Option<Box<dyn Watch>>,
    /// `None` if the host is a fake.
    links: Option<LinkWatch>,
    waker: Arc<Waker>,
    repairs: Arc<AtomicU64>,
    pending: Option<Pending>,
    pace: Pace,
    /// The pause after the last failure; zero after a success.
    retry: Duration,
    /// The earliest time of the next attempt.
    rests_until: Option<Instant>,
}

/// Changes that are not yet handled.
struct Pending {
    first: Instant,
    last: Instant,
    /// The processes that made them, as many as are logged.
    by: BTreeSet<Process>,
    /// Bound ports whose interfaces are new, or were put into a bridge.
    returned: BTreeSet<PortDev>,
}

impl Worker {
    fn new(
        driver: Driver,
        watch: Box<dyn Watch>,
        links: Option<LinkWatch>,
        waker: Arc<Waker>,
        repairs: Arc<AtomicU64>,
    ) -> Self {
        let mut worker = Self {
            driver,
            watch: Some(watch),
            links,
            waker,
            repairs,
            pending: None,
            pace: Pace::default(),
            retry: Duration::ZERO,
            rests_until: None,
        };
        // Changes from before the watch began.
        worker.hear_of([]);
        worker
    }

    fn run(mut self) {
        loop {
            self.wait();
            if self.waker.is_stopped() {
                return;
            }
            self.listen();
            self.follow_links();
            let now = Instant::now();
            if self.due().is_some_and(|due| due <= now)
                && let Some(pending) = self.pending.take()
            {
                self.repair(pending);
            }
        }
    }

    /// Waits for a change, until a change is due, or to be woken.
    fn wait(&self) {
        let due = self.due().map(|due| due.saturating_duration_since(Instant::now()));
        let interval = self.watch.as_ref().and_then(|watch| watch.interval());
        let timeout = match due.into_iter().chain(interval).min() {
            // A millisecond more, so that the time is over when the wait ends.
            Some(wait) => PollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        let watch = self.watch.iter().map(|watch| watch.as_fd());
        let links = self.links.iter().map(|links| links.as_fd());
        let descriptors = watch.chain(links).chain([self.waker.as_fd()]);
        let mut descriptors: Vec<_> = descriptors.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(Errno::EINTR) => (),
            Err(errno) => {
                log::error!("waiting for changes of the kernel's rules: {errno}");
                std::thread::sleep(PAUSES.0);
            }
        }
    }

    /// Takes the changes of the watch. If it failed, replaces it and checks for missed changes.
    fn listen(&mut self) {
        let told = match &mut self.watch {
            Some(watch) => watch.changes(),
            None if self.rests_until.is_some_and(|until| until > Instant::now()) => return,
            None => self.driver.backend().watch().map(|watch| {
                self.watch = watch;
                Vec::new()
            }),
        };
        match told {
            Ok(changes) if changes.is_empty() => (),
            Ok(changes) => {
                for change in &changes {
                    log::debug!("{change}");
                }
                self.hear_of(changes.into_iter().filter_map(|change| change.by));
            }
            Err(error) => {
                log::error!("{}", with_causes(&error));
                self.watch = None;
                self.hear_of([]);
                self.rest_after_failure();
            }
        }
    }

    fn hear_of(&mut self, by: impl IntoIterator<Item = Process>) {
        let now = Instant::now();
        let pending = self.pending.get_or_insert_with(|| Pending::new(now));
        pending.last = now;
        for by in by {
            if pending.by.len() < SHOWN {
                pending.by.insert(by);
            }
        }
    }

    /// Takes the changes of interfaces.
    fn follow_links(&mut self) {
        let Some(links) = &mut self.links else { return };
        let changes = links.changes().unwrap_or_else(|error| {
            log::error!("what becomes of network interfaces is not known: {error}");
            std::thread::sleep(PAUSES.0);
            self.hear_of([]);
            Vec::new()
        });
        let mut ready = BTreeSet::new();
        for change in changes {
            match change {
                LinkChange::Ready(name) => drop(ready.insert(name)),
                LinkChange::Renamed { from, to } => {
                    self.follow_rename(&from, &to);
                    ready.insert(to);
                }
            }
        }
        if ready.is_empty() {
            return;
        }
        let bound = match self.driver.look() {
            Ok(stores) => stores.bindings.documents().map(|binding| binding.port.clone()).collect(),
            Err(error) => {
                log::error!("{}", with_causes(&error));
                Vec::new()
            }
        };
        let returned: Vec<_> = bound.into_iter().filter(|port| ready.contains(port.as_str())).collect();
        if !returned.is_empty() {
            let pending = self.pending.get_or_insert_with(|| Pending::new(Instant::now()));
            pending.returned.extend(returned);
        }
    }

    /// Moves the binding of a renamed interface.
    fn follow_rename(&self, from: &str, to: &str) {
        // An interface whose name is that of no port has no binding.
        let Ok(port) = from.parse() else { return };
        if matches!(self.driver.binding(&port), Err(Error::NoSuchBinding(_))) {
            return;
        }
        let followed = to.parse().map_err(Error::from).and_then(|to| self.driver.rename_binding(&port, to));
        match followed {
            Ok(()) => {
                log::warn!(nwfilter_port = to; "port '{from}' has the name '{to}' now; its binding follows")
            }
            Err(error) => log::error!(
                nwfilter_port = to;
                "port '{from}' has the name '{to}' now, which its binding cannot follow, so it is not filtered: {}",
                with_causes(&error)
            ),
        }
    }

    /// When the pending changes are due.
    fn due(&self) -> Option<Instant> {
        let pending = self.pending.as_ref()?;
        if !pending.returned.is_empty() {
            // The port may be unfiltered, and such changes do not repeat.
            return Some(pending.first);
        }
        let due = (pending.last + QUIET).min(pending.first + LATEST);
        Some(self.rests_until.map_or(due, |rests_until| due.max(rests_until)))
    }

    /// Repairs what differs. What fails is tried again.
    fn repair(&mut self, mut pending: Pending) {
        match self.driver.reload() {
            Ok(Reloaded { applied: Applied { differences, .. }, failed_sets, .. }) => {
                failed_sets.iter().for_each(|failed| log::error!("{}", with_causes(failed)));
                self.retry = Duration::ZERO;
                self.rests_until = None;
                if !differences.is_empty() {
                    self.repaired(&pending, &differences);
                }
            }
            Err(error) => {
                log::error!("what others changed is not repaired yet: {}", with_causes(&error));
                pending.returned.clear();
                self.pending = Some(pending);
                self.rest_after_failure();
            }
        }
    }

    fn repaired(&mut self, pending: &Pending, differences: &[Difference]) {
        // Changes may have arrived during the repair.
        self.listen();
        let later = self.pending.iter().flat_map(|pending| &pending.by);
        let processes: BTreeSet<_> = pending.by.iter().chain(later).collect();
        let by: BTreeSet<_> = processes.iter().map(ToString::to_string).collect();
        if by.is_empty() && !pending.returned.is_empty() {
            let ports: Vec<_> = pending.returned.iter().map(PortDev::as_str).collect();
            log::warn!("interfaces are back and filtered again: {}", ports.join(", "));
            self.repairs.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.driver.meter().repaired_after(processes.into_iter().map(|process| process.name.as_str()));
        let by = match by.is_empty() {
            true => SOMEBODY.to_owned(),
            false => by.into_iter().collect::<Vec<_>>().join(", "),
        };
        log::warn!("repaired what {by} changed:{}", shown(differences));
        let now = Instant::now();
        if let Some(pause) = self.pace.repaired(now) {
            log::error!(
                "{by} changes again and again what is repaired; the next repair waits {pause:?}, and ports may be \
                 open meanwhile: end that program, or keep it from the chains of ports and from the place of their \
                 jumps, which must be the first"
            );
            self.rests_until = Some(now + pause);
        }
        self.repairs.fetch_add(1, Ordering::Relaxed);
    }

    fn rest_after_failure(&mut self) {
        self.retry = longer(self.retry);
        self.rests_until = Some(Instant::now() + self.retry);
    }
}

impl Pending {
    fn new(now: Instant) -> Self {
        Self { first: now, last: now, by: BTreeSet::new(), returned: BTreeSet::new() }
    }
}

/// The differences, a line each.
fn shown(differences: &[Difference]) -> String {
    let mut text: String =
        differences.iter().take(SHOWN).map(|difference| format!("\n  {difference}")).collect();
    if differences.len() > SHOWN {
        text += &format!("\n  and {} more", differences.len() - SHOWN);
    }
    text
}

/// The pause that follows one.
fn longer(pause: Duration) -> Duration {
    (pause * 2).clamp(PAUSES.0, PAUSES.1)
}

/// Limits how often repairs happen.
#[derive(Debug, Default)]
struct Pace {
    /// The times of the last repairs, at most [`MANY`].
    repairs: VecDeque<Instant>,
    pause: Duration,
}

impl Pace {
    /// Counts a repair and returns the pause before the next one, if any. After the first pause each repair is followed by one,
    /// until [`A_WHILE`] has passed without a repair.
    fn repaired(&mut self, now: Instant) -> Option<Duration> {
        let recent = |then: Option<&Instant>| then.is_some_and(|then| now.duration_since(*then) < A_WHILE);
        let goes_on = !self.pause.is_zero() && recent(self.repairs.back());
        let crowded = self.repairs.len() == MANY && recent(self.repairs.front());
        self.repairs.push_back(now);
        if self.repairs.len() > MANY {
            self.repairs.pop_front();
        }
        self.pause = if goes_on || crowded { longer(self.pause) } else { Duration::ZERO };
        (!self.pause.is_zero()).then_some(self.pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_repairs_in_a_while_are_followed_by_longer_and_longer_pauses() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut repaired = |second: u64| {
            let pause = pace.repaired(begin + Duration::from_secs(second));
            pause.map_or(0, |pause| pause.as_secs())
        };
        assert_eq!([0; 10].map(|_| repaired(0)), [0; 10]);
        // As in a fight, in which each repair is undone at once.
        assert_eq!([5, 6, 8, 12, 20, 36, 66, 96].map(&mut repaired), [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(repaired(96 + 59), 30);
        assert_eq!(repaired(96 + 59 + 60), 0);
        assert_eq!(repaired(1000), 0);
    }

    #[test]
    fn rare_repairs_are_no_fight() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        for repair in 0..100 {
            assert_eq!(pace.repaired(begin + Duration::from_secs(6) * repair), None);
        }
    }
}
