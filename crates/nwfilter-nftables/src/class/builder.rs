//! Builds a class: the chains of a ruleset, and which values become sets.

use std::collections::BTreeSet;

use nwfilter_rules::{
    EthernetRule, EthernetSide, Family, HelperRule, HelperSide, IpPart, IpRule, IpTest, Match, Origin,
    RootEntry, Ruleset, Unsupported, Verdict,
};

use super::flat::{Flat, ahead, dropped, flatten_ethernet, flatten_ip};
use super::{
    Action, ChainIndex, Class, ClassChain, ClassMatch, ClassRule, ClassSet, Counted, HelperKind, Values, Way,
};
use crate::condition::{self, Condition};
use crate::kernel::Datatype;
use crate::kernel::expr::{IFNAMSIZ, Register};

/// A class, and the values of the port, as far as they are built.
pub(super) struct Builder {
    pub(super) class: Class,
    pub(super) values: Values,
}

impl Builder {
    /// The chains for the frames of a way.
    pub(super) fn side(&mut self, ruleset: &Ruleset, way: Way) -> Result<(), Unsupported> {
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
    pub(super) fn answers(&mut self, ruleset: &Ruleset) -> Result<(), Unsupported> {
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
