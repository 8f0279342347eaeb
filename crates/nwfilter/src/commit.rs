//! Carries out changes: applies rules to the kernel, stores documents, and reverts both if something fails.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use nwfilter_rules::{Applied, ApplyError, Batch, DesiredSet, Ruleset, Warning};
use nwfilter_xml::SetName;

use crate::apart::{self, Refused, Suspicion, Units};
use crate::files::carry_out;
use crate::group::{Answer, Request, Ticket, Turn};
use crate::learn::service::{Learned, Settled};
use crate::stores::Stores;
use crate::transaction::{Change, Committed, Concerned, Draft, Outcome, Transaction};
use crate::{Cut, Driver, Error, Event, Phase};

impl Driver {
    /// Makes the changes of a transaction, or none of them.
    ///
    /// * The documents are written under temporary names, the rules are applied in one batch, then the documents are renamed.
    ///   If a step fails, those before it are reverted: stores and kernel are unchanged, and the error says why.
    /// * Transactions that arrive meanwhile wait and are then carried out together, in the order of their arrival, each
    ///   checked against the result of those before it. A refused one does not affect the others: if the kernel refuses a
    ///   rule, the transactions of its port are tried one by one after the others, and those with the same rule on other
    ///   ports together in between. A group of n transactions takes at most n + 65 attempts.
    /// * When the call returns, the change is in force in the kernel and on disk, and every other call and process sees it.
    /// * If the process is killed, every document is either old or new, and complete. Filters are stored before bindings, and
    ///   bindings are removed before filters, so that no binding names a missing filter. Perhaps only the first documents
    ///   of the transaction are stored; the next [`Driver::reload`] applies those.
    pub fn commit(&self, transaction: Transaction) -> Result<Committed, Error> {
        let (begin, bound) = (Instant::now(), transaction.bound_ports());
        let done = self.ask(|answer| Request::Commit(transaction, answer));
        self.meter().transaction(bound, begin.elapsed(), done.is_ok());
        done.map(|done| self.cut(done))
    }

    /// Commits several transactions as if several threads called [`Driver::commit`]: together, and a refused one does not affect
    /// the others. The results are in the order of the transactions.
    pub fn commit_each(
        &self,
        transactions: impl IntoIterator<Item = Transaction>,
    ) -> Vec<Result<Committed, Error>> {
        let begin = Instant::now();
        let join = |transaction: Transaction| {
            (transaction.bound_ports(), self.join(|answer| Request::Commit(transaction, answer)))
        };
        let tickets: Vec<_> = transactions.into_iter().map(join).collect();
        let outcome = |(bound, ticket): &(usize, Ticket<Committed>)| {
            let done = self.outcome(ticket);
            self.meter().transaction(*bound, begin.elapsed(), done.is_ok());
            done.map(|done| self.cut(done))
        };
        let done = tickets.iter().map(outcome).collect();
        self.learner.listen_if_needed(self);
        done
    }

    /// Carries out a request, in this thread or in one that already leads the queue.
    pub(crate) fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, Error> {
        let done = self.outcome(&self.join(request))?;
        // Only after the queue is free again: the learner may wait in it.
        self.learner.listen_if_needed(self);
        Ok(done)
    }

    fn join<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Ticket<T> {
        self.queue().join(self.config().network_namespace.id(), request)
    }

    /// Waits until another thread has carried out a request, or carries out all that wait.
    fn outcome<T>(&self, ticket: &Ticket<T>) -> Result<T, Error> {
        let lead = match self.queue().turn(ticket) {
            Turn::Answered(answer) => return answer,
            Turn::Leads(lead) => lead,
        };
        let carried_out = self.inside(|| self.change(|stores| self.carry_out(stores, lead.take())));
        // The answer exists only after the change is made, so later failures do not matter.
        ticket.answer().unwrap_or_else(|| Err(carried_out.err().unwrap_or(Error::Abandoned)))
    }

    /// Carries out requests: those about single ports together, then those about all ports.
    fn carry_out(&self, stores: &mut Stores, requests: Vec<Request>) {
        let (mut units, mut reloads) = (Vec::new(), Vec::new());
        for request in requests {
            match request {
                Request::Commit(transaction, answer) => units.push(Unit::Transaction(transaction, answer)),
                Request::Learn(changes, ports, answer) => match stores.learn(&changes, ports) {
                    Ok(learned) => units.push(Unit::Learned(learned, answer)),
                    Err(error) => answer.give(Err(error)),
                },
                Request::Reload(answer) => reloads.push(answer),
            }
        }
        apart::carry_out(&mut Changes { driver: self, stores }, units);
        for answer in reloads {
            answer.give(self.bring_all(stores));
        }
    }

    /// Changes kernel and stores, or neither.
    fn make(&self, stores: &mut Stores, change: &Change) -> Result<Applied, Error> {
        let steps = change.prepare(stores)?;
        let documents = steps.len();
        let applied = self.apply(&change.batch)?;
        self.reporter.report(Phase::Stores, 0, documents);
        let stored = self.publish(stores, |stores| {
            let forgotten = stores.known.forget(&change.forgotten);
            let stored = forgotten
                .and_then(|forgotten| carry_out(steps).inspect_err(|_| stores.known.remember(forgotten)));
            if let Err(error) = change.take_note(stores, stored.is_ok()) {
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

    /// Reverts the ports and sets of a batch to the stores, because the change could not be stored.
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
        let mut contents = if batch.sets.is_empty() { BTreeMap::new() } else { stores.contents() };
        for name in batch.sets.keys() {
            let held = contents.remove(name).and_then(Result::ok).map_or(DesiredSet::Gone, DesiredSet::Holds);
            old.sets.insert(name.clone(), held);
        }
        if let Err(failed) = self.apply(&old) {
            log::error!("taking back what could not be stored: {failed}");
        }
        error
    }
}

/// A unit that is carried out as a whole or not at all.
enum Unit {
    Transaction(Transaction, Answer<Committed>),
    Learned(Learned, Answer<Settled>),
}

impl Unit {
    fn refuse(self, error: Error) {
        match self {
            Self::Transaction(_, answer) => answer.give(Err(error)),
            Self::Learned(_, answer) => answer.give(Err(error)),
        }
    }
}

/// Units that are carried out together.
struct Changes<'a> {
    driver: &'a Driver,
    stores: &'a mut Stores,
}

impl Units for Changes<'_> {
    type Unit = Unit;

    fn attempt(&mut self, units: Vec<Unit>) -> Result<(), Refused<Unit>> {
        let driver = self.driver;
        let mut draft = Draft::new(self.stores, driver.host(), &driver.reporter);
        let mut accepted = Vec::new();
        for unit in units {
            let outcome = match &unit {
                Unit::Transaction(transaction, _) => draft.add(transaction),
                Unit::Learned(learned, _) => Ok(draft.follow(&learned.ports)),
            };
            match outcome {
                Ok(outcome) => accepted.push((unit, outcome)),
                Err(error) => unit.refuse(error),
            }
        }
        if accepted.is_empty() {
            return Ok(());
        }
        let (change, alone) = (draft.into_change(), accepted.len() == 1);
        let applied = match driver.make(self.stores, &change) {
            Ok(applied) => applied,
            Err(error) => {
                let suspicion = |outcome: &Outcome| {
                    let ports = outcome.ports.iter();
                    let most = ports.map(|port| apart::suspicion(port, &change.batch, &error)).max();
                    let of_set = matches!(&error, Error::Apply(ApplyError::Set { set, .. }) if outcome.changed_sets.contains(set));
                    let most = if of_set { Some(Suspicion::Guilty) } else { most };
                    match most.unwrap_or(Suspicion::Innocent) {
                        // The units before it may have caused it.
                        Suspicion::Guilty if !alone => Suspicion::Suspect,
                        other => other,
                    }
                };
                let with_suspicion = |(unit, outcome): (_, Outcome)| (unit, suspicion(&outcome));
                let units = accepted.into_iter().map(with_suspicion).collect();
                return Err(Refused { error, units });
            }
        };
        let transactions = accepted.iter().filter(|(unit, _)| matches!(unit, Unit::Transaction(..)));
        driver.meter().group(transactions.count());
        for (unit, outcome) in accepted {
            let repaired: Vec<_> = outcome.confirmed.intersection(&applied.changed).cloned().collect();
            driver.meter().repaired(repaired.len());
            let told = |name: &SetName| outcome.events.iter().any(|event| event.set() == Some(name));
            let of_tags = applied.changed_sets.intersection(&outcome.changed_sets).filter(|name| !told(name));
            let of_tags: Vec<_> = of_tags.cloned().map(Event::SetChanged).collect();
            driver.feed().publish(outcome.events.iter().cloned().chain(of_tags));
            driver.feed().publish(repaired.into_iter().map(Event::DriftRepaired));
            match unit {
                Unit::Transaction(transaction, answer) => {
                    let applied = if alone { applied.clone() } else { share(&applied, &outcome) };
                    let concerned = Concerned { ports: outcome.ports, sets: outcome.changed_sets };
                    let concerned = transaction.cuts.then_some(concerned);
                    answer.give(Ok(Committed {
                        filters: outcome.filters,
                        sets: outcome.sets,
                        applied,
                        cut: Cut::default(),
                        concerned,
                    }));
                }
                Unit::Learned(Learned { refused, .. }, answer) => {
                    answer.give(Ok(Settled { complete: outcome.complete, refused }));
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, units: Vec<Unit>, error: Error) {
        // Only a unit that was tried alone is certain to have caused it.
        if let Some(unit) = units.into_iter().next() {
            unit.refuse(error);
        }
    }

    fn give_up(&mut self, units: Vec<Unit>, error: Error) -> Vec<Unit> {
        if units.len() == 1 {
            self.refuse(units, error);
            return Vec::new();
        }
        log::debug!("{} changes are carried out one by one: {error}", units.len());
        units
    }
}

/// The result of one of several transactions.
fn share(applied: &Applied, Outcome { ports, changed_sets, .. }: &Outcome) -> Applied {
    let is_about = |warning: &&Warning| ports.contains(warning.port());
    Applied {
        changed: applied.changed.intersection(ports).cloned().collect(),
        changed_sets: applied.changed_sets.intersection(changed_sets).cloned().collect(),
        commits: applied.commits,
        warnings: applied.warnings.iter().filter(is_about).cloned().collect(),
        differences: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use nwfilter_rules::Fake;
    use nwfilter_xml::{Binding, BindingBuilder};

    use super::*;
    use crate::learn::known::{Change, GuestKey};
    use crate::{BindingState, Host, Source};

    const LEARNING: &str =
        "<filter name='f'><rule action='accept' direction='out'><ip srcipaddr='$IP'/></rule></filter>";

    fn binding(port: &str) -> BindingBuilder {
        let builder = Binding::builder().owner("vm", nwfilter_xml::Uuid::from_u128(1)).port(port);
        builder.mac("52:54:00:7b:35:93").filter("f")
    }

    #[test]
    fn what_is_learned_shares_a_batch_with_transactions_and_neither_refuses_the_other() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let builder = Driver::builder().config_dir(dir.path().join("f")).state_dir(dir.path().join("s"));
        let driver = builder.host(Host::fake()).without_learner().open(fake.clone()).unwrap();
        driver.define_filter("f.xml", LEARNING).unwrap();
        let p0 = binding("p0").build().unwrap();
        let p1 = binding("p1").parameter("IP", "10.9.8.6").build().unwrap();
        driver.create_binding(p0.clone()).unwrap();
        let asked: Arc<Mutex<Vec<Vec<String>>>> = Arc::default();
        let record = asked.clone();
        fake.before_apply(move |batch| {
            record.lock().unwrap().push(batch.ports.keys().map(ToString::to_string).collect());
        });
        fake.refuse(&p1.port, true);

        let found = Change::Learned {
            guest: GuestKey::of(&p0),
            address: "10.9.8.7".parse().unwrap(),
            source: Source::Arp,
        };
        let changes = vec![(p0.port.clone(), found)];
        let learn = driver.join(|answer| Request::Learn(changes, BTreeSet::new(), answer));
        let mut bind = Transaction::new();
        bind.create_binding(p1);
        let bind = driver.join(|answer| Request::Commit(bind, answer));
        let reload = driver.join(Request::Reload);

        assert_eq!(driver.outcome(&learn).unwrap().complete, std::slice::from_ref(&p0.port));
        assert!(matches!(bind.answer(), Some(Err(Error::Apply(_)))), "it was carried out with the other");
        assert!(reload.answer().unwrap().unwrap().failed.is_empty());
        assert_eq!(*asked.lock().unwrap(), [vec!["p0", "p1"], vec!["p1"], vec!["p0"], vec!["p0"]]);
        assert!(matches!(driver.binding_state(&p0.port), Ok(BindingState::Learned { .. })));
        assert_eq!(driver.bindings().unwrap().len(), 1);
    }
}
