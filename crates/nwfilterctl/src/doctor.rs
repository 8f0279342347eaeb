//! `doctor`: finds what prevents guests of this host from being filtered as their bindings say, with advice.
//!
//! Each check is a function of one of the modules below. Checks change nothing. If a check cannot read something, that is a
//! finding too.

mod features;
mod libvirt;
mod others;
mod ports;

use std::fmt;
use std::process::Output;
use std::time::Duration;

use nwfilter::{Backend, Driver};
use nwfilter_xtables::process::{self, Failure};
use nwfilterctl_shared::{Options, with_causes};
use serde_json::json;

use crate::output::{Answer, number_of};

/// How long a tool may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The severity of a finding; the worst comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// Guests are not filtered as their bindings say, or cannot be.
    Problem,
    /// Packets of guests may be dropped, or rules may not work.
    Warning,
    /// Information.
    Note,
    /// No problem.
    Good,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Problem => "problem",
            Level::Warning => "warning",
            Level::Note => "note",
            Level::Good => "good",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    level: Level,
    /// The name of the check.
    check: &'static str,
    what: String,
    /// What to do, if anything.
    help: Option<String>,
}

impl Finding {
    fn new(level: Level, check: &'static str, what: impl Into<String>) -> Self {
        Self { level, check, what: what.into(), help: None }
    }

    fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, check, what, help } = self;
        write!(f, "{}[{check}]: {what}", level.name())?;
        help.as_ref().map_or(Ok(()), |help| write!(f, "\n  = help: {help}"))
    }
}

/// The host that is examined.
struct Patient<'a> {
    options: &'a Options,
    /// The driver over the chosen backend, if its stores can be read.
    driver: Option<&'a Driver>,
    /// The chosen backend and the other one.
    backends: &'a [Box<dyn Backend>],
}

impl Patient<'_> {
    /// The name of the chosen backend.
    fn chosen(&self) -> &'static str {
        self.backends.first().map_or("", |backend| backend.name())
    }
}

/// Examines this host. The exit code is 1 if there is a problem.
pub(crate) fn doctor(options: &Options, as_json: bool) -> Answer {
    let builder = || Driver::builder().without_learner();
    let (driver, backends) = options.open_to_examine(builder());
    let mut findings = Vec::new();
    if let Err(error) = &driver {
        let what = with_causes(error.chain());
        findings.push(
            Finding::new(Level::Problem, "stores", what)
                .help("run it as root, and see that the directories exist and can be read"),
        );
    }
    let patient = Patient { options, driver: driver.as_ref().ok(), backends: &backends };
    findings.extend(features::check(&patient));
    findings.extend(others::check());
    findings.extend(ports::check(&patient));
    findings.extend(libvirt::check(&patient));
    findings.sort();
    findings.dedup();
    answer(&findings, as_json)
}

fn answer(findings: &[Finding], as_json: bool) -> Answer {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let is_good = count(Level::Problem) == 0;
    if as_json {
        let rows = findings.iter().map(|Finding { level, check, what, help }| {
            json!({"level": level.name(), "check": check, "what": what, "help": help})
        });
        return Answer::json(&rows.collect()).good_if(is_good);
    }
    let sum = format!(
        "{}, {}, {}",
        number_of(count(Level::Problem), "problem"),
        number_of(count(Level::Warning), "warning"),
        number_of(count(Level::Note), "note"),
    );
    Answer::lines(findings.iter().map(ToString::to_string).chain([sum])).good_if(is_good)
}

/// Runs a tool of the host.
fn ask(program: &str, args: &[&str]) -> Result<Output, Failure> {
    process::run(PATIENCE, program, args, None, |_| ())
}
