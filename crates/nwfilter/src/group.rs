//! Group commit: what threads ask for while one is at work is carried out together.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nwfilter_xml::PortDev;

use crate::learn::known::Change;
use crate::learn::service::Settled;
use crate::namespace::Id;
use crate::transaction::{Committed, Transaction};
use crate::{Error, Reloaded};

/// A change of stores or kernel that a thread waits for. There is no other way to change either.
pub(crate) enum Request {
    /// Of a caller.
    Commit(Transaction, Answer<Committed>),
    /// Of the learner: what it found out about the guests at ports, and the ports whose rules it could not have applied
    /// before.
    Learn(Vec<(PortDev, Change)>, BTreeSet<PortDev>, Answer<Settled>),
    /// Of a caller or the reconciler: the whole kernel.
    Reload(Answer<Reloaded>),
}

/// The requests that wait to be carried out, in the order of their arrival.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// A thread that led has ended.
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
    /// Lets a request wait. Only requests of one network namespace are carried out together.
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

    /// Waits until the request was carried out by another thread, or this one is to do it.
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

/// What a thread that waits has to do.
pub(crate) enum Turn<'a, T> {
    /// Nothing: this is the answer.
    Answered(Result<T, Error>),
    /// To carry out what waits.
    Leads(Lead<'a>),
}

/// The right of one thread to carry out what waits. The others go on when it is dropped.
pub(crate) struct Lead<'a> {
    queue: &'a Queue,
    /// Those of its own request.
    number: u64,
    namespace: Option<Id>,
}

impl Lead<'_> {
    /// The requests that wait and can be carried out by this thread, its own among them.
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
