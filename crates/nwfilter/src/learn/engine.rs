//! The learner: one thread that listens on all ports of a binding store, and has the driver apply their filters.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nwfilter_xml::PortDev;

use super::Method;
use super::capture::Capture;
use super::known::{Change, GuestKey};
use super::packets::{MAX_FRAME, observe};
use super::port::PortLearner;
use super::service::Settled;
use super::sieve::{Interest, Sieve, Wanted};
use super::wanted::Need;
use crate::error::with_causes;
use crate::files::make_directory;
use crate::link_watch::LinkWatch;
use crate::{Clock, Driver, Error};

/// The most frames that are read from one port before the next port is read.
const BURST: u32 = 64;
/// The most frames that are read from one port in a second. If a port sends more, it is not read for [`REST`], and the
/// kernel drops the excess.
const FRAMES_PER_SECOND: u32 = 64;
/// How long a port that sends too much is not read.
const REST: Duration = Duration::from_millis(250);
/// The time after which a failed attempt is repeated.
const RETRY: Duration = Duration::from_secs(1);
/// The time after which a learner that failed is started again.
const RESTART: Duration = Duration::from_secs(30);
/// The longest wait, in seconds, while a lease runs. The wall clock, by which a lease ends, may be set meanwhile.
const MAX_WAIT_FOR_LEASE: u64 = 30;
/// The longest time that binding a port waits for the learner to listen on it.
const MAX_WAIT_FOR_LEARNER: Duration = Duration::from_millis(500);
/// How long observations of all ports are collected before they are applied together.
const GATHER: Duration = Duration::from_millis(20);
const EVENTS: usize = 256;

const WAKE: u64 = 0;
const STORES: u64 = 1;
const LINKS: u64 = 2;
const FIRST_PORT: u64 = 3;

/// When the learner ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// When it is stopped.
    Stopped,
    /// When no port needs it, or when another process learns for the same store.
    Idle,
}

/// Wakes a learner, and stops a thread of the driver.
#[derive(Debug)]
pub(crate) struct Waker {
    event: EventFd,
    stop: AtomicBool,
    /// The number of wakes, and how many of them the learner has handled.
    wakes: Mutex<(u64, u64)>,
    followed: Condvar,
}

impl Waker {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Self { event, stop: false.into(), wakes: Mutex::default(), followed: Condvar::new() }))
    }

    /// Makes the learner read the stores, and waits for that, but at most [`MAX_WAIT_FOR_LEARNER`]: it may itself wait for
    /// another process that holds the lock.
    pub(crate) fn wake_and_wait(&self) {
        let mut wakes = self.wakes.lock().unwrap_or_else(PoisonError::into_inner);
        wakes.0 += 1;
        let ours = wakes.0;
        self.wake();
        let waits = |(_, followed): &mut (u64, u64)| *followed < ours;
        drop(self.followed.wait_timeout_while(wakes, MAX_WAIT_FOR_LEARNER, waits));
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // This fails only when 2^64 - 2 wakes are unread.
        let _ = self.event.write(1);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Waits until it is woken, at most for `limit`.
    fn wait(&self, limit: Duration) {
        let mut wakes = [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        // A failed wait is treated as a short one.
        let _ = poll(&mut wakes, limit);
        let _ = self.event.read();
    }

    /// The number of wakes so far.
    fn asked(&self) -> u64 {
        self.wakes.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn has_followed(&self, asked: u64) {
        self.wakes.lock().unwrap_or_else(PoisonError::into_inner).1 = asked;
        self.followed.notify_all();
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Learns for every port of a driver's binding store, in the network namespace of the calling thread. Calls `ready` once,
/// when it listens on all ports that need it.
pub(crate) fn run(
    driver: &Driver,
    waker: &Arc<Waker>,
    until: Until,
    ready: impl FnOnce(),
) -> Result<(), Error> {
    let mut ready = Some(ready);
    loop {
        let Some(lock) = learner_lock(driver, waker, until, &mut ready)? else { return Ok(()) };
        let mut engine = Engine::new(driver, waker.clone())?;
        engine.run(until, &mut ready)?;
        drop(lock);
        // A process that wrote a binding while this one held the lock relies on this one to see it.
        if waker.is_stopped() || !driver.has_to_learn()? {
            return Ok(());
        }
    }
}

/// Runs the learner in a thread of a driver until it is stopped. Failures are logged, and the learner is started again.
pub(crate) fn keep_running(driver: &Driver, waker: &Arc<Waker>, ready: impl FnOnce()) {
    let mut ready = Some(ready);
    while !waker.is_stopped() {
        let is_ready = || ready.take().into_iter().for_each(|ready| ready());
        let Err(error) = run(driver, waker, Until::Stopped, is_ready) else { return };
        log::error!("addresses are not learned: {}", with_causes(&error));
        // Callers do not wait for a learner that cannot start.
        ready.take().into_iter().for_each(|ready| ready());
        waker.has_followed(u64::MAX);
        let again = Instant::now() + RESTART;
        while !waker.is_stopped() && Instant::now() < again {
            waker.wait(again.saturating_duration_since(Instant::now()));
        }
    }
}

/// Takes the lock that gives one process the right to learn for a store. `None` if this process does not need it any more.
/// Closing the file releases it.
fn learner_lock(
    driver: &Driver,
    waker: &Waker,
    until: Until,
    ready: &mut Option<impl FnOnce()>,
) -> Result<Option<File>, Error> {
    let path = lock_path(&driver.config().state_dir);
    let failed = |source: io::Error| Error::Store { path: path.clone(), source };
    make_directory(&driver.config().state_dir)?;
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => return Ok(Some(file)),
            Err(Errno::EAGAIN | Errno::EACCES) if until == Until::Idle || waker.is_stopped() => {
                return Ok(None);
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {
                // Another process listens on the ports.
                ready.take().into_iter().for_each(|ready| ready());
                waker.has_followed(waker.asked());
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        // The lock is tried again, however the wait ended.
        waker.wait(RETRY);
    }
}

/// Whether any process, this one included, learns for a store.
pub(crate) fn is_attended(state_dir: &Path) -> Result<bool, Error> {
    let path = lock_path(state_dir);
    let failed = |source: io::Error| Error::Store { path: path.clone(), source };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    let mut found = whole_file();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found)).map_err(|errno| failed(errno.into()))?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

fn lock_path(state_dir: &Path) -> PathBuf {
    state_dir.join(".learner")
}

/// An open file description lock on a whole file. It conflicts within a process too, and unlike flock(2) can be tested
/// without being taken.
fn whole_file() -> libc::flock {
    // SAFETY: the structure consists of integers, for which zero is valid. Zero offsets mean the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// A port that is listened to.
struct Port {
    learner: PortLearner,
    /// `None` while it cannot be opened, as when the port does not exist.
    capture: Option<Capture>,
    token: u64,
    budget: Budget,
}

/// How many more frames of a port may be read.
struct Budget {
    frames: u32,
    at: Instant,
}

struct Engine<'a> {
    driver: &'a Driver,
    waker: Arc<Waker>,
    epoll: Epoll,
    inotify: Inotify,
    links: LinkWatch,
    ports: BTreeMap<PortDev, Port>,
    sieve: Sieve,
    tokens: BTreeMap<u64, PortDev>,
    next_token: u64,
    /// What was observed and is not yet applied.
    changes: Vec<(PortDev, Change)>,
    /// Ports whose rules could not be applied.
    unsettled: BTreeSet<PortDev>,
    resting: BTreeMap<PortDev, Instant>,
    /// Sockets that are not needed any more. Closing one takes the kernel milliseconds, so they are closed when the thread
    /// has nothing else to do.
    retired: Vec<Capture>,
    /// Whether the stores may have changed since they were read.
    stale: bool,
    retry_at: Option<Instant>,
    next_expiry: Option<u64>,
    /// When the ports whose DHCP answers are dropped were last logged.
    told_at: Option<Instant>,
}

impl<'a> Engine<'a> {
    fn new(driver: &'a Driver, waker: Arc<Waker>) -> Result<Self, Error> {
        let failed = |errno: Errno| Error::Learner { source: errno.into() };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed)?;
        epoll.add(&waker.event, EpollEvent::new(EpollFlags::EPOLLIN, WAKE)).map_err(failed)?;
        epoll.add(&inotify, EpollEvent::new(EpollFlags::EPOLLIN, STORES)).map_err(failed)?;
        let links = LinkWatch::open().map_err(|source| Error::Links { source })?;
        epoll.add(&links, EpollEvent::new(EpollFlags::EPOLLIN, LINKS)).map_err(failed)?;
        Ok(Self {
            driver,
            waker,
            epoll,
            inotify,
            links,
            ports: BTreeMap::new(),
            sieve: Sieve::new().map_err(|source| Error::Learner { source })?,
            tokens: BTreeMap::new(),
            next_token: FIRST_PORT,
            changes: Vec::new(),
            unsettled: BTreeSet::new(),
            resting: BTreeMap::new(),
            retired: Vec::new(),
            stale: true,
            retry_at: None,
            next_expiry: None,
            told_at: None,
        })
    }

    /// Watches a directory for changed documents. A directory is watched only once; one that does not exist is ignored.
    fn watch(&self, directory: &Path) {
        let events = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        if let Err(errno) = self.inotify.add_watch(directory, events) {
            log::debug!("{}: {errno}; not followed", directory.display());
        }
    }

    fn run(&mut self, until: Until, ready: &mut Option<impl FnOnce()>) -> Result<(), Error> {
        loop {
            let asked = self.waker.asked();
            if self.stale {
                self.follow();
                self.waker.has_followed(asked);
            }
            ready.take().into_iter().for_each(|ready| ready());
            if self.waker.is_stopped() || (until == Until::Idle && self.ports.is_empty()) {
                return Ok(());
            }
            self.wait()?;
            self.wake_resting();
            self.end_expired();
            self.settle();
            self.report_disbelieved();
        }
    }

    fn clock(&self) -> &Clock {
        &self.driver.config().clock
    }

    // ---- which ports ----

    /// Listens on the ports that need it now, and on no others.
    fn follow(&mut self) {
        self.stale = false;
        self.watch(&self.driver.config().state_dir);
        self.watch(&self.driver.config().config_dir);
        let (needs, closed) = match self.driver.look() {
            Ok(stores) => (stores.needs(), stores.closed_to_dhcp()),
            Err(error) => {
                log::error!("the bindings cannot be read: {error}");
                return self.stale_after_retry();
            }
        };
        if let Err(error) = self.sieve.close_to_dhcp(&closed) {
            log::error!("DHCP answers of guests to others may be believed: {error}");
            self.stale_after_retry();
        }
        let mut gone: BTreeSet<PortDev> = self.ports.keys().cloned().collect();
        for (binding, need) in needs {
            gone.remove(&binding.port);
            let Need { family, method, servers } = need;
            let interest = Interest { mac: binding.mac, wanted: Wanted { family, method, servers } };
            let guest = GuestKey::of(&binding);
            let port = self.ports.get(&binding.port);
            match port
                .is_some_and(|port| port.learner.guest() == guest && *port.learner.interest() == interest)
            {
                true => self.reopen(&binding.port),
                false => self.listen(&binding.port, PortLearner::new(guest, interest)),
            }
        }
        for port in gone {
            self.leave(&port);
        }
        self.plan_expiry();
    }

    fn listen(&mut self, name: &PortDev, learner: PortLearner) {
        self.leave(name);
        let token = self.next_token;
        self.next_token += 1;
        let budget = Budget { frames: BURST, at: Instant::now() };
        self.tokens.insert(token, name.clone());
        self.ports.insert(name.clone(), Port { learner, capture: None, token, budget });
        self.reopen(name);
    }

    fn leave(&mut self, name: &PortDev) {
        if let Some(port) = self.ports.remove(name) {
            self.tokens.remove(&port.token);
            if let Some(capture) = port.capture {
                self.sieve.close(&capture);
                // If this fails, closing the socket removes it.
                let _ = self.epoll.delete(&capture);
                self.retired.push(capture);
            }
        }
        self.resting.remove(name);
        self.unsettled.remove(name);
    }

    /// Opens the socket of a port that has none.
    fn reopen(&mut self, name: &PortDev) {
        let Some(port) = self.ports.get_mut(name).filter(|port| port.capture.is_none()) else { return };
        let opened =
            open_with_more_files(&mut self.sieve, name, port.learner.interest()).and_then(|capture| {
                self.epoll.add(&capture, EpollEvent::new(EpollFlags::EPOLLIN, port.token))?;
                Ok(capture)
            });
        match opened {
            Ok(capture) => port.capture = Some(capture),
            Err(error) => {
                log::debug!("{name}: not listened to: {error}");
                self.stale_after_retry();
            }
        }
    }

    fn stale_after_retry(&mut self) {
        self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
    }

    // ---- waiting ----

    fn wait(&mut self) -> Result<(), Error> {
        let timeout = if self.retired.is_empty() { self.timeout() } else { EpollTimeout::ZERO };
        let mut count = self.take_events(timeout)?;
        if count == 0 {
            self.retired.pop();
        }
        // Frames that arrive together are handled together.
        let end = Instant::now() + GATHER;
        while count > 0 && !self.changes.is_empty() && Instant::now() < end {
            count = self.take_events(EpollTimeout::ZERO)?;
        }
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            self.stale = true;
        }
        Ok(())
    }

    fn take_events(&mut self, timeout: EpollTimeout) -> Result<usize, Error> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(Error::Learner { source: errno.into() }),
        };
        for event in &events[..count] {
            match event.data() {
                WAKE => {
                    let _ = self.waker.event.read();
                    self.stale = true;
                }
                STORES => self.stale |= self.documents_changed(),
                // A recreated interface has another index.
                LINKS => {
                    let changes = self.links.changes().map_err(|source| Error::Links { source })?;
                    self.stale |= !changes.is_empty();
                }
                token => self.read(token),
            }
        }
        Ok(count)
    }

    fn timeout(&self) -> EpollTimeout {
        let now = Instant::now();
        let lease = self.next_expiry.map(|at| {
            Duration::from_secs(at.saturating_sub(self.clock().now()).clamp(1, MAX_WAIT_FOR_LEASE))
        });
        let deadlines = self.resting.values().chain(&self.retry_at);
        let waits = deadlines.map(|at| at.saturating_duration_since(now)).chain(lease);
        match waits.min() {
            // One millisecond more, so that the deadline has passed when the wait ends.
            Some(wait) => {
                EpollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
            }
            None => EpollTimeout::NONE,
        }
    }

    /// Whether one of the events is about a document.
    fn documents_changed(&self) -> bool {
        let is_document = |name: &std::ffi::OsStr| name.as_encoded_bytes().ends_with(b".xml");
        let mut changed = false;
        while let Ok(events) = self.inotify.read_events() {
            // An event without a name means that events were lost.
            changed |= events.iter().any(|event| event.name.as_deref().is_none_or(is_document));
        }
        changed
    }

    // ---- frames ----

    fn read(&mut self, token: u64) {
        let Some(name) = self.tokens.get(&token) else { return };
        let Some(port) = self.ports.get_mut(name) else { return };
        let Some(capture) = &port.capture else { return };
        let (now, mut frame) = (self.driver.config().clock.now(), [0; MAX_FRAME]);
        let mac = port.learner.interest().mac;
        while port.budget.take() {
            match capture.next(&mut frame) {
                Ok(Some((heading, length))) => {
                    let Some(observation) = observe(&frame[..length], heading, mac) else { continue };
                    let changes = port.learner.take(observation, now);
                    self.changes.extend(changes.into_iter().map(|change| (name.clone(), change)));
                }
                Ok(None) => {
                    port.budget.give_back();
                    return;
                }
                // The port went down, or it is gone.
                Err(error) => {
                    log::debug!("{name}: {error}");
                    self.sieve.close(capture);
                    port.capture = None;
                    self.stale_after_retry();
                    return;
                }
            }
        }
        log::debug!("{name}: more than {FRAMES_PER_SECOND} frames a second; it rests");
        let mut nothing = EpollEvent::new(EpollFlags::empty(), token);
        if self.epoll.modify(capture, &mut nothing).is_ok() {
            self.resting.insert(name.clone(), Instant::now() + REST);
        }
    }

    fn wake_resting(&mut self) {
        let now = Instant::now();
        let rested = |(name, at): (&PortDev, &Instant)| (*at <= now).then(|| name.clone());
        let rested: Vec<_> = self.resting.iter().filter_map(rested).collect();
        for name in rested {
            self.resting.remove(&name);
            let Some(port) = self.ports.get(&name) else { continue };
            let Some(capture) = &port.capture else { continue };
            let mut frames = EpollEvent::new(EpollFlags::EPOLLIN, port.token);
            if let Err(errno) = self.epoll.modify(capture, &mut frames) {
                log::error!(nwfilter_port = name.as_str(); "{name}: no longer listened to: {errno}");
            }
        }
    }

    // ---- what follows ----

    fn end_expired(&mut self) {
        if self.next_expiry.is_none_or(|at| at > self.clock().now()) {
            return;
        }
        match self.driver.expired(self.ports.keys()) {
            Ok(ended) => self.changes.extend(ended),
            Err(error) => log::error!("leases cannot be read: {error}"),
        }
    }

    /// Stores what was observed, and has the driver apply the filters. Failed ports are tried again.
    fn settle(&mut self) {
        let is_due = self.retry_at.is_none() && !self.unsettled.is_empty();
        if self.changes.is_empty() && !is_due {
            return;
        }
        let changes = std::mem::take(&mut self.changes);
        let mut ports = std::mem::take(&mut self.unsettled);
        match self.driver.learned(&changes, &ports) {
            Ok(Settled { complete, refused }) => {
                complete.iter().for_each(|port| self.leave(port));
                let now = self.clock().now();
                for (name, address) in refused {
                    if let Some(port) = self.ports.get_mut(&name) {
                        port.learner.ignore(address, now);
                    }
                }
            }
            Err(error) => {
                log::error!("learned addresses are not in force yet: {}", with_causes(&error));
                ports.extend(changes.into_iter().map(|(port, _)| port));
                self.unsettled = ports;
                self.stale_after_retry();
            }
        }
        self.plan_expiry();
    }

    /// Logs the ports whose DHCP answers are dropped. It runs when frames arrive: a guest that gets no answer asks again.
    fn report_disbelieved(&mut self) {
        if self.told_at.is_some_and(|at| at.elapsed() < RETRY) {
            return;
        }
        self.told_at = Some(Instant::now());
        for port in self.sieve.disbelieved() {
            log::warn!(
                nwfilter_port = port.as_str();
                "{port}: its guest answers DHCP requests of others, which its filter does not let it serve: not believed"
            );
        }
    }

    fn plan_expiry(&mut self) {
        let leasing = |port: &&Port| port.learner.interest().wanted.method == Method::Dhcp;
        if self.ports.values().find(leasing).is_none() {
            self.next_expiry = None;
            return;
        }
        match self.driver.next_expiry(self.ports.keys()) {
            Ok(next) => self.next_expiry = next,
            Err(error) => log::error!("leases cannot be read: {error}"),
        }
    }
}

impl Budget {
    /// Takes one frame from the budget; `false` if none is left.
    fn take(&mut self) -> bool {
        let earned = self.at.elapsed().as_millis() * u128::from(FRAMES_PER_SECOND) / 1000;
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(BURST);
            self.frames = self.frames.saturating_add(earned).min(BURST);
            self.at = Instant::now();
        }
        let may = self.frames > 0;
        self.frames = self.frames.saturating_sub(1);
        may
    }

    /// Returns one frame to the budget, because there was none to read.
    fn give_back(&mut self) {
        self.frames += 1;
    }
}

/// Opens the socket of a port. If the process has too many open files, it first raises its soft limit to the hard limit.
fn open_with_more_files(sieve: &mut Sieve, port: &PortDev, interest: &Interest) -> io::Result<Capture> {
    match sieve.open(port, interest) {
        Err(error) if error.raw_os_error() == Some(Errno::EMFILE as i32) => {
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            if soft >= hard {
                return Err(error);
            }
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
            log::info!(
                "the limit of open files was {soft}, raised to {hard}: every port that learns needs one"
            );
            sieve.open(port, interest)
        }
        opened => opened,
    }
}
