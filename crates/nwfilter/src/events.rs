//! What changed, for those who want to hear of it.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};

use nwfilter_xml::{FilterName, PortDev};

use crate::{BindingState, Driver};

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
    /// So many events are missing here, because they were not taken out in time.
    Lost(u64),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FilterDefined(name) => write!(f, "filter '{name}' defined"),
            Self::FilterUndefined(name) => write!(f, "filter '{name}' undefined"),
            Self::BindingCreated(port) => write!(f, "port '{port}' bound"),
            Self::BindingReplaced(port) => write!(f, "port '{port}' bound anew"),
            Self::BindingDeleted(port) => write!(f, "port '{port}' unbound"),
            Self::AddressChanged { port, state } => write!(f, "port '{port}': {state}"),
            Self::DriftRepaired(port) => write!(f, "port '{port}' brought back"),
            Self::HostRepaired => f.write_str("what all ports share brought back"),
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
        self.feed().subscribe()
    }
}

/// The subscribers of a driver.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    subscribers: Mutex<Vec<Subscriber>>,
}

#[derive(Debug)]
struct Subscriber {
    sender: SyncSender<Event>,
    lost: u64,
}

impl Feed {
    fn subscribe(&self) -> Receiver<Event> {
        let (sender, events) = sync_channel(CAPACITY);
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        subscribers.push(Subscriber { sender, lost: 0 });
        events
    }

    /// Tells all subscribers of events.
    pub(crate) fn publish(&self, events: impl IntoIterator<Item = Event>) {
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            subscribers.retain_mut(|subscriber| subscriber.take(&event));
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
    use super::*;

    fn event(number: usize) -> Event {
        Event::BindingCreated(format!("p{number}").parse().unwrap())
    }

    #[test]
    fn what_a_slow_subscriber_misses_is_counted_and_told_in_its_place() {
        let feed = Feed::default();
        let (slow, fast) = (feed.subscribe(), feed.subscribe());
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
}
