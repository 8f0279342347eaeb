//! Group commit: transactions of threads that come while another is carried out are carried out together.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::transaction::{Committed, Transaction};

/// The transactions that wait to be carried out, in the order of their arrival.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Vec<Waiting>>,
    next: AtomicU64,
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
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let file = std::fs::metadata("/proc/thread-self/ns/net");
        let namespace = file.ok().map(|file| (file.dev(), file.ino()));
        let (sender, answer) = channel();
        self.waiting().push(Waiting { number, namespace, transaction, answer: sender });
        Ticket { number, namespace, answer }
    }

    /// The transactions that wait and can be carried out by the owner of the ticket, its own among them.
    pub(crate) fn take(&self, ticket: &Ticket) -> Vec<Waiting> {
        let mut waiting = self.waiting();
        let joins = |other: &mut Waiting| {
            other.number == ticket.number
                || (other.namespace.is_some() && other.namespace == ticket.namespace)
        };
        waiting.extract_if(.., joins).collect()
    }

    /// Withdraws a transaction that nobody has taken.
    pub(crate) fn leave(&self, ticket: &Ticket) {
        self.waiting().retain(|waiting| waiting.number != ticket.number);
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waiting>> {
        // Each change of the list is a single step, so a panic leaves it whole.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
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
