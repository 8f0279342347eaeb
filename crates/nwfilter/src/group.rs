//! Group commit: requests that arrive while a thread is at work are carried out together.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nwfilter_xml::PortDev;

use crate::learn::known::Change;
use crate::learn::service::Settled;
use crate::namespace::Id;
use crate::transaction::{Committed, Transaction};
use crate::{Error, Reloaded};

/// A change of stores or kernel that a thread waits for. All changes of both go through this queue.
pub(crate) enum Request {
    /// A transaction of a caller.
    Commit(Transaction, Answer<Committed>),
    /// From the learner: what it learned about guests, and the ports whose rules it could not apply before.
    Learn(Vec<(PortDev, Change)>, BTreeSet<PortDev>, Answer<Settled>),
    /// A reload, from a caller or the reconciler.
    Reload(Answer<Reloaded>),
}

/// The waiting requests, in the order of their arrival.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Signals that the leading thread has finished.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<Waiting>,
    next: u64,
    /// Whether a thread carries out requests, or is about to.
    is_led: bool,
}

struct Waiting {
    number: u64,
    namespace: Option<Id>,
    request: Request,
}

/// Where a result goes.
pub(crate) struct Answer<T>(Sender<Result<T, Error>>);

/// The right to a result.
pub(crate) struct Ticket<T> {
    number: u64,
    namespace: Option<Id>,
    answer: Receiver<Result<T, Error>>,
}

impl Queue {
    /// Adds a request. Only requests of one network namespace are carried out together.
    pub(crate) fn join<T>(
        &self,
        namespace: Option<Id>,
        request: impl FnOnce(Answer<T>) -> Request,
    ) -> Ticket<T> {
        let (sender, answer) = channel();
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.waiting.push(Waiting { number, namespace, request: request(Answer(sender)) });
        Ticket { number, namespace, answer }
    }

    /// Waits until another thread has carried out the request, or until this thread must lead.
    pub(crate) fn turn<T>(&self, ticket: &Ticket<T>) -> Turn<'_, T> {
        let mut state = self.state();
        loop {
            if let Some(answer) = ticket.answer() {
                return Turn::Answered(answer);
            }
            if !state.is_led {
                state.is_led = true;
                let Ticket { number, namespace, .. } = *ticket;
                return Turn::Leads(Lead { queue: self, number, namespace });
            }
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is a single step, so a panic leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a waiting thread does next.
pub(crate) enum Turn<'a, T> {
    /// Return this answer.
    Answered(Result<T, Error>),
    /// Carry out the waiting requests.
    Leads(Lead<'a>),
}

/// The right of one thread to carry out requests. The others continue when it is dropped.
pub(crate) struct Lead<'a> {
    queue: &'a Queue,
    /// Those of its own request.
    number: u64,
    namespace: Option<Id>,
}

impl Lead<'_> {
    /// The waiting requests that this thread can carry out, including its own.
    pub(crate) fn take(&self) -> Vec<Request> {
        let joins = |other: &mut Waiting| {
            let near = other.namespace.is_some() && other.namespace == self.namespace;
            near || other.number == self.number
        };
        self.queue.state().waiting.extract_if(.., joins).map(|waiting| waiting.request).collect()
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        // If it was not taken, nobody waits for its answer any more.
        state.waiting.retain(|waiting| waiting.number != self.number);
        state.is_led = false;
        self.queue.ended.notify_all();
    }
}

impl<T> Answer<T> {
    pub(crate) fn give(self, result: Result<T, Error>) {
        // Who asked waits, unless its thread was ended from outside.
        let _ = self.0.send(result);
    }
}

impl<T> Ticket<T> {
    /// The answer, once somebody has carried out the request.
    pub(crate) fn answer(&self) -> Option<Result<T, Error>> {
        match self.answer.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Error::Abandoned)),
        }
    }
}
