//! Rules before the values of ports are taken out of them: each one combination of conditions.

use nwfilter_rules::{
    EthernetRule, EthernetTest, Family, IpRule, IpTest, Match, Origin, Unsupported, Verdict,
};

use super::{Action, Way};
use crate::condition::{self, All, Condition, Inexpressible};
use crate::kernel::Datatype;
use crate::kernel::expr::Reject;

/// NFT_REJECT_ICMPX_PORT_UNREACH
const PORT_UNREACHABLE: Reject = Reject::Icmpx(1);

/// A rule before its values are moved to sets.
pub(super) struct Flat {
    pub(super) conditions: Vec<(Condition, Option<String>)>,
    pub(super) action: Action,
    pub(super) origin: Origin,
    pub(super) comment: Option<String>,
}

impl Flat {
    /// Whether a value comes from a variable and can be that of a set. nft cannot list concatenations with numbers that
    /// have no type.
    pub(super) fn is_own((condition, variables): &(Condition, Option<String>)) -> bool {
        let Condition::Value { load, .. } = condition else { return false };
        variables.is_some() && !matches!(Datatype::of(*load), Datatype::Integer { .. })
    }

    /// Whether rules differ only in values of variables.
    pub(super) fn is_like(&self, other: &Self) -> bool {
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

    pub(super) fn has_own_negated(&self) -> bool {
        let negated =
            |(condition, _): &(Condition, _)| matches!(condition, Condition::Value { negated: true, .. });
        self.conditions.iter().any(|condition| Self::is_own(condition) && negated(condition))
    }

    pub(super) fn counts_connections(&self) -> bool {
        self.conditions.iter().any(|(condition, _)| matches!(condition, Condition::Connlimit { .. }))
    }
}

/// Of the rules for frames to a guest, those that are asked ahead. Packets are counted on their way out, and those that are
/// dropped there are logged there.
pub(super) fn ahead(flat: Vec<Flat>) -> Vec<Flat> {
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

pub(super) fn flatten_ethernet(
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

pub(super) fn flatten_ip(
    rule: &IpRule,
    family: Family,
    way: Way,
    flat: &mut Vec<Flat>,
) -> Result<(), Unsupported> {
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

/// What happens to a frame that a rule drops.
pub(super) fn dropped(way: Way) -> Action {
    match way {
        Way::FromGuest | Way::ToGuest => Action::Drop,
        // It meets the rule again.
        Way::Ahead => Action::Accept,
    }
}
