//! Packets of a port as they pass the kernel: which rules each matches, told by the kernel itself.
//!
//! A table of its own, which belongs to this process and goes with it, marks the packets of one port for nf_tables'
//! trace. The rules that the kernel then names are looked up among those of the port's filter.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_explain::{Outcome, Packet, Way, ether_type, protocol};
use nwfilter_nftables::kernel::expr::{Expr, Load, MetaKey, Register};
use nwfilter_nftables::kernel::{
    BaseChain, Chain, ChainType, Connection, Hook, Operation, Place, Policy, Rule, TableFlags, TableId,
    Traced, TracedFrame, TracedRule, Tracer, Transaction, field,
};
use nwfilter_rules::{Batch, Layer, Origin, Verdict};
use nwfilter_xml::PortDev;
use serde::Serialize;

use crate::frame::begun;
use crate::{Driver, Error};

/// Before every other chain of a bridge, also those of ebtables and conntrack.
const PRIORITY: i32 = -400;
/// How long nothing may be told of a packet before it is taken to be through.
const QUIET: Duration = Duration::from_millis(50);
/// The most packets that are followed at the same time. The oldest then counts as through.
const FOLLOWED: usize = 1024;

/// Which packets of a port are traced: `tcp from 192.0.2.7 to :80`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceMatch {
    kind: Option<Kind>,
    from: End,
    to: End,
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    EtherType(u16),
    Protocol(u8),
}

/// One end of a packet's way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct End {
    addr: Option<IpAddr>,
    port: Option<u16>,
}

/// Why words are no [`TraceMatch`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' says nothing of a packet to trace\n  for example: tcp from 192.0.2.7 to :80")]
pub struct BadTraceMatch(String);

impl FromStr for TraceMatch {
    type Err = BadTraceMatch;

    fn from_str(text: &str) -> Result<Self, BadTraceMatch> {
        let bad = |word: &str| BadTraceMatch(word.to_owned());
        let mut wanted = Self::default();
        let mut words = text.split_whitespace();
        while let Some(word) = words.next() {
            match word {
                "from" | "to" => {
                    let end = words.next().and_then(end).ok_or_else(|| bad(text))?;
                    *(if word == "from" { &mut wanted.from } else { &mut wanted.to }) = end;
                }
                _ => wanted.kind = Some(kind(word).ok_or_else(|| bad(word))?),
            }
        }
        let families = [wanted.from.addr, wanted.to.addr].into_iter().flatten().map(|addr| addr.is_ipv4());
        let families: Vec<_> = families.collect();
        if families.windows(2).any(|pair| pair[0] != pair[1]) {
            return Err(bad(text));
        }
        Ok(wanted)
    }
}

fn kind(word: &str) -> Option<Kind> {
    Some(match word {
        "arp" => Kind::EtherType(ether_type::ARP),
        "rarp" => Kind::EtherType(ether_type::RARP),
        "ip" => Kind::EtherType(ether_type::IPV4),
        "ipv6" => Kind::EtherType(ether_type::IPV6),
        "tcp" => Kind::Protocol(protocol::TCP),
        "udp" => Kind::Protocol(protocol::UDP),
        "sctp" => Kind::Protocol(protocol::SCTP),
        "icmp" => Kind::Protocol(protocol::ICMP),
        "icmpv6" => Kind::Protocol(protocol::ICMPV6),
        _ => return None,
    })
}

/// `10.0.0.9`, `10.0.0.9:80`, `[2001:db8::9]:80`, `:80`
fn end(word: &str) -> Option<End> {
    if let Ok(addr) = word.parse() {
        return Some(End { addr: Some(addr), port: None });
    }
    let (addr, port) = word.rsplit_once(':')?;
    let addr = addr.strip_prefix('[').and_then(|addr| addr.strip_suffix(']')).unwrap_or(addr);
    let addr = if addr.is_empty() { None } else { Some(addr.parse().ok()?) };
    Some(End { addr, port: Some(port.parse().ok()?) })
}

impl TraceMatch {
    /// A rule that goes on for such packets.
    fn rule(&self) -> Rule {
        let mut rule = Rule::new();
        match self.kind {
            Some(Kind::EtherType(number)) => rule = rule.equal(field::ETHER_TYPE, number.to_be_bytes()),
            Some(Kind::Protocol(number)) => rule = rule.equal(field::L4PROTO, [number]),
            None => (),
        }
        let ends = [
            (self.from, field::IP_SADDR, field::IP6_SADDR, field::SPORT),
            (self.to, field::IP_DADDR, field::IP6_DADDR, field::DPORT),
        ];
        for (end, ipv4, ipv6, port) in ends {
            rule = match end.addr {
                Some(IpAddr::V4(addr)) => address(rule, ether_type::IPV4, ipv4, &addr.octets()),
                Some(IpAddr::V6(addr)) => address(rule, ether_type::IPV6, ipv6, &addr.octets()),
                None => rule,
            };
            if let Some(number) = end.port {
                rule = rule.equal(port, number.to_be_bytes());
            }
        }
        rule
    }
}

fn address(rule: Rule, ether_type: u16, load: Load, octets: &[u8]) -> Rule {
    rule.equal(field::ETHER_TYPE, ether_type.to_be_bytes()).equal(load, octets)
}

/// A packet that passed the kernel's rules, or did not.
#[derive(Clone, Debug, Serialize)]
pub struct TracedPacket {
    /// Which way it went.
    pub way: Way,
    /// The packet, as far as the kernel tells of it; `None` where that is no frame.
    #[serde(serialize_with = "packet_text")]
    pub packet: Option<Packet>,
    /// What became of it at this port. `Passes` says nothing of the rules of other ports.
    pub outcome: Outcome,
    /// The rules of the port that it matched, in order.
    pub steps: Vec<TracedStep>,
    /// What dropped it, where that is no rule of the port: `table ip filter, chain FORWARD`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<String>,
}

/// A rule that a packet matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TracedStep {
    /// The layer of the rule.
    pub layer: Layer,
    /// The chain: `root`, or the name of a sub-chain.
    pub chain: String,
    /// The filter and line.
    pub origin: Origin,
    /// What it does; `None` for a jump into a sub-chain.
    pub verdict: Option<Verdict>,
}

fn packet_text<S: serde::Serializer>(packet: &Option<Packet>, serializer: S) -> Result<S::Ok, S::Error> {
    packet.as_ref().map(ToString::to_string).serialize(serializer)
}

impl TracedPacket {
    /// The step that stops it.
    pub fn deciding(&self) -> Option<&TracedStep> {
        self.steps.last().filter(|step| step.verdict.is_some_and(Verdict::stops))
    }
}

/// What a [`Trace`] has to tell.
#[derive(Clone, Debug)]
pub enum TraceEvent {
    /// A packet is through.
    Packet(Box<TracedPacket>),
    /// There were more packets than could be followed.
    Missed,
}

/// Follows packets of one port, until it is dropped.
pub struct Trace<'a> {
    driver: &'a Driver,
    port: PortDev,
    table: TableId,
    tracer: Tracer,
    /// It owns the table.
    connection: Connection,
    /// The rules of the port, and the generation of the kernel's rules of which they are.
    rules: HashMap<(u8, String, u64), TracedStep>,
    generation: u32,
    open: Vec<Open>,
    done: VecDeque<TraceEvent>,
}

impl fmt::Debug for Trace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("port", &self.port).field("table", &self.table).finish_non_exhaustive()
    }
}

/// A packet that is on its way.
struct Open {
    id: u32,
    last: Instant,
    packet: TracedPacket,
}

impl Driver {
    /// Follows the packets of a port through the kernel, those that match `wanted`. The rules do not change, and other
    /// ports notice nothing. The trace ends when what is returned is dropped, and with the process in any case.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let driver = nwfilter::Driver::open(Default::default(), nwfilter::Fake::new())?;
    /// use nwfilter::TraceEvent;
    ///
    /// let mut trace = driver.trace(&"vnet0".parse()?, &"tcp to :80".parse()?)?;
    /// while let Some(TraceEvent::Packet(packet)) = trace.next(std::time::Duration::from_secs(10))? {
    ///     println!("{:?} {:?}", packet.outcome, packet.deciding().map(|step| &step.origin));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn trace(&self, port: &PortDev, wanted: &TraceMatch) -> Result<Trace<'_>, Error> {
        self.inside(|| self.trace_here(port, wanted))
    }

    fn trace_here(&self, port: &PortDev, wanted: &TraceMatch) -> Result<Trace<'_>, Error> {
        let rules = self.traced_rules(port)?;
        // Told from before the first packet is marked.
        let tracer = Tracer::open().map_err(failed)?;
        let mut connection = Connection::open().map_err(failed)?;
        // Unique among the tables of the namespace.
        let name = format!("nwfilter-trace-{}", connection.port());
        let table = TableId::bridge(name.parse().map_err(failed)?);
        connection.commit(&marking(&table, port, wanted)?, None).map_err(failed)?;
        let generation = connection.generation().map_err(failed)?;
        let (port, open, done) = (port.clone(), Vec::new(), VecDeque::new());
        Ok(Trace { driver: self, port, table, tracer, connection, rules, generation, open, done })
    }

    fn traced_rules(&self, port: &PortDev) -> Result<HashMap<(u8, String, u64), TracedStep>, Error> {
        let binding = self.binding(port)?;
        let mut batch = Batch::default();
        batch.filter(port.clone(), Arc::new(self.ruleset(&binding)?));
        let held = self.inside(|| Ok(self.backend().rules(&batch)?))?;
        let step = |rule: nwfilter_rules::HeldRule| {
            let id = (rule.id.family, rule.id.table.to_owned(), rule.id.handle);
            let (layer, chain, origin, verdict) =
                (rule.layer, rule.chain.to_string(), rule.origin, rule.verdict);
            (id, TracedStep { layer, chain, origin, verdict })
        };
        // A rule that logs says the same as the one after it.
        let steps = held.rules.into_iter().filter(|rule| !matches!(rule.verdict, Some(Verdict::Log(_))));
        Ok(steps.map(step).collect())
    }
}

/// What makes the table that marks the packets.
fn marking(table: &TableId, port: &PortDev, wanted: &TraceMatch) -> Result<Transaction<()>, Error> {
    let mut transaction = Transaction::new();
    let flags = TableFlags { owner: true, ..TableFlags::default() };
    transaction.push(Operation::AddTable { table: table.clone(), flags }, ());
    let name = field::ifname(port.as_str()).unwrap_or_default();
    let hooks = [
        ("prerouting", Hook::Prerouting, field::IIFNAME),
        ("forward", Hook::Forward, field::OIFNAME),
        ("output", Hook::Output, field::OIFNAME),
    ];
    for (chain, hook, interface) in hooks {
        let chain: nwfilter_nftables::kernel::ChainName = chain.parse().map_err(failed)?;
        let base = BaseChain { kind: ChainType::Filter, hook, priority: PRIORITY, policy: Policy::Accept };
        let made = Chain { name: chain.clone(), base: Some(base) };
        transaction.push(Operation::AddChain { table: table.clone(), chain: made }, ());
        let mut rule = Rule::new().equal(interface, name);
        rule.exprs.extend(wanted.rule().exprs);
        let on = Expr::Immediate { value: vec![1], dreg: Register::FIRST };
        let mark = Expr::MetaSet { key: MetaKey::Nftrace, sreg: Register::FIRST };
        let (table, rule) = (table.clone(), rule.expr(on).expr(mark));
        transaction.push(Operation::AddRule { table, chain, place: Place::End, rule }, ());
    }
    Ok(transaction)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Trace { source: Box::new(error) }
}

impl Trace<'_> {
    /// The next packet that is through; `None` if there is none within that time.
    pub fn next(&mut self, patience: Duration) -> Result<Option<TraceEvent>, Error> {
        let deadline = Instant::now() + patience;
        loop {
            for told in self.tracer.told().map_err(failed)? {
                match told {
                    Traced::Rule(rule) => self.take(rule)?,
                    Traced::Missed => self.done.push_back(TraceEvent::Missed),
                }
            }
            self.close_quiet();
            if let Some(event) = self.done.pop_front() {
                return Ok(Some(event));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // What is on its way is not given up in the middle.
            if left.is_zero() && self.open.is_empty() {
                return Ok(None);
            }
            let wait = if self.open.is_empty() { left } else { QUIET };
            let mut ready = [PollFd::new(self.tracer.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => (),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    fn take(&mut self, rule: TracedRule) -> Result<(), Error> {
        let is_ours =
            i32::from(rule.family) == libc::NFPROTO_BRIDGE && rule.table == self.table.name.as_str();
        if is_ours {
            // A packet begins. Another one with the same number is through.
            self.close(|open| open.id == rule.packet);
            self.refresh()?;
            let way = if rule.chain == "prerouting" { Way::FromGuest } else { Way::ToGuest };
            let packet = rule.frame.as_ref().and_then(packet);
            let (outcome, steps, elsewhere) = (Outcome::Passes, Vec::new(), None);
            let packet = TracedPacket { way, packet, outcome, steps, elsewhere };
            self.open.push(Open { id: rule.packet, last: Instant::now(), packet });
            if self.open.len() > FOLLOWED {
                let oldest = self.open.remove(0);
                self.done.push_back(TraceEvent::Packet(Box::new(oldest.packet)));
            }
            return Ok(());
        }
        // Packets that others have traced have not begun here.
        let Some(open) = self.open.iter_mut().find(|open| open.id == rule.packet) else { return Ok(()) };
        open.last = Instant::now();
        let step = self.rules.get(&(rule.family, rule.table.clone(), rule.handle));
        let packet = &mut open.packet;
        packet.steps.extend(step.cloned());
        if rule.drops {
            packet.outcome = match step.and_then(|step| step.verdict) {
                Some(Verdict::Reject) => Outcome::Rejected,
                _ => Outcome::Dropped,
            };
            if step.is_none() {
                packet.elsewhere = Some(place(&rule));
            }
            self.close(|open| open.id == rule.packet);
        }
        Ok(())
    }

    /// Looks the rules up again where any were changed.
    fn refresh(&mut self) -> Result<(), Error> {
        let generation = self.connection.generation().map_err(failed)?;
        if generation != self.generation {
            self.rules = self.driver.traced_rules(&self.port)?;
            self.generation = generation;
        }
        Ok(())
    }

    fn close_quiet(&mut self) {
        let now = Instant::now();
        self.close(|open| now.duration_since(open.last) >= QUIET);
    }

    fn close(&mut self, is_through: impl Fn(&Open) -> bool) {
        let through = self.open.extract_if(.., |open| is_through(open));
        self.done.extend(through.map(|open| TraceEvent::Packet(Box::new(open.packet))));
    }
}

/// A rule that is none of the port's, for people.
fn place(rule: &TracedRule) -> String {
    let family = match i32::from(rule.family) {
        libc::NFPROTO_IPV4 => "ip",
        libc::NFPROTO_IPV6 => "ip6",
        libc::NFPROTO_INET => "inet",
        libc::NFPROTO_BRIDGE => "bridge",
        _ => "another family's",
    };
    format!("table {family} {}, chain {}", rule.table, rule.chain)
}

/// The packet, as far as the kernel tells of it.
fn packet(frame: &TracedFrame) -> Option<Packet> {
    begun(&frame.link, &[&frame.network[..], &frame.transport].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_to_trace_are_said_in_words() {
        for (text, rule) in [
            ("", 0),
            ("arp", 2),
            ("tcp from 192.0.2.7:40000 to :80", 10),
            ("udp to [2001:db8::9]:53", 8),
            ("from 2001:db8::9", 4),
        ] {
            let wanted: TraceMatch = text.parse().unwrap();
            assert_eq!(wanted.rule().exprs.len(), rule, "{text}");
        }
        for text in ["tpc", "tcp to", "tcp to :eighty", "from 10.0.0.1 to 2001:db8::1", "to 10.0.0.300"] {
            assert!(text.parse::<TraceMatch>().unwrap_err().to_string().contains("for example"), "{text}");
        }
    }
}
