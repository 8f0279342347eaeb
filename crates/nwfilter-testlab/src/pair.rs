//! libvirtd on one host and nwfilter on another, given the same cases.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nwfilter_rules::{Backend, Batch, RulesError, Ruleset, instantiate};
use nwfilter_xml::{
    Action, Binding, Entry, Field, Filter, FilterName, Item, Layer, Protocol, Rule, Value, VarName,
    read_binding, read_filter, write_filter,
};
use nwfilter_xtables::{Settings, Xtables};

use crate::cases::{Case, IPSETS};
use crate::{Host, Libvirtd, Saved, Tap};

/// The port that is filtered on either side.
const PORT: &str = "tap0";

/// A port beside it.
const PEER: &str = "tap1";

/// Something libvirt 9.0.0 does wrong and nwfilter does right, so that the two differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// The target CONTINUE of an IP rule is refused by iptables.
    ContinueOnIp,
    /// dstipto of an IPv6 rule is read as IPv4 and refused.
    Ipv6DstIpTo,
    /// Rules are sent before the sub-chain they jump to.
    RuleBeforeChain,
    /// A variable's value does not fit its place, and the tool takes it for something else.
    UntypedVariable,
    /// encap-protocol of VLAN rules is passed in decimal and read as hexadecimal.
    VlanEncapBase,
    /// A comment that is a variable gets no value.
    VariableComment,
    /// "gratuitous" that is a variable has no effect.
    VariableGratuitous,
    /// An ipset on another element than `all` makes the port refused: "Unexpected enum value 0".
    IpSetOutsideAll,
    /// Two negated ports are given in the way that iptables-nft compares as one number.
    NegatedPorts,
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Known::ContinueOnIp => "continue on an IP rule",
            Known::Ipv6DstIpTo => "dstipto of an IPv6 rule",
            Known::RuleBeforeChain => "rules sent before their sub-chain",
            Known::UntypedVariable => "variables pasted as text",
            Known::VlanEncapBase => "encap-protocol in the wrong base",
            Known::VariableComment => "a comment that is a variable",
            Known::VariableGratuitous => "gratuitous that is a variable",
            Known::IpSetOutsideAll => "an ipset on another element than all",
            Known::NegatedPorts => "two negated ports",
        })
    }
}

/// How a case came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Both installed the same rules.
    Equal,
    /// Both refused it.
    BothRefuse {
        /// What libvirt said.
        libvirt: String,
        /// What nwfilter said.
        ours: String,
    },
    /// They differ in ways that are known.
    Known(Known),
    /// They differ.
    Different(String),
}

/// A libvirtd on one host, nwfilter on another, used for one case after the other.
pub struct Pair {
    oracle: Host,
    daemon: Libvirtd,
    subject: Host,
    backend: Xtables,
    /// The filtered port and its peer on either host.
    taps: [[Tap; 2]; 2],
    round: usize,
}

/// What libvirt did with a case.
enum Theirs {
    Refused(String),
    Installed(Saved),
}

/// What nwfilter did with a case.
enum Ours {
    /// The filters or the binding were refused before the kernel was touched.
    Refused {
        why: String,
        bad_value: bool,
    },
    /// A tool or the kernel refused what the rules crate let pass.
    RefusedLate(String),
    Installed(Saved),
}

impl Pair {
    /// Starts the daemon.
    pub fn new() -> Result<Self> {
        let host = || Host::builder().bridge_addr("10.0.0.254/24").build();
        let (oracle, subject) = (host()?, host()?);
        let taps = [[oracle.tap(PORT)?, oracle.tap(PEER)?], [subject.tap(PORT)?, subject.tap(PEER)?]];
        for (host, (set, family)) in [&oracle, &subject].iter().flat_map(|host| IPSETS.map(|set| (host, set)))
        {
            host.run(&["ipset", "create", set, "hash:ip,port,ip", "family", family])?;
        }
        let daemon = Libvirtd::start(&oracle)?;
        // libvirt has no conntrack helpers; that they make no other difference is seen by leaving them out.
        let backend = Xtables::new(Settings { conntrack_helpers: false, ..Settings::default() });
        Ok(Self { oracle, daemon, subject, backend, taps, round: 0 })
    }

    /// Gives a case to both and compares; both hosts are as before afterwards.
    pub fn compare(&mut self, case: &Case) -> Result<Verdict> {
        let case = self.renamed(case);
        let (libvirt, ours) = thread::scope(|scope| {
            let ours = scope.spawn(|| self.ours(&case));
            let libvirt = self.libvirt(&case);
            (libvirt, ours.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        Ok(verdict(&case, &libvirt?, &ours?))
    }

    /// The case with filter names that the daemon has not seen: it would refuse to give one another UUID.
    fn renamed(&mut self, case: &Case) -> Case {
        self.round += 1;
        let new_name =
            |old: &FilterName| format!("{old}.{}", self.round).parse().unwrap_or_else(|_| old.clone());
        let mut case = case.clone();
        for filter in &mut case.filters {
            filter.name = new_name(&filter.name);
            filter.uuid = None;
            for entry in &mut filter.entries {
                if let Entry::Include(include) = entry {
                    include.filter = new_name(&include.filter);
                }
            }
        }
        case
    }

    fn libvirt(&self, case: &Case) -> Result<Theirs> {
        let refusal = self.install_libvirt(case)?;
        let outcome = match &refusal {
            Some(why) => Theirs::Refused(why.clone()),
            None => Theirs::Installed(self.oracle.saved()?.port(PORT)),
        };
        self.remove_libvirt(case, refusal.is_none())?;
        Ok(outcome)
    }

    /// What the daemon says against a case.
    fn install_libvirt(&self, case: &Case) -> Result<Option<String>> {
        let mut commands = Vec::new();
        for (number, filter) in case.filters.iter().enumerate() {
            let text = write_filter(&without_set_flags(filter));
            commands.push(self.command("nwfilter-define", &format!("filter{number}.xml"), &text)?);
        }
        commands.push(self.command("nwfilter-binding-create", "binding.xml", &binding_text(case)?)?);
        let results = self.daemon.virsh_batch(&commands)?;
        Ok(results.into_iter().find_map(Result::err).map(|error| error.to_string()))
    }

    fn remove_libvirt(&self, case: &Case, bound: bool) -> Result<()> {
        let word = |word: &str| word.to_owned();
        let unbind = bound.then(|| vec![word("nwfilter-binding-delete"), word(PORT)]);
        let undefine = |filter: &Filter| vec![word("nwfilter-undefine"), word(filter.name.as_str())];
        let commands: Vec<_> = unbind.into_iter().chain(case.filters.iter().rev().map(undefine)).collect();
        self.daemon.virsh_batch(&commands)?;
        if bound { Ok(()) } else { self.sweep_oracle() }
    }

    /// libvirt leaves a rule in libvirt-in-post when it refuses a binding halfway; what is left would look like a
    /// part of the next case.
    fn sweep_oracle(&self) -> Result<()> {
        if self.oracle.saved()?.port(PORT).is_empty() {
            return Ok(());
        }
        for tool in ["iptables", "ip6tables"] {
            self.oracle.run_with_stdin(&[&format!("{tool}-restore")], "*filter\nCOMMIT\n")?;
        }
        self.oracle.run(&["ebtables", "-t", "nat", "-F"])?;
        self.oracle.run(&["ebtables", "-t", "nat", "-X"])?;
        let left = self.oracle.saved()?.port(PORT);
        ensure!(left.is_empty(), "libvirt left something that cannot be removed: {left:?}");
        Ok(())
    }

    /// A virsh command that reads a document from a file.
    fn command(&self, verb: &str, file: &str, text: &str) -> Result<Vec<String>> {
        let file = format!("/etc/libvirt/{file}");
        self.daemon.write_file(&file, text)?;
        Ok(vec![verb.to_owned(), self.daemon.path(&file)?.display().to_string()])
    }

    /// What nwfilter installs must show no difference to itself, must not be installed a second time, and must go
    /// without a trace.
    fn ours(&self, case: &Case) -> Result<Ours> {
        let ruleset = match ruleset(case)? {
            Ok(ruleset) => ruleset,
            Err(refused) => return Ok(refused),
        };
        let there = batch(Some(ruleset))?;
        self.subject.enter(|| {
            if let Err(error) = self.backend.apply(&there) {
                return Ok(Ours::RefusedLate(error.to_string()));
            }
            let saved = self.subject.saved()?.port(PORT);
            let differences = self.backend.plan(&there)?.differences;
            ensure!(differences.is_empty(), "differs from itself: {differences:?}");
            let again = self.backend.apply(&there)?;
            ensure!(again.commits == 0, "applying twice changed {:?}", again.changed);
            self.backend.apply(&batch(None)?)?;
            let left = self.subject.saved()?.port(PORT);
            ensure!(left.is_empty(), "something of the port is left: {left:?}");
            Ok(Ours::Installed(saved))
        })
    }

    /// Runs `inspect` while the port is filtered on both sides, libvirt's first. `None` if either refuses the case.
    pub fn while_filtered<R>(
        &mut self,
        case: &Case,
        inspect: impl FnOnce([Side<'_>; 2]) -> Result<R>,
    ) -> Result<Option<R>> {
        let case = self.renamed(case);
        let Ok(ruleset) = ruleset(&case)? else { return Ok(None) };
        if self.install_libvirt(&case)?.is_some() {
            self.remove_libvirt(&case, false)?;
            return Ok(None);
        }
        self.subject.enter(|| self.backend.apply(&batch(Some(ruleset))?).map_err(anyhow::Error::from))?;
        let [theirs, ours] = &self.taps;
        let seen = inspect([
            Side { host: &self.oracle, port: &theirs[0], peer: &theirs[1] },
            Side { host: &self.subject, port: &ours[0], peer: &ours[1] },
        ]);
        self.subject.enter(|| self.backend.apply(&batch(None)?).map_err(anyhow::Error::from))?;
        self.remove_libvirt(&case, true)?;
        seen.map(Some)
    }
}

/// A host whose port is filtered.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// The host. Its bridge has the address 10.0.0.254.
    pub host: &'a Host,
    /// The filtered port.
    pub port: &'a Tap,
    /// Another port of the bridge, not filtered.
    pub peer: &'a Tap,
}

/// The ruleset of a case, from its documents.
fn ruleset(case: &Case) -> Result<Result<Arc<Ruleset>, Ours>> {
    let mut filters = BTreeMap::new();
    for filter in &case.filters {
        match read_filter(filter.name.as_str(), &write_filter(filter)).into_result() {
            Ok(filter) => filters.insert(filter.name.clone(), filter),
            Err(error) => return Ok(Err(Ours::Refused { why: error.to_string(), bad_value: false })),
        };
    }
    Ok(instantiate(&filters, &binding(case)?).map(Arc::new).map_err(|error| {
        let bad_value = matches!(error, RulesError::BadValue { .. });
        Ours::Refused { why: error.to_string(), bad_value }
    }))
}

/// The port with a ruleset, or without a trace.
fn batch(ruleset: Option<Arc<Ruleset>>) -> Result<Batch> {
    let (port, mut batch) = (PORT.parse()?, Batch::default());
    match ruleset {
        Some(ruleset) => batch.filter(port, ruleset),
        None => batch.remove(port),
    }
    Ok(batch)
}

/// The filter without the flags of ipsets that are not libvirt's to read: it gives them to itself, except on `all`
/// elements, but drops the ipset where it finds them written.
fn without_set_flags(filter: &Filter) -> Filter {
    let mut filter = filter.clone();
    for entry in &mut filter.entries {
        if let Entry::Rule(Rule { matches: Some(matches), .. }) = entry
            && !matches!(matches.protocol, Protocol::All | Protocol::AllOn6)
        {
            matches.items.retain(|item| item.attribute.field != Field::IpSetFlags);
        }
    }
    filter
}

fn verdict(case: &Case, libvirt: &Theirs, ours: &Ours) -> Verdict {
    match (libvirt, ours) {
        (_, Ours::RefusedLate(why)) => {
            Verdict::Different(format!("a tool refuses what nwfilter-rules should have refused:\n{why}"))
        }
        (Theirs::Refused(libvirt), Ours::Refused { why, .. }) => {
            Verdict::BothRefuse { libvirt: libvirt.clone(), ours: why.clone() }
        }
        (Theirs::Refused(why), Ours::Installed(_)) => match known_refusal(case, why) {
            Some(known) => Verdict::Known(known),
            None => Verdict::Different(format!("libvirt refuses it, nwfilter does not:\n{why}")),
        },
        (Theirs::Installed(_), Ours::Refused { bad_value: true, .. }) => {
            Verdict::Known(Known::UntypedVariable)
        }
        (Theirs::Installed(_), Ours::Refused { why, .. }) => {
            Verdict::Different(format!("nwfilter refuses it, libvirt does not:\n{why}"))
        }
        (Theirs::Installed(theirs), Ours::Installed(ours)) => {
            let ports = ports_as_one(ours);
            let misread = Saved { ebtables: misread_vlan_encap(ours, theirs), ..ports.clone() };
            match theirs.diff(&misread) {
                None if misread == *ours => Verdict::Equal,
                None if misread == ports => Verdict::Known(Known::NegatedPorts),
                None => Verdict::Known(Known::VlanEncapBase),
                Some(_)
                    if has_variable(case, Field::ArpGratuitous)
                        && theirs.diff(&without_gratuitous(ours)).is_none() =>
                {
                    Verdict::Known(Known::VariableGratuitous)
                }
                Some(diff) => Verdict::Different(format!("libvirt's rules (-) and nwfilter's (+):\n{diff}")),
            }
        }
    }
}

fn has_variable(case: &Case, field: Field) -> bool {
    let mut rules = case.filters.iter().flat_map(Filter::rules);
    rules.any(|rule| item(rule, field).is_some_and(is_variable))
}

fn without_gratuitous(saved: &Saved) -> Saved {
    Saved { ebtables: saved.ebtables.replace("--arp-gratuitous ", ""), ..saved.clone() }
}

/// Why libvirt refuses what it should not.
fn known_refusal(case: &Case, why: &str) -> Option<Known> {
    let has = |is: fn(&Rule) -> bool| case.filters.iter().flat_map(Filter::rules).any(is);
    if has(|rule| layer(rule) != Layer::Ethernet && rule.action == Action::Continue)
        && why.contains("CONTINUE")
    {
        return Some(Known::ContinueOnIp);
    }
    if has(|rule| layer(rule) == Layer::Ipv6 && item(rule, Field::DstIpTo).is_some())
        && why.contains("dstipto")
    {
        return Some(Known::Ipv6DstIpTo);
    }
    if has(|rule| item(rule, Field::VlanEncap).is_some()) && why.contains("Invalid --vlan-encap range") {
        return Some(Known::VlanEncapBase);
    }
    if has_variable(case, Field::Comment) && why.contains("--comment -") {
        return Some(Known::VariableComment);
    }
    if has(|rule| item(rule, Field::IpSet).is_some()) && why.contains("Unexpected enum value 0") {
        return Some(Known::IpSetOutsideAll);
    }
    why.contains("No chain/target/match by that name").then_some(Known::RuleBeforeChain)
}

/// Our rules as libvirt gives them to the tool: the number of `--vlan-encap` in decimal, which the tool reads as
/// hexadecimal and cuts to 16 bits. The value of a variable reaches the tool as it is; such rules are equal already.
fn misread_vlan_encap(ours: &Saved, theirs: &Saved) -> String {
    const OPTION: &str = "--vlan-encap ";
    let misread = |line: &str| -> Option<String> {
        let start = line.find(OPTION)? + OPTION.len();
        let start = start + if line[start..].starts_with("! ") { 2 } else { 0 };
        let end = start + line[start..].find(' ')?;
        let number = u32::from_str_radix(&line[start..end], 16).ok()?;
        let read = u32::from_str_radix(&number.to_string(), 16).ok()? & 0xffff;
        Some(format!("{}{read:04X}{}", &line[..start], &line[end..]))
    };
    let equal = |line: &str| theirs.ebtables.lines().any(|other| other == line);
    let as_given =
        |line: &str| misread(line).filter(|_| !equal(line)).unwrap_or_else(|| line.to_owned()) + "\n";
    ours.ebtables.lines().map(as_given).collect()
}

/// Our rules with two negated ports in the match of the transport protocol, as libvirt gives them to the tools.
fn ports_as_one(ours: &Saved) -> Saved {
    let as_one = |line: &str| -> Option<String> {
        let (before, rest) = line.split_once(" -m multiport ! --dports ")?;
        let (port, after) = rest.split_once(' ')?;
        let source = before.find(" ! --sport ")? + " ! --sport ".len();
        let end = before[source..].find(' ').map_or(before.len(), |length| source + length);
        Some(format!("{} ! --dport {port}{} {after}", &before[..end], &before[end..]))
    };
    let all = |text: &str| {
        text.lines().map(|line| as_one(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
    };
    Saved { iptables: all(&ours.iptables), ip6tables: all(&ours.ip6tables), ..ours.clone() }
}

fn is_variable(item: &Item) -> bool {
    matches!(item.value, Value::Variable(_))
}

fn layer(rule: &Rule) -> Layer {
    rule.matches.as_ref().map_or(Layer::Ethernet, |matches| matches.protocol.layer())
}

fn item(rule: &Rule, field: Field) -> Option<&Item> {
    rule.matches.as_ref()?.get(field)
}

fn binding_text(case: &Case) -> Result<String> {
    let root = case.filters.last().context("a case without filters")?;
    let parameter = |(name, values): (&VarName, &[String])| -> String {
        values.iter().map(|value| format!("<parameter name='{name}' value='{value}'/>")).collect()
    };
    let params: String = case.params.iter().map(parameter).collect();
    Ok(format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='{PORT}'/><mac address='52:54:00:7b:35:93'/>\
         <filterref filter='{}'>{params}</filterref></filterbinding>\n",
        root.name
    ))
}

fn binding(case: &Case) -> Result<Binding> {
    Ok(read_binding("binding.xml", &binding_text(case)?).into_result()?)
}
