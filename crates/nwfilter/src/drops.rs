//! Reads which packets the rules of ports stopped, of the ports whose bindings ask for it, and reports them.
//!
//! The rules of such a port report packets to a group of the kernel's packet log before they stop them
//! ([`Ruleset::logging_drops`](nwfilter_rules::Ruleset::logging_drops)). A thread of [`Driver::keep`] reads the group. Each
//! packet becomes a log message and an [`Event::PacketDropped`]. A port has at most ten of these a second; what comes beyond is
//! counted, and reported as [`Event::DropsSuppressed`].

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_explain::{Packet, Way};
use nwfilter_nftables::kernel::{Logged, LoggedPacket, PacketLog};
use nwfilter_rules::{CTRL_LOG_DROPS, LogPrefix, LogSide, Origin};
use nwfilter_xml::{Binding, MacAddr, PortDev};
use serde::Serialize;

use crate::error::with_causes;
use crate::frame;
use crate::learn::engine::Waker;
use crate::{Driver, Error, Event};

/// The packets of a port that are reported in a second, the count of the others included.
const MESSAGES: u32 = 10;
/// The time in which they are counted.
const SECOND: Duration = Duration::from_secs(1);
/// How often a group that another program reads is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Whether a binding asks for it: parameter `CTRL_LOG_DROPS`.
pub(crate) fn are_logged(binding: &Binding) -> Result<bool, Error> {
    let values = binding.params.get(CTRL_LOG_DROPS).unwrap_or_default();
    let Some(value) = values.first() else { return Ok(false) };
    match value.to_ascii_lowercase().as_str() {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(Error::Parameter {
            port: binding.port.clone(),
            name: CTRL_LOG_DROPS,
            value: value.clone(),
            expected: "yes or no",
        }),
    }
}

/// A packet that a rule of a port stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DroppedPacket {
    /// The port.
    pub port: PortDev,
    /// The name of its guest; empty where the port has no binding any more.
    pub guest: String,
    /// Whether the guest sent it, or was to receive it.
    pub way: Way,
    /// Its source address.
    #[serde(serialize_with = "text")]
    pub src_mac: MacAddr,
    /// Its destination address.
    #[serde(serialize_with = "text")]
    pub dst_mac: MacAddr,
    /// The packet, as far as the kernel reports it.
    #[serde(serialize_with = "text")]
    pub packet: Packet,
    /// The rule; that of a filter, or a built-in one.
    pub origin: Origin,
}

fn text<T: fmt::Display, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl fmt::Display for DroppedPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, guest, src_mac, dst_mac, packet, origin, .. } = self;
        let way = if self.way == Way::FromGuest { "out" } else { "in" };
        write!(f, "{port} {way}")?;
        if !guest.is_empty() {
            write!(f, ", guest {guest}")?;
        }
        write!(f, ": {packet}")?;
        // Of frames that are none of IP the addresses are said already.
        if packet.as_ip().is_some() {
            write!(f, " [{src_mac} → {dst_mac}]")?;
        }
        write!(f, " dropped by {origin}")
    }
}

/// The thread that reads the log, until this is dropped.
#[derive(Debug)]
pub(crate) struct DropReader {
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl DropReader {
    /// Starts it in the network namespace of the calling thread.
    pub(crate) fn start(driver: Driver) -> std::io::Result<Self> {
        let waker = Waker::new()?;
        let worker = Worker {
            driver,
            waker: waker.clone(),
            log: None,
            next_try: Instant::now(),
            has_complained: false,
            pace: BTreeMap::new(),
        };
        let thread = std::thread::Builder::new().name("nwfilter-drops".into()).spawn(|| worker.run())?;
        Ok(Self { waker, thread: Some(thread) })
    }
}

impl Drop for DropReader {
    fn drop(&mut self) {
        self.waker.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

struct Worker {
    driver: Driver,
    waker: Arc<Waker>,
    /// `None` until the group can be read.
    log: Option<PacketLog>,
    /// When that is tried next.
    next_try: Instant,
    /// Whether a warning says that it cannot.
    has_complained: bool,
    /// The ports of which packets were stopped in the last second.
    pace: BTreeMap<PortDev, Pace>,
}

/// How many packets of a port were reported in a second.
#[derive(Debug)]
struct Pace {
    begin: Instant,
    reported: u32,
    suppressed: u64,
}

impl Pace {
    fn new(begin: Instant) -> Self {
        Self { begin, reported: 0, suppressed: 0 }
    }

    /// Counts a packet; whether it is to be reported.
    fn take(&mut self) -> bool {
        // One message is for the count of the others.
        let reports = self.reported < MESSAGES - 1;
        match reports {
            true => self.reported += 1,
            false => self.suppressed += 1,
        }
        reports
    }
}

impl Worker {
    fn run(mut self) {
        loop {
            if self.log.is_none() && self.next_try <= Instant::now() {
                self.open();
                // What came meanwhile does not make the socket readable.
                self.read();
            }
            self.wait();
            if self.waker.is_stopped() {
                return;
            }
            self.read();
            self.end_seconds(Instant::now());
        }
    }

    fn open(&mut self) {
        self.next_try = Instant::now() + RETRY;
        let group = self.driver.config().log_group;
        match PacketLog::open(group.0) {
            Ok(Some(log)) => {
                if self.has_complained {
                    log::info!("group {group} of the kernel's packet log is read now");
                }
                (self.log, self.has_complained) = (Some(log), false);
            }
            // Nobody misses what no port asks for.
            Ok(None) if self.has_complained || !self.is_asked() => (),
            Ok(None) => {
                log::warn!(
                    "the drops of ports with {CTRL_LOG_DROPS} are not logged, because another program reads group {group} \
                     of the kernel's packet log: end it, or choose another group (setting log-group)"
                );
                self.has_complained = true;
            }
            Err(error) if self.has_complained => log::debug!("{}", with_causes(&error)),
            Err(error) => {
                log::warn!(
                    "the drops of ports with {CTRL_LOG_DROPS} are not logged, because group {group} of the kernel's packet \
                     log cannot be read: {}",
                    with_causes(&error)
                );
                self.has_complained = true;
            }
        }
    }

    /// Whether a binding asks for it.
    fn is_asked(&self) -> bool {
        let asks = |binding: &Arc<Binding>| are_logged(binding).unwrap_or(false);
        self.driver.look().is_ok_and(|stores| stores.bindings.documents().any(asks))
    }

    /// Waits for packets, for the end of a port's second, or to be woken.
    fn wait(&self) {
        let retry = self.log.is_none().then_some(self.next_try);
        let ends = self.pace.values().map(|pace| pace.begin + SECOND);
        let timeout = match ends.chain(retry).min() {
            // A millisecond more, so that the time is over when the wait ends.
            Some(end) => {
                let wait = end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let descriptors = self.log.iter().map(|log| log.as_fd()).chain([self.waker.as_fd()]);
        let mut descriptors: Vec<_> = descriptors.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(Errno::EINTR) => (),
            Err(errno) => {
                log::error!("waiting for the kernel's packet log: {errno}");
                std::thread::sleep(SECOND);
            }
        }
    }

    fn read(&mut self) {
        let Some(log) = &mut self.log else { return };
        match log.logged() {
            Ok(logged) => {
                for logged in logged {
                    match logged {
                        Logged::Packet(packet) => self.take(&packet),
                        Logged::Missed => log::warn!("more packets were dropped than could be read"),
                    }
                }
            }
            Err(error) => {
                log::error!("the kernel's packet log: {}", with_causes(&error));
                (self.log, self.next_try) = (None, Instant::now() + RETRY);
            }
        }
    }

    /// Reports a packet, or counts it. Those of other programs' rules are ignored.
    fn take(&mut self, logged: &LoggedPacket) {
        let Ok(prefix) = logged.prefix.parse::<LogPrefix>() else { return };
        let Some(packet) = frame::begun(&logged.link, &logged.payload) else { return };
        let Some(port) = self.port(prefix.side, logged, &packet) else { return };
        let pace = self.pace.entry(port.clone()).or_insert_with(|| Pace::new(Instant::now()));
        if !pace.take() {
            return;
        }
        let dropped = self.dropped(port, &prefix, packet);
        // At the level that libvirt's log shows where nothing else is set.
        log::warn!(
            nwfilter_port = dropped.port.as_str(), nwfilter_guest = dropped.guest,
            nwfilter_filter = dropped.origin.filter.as_ref().map_or("", |filter| filter.as_str());
            "{dropped}"
        );
        self.driver.feed().publish([Event::PacketDropped(Arc::new(dropped))]);
    }

    /// The port by its interface. nftables rejects packets to a guest where they enter the bridge: then it is the port with
    /// the guest's address.
    fn port(&self, side: LogSide, logged: &LoggedPacket, packet: &Packet) -> Option<PortDev> {
        let index = match side {
            LogSide::FromGuest => logged.input,
            LogSide::ToGuest => logged.output,
        };
        if let Some(index) = index {
            return nix::net::if_::if_indextoname(index).ok()?.to_str().ok()?.parse().ok();
        }
        let stores = self.driver.look().ok()?;
        let mut bindings = stores.bindings.documents();
        bindings.find(|binding| binding.mac == packet.dst_mac).map(|binding| binding.port.clone())
    }

    fn dropped(&self, port: PortDev, prefix: &LogPrefix, packet: Packet) -> DroppedPacket {
        let way = match prefix.side {
            LogSide::FromGuest => Way::FromGuest,
            LogSide::ToGuest => Way::ToGuest,
        };
        let (mut guest, mut origin) = (String::new(), None);
        if let Ok(stores) = self.driver.look() {
            if let Some(binding) = stores.bindings.get(port.as_str()) {
                guest = binding.owner.name.to_string();
            }
            origin = prefix.origin(stores.filter_map().keys());
        }
        let (src_mac, dst_mac) = (packet.src_mac, packet.dst_mac);
        let origin = origin.unwrap_or(Origin::BUILT_IN);
        DroppedPacket { port, guest, way, src_mac, dst_mac, packet, origin }
    }

    /// Reports what was not reported of the ports whose second is over.
    fn end_seconds(&mut self, now: Instant) {
        let is_over = |pace: &Pace| now.duration_since(pace.begin) >= SECOND;
        let (over, begun) = std::mem::take(&mut self.pace).into_iter().partition(|(_, pace)| is_over(pace));
        self.pace = begun;
        let over: BTreeMap<PortDev, Pace> = over;
        for (port, pace) in over.into_iter().filter(|(_, pace)| pace.suppressed > 0) {
            // The kernel does not report all of them either.
            let at_least = pace.suppressed;
            log::warn!(
                nwfilter_port = port.as_str();
                "{port}: at least {at_least} more packets were dropped within a second (`nwfilterctl counters {port}` \
                 counts all of them)"
            );
            self.driver.feed().publish([Event::DropsSuppressed { port, at_least }]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_ten_messages_a_second_the_count_of_the_others_included() {
        let mut pace = Pace::new(Instant::now());
        assert_eq!((0..1000).filter(|_| pace.take()).count(), 9);
        assert_eq!(pace.suppressed, 991);
    }
}
