//! Ports whose binding libvirt has deleted a moment ago, while they exist and their guest may run.
//!
//! When a running guest's filter is changed, libvirt deletes the binding and then creates the new one, and between
//! the two the port would be open. So the rules of a deleted binding stay for a moment, in which a new binding takes
//! their place in one transaction.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long the rules stay. libvirt creates the new binding within milliseconds of deleting the old.
const STAY: Duration = Duration::from_millis(300);

/// The ports that are leaving, and when they do.
#[derive(Clone, Default)]
pub(crate) struct Leaving(Arc<Mutex<BTreeMap<String, Instant>>>);

impl Leaving {
    /// Has a port leave after a moment, if nothing stops it; then `remove` is called, and no other call of this
    /// value's returns meanwhile.
    pub(crate) fn leave(&self, port: &str, remove: impl FnOnce() + Send + 'static) {
        let when = Instant::now() + STAY;
        self.ports().insert(port.to_owned(), when);
        let (leaving, port) = (self.clone(), port.to_owned());
        thread::spawn(move || {
            thread::sleep(STAY);
            let mut ports = leaving.ports();
            if ports.get(&port) == Some(&when) {
                remove();
                ports.remove(&port);
            }
        });
    }

    /// Stops a port from leaving; whether it was.
    pub(crate) fn stay(&self, port: &str) -> bool {
        self.ports().remove(port).is_some()
    }

    /// Every port that is leaving, none of which does so by itself any more.
    pub(crate) fn take_all(&self) -> Vec<String> {
        std::mem::take(&mut *self.ports()).into_keys().collect()
    }

    pub(crate) fn contains(&self, port: &str) -> bool {
        self.ports().contains_key(port)
    }

    fn ports(&self) -> MutexGuard<'_, BTreeMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_port_leaves_after_a_moment_unless_it_is_to_stay() {
        let leaving = Leaving::default();
        let (sender, left) = channel();
        for port in ["stays", "leaves"] {
            let sender = sender.clone();
            leaving.leave(port, move || sender.send(port).unwrap());
        }
        assert!(leaving.stay("stays") && !leaving.stay("stays"));
        assert!(leaving.contains("leaves"));
        drop(sender);
        assert_eq!(left.iter().collect::<Vec<_>>(), ["leaves"]);
        assert!(!leaving.contains("leaves"));
    }
}
