//! Group commit: transactions of threads that come while another is carried out are carried out together.

use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::transaction::{Committed, Transaction};

/// The transactions that wait to be carried out, in the order of their arrival.
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
    /// Whether a thread carries out transactions, or is about to.
    is_led: bool,
}

/// A transaction that somebody waits for.
pub(crate) struct Waiting {
    number: u64,
    namespace: Option<Namespace>,
    pub(crate) transaction: Transaction,
    answer: Sender<Result<Committed, Error>>,
}

/// The right to the answer.
pub(crate) struct Ticket {
    number: u64,
    namespace: Option<Namespace>,
    answer: Receiver<Result<Committed, Error>>,
}

/// A network namespace. Interfaces and tables are those of the thread that asks, so that only transactions of one
/// namespace can be carried out together.
type Namespace = (u64, u64);

impl Queue {
    /// Lets a transaction wait.
    pub(crate) fn join(&self, transaction: Transaction) -> Ticket {
        let file = std::fs::metadata("/proc/thread-self/ns/net");
        let namespace = file.ok().map(|file| (file.dev(), file.ino()));
        let (sender, answer) = channel();
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.waiting.push(Waiting { number, namespace, transaction, answer: sender });
        Ticket { number, namespace, answer }
    }

    /// Waits until the transaction was carried out by another thread, or this one is to do it.
    pub(crate) fn turn<'a>(&'a self, ticket: &'a Ticket) -> Turn<'a> {
        let mut state = self.state();
        loop {
            if let Some(answer) = ticket.answer() {
                return Turn::Answered(answer);
            }
            if !state.is_led {
                state.is_led = true;
                return Turn::Leads(Lead { queue: self, ticket });
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
pub(crate) enum Turn<'a> {
    /// Nothing: this is the answer.
    Answered(Result<Committed, Error>),
    /// To carry out what waits.
    Leads(Lead<'a>),
}

/// The right of one thread to carry out what waits. The others go on when it is dropped.
pub(crate) struct Lead<'a> {
    queue: &'a Queue,
    ticket: &'a Ticket,
}

impl Lead<'_> {
    /// The transactions that wait and can be carried out by this thread, its own among them.
    pub(crate) fn take(&self) -> Vec<Waiting> {
        let joins = |other: &mut Waiting| {
            let near = other.namespace.is_some() && other.namespace == self.ticket.namespace;
            near || other.number == self.ticket.number
        };
        self.queue.state().waiting.extract_if(.., joins).collect()
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        // If it was not taken, nobody waits for its answer any more.
        state.waiting.retain(|waiting| waiting.number != self.ticket.number);
        state.is_led = false;
        self.queue.ended.notify_all();
    }
}

impl Waiting {
    pub(crate) fn answer(self, result: Result<Committed, Error>) {
        // Who asked waits, unless its thread was ended from outside.
        let _ = self.answer.send(result);
    }
}

impl Ticket {
    /// The answer, once somebody has carried out the transaction.
    pub(crate) fn answer(&self) -> Option<Result<Committed, Error>> {
        match self.answer.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Error::Abandoned)),
        }
    }
}
