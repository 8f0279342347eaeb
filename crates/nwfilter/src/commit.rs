//! Carrying out transactions: rules into the kernel, documents into the stores, and back where something fails.

use std::collections::BTreeSet;
use std::sync::Arc;

use nwfilter_rules::{Applied, Batch, Ruleset, Warning};
use nwfilter_xml::PortDev;

use crate::apart::{self, Refused, Suspicion, Units};
use crate::files::carry_out;
use crate::group::{Ticket, Turn, Waiting};
use crate::stores::Stores;
use crate::transaction::{Change, Committed, Draft, Transaction};
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
    ///   after the others, and those with the same rule on other ports together in between. A group of n transactions
    ///   takes at most n + 65 attempts.
    /// * When the call returns, the change is in force in the kernel, is on disk, and is what every other call and
    ///   process sees.
    /// * If the process is killed meanwhile, every document is either the old or the new one, whole. Filters are put
    ///   into the store before bindings, and bindings are taken out before filters, so that no binding is left that
    ///   names a filter the transaction brought or took away. Of the transaction's documents only the first may be
    ///   in the store; the next [`Driver::reload`] brings the kernel to those that are.
    pub fn commit(&self, transaction: Transaction) -> Result<Committed, Error> {
        self.outcome(&self.queue().join(transaction))
    }

    /// Makes the changes of several transactions, each of which is judged as [`Driver::commit`] does. They are carried out
    /// together, as those of several threads are: one that is refused does not touch the others. The results are in the
    /// order of the transactions.
    pub fn commit_each(
        &self,
        transactions: impl IntoIterator<Item = Transaction>,
    ) -> Vec<Result<Committed, Error>> {
        let tickets: Vec<_> =
            transactions.into_iter().map(|transaction| self.queue().join(transaction)).collect();
        tickets.iter().map(|ticket| self.outcome(ticket)).collect()
    }

    /// Waits until a transaction was carried out, or carries out those that wait.
    fn outcome(&self, ticket: &Ticket) -> Result<Committed, Error> {
        let lead = match self.queue().turn(ticket) {
            Turn::Answered(answer) => return answer,
            Turn::Leads(lead) => lead,
        };
        let carried_out = self.change(|stores| {
            apart::carry_out(&mut Transactions { driver: self, stores }, lead.take());
            Ok(())
        });
        // The change is made once there is an answer, whatever went wrong afterwards.
        ticket.answer().unwrap_or_else(|| Err(carried_out.err().unwrap_or(Error::Abandoned)))
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

/// Transactions that are carried out together.
struct Transactions<'a> {
    driver: &'a Driver,
    stores: &'a mut Stores,
}

impl Units for Transactions<'_> {
    type Unit = Waiting;

    fn attempt(&mut self, units: Vec<Waiting>) -> Result<(), Refused<Waiting>> {
        let driver = self.driver;
        let (mut draft, mut accepted) =
            (Draft::new(self.stores, driver.host(), &driver.reporter), Vec::new());
        for waiting in units {
            match draft.add(&waiting.transaction) {
                Ok(outcome) => accepted.push((waiting, outcome)),
                Err(error) => waiting.answer(Err(error)),
            }
        }
        if accepted.is_empty() {
            return Ok(());
        }
        let (change, alone) = (draft.into_change(), accepted.len() == 1);
        let applied = match driver.make(self.stores, &change) {
            Ok(applied) => applied,
            Err(error) => {
                let suspicion = |ports: &BTreeSet<PortDev>| {
                    let most = ports.iter().map(|port| apart::suspicion(port, &change.batch, &error)).max();
                    match most.unwrap_or(Suspicion::Innocent) {
                        // The transactions before it may be to blame.
                        Suspicion::Guilty if !alone => Suspicion::Suspect,
                        other => other,
                    }
                };
                let units =
                    accepted.into_iter().map(|(waiting, outcome)| (waiting, suspicion(&outcome.ports)));
                let units = units.collect();
                return Err(Refused { error, units });
            }
        };
        driver.meter().group(accepted.len());
        for (waiting, outcome) in accepted {
            let repaired: Vec<_> = outcome.confirmed.intersection(&applied.changed).cloned().collect();
            driver.meter().repaired(repaired.len());
            driver.feed().publish(outcome.events);
            driver.feed().publish(repaired.into_iter().map(Event::DriftRepaired));
            let applied = if alone { applied.clone() } else { share(&applied, &outcome.ports) };
            waiting.answer(Ok(Committed { filters: outcome.filters, applied }));
        }
        Ok(())
    }

    fn refuse(&mut self, units: Vec<Waiting>, error: Error) {
        // Only a transaction alone is guilty.
        if let Some(waiting) = units.into_iter().next() {
            waiting.answer(Err(error));
        }
    }

    fn give_up(&mut self, units: Vec<Waiting>, error: Error) -> Vec<Waiting> {
        if units.len() == 1 {
            self.refuse(units, error);
            return Vec::new();
        }
        log::debug!("{} transactions are carried out one by one: {error}", units.len());
        units
    }
}

/// What was done for some of the ports.
fn share(applied: &Applied, ports: &BTreeSet<PortDev>) -> Applied {
    let is_about = |warning: &&Warning| ports.contains(warning.port());
    Applied {
        changed: applied.changed.intersection(ports).cloned().collect(),
        changed_sets: BTreeSet::new(),
        commits: applied.commits,
        warnings: applied.warnings.iter().filter(is_about).cloned().collect(),
        differences: Vec::new(),
    }
}
