//! The verb `trace`: shows packets of a port as they pass the kernel, with the lines of filters that they match.

use std::io::{Write, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use nwfilter::explain::{Layer, Outcome};
use nwfilter::rules::Verdict;
use nwfilter::xml::PortDev;
use nwfilter::{Driver, TraceEvent, TraceMatch, TracedPacket, TracedStep};
use nwfilterctl_shared::warn;
use serde_json::{Value, json};

use crate::places::Places;

/// Show packets of a port as they pass the kernel, and the rules that each matches, until stopped
#[derive(Args)]
pub(crate) struct TracePort {
    /// The port
    port: PortDev,
    /// For how long, as in 10s or 5m
    #[arg(long = "for", value_name = "TIME", value_parser = time)]
    duration: Option<Duration>,
    /// Only packets that match, as in 'tcp from 192.0.2.7 to :80'
    #[arg(long = "match", value_name = "PACKET", default_value = "")]
    wanted: TraceMatch,
    /// Only packets that do not pass, at most ten in a second
    #[arg(long)]
    drops: bool,
    /// End after this many packets
    #[arg(short = 'n', long, value_name = "NUMBER")]
    count: Option<usize>,
}

/// The most dropped packets that are shown in a second.
const DROPS: usize = 10;

/// The longest single wait for a packet, if no end is set.
const LONG: Duration = Duration::from_secs(3600);

fn time(text: &str) -> Result<Duration> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let number: u64 = text[..text.len() - unit.len()].parse().context("for example 10s")?;
    let seconds = match unit {
        "ms" => return Ok(Duration::from_millis(number)),
        "" | "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => None,
    };
    seconds.map(Duration::from_secs).ok_or_else(|| anyhow!("for example 10s"))
}

pub(crate) fn trace(driver: &Driver, asked: &TracePort, as_json: bool) -> Result<()> {
    let mut places = Places::new(driver);
    let guest = driver.binding(&asked.port)?.owner.name.clone();
    let mut trace = driver.trace(&asked.port, &asked.wanted)?;
    let end = asked.duration.map(|duration| Instant::now() + duration);
    let mut limit = Limit::default();
    let mut left = asked.count.unwrap_or(usize::MAX);
    while left > 0 {
        let patience = end.map_or(LONG, |end| end.saturating_duration_since(Instant::now()));
        match trace.next(patience)? {
            Some(TraceEvent::Packet(packet)) if asked.drops && packet.outcome == Outcome::Passes => (),
            Some(TraceEvent::Packet(_)) if asked.drops && !limit.allows() => (),
            Some(TraceEvent::Packet(packet)) => {
                print(&mut places, (asked.port.as_str(), &guest), &packet, as_json)?;
                left -= 1;
            }
            Some(TraceEvent::Missed) => {
                warn("there were more packets than could be followed; --match names fewer")
            }
            None if end.is_some() => break,
            None => (),
        }
        if end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
    }
    Ok(())
}

/// Limits the packets that are shown in each second.
#[derive(Default)]
struct Limit {
    second: Option<Instant>,
    shown: usize,
    /// The packets that were not shown in this second.
    left_out: usize,
}

impl Limit {
    fn allows(&mut self) -> bool {
        if self.second.is_none_or(|begin| begin.elapsed() >= Duration::from_secs(1)) {
            if self.left_out > 0 {
                warn(format_args!("{} dropped packets of a second are not shown", self.left_out));
            }
            *self = Self { second: Some(Instant::now()), ..Self::default() };
        }
        self.shown += 1;
        self.left_out += usize::from(self.shown > DROPS);
        self.shown <= DROPS
    }
}

/// A port and the guest behind it.
type PortAndGuest<'a> = (&'a str, &'a str);

fn print(
    places: &mut Places<'_>,
    port: PortAndGuest<'_>,
    packet: &TracedPacket,
    as_json: bool,
) -> Result<()> {
    let text = if as_json { value(places, port, packet)?.to_string() } else { shown(places, port.0, packet) };
    let mut out = stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("packets cannot be printed any more")
}

fn shown(places: &mut Places<'_>, port: &str, packet: &TracedPacket) -> String {
    let what = packet.packet.as_ref().map_or_else(|| "a packet".to_owned(), ToString::to_string);
    let mut text = format!("{port} {}: {what} {}", packet.way, packet.outcome);
    if let Some(elsewhere) = &packet.elsewhere {
        text += &format!(" elsewhere: {elsewhere}");
    }
    for (number, step) in packet.steps.iter().enumerate() {
        let decides = number + 1 == packet.steps.len() && packet.deciding().is_some();
        let mark = if decides { '>' } else { ' ' };
        text += &format!("\n  {mark} {}", line(places, step));
    }
    if packet.steps.is_empty() && packet.outcome == Outcome::Passes {
        text += "\n    no rule matches it";
    }
    text
}

fn line(places: &mut Places<'_>, step: &TracedStep) -> String {
    let chain = match (step.layer, step.chain.as_str()) {
        (layer, "root") => layer.to_string(),
        (Layer::Ethernet, chain) => format!("Ethernet, chain {chain}"),
        (layer, chain) => format!("{layer}, chain {chain}"),
    };
    let what = match step.verdict {
        None => "on to the next chain",
        Some(Verdict::Accept | Verdict::Pass) => "accept",
        Some(Verdict::Drop) => "drop",
        Some(Verdict::Reject) => "reject",
        Some(Verdict::Return) => "return",
        Some(Verdict::Continue) => "continue",
        Some(Verdict::Log(_)) => "log",
    };
    let name = match step.origin.filter {
        Some(_) => step.origin.to_string(),
        None => "a rule of nwfilter's own".to_owned(),
    };
    let place = places.find(&step.origin).map(|place| format!(" at {place}")).unwrap_or_default();
    format!("{chain}: {name}: {what}{place}")
}

fn value(places: &mut Places<'_>, (port, guest): PortAndGuest<'_>, packet: &TracedPacket) -> Result<Value> {
    let mut value = serde_json::to_value(packet)?;
    value["port"] = json!(port);
    value["guest"] = json!(guest);
    for (step, row) in packet.steps.iter().zip(value["steps"].as_array_mut().into_iter().flatten()) {
        let at = places.find(&step.origin).map(|place| json!({"path": place.path, "line": place.line}));
        row["at"] = json!(at);
    }
    Ok(value)
}
