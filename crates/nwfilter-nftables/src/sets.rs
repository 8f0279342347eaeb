//! Sets of the store as interval sets of the table: `set set-NAME { type ipv4_addr; flags interval; }`.
//!
//! A change of a set changes elements and no rules. The ranges of a set never touch, so that the kernel never has to tell the end
//! of one from the beginning of the next.

use std::sync::Arc;

use nwfilter_xml::{SetFamily, SetName, SetRange};

use crate::kernel::{self, Datatype, Element, ElementKey, Set};
use crate::layout;

/// The prefix of sets of the store. No other set of the table starts with it.
const PREFIX: &str = "set-";

/// The types of keys.
const TYPES: [(SetFamily, Datatype); 4] = [
    (SetFamily::Ipv4, Datatype::Ipv4Addr),
    (SetFamily::Ipv6, Datatype::Ipv6Addr),
    (SetFamily::Mac, Datatype::EtherAddr),
    (SetFamily::Port, Datatype::InetService),
];

/// The name of a set in the table.
pub(crate) fn kernel_name(set: &SetName) -> kernel::SetName {
    // Each character of a set's name can be in a name of the kernel.
    layout::fixed(&format!("{PREFIX}{set}"))
}

/// The set of the store that has this name in the table.
pub(crate) fn name_of(set: &kernel::SetName) -> Option<SetName> {
    set.as_str().strip_prefix(PREFIX)?.parse().ok()
}

/// The set in the table.
pub(crate) fn kernel_set(name: &SetName, family: SetFamily) -> Arc<Set> {
    let row = TYPES.iter().find(|(of, _)| *of == family);
    let key = row.map_or(Datatype::Ipv4Addr, |(_, datatype)| *datatype);
    Arc::new(Set::new(kernel_name(name), [key]).interval())
}

/// The content of a set of the table, if it is one of the store.
pub(crate) fn family_of(set: &Set) -> Option<SetFamily> {
    let name = name_of(&set.name)?;
    let (family, _) = TYPES.iter().find(|(_, datatype)| set.key == [*datatype])?;
    (*kernel_set(&name, *family) == *set).then_some(*family)
}

/// The elements of these ranges.
pub(crate) fn elements(ranges: &[SetRange]) -> Vec<Element> {
    ranges.iter().map(|range| Element::new(key(*range))).collect()
}

fn key(range: SetRange) -> ElementKey {
    let bytes = |value: u128| value.to_be_bytes()[16 - range.family().bytes()..].to_vec();
    match range.first() == range.last() {
        true => ElementKey::One(bytes(range.first())),
        false => ElementKey::Range(bytes(range.first()), bytes(range.last())),
    }
}

/// The range of an element.
pub(crate) fn range_of(family: SetFamily, element: &Element) -> Option<SetRange> {
    let value = |bytes: &[u8]| bytes.iter().fold(0, |value, byte| value << 8 | u128::from(*byte));
    let (first, last) = match &element.key {
        ElementKey::One(key) => (value(key), value(key)),
        ElementKey::Range(from, to) => (value(from), value(to)),
    };
    SetRange::new(family, first, last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by panicking.
mod tests {
    use super::*;

    #[test]
    fn a_range_is_written_as_an_element_and_read_back() {
        for (family, text) in [
            (SetFamily::Ipv4, "10.0.0.1"),
            (SetFamily::Ipv4, "0.0.0.0/0"),
            (SetFamily::Ipv6, "fd00::/8"),
            (SetFamily::Mac, "52:54:00:00:00:01"),
            (SetFamily::Port, "8000-8080"),
        ] {
            let range = SetRange::parse(family, text).unwrap();
            let [element] = &elements(&[range])[..] else { panic!("{text}") };
            assert_eq!(range_of(family, element), Some(range));
            let set = kernel_set(&"admins".parse().unwrap(), family);
            assert_eq!((set.name.as_str(), family_of(&set)), ("set-admins", Some(family)));
        }
    }

    #[test]
    fn a_set_with_another_layout_is_not_taken_for_ours() {
        let ours = kernel_set(&"admins".parse().unwrap(), SetFamily::Ipv4);
        assert_eq!(family_of(&Set { size: Some(3), ..(*ours).clone() }), None);
        assert_eq!(family_of(&Set::new(layout::fixed("same-bytes"), [Datatype::Ipv4Addr]).interval()), None);
    }
}
