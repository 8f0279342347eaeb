//! The verb `explain`: shows which rule decides a packet, with the lines of the filter.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use nwfilter::explain::{
    Connection, Conversation, Explainer, Explanation, Guest, IpSets, Layer, Packet, Question, Step, StepKind,
    Tested, Unanswerable, Way, frames,
};
use nwfilter::rules::{CTRL_LOG_DROPS, Origin, Verdict};
use nwfilter::xml::{Entry, Filter, Rule, write_filter};
use nwfilter::{Attachment, BindingState, Driver, Error, ExplainedPort};
use serde_json::{Value, json};

use crate::documents::{binding_in, read_bytes, shown};
use crate::output::Answer;
use crate::places::Places;

/// The largest capture that is read, in bytes.
const MAX_CAPTURE: usize = 256 << 20;
const EXAMPLES: &str = "\
Examples:
  nwfilterctl explain vnet0 in tcp from 192.0.2.7:40000 to :80 new
  nwfilterctl explain vnet0 out arp request sender 10.0.0.9
  nwfilterctl explain vnet0 in --conversation ftp
  nwfilterctl explain vnet0 --pcap trace.pcap

A packet: in|out tcp|udp|udplite|sctp|icmp|icmpv6|igmp|esp|ah|ip|ipv6|arp|rarp|stp|mac
  from/to ADDRESS, ADDRESS:PORT or :PORT        mac/dst-mac MAC   vlan N   dscp N
  tcp: flags SYN,ACK   option N                 icmp: TYPE or its name   code N
  arp: request|reply|gratuitous|op N            sender/target ADDRESS   sender-mac/target-mac MAC
  ip: proto N                                   mac: type 0x88cc
  state: new|established|related|invalid|untracked, and reply for the other direction
What is left out comes from the guest's binding. Without a state, connections are followed from packet to packet.";

/// Show which rule decides a packet, and why. No traffic is needed, and nothing changes.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Explain {
    /// The port, and the packet in words
    #[arg(value_name = "PORT [in|out PACKET...]")]
    words: Vec<String>,
    /// The bytes of a frame, in hexadecimal
    #[arg(long, value_name = "HEX", conflicts_with_all = ["pcap", "conversation"])]
    frame: Option<String>,
    /// Every frame of a capture, as `tcpdump -w` writes it
    #[arg(long, value_name = "FILE", conflicts_with = "conversation")]
    pcap: Option<PathBuf>,
    /// A whole exchange, opened by an `in` or `out` packet: ftp, tcp, ping, dns or dhcp
    #[arg(long, value_name = "NAME")]
    conversation: Option<String>,
    /// A binding that need not be in force, instead of PORT
    #[arg(long, value_name = "FILE")]
    binding: Option<PathBuf>,
    /// An element of an ipset, as in `blocked=10.0.0.0/24`; can be repeated
    #[arg(long, value_name = "SET=ELEMENT")]
    ipset: Vec<String>,
}

/// A packet and its explanation.
struct Case {
    what: Option<String>,
    way: Way,
    packet: Packet,
    explanation: Explanation,
}

pub(crate) fn explain(driver: &Driver, asked: &Explain, helpers: bool, as_json: bool) -> Result<Answer> {
    let mut words = asked.words.iter().map(String::as_str);
    let mut port = match &asked.binding {
        Some(file) => {
            let binding = binding_in(file)?;
            driver.explain_binding(binding)?
        }
        None => {
            let Some(name) = words.next() else {
                bail!("no port\n  for example: nwfilterctl explain vnet0 in tcp to :80");
            };
            match name.parse().map_err(Error::from).and_then(|port| driver.explain(&port)) {
                Err(Error::NoSuchBinding(_) | Error::Name(_)) => return unbound(driver, name, as_json),
                other => other?,
            }
        }
    };
    if !helpers {
        port.ruleset.helpers.clear();
    }
    let words: Vec<_> = words.collect();
    let explainer = port.explainer().with_sets(sets(&asked.ipset)?);
    let cases =
        cases(asked, &words, &port.guest(), explainer).map_err(|error| match error.is::<Unanswerable>() {
            true => {
                anyhow!("{error}\n  for example: --ipset SET=10.0.0.0/24, or --ipset SET= if it is empty")
            }
            false => error,
        })?;
    let mut page = Page { driver, places: Places::new(driver) };
    if as_json {
        return page.json(&port, &cases);
    }
    let mut text = String::new();
    for caveat in caveats(&port) {
        writeln!(text, "note: {caveat}")?;
    }
    let name = port.binding.port.as_str();
    match cases.as_slice() {
        [case] if case.what.is_none() => page.single(name, case, &mut text)?,
        cases => page.many(name, cases, &mut text)?,
    }
    Ok(Answer::text(text))
}

fn sets(given: &[String]) -> Result<IpSets> {
    let mut sets = IpSets::default();
    for set in given {
        let (name, element) = set.split_once('=').with_context(|| {
            format!("'{set}' says nothing of an ipset\n  for example: --ipset blocked=10.0.0.0/24")
        })?;
        sets.add(name, element)?;
    }
    Ok(sets)
}

/// The answer about a port without a binding.
fn unbound(driver: &Driver, name: &str, as_json: bool) -> Result<Answer> {
    let exists =
        name.parse().is_ok_and(|port| driver.attachment(&port).is_ok_and(|a| a != Attachment::Absent));
    if !exists {
        let known: Vec<_> = driver.bindings()?.iter().map(|binding| binding.port.to_string()).collect();
        let known = if known.is_empty() { "no port has one".to_owned() } else { known.join(", ") };
        bail!(
            "there is no binding and no interface '{name}'; bindings: {known}\n  \
             for example: nwfilterctl explain --binding vnet0.xml in tcp to :80"
        );
    }
    if as_json {
        return Ok(Answer::json(&json!({"port": name, "binding": null, "outcome": "passes"})));
    }
    Ok(Answer::text(format!("{name} has no binding: it is not filtered, and every packet passes\n")))
}

/// What decides before any rule of the filter, and that its drops are logged.
fn caveats(port: &ExplainedPort) -> Vec<String> {
    let attachment = match port.attachment {
        Some(Attachment::Absent) => Some("there is no such interface: the rules are those that it will get"),
        Some(Attachment::Unbridged) => Some("the interface is in no bridge: its rules see no packet"),
        _ => None,
    };
    let state = match &port.state {
        BindingState::Filtered | BindingState::Learned { .. } | BindingState::Leased { .. } => None,
        other => Some(format!("the filter is not in force yet but rules of nwfilter's own: {other}")),
    };
    let logs = port.ruleset.logs_drops().then(|| format!("what its rules drop is logged ({CTRL_LOG_DROPS})"));
    attachment.map(str::to_owned).into_iter().chain(state).chain(logs).collect()
}

fn cases(asked: &Explain, words: &[&str], guest: &Guest, mut explainer: Explainer<'_>) -> Result<Vec<Case>> {
    let begins = match words.first() {
        Some(&"in") => Some(Way::ToGuest),
        Some(&"out") => Some(Way::FromGuest),
        _ => None,
    };
    // The direction of a frame follows from its source address.
    let way = |packet: &Packet| {
        let sent = packet.src_mac == guest.mac;
        begins.unwrap_or(if sent { Way::FromGuest } else { Way::ToGuest })
    };
    if let Some(name) = &asked.conversation {
        let Some(begins) = begins.filter(|_| words.len() == 1) else {
            bail!(
                "say only who begins the conversation: 'in' the other end, 'out' the guest\n  \
                 for example: nwfilterctl explain vnet0 in --conversation ftp"
            );
        };
        let told = name.parse::<Conversation>()?.tell(&mut explainer, guest, begins)?;
        return Ok(told
            .into_iter()
            .map(|told| Case {
                what: Some(told.turn.what),
                way: told.turn.way,
                packet: told.turn.packet,
                explanation: told.explanation,
            })
            .collect());
    }
    let bytes = match (&asked.frame, &asked.pcap) {
        (Some(hex), _) => vec![bytes_of(hex)?],
        (_, Some(file)) => {
            let capture =
                read_bytes(file, MAX_CAPTURE).with_context(|| format!("cannot read {}", shown(file)))?;
            let frames = frames(&capture).with_context(|| format!("cannot explain {}", shown(file)))?;
            frames.into_iter().map(<[u8]>::to_vec).collect()
        }
        (None, None) => {
            let Question { way, packet, connection } = Question::read(guest, words)?;
            let explanation = ask(&mut explainer, way, &packet, connection)?;
            return Ok(vec![Case { what: None, way, packet, explanation }]);
        }
    };
    let is_capture = asked.pcap.is_some();
    let mut cases = Vec::new();
    for (number, frame) in bytes.iter().enumerate() {
        let packet = Packet::parse(frame)?;
        let way = way(&packet);
        let explanation = explainer.explain(way, &packet)?;
        let what = is_capture.then(|| format!("frame {}", number + 1));
        cases.push(Case { what, way, packet, explanation });
    }
    Ok(cases)
}

fn ask(
    explainer: &mut Explainer<'_>,
    way: Way,
    packet: &Packet,
    connection: Option<Connection>,
) -> Result<Explanation> {
    Ok(match connection {
        Some(connection) => explainer.explain_as(way, packet, connection)?,
        None => explainer.explain(way, packet)?,
    })
}

fn bytes_of(hex: &str) -> Result<Vec<u8>> {
    let digits: String = hex.chars().filter(|c| !c.is_whitespace() && !matches!(c, ':' | '-')).collect();
    let byte = |at: usize| digits.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let bytes = (0..digits.len()).step_by(2).map(byte).collect::<Option<Vec<_>>>();
    bytes.context("a frame is written in pairs of hexadecimal digits\n  for example: --frame 'ffffffffffff 5254007b3593 0806 …'")
}

// ---- what is printed ----

struct Page<'a> {
    driver: &'a Driver,
    places: Places<'a>,
}

impl Page<'_> {
    fn single(&mut self, port: &str, case: &Case, text: &mut String) -> Result<()> {
        let Case { way, packet, explanation, .. } = case;
        writeln!(text, "{port} {way}: {packet} {}", explanation.outcome)?;
        self.decision(explanation, text)?;
        if !text.ends_with("\n\n") {
            text.push('\n');
        }
        writeln!(text, "path:")?;
        let mut at = None;
        for (number, step) in explanation.steps.iter().enumerate() {
            let place = (step.layer, step.chain.as_str());
            if at != Some(place) {
                writeln!(text, "  {}", chain(step, explanation))?;
                at = Some(place);
            }
            let mark = if explanation.decided_by == Some(number) { '>' } else { ' ' };
            writeln!(text, "  {mark} {}", line(step))?;
        }
        if explanation.steps.is_empty() {
            writeln!(text, "  no rule looks at it")?;
        }
        Ok(())
    }

    /// One line for each packet, and the decision of each that does not pass.
    fn many(&mut self, port: &str, cases: &[Case], text: &mut String) -> Result<()> {
        for Case { what, way, packet, explanation } in cases {
            let what = what.as_deref().unwrap_or_default();
            writeln!(text, "{port} {way}, {what}: {packet} {}", explanation.outcome)?;
            let state = explanation.connection.map(|connection| format!("connection {connection}"));
            let by: Vec<_> = explanation.accepting().map(name).collect();
            let by = (!by.is_empty()).then(|| format!("by {}", by.join(" and ")));
            let why: Vec<_> = state.into_iter().chain(by).collect();
            if explanation.passes() {
                if !why.is_empty() {
                    writeln!(text, "  {}", why.join(", "))?;
                }
            } else {
                self.decision(explanation, text)?;
            }
        }
        if cases.is_empty() {
            writeln!(text, "no frames")?;
        }
        Ok(())
    }

    /// The rule that decides, and the nearest miss, as they are written.
    fn decision(&mut self, explanation: &Explanation, text: &mut String) -> Result<()> {
        let deciding: Vec<_> = match explanation.passes() {
            true => explanation.accepting().collect(),
            false => explanation.deciding().into_iter().collect(),
        };
        if deciding.is_empty() {
            writeln!(text, "  no rule stops it")?;
        }
        for step in deciding {
            let place = self.places.find(&step.origin).map(|place| format!(", {place}")).unwrap_or_default();
            writeln!(text, "  by {}{place}", name(step))?;
            self.quote(&step.origin, &[], text)?;
        }
        if let Some(near) = &explanation.nearest {
            let place =
                self.places.find(&near.origin).map(|place| format!("  at {place}\n")).unwrap_or_default();
            write!(text, "  {near}\n{place}")?;
            self.quote(&near.origin, &near.failed, text)?;
        }
        Ok(())
    }

    /// A rule as `dumpxml` prints it, with a caret under the condition that fails.
    fn quote(&self, origin: &Origin, failed: &[Tested], text: &mut String) -> Result<()> {
        let Some(lines) = self.rule(origin) else { return Ok(()) };
        writeln!(text)?;
        for line in &lines {
            writeln!(text, "    {line}")?;
            for tested in failed {
                if let Some((start, length)) = caret(&lines, line, tested) {
                    writeln!(text, "    {}{} {tested}", " ".repeat(start), "^".repeat(length))?;
                }
            }
        }
        Ok(writeln!(text)?)
    }

    fn rule(&self, Origin { filter, line }: &Origin) -> Option<Vec<String>> {
        let filter = self.driver.filter(filter.as_ref()?).ok()?;
        let is_it = |rule: &&Rule| rule.place.line == *line;
        let rule = filter.rules().find(is_it)?;
        let alone = Filter { entries: vec![Entry::Rule(rule.clone())], ..(*filter).clone() };
        let text = write_filter(&alone);
        let lines = text.lines().map(|line| line.strip_prefix("  ").unwrap_or(line));
        let rule = lines.skip_while(|line| !line.starts_with("<rule"));
        let rule: Vec<_> = rule.take_while(|line| !line.starts_with("</filter")).map(str::to_owned).collect();
        Some(rule).filter(|lines| !lines.is_empty())
    }

    fn json(&mut self, port: &ExplainedPort, cases: &[Case]) -> Result<Answer> {
        let mut rows = Vec::new();
        for Case { what, way, packet, explanation } in cases {
            let mut row = serde_json::to_value(explanation)?;
            row["way"] = json!(way);
            row["packet"] = json!(packet.to_string());
            row["what"] = json!(what);
            let place = explanation.deciding().and_then(|step| self.places.find(&step.origin));
            row["at"] = place.map_or(Value::Null, |place| json!({"path": place.path, "line": place.line}));
            row["why"] = json!(explanation.nearest.as_ref().map(ToString::to_string));
            rows.push(row);
        }
        let port = json!({
            "port": port.binding.port.as_str(),
            "filter": port.binding.filter.as_str(),
            "notes": caveats(port),
            "packets": rows,
        });
        Ok(Answer::json(&port))
    }
}

fn chain(step: &Step, explanation: &Explanation) -> String {
    match (step.layer, step.chain.as_str(), explanation.connection) {
        (Layer::Ethernet, "root", _) => "Ethernet rules".to_owned(),
        (Layer::Ethernet, chain, _) => format!("Ethernet rules, chain {chain}"),
        (layer, _, Some(connection)) => format!("{layer} rules, connection {connection}"),
        (layer, _, None) => format!("{layer} rules"),
    }
}

fn name(step: &Step) -> String {
    match &step.kind {
        StepKind::Note { note } => note.clone(),
        StepKind::End { .. } => format!("the end of chain {}", step.chain),
        _ if step.origin.filter.is_none() => "a rule of nwfilter's own".to_owned(),
        _ => step.origin.to_string(),
    }
}

fn line(step: &Step) -> String {
    let (applies, what) = match &step.kind {
        StepKind::Rule { verdict, applies } => {
            let verdict = match verdict {
                Verdict::Accept => "accept",
                Verdict::Pass => "accept; the rules of the receiving port follow",
                Verdict::Drop => "drop",
                Verdict::Reject => "reject",
                Verdict::Return => "return",
                Verdict::Continue => "continue",
                Verdict::Log(_) => "log",
            };
            (*applies, format!("{}: {verdict}", name(step)))
        }
        StepKind::Jump { to, applies } => (*applies, format!("to chain {to}")),
        StepKind::End { verdict } => return format!("{}: {verdict:?}", name(step)).to_lowercase(),
        StepKind::Note { note } => return note.clone(),
    };
    let tests: Vec<_> =
        step.tests.iter().filter(|tested| applies || !tested.holds).map(ToString::to_string).collect();
    let tests = tests.join("; ");
    match (applies, tests.is_empty()) {
        (true, true) => what,
        (true, false) => format!("{what}, since {tests}"),
        (false, _) => format!("{}: no, {tests}", what.split(": ").next().unwrap_or(&what)),
    }
}

/// Where a condition is written in a rule: at its attribute, at the element for a protocol, or at the direction for an
/// implicit state.
fn caret(lines: &[String], line: &str, tested: &Tested) -> Option<(usize, usize)> {
    let candidates = attributes(tested.field);
    let found = |line: &str| {
        let mut best = None;
        for name in candidates {
            let Some(start) = line.find(&format!(" {name}='")).map(|at| at + 1) else { continue };
            let value = start + name.len() + 2;
            let Some(length) = line.get(value..)?.find('\'') else { continue };
            let text = &line[value..value + length];
            let first = tested.wanted.split([' ', '/']).next().unwrap_or_default();
            let is_it = text == first || tested.variables.iter().any(|variable| text == variable.to_string());
            let span = (start, value + length + 1 - start);
            if is_it {
                return Some(span);
            }
            best = best.or(Some(span));
        }
        best
    };
    if lines.iter().any(|other| found(other).is_some()) {
        return found(line);
    }
    // No attribute has it, so it is implied by the element or by the direction of the rule.
    let is_implicit = matches!(tested.field, "connection state" | "direction in the connection");
    let (start, length) = if is_implicit {
        let start = line.find("direction='")?;
        (start, line.get(start + 11..)?.find('\'')? + 12)
    } else {
        let start = line.find('<')?;
        let is_element = !line.trim_start().starts_with("<rule") && !line.trim_start().starts_with("</");
        let length = line.get(start + 1..)?.find([' ', '/', '>'])? + 1;
        is_element.then_some((start, length))?
    };
    Some((start, length))
}

/// The attributes that may stand for a field of a packet. Source and destination are exchanged in a rule's other direction.
fn attributes(field: &str) -> &'static [&'static str] {
    match field {
        "source MAC" => &["srcmacaddr", "dstmacaddr"],
        "destination MAC" => &["dstmacaddr", "srcmacaddr"],
        "source address" => &["srcipaddr", "srcipfrom", "dstipaddr", "dstipfrom"],
        "destination address" => &["dstipaddr", "dstipfrom", "srcipaddr", "srcipfrom"],
        "source port" => &["srcportstart", "dstportstart"],
        "destination port" => &["dstportstart", "srcportstart"],
        "protocol" => &["protocol"],
        "frame type" => &["protocolid"],
        "VLAN" => &["vlanid"],
        "type inside the VLAN tag" => &["encap-protocol"],
        "ARP hardware type" => &["hwtype"],
        "ARP protocol type" => &["protocoltype"],
        "ARP opcode" => &["opcode"],
        "ARP sender MAC" => &["arpsrcmacaddr", "arpdstmacaddr"],
        "ARP target MAC" => &["arpdstmacaddr", "arpsrcmacaddr"],
        "ARP sender address" => &["arpsrcipaddr", "arpdstipaddr"],
        "ARP target address" => &["arpdstipaddr", "arpsrcipaddr"],
        "ARP packet" => &["gratuitous"],
        "DSCP" | "type of service" => &["dscp"],
        "ICMP type" | "ICMPv6 type and code" => &["type"],
        "number of connections" => &["connlimit-above"],
        "connection state" => &["state"],
        "packet" => &["ipset"],
        "TCP flags" => &["flags"],
        "TCP options" => &["option"],
        _ => &[],
    }
}
