//! What sets hold in the kernel, and which rules ask them.

use std::sync::Arc;

use nwfilter_xml::{SetFamily, SetName, SetRange};

use crate::backend::{Difference, DifferenceKind, KernelObject, Subject};
use crate::error::RulesError;
use crate::packet::IpTest;
use crate::ruleset::{Family, IpRule, Origin, Ruleset};
use crate::tree::Filters;

/// The values that a set holds: ranges that neither overlap nor touch, in ascending order.
///
/// ```
/// use nwfilter_rules::SetContent;
/// use nwfilter_xml::{SetFamily, SetRange};
///
/// let range = |text| SetRange::parse(SetFamily::Ipv4, text);
/// let content = SetContent::of(SetFamily::Ipv4, [range("10.0.0.128/25")?, range("10.0.0.0/25")?]);
/// assert_eq!(content.ranges().iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/24"]);
/// # Ok::<(), nwfilter_xml::BadSetEntry>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetContent {
    family: SetFamily,
    ranges: Vec<SetRange>,
}

/// What a set must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DesiredSet {
    /// This.
    Holds(Arc<SetContent>),
    /// This, where there is no such set: one that is there is not looked into.
    Present(Arc<SetContent>),
    /// There must be no such set.
    Gone,
}

/// How two contents differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetChange {
    /// The ranges that only the new one has, in ascending order.
    pub add: Vec<SetRange>,
    /// The ranges that only the old one has, in ascending order. Their values may be in ranges of the new one.
    pub delete: Vec<SetRange>,
}

impl SetChange {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.delete.is_empty()
    }
}

impl SetContent {
    /// No value.
    pub fn empty(family: SetFamily) -> Self {
        Self { family, ranges: Vec::new() }
    }

    /// The values of these ranges, as far as they are of the family.
    pub fn of(family: SetFamily, ranges: impl IntoIterator<Item = SetRange>) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().filter(|range| range.family() == family).collect();
        if !ranges.is_sorted() {
            ranges.sort_unstable();
        }
        ranges.dedup_by(|next, range| match range.joined_with(*next) {
            Some(joined) => {
                *range = joined;
                true
            }
            None => false,
        });
        Self { family, ranges }
    }

    /// What the values are.
    pub fn family(&self) -> SetFamily {
        self.family
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in ascending order.
    pub fn ranges(&self) -> &[SetRange] {
        &self.ranges
    }

    /// Whether all values of a range are in it.
    pub fn covers(&self, range: SetRange) -> bool {
        let behind = self.ranges.partition_point(|held| held.first() <= range.first());
        self.ranges[..behind].last().is_some_and(|held| held.covers(range))
    }

    /// What makes this content of another one of its family: what to add and what to delete.
    pub fn change_from(&self, old: &SetContent) -> SetChange {
        let mut change = SetChange::default();
        let (mut new, mut old) = (&self.ranges[..], &old.ranges[..]);
        loop {
            // Most of two contents is the same.
            let same = new.iter().zip(old).take_while(|(new, old)| new == old).count();
            (new, old) = (&new[same..], &old[same..]);
            match (new.split_first(), old.split_first()) {
                (None, None) => return change,
                (Some((first, rest)), None) => {
                    change.add.push(*first);
                    new = rest;
                }
                (Some((first, rest)), Some((other, _))) if first < other => {
                    change.add.push(*first);
                    new = rest;
                }
                (_, Some((first, rest))) => {
                    change.delete.push(*first);
                    old = rest;
                }
            }
        }
    }

    /// This content with a change of it made.
    #[must_use]
    pub fn changed(&self, change: &SetChange) -> Self {
        let is_kept = |range: &&SetRange| change.delete.binary_search(range).is_err();
        let kept = self.ranges.iter().filter(is_kept);
        Self::of(self.family, kept.chain(&change.add).copied())
    }
}

/// Entries of each kind that differences of one set show.
const SHOWN: usize = 100;

/// How a set in the kernel differs from what is desired: entry by entry, of very many the first ones. `object` is where
/// it is; `held` is what it holds, if there is one.
pub fn set_differences(
    name: &SetName,
    object: &KernelObject,
    held: Option<&SetContent>,
    desired: &DesiredSet,
) -> Vec<Difference> {
    let difference = |kind, rule| Difference {
        subject: Subject::Set(name.clone()),
        object: object.clone(),
        kind,
        rule,
        origin: None,
    };
    let (held, wanted) = match (held, desired) {
        (None, DesiredSet::Gone) | (Some(_), DesiredSet::Present(_)) => return Vec::new(),
        (Some(held), DesiredSet::Gone) => (Some(held), None),
        (held, DesiredSet::Holds(wanted) | DesiredSet::Present(wanted)) => (held, Some(&**wanted)),
    };
    let whole = |content: &SetContent| format!("set of {}", content.family().holds());
    let mut differences = Vec::new();
    match (held, wanted) {
        (Some(held), None) => differences.push(difference(DifferenceKind::Foreign, whole(held))),
        (None, Some(wanted)) => differences.push(difference(DifferenceKind::Missing, whole(wanted))),
        _ => {}
    }
    let Some(family) = wanted.or(held).map(SetContent::family) else { return differences };
    let none = SetContent::empty(family);
    let SetChange { add, delete } = wanted.unwrap_or(&none).change_from(held.unwrap_or(&none));
    for (kind, ranges) in [(DifferenceKind::Missing, add), (DifferenceKind::Foreign, delete)] {
        differences.extend(ranges.iter().take(SHOWN).map(|range| difference(kind, range.to_string())));
        if let Some(more) = ranges.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            differences.push(difference(kind, format!("… and {more} more")));
        }
    }
    differences.sort();
    differences
}

/// The sets that rules of a ruleset ask, each with one of the rules.
pub fn sets_of(ruleset: &Ruleset) -> impl Iterator<Item = (&SetName, &Origin)> {
    let parts = Family::ALL.into_iter().filter_map(|family| ruleset.ip(family));
    let rules = parts.flat_map(|part| part.from_guest.iter().chain(&part.to_guest));
    rules.flat_map(|rule| {
        rule.matches.iter().filter_map(|m| match &m.test {
            IpTest::Set { name, .. } => Some((name, &rule.origin)),
            _ => None,
        })
    })
}

/// Makes tests of sets of the store of tests of ipsets that have the name of one.
pub(crate) fn resolve(filters: &impl Filters, ruleset: &mut Ruleset) -> Result<(), RulesError> {
    for (family, part) in [(Family::Ipv4, &mut ruleset.ipv4), (Family::Ipv6, &mut ruleset.ipv6)] {
        for rule in part.iter_mut().flat_map(|part| part.from_guest.iter_mut().chain(&mut part.to_guest)) {
            resolve_rule(filters, family, rule)?;
        }
    }
    Ok(())
}

fn resolve_rule(filters: &impl Filters, family: Family, rule: &mut IpRule) -> Result<(), RulesError> {
    let has_ports = rule.matches.iter().any(|m| matches!(m.test, IpTest::IpProtocol(6 | 17)) && !m.negated);
    let origin = &rule.origin;
    for m in &mut rule.matches {
        let IpTest::IpSet { name, directions } = &m.test else { continue };
        let Ok(name) = name.parse::<SetName>() else { continue };
        let Some(held) = filters.set(&name) else { continue };
        let refused = |why: String| Err(RulesError::Inexpressible { origin: origin.clone(), why });
        let direction = match directions[..] {
            [direction] => direction,
            _ => {
                return refused(format!(
                    "the set '{name}' holds single {}: ipsetflags must be 'src' or 'dst'",
                    held.holds()
                ));
            }
        };
        match (held, family) {
            (SetFamily::Ipv4, Family::Ipv6) | (SetFamily::Ipv6, Family::Ipv4) => {
                return refused(format!(
                    "the set '{name}' holds {}, but the rule is on {family}",
                    held.holds()
                ));
            }
            (SetFamily::Port, _) if !has_ports => {
                return refused(format!("the set '{name}' holds ports: use it on tcp or udp"));
            }
            _ => {}
        }
        m.test = IpTest::Set { name, family: held, direction };
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by panicking.
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use nwfilter_xml::{Filter, FilterName, read_binding, read_filter};
    use proptest::prelude::*;

    use super::*;
    use crate::instantiate;

    fn content(values: &[(u16, u16)]) -> SetContent {
        let range = |(a, b): &(u16, u16)| {
            let (first, last) = (u128::from(*a.min(b)), u128::from(*a.max(b)));
            SetRange::new(SetFamily::Port, first, last).unwrap()
        };
        SetContent::of(SetFamily::Port, values.iter().map(range))
    }

    fn values(content: &SetContent) -> BTreeSet<u128> {
        content.ranges().iter().flat_map(|range| range.first()..=range.last()).collect()
    }

    /// Small numbers, so that ranges overlap and touch.
    fn some() -> impl Strategy<Value = Vec<(u16, u16)>> {
        prop::collection::vec((0u16..60, 0u16..60), 0..12)
    }

    proptest! {
        #[test]
        fn a_content_holds_the_values_of_its_ranges_and_none_else(ranges in some()) {
            let made = content(&ranges);
            let expected: BTreeSet<u128> =
                ranges.iter().flat_map(|(a, b)| u128::from(*a.min(b))..=u128::from(*a.max(b))).collect();
            prop_assert_eq!(values(&made), expected.clone());
            prop_assert!(made.ranges().windows(2).all(|pair| pair[0].last() + 1 < pair[1].first()));
            for value in 0..60 {
                let one = SetRange::new(SetFamily::Port, value, value).unwrap();
                prop_assert_eq!(made.covers(one), expected.contains(&value));
            }
        }

        #[test]
        fn a_change_makes_the_new_content_of_the_old_one(old in some(), new in some()) {
            let (old, new) = (content(&old), content(&new));
            let change = new.change_from(&old);
            prop_assert_eq!(change.is_empty(), old == new);
            prop_assert_eq!(old.changed(&change), new.clone());
            let both: Vec<_> = change.add.iter().filter(|range| change.delete.contains(range)).collect();
            prop_assert!(both.is_empty());
        }
    }

    #[test]
    fn ranges_at_the_end_of_a_family_are_joined_too() {
        let all = |text| SetRange::parse(SetFamily::Ipv6, text).unwrap();
        let content = SetContent::of(SetFamily::Ipv6, [all("8000::/1"), all("::/1")]);
        assert_eq!(content.ranges(), [all("::/0")]);
    }

    /// A store of one filter, and of the sets whose names begin with their family.
    struct Store(Filter);

    impl Filters for Store {
        fn filter(&self, _: &FilterName) -> Option<&Filter> {
            Some(&self.0)
        }

        fn set(&self, name: &SetName) -> Option<SetFamily> {
            name.as_str().split('-').next()?.parse().ok()
        }
    }

    fn ruleset(rule: &str) -> Result<Ruleset, RulesError> {
        let filter = format!("<filter name='f'>\n<rule action='drop' direction='in'>{rule}</rule></filter>");
        let binding =
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
            <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/>
            <filterref filter='f'><parameter name='SET' value='port'/></filterref></filterbinding>";
        let filter = read_filter("f.xml", &filter).value.unwrap();
        instantiate(&Store(filter), &read_binding("b.xml", binding).value.unwrap())
    }

    #[test]
    fn a_rule_asks_a_set_of_the_store_by_its_name_and_an_ipset_of_the_host_by_any_other() {
        let named = |rule: &str| {
            let ruleset = ruleset(rule).unwrap();
            sets_of(&ruleset)
                .map(|(name, origin)| (name.to_string(), origin.to_string()))
                .collect::<BTreeMap<_, _>>()
        };
        let expected = BTreeMap::from([("ipv4-admins".to_owned(), "f:2".to_owned())]);
        assert_eq!(named("<tcp ipset='ipv4-admins' ipsetflags='src'/>"), expected);
        assert_eq!(named("<tcp ipset='$SET' ipsetflags='dst'/>").len(), 1);
        assert!(named("<tcp ipset='theirs' ipsetflags='src'/>").is_empty());
        assert!(named("<tcp ipset='a set: theirs' ipsetflags='src'/>").is_empty());
    }

    #[test]
    fn a_set_that_does_not_fit_the_rule_is_refused() {
        for (rule, expected) in [
            (
                "<tcp ipset='ipv6-a' ipsetflags='src'/>",
                "f:2: the set 'ipv6-a' holds IPv6 addresses, but the rule is on IPv4",
            ),
            (
                "<all-ipv6 ipset='ipv4-a' ipsetflags='src'/>",
                "f:2: the set 'ipv4-a' holds IPv4 addresses, but the rule is on IPv6",
            ),
            (
                "<all ipset='port-a' ipsetflags='dst'/>",
                "f:2: the set 'port-a' holds ports: use it on tcp or udp",
            ),
            (
                "<all ipset='mac-a' ipsetflags='src,dst'/>",
                "f:2: the set 'mac-a' holds single MAC addresses: ipsetflags must be 'src' or 'dst'",
            ),
        ] {
            assert_eq!(ruleset(rule).unwrap_err().to_string(), expected);
        }
    }
}
