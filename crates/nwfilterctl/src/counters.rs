//! The verbs `counters` and `top`: packets and bytes that rules have matched.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{Write, stdout};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nwfilter::Driver;
use nwfilter::rules::{Count, Counts, RuleCount};
use nwfilter::xml::PortDev;
use nwfilterctl_shared::warn;
use serde_json::{Value, json};

use crate::output::{Answer, number_of};
use crate::places::Places;
use crate::verbs;

/// Show how many packets and bytes each rule of a port's or a filter's rules has matched since it was written
#[derive(Args)]
pub(crate) struct Counters {
    /// The port
    #[arg(required_unless_present = "name")]
    port: Option<PortDev>,
    /// A filter: its rules at all ports, summed
    #[arg(id = "name", long = "filter", value_name = "NAME", conflicts_with = "port")]
    filter: Option<String>,
    /// Show what is counted in each interval of this many seconds, until stopped
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<u32>,
}

/// The most ports that a row names.
const SHOWN: usize = 5;

pub(crate) fn counters(driver: &Driver, asked: &Counters, as_json: bool) -> Result<Answer> {
    let mut places = Places::new(driver);
    let mut before = counted(driver, asked)?;
    warn_of(&before.differing);
    let Some(seconds) = asked.watch else {
        return Ok(match as_json {
            true => Answer::json(&rules_json(&mut places, &before.rules)),
            false => Answer::text(table(&mut places, &before.rules)?),
        });
    };
    if seconds == 0 {
        bail!("--watch needs at least a second between two looks");
    }
    loop {
        sleep(Duration::from_secs(seconds.into()));
        let now = counted(driver, asked)?;
        let rules = since(&now, &before);
        let mut out = stdout().lock();
        let written = match as_json {
            true => writeln!(out, "{}", rules_json(&mut places, &rules)),
            false => writeln!(out, "{}", table(&mut places, &rules)?),
        };
        written.and_then(|()| out.flush()).context("the counters cannot be printed any more")?;
        before = now;
    }
}

/// The counts that were asked for, one row for each rule.
fn counted(driver: &Driver, asked: &Counters) -> Result<Counts> {
    match (&asked.port, &asked.filter) {
        (Some(port), _) => Ok(driver.port_counters(port)?),
        (None, name) => {
            let filter = verbs::filter(driver, name.as_deref().unwrap_or_default())?;
            let counts = driver.counters()?.of_filter(filter.name.as_str());
            Ok(Counts { rules: counts.by_rule(), ..counts })
        }
    }
}

/// What rules have counted between two samples, without rules that have counted nothing.
fn since(now: &Counts, before: &Counts) -> Vec<RuleCount> {
    let key = |rule: &RuleCount| (rule.origin.clone(), rule.stops);
    let before: BTreeMap<_, Count> = before.rules.iter().map(|rule| (key(rule), rule.count)).collect();
    let rules = now.rules.iter().map(|rule| RuleCount {
        count: rule.count.since(before.get(&key(rule)).copied().unwrap_or_default()),
        ..rule.clone()
    });
    rules.filter(|rule| rule.count.packets > 0).collect()
}

fn warn_of(differing: &BTreeSet<PortDev>) {
    if let Some(first) = differing.first() {
        let others = differing.len() - 1;
        let more =
            if others == 0 { String::new() } else { format!(" and {}", number_of(others, "more port")) };
        warn(format_args!(
            "the kernel does not hold all rules of port '{first}'{more}; what is missing has no count: see \
             'nwfilterctl diff'"
        ));
    }
}

fn table(places: &mut Places<'_>, rules: &[RuleCount]) -> Result<String> {
    let mut text = format!("{:>12} {:>14}  Rule\n", "Packets", "Bytes");
    for rule in rules {
        row(&mut text, rule.count, &described(places, rule))?;
    }
    if let [first, ..] = rules
        && first.ports.len() > 1
    {
        writeln!(text, "at {}", ports(&first.ports))?;
    }
    Ok(text)
}

fn row(text: &mut String, count: Count, what: &str) -> Result<()> {
    Ok(writeln!(text, "{:>12} {:>14}  {what}", count.packets, count.bytes)?)
}

/// A rule with its action and its place.
fn described(places: &mut Places<'_>, rule: &RuleCount) -> String {
    let place = places.find(&rule.origin).map(|place| format!(" at {place}")).unwrap_or_default();
    let stops = if rule.stops { " (stops)" } else { "" };
    format!("{}{stops}{place}", rule.origin)
}

fn ports(ports: &BTreeSet<PortDev>) -> String {
    let mut named: Vec<_> = ports.iter().take(SHOWN).map(PortDev::to_string).collect();
    if ports.len() > SHOWN {
        named.push(number_of(ports.len() - SHOWN, "more port"));
    }
    named.join(", ")
}

fn rules_json(places: &mut Places<'_>, rules: &[RuleCount]) -> Value {
    rules.iter().map(|rule| rule_json(places, rule)).collect()
}

fn rule_json(places: &mut Places<'_>, rule: &RuleCount) -> Value {
    let at = places.find(&rule.origin).map(|place| json!({"path": place.path, "line": place.line}));
    json!({
        "rule": rule.origin,
        "stops": rule.stops,
        "packets": rule.count.packets,
        "bytes": rule.count.bytes,
        "ports": verbs::names(rule.ports.iter()),
        "at": at,
    })
}

// ---- top ----

/// Show the rules and the ports that stop most packets
#[derive(Args)]
pub(crate) struct Top {
    /// How many of each
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 10)]
    count: usize,
}

pub(crate) fn top(driver: &Driver, asked: &Top, as_json: bool) -> Result<Answer> {
    let counts = driver.counters()?;
    warn_of(&counts.differing);
    let mut rules: Vec<_> =
        counts.by_rule().into_iter().filter(|rule| rule.stops && rule.count.packets > 0).collect();
    rules.sort_by_key(|rule| Reverse(rule.count));
    rules.truncate(asked.count);
    let mut by_port: Vec<_> =
        counts.stopped_by_port().into_iter().filter(|(_, count)| count.packets > 0).collect();
    by_port.sort_by_key(|(_, count)| Reverse(*count));
    by_port.truncate(asked.count);
    let mut places = Places::new(driver);
    if as_json {
        let of_ports = by_port.iter().map(
            |(ports, count)| json!({"ports": verbs::names(ports.iter()), "packets": count.packets, "bytes": count.bytes}),
        );
        let of_ports: Value = of_ports.collect();
        return Ok(Answer::json(&json!({"rules": rules_json(&mut places, &rules), "ports": of_ports})));
    }
    if rules.is_empty() {
        return Ok(Answer::text("no rule has stopped a packet\n".to_owned()));
    }
    let mut text = format!("{:>12} {:>14}  Rule\n", "Stopped", "Bytes");
    for rule in &rules {
        let place = places.find(&rule.origin).map(|place| format!(" at {place}")).unwrap_or_default();
        let what = format!("{} of {}{place}", rule.origin, number_of(rule.ports.len(), "port"));
        row(&mut text, rule.count, &what)?;
    }
    writeln!(text, "\n{:>12} {:>14}  Port", "Stopped", "Bytes")?;
    for (of, count) in &by_port {
        row(&mut text, *count, &ports(of))?;
    }
    Ok(Answer::text(text))
}
