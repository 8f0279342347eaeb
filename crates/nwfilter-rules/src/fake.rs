//! A backend without a kernel, for tests of programs that use one: no root, no tools, no namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nwfilter_xml::{PortDev, SetName};

use crate::backend::{
    Applied, ApplyError, Backend, Batch, Desired, Difference, DifferenceKind, ForeignChange, Installed,
    KernelObject, Planned, Process, Refused, Subject, Unsupported, Watch,
};
use crate::held::{Count, Held, HeldRule, RuleId};
use crate::packet::IpTest;
use crate::ruleset::{AnyRule, Family, Origin, RootEntry, Rule, Ruleset, Verdict};
use crate::sets::{DesiredSet, SetContent, set_differences};

/// A backend that keeps rulesets in memory and fulfils the whole contract of [`Backend`]: all or nothing, differences rule by
/// rule, refusals with port and origin, changes by others. Clones share their state.
///
/// ```
/// use nwfilter_rules::{Backend, Batch, Fake, Ruleset};
///
/// let fake = Fake::new();
/// let mut batch = Batch::default();
/// batch.filter("vnet0".parse()?, Ruleset::drop_all().into());
/// assert_eq!(fake.apply(&batch)?.changed.len(), 1);
/// assert_eq!(fake.ruleset(&"vnet0".parse()?).as_deref(), Some(&Ruleset::drop_all()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<State>>);

type Hook = Arc<dyn Fn(&Batch) + Send + Sync>;

#[derive(Default)]
struct State {
    held: BTreeMap<PortDev, Arc<Ruleset>>,
    sets: BTreeMap<SetName, Arc<SetContent>>,
    refused: BTreeSet<PortDev>,
    ip_sets: BTreeSet<String>,
    before_apply: Option<Hook>,
    cannot_watch: bool,
    watches: Vec<(PipeWriter, Changes)>,
    counts: BTreeMap<(PortDev, Origin), Count>,
}

type Changes = Arc<Mutex<Vec<ForeignChange>>>;

impl Fake {
    /// A fake kernel without rules.
    pub fn new() -> Self {
        Self::default()
    }

    /// The ruleset that a port has.
    pub fn ruleset(&self, port: &PortDev) -> Option<Arc<Ruleset>> {
        self.state().held.get(port).cloned()
    }

    /// What a set holds; `None` if there is no such set.
    pub fn set(&self, name: &str) -> Option<Arc<SetContent>> {
        self.state().sets.get(name).cloned()
    }

    /// Starts or stops refusing all rules on a port.
    pub fn refuse(&self, port: &PortDev, refuse: bool) {
        let refused = &mut self.state().refused;
        if refuse {
            refused.insert(port.clone())
        } else {
            refused.remove(port)
        };
    }

    /// Creates an ipset. Rules that name a missing ipset are refused.
    pub fn add_ip_set(&self, name: &str) {
        self.state().ip_sets.insert(name.to_owned());
    }

    /// Sets a function that each [`Backend::apply`] calls first, in the applying thread. It may record, wait or panic.
    pub fn before_apply(&self, hook: impl Fn(&Batch) + Send + Sync + 'static) {
        self.state().before_apply = Some(Arc::new(hook));
    }

    /// Sets the counter of a filter's rule on a port.
    pub fn set_count(&self, port: &PortDev, origin: &Origin, count: Count) {
        self.state().counts.insert((port.clone(), origin.clone()), count);
    }

    /// Makes this a backend that cannot watch for changes.
    pub fn stop_watching(&self) {
        self.state().cannot_watch = true;
    }

    /// Removes the rules of a port as another program would, and notifies every watch.
    pub fn lose(&self, port: &PortDev, by: &Process) {
        let mut state = self.state();
        state.held.remove(port);
        let change = ForeignChange {
            by: Some(by.clone()),
            objects: vec![KernelObject::Table { table: TABLE.to_owned() }],
            more: false,
        };
        // The watch was dropped.
        state.watches.retain_mut(|(wake, changes)| {
            changes.lock().unwrap_or_else(PoisonError::into_inner).push(change.clone());
            wake.write_all(&[0]).is_ok()
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Outside the lock, because the hook may panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fake").field(&self.state().held).finish()
    }
}

/// The name of the only table.
const TABLE: &str = "fake";

impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn check(&self, _: &Ruleset) -> Result<(), Unsupported> {
        Ok(())
    }

    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError> {
        Ok(Planned { differences: self.state().differences(batch), warnings: Vec::new() })
    }

    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let hook = self.state().before_apply.clone();
        if let Some(hook) = hook {
            hook(batch);
        }
        let mut state = self.state();
        batch.filtered().try_for_each(|(port, ruleset)| state.accept(batch, port, ruleset))?;
        let differences = state.differences(batch);
        let changed_sets = state.set_sets(batch);
        let mut changed: BTreeSet<_> =
            differences.iter().filter_map(|difference| difference.subject.port().cloned()).collect();
        for (port, desired) in &batch.ports {
            let before = match desired {
                Desired::Filtered(ruleset) => state.held.insert(port.clone(), ruleset.clone()),
                Desired::Gone => state.held.remove(port),
            };
            // Also for a ruleset without rules.
            if before.is_some() != state.held.contains_key(port) {
                changed.insert(port.clone());
            }
        }
        let commits = usize::from(!changed.is_empty() || !changed_sets.is_empty());
        let differences = if batch.report_differences { differences } else { Vec::new() };
        Ok(Applied { changed, changed_sets, commits, warnings: Vec::new(), differences })
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        let state = self.state();
        let (ports, sets) = (state.held.keys().cloned().collect(), state.sets.keys().cloned().collect());
        Ok(Installed { ports, unreached: BTreeSet::new(), sets })
    }

    fn rules(&self, batch: &Batch) -> Result<Held, ApplyError> {
        let state = self.state();
        let mut held = Held::default();
        for (port, wanted) in batch.filtered() {
            if state.held.get(port) != Some(wanted) {
                held.differing.insert(port.clone());
                continue;
            }
            let ports = Arc::new(BTreeSet::from([port.clone()]));
            let mut left: BTreeMap<_, _> = state.counts.iter().filter(|((of, _), _)| of == port).collect();
            for (layer, rule) in wanted.rules_by_layer() {
                let (origin, verdict) = (rule.origin().clone(), rule.verdict());
                let handle = held.rules.len() as u64 + 1;
                held.rules.push(HeldRule {
                    id: RuleId { family: 0, table: TABLE, handle },
                    ports: ports.clone(),
                    layer,
                    chain: "root".into(),
                    // The rule that logs comes before the one that stops.
                    count: match verdict {
                        Verdict::Log(_) => Count::default(),
                        _ => left.remove(&(port.clone(), origin.clone())).copied().unwrap_or_default(),
                    },
                    origin,
                    verdict: Some(verdict),
                });
            }
        }
        Ok(held)
    }

    fn watch(&self) -> Result<Option<Box<dyn Watch>>, ApplyError> {
        let mut state = self.state();
        if state.cannot_watch {
            return Ok(None);
        }
        let (reader, writer) = pipe().map_err(|source| ApplyError::Io { path: "pipe".to_owned(), source })?;
        let changes = Changes::default();
        state.watches.push((writer, changes.clone()));
        Ok(Some(Box::new(FakeWatch { reader, changes })))
    }

    fn clear(&self) -> Result<Applied, ApplyError> {
        let mut batch = Batch::default();
        let state = self.state();
        state.held.keys().for_each(|port| batch.remove(port.clone()));
        batch.sets.extend(state.sets.keys().map(|set| (set.clone(), DesiredSet::Gone)));
        drop(state);
        self.apply(&batch)
    }
}

struct FakeWatch {
    reader: PipeReader,
    changes: Changes,
}

impl Watch for FakeWatch {
    fn changes(&mut self) -> Result<Vec<ForeignChange>, ApplyError> {
        let changes = std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
        // There is a byte for each change, so this does not block.
        let mut woken = vec![0; changes.len()];
        let failed = |source| ApplyError::Io { path: "pipe".to_owned(), source };
        self.reader.read_exact(&mut woken).map_err(failed)?;
        Ok(changes)
    }

    fn interval(&self) -> Option<Duration> {
        None
    }
}

impl AsFd for FakeWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

impl State {
    /// Gives sets their content; the ones that changed.
    fn set_sets(&mut self, batch: &Batch) -> BTreeSet<SetName> {
        let mut changed = BTreeSet::new();
        for (name, desired) in &batch.sets {
            let before = match desired {
                DesiredSet::Present(_) if self.sets.contains_key(name) => continue,
                DesiredSet::Holds(content) | DesiredSet::Present(content) => {
                    self.sets.insert(name.clone(), content.clone())
                }
                DesiredSet::Gone => self.sets.remove(name),
            };
            if before.as_ref() != self.sets.get(name) {
                changed.insert(name.clone());
            }
        }
        changed
    }

    fn accept(&self, batch: &Batch, port: &PortDev, ruleset: &Ruleset) -> Result<(), ApplyError> {
        let is_refused = self.refused.contains(port);
        for rule in ruleset.rules() {
            let missing = match rule {
                AnyRule::Ip(rule) => rule.matches.iter().find_map(|m| match &m.test {
                    IpTest::IpSet { name, .. } if !self.ip_sets.contains(name) => {
                        Some(format!("there is no ipset '{name}'"))
                    }
                    IpTest::Set { name, .. } if !self.has_set(batch, name) => {
                        Some(format!("there is no set '{name}'"))
                    }
                    _ => None,
                }),
                AnyRule::Ethernet(_) => None,
            };
            let why = match missing {
                Some(why) => why,
                None if is_refused && *rule.origin() != Origin::BUILT_IN => "refused".to_owned(),
                None => continue,
            };
            return Err(ApplyError::Refused(Box::new(Refused {
                port: port.clone(),
                origin: rule.origin().clone(),
                object: KernelObject::Table { table: TABLE.to_owned() },
                rule: match rule {
                    AnyRule::Ethernet(rule) => shown(rule),
                    AnyRule::Ip(rule) => shown(rule),
                },
                why,
            })));
        }
        Ok(())
    }

    /// Whether there is a set when a batch is applied.
    fn has_set(&self, batch: &Batch, name: &SetName) -> bool {
        match batch.sets.get(name) {
            Some(desired) => *desired != DesiredSet::Gone,
            None => self.sets.contains_key(name),
        }
    }

    fn differences(&self, batch: &Batch) -> Vec<Difference> {
        let mut found = Vec::new();
        for (name, desired) in &batch.sets {
            let held = self.sets.get(name).map(Arc::as_ref);
            let object = KernelObject::Set { table: TABLE.to_owned(), set: name.to_string() };
            found.extend(set_differences(name, &object, held, desired));
        }
        for (port, desired) in &batch.ports {
            let wanted = match desired {
                Desired::Filtered(ruleset) => chains(ruleset),
                Desired::Gone => BTreeMap::new(),
            };
            let held = self.held.get(port).map(|ruleset| chains(ruleset)).unwrap_or_default();
            for chain in held.keys().chain(wanted.keys()).collect::<BTreeSet<_>>() {
                let none = Vec::new();
                let (held, wanted) = (held.get(chain).unwrap_or(&none), wanted.get(chain).unwrap_or(&none));
                let texts = |rules: &[(String, Origin)]| rules.iter().map(|(text, _)| text.clone()).collect();
                let (old, new): (Vec<_>, Vec<_>) = (texts(held), texts(wanted));
                if old == new {
                    continue;
                }
                let difference = |kind, (rule, origin): &(String, Origin)| Difference {
                    subject: Subject::Port(port.clone()),
                    object: KernelObject::Chain { table: TABLE.to_owned(), chain: chain.clone() },
                    kind,
                    rule: rule.clone(),
                    origin: (kind == DifferenceKind::Missing).then(|| origin.clone()),
                };
                found.extend(held.iter().map(|rule| difference(DifferenceKind::Foreign, rule)));
                found.extend(wanted.iter().map(|rule| difference(DifferenceKind::Missing, rule)));
            }
        }
        found.sort();
        found
    }
}

/// The rules of a ruleset by the chain they are in.
fn chains(ruleset: &Ruleset) -> BTreeMap<String, Vec<(String, Origin)>> {
    fn listed<T: fmt::Debug>(rules: &[Rule<T>]) -> Vec<(String, Origin)> {
        rules.iter().map(|rule| (shown(rule), rule.origin.clone())).collect()
    }
    let mut chains = BTreeMap::new();
    let sides = [("from guest", &ruleset.ethernet.from_guest), ("to guest", &ruleset.ethernet.to_guest)];
    for (way, side) in sides {
        let Some(side) = side else { continue };
        let root = side.root.iter().map(|entry| match entry {
            RootEntry::Rule(rule) => (shown(rule), rule.origin.clone()),
            RootEntry::Jump(jump) => (format!("jump {}", jump.chain), Origin::BUILT_IN),
        });
        chains.insert(format!("frames {way}"), root.collect());
        for chain in &side.chains {
            chains.insert(format!("frames {way}, {}", chain.name), listed(&chain.rules));
        }
    }
    for family in Family::ALL {
        let Some(part) = ruleset.ip(family) else { continue };
        chains.insert(format!("{family} from guest"), listed(&part.from_guest));
        chains.insert(format!("{family} to guest"), listed(&part.to_guest));
    }
    chains
}

fn shown<T: fmt::Debug>(rule: &Rule<T>) -> String {
    let matches =
        rule.matches.iter().map(|m| format!("{}{:?} ", if m.negated { "not " } else { "" }, m.test));
    format!("{}{:?}", matches.collect::<String>(), rule.verdict)
}
