//! The clock by which leases begin and end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The clock by which leases begin and end. Clones show the same time.
#[derive(Clone)]
pub struct Clock(Time);

#[derive(Clone)]
enum Time {
    System,
    /// Seconds since the epoch.
    Set(Arc<AtomicU64>),
}

impl Clock {
    /// The system's.
    pub fn system() -> Self {
        Self(Time::System)
    }

    /// A clock for tests: it shows the present, and stands still until [`Clock::advance`] moves it.
    ///
    /// ```
    /// use std::time::Duration;
    /// use nwfilter::{Clock, Config};
    ///
    /// let mut config = Config::new("/srv/filters", "/run/filters");
    /// config.clock = Clock::standing();
    /// let clock = config.clock.clone();
    /// // ... a driver is opened with the configuration, and a guest gets a lease of an hour ...
    /// clock.advance(Duration::from_secs(3600));
    /// // ... and now the lease is over.
    /// ```
    pub fn standing() -> Self {
        Self(Time::Set(Arc::new(AtomicU64::new(present()))))
    }

    /// Moves a standing clock forward. No effect on the system's. A driver that learns notices it when it has something
    /// to do, and at the latest after half a minute.
    pub fn advance(&self, by: Duration) {
        if let Time::Set(time) = &self.0 {
            time.fetch_add(by.as_secs(), Ordering::Release);
        }
    }

    /// Seconds since the epoch.
    pub(crate) fn now(&self) -> u64 {
        match &self.0 {
            Time::System => present(),
            Time::Set(time) => time.load(Ordering::Acquire),
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Time::System => f.write_str("Clock::system()"),
            Time::Set(time) => write!(f, "Clock({})", time.load(Ordering::Acquire)),
        }
    }
}

fn present() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
