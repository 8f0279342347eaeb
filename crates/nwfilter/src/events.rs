//! What changed, for those who want to hear of it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nwfilter_xml::{FilterName, PortDev, SetName};

use crate::{BindingState, Driver, DroppedPacket, Error};

/// Events that wait for a subscriber before the next ones are lost to it.
const CAPACITY: usize = 1024;

/// Something that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A filter was put into the store, perhaps in place of one of its name.
    FilterDefined(FilterName),
    /// A filter was taken out of the store.
    FilterUndefined(FilterName),
    /// A set was put into the store, perhaps in place of one of its name.
    SetDefined(SetName),
    /// A set holds something else: entries were added or removed, or its tags' ports came, went or learned addresses.
    SetChanged(SetName),
    /// A set was taken out of the store.
    SetUndefined(SetName),
    /// A set does not hold in the kernel what it must: a reload could not bring it there, and says why.
    SetFailed(SetName),
    /// A port was bound.
    BindingCreated(PortDev),
    /// A bound port was given another binding.
    BindingReplaced(PortDev),
    /// A port was unbound.
    BindingDeleted(PortDev),
    /// The guest at a port has other addresses than before: they were learned, or a lease began or ended.
    AddressChanged {
        /// The port.
        port: PortDev,
        /// How far it is from its filter.
        state: BindingState,
    },
    /// The kernel did not have what the port was meant to have, and was brought back; or it had rules of a port that
    /// does not exist any more, and they were removed.
    DriftRepaired(PortDev),
    /// What all ports share, such as the jumps to their chains, was not as it should have been, and was brought back.
    HostRepaired,
    /// A rule of a port stopped a packet, and the binding asks to log that: at most ten a second and port.
    PacketDropped(Arc<DroppedPacket>),
    /// Within a second a port's rules stopped at least so many packets more than those that were reported.
    DropsSuppressed {
        /// The port.
        port: PortDev,
        /// How many at least.
        at_least: u64,
    },
    /// So many events are missing here, because they were not taken out in time.
    Lost(u64),
}

impl Event {
    /// The set that it is about, if it is about one.
    pub(crate) fn set(&self) -> Option<&SetName> {
        match self {
            Self::SetDefined(name) | Self::SetChanged(name) | Self::SetUndefined(name) => Some(name),
            _ => None,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FilterDefined(name) => write!(f, "filter '{name}' defined"),
            Self::FilterUndefined(name) => write!(f, "filter '{name}' undefined"),
            Self::SetDefined(name) => write!(f, "set '{name}' defined"),
            Self::SetChanged(name) => write!(f, "set '{name}' changed"),
            Self::SetUndefined(name) => write!(f, "set '{name}' undefined"),
            Self::SetFailed(name) => write!(f, "set '{name}' does not hold in the kernel what it must"),
            Self::BindingCreated(port) => write!(f, "port '{port}' bound"),
            Self::BindingReplaced(port) => write!(f, "port '{port}' bound anew"),
            Self::BindingDeleted(port) => write!(f, "port '{port}' unbound"),
            Self::AddressChanged { port, state } => write!(f, "port '{port}': {state}"),
            Self::DriftRepaired(port) => write!(f, "port '{port}' brought back"),
            Self::HostRepaired => f.write_str("what all ports share brought back"),
            Self::PacketDropped(dropped) => dropped.fmt(f),
            Self::DropsSuppressed { port, at_least } => {
                write!(f, "port '{port}': at least {at_least} more packets dropped")
            }
            Self::Lost(count) => write!(f, "{count} events lost"),
        }
    }
}

impl Driver {
    /// What changes from here on, in the order in which it was stored: by this driver, its learning of addresses
    /// included, but not by other processes.
    ///
    /// The driver never waits for a subscriber. At most 1024 events wait to be taken out; what comes while there is
    /// no room is counted, and [`Event::Lost`] stands in its place as soon as there is. Dropping the receiver ends
    /// the subscription.
    pub fn subscribe(&self) -> Receiver<Event> {
        self.feed().subscribe(None)
    }

    /// The same for a main loop, which waits for many things at once by poll(2).
    pub fn event_queue(&self) -> Result<EventQueue, Error> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let failed = |errno: Errno| Error::Events { source: errno.into() };
        let wake = Arc::new(EventFd::from_flags(flags).map_err(failed)?);
        Ok(EventQueue { events: self.feed().subscribe(Some(&wake)), wake })
    }
}

/// The events of a driver, with a file descriptor that is readable while events wait: [`Driver::event_queue`].
///
/// A reader takes events out until there is none. The descriptor may be readable once more than there are events. It is
/// also readable when the driver is gone.
#[derive(Debug)]
pub struct EventQueue {
    events: Receiver<Event>,
    wake: Arc<EventFd>,
}

/// What an [`EventQueue`] has to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next event.
    Event(Event),
    /// No event waits.
    Empty,
    /// No event will come any more, because the driver is gone.
    Closed,
}

impl EventQueue {
    /// Takes the next event out. Never waits.
    pub fn take(&self) -> Next {
        match self.events.try_recv() {
            Ok(event) => return Next::Event(event),
            Err(TryRecvError::Disconnected) => return Next::Closed,
            Err(TryRecvError::Empty) => (),
        }
        // An event that comes from here on makes the descriptor readable again. One that came before is in the channel.
        let _ = self.wake.read();
        match self.events.try_recv() {
            Ok(event) => {
                wake(&self.wake);
                Next::Event(event)
            }
            Err(TryRecvError::Empty) => Next::Empty,
            Err(TryRecvError::Disconnected) => {
                wake(&self.wake);
                Next::Closed
            }
        }
    }
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Makes a descriptor readable. It fails only where the counter is full, and the descriptor is then readable.
fn wake(descriptor: &EventFd) {
    let _ = descriptor.write(1);
}

/// The subscribers of a driver.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    subscribers: Mutex<Vec<Subscriber>>,
}

#[derive(Debug)]
struct Subscriber {
    /// Closed before the descriptor below is woken for the last time: fields are dropped in their order.
    sender: SyncSender<Event>,
    lost: u64,
    wake: Option<Waker>,
}

/// Wakes a reader, the last time when there is nothing to come any more. The descriptor is closed with its queue.
#[derive(Debug)]
struct Waker(Weak<EventFd>);

impl Waker {
    fn wake(&self) {
        if let Some(descriptor) = self.0.upgrade() {
            wake(&descriptor);
        }
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        self.wake();
    }
}

impl Feed {
    fn subscribe(&self, descriptor: Option<&Arc<EventFd>>) -> Receiver<Event> {
        let (sender, events) = sync_channel(CAPACITY);
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        // Queues that are gone, also where nothing happens.
        subscribers.retain(|other| other.wake.as_ref().is_none_or(|waker| waker.0.strong_count() > 0));
        subscribers.push(Subscriber {
            sender,
            lost: 0,
            wake: descriptor.map(|fd| Waker(Arc::downgrade(fd))),
        });
        events
    }

    /// Tells all subscribers of events.
    pub(crate) fn publish(&self, events: impl IntoIterator<Item = Event>) {
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            subscribers.retain_mut(|subscriber| subscriber.take(&event));
        }
        for subscriber in subscribers.iter() {
            subscriber.wake.iter().for_each(Waker::wake);
        }
    }
}

impl Subscriber {
    /// Whether anybody still listens.
    fn take(&mut self, event: &Event) -> bool {
        if self.lost > 0 {
            match self.sender.try_send(Event::Lost(self.lost)) {
                Ok(()) => self.lost = 0,
                Err(TrySendError::Full(_)) => {
                    self.lost += 1;
                    return true;
                }
                Err(TrySendError::Disconnected(_)) => return false,
            }
        }
        match self.sender.try_send(event.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.lost = 1;
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn event(number: usize) -> Event {
        Event::BindingCreated(format!("p{number}").parse().unwrap())
    }

    #[test]
    fn events_that_a_slow_subscriber_misses_are_counted_and_reported_in_their_place() {
        let feed = Feed::default();
        let (slow, fast) = (feed.subscribe(None), feed.subscribe(None));
        feed.publish((0..CAPACITY + 5).map(event));
        let taken: Vec<_> = slow.try_iter().collect();
        assert_eq!(taken, (0..CAPACITY).map(event).collect::<Vec<_>>());
        feed.publish([event(7), event(8)]);
        assert_eq!(slow.try_iter().collect::<Vec<_>>(), [Event::Lost(5), event(7), event(8)]);
        drop(slow);
        feed.publish([event(9)]);
        assert_eq!(feed.subscribers.lock().unwrap().len(), 1);
        assert_eq!(fast.try_iter().count(), CAPACITY);
    }

    fn queue(feed: &Feed) -> EventQueue {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        EventQueue { events: feed.subscribe(Some(&wake)), wake }
    }

    fn is_readable(queue: &EventQueue) -> bool {
        let mut descriptors = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut descriptors, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn a_queue_is_readable_while_events_wait_and_when_the_driver_is_gone() {
        let feed = Feed::default();
        let queue = queue(&feed);
        assert!(!is_readable(&queue));
        assert_eq!(queue.take(), Next::Empty);
        feed.publish([event(1), event(2)]);
        for number in [1, 2] {
            assert!(is_readable(&queue));
            assert_eq!(queue.take(), Next::Event(event(number)));
        }
        assert_eq!(queue.take(), Next::Empty);
        assert!(!is_readable(&queue));
        feed.publish([event(3)]);
        drop(feed);
        assert!(is_readable(&queue));
        assert_eq!(queue.take(), Next::Event(event(3)));
        assert_eq!((queue.take(), queue.take()), (Next::Closed, Next::Closed));
        assert!(is_readable(&queue));
    }

    #[test]
    fn freed_queues_leave_neither_descriptor_nor_subscriber() {
        let feed = Feed::default();
        let gone = queue(&feed);
        let descriptor = Arc::downgrade(&gone.wake);
        drop(gone);
        assert_eq!(descriptor.strong_count(), 0);
        let _kept = queue(&feed);
        assert_eq!(feed.subscribers.lock().unwrap().len(), 1);
    }

    #[test]
    fn no_event_of_another_thread_is_missed_by_polling_the_descriptor() {
        const EVENTS: usize = 1000;
        let feed = Feed::default();
        let queue = queue(&feed);
        let taken = std::thread::scope(|scope| {
            scope.spawn(|| (0..EVENTS).for_each(|number| feed.publish([event(number)])));
            let mut taken = Vec::new();
            while taken.len() < EVENTS {
                let mut descriptors = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
                let ready = poll(&mut descriptors, PollTimeout::from(60_000u16)).unwrap();
                assert_eq!(ready, 1, "{} events came", taken.len());
                while let Next::Event(event) = queue.take() {
                    taken.push(event);
                }
            }
            taken
        });
        assert_eq!(taken, (0..EVENTS).map(event).collect::<Vec<_>>());
    }
}
