//! Changes of a draft that can be taken back. A refused transaction costs what it changed, not what the draft holds.

use std::collections::BTreeMap;

use nwfilter_xml::PortDev;

use super::Draft;

/// Takes one change back, if those after it are taken back already.
pub(super) type Undo = Box<dyn FnOnce(&mut Draft<'_>)>;

/// One of the maps of a draft.
type Map<K, V> = for<'m, 'a> fn(&'m mut Draft<'a>) -> &'m mut BTreeMap<K, V>;

impl Draft<'_> {
    /// Gives a key of a map this value, or removes the key. All changes of a transaction are made by this and by
    /// [`Self::forget`].
    pub(super) fn put<K: Clone + Ord + 'static, V: 'static>(
        &mut self,
        map: Map<K, V>,
        key: K,
        value: Option<V>,
    ) {
        let old = set(map(self), key.clone(), value);
        self.undo.push(Box::new(move |draft| drop(set(map(draft), key, old))));
    }

    /// Has the learned addresses of a port forgotten.
    pub(super) fn forget(&mut self, port: &PortDev) {
        if self.change.forgotten.insert(port.clone()) {
            let port = port.clone();
            self.undo.push(Box::new(move |draft| _ = draft.change.forgotten.remove(&port)));
        }
    }

    /// Takes all changes of the last transaction back.
    pub(super) fn take_back(&mut self) {
        while let Some(undo) = self.undo.pop() {
            undo(self);
        }
    }
}

/// Returns the old value.
fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) -> Option<V> {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    }
}
