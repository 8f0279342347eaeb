//! What gets through while something is done to a running domain.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use nwfilter_testlab::{Ends, Host, Injector, Tap, frames};

use super::Domain;

/// How often a domain sends both of its frames.
const INTERVAL: Duration = Duration::from_millis(2);

/// Frames that were sent, in rounds, and those that got through.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) rounds: u32,
    /// Of the allowed frames, those that arrived.
    pub(crate) arrived: u32,
    /// Of the spoofed frames, those that arrived.
    pub(crate) leaked: u32,
}

/// Sends, as the domain does, an allowed and a spoofed frame in turn for as long as `work` takes.
pub(crate) fn while_sending(
    host: &Host,
    probe: &Tap,
    domain: &Domain,
    work: impl FnOnce() -> Result<()>,
) -> Result<Traffic> {
    let injector = Injector::open(host, &domain.port())?;
    let frame = |address: &str, round: u32| -> Result<Vec<u8>> {
        let ends =
            Ends::v4(domain.mac(), address.parse()?, "52:54:00:00:00:fe".parse()?, "10.0.0.254".parse()?);
        Ok(frames::udp(&ends, 1000, 2000, &round.to_be_bytes()))
    };
    let allowed_address = format!("10.0.0.{}", domain.number);
    let done = AtomicBool::new(false);
    let send = || -> Result<Traffic> {
        let mut traffic = Traffic::default();
        probe.drain()?;
        loop {
            let last = done.load(Ordering::Acquire);
            let allowed = frame(&allowed_address, traffic.rounds)?;
            let spoofed = frame("10.0.0.66", traffic.rounds)?;
            injector.send(&spoofed)?;
            injector.send(&allowed)?;
            traffic.rounds += 1;
            // The kernel keeps the order: once the allowed frame is there, the spoofed one never comes.
            let leaked = Cell::new(false);
            let arrived = probe.expect(Duration::from_millis(500), |seen| {
                leaked.set(leaked.get() || seen == spoofed);
                seen == allowed
            })?;
            traffic.arrived += u32::from(arrived.is_some());
            traffic.leaked += u32::from(leaked.get());
            if last {
                return Ok(traffic);
            }
            std::thread::sleep(INTERVAL);
        }
    };
    std::thread::scope(|scope| {
        let sender = scope.spawn(send);
        let end = End(&done);
        let worked = work();
        drop(end);
        let traffic = sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        worked?;
        Ok(traffic)
    })
}

/// Ends the sender, also when the work panics.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
