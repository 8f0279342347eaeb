//! Sets of the store as ipsets of our own: `nwfilter-NAME`, of the types `hash:net`, `hash:mac` and `bitmap:port`.
//!
//! All changes of a batch are one run of `ipset restore`. A small change adds elements, then deletes others, so that
//! what both contents hold is in the set all the time. A large one, or one of a set that others changed, fills a set
//! `nwfilter~NAME` and swaps the two, which the kernel does at once. What a process was killed over is removed by the
//! next change.
//!
//! The kernel does not tell who changes an ipset. What was written is remembered; what others changed is noticed where
//! the tool refuses a change, and by everything that looks at differences, which reads the sets anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nwfilter_rules::{ApplyError, DesiredSet, Difference, KernelObject, SetContent, set_differences};
use nwfilter_xml::{SetFamily, SetName, SetRange};

use crate::tool;

/// How our ipsets are named, and those that are filled to be swapped.
const OWN: &str = "nwfilter-";
const FILLED: &str = "nwfilter~";
/// Elements that an ipset may have. Ranges of addresses are several networks.
const MAX_ELEMENTS: usize = 1 << 20;
/// Changes of more elements are made by a swap.
const MAX_IN_PLACE: usize = 256;
/// What the tool calls the table in differences.
const TABLE: &str = "ipset";

/// The name of a set's ipset.
pub(crate) fn ipset_name(set: &SetName) -> String {
    format!("{OWN}{set}")
}

/// What our ipsets hold, as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    namespace: Option<(u64, u64)>,
    held: BTreeMap<SetName, Held>,
}

/// An ipset of ours.
#[derive(Clone, Debug)]
struct Held {
    /// `None` if it is of another type than ours are.
    content: Option<Arc<SetContent>>,
    /// Whether its elements are those that this module writes for the content.
    is_regular: bool,
}

impl Held {
    /// One that is there, whatever it holds.
    const UNKNOWN: Self = Self { content: None, is_regular: false };
}

/// What has to be done, before the rules change and after.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Sets that are made or get another content, with what they held; `None` if they were not there.
    made: Vec<(SetName, Option<Held>, Arc<SetContent>)>,
    gone: Vec<SetName>,
    pub(crate) differences: Vec<Difference>,
}

impl Changes {
    /// The sets that change.
    pub(crate) fn changed(&self) -> BTreeSet<SetName> {
        self.made.iter().map(|(name, ..)| name).chain(&self.gone).cloned().collect()
    }
}

impl Sets {
    /// What brings the ipsets to what is desired. `verify` reads all of them that are named; else only what is not known
    /// is read.
    pub(crate) fn changes(
        &mut self,
        desired: &BTreeMap<SetName, DesiredSet>,
        verify: bool,
    ) -> Result<Changes, ApplyError> {
        let mut changes = Changes::default();
        if desired.is_empty() {
            return Ok(changes);
        }
        self.enter()?;
        let is_unknown = |name: &&SetName| verify || !self.held.contains_key(*name);
        let unknown: Vec<_> = desired.keys().filter(is_unknown).cloned().collect();
        let there = if unknown.is_empty() { BTreeSet::new() } else { names_of(OWN)? };
        let mut only_there = BTreeSet::new();
        for name in unknown {
            self.held.remove(&name);
            match desired.get(&name) {
                _ if !there.contains(name.as_str()) => {}
                // It takes long to read a large set, and nothing depends on what it holds.
                Some(DesiredSet::Present(_)) if !verify => drop(only_there.insert(name)),
                Some(DesiredSet::Gone) if !verify => drop(self.held.insert(name, Held::UNKNOWN)),
                _ => drop(self.held.insert(name.clone(), read(&name)?)),
            }
        }
        for (name, desired) in desired.iter().filter(|(name, _)| !only_there.contains(*name)) {
            let held = self.held.get(name);
            let content = held.and_then(|held| held.content.as_deref());
            match desired {
                DesiredSet::Gone if held.is_some() => changes.gone.push(name.clone()),
                DesiredSet::Gone => {}
                DesiredSet::Present(_) if held.is_some() && !verify => {}
                DesiredSet::Holds(wanted) | DesiredSet::Present(wanted) => {
                    if !held.is_some_and(|held| held.is_regular && content == Some(wanted)) {
                        changes.made.push((name.clone(), held.cloned(), wanted.clone()));
                    }
                }
            }
            if verify {
                let object = KernelObject::Set { table: TABLE.to_owned(), set: ipset_name(name) };
                let desired = match desired {
                    DesiredSet::Present(wanted) => &DesiredSet::Holds(wanted.clone()),
                    other => other,
                };
                changes.differences.extend(set_differences(name, &object, content, desired));
            }
        }
        Ok(changes)
    }

    /// Makes the sets, before rules ask them.
    pub(crate) fn make(&mut self, changes: &mut Changes) -> Result<(), ApplyError> {
        if changes.made.is_empty() {
            return Ok(());
        }
        if let Err(error) = changes.script()?.run() {
            self.take_back(changes);
            // Where others changed a set, it is only now what it was thought to be.
            for held in changes.made.iter_mut().filter_map(|(_, held, _)| held.as_mut()) {
                held.is_regular = held.content.is_some();
            }
            log::debug!("the ipsets are changed once more: {error}");
            if let Err(error) = changes.script()?.run() {
                self.take_back(changes);
                return Err(error);
            }
        }
        for (name, _, content) in &changes.made {
            self.held.insert(name.clone(), Held { content: Some(content.clone()), is_regular: true });
        }
        Ok(())
    }

    /// Brings the sets back to what they held.
    pub(crate) fn take_back(&mut self, changes: &Changes) {
        if changes.made.is_empty() {
            return;
        }
        let take_back = |sets: &mut Self| {
            let there = names_of(OWN)?;
            for (name, held, _) in &changes.made {
                sets.held.remove(name);
                let mut script = Script::default();
                match held.as_ref().and_then(|held| held.content.as_ref()) {
                    None if there.contains(name.as_str()) => script.destroy(name),
                    Some(old) if there.contains(name.as_str()) => {
                        script.set(name, Some(&read(name)?), old)?
                    }
                    Some(old) => script.set(name, None, old)?,
                    None => {}
                }
                script.finished()?.run()?;
            }
            Ok::<_, ApplyError>(())
        };
        if let Err(error) = take_back(self) {
            log::error!("the change of ipsets could not be taken back: {error}");
        }
    }

    /// Destroys sets that no rule asks any more. One that a rule of others asks stays, until the next time.
    pub(crate) fn destroy(&mut self, changes: &Changes) {
        for name in &changes.gone {
            self.held.remove(name);
            let mut script = Script::default();
            script.destroy(name);
            if let Err(error) = script.run() {
                log::warn!("the ipset {} stays: {error}", ipset_name(name));
            }
        }
    }

    /// Forgets what is known where the network namespace is another one.
    fn enter(&mut self) -> Result<(), ApplyError> {
        const FILE: &str = "/proc/thread-self/ns/net";
        let file = std::fs::metadata(FILE).map_err(|source| ApplyError::Io { path: FILE.into(), source })?;
        let namespace = (file.dev(), file.ino());
        if self.namespace != Some(namespace) {
            *self = Self { namespace: Some(namespace), held: BTreeMap::new() };
        }
        Ok(())
    }

    /// All ipsets of ours.
    pub(crate) fn installed() -> Result<BTreeSet<SetName>, ApplyError> {
        let names = names_of(OWN)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

impl Changes {
    fn script(&self) -> Result<Script, ApplyError> {
        let mut script = Script::default();
        for (name, held, content) in &self.made {
            script.set(name, held.as_ref(), content)?;
        }
        script.finished()
    }
}

// ---- the tool's language ----

/// The input of one `ipset restore`.
#[derive(Debug, Default)]
struct Script {
    text: String,
    /// How many lines there are after each set's.
    lines: Vec<(usize, SetName)>,
    /// Whether it fills sets that are swapped.
    fills: bool,
}

impl Script {
    /// Brings a set to a content.
    fn set(&mut self, name: &SetName, held: Option<&Held>, wanted: &SetContent) -> Result<(), ApplyError> {
        let own = ipset_name(name);
        let old = held.and_then(|held| held.content.as_deref());
        match (held, old.filter(|old| old.family() == wanted.family())) {
            (Some(held), Some(old)) => {
                let change = if held.is_regular { in_place(old, wanted) } else { None };
                match change {
                    Some((add, delete)) => {
                        self.elements("add", &own, &add);
                        self.elements("del", &own, &delete);
                    }
                    None => {
                        let filled = format!("{FILLED}{name}");
                        self.fills = true;
                        self.create(name, &filled, wanted)?;
                        self.line(format_args!("swap {filled} {own}"));
                        self.line(format_args!("destroy {filled}"));
                    }
                }
            }
            (Some(_), None) => {
                self.line(format_args!("destroy {own}"));
                self.create(name, &own, wanted)?;
            }
            (None, _) => self.create(name, &own, wanted)?,
        }
        self.lines.push((self.text.lines().count(), name.clone()));
        Ok(())
    }

    fn create(&mut self, name: &SetName, ipset: &str, wanted: &SetContent) -> Result<(), ApplyError> {
        let elements = elements(wanted.ranges());
        if elements.len() > MAX_ELEMENTS {
            let why = format!(
                "its ranges are {} networks, and an ipset has at most {MAX_ELEMENTS}: write networks in place of \
                 ranges, or use the backend nftables",
                elements.len()
            );
            return Err(ApplyError::Set { set: name.clone(), why });
        }
        // A table that is large enough from the beginning does not have to grow.
        let buckets = elements.len().next_power_of_two().clamp(64, 1 << 18);
        let kind = match wanted.family() {
            SetFamily::Ipv4 => format!("hash:net family inet hashsize {buckets} maxelem {MAX_ELEMENTS}"),
            SetFamily::Ipv6 => format!("hash:net family inet6 hashsize {buckets} maxelem {MAX_ELEMENTS}"),
            SetFamily::Mac => format!("hash:mac hashsize {buckets} maxelem {MAX_ELEMENTS}"),
            SetFamily::Port => "bitmap:port range 0-65535".to_owned(),
        };
        self.line(format_args!("create {ipset} {kind}"));
        self.elements("add", ipset, &elements);
        Ok(())
    }

    fn elements(&mut self, verb: &str, ipset: &str, elements: &[SetRange]) {
        elements.iter().for_each(|element| self.line(format_args!("{verb} {ipset} {element}")));
    }

    fn destroy(&mut self, name: &SetName) {
        self.line(format_args!("destroy {}", ipset_name(name)));
        self.lines.push((self.text.lines().count(), name.clone()));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{line}");
    }

    /// With what killed processes left removed first, where that could be in the way.
    fn finished(mut self) -> Result<Self, ApplyError> {
        if self.fills {
            let leftovers = names_of(FILLED)?;
            let lines: String = leftovers.iter().map(|name| format!("destroy {FILLED}{name}\n")).collect();
            self.lines.iter_mut().for_each(|(line, _)| *line += leftovers.len());
            self.text.insert_str(0, &lines);
        }
        Ok(self)
    }

    fn run(&self) -> Result<(), ApplyError> {
        let Self { text, lines, .. } = self;
        if text.is_empty() {
            return Ok(());
        }
        let Err(said) = ipset(&["restore"], Some(text))? else { return Ok(()) };
        // "ipset v7.17: Error in line 3: Set cannot be created: set with the same name already exists"
        let rest = said.split_once("Error in line ").map(|(_, rest)| rest);
        let (number, why) = rest.and_then(|rest| rest.split_once(": ")).unwrap_or(("", &said));
        let number = number.parse().unwrap_or(usize::MAX);
        let set = lines.iter().find(|(end, _)| number <= *end).or(lines.last());
        let mut why = why.trim().to_owned();
        if why.ends_with("set type not supported") {
            why.push_str(" (modules ip_set_hash_net, ip_set_hash_mac and ip_set_bitmap_port): use the backend nftables");
        }
        Err(match set {
            Some((_, set)) => ApplyError::Set { set: set.clone(), why },
            None => tool::unavailable("ipset".to_owned(), why),
        })
    }
}

/// The elements to add to a set and those to delete, in this order; `None` where a swap is better.
fn in_place(old: &SetContent, wanted: &SetContent) -> Option<(Vec<SetRange>, Vec<SetRange>)> {
    let change = wanted.change_from(old);
    if change.add.len() + change.delete.len() > MAX_IN_PLACE {
        return None;
    }
    let (add, delete) = (elements(&change.add), elements(&change.delete));
    if add.len() + delete.len() > MAX_IN_PLACE {
        return None;
    }
    // A bitmap has no elements but its ports: to delete a range would delete what was just added.
    if wanted.family() == SetFamily::Port {
        let gone = SetContent::of(SetFamily::Port, change.delete);
        return gone.ranges().iter().all(|range| !overlaps(wanted, *range)).then_some((add, delete));
    }
    let only = |these: &[SetRange], others: &[SetRange]| -> Vec<SetRange> {
        these.iter().filter(|element| others.binary_search(element).is_err()).copied().collect()
    };
    Some((only(&add, &delete), only(&delete, &add)))
}

fn overlaps(content: &SetContent, range: SetRange) -> bool {
    content.ranges().iter().any(|held| held.first() <= range.last() && range.first() <= held.last())
}

/// The elements of an ipset that holds these ranges, in ascending order: networks of addresses, single MAC addresses,
/// ranges of ports.
fn elements(ranges: &[SetRange]) -> Vec<SetRange> {
    let mut elements = Vec::with_capacity(ranges.len());
    for range in ranges {
        match range.family() {
            SetFamily::Ipv4 | SetFamily::Ipv6 => networks(*range, &mut elements),
            SetFamily::Port => elements.push(*range),
            SetFamily::Mac => {
                let single = |value| SetRange::new(SetFamily::Mac, value, value);
                elements.extend((range.first()..=range.last()).filter_map(single));
            }
        }
    }
    elements
}

/// The fewest networks that are a range. `hash:net` knows no network of prefix length 0, which becomes two.
fn networks(range: SetRange, into: &mut Vec<SetRange>) {
    let largest = 8 * range.family().bytes() as u32 - 1;
    let mut first = range.first();
    loop {
        let host = |bits: u32| (1u128 << bits) - 1;
        let aligned = if first == 0 { largest } else { first.trailing_zeros().min(largest) };
        let bits = (0..=aligned).rev().find(|bits| host(*bits) <= range.last() - first).unwrap_or(0);
        let last = first + host(bits);
        into.extend(SetRange::new(range.family(), first, last));
        if last >= range.last() {
            return;
        }
        first = last + 1;
    }
}

// ---- asking the tool ----

/// What stands behind a prefix in the names of ipsets.
fn names_of(prefix: &str) -> Result<BTreeSet<String>, ApplyError> {
    let said = ipset(&["list", "-name"], None)?;
    let text = said_or_unavailable(said)?;
    Ok(text.lines().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect())
}

/// What a set holds that is there.
fn read(name: &SetName) -> Result<Held, ApplyError> {
    let text = said_or_unavailable(ipset(&["save", &ipset_name(name)], None)?)?;
    Ok(held(&text))
}

/// What `ipset save` says of a set.
fn held(text: &str) -> Held {
    let mut lines = text.lines();
    let words: Vec<&str> = lines.next().unwrap_or("").split_ascii_whitespace().collect();
    let family = match words.get(2..) {
        Some(["hash:net", "family", "inet", ..]) => SetFamily::Ipv4,
        Some(["hash:net", "family", "inet6", ..]) => SetFamily::Ipv6,
        Some(["hash:mac", ..]) => SetFamily::Mac,
        Some(["bitmap:port", "range", "0-65535", ..]) => SetFamily::Port,
        _ => return Held::UNKNOWN,
    };
    let mut found = Vec::new();
    let mut is_regular = true;
    for line in lines {
        let mut words = line.split_ascii_whitespace().skip(2);
        let element = words.next().and_then(|element| SetRange::parse(family, element).ok());
        // Others may add what an element of ours does not have, as a timeout or "nomatch".
        is_regular &= element.is_some() && words.next().is_none();
        found.extend(element);
    }
    let content = SetContent::of(family, found.iter().copied());
    if family != SetFamily::Port {
        found.sort_unstable();
        is_regular &= found == elements(content.ranges());
    }
    Held { content: Some(Arc::new(content)), is_regular }
}

/// Runs the tool; what it says, of errors where it fails.
fn ipset(args: &[&str], input: Option<&str>) -> Result<Result<String, String>, ApplyError> {
    let output = tool::run("ipset", args, input)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

fn said_or_unavailable(said: Result<String, String>) -> Result<String, ApplyError> {
    said.map_err(|why| tool::unavailable("ipset".to_owned(), why.trim().to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by panicking.
mod tests {
    use super::*;

    fn ranges(family: SetFamily, texts: &[&str]) -> Vec<SetRange> {
        texts.iter().map(|text| SetRange::parse(family, text).unwrap()).collect()
    }

    #[test]
    fn a_range_becomes_the_fewest_networks() {
        for (family, range, expected) in [
            (
                SetFamily::Ipv4,
                "10.0.0.1-10.0.0.6",
                &["10.0.0.1", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6"][..],
            ),
            (SetFamily::Ipv4, "0.0.0.0/0", &["0.0.0.0/1", "128.0.0.0/1"]),
            (SetFamily::Ipv4, "255.255.255.255", &["255.255.255.255"]),
            (SetFamily::Ipv6, "::/0", &["::/1", "8000::/1"]),
            (SetFamily::Ipv6, "fd00::-fd00::2", &["fd00::/127", "fd00::2"]),
        ] {
            let mut found = Vec::new();
            networks(SetRange::parse(family, range).unwrap(), &mut found);
            assert_eq!(found, ranges(family, expected), "{range}");
            assert_eq!(SetContent::of(family, found).ranges(), ranges(family, &[range]));
        }
    }

    #[test]
    fn a_small_change_adds_before_it_deletes_and_leaves_what_stays() {
        let of = |texts: &[&str]| SetContent::of(SetFamily::Ipv4, ranges(SetFamily::Ipv4, texts));
        let (add, delete) = in_place(&of(&["10.0.0.0-10.0.0.4"]), &of(&["10.0.0.0-10.0.0.5"])).unwrap();
        assert_eq!(
            (add, delete),
            (ranges(SetFamily::Ipv4, &["10.0.0.4/31"]), ranges(SetFamily::Ipv4, &["10.0.0.4"]))
        );
    }

    #[test]
    fn a_range_of_ports_is_not_deleted_where_a_part_of_it_stays() {
        let of = |texts: &[&str]| SetContent::of(SetFamily::Port, ranges(SetFamily::Port, texts));
        assert_eq!(in_place(&of(&["80-90"]), &of(&["80-89"])), None);
        assert!(in_place(&of(&["80-90", "22"]), &of(&["80-90", "23"])).is_some());
    }

    #[test]
    fn what_others_put_into_a_set_is_seen() {
        let text = |more: &str| {
            let head = "create nwfilter-a hash:net family inet hashsize 64 maxelem 1048576 bucketsize 12\n";
            format!("{head}add nwfilter-a 10.0.0.0/24\n{more}")
        };
        assert!(held(&text("")).is_regular);
        assert!(!held(&text("add nwfilter-a 10.0.0.1\n")).is_regular);
        assert!(!held(&text("add nwfilter-a 10.1.0.1 nomatch\n")).is_regular);
        assert!(held("create nwfilter-a hash:ip family inet\n").content.is_none());
    }
}
