//! Logging of drops: rules that report a packet to a group of the kernel's log before the rule after them stops it.
//!
//! A ruleset that logs is the ruleset without logging, with a rule of [`Verdict::Log`] before each rule that drops or
//! rejects. Such a rule has the same matches and decides nothing, so the verdicts of both rulesets are equal.

use std::fmt;
use std::str::FromStr;

use nwfilter_xml::FilterName;
use serde::{Deserialize, Serialize};

use crate::packet::IpTest;
use crate::ruleset::{EthernetRule, EthernetSide, IpRule, Origin, RootEntry, Rule, Ruleset, Verdict};

/// The parameter of a binding that asks for logging: `yes` or `no`.
pub const CTRL_LOG_DROPS: &str = "CTRL_LOG_DROPS";

/// How many packets the kernel reports for one rule (with nf_tables: for one port and direction), in a second on average
/// and at once.
pub const LOG_RATE: u32 = 20;

/// A group of the kernel's packet log (nfnetlink_log), which one program at a time reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LogGroup(pub u16);

impl Default for LogGroup {
    /// Group 7410, far from the small numbers that other programs take.
    fn default() -> Self {
        Self(7410)
    }
}

impl fmt::Display for LogGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose packets a rule logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LogSide {
    /// Those that the guest sends.
    FromGuest,
    /// Those that the guest receives.
    ToGuest,
}

impl LogSide {
    /// The word of a filter's rules for it.
    fn word(self) -> &'static str {
        match self {
            Self::FromGuest => "out",
            Self::ToGuest => "in",
        }
    }
}

/// What the kernel reports with a logged packet: which rule stops it. Its text has at most 63 bytes, without blanks or
/// quotes: `nwfilter:out:no-mac-spoofing:3`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LogPrefix {
    /// The direction.
    pub side: LogSide,
    /// The name of the filter, shortened if it is long or has unusual characters; empty for built-in rules.
    filter: String,
    /// The line of the rule, 0 where unknown.
    line: u32,
}

const BEGIN: &str = "nwfilter";
/// The longest name in a prefix. With the rest of it this makes 63 bytes.
const LONGEST_NAME: usize = 39;
/// The characters of the digest of a shortened name, and the one before them.
const DIGEST: usize = 9;

impl LogPrefix {
    /// The prefix for packets that a rule stops.
    pub fn new(side: LogSide, origin: &Origin) -> Self {
        let filter = origin.filter.as_ref().map(|filter| short(filter.as_str())).unwrap_or_default();
        Self { side, filter, line: origin.line }
    }

    /// The rule, given the filters that it may be of.
    pub fn origin<'a>(&self, mut filters: impl Iterator<Item = &'a FilterName>) -> Option<Origin> {
        if self.filter.is_empty() {
            return Some(Origin::BUILT_IN);
        }
        let filter = filters.find(|filter| short(filter.as_str()) == self.filter)?;
        Some(Origin { filter: Some(filter.clone().into()), line: self.line })
    }
}

impl fmt::Display for LogPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{BEGIN}:{}:{}:{}", self.side.word(), self.filter, self.line)
    }
}

impl FromStr for LogPrefix {
    /// It is the prefix of another program.
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split(':');
        let parts: [Option<&str>; 5] = std::array::from_fn(|_| parts.next());
        let [Some(BEGIN), Some(side), Some(filter), Some(line), None] = parts else { return Err(()) };
        let side =
            [LogSide::FromGuest, LogSide::ToGuest].into_iter().find(|of| of.word() == side).ok_or(())?;
        Ok(Self { side, filter: filter.to_owned(), line: line.parse().map_err(drop)? })
    }
}

/// A name of at most [`LONGEST_NAME`] plain characters: itself if it is such a name, else its beginning and its digest.
fn short(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.len() <= LONGEST_NAME && name.chars().all(plain) {
        return name.to_owned();
    }
    // FNV-1a, the same in every build.
    let digest = name
        .bytes()
        .fold(0x811c_9dc5u32, |digest, byte| (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let begin: String =
        name.chars().map(|c| if plain(c) { c } else { '_' }).take(LONGEST_NAME - DIGEST).collect();
    format!("{begin}~{digest:08x}")
}

impl Ruleset {
    /// The same rules, and a rule before each that stops packets, which reports them to a group. A ruleset that logs
    /// already stays as it is.
    pub fn logging_drops(mut self, group: LogGroup) -> Self {
        if self.logs_drops() {
            return self;
        }
        let sides = [&mut self.ethernet.from_guest, &mut self.ethernet.to_guest];
        sides.into_iter().flatten().for_each(|side| log_side(side, group));
        for part in [&mut self.ipv4, &mut self.ipv6].into_iter().flatten() {
            for rules in [&mut part.from_guest, &mut part.to_guest] {
                *rules = std::mem::take(rules).into_iter().flat_map(|rule| logged_ip(rule, group)).collect();
            }
        }
        self
    }

    /// Whether a rule reports packets.
    pub fn logs_drops(&self) -> bool {
        self.rules().any(|rule| matches!(rule.verdict(), Verdict::Log(_)))
    }
}

fn log_side(side: &mut EthernetSide, group: LogGroup) {
    let at_end = |end: Verdict| end.stops().then(|| EthernetRule::built_in([], Verdict::Log(group)));
    for chain in &mut side.chains {
        let rules = std::mem::take(&mut chain.rules).into_iter().flat_map(|rule| logged(rule, group));
        chain.rules = rules.chain(at_end(chain.end)).collect();
    }
    let mut root = Vec::with_capacity(side.root.len());
    for entry in std::mem::take(&mut side.root) {
        match entry {
            RootEntry::Rule(rule) => root.extend(logged(rule, group).map(RootEntry::Rule)),
            jump @ RootEntry::Jump(_) => root.push(jump),
        }
    }
    root.extend(at_end(side.end).map(RootEntry::Rule));
    side.root = root;
}

/// A rule, with one before it that reports packets if it stops them.
fn logged<T: Clone>(rule: Rule<T>, group: LogGroup) -> impl Iterator<Item = Rule<T>> {
    let log = rule.verdict.stops().then(|| Rule { verdict: Verdict::Log(group), ..rule.clone() });
    log.into_iter().chain([rule])
}

fn logged_ip(rule: IpRule, group: LogGroup) -> impl Iterator<Item = IpRule> {
    logged(rule, group).map(|mut rule| {
        if matches!(rule.verdict, Verdict::Log(_)) {
            // A comment is said once.
            rule.matches.retain(|m| !matches!(m.test, IpTest::Comment(_)));
        }
        rule
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_prefix_names_the_rule_within_the_kernels_limit() {
        let long = "n".repeat(251);
        let names = ["web", "no-mac-spoofing", "with blank", "ümlaut:\"", long.as_str()];
        let names: Vec<FilterName> = names.iter().map(|name| name.parse().unwrap()).collect();
        for name in &names {
            let origin = Origin { filter: Some(name.clone().into()), line: u32::MAX };
            let prefix = LogPrefix::new(LogSide::FromGuest, &origin);
            let text = prefix.to_string();
            assert!(text.len() <= 63 && text.is_ascii() && !text.contains([' ', '"']), "{text}");
            assert_eq!(text.parse(), Ok(prefix.clone()));
            assert_eq!(prefix.origin(names.iter()), Some(origin));
        }
        let built_in = LogPrefix::new(LogSide::ToGuest, &Origin::BUILT_IN);
        assert_eq!(built_in.to_string(), "nwfilter:in::0");
        assert_eq!(built_in.origin(names.iter()), Some(Origin::BUILT_IN));
        for others in
            ["", "nwfilter:out:web", "IN=", "nwfilter:up:web:3", "nwfilter:in:web:x", "nwfilter:in:a:1:2"]
        {
            assert_eq!(others.parse::<LogPrefix>(), Err(()), "{others}");
        }
    }

    #[test]
    fn each_rule_that_stops_packets_is_logged_and_no_other() {
        let logging = Ruleset::drop_all().logging_drops(LogGroup(5));
        let verdicts: Vec<_> = logging.rules().map(|rule| rule.verdict()).collect();
        assert_eq!(verdicts, [Verdict::Log(LogGroup(5)), Verdict::Drop].repeat(2));
        assert_eq!(logging.clone().logging_drops(LogGroup(5)), logging);
        let passing = Ruleset::default();
        assert_eq!(passing.clone().logging_drops(LogGroup(5)), passing);
    }
}
