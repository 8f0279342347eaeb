//! Splits rulesets into classes, which ports of the same filter share, and values, which each port has.
//!
//! A class is a ruleset without the values of the port's variables. If a rule compares a field with such a value, the class
//! looks up the port and the field in a set: `iifname . ether saddr @clean-1c0ffee-0`. Two ports share a class only if
//! their rulesets without these values are equal:
//!
//! * Successive rules that differ only in values of variables, such as those of a list, become one rule, and its set holds the
//!   values of all. Several variables of one rule become one set of concatenations.
//! * A negated rule tests that the value is not in the set, which is equivalent only for one value. With more values, each
//!   rule keeps its value in the class.
//! * A value that is not a single value of a field (a network, a range, masked bits) stays in the class. So does a value of a
//!   field without an nft type.
//!
//! Ports with equal sets and chains share a class, so a class is named after the digest of these.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};

use nwfilter_rules::{
    EthernetRule, EthernetSide, EthernetTest, Family, HelperRule, HelperSide, IpPart, IpRule, IpTest,
    LogGroup, Match, Origin, RootEntry, Ruleset, Transport, Unsupported, Verdict,
};

use crate::condition::{self, All, Condition, Inexpressible};
use crate::kernel::Datatype;
use crate::kernel::expr::{Connlimit, IFNAMSIZ, Load, Register, Reject};

/// The chains and sets that ports of the same filter share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Class {
    /// The name of the filter, for people.
    pub(crate) title: String,
    /// Its chains.
    pub(crate) chains: Vec<ClassChain>,
    /// The first chain for frames from the guest; `None` if all pass.
    pub(crate) from_guest: Option<ChainIndex>,
    /// The first chain for frames to the guest; `None` if all pass.
    pub(crate) to_guest: Option<ChainIndex>,
    /// The first chain for frames to the guest when they enter the bridge; `None` if the class rejects none.
    pub(crate) toward_guest: Option<ChainIndex>,
    /// Whether packets to the guest are dropped although they should be rejected.
    pub(crate) lacks_answers: bool,
    /// The sets of its ports' values.
    pub(crate) sets: Vec<ClassSet>,
    /// The sets in which something is counted for each port.
    pub(crate) counted: Vec<Counted>,
    /// The conntrack helpers that it assigns.
    pub(crate) helpers: BTreeSet<HelperKind>,
}

/// The values of one port for each set of its class: the fields after the port's name.
pub(crate) type Values = Vec<BTreeSet<Vec<Vec<u8>>>>;

/// A chain of a class.
pub(crate) type ChainIndex = usize;

/// A set of a class. Its keys begin with the port's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ClassSet {
    /// The fields after the name.
    pub(crate) fields: Vec<Datatype>,
    /// The variables that the values come from.
    pub(crate) variables: String,
}

/// What a set of a class counts for each port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Counted {
    /// The connections of each address.
    Connections(Datatype),
    /// The packets that were logged lately, of one way.
    Logged(Way),
}

/// A chain of a class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ClassChain {
    /// Its name, without that of the class.
    pub(crate) suffix: String,
    /// Whether it is for frames that the guest sends.
    pub(crate) way: Way,
    /// Its rules.
    pub(crate) rules: Vec<ClassRule>,
}

/// The frames of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Way {
    /// From the guest: the port is the input interface.
    FromGuest,
    /// To the guest: the port is the output interface.
    ToGuest,
    /// To the guest, when they enter the bridge: only there the kernel can reject. The rules are those for frames to the guest,
    /// but frames that they drop or accept continue, and meet the rules again on their way out.
    Ahead,
}

/// The ways that are dispatched by the names of ports.
pub(crate) const BY_PORT: [Way; 2] = [Way::FromGuest, Way::ToGuest];

/// A rule of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClassRule {
    /// Its conditions.
    pub(crate) matches: Vec<ClassMatch>,
    /// Its verdict.
    pub(crate) action: Action,
    /// The filter's rule; built-in for rules between chains.
    pub(crate) origin: Origin,
    /// Its comment: its origin, and the comment in the filter.
    pub(crate) comment: Option<String>,
}

impl Hash for ClassRule {
    /// Does not hash the rule's line: a filter has other lines in the store than in the file it was defined from.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.matches.hash(state);
        self.action.hash(state);
        self.origin.filter.hash(state);
        let origin = self.origin.to_string();
        self.comment.as_deref().map(|comment| comment.strip_prefix(&origin).unwrap_or(comment)).hash(state);
    }
}

/// A condition of a rule of a class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ClassMatch {
    /// The same for all ports.
    Literal(Condition),
    /// The port and fields of the packet are in a set, or are not.
    Member { set: usize, loads: Vec<Load>, negated: bool },
    /// The port and an address have more connections than that, or not.
    Connlimit { counted: usize, source: Load, limit: Connlimit },
    /// Packets of the port were not logged too often.
    LogLimit { counted: usize },
}

/// The verdict of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// It passes.
    Accept,
    /// It is dropped.
    Drop,
    /// It is rejected.
    Reject(Reject),
    /// It continues after the jump to this chain.
    Return,
    /// It is counted.
    Continue,
    /// It continues in another chain, and returns at its end.
    Jump(ChainIndex),
    /// It continues in another chain.
    Goto(ChainIndex),
    /// Its connection gets a helper.
    Helper(HelperKind),
    /// It is logged.
    Log(LogGroup),
}

/// A conntrack helper object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HelperKind {
    /// The kernel's name of the helper.
    pub(crate) name: &'static str,
    /// The transport protocol.
    pub(crate) transport: Transport,
}

impl HelperKind {
    /// The transport's number.
    pub(crate) fn protocol(self) -> u8 {
        match self.transport {
            Transport::Tcp => 6,
            Transport::Udp => 17,
        }
    }
}

/// NFT_REJECT_ICMPX_PORT_UNREACH
const PORT_UNREACHABLE: Reject = Reject::Icmpx(1);

/// The class of a ruleset, and the port's values.
pub(crate) fn of(ruleset: &Ruleset) -> Result<(Class, Values), Unsupported> {
    let mut builder = Builder { class: Class::empty(title(ruleset)), values: Values::new() };
    builder.side(ruleset, Way::FromGuest)?;
    builder.side(ruleset, Way::ToGuest)?;
    builder.answers(ruleset)?;
    Ok((builder.class, builder.values))
}

/// The filter of the first rule of a ruleset.
fn title(ruleset: &Ruleset) -> String {
    let first = ruleset.rules().find_map(|rule| rule.origin().filter.clone());
    first.map_or_else(|| "nwfilter".to_string(), |filter| filter.to_string())
}

impl Class {
    fn empty(title: String) -> Self {
        Self {
            title,
            chains: Vec::new(),
            from_guest: None,
            to_guest: None,
            toward_guest: None,
            lacks_answers: false,
            sets: Vec::new(),
            counted: Vec::new(),
            helpers: BTreeSet::new(),
        }
    }

    /// Its digest.
    pub(crate) fn digest(&self) -> u64 {
        let mut digest = Digest::default();
        self.hash(&mut digest);
        digest.finish()
    }

    /// The conditions of its rules that are the same for all ports.
    pub(crate) fn literals(&self) -> impl Iterator<Item = &Condition> {
        let rules = self.chains.iter().flat_map(|chain| &chain.rules);
        rules.flat_map(|rule| &rule.matches).filter_map(|m| match m {
            ClassMatch::Literal(condition) => Some(condition),
            _ => None,
        })
    }
}

/// A hash of 64 bits, eight bytes at a time: the same in every build, unlike the standard library's.
struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Digest {
    fn finish(&self) -> u64 {
        // The last steps of MurmurHash3, so that each bit counts in all of them.
        let mut digest = self.0;
        digest = (digest ^ (digest >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        digest = (digest ^ (digest >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        digest ^ (digest >> 33)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let word = u64::from_le_bytes(word);
            self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
}

/// A rule before its values are moved to sets.
struct Flat {
    conditions: Vec<(Condition, Option<String>)>,
    action: Action,
    origin: Origin,
    comment: Option<String>,
}

impl Flat {
    /// Whether a value comes from a variable and can be that of a set. nft cannot list concatenations with numbers that
    /// have no type.
    fn is_own((condition, variables): &(Condition, Option<String>)) -> bool {
        let Condition::Value { load, .. } = condition else { return false };
        variables.is_some() && !matches!(Datatype::of(*load), Datatype::Integer { .. })
    }

    /// Whether rules differ only in values of variables.
    fn is_like(&self, other: &Self) -> bool {
        let conditions = self.conditions.iter().zip(&other.conditions);
        self.action == other.action
            && self.origin == other.origin
            && self.comment == other.comment
            && self.conditions.len() == other.conditions.len()
            && conditions.into_iter().all(|(a, b)| match (&a.0, &b.0) {
                (
                    Condition::Value { load, negated, .. },
                    Condition::Value { load: other_load, negated: other_negated, .. },
                ) if Self::is_own(a) && a.1 == b.1 => load == other_load && negated == other_negated,
                _ => a == b,
            })
    }

    fn has_own_negated(&self) -> bool {
        let negated =
            |(condition, _): &(Condition, _)| matches!(condition, Condition::Value { negated: true, .. });
        self.conditions.iter().any(|condition| Self::is_own(condition) && negated(condition))
    }
}

impl Flat {
    fn counts_connections(&self) -> bool {
        self.conditions.iter().any(|(condition, _)| matches!(condition, Condition::Connlimit { .. }))
    }
}

struct Builder {
    class: Class,
    values: Values,
}

impl Builder {
    fn side(&mut self, ruleset: &Ruleset, way: Way) -> Result<(), Unsupported> {
        let (ethernet, parts, helper_side) = match way {
            Way::FromGuest => {
                (&ruleset.ethernet.from_guest, ip_rules(ruleset, |p| &p.from_guest), HelperSide::Elsewhere)
            }
            Way::ToGuest | Way::Ahead => {
                (&ruleset.ethernet.to_guest, ip_rules(ruleset, |p| &p.to_guest), HelperSide::Guest)
            }
        };
        let assigns = |helper: &&HelperRule| helper.side == helper_side && way != Way::Ahead;
        let helpers: Vec<_> = ruleset.helpers.iter().filter(assigns).collect();
        let has_ip = ruleset.has_ip_rules() || !helpers.is_empty();
        // Frames that pass the Ethernet rules meet those of their IP family.
        let ip = if has_ip { Some(self.ip_chains(&parts, &helpers, way)?) } else { None };
        let entry = match (ethernet, ip) {
            (Some(side), ip) => Some(self.ethernet_chains(side, ip, way)?),
            (None, ip) => ip,
        };
        match way {
            Way::FromGuest => self.class.from_guest = entry,
            Way::ToGuest => self.class.to_guest = entry,
            Way::Ahead => self.class.toward_guest = entry,
        }
        Ok(())
    }

    /// The chains that reject packets to the guest, if a rule rejects.
    fn answers(&mut self, ruleset: &Ruleset) -> Result<(), Unsupported> {
        let to_guest = ip_rules(ruleset, |part| &part.to_guest);
        let mut rules = to_guest.iter().flat_map(|(_, rules)| *rules);
        if !rules.clone().any(|rule| rule.verdict == Verdict::Reject) {
            return Ok(());
        }
        let counts = |m: &Match<IpTest>| matches!(m.test, IpTest::ConnlimitAbove(_));
        // Who is asked twice counts twice.
        if rules.any(|rule| rule.matches.iter().any(counts)) {
            self.class.lacks_answers = true;
            return Ok(());
        }
        self.side(ruleset, Way::Ahead)
    }

    fn chain(&mut self, suffix: String, way: Way) -> ChainIndex {
        self.class.chains.push(ClassChain { suffix, way, rules: Vec::new() });
        self.class.chains.len() - 1
    }

    fn push(&mut self, chain: ChainIndex, rule: ClassRule) {
        self.class.chains[chain].rules.push(rule);
    }

    fn lead(&mut self, chain: ChainIndex, matches: Vec<Condition>, action: Action) {
        let matches = matches.into_iter().map(ClassMatch::Literal).collect();
        self.push(chain, ClassRule { matches, action, origin: Origin::BUILT_IN, comment: None });
    }

    // ---- IP ----

    fn ip_chains(
        &mut self,
        parts: &[(Family, &Vec<IpRule>)],
        helpers: &[&HelperRule],
        way: Way,
    ) -> Result<ChainIndex, Unsupported> {
        let root = self.chain(format!("{}-ip", prefix(way)), way);
        for family in Family::ALL {
            let rules = parts.iter().find(|(of, _)| *of == family).map_or(&[][..], |(_, rules)| rules);
            let helpers: Vec<_> = helpers.iter().filter(|helper| helper.family == family).collect();
            if rules.is_empty() && helpers.is_empty() {
                continue;
            }
            let (name, ether_type) = match family {
                Family::Ipv4 => ("ipv4", 0x0800),
                Family::Ipv6 => ("ipv6", 0x86dd),
            };
            let chain = self.chain(format!("{}-{name}", prefix(way)), way);
            self.lead(root, vec![ether_type_is(ether_type)], Action::Goto(chain));
            for helper in helpers {
                self.helper(chain, helper);
            }
            let mut flat = Vec::new();
            for rule in rules {
                flatten_ip(rule, family, way, &mut flat)?;
            }
            self.rules(chain, flat);
            // A goto from a chain that was jumped into would return there.
            self.lead(chain, Vec::new(), Action::Accept);
        }
        self.lead(root, Vec::new(), Action::Accept);
        Ok(root)
    }

    fn helper(&mut self, chain: ChainIndex, helper: &HelperRule) {
        let kind = HelperKind { name: helper.helper.name(), transport: helper.transport };
        self.class.helpers.insert(kind);
        let conditions = vec![
            condition::l4proto_is(kind.protocol()),
            condition::dport_is(helper.port),
            condition::is_new(),
        ];
        self.lead(chain, conditions, Action::Helper(kind));
    }

    // ---- Ethernet ----

    fn ethernet_chains(
        &mut self,
        side: &EthernetSide,
        ip: Option<ChainIndex>,
        way: Way,
    ) -> Result<ChainIndex, Unsupported> {
        let accept = ip.map_or(Action::Accept, Action::Goto);
        let root = self.chain(prefix(way).to_string(), way);
        let mut chains = Vec::new();
        for (number, chain) in side.chains.iter().enumerate() {
            let index = self.chain(format!("{}-{number}-{}", prefix(way), chain.name), way);
            chains.push((&chain.name, index));
            let mut flat = Vec::new();
            for rule in &chain.rules {
                flatten_ethernet(rule, way, &accept, false, &mut flat)?;
            }
            self.rules(index, flat);
            match chain.end {
                Verdict::Return => {}
                Verdict::Drop | Verdict::Reject => self.lead(index, Vec::new(), dropped(way)),
                Verdict::Accept | Verdict::Pass | Verdict::Continue | Verdict::Log(_) => {
                    self.lead(index, Vec::new(), accept.clone())
                }
            }
        }
        let mut flat = Vec::new();
        for entry in &side.root {
            match entry {
                RootEntry::Rule(rule) => flatten_ethernet(rule, way, &accept, true, &mut flat)?,
                RootEntry::Jump(jump) => {
                    let Some((_, index)) = chains.iter().find(|(name, _)| **name == jump.chain) else {
                        continue;
                    };
                    let rule = EthernetRule::built_in(jump.matches.iter().cloned(), Verdict::Continue);
                    let begin = flat.len();
                    flatten_ethernet(&rule, way, &accept, true, &mut flat)?;
                    flat[begin..].iter_mut().for_each(|flat| flat.action = Action::Jump(*index));
                }
            }
        }
        self.rules(root, flat);
        let end = match side.end {
            Verdict::Drop | Verdict::Reject => dropped(way),
            Verdict::Accept | Verdict::Pass | Verdict::Continue | Verdict::Return | Verdict::Log(_) => accept,
        };
        self.lead(root, Vec::new(), end);
        Ok(root)
    }

    // ---- sets ----

    /// Adds rules; those that differ only in values of variables become one.
    fn rules(&mut self, chain: ChainIndex, flat: Vec<Flat>) {
        let flat = match self.class.chains[chain].way {
            Way::Ahead => ahead(flat),
            _ => flat,
        };
        for group in flat.chunk_by(Flat::is_like) {
            let [first, ..] = group else { continue };
            // That a field has none of several values is not what several rules say, and each rule counts the
            // connections that get to it.
            let apart = first.has_own_negated() || first.counts_connections();
            if group.len() > 1 && apart {
                group.iter().for_each(|rule| self.rule(chain, std::slice::from_ref(rule), false));
            } else {
                self.rule(chain, group, true);
            }
        }
    }

    fn rule(&mut self, chain: ChainIndex, group: &[Flat], with_sets: bool) {
        // Sets have the names of ports.
        if with_sets && self.class.chains[chain].way == Way::Ahead {
            group.iter().for_each(|rule| self.rule(chain, std::slice::from_ref(rule), false));
            return;
        }
        let Some(first) = group.first() else { return };
        let (mut matches, mut last) = (Vec::new(), Vec::new());
        let own: Vec<usize> = (0..first.conditions.len())
            .filter(|index| with_sets && Flat::is_own(&first.conditions[*index]))
            .collect();
        for (index, (condition, _)) in first.conditions.iter().enumerate() {
            if own.contains(&index) {
                continue;
            }
            match condition {
                // It counts the packets that get to it.
                Condition::Connlimit { source, limit } => {
                    matches.push(ClassMatch::Literal(condition::is_tracked()));
                    let counted = self.counted(Counted::Connections(Datatype::of(*source)));
                    last.push(ClassMatch::Connlimit { counted, source: *source, limit: *limit });
                }
                other => matches.push(ClassMatch::Literal(other.clone())),
            }
        }
        let is_negated =
            |index: &usize| matches!(first.conditions[*index].0, Condition::Value { negated: true, .. });
        let (negated, plain): (Vec<usize>, Vec<usize>) = own.into_iter().partition(is_negated);
        // As many fields in one set as fit into the registers.
        let mut begin = 0;
        while begin < plain.len() {
            let mut end = begin + 1;
            while end < plain.len() && fits(first, &plain[begin..=end]) {
                end += 1;
            }
            // Fields in several sets would hold for values of several rules at once.
            if group.len() > 1 && (begin, end) != (0, plain.len()) {
                group.iter().for_each(|rule| self.rule(chain, std::slice::from_ref(rule), false));
                return;
            }
            matches.push(self.member(group, &plain[begin..end], false));
            begin = end;
        }
        for index in negated {
            matches.push(self.member(group, &[index], true));
        }
        matches.append(&mut last);
        let way = self.class.chains[chain].way;
        if let Action::Log(_) = first.action {
            let limits = self.class.counted.iter().position(|counted| *counted == Counted::Logged(way));
            let counted = limits.unwrap_or_else(|| self.counted(Counted::Logged(way)));
            matches.push(ClassMatch::LogLimit { counted });
        }
        let rule = ClassRule {
            matches,
            action: first.action.clone(),
            origin: first.origin.clone(),
            comment: first.comment.clone(),
        };
        self.push(chain, rule);
    }

    /// A new set that counts.
    fn counted(&mut self, what: Counted) -> usize {
        self.class.counted.push(what);
        self.class.counted.len() - 1
    }

    /// The lookup of these conditions of each rule of a group.
    fn member(&mut self, group: &[Flat], indices: &[usize], negated: bool) -> ClassMatch {
        let (mut loads, mut variables) = (Vec::new(), Vec::new());
        for (condition, of) in indices.iter().filter_map(|index| group[0].conditions.get(*index)) {
            if let Condition::Value { load, .. } = condition {
                loads.push(*load);
            }
            variables.extend(of.clone());
        }
        let key = |flat: &Flat| -> Vec<Vec<u8>> {
            let values = indices.iter().filter_map(|index| match &flat.conditions[*index].0 {
                Condition::Value { value, .. } => Some(value.clone()),
                _ => None,
            });
            values.collect()
        };
        let values: BTreeSet<Vec<Vec<u8>>> = group.iter().map(key).collect();
        let fields: Vec<Datatype> = loads.iter().map(|load| Datatype::of(*load)).collect();
        let set = ClassSet { fields, variables: variables.join(", ") };
        // Rules that take the same values of the same variables share a set.
        let known = self.class.sets.iter().zip(&self.values).position(|known| known == (&set, &values));
        let set = known.unwrap_or_else(|| {
            self.class.sets.push(set);
            self.values.push(values);
            self.class.sets.len() - 1
        });
        ClassMatch::Member { set, loads, negated }
    }
}

/// Of the rules for frames to a guest, those that are asked ahead. Packets are counted on their way out, and those that are
/// dropped there are logged there.
fn ahead(flat: Vec<Flat>) -> Vec<Flat> {
    let follows: Vec<bool> = flat
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            let next = flat[index..].iter().find(|next| !matches!(next.action, Action::Log(_)));
            next.is_some_and(|next| next.origin == rule.origin && matches!(next.action, Action::Reject(_)))
        })
        .collect();
    let is_asked = |rule: &Flat, rejected| match rule.action {
        Action::Continue => false,
        Action::Log(_) => rejected,
        _ => true,
    };
    flat.into_iter()
        .zip(follows)
        .filter(|(rule, rejected)| is_asked(rule, *rejected))
        .map(|(rule, _)| rule)
        .collect()
}

/// Whether the port's name and these fields fit into the registers.
fn fits(rule: &Flat, indices: &[usize]) -> bool {
    let fields = indices.iter().filter_map(|index| match &rule.conditions[*index].0 {
        Condition::Value { value, .. } => Some(value.len().next_multiple_of(Register::SIZE)),
        _ => None,
    });
    IFNAMSIZ + fields.sum::<usize>() <= usize::from(Register::COUNT) * Register::SIZE
}

fn prefix(way: Way) -> &'static str {
    match way {
        Way::FromGuest => "from",
        Way::ToGuest => "to",
        Way::Ahead => "toward",
    }
}

/// What happens to a frame that a rule drops.
fn dropped(way: Way) -> Action {
    match way {
        Way::FromGuest | Way::ToGuest => Action::Drop,
        // It meets the rule again.
        Way::Ahead => Action::Accept,
    }
}

fn ether_type_is(number: u16) -> Condition {
    Condition::Value {
        load: crate::kernel::field::ETHER_TYPE,
        value: number.to_be_bytes().into(),
        negated: false,
    }
}

fn ip_rules<'a>(
    ruleset: &'a Ruleset,
    side: impl Fn(&'a IpPart) -> &'a Vec<IpRule>,
) -> Vec<(Family, &'a Vec<IpRule>)> {
    Family::ALL.into_iter().filter_map(|family| Some((family, side(ruleset.ip(family)?)))).collect()
}

// ---- rules ----

fn flatten_ethernet(
    rule: &EthernetRule,
    way: Way,
    accept: &Action,
    in_root: bool,
    flat: &mut Vec<Flat>,
) -> Result<(), Unsupported> {
    let action = match rule.verdict {
        Verdict::Accept | Verdict::Pass => accept.clone(),
        // After the root chain no rule can drop the frame.
        Verdict::Return if in_root => accept.clone(),
        Verdict::Return => Action::Return,
        // As with ebtables, which cannot reject.
        Verdict::Drop | Verdict::Reject => dropped(way),
        Verdict::Continue => Action::Continue,
        Verdict::Log(group) => Action::Log(group),
    };
    let ether_type = rule.matches.iter().find_map(|m| match m.test {
        EthernetTest::EtherType(number) if !m.negated => Some(number),
        _ => None,
    });
    // The EtherType before the fields after it.
    let mut matches: Vec<_> = rule.matches.iter().collect();
    matches.sort_by_key(|m| !matches!(m.test, EthernetTest::EtherType(_)));
    let matches = matches
        .into_iter()
        .map(|m| Ok((condition::of_ethernet(m, ether_type)?, own(m, &rule.origin, ethernet_address(m)))));
    flatten(matches, action, &rule.origin, None, flat)
}

fn flatten_ip(rule: &IpRule, family: Family, way: Way, flat: &mut Vec<Flat>) -> Result<(), Unsupported> {
    let action = match (rule.verdict, way) {
        // Packets that the sending port accepts meet the rules of the receiving port after this chain.
        (Verdict::Accept | Verdict::Pass | Verdict::Return, _) => Action::Accept,
        (Verdict::Drop, way) => dropped(way),
        (Verdict::Reject, Way::FromGuest | Way::Ahead) => Action::Reject(PORT_UNREACHABLE),
        // The kernel cannot reject a packet that leaves; one that comes here was not rejected before.
        (Verdict::Reject, Way::ToGuest) => Action::Drop,
        (Verdict::Continue, _) => Action::Continue,
        (Verdict::Log(group), _) => Action::Log(group),
    };
    let comment = rule.matches.iter().find_map(|m| match &m.test {
        IpTest::Comment(text) => Some(text.as_str()),
        _ => None,
    });
    let matches =
        rule.matches.iter().map(|m| Ok((condition::of_ip(m, family)?, own(m, &rule.origin, false))));
    flatten(matches, action, &rule.origin, comment, flat)
}

/// Whether a test is one on an address.
fn ethernet_address(m: &Match<EthernetTest>) -> bool {
    matches!(
        m.test,
        EthernetTest::SrcMac(_) | EthernetTest::DstMac(_) | EthernetTest::SrcIp(_) | EthernetTest::DstIp(_)
    )
}

/// The variables of a match, where a value of it is the port's own. Built-in rules say addresses without variable.
fn own<T>(m: &Match<T>, origin: &Origin, is_address: bool) -> Option<String> {
    if !m.variables.is_empty() {
        let names: Vec<String> = m.variables.iter().map(ToString::to_string).collect();
        return Some(names.join(", "));
    }
    (*origin == Origin::BUILT_IN && is_address).then(|| "address".into())
}

/// Adds the rules that a rule becomes: one for each combination of its matches' alternatives.
fn flatten(
    matches: impl Iterator<Item = Result<(Vec<All>, Option<String>), Inexpressible>>,
    action: Action,
    origin: &Origin,
    comment: Option<&str>,
    flat: &mut Vec<Flat>,
) -> Result<(), Unsupported> {
    let mut combinations: Vec<Vec<(Condition, Option<String>)>> = vec![Vec::new()];
    for m in matches {
        let (alternatives, variables) =
            m.map_err(|Inexpressible(what)| Unsupported { origin: origin.clone(), what })?;
        if let ([_], [begun]) = (&alternatives[..], &mut combinations[..]) {
            // As almost all tests are. The first ones of several conditions say that the field is there; the last one
            // has the value.
            let all: All = alternatives.into_iter().flatten().collect();
            let last = all.len().saturating_sub(1);
            for (index, condition) in all.into_iter().enumerate() {
                let condition = (condition, variables.clone().filter(|_| index == last));
                if !begun.contains(&condition) {
                    begun.push(condition);
                }
            }
            combinations.retain(|conditions| !is_contradictory(conditions));
            continue;
        }
        combinations = combinations
            .iter()
            .flat_map(|begun| {
                alternatives.iter().map(|all| {
                    // Sets are for tests without alternatives.
                    let conditions = all.iter().map(|condition| (condition.clone(), None));
                    begun.iter().cloned().chain(conditions).collect::<Vec<_>>()
                })
            })
            .map(distinct)
            .filter(|conditions| !is_contradictory(conditions))
            .collect();
    }
    let said = match (origin == &Origin::BUILT_IN, comment) {
        (true, None) => None,
        (true, Some(comment)) => Some(comment.to_string()),
        (false, None) => Some(origin.to_string()),
        (false, Some(comment)) => Some(format!("{origin} {comment}")),
    };
    flat.extend(combinations.into_iter().map(|conditions| Flat {
        conditions,
        action: action.clone(),
        origin: origin.clone(),
        comment: said.clone(),
    }));
    Ok(())
}

/// Removes repetitions.
fn distinct<T: PartialEq>(items: Vec<T>) -> Vec<T> {
    let mut kept = Vec::with_capacity(items.len());
    for item in items {
        if !kept.contains(&item) {
            kept.push(item);
        }
    }
    kept
}

/// Whether a field of the frame's type would have to have two values, or a value and not that value.
fn is_contradictory(conditions: &[(Condition, Option<String>)]) -> bool {
    // Values of variables do not decide how the class looks.
    let values: Vec<_> = conditions
        .iter()
        .filter_map(|condition| match condition {
            (Condition::Value { load, value, negated }, None) => Some((load, value, negated)),
            _ => None,
        })
        .collect();
    values.iter().enumerate().any(|(index, (load, value, negated))| {
        values[index + 1..].iter().any(|(other_load, other_value, other_negated)| {
            load == other_load
                && match (negated, other_negated) {
                    (false, false) => value != other_value,
                    (true, true) => false,
                    _ => value == other_value,
                }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nwfilter_rules::instantiate;
    use nwfilter_xml::{Filter, read_binding, read_filter};

    use super::*;

    /// The class and values of a filter's rules, for a port with these parameters.
    fn class(rules: &str, parameters: &[(&str, &str)]) -> (Class, Values) {
        let text = format!("<filter name='f' chain='root'>{rules}</filter>");
        let filter: Filter = read_filter("f.xml", &text).into_result().unwrap();
        let parameters: String = parameters
            .iter()
            .map(|(name, value)| format!("<parameter name='{name}' value='{value}'/>"))
            .collect();
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='port0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'>{parameters}</filterref></filterbinding>"
        );
        let binding = read_binding("b.xml", &binding).into_result().unwrap();
        of(&instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding).unwrap()).unwrap()
    }

    const ACCEPT_IP: &str = "<rule action='accept' direction='out'><ip srcipaddr='$IP'/></rule>";
    const DROP_OTHERS: &str = "<rule action='drop' direction='out'><ip match='no' srcipaddr='$IP'/></rule>";

    #[test]
    fn a_list_of_any_length_is_membership() {
        let (one, values) = class(ACCEPT_IP, &[("IP", "10.0.0.1")]);
        let (three, more) = class(ACCEPT_IP, &[("IP", "10.0.0.1"), ("IP", "10.0.0.2"), ("IP", "10.0.0.3")]);
        assert_eq!(one, three);
        assert_eq!(one.digest(), three.digest());
        assert_eq!((values[0].len(), more[0].len()), (1, 3));
    }

    #[test]
    fn not_one_value_is_absence_and_not_one_of_several_is_a_class_of_its_own() {
        let (one, values) = class(DROP_OTHERS, &[("IP", "10.0.0.1")]);
        assert_eq!(one, class(DROP_OTHERS, &[("IP", "10.0.0.2")]).0);
        assert_eq!(values, [BTreeSet::from([vec![vec![10, 0, 0, 1]]])]);
        let several = |last: &str| class(DROP_OTHERS, &[("IP", "10.0.0.1"), ("IP", last)]);
        assert_ne!(several("10.0.0.2").0, several("10.0.0.3").0);
        assert!(several("10.0.0.2").1.is_empty());
    }

    #[test]
    fn parallel_lists_are_concatenations() {
        let rule = "<rule action='accept' direction='out'><ip srcipaddr='$IP' dstipaddr='$TO'/></rule>";
        let lists = [("IP", "10.0.0.1"), ("IP", "10.0.0.2"), ("TO", "10.1.0.1"), ("TO", "10.1.0.2")];
        let (class, values) = class(rule, &lists);
        assert_eq!(class.sets.len(), 1);
        assert_eq!(class.sets[0].fields, [Datatype::Ipv4Addr, Datatype::Ipv4Addr]);
        let pair = |last| vec![vec![10, 0, 0, last], vec![10, 1, 0, last]];
        assert!(values[0].contains(&pair(1)) && values[0].contains(&pair(2)), "{values:?}");
    }

    #[test]
    fn networks_stay_in_the_class() {
        let rule = "<rule action='accept' direction='out'><ip srcipaddr='$IP' srcipmask='24'/></rule>";
        let of = |addr: &str| class(rule, &[("IP", addr)]);
        assert!(of("10.0.0.1").1.is_empty());
        assert_ne!(of("10.0.0.1").0, of("10.0.1.1").0);
    }

    #[test]
    fn fields_of_a_spanning_tree_frame_are_those_of_a_configuration() {
        let dropping = |attributes: &str| {
            let rule = format!("<rule action='drop' direction='out'><stp {attributes}/></rule>");
            let (class, _) = class(&rule, &[]);
            class.chains[0].rules.iter().filter(|rule| rule.action == Action::Drop).count()
        };
        assert_eq!(
            dropping("root-priority='1' root-cost='2' sender-priority='3' port='4' hello-time='5'"),
            1
        );
        assert_eq!(dropping("match='no' type='1' root-priority='1'"), 1);
        // A frame of another type has none of the fields.
        assert_eq!(dropping("match='no' type='0' root-priority='1'"), 0);
        assert_eq!(dropping("type='128' root-priority='1'"), 0);
    }

    #[test]
    fn limits_on_connections_are_counted_for_each_rule() {
        let rule =
            "<rule action='drop' direction='in'><tcp dstportstart='$PORT' connlimit-above='3'/></rule>";
        let (class, values) = class(rule, &[("PORT", "22"), ("PORT", "80")]);
        assert_eq!((class.counted.len(), values.len()), (2, 0));
    }
}
