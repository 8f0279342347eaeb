//! Evaluates a packet against the rules of a port, step by step.

use std::cmp::Reverse;
use std::fmt;

use nwfilter_rules::{
    EthernetSide, Family, IpPart, IpTest, Layer, Match, Origin, RootEntry, Rule, Ruleset, Verdict,
};
use nwfilter_xml::VarRef;
use serde::{Serialize, Serializer};

use crate::compare::{Holds, Subject, Test, family};
use crate::connection::{Connection, Tracker};
use crate::packet::{Body, Ip, Packet};
use crate::sets::IpSets;

/// The direction of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The guest sends it: `out` in a filter.
    FromGuest,
    /// The guest receives it from another port of the bridge: `in` in a filter. IP rules do not see what the host itself
    /// sends to the guest.
    ToGuest,
}

/// The verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It passes this port's rules. Those of another port may still drop it.
    Passes,
    /// It is dropped.
    Dropped,
    /// It is dropped, and its sender gets an ICMP error.
    Rejected,
}

/// Why a packet passes or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The verdict.
    pub outcome: Outcome,
    /// Its connection, if IP rules saw one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,
    /// All steps of the evaluation, in order.
    pub steps: Vec<Step>,
    /// The index of the deciding step. `None` if the packet passes because no rule matches it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<usize>,
    /// If it does not pass, the rule that came closest to accepting it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<NearMiss>,
}

impl Explanation {
    /// Whether the packet passes.
    pub fn passes(&self) -> bool {
        self.outcome == Outcome::Passes
    }

    /// The rules that accept the packet, of both layers.
    pub fn accepting(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| {
            matches!(step.kind, StepKind::Rule { verdict: Verdict::Accept | Verdict::Pass, applies: true })
        })
    }

    /// The deciding step.
    pub fn deciding(&self) -> Option<&Step> {
        self.steps.get(self.decided_by?)
    }
}

/// One step of the evaluation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The layer.
    pub layer: Layer,
    /// The chain: `root`, or the name of a sub-chain.
    pub chain: String,
    /// The filter and line it comes from.
    #[serde(serialize_with = "text")]
    pub origin: Origin,
    /// The kind of step.
    #[serde(flatten)]
    pub kind: StepKind,
    /// Its conditions. A jump or a rule applies if all hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tests: Vec<Tested>,
}

/// What a step evaluates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    /// A rule.
    Rule {
        /// Its verdict on packets that match.
        verdict: Verdict,
        /// Whether the packet matches.
        applies: bool,
    },
    /// A jump into a sub-chain.
    Jump {
        /// The chain.
        to: String,
        /// Whether the packet jumps.
        applies: bool,
    },
    /// The end of a chain.
    End {
        /// Its verdict.
        verdict: Verdict,
    },
    /// A verdict without a rule.
    Note {
        /// What.
        note: String,
    },
}

/// A condition of a rule, with the packet's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tested {
    /// The field: `destination port`.
    pub field: &'static str,
    /// The rule's value: `80`.
    pub wanted: String,
    /// Whether the packet's value must differ.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub negated: bool,
    /// The variables that the rule's value comes from.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "texts")]
    pub variables: Vec<VarRef>,
    /// The packet's value. `None` if it has no such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// Whether it holds.
    pub holds: bool,
}

/// A rule that would accept a packet if some conditions held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NearMiss {
    /// The rule.
    #[serde(serialize_with = "text")]
    pub origin: Origin,
    /// Whether it returns instead of accepting, so that other chains decide.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub returns: bool,
    /// Its conditions that do not hold.
    pub failed: Vec<Tested>,
}

/// Why the rules of a port alone do not decide a packet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswerable {
    /// A rule matches against an ipset with unknown contents.
    #[error("{origin} asks whether the packet is {what}: say what that holds")]
    IpSet {
        /// The rule.
        origin: Origin,
        /// The ipset.
        what: String,
    },
}

fn text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn texts<T: fmt::Display, S: Serializer>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
}

/// Evaluates the packets of a port in sequence.
#[derive(Clone, Debug)]
pub struct Explainer<'a> {
    ruleset: &'a Ruleset,
    sets: IpSets,
    tracker: Tracker,
}

impl<'a> Explainer<'a> {
    /// An explainer for a port with these rules and no connections yet.
    pub fn new(ruleset: &'a Ruleset) -> Self {
        Self { ruleset, sets: IpSets::default(), tracker: Tracker::default() }
    }

    /// The same with these contents of ipsets.
    pub fn with_sets(self, sets: IpSets) -> Self {
        Self { sets, ..self }
    }

    /// Explains the next packet. If it passes, it changes the connections that later packets see.
    pub fn explain(&mut self, way: Way, packet: &Packet) -> Result<Explanation, Unanswerable> {
        self.decide(way, packet, None)
    }

    /// Explains a packet of a connection in this state, independent of earlier packets.
    pub fn explain_as(
        &mut self,
        way: Way,
        packet: &Packet,
        connection: Connection,
    ) -> Result<Explanation, Unanswerable> {
        self.decide(way, packet, Some(connection))
    }

    fn decide(
        &mut self,
        way: Way,
        packet: &Packet,
        chosen: Option<Connection>,
    ) -> Result<Explanation, Unanswerable> {
        let mut path = Path::default();
        let family = family(packet);
        let part = family.and_then(|family| Some((family, self.ruleset.ip(family)?)));
        // Connection tracking reassembles packets first.
        let is_whole = part.is_some_and(|(_, part)| follows_connections(part));
        let whole =
            packet.as_ip().and_then(|ip| if is_whole { self.tracker.whole(ip) } else { Some(ip.clone()) });
        let followed = whole.as_ref().map(|ip| (self.tracker.look(ip), self.tracker.connections_from(ip)));
        let (connection, connections) = followed.unwrap_or((Connection::INVALID, 0));
        let connection = chosen.unwrap_or(connection);
        let ruleset = self.ruleset;
        let subject = Subject { packet, ip: whole.as_ref(), connection, connections, sets: &self.sets };
        // After the IP rules, the Ethernet rules see the reassembled packet.
        let behind = whole.clone().map(|ip| Ip { fragment: ip.fragment.filter(|_| !is_whole), ..ip });
        let behind =
            behind.map_or_else(|| packet.clone(), |ip| Packet { body: Body::Ip(ip), ..packet.clone() });
        let ethernet = |path: &mut Path| match way {
            Way::FromGuest => path.ethernet(ruleset.ethernet.from_guest.as_ref(), &subject),
            Way::ToGuest => {
                path.ethernet(ruleset.ethernet.to_guest.as_ref(), &Subject { packet: &behind, ..subject })
            }
        };
        let ip = |path: &mut Path| match part {
            Some((family, part)) => path.ip(family, part, way, &subject),
            None => {
                path.note_hidden(ruleset, packet);
                Ok(Outcome::Passes)
            }
        };
        let outcome = match way {
            Way::FromGuest => match ethernet(&mut path)? {
                Outcome::Passes => ip(&mut path)?,
                stopped => stopped,
            },
            Way::ToGuest => match ip(&mut path)? {
                Outcome::Passes => ethernet(&mut path)?,
                stopped => stopped,
            },
        };
        if let (Outcome::Passes, None, Some(ip)) = (outcome, chosen, &whole)
            && family.is_some()
            && !packet.as_ip().is_some_and(Ip::is_later_fragment)
        {
            self.tracker.passed(ip, way, ruleset);
        }
        let seen =
            part.is_some() && whole.is_some() && path.steps.iter().any(|step| step.layer != Layer::Ethernet);
        let nearest = if outcome == Outcome::Passes { None } else { path.nearest() };
        let decided_by = path.decided;
        Ok(Explanation {
            outcome,
            connection: seen.then_some(connection),
            steps: path.steps,
            decided_by,
            nearest,
        })
    }
}

/// The steps so far.
#[derive(Default)]
struct Path {
    steps: Vec<Step>,
    decided: Option<usize>,
}

/// Where a rule sends a packet.
enum Next {
    On,
    Return,
    Ends(Outcome),
}

impl Path {
    fn ethernet(
        &mut self,
        side: Option<&EthernetSide>,
        subject: &Subject<'_>,
    ) -> Result<Outcome, Unanswerable> {
        let Some(side) = side else { return Ok(Outcome::Passes) };
        let at = |chain: &str| (Layer::Ethernet, chain.to_owned());
        for entry in &side.root {
            let next = match entry {
                RootEntry::Rule(rule) => self.rule(at("root"), rule, subject)?,
                RootEntry::Jump(jump) => {
                    let (tests, holds) = tested(&jump.matches, subject, &Origin::BUILT_IN)?;
                    let to = jump.chain.to_string();
                    let kind = StepKind::Jump { to, applies: holds };
                    self.push(at("root"), Origin::BUILT_IN, kind, tests);
                    let chain = side.chains.iter().find(|chain| chain.name == jump.chain);
                    match chain.filter(|_| holds) {
                        Some(chain) => {
                            self.sub_chain(at(chain.name.as_str()), &chain.rules, chain.end, subject)?
                        }
                        None => Next::On,
                    }
                }
            };
            match next {
                Next::On => (),
                // After the root chain come other rules of the host.
                Next::Return => return Ok(Outcome::Passes),
                Next::Ends(outcome) => return Ok(outcome.in_a_bridge()),
            }
        }
        match self.end(at("root"), side.end) {
            Next::Ends(outcome) => Ok(outcome.in_a_bridge()),
            _ => Ok(Outcome::Passes),
        }
    }

    /// The chain of a jump. A return continues after the jump.
    fn sub_chain<T: Test>(
        &mut self,
        at: (Layer, String),
        rules: &[Rule<T>],
        end: Verdict,
        subject: &Subject<'_>,
    ) -> Result<Next, Unanswerable> {
        for rule in rules {
            match self.rule(at.clone(), rule, subject)? {
                Next::On => (),
                Next::Return => return Ok(Next::On),
                ends => return Ok(ends),
            }
        }
        Ok(match self.end(at, end) {
            Next::Return => Next::On,
            other => other,
        })
    }

    fn ip(
        &mut self,
        family: Family,
        part: &IpPart,
        way: Way,
        subject: &Subject<'_>,
    ) -> Result<Outcome, Unanswerable> {
        let layer = Layer::from(family);
        let at = || (layer, "root".to_owned());
        if let Some(why) = subject.packet.broken {
            return Ok(self.stop(at(), format!("the kernel drops this packet before any IP rule: {why}")));
        }
        if subject.ip.is_none() {
            let why = "the kernel keeps this part of a packet until the others are there, and its first part is not";
            return Ok(self.stop(at(), why.to_owned()));
        }
        let rules = match way {
            Way::FromGuest => &part.from_guest,
            Way::ToGuest => &part.to_guest,
        };
        for rule in rules {
            match self.rule(at(), rule, subject)? {
                Next::On => (),
                Next::Return => return Ok(Outcome::Passes),
                Next::Ends(outcome) => return Ok(outcome),
            }
        }
        Ok(Outcome::Passes)
    }

    fn rule<T: Test>(
        &mut self,
        at: (Layer, String),
        rule: &Rule<T>,
        subject: &Subject<'_>,
    ) -> Result<Next, Unanswerable> {
        // The rule after it says the same, and decides.
        if matches!(rule.verdict, Verdict::Log(_)) {
            return Ok(Next::On);
        }
        let (tests, applies) = tested(&rule.matches, subject, &rule.origin)?;
        self.push(at, rule.origin.clone(), StepKind::Rule { verdict: rule.verdict, applies }, tests);
        Ok(if applies { self.take(rule.verdict) } else { Next::On })
    }

    /// The end of a chain. It is a step only if it drops packets.
    fn end(&mut self, at: (Layer, String), verdict: Verdict) -> Next {
        match verdict {
            Verdict::Accept | Verdict::Pass | Verdict::Continue | Verdict::Log(_) => {
                Next::Ends(Outcome::Passes)
            }
            verdict => {
                self.push(at, Origin::BUILT_IN, StepKind::End { verdict }, Vec::new());
                self.take(verdict)
            }
        }
    }

    /// Applies the verdict of the last step.
    fn take(&mut self, verdict: Verdict) -> Next {
        let next = match verdict {
            Verdict::Accept | Verdict::Pass => Next::Ends(Outcome::Passes),
            Verdict::Drop => Next::Ends(Outcome::Dropped),
            Verdict::Reject => Next::Ends(Outcome::Rejected),
            Verdict::Return => return Next::Return,
            Verdict::Continue | Verdict::Log(_) => return Next::On,
        };
        self.decided = Some(self.steps.len() - 1);
        next
    }

    fn stop(&mut self, at: (Layer, String), note: String) -> Outcome {
        self.push(at, Origin::BUILT_IN, StepKind::Note { note }, Vec::new());
        self.decided = Some(self.steps.len() - 1);
        Outcome::Dropped
    }

    /// Adds the reason why IP rules do not see an IP packet.
    fn note_hidden(&mut self, ruleset: &Ruleset, packet: &Packet) {
        if let (true, Body::Ip(_), Some(id)) = (ruleset.has_ip_rules(), &packet.body, packet.vlan) {
            let note = format!("IP rules do not see what is inside VLAN {id}");
            self.push(
                (Layer::Ethernet, "root".to_owned()),
                Origin::BUILT_IN,
                StepKind::Note { note },
                Vec::new(),
            );
        }
    }

    fn push(&mut self, (layer, chain): (Layer, String), origin: Origin, kind: StepKind, tests: Vec<Tested>) {
        self.steps.push(Step { layer, chain, origin, kind, tests });
    }

    /// Of the rules before the deciding one, the accepting rule with the fewest failed conditions; the first of several. A
    /// rule that returns counts in the deciding rule's chain, because it skips that rule.
    fn nearest(&self) -> Option<NearMiss> {
        let deciding = self.steps.get(self.decided?)?;
        let candidates = self.steps.iter().filter(|step| {
            let StepKind::Rule { verdict, applies: false } = step.kind else { return false };
            let lets_pass = match verdict {
                Verdict::Accept | Verdict::Pass => true,
                Verdict::Return => step.chain == deciding.chain,
                _ => false,
            };
            let is_other_protocol =
                step.tests.iter().any(|tested| !tested.holds && tested.field == "frame type");
            lets_pass && step.layer == deciding.layer && !is_other_protocol
        });
        let failed =
            |step: &Step| step.tests.iter().filter(|tested| !tested.holds).cloned().collect::<Vec<_>>();
        // A rule on another protocol is rarely the intended one. Of equally close rules, the one with more conditions.
        let distance = |step: &&Step| {
            let failed = failed(step);
            let far: u32 = failed.iter().map(|t| if t.field == "protocol" { 4 } else { 1 }).sum();
            (far, Reverse(step.tests.len() - failed.len()))
        };
        let nearest = candidates.min_by_key(distance)?;
        let returns = matches!(nearest.kind, StepKind::Rule { verdict: Verdict::Return, .. });
        Some(NearMiss { origin: nearest.origin.clone(), returns, failed: failed(nearest) })
    }
}

impl Outcome {
    /// ebtables cannot reject.
    fn in_a_bridge(self) -> Self {
        if self == Outcome::Rejected { Outcome::Dropped } else { self }
    }
}

/// Whether rules match on connections, so that the kernel tracks those of the family.
fn follows_connections(part: &IpPart) -> bool {
    let rules = part.from_guest.iter().chain(&part.to_guest);
    let mut tests = rules.flat_map(|rule| &rule.matches).map(|m| &m.test);
    tests.any(|test| matches!(test, IpTest::States(_) | IpTest::CtDirection(_) | IpTest::ConnlimitAbove(_)))
}

/// All conditions, and whether all hold.
fn tested<T: Test>(
    matches: &[Match<T>],
    subject: &Subject<'_>,
    origin: &Origin,
) -> Result<(Vec<Tested>, bool), Unanswerable> {
    let (mut unknown, mut all) = (None, true);
    let mut tested = Vec::with_capacity(matches.len());
    for m in matches {
        let holds = m.test.holds(subject, m.negated);
        if holds == Holds::Unknown {
            unknown = Some(m);
        }
        all &= holds != Holds::No;
        tested.push(Tested {
            field: m.test.field(),
            wanted: m.test.wanted(),
            negated: m.negated,
            variables: m.variables.clone(),
            found: m.test.found(subject),
            holds: holds == Holds::Yes,
        });
    }
    match unknown {
        Some(m) if all => Err(Unanswerable::IpSet { origin: origin.clone(), what: m.test.wanted() }),
        _ => Ok((tested, all)),
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Passes => "passes",
            Outcome::Dropped => "is dropped",
            Outcome::Rejected => "is rejected",
        })
    }
}

/// As in a filter.
impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::FromGuest => "out",
            Way::ToGuest => "in",
        })
    }
}

/// `destination port is 443, not 80`
impl fmt::Display for Tested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, wanted, negated, found, holds, .. } = self;
        match (found, holds, negated) {
            (None, true, _) => write!(f, "{field}: {wanted}")?,
            (None, false, false) if *field == "packet" => write!(f, "{field} is not {wanted}")?,
            (None, false, _) => write!(f, "the packet has no {field} ({wanted} is asked for)")?,
            (Some(found), true, false) if found == wanted => write!(f, "{field} is {found}")?,
            (Some(found), true, false) => write!(f, "{field} is {found} ({wanted})")?,
            (Some(found), true, true) => write!(f, "{field} is {found}, not {wanted}")?,
            (Some(found), false, false) => write!(f, "{field} is {found}, not {wanted}")?,
            (Some(found), false, true) if found == wanted => {
                write!(f, "{field} is {found}, which it must not be")?
            }
            (Some(found), false, true) => write!(f, "{field} is {found}, but must not be {wanted}")?,
        }
        match self.variables.as_slice() {
            [] => Ok(()),
            variables => {
                let names: Vec<_> = variables.iter().map(ToString::to_string).collect();
                write!(f, " ({})", names.join(", "))
            }
        }
    }
}

/// `web:3 would let it pass if the destination port were 80`
impl fmt::Display for NearMiss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.returns { "would let it go on" } else { "would let it pass" };
        write!(f, "{} {what} if ", self.origin)?;
        for (number, Tested { field, wanted, negated, .. }) in self.failed.iter().enumerate() {
            let and = if number == 0 { "" } else { " and " };
            let not = if *negated { "not " } else { "" };

            write!(f, "{and}the {field} were {not}{wanted}")?;
        }
        Ok(())
    }
}
