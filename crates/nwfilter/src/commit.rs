//! Carrying out transactions: rules into the kernel, documents into the stores, and back where something fails.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use nwfilter_rules::{Applied, ApplyError, Batch, Ruleset, Warning};
use nwfilter_xml::PortDev;

use crate::files::carry_out;
use crate::group::{Turn, Waiting};
use crate::stores::Stores;
use crate::transaction::{Change, Committed, Draft, Outcome, Transaction};
use crate::{Driver, Error, Event, Phase};

impl Driver {
    /// Makes the changes of a transaction, or none of them.
    ///
    /// * The kernel is changed first, by a single batch, while the documents are on disk under names that nobody
    ///   reads. When it has taken the rules, the documents get their names. What fails is taken back, and the error
    ///   says why; stores and kernel are then as they were.
    /// * Transactions of other threads that come while one is carried out wait, and are then carried out together,
    ///   in the order of their arrival, each judged by what those before it leave. One that is refused does not
    ///   touch the others: where the kernel refuses a rule, the transactions about its port are tried one by one
    ///   after the others.
    /// * When the call returns, the change is in force in the kernel, is on disk, and is what every other call and
    ///   process sees.
    /// * If the process is killed meanwhile, every document is either the old or the new one, whole. Filters are put
    ///   into the store before bindings, and bindings are taken out before filters, so that no binding is left that
    ///   names a filter the transaction brought or took away. Of the transaction's documents only the first may be
    ///   in the store; the next [`Driver::reload`] brings the kernel to those that are.
    pub fn commit(&self, transaction: Transaction) -> Result<Committed, Error> {
        let ticket = self.queue().join(transaction);
        let lead = match self.queue().turn(&ticket) {
            Turn::Answered(answer) => return answer,
            Turn::Leads(lead) => lead,
        };
        let carried_out = self.change(|stores| {
            self.carry_out(stores, lead.take());
            Ok(())
        });
        // The change is made once there is an answer, whatever went wrong afterwards.
        ticket.answer().unwrap_or_else(|| Err(carried_out.err().unwrap_or(Error::Abandoned)))
    }

    /// Carries out transactions together, or, where that fails, apart.
    fn carry_out(&self, stores: &mut Stores, group: Vec<Waiting>) {
        let mut groups = VecDeque::from([group]);
        while let Some(group) = groups.pop_front() {
            let (mut draft, mut accepted) = (Draft::new(stores, self.host(), &self.reporter), Vec::new());
            for waiting in group {
                match draft.add(&waiting.transaction) {
                    Ok(outcome) => accepted.push((waiting, outcome)),
                    Err(error) => waiting.answer(Err(error)),
                }
            }
            let change = draft.into_change();
            match self.make(stores, &change) {
                Ok(applied) => {
                    let alone = accepted.len() == 1;
                    if !accepted.is_empty() {
                        self.meter().group(accepted.len());
                    }
                    for (waiting, outcome) in accepted {
                        let repaired: Vec<_> =
                            outcome.confirmed.intersection(&applied.changed).cloned().collect();
                        self.meter().repaired(repaired.len());
                        self.feed().publish(outcome.events);
                        self.feed().publish(repaired.into_iter().map(Event::DriftRepaired));
                        let applied = if alone { applied.clone() } else { share(&applied, &outcome.ports) };
                        waiting.answer(Ok(Committed { filters: outcome.filters, applied }));
                    }
                }
                Err(error) if accepted.len() <= 1 => {
                    if let Some((waiting, _)) = accepted.pop() {
                        waiting.answer(Err(error));
                    }
                }
                Err(error) => {
                    log::debug!("{} transactions are carried out apart: {error}", accepted.len());
                    let (guiltless, suspects) = part(accepted, &error);
                    groups.extend(Some(guiltless).filter(|group| !group.is_empty()));
                    groups.extend(suspects.into_iter().map(|suspect| vec![suspect]));
                }
            }
        }
    }

    /// Makes a change in kernel and stores, or in neither.
    fn make(&self, stores: &mut Stores, change: &Change) -> Result<Applied, Error> {
        let steps = change.prepare(stores)?;
        let documents = steps.len();
        let applied = self.apply(&change.batch)?;
        self.reporter.report(Phase::Stores, 0, documents);
        let stored = self.publish(stores, |stores| {
            let forgotten = stores.known.forget(&change.forgotten);
            let stored = forgotten
                .and_then(|forgotten| carry_out(steps).inspect_err(|_| stores.known.remember(forgotten)));
            if let Err(error) = change.take_note(stores) {
                log::error!("what was stored is read when the stores are needed again: {error}");
            }
            stored
        });
        match stored {
            Ok(()) => {
                self.reporter.report(Phase::Stores, documents, documents);
                Ok(applied)
            }
            Err(error) => Err(self.take_back(stores, &change.batch, error)),
        }
    }

    /// Brings the ports of a batch back to what the stores say, because the change could not be stored.
    fn take_back(&self, stores: &Stores, batch: &Batch, error: Error) -> Error {
        let filters = stores.filter_map();
        let mut old = Batch::default();
        for port in batch.ports.keys() {
            let binding = stores.bindings.get(port.as_str());
            match binding.map(|binding| stores.ruleset(&filters, binding)) {
                Some(Ok(ruleset)) => old.filter(port.clone(), Arc::new(ruleset)),
                Some(Err(_)) => old.filter(port.clone(), Arc::new(Ruleset::drop_all())),
                None => old.remove(port.clone()),
            }
        }
        if let Err(failed) = self.apply(&old) {
            log::error!("taking back what could not be stored: {failed}");
        }
        error
    }
}

/// What was done for some of the ports.
fn share(applied: &Applied, ports: &BTreeSet<PortDev>) -> Applied {
    let is_about = |warning: &&Warning| ports.contains(warning.port());
    Applied {
        changed: applied.changed.intersection(ports).cloned().collect(),
        commits: applied.commits,
        warnings: applied.warnings.iter().filter(is_about).cloned().collect(),
        differences: Vec::new(),
    }
}

/// Parts transactions into those that have nothing to do with an error, and those that may have.
fn part(accepted: Vec<(Waiting, Outcome)>, error: &Error) -> (Vec<Waiting>, Vec<Waiting>) {
    let is_guiltless = |outcome: &Outcome| match error {
        Error::Apply(ApplyError::Refused(refused)) => !outcome.ports.contains(&refused.port),
        Error::Apply(ApplyError::Unsupported { port, .. }) => !outcome.ports.contains(port),
        _ => false,
    };
    let (mut guiltless, mut suspects) = (Vec::new(), Vec::new());
    for (waiting, outcome) in accepted {
        if is_guiltless(&outcome) { guiltless.push(waiting) } else { suspects.push(waiting) }
    }
    match suspects.is_empty() {
        true => (Vec::new(), guiltless),
        false => (guiltless, suspects),
    }
}
