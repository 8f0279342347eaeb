//! Ports whose binding libvirt has just deleted, but whose interface exists, so that their guest may run.
//!
//! When the filter of a running guest is changed, libvirt deletes the binding and then creates the new one; between the
//! two the port would be open. So the rules of a deleted binding stay for [`STAY`], and a new binding replaces them in one
//! transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nwfilter_xml::PortDev;

/// How long the rules stay. libvirt creates the new binding some milliseconds after it has deleted the old one.
const STAY: Duration = Duration::from_millis(300);

/// The stage of a leaving port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It leaves at this time, unless it is bound again.
    Waits(Instant),
    /// Its rules are being removed. The lock is not held, because a tool may take a minute.
    Goes,
}

#[derive(Default)]
struct Inner {
    ports: Mutex<BTreeMap<PortDev, Stage>>,
    gone: Condvar,
}

/// The ports that are leaving.
#[derive(Clone, Default)]
pub(crate) struct Leaving(Arc<Inner>);

impl Leaving {
    /// Calls `remove` after [`STAY`], unless the port is bound again.
    pub(crate) fn leave(&self, port: &PortDev, remove: impl Fn() + Send + Sync + 'static) {
        let waits = Stage::Waits(Instant::now() + STAY);
        self.ports().insert(port.clone(), waits);
        let (leaving, name, remove) = (self.clone(), port.clone(), Arc::new(remove));
        let later = remove.clone();
        let thread = thread::Builder::new().name("nwf-leaving".to_owned()).spawn(move || {
            thread::sleep(STAY);
            leaving.remove(&name, waits, &*later);
        });
        if let Err(error) = thread {
            log::warn!("port '{port}' does not wait for another binding: no thread: {error}");
            self.remove(port, waits, &*remove);
        }
    }

    /// Removes a port that is still at this stage.
    fn remove(&self, port: &PortDev, waits: Stage, remove: &dyn Fn()) {
        if self.goes(port, waits) {
            // A thread that binds the port again waits for the end of this, so a panic must not skip it.
            let _ = catch_unwind(AssertUnwindSafe(remove));
            self.ports().remove(port);
            self.0.gone.notify_all();
        }
    }

    /// Begins the removal of a port if it is still at this stage; `false` if it is not.
    fn goes(&self, port: &PortDev, waits: Stage) -> bool {
        let mut ports = self.ports();
        let stage = ports.get_mut(port).filter(|stage| **stage == waits);
        stage.map(|stage| *stage = Stage::Goes).is_some()
    }

    /// Stops a port from leaving; `false` if it is not leaving. Waits if its rules are being removed.
    pub(crate) fn stay(&self, port: &PortDev) -> bool {
        let is_going = |ports: &mut BTreeMap<PortDev, Stage>| ports.get(port) == Some(&Stage::Goes);
        self.wait_while(is_going).remove(port).is_some()
    }

    /// Takes over all leaving ports, for the caller to remove. Waits for removals that have begun.
    pub(crate) fn take_all(&self) -> Vec<PortDev> {
        let is_going =
            |ports: &mut BTreeMap<PortDev, Stage>| ports.values().any(|stage| *stage == Stage::Goes);
        std::mem::take(&mut *self.wait_while(is_going)).into_keys().collect()
    }

    /// Whether a port is leaving. Does not wait.
    pub(crate) fn contains(&self, port: &PortDev) -> bool {
        self.ports().contains_key(port)
    }

    /// Every port that is leaving. Does not wait.
    pub(crate) fn names(&self) -> BTreeSet<PortDev> {
        self.ports().keys().cloned().collect()
    }

    fn ports(&self) -> MutexGuard<'_, BTreeMap<PortDev, Stage>> {
        self.0.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(
        &self,
        condition: impl FnMut(&mut BTreeMap<PortDev, Stage>) -> bool,
    ) -> MutexGuard<'_, BTreeMap<PortDev, Stage>> {
        self.0.gone.wait_while(self.ports(), condition).unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn port(name: &str) -> PortDev {
        name.parse().unwrap()
    }

    #[test]
    fn a_port_leaves_after_a_moment_unless_it_is_to_stay() {
        let leaving = Leaving::default();
        let (sender, left) = channel();
        for name in ["stays", "leaves"] {
            let sender = sender.clone();
            leaving.leave(&port(name), move || sender.send(name).unwrap());
        }
        assert!(leaving.stay(&port("stays")) && !leaving.stay(&port("stays")));
        assert!(leaving.contains(&port("leaves")));
        drop(sender);
        assert_eq!(left.iter().collect::<Vec<_>>(), ["leaves"]);
        assert!(!leaving.contains(&port("leaves")));
    }

    #[test]
    fn a_removal_holds_up_who_binds_the_port_again_but_not_who_looks() {
        let leaving = Leaving::default();
        let ((begin, begun), (finish, finished)) = (channel(), channel::<()>());
        let finished = Mutex::new(finished);
        leaving.leave(&port("port"), move || {
            begin.send(()).unwrap();
            finished.lock().unwrap().recv().unwrap();
        });
        begun.recv().unwrap();
        assert!(leaving.contains(&port("port")) && leaving.names().contains(&port("port")));
        assert!(!leaving.contains(&port("other")) && !leaving.stay(&port("other")));
        let again = leaving.clone();
        let stays = thread::spawn(move || again.stay(&port("port")));
        assert!(!stays.is_finished());
        finish.send(()).unwrap();
        assert!(!stays.join().unwrap(), "the rules are gone, so the port is bound as a new one");
        assert!(!leaving.contains(&port("port")));
    }
}
