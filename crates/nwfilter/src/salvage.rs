//! Applying what can be applied of a batch, when the kernel or its tools refuse some of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{Applied, ApplyError, Batch, Origin, Ruleset, Scope};
use nwfilter_xml::PortDev;

use crate::{Driver, Error};

/// Refusals of single rules that the tools are asked for. Ports beyond that share the last one.
const MAX_REFUSALS: usize = 32;

/// What was applied of a batch.
pub(crate) struct Salvaged {
    pub(crate) applied: Applied,
    /// The ports that were refused, each with the reason. They have what the kernel held, or drop everything.
    pub(crate) refused: Vec<(PortDev, Arc<Error>)>,
}

/// Applies a batch as far as possible. `filtered` are the ports that what the kernel holds filters.
///
/// First come the ports that have nothing in common with one that is refused, so that they do not wait for the others.
/// Ports that are refused or not tried yet are closed meanwhile if the kernel holds no rules for them.
pub(crate) fn apply(
    driver: &Driver,
    mut batch: Batch,
    filtered: &BTreeSet<PortDev>,
) -> Result<Salvaged, Error> {
    let (mut refused, mut later) = (Vec::new(), Batch { ports: BTreeMap::new(), ..batch });
    let mut set_aside = BTreeSet::new();
    let applied = loop {
        let error = match driver.apply(&batch) {
            Ok(applied) => break applied,
            Err(error) => error,
        };
        let suspects = suspects(&batch, &error);
        // Where even what stands in for its rules is refused, it is not about the port.
        if suspects.is_empty() || suspects.iter().any(|(port, _)| set_aside.contains(port)) {
            return Err(error);
        }
        let error = Arc::new(error);
        for (port, suspicion) in suspects {
            set_aside.insert(port.clone());
            let Some(desired) = batch.ports.remove(&port) else { continue };
            if !filtered.contains(&port) {
                batch.filter(port.clone(), Arc::new(Ruleset::drop_all()));
            }
            match suspicion {
                Suspicion::Named => refused.push((port, error.clone())),
                Suspicion::Similar => drop(later.ports.insert(port, desired)),
            }
        }
    };
    let mut salvaged = Salvaged { applied, refused };
    apply_one_by_one(driver, later, &mut salvaged);
    Ok(salvaged)
}

/// Applies a batch whose ports have a rule in common that was refused on another port: each refusal names one.
fn apply_one_by_one(driver: &Driver, mut batch: Batch, salvaged: &mut Salvaged) {
    for refusals in 1.. {
        let error = match driver.apply(&batch) {
            Ok(applied) => return merge(&mut salvaged.applied, applied),
            Err(error) => Arc::new(error),
        };
        let mut guilty: Vec<_> = suspects(&batch, &error)
            .into_iter()
            .filter_map(|(port, suspicion)| (suspicion == Suspicion::Named).then_some(port))
            .collect();
        if guilty.is_empty() || refusals > MAX_REFUSALS {
            guilty = batch.ports.keys().cloned().collect();
        }
        for port in guilty {
            batch.ports.remove(&port);
            salvaged.refused.push((port, error.clone()));
        }
    }
}

/// Why a port may be the reason of a refusal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Suspicion {
    /// The refusal is about it.
    Named,
    /// It has a rule that comes from the same rule of a filter.
    Similar,
}

/// The ports of a batch that a refusal may be about; none where it is about the tools themselves.
fn suspects(batch: &Batch, error: &Error) -> Vec<(PortDev, Suspicion)> {
    let is_similar = |ruleset: &Ruleset, origin: &Origin| {
        // A built-in rule is not in a filter that ports could share.
        *origin != Origin::BUILT_IN && ruleset.rules().any(|rule| rule.origin() == origin)
    };
    let suspicion = |port: &PortDev, ruleset: &Ruleset| {
        let (named, origin) = match error {
            Error::Apply(ApplyError::Refused(refused)) => (&refused.port, &refused.origin),
            Error::Apply(ApplyError::Unsupported { port, source }) => (port, &source.origin),
            Error::Apply(ApplyError::Unavailable { scope: Scope::IpRules, .. }) => {
                return ruleset.has_ip_rules().then_some(Suspicion::Named);
            }
            _ => return None,
        };
        match named == port {
            true => Some(Suspicion::Named),
            false => is_similar(ruleset, origin).then_some(Suspicion::Similar),
        }
    };
    batch.filtered().filter_map(|(port, ruleset)| Some((port.clone(), suspicion(port, ruleset)?))).collect()
}

fn merge(applied: &mut Applied, more: Applied) {
    applied.changed.extend(more.changed);
    applied.commits += more.commits;
    applied.warnings.extend(more.warnings);
    applied.warnings.sort();
    applied.warnings.dedup();
    applied.differences.extend(more.differences);
    applied.differences.sort();
}
