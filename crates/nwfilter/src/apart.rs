//! Carries out independent units together, and separately if something is refused: one failing unit does not block the
//! others, and each refusal goes to its unit.

use std::collections::VecDeque;

use nwfilter_rules::{ApplyError, Batch, Desired, Origin, Ruleset, Scope};
use nwfilter_xml::PortDev;

use crate::Error;

/// Groups that may be refused before the units of the next one are not told apart any more.
const MAX_REFUSALS: usize = 32;

/// What a unit has to do with a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Suspicion {
    /// Nothing.
    Innocent,
    /// It has a rule that comes from the same rule of a filter.
    Alike,
    /// It is about the port that was refused, but so may be another unit of the group.
    Suspect,
    /// It was refused.
    Guilty,
}

/// How units of one kind are carried out.
pub(crate) trait Units {
    type Unit;

    /// Carries out all of the units or none. Those that are refused before the kernel is asked may be left out.
    fn attempt(&mut self, units: Vec<Self::Unit>) -> Result<(), Refused<Self::Unit>>;

    /// Ends guilty units.
    fn refuse(&mut self, units: Vec<Self::Unit>, error: Error);

    /// Ends units of which the refusal does not say who is guilty, except for those that it returns: they are tried
    /// alone.
    fn give_up(&mut self, units: Vec<Self::Unit>, error: Error) -> Vec<Self::Unit>;
}

/// A refusal of a group.
pub(crate) struct Refused<U> {
    pub(crate) error: Error,
    pub(crate) units: Vec<(U, Suspicion)>,
}

/// Carries out units.
///
/// All are tried at once. Of a group that is refused, the guilty units end; innocent ones come first, so that they do not
/// wait for the others; those alike are tried together after them, and suspects alone. Where a refusal does not tell the
/// units apart, or after [`MAX_REFUSALS`] of them, [`Units::give_up`] decides. So there are at most 2 × `MAX_REFUSALS` + 1
/// attempts with groups, and one for each unit alone.
pub(crate) fn carry_out<W: Units>(work: &mut W, units: Vec<W::Unit>) {
    let (mut groups, mut refusals) = (VecDeque::from([units]), 0);
    while let Some(group) = groups.pop_front() {
        let Err(Refused { error, units }) = work.attempt(group) else { continue };
        refusals += 1;
        let some = |suspicion| units.iter().any(|(_, other)| *other == suspicion);
        let tells_apart = some(Suspicion::Guilty)
            || (units.len() > 1 && some(Suspicion::Suspect))
            || (some(Suspicion::Innocent) && some(Suspicion::Alike));
        if !tells_apart || refusals > MAX_REFUSALS {
            let alone = work.give_up(units.into_iter().map(|(unit, _)| unit).collect(), error);
            groups.extend(alone.into_iter().map(|unit| vec![unit]));
            continue;
        }
        let (mut innocent, mut alike, mut guilty) = (Vec::new(), Vec::new(), Vec::new());
        for (unit, suspicion) in units {
            match suspicion {
                Suspicion::Innocent => innocent.push(unit),
                Suspicion::Alike => alike.push(unit),
                Suspicion::Suspect => groups.push_back(vec![unit]),
                Suspicion::Guilty => guilty.push(unit),
            }
        }
        if !guilty.is_empty() {
            work.refuse(guilty, error);
        }
        groups.push_front(innocent);
        groups.extend(Some(alike).filter(|alike| !alike.is_empty()));
    }
}

/// What a port of a refused batch has to do with the refusal: guilty, alike or innocent.
pub(crate) fn suspicion(port: &PortDev, batch: &Batch, error: &Error) -> Suspicion {
    let has = |holds: &dyn Fn(&Ruleset) -> bool| match batch.ports.get(port) {
        Some(Desired::Filtered(ruleset)) => holds(ruleset),
        Some(Desired::Gone) | None => false,
    };
    let (named, origin) = match error {
        Error::Apply(ApplyError::Refused(refused)) => (&refused.port, &refused.origin),
        Error::Apply(ApplyError::Unsupported { port, source }) => (port, &source.origin),
        Error::Apply(ApplyError::Unavailable { scope: Scope::IpRules, .. }) => {
            return if has(&Ruleset::has_ip_rules) { Suspicion::Guilty } else { Suspicion::Innocent };
        }
        _ => return Suspicion::Innocent,
    };
    // A built-in rule is not in a filter that ports could share.
    let is_alike = |ruleset: &Ruleset| {
        *origin != Origin::BUILT_IN && ruleset.rules().any(|rule| rule.origin() == origin)
    };
    match named == port {
        true => Suspicion::Guilty,
        false if has(&is_alike) => Suspicion::Alike,
        false => Suspicion::Innocent,
    }
}
