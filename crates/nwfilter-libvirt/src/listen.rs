//! The listener: connects to libvirt, binds and unbinds ports, follows events, and reconnects.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nwfilter::{Driver, Error, with_causes};
use nwfilter_xml::{Uuid, read_domain};
use virt::error::Error as VirtError;

use crate::events::{Connection, Event, OpenError};
use crate::guard::{Guard, GuardError};
use crate::sync::{Guest, Plan};

/// The first and the longest pause before an attempt to reconnect. Each pause is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// How often the guard is opened for ports that others have bound.
const TICK: Duration = Duration::from_secs(1);
/// How often guests with a refused port are tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Follows the guests of a libvirt, and keeps a driver in step with them.
///
/// ```no_run
/// use nwfilter::{Config, Driver};
/// use nwfilter_xtables::Xtables;
/// use nwfilter_libvirt::{Guard, Listener};
///
/// let driver = Driver::open(Config::default(), Xtables::default())?;
/// let listener = Listener::new(Some("qemu:///system"), Some(Guard::new("vnet")?));
/// let stopper = listener.stopper();
/// // … hand `stopper` to whatever ends the program; then:
/// listener.run(&driver, |status| println!("{status}"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Listener {
    uri: Option<String>,
    guard: Option<Guard>,
    sender: Sender<Event>,
    events: Receiver<Event>,
    /// Guests with a port that was refused.
    pending: BTreeSet<Uuid>,
    pulse: Pulse,
}

/// Shows from any thread whether a [`Listener`] works: while it does, it beats about once a second.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<AtomicU64>);

/// Ends a [`Listener`], from any thread.
#[derive(Clone)]
pub struct Stopper(Sender<Event>);

/// What a listener is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The bindings are enforced, and the guard, if any, is in place. Guests may be started.
    Ready,
    /// The ports of all running guests are bound as their XML says, and events are followed.
    Following {
        /// How many guests run.
        guests: usize,
    },
    /// There is no connection. Rules stay in force.
    Disconnected {
        /// Why.
        why: String,
        /// When the next attempt is made.
        pause: Duration,
    },
}

/// Why a listener cannot do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The stores cannot be read.
    #[error("the bindings cannot be read")]
    Driver(#[from] Error),
    /// The ports cannot be kept closed.
    #[error("the guard")]
    Guard(#[from] GuardError),
}

/// Why a connection is not followed any more.
enum End {
    Stopped,
    Lost(String),
}

/// What ends following a connection, other than a stop.
enum Failure {
    Connection(String),
    Listener(ListenError),
}

impl Listener {
    /// A listener to the libvirt at a URI, or at libvirt's default URI. Without a guard, ports are open from the start of
    /// their guest until its event arrives.
    pub fn new(uri: Option<&str>, guard: Option<Guard>) -> Self {
        let (sender, events) = channel();
        Self {
            uri: uri.map(str::to_owned),
            guard,
            sender,
            events,
            pending: BTreeSet::new(),
            pulse: Pulse::default(),
        }
    }

    /// A value that ends this listener.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.sender.clone())
    }

    /// A value that shows whether this listener works.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Listens until it is stopped. Filters, bindings and guard stay when it ends.
    ///
    /// Failures of single guests and of the connection are logged or reported as status, and tried again. An error is
    /// returned only if no work is possible at all.
    pub fn run(mut self, driver: &Driver, mut report: impl FnMut(Status)) -> Result<(), ListenError> {
        self.prepare(driver)?;
        report(Status::Ready);
        let mut pause = PAUSES.0;
        for number in 0.. {
            let why = match self.follow(number, driver, &mut report) {
                Ok(End::Stopped) => return Ok(()),
                Ok(End::Lost(why)) => {
                    pause = PAUSES.0;
                    why
                }
                Err(Failure::Connection(why)) => why,
                Err(Failure::Listener(error)) => return Err(error),
            };
            report(Status::Disconnected { why, pause });
            if self.stopped_within(pause, driver)? {
                break;
            }
            pause = (pause * 2).min(PAUSES.1);
        }
        Ok(())
    }

    /// Closes ports without a binding, and enforces the existing bindings.
    fn prepare(&mut self, driver: &Driver) -> Result<(), ListenError> {
        match driver.reload() {
            Ok(reloaded) => {
                reloaded.failed.iter().for_each(|failed| log::error!("{}", with_causes(failed)));
                reloaded.failed_sets.iter().for_each(|failed| log::error!("{}", with_causes(failed)));
            }
            Err(error) => {
                log::error!(
                    "the kernel could not be brought to what the bindings ask for: {}",
                    with_causes(&error)
                );
            }
        }
        match self.guard {
            Some(_) => self.open_bound(driver),
            None => {
                // A guard of an earlier run. Without nft there is none.
                if let Err(error) = Guard::remove() {
                    log::debug!("{error}");
                }
                Ok(())
            }
        }
    }

    /// Connects, brings the bindings of all guests up to date, and then those of each guest that has an event.
    fn follow(
        &mut self,
        number: u64,
        driver: &Driver,
        report: &mut impl FnMut(Status),
    ) -> Result<End, Failure> {
        let connection = Connection::open(self.uri.as_deref(), number, &self.sender)?;
        let guests: Vec<_> = connection.domains()?.into_iter().filter_map(guest).collect();
        let running = guests.iter().filter(|guest| matches!(guest, Guest::Running(_))).count();
        self.pending.clear();
        self.bring(driver, &guests)?;
        report(Status::Following { guests: running });

        let mut retried = Instant::now();
        loop {
            let mut changed = match self.next_events(&connection) {
                Ok(changed) => changed,
                Err(end) => return Ok(end),
            };
            if retried.elapsed() >= RETRY {
                retried = Instant::now();
                changed.append(&mut self.pending);
            }
            let mut guests = Vec::new();
            for uuid in changed {
                guests.extend(guest((uuid, connection.domain(uuid)?)));
            }
            if guests.is_empty() {
                self.open_bound(driver)?;
            } else {
                self.bring(driver, &guests)?;
            }
        }
    }

    /// The domains of all waiting events. Waits up to a tick for the first.
    fn next_events(&self, connection: &Connection) -> Result<BTreeSet<Uuid>, End> {
        self.pulse.beat();
        let mut changed = BTreeSet::new();
        let mut wait = TICK;
        loop {
            match self.events.recv_timeout(wait) {
                Ok(Event::Domain(uuid)) => changed.insert(uuid),
                Ok(Event::Closed(number)) if number == connection.number() => {
                    return Err(End::Lost("the connection was closed".into()));
                }
                Ok(Event::Closed(_)) => false,
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return Err(End::Stopped),
                Err(RecvTimeoutError::Timeout) => return Ok(changed),
            };
            wait = Duration::ZERO;
        }
    }

    /// Brings the bindings of these guests, and then the guard, up to date.
    fn bring(&mut self, driver: &Driver, guests: &[Guest]) -> Result<(), ListenError> {
        let plan = Plan::new(driver, guests)?;
        if let Some(guard) = &mut self.guard {
            guard.close(plan.unbinds())?;
        }
        let synced = plan.carry_out(driver);
        log::debug!("bound {:?}, unbound {:?}", synced.bound, synced.unbound);
        for refused in synced.refused {
            log::error!("{}", with_causes(&refused));
            self.pending.insert(refused.uuid);
        }
        self.open_bound(driver)
    }

    /// Opens the guard for the ports that have a binding.
    fn open_bound(&mut self, driver: &Driver) -> Result<(), ListenError> {
        if let Some(guard) = &mut self.guard {
            guard.open(driver.bindings()?.iter().map(|binding| binding.port.clone()).collect())?;
        }
        Ok(())
    }

    /// Waits for `pause`; `true` if the listener was stopped meanwhile.
    fn stopped_within(&mut self, pause: Duration, driver: &Driver) -> Result<bool, ListenError> {
        let until = Instant::now() + pause;
        loop {
            self.pulse.beat();
            let left = until.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left.min(TICK)) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(true),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(false),
                // Events of guests are caught up with after connecting.
                Ok(_) | Err(RecvTimeoutError::Timeout) => self.open_bound(driver)?,
            }
        }
    }
}

impl Pulse {
    /// The number of beats.
    pub fn beats(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Stopper {
    /// Stops the listener.
    pub fn stop(&self) {
        // If it has ended already, nobody receives this.
        let _ = self.0.send(Event::Stop);
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Status::Ready => f.write_str("the bindings are enforced"),
            Status::Following { guests } => write!(f, "following {guests} running guests"),
            Status::Disconnected { why, pause } => {
                write!(f, "no connection: {why}; next attempt in {pause:?}")
            }
        }
    }
}

impl From<VirtError> for Failure {
    fn from(error: VirtError) -> Self {
        Self::Connection(error.message().to_owned())
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        Self::Connection(error.to_string())
    }
}

impl From<ListenError> for Failure {
    fn from(error: ListenError) -> Self {
        Self::Listener(error)
    }
}

/// Reads a domain's XML. A guest whose XML cannot be read is left as it is.
fn guest((uuid, xml): (Uuid, Option<String>)) -> Option<Guest> {
    let Some(xml) = xml else { return Some(Guest::Ended(uuid)) };
    match read_domain(&format!("domain {uuid}"), &xml).into_result() {
        Ok(domain) => Some(Guest::Running(domain)),
        Err(problems) => {
            log::error!("{problems}");
            None
        }
    }
}
