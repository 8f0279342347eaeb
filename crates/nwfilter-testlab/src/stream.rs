//! Streams of frames that run while something is done to the filters: what got through, and what was lost.
//!
//! A stream writes allowed and forbidden frames to one tap and reads all that arrives at another. Only so many are in
//! flight at a time that no queue on the way overflows, so every frame that is missing was dropped by a filter.

use std::collections::VecDeque;
use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::Tap;

/// Allowed frames in flight at most. With the forbidden frames between them they fit into the queue of a tap, which
/// holds 500 in the kernels with the shortest.
const WINDOW: usize = 32;

/// How long a frame may take before it counts as lost. It is there within the call that writes it, unless the machine
/// is busy.
const PATIENCE: Duration = Duration::from_secs(1);

/// Builds the frame with a number, which no other frame of the stream is equal to.
pub type Numbered<'a> = Box<dyn Fn(u32) -> Vec<u8> + Send + Sync + 'a>;

/// Frames from one tap to another. No other stream may read at the same tap.
pub struct Stream<'a> {
    /// Where they are sent.
    pub from: &'a Tap,
    /// Where they arrive, if they do.
    pub to: &'a Tap,
    /// The frames that must arrive.
    pub allowed: Numbered<'a>,
    /// The frames that must not, sent in turn, one before each allowed frame. None may be equal to an allowed one.
    pub forbidden: Vec<Vec<u8>>,
    /// How long to rest whenever some dozens of frames are through: nothing for the highest rate, something to leave
    /// the processors to others.
    pub rest: Duration,
}

/// What became of frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Allowed frames that were sent.
    pub allowed: u64,
    /// Those of them that did not arrive.
    pub lost: u64,
    /// Forbidden frames that were sent.
    pub forbidden: u64,
    /// Those of them that arrived.
    pub leaked: u64,
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            allowed: self.allowed + other.allowed,
            lost: self.lost + other.lost,
            forbidden: self.forbidden + other.forbidden,
            leaked: self.leaked + other.leaked,
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), Add::add)
    }
}

/// Streams that run.
pub struct Streaming {
    askers: Vec<Sender<Sender<Tally>>>,
}

impl Streaming {
    /// What became of the frames that were sent since the last call. A frame whose sending begins after this call
    /// began belongs to the next tally, but for the one allowed frame by which each stream sees that all before it
    /// are through.
    pub fn take(&self) -> Result<Tally> {
        let ask = |asker: &Sender<Sender<Tally>>| {
            let (reply, answer) = mpsc::channel();
            asker.send(reply).ok().context("a stream has ended")?;
            Ok(answer)
        };
        let answers: Vec<_> = self.askers.iter().map(ask).collect::<Result<_>>()?;
        answers.iter().map(|answer| answer.recv().context("a stream has ended")).sum()
    }

    /// What becomes of frames that are sent within `duration` from now, and of none before.
    pub fn during(&self, duration: Duration) -> Result<Tally> {
        self.take()?;
        thread::sleep(duration);
        self.take()
    }
}

/// Runs streams, a thread each, for as long as `work` takes.
pub fn while_streaming<R>(streams: &[Stream<'_>], work: impl FnOnce(&Streaming) -> Result<R>) -> Result<R> {
    thread::scope(|scope| {
        let begin = |stream| {
            let (ask, asked) = mpsc::channel();
            (ask, scope.spawn(move || run(stream, &asked)))
        };
        let (askers, threads): (_, Vec<_>) = streams.iter().map(begin).unzip();
        let streaming = Streaming { askers };
        let result = work(&streaming);
        // The streams end when nobody can ask them any more, also when the work panics.
        drop(streaming);
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a stream panicked"))??;
        }
        result
    })
}

fn run(stream: &Stream<'_>, asked: &Receiver<Sender<Tally>>) -> Result<()> {
    let mut forbidden = stream.forbidden.iter().cycle();
    let (mut tally, mut number) = (Tally::default(), 0u32);
    stream.to.drain()?;
    loop {
        let mut expected = VecDeque::with_capacity(WINDOW);
        // Whether to go on is asked before every frame.
        let mut asker = asked.try_recv();
        for turn in 0..2 * (WINDOW - 1) {
            if !matches!(asker, Err(TryRecvError::Empty)) {
                break;
            }
            match (turn % 2 == 0).then(|| forbidden.next()).flatten() {
                Some(frame) => {
                    stream.from.send(frame)?;
                    tally.forbidden += 1;
                }
                None => send_allowed(stream, &mut number, &mut expected)?,
            }
            asker = asked.try_recv();
        }
        // The kernel keeps the order: once this one is there, all others are or never will be.
        send_allowed(stream, &mut number, &mut expected)?;
        tally.allowed += expected.len() as u64;
        receive(stream, expected, &mut tally)?;
        match asker {
            Ok(asker) => drop(asker.send(std::mem::take(&mut tally))),
            Err(TryRecvError::Empty) => thread::sleep(stream.rest),
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
    }
}

fn send_allowed(stream: &Stream<'_>, number: &mut u32, expected: &mut VecDeque<Vec<u8>>) -> Result<()> {
    let frame = (stream.allowed)(*number);
    *number = number.wrapping_add(1);
    stream.from.send(&frame)?;
    expected.push_back(frame);
    Ok(())
}

/// Reads until the last of the expected frames is there.
fn receive(stream: &Stream<'_>, mut expected: VecDeque<Vec<u8>>, tally: &mut Tally) -> Result<()> {
    while !expected.is_empty() {
        let Some(frame) = stream.to.recv(PATIENCE)? else {
            tally.lost += expected.len() as u64;
            return Ok(());
        };
        if let Some(before) = expected.iter().position(|expected| *expected == frame) {
            tally.lost += before as u64;
            expected.drain(..=before);
        } else if stream.forbidden.contains(&frame) {
            tally.leaked += 1;
        }
    }
    Ok(())
}
