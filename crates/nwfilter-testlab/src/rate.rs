//! How many frames a second a host with many filtered ports forwards.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nwfilter_rules::{Backend, Batch, Filters, instantiate};
use nwfilter_xml::{Binding, read_binding};

use crate::{Ends, Host, Mac, Tap, frames};

/// More frames than the queue of a tap holds.
const MORE_THAN_A_QUEUE: usize = 1100;

/// How often each pair is measured. The fastest run counts.
const RUNS: u32 = 5;

/// Between which ports frames go that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    /// Ports of guests that are filtered as all others are.
    Filtered,
    /// Ports of guests that have no filter.
    Unfiltered,
    /// Ports whose names are not like those of guests, and that have no filter, as the uplink of a bridge.
    Uplinks,
}

/// A host on which many ports are filtered in the same way, and some ports measured in pairs.
///
/// A frame of 64 bytes goes from one port of a pair to the other: a UDP datagram of a connection that both guests have
/// sent in before, so that it is let through by filters that go by state.
#[derive(Debug)]
pub struct RateLab {
    host: Host,
    between: Between,
    /// The numbers of the ports that get a filter.
    filtered: Vec<usize>,
    /// Whether the filter has rules on connections; true until there is a filter, so that a forgotten one is found.
    has_states: Cell<bool>,
    pairs: Vec<Pair>,
}

#[derive(Debug)]
struct Pair {
    from: Tap,
    to: Tap,
    known: Vec<u8>,
    unknown: Vec<u8>,
}

impl RateLab {
    /// A host where `others` ports are filtered beside the two that are measured.
    ///
    /// Ports of guests are named as libvirt names them, `vnet0` and so on. Measured are the first, the middle and the
    /// last two in the order of their names; with fewer than 4 others, the first two. A port that is not measured has
    /// rules but no interface: rules are found by the names of the interfaces that a frame goes through.
    pub fn new(others: usize, between: Between) -> Result<Self> {
        let host = Host::new()?;
        // Connections are not known before a rule asks for them.
        host.run(&["iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"])?;
        let measured = if others < 4 || between == Between::Uplinks { 1 } else { 3 };
        let ports = match between {
            Between::Filtered => others + 2,
            Between::Unfiltered => others + 2 * measured,
            Between::Uplinks => others,
        };
        let mut filtered: Vec<usize> = (0..ports).collect();
        filtered.sort_by_key(|&number| port(number));
        let firsts = [0, (ports / 2).saturating_sub(1), ports.saturating_sub(2)];
        let pairs = firsts[..measured].iter().map(|&first| match between {
            Between::Uplinks => Pair::new(&host, ("eth0", ports), ("eth1", ports + 1)),
            _ => {
                let (from, to) = (filtered[first], filtered[first + 1]);
                Pair::new(&host, (&port(from), from), (&port(to), to))
            }
        });
        let pairs: Vec<_> = pairs.collect::<Result<_>>()?;
        if between == Between::Unfiltered {
            filtered.retain(|&number| pairs.iter().all(|pair| !pair.has(&port(number))));
        }
        Ok(Self { host, between, filtered, has_states: Cell::new(true), pairs })
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The names of the ports that have an interface.
    pub fn measured(&self) -> BTreeSet<&str> {
        self.pairs.iter().flat_map(|pair| [pair.from.name(), pair.to.name()]).collect()
    }

    /// Filters the ports that get one by `filter`, one of `filters`, in one batch.
    pub fn filter(&self, backend: &dyn Backend, filters: &impl Filters, filter: &str) -> Result<()> {
        self.filter_each(backend, filters, |_| filter.to_owned())
    }

    /// Filters the ports that get one in one batch, each by one of `filters`, by its number.
    pub fn filter_each(
        &self,
        backend: &dyn Backend,
        filters: &impl Filters,
        filter: impl Fn(usize) -> String,
    ) -> Result<()> {
        let mut batch = Batch::default();
        for &number in &self.filtered {
            let binding = binding(number, &filter(number))?;
            let ruleset = instantiate(filters, &binding)?;
            self.has_states.set(ruleset.has_ip_rules());
            batch.filter(binding.port.clone(), Arc::new(ruleset));
        }
        self.host.enter(|| backend.apply(&batch))?;
        Ok(())
    }

    /// Frames that one processor forwards in a second if each takes the mean time of the pairs. `run` is the length of
    /// one run of several.
    ///
    /// Fails when a frame of the known connection does not get through, or, between ports with a filter that asks about
    /// connections, one of another connection does.
    pub fn frames_a_second(&self, run: Duration) -> Result<f64> {
        let rate = |pair: &Pair| {
            ensure!(
                pair.from.delivers(&pair.to, &pair.known)?,
                "frames of a known connection do not get through"
            );
            ensure!(
                self.between != Between::Filtered
                    || !self.has_states.get()
                    || !pair.from.delivers(&pair.to, &pair.unknown)?,
                "frames of an unknown connection get through"
            );
            for _ in 0..MORE_THAN_A_QUEUE {
                pair.from.send(&pair.known)?;
            }
            let runs = (0..RUNS).map(|_| self.run(pair, run)).collect::<Result<Vec<_>>>()?;
            Ok(runs.into_iter().fold(0.0, f64::max))
        };
        let rates = self.pairs.iter().map(rate).collect::<Result<Vec<_>>>()?;
        let seconds_a_frame: f64 = rates.iter().map(|rate| 1.0 / rate).sum();
        Ok(rates.len() as f64 / seconds_a_frame)
    }

    /// Sends for a time, and counts what leaves at the other port. Nobody reads there: the queue of the tap is full,
    /// and the kernel counts every frame that arrives as dropped.
    ///
    /// The kernel does all work for a frame within the call that writes it, so the time that counts is that which the
    /// thread had a processor: how busy the machine is otherwise makes no difference.
    fn run(&self, pair: &Pair, duration: Duration) -> Result<f64> {
        let left_before = self.left_at(&pair.to)?;
        let (begin, worked_before) = (Instant::now(), worked()?);
        let mut sent = 0;
        while begin.elapsed() < duration {
            for _ in 0..64 {
                pair.from.send(&pair.known)?;
            }
            sent += 64;
        }
        let worked = worked()? - worked_before;
        let left = self.left_at(&pair.to)? - left_before;
        ensure!(left == sent, "{left} of {sent} frames left at {}", pair.to.name());
        Ok(left as f64 / worked.as_secs_f64())
    }

    /// Frames that left at a port or were dropped there because its queue was full.
    fn left_at(&self, port: &Tap) -> Result<u64> {
        let text = self.host.enter(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        let line =
            text.lines().find_map(|line| line.trim_start().strip_prefix(port.name())?.strip_prefix(':'));
        let mut transmit = line.context("a port without counters")?.split_ascii_whitespace().skip(9);
        let mut next =
            || transmit.next().context("a short line of counters")?.parse::<u64>().context("a counter");
        let (packets, _errors, drops) = (next()?, next()?, next()?);
        Ok(packets + drops)
    }
}

impl Pair {
    /// Two ports, by name and by what tells their addresses, that have no rules yet, and the connection between them.
    fn new(host: &Host, from: (&str, usize), to: (&str, usize)) -> Result<Self> {
        let taps = (host.tap(from.0)?, host.tap(to.0)?);
        let ends = Ends::v4(mac(from.1), ip(from.1), mac(to.1), ip(to.1));
        let payload = [0; 64 - 14 - 20 - 8];
        let pair = Self {
            known: frames::udp(&ends, 53, 53, &payload),
            unknown: frames::udp(&ends, 53, 54, &payload),
            from: taps.0,
            to: taps.1,
        };
        // The one who is to receive has asked.
        let question = frames::udp(&ends.reverse(), 53, 53, &payload);
        ensure!(pair.to.delivers(&pair.from, &question)?, "no question gets through");
        ensure!(pair.from.delivers(&pair.to, &pair.known)?, "no answer gets through");
        Ok(pair)
    }

    fn has(&self, port: &str) -> bool {
        [&self.from, &self.to].iter().any(|tap| tap.name() == port)
    }
}

/// How long the calling thread has had a processor.
fn worked() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let duration = |time: TimeVal| Duration::new(time.tv_sec().unsigned_abs(), 1000 * time.tv_usec() as u32);
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}

fn port(number: usize) -> String {
    format!("vnet{number}")
}

fn mac(number: usize) -> Mac {
    let [.., high, low] = number.to_be_bytes();
    Mac::new([0x52, 0x54, 0, 0, high, low])
}

fn ip(number: usize) -> Ipv4Addr {
    let [.., high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 1, high, low)
}

fn binding(number: usize, filter: &str) -> Result<Binding> {
    let (port, mac, ip) = (port(number), mac(number), ip(number));
    let text = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='{port}'/><mac address='{mac}'/><filterref filter='{filter}'>\
         <parameter name='IP' value='{ip}'/></filterref></filterbinding>"
    );
    Ok(read_binding("binding", &text).into_result()?)
}
