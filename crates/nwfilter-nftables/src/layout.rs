//! The layout of the table: names, base chains, and the rules of a class as expressions.
//!
//! ```text
//! table bridge nwfilter {
//!   map from-guest { type ifname : verdict; }       port → the chain of its class for frames that the guest sends
//!   map to-guest   { type ifname : verdict; }       port → the one for frames that the guest receives
//!   chain prerouting  { iifname vmap @from-guest }
//!   chain input       { the same for frames to a bridge's own groups, which do not pass prerouting }
//!   chain postrouting { oifname vmap @to-guest }
//!   map toward-guest { type ifname . ether_addr : verdict; }   bridge and guest → the chain that answers what is rejected
//!   chain toward      { ibrname . ether daddr vmap @toward-guest }    where a class rejects
//!   chain zones       { gives connections of each bridge a zone of their own, where a class tracks connections }
//!   set FILTER-DIGEST.0 { type ifname . ether_addr; }   the values of the class's ports
//!   chain FILTER-DIGEST.from { … }                      the rules of the class
//! }
//! ```

use std::sync::Arc;

use nwfilter_rules::{LOG_RATE, LogGroup, LogPrefix, LogSide, Origin};
use nwfilter_xml::{MacAddr, PortDev};

use crate::bridges::Bridge;
use crate::class::{Action, Class, ClassMatch, ClassRule, Counted, HelperKind, Way};
use crate::condition::{self, Condition, SAME_BYTES};
use crate::host;
use crate::kernel::expr::{
    CtKey, Dynset, DynsetOp, Expr, IFNAMSIZ, Limit, LimitOf, Load, Log, LogTo, MetaKey, ObjectKind, Register,
    Relation, Stateful, Verdict,
};
use crate::kernel::{
    BaseChain, Chain, ChainName, ChainType, Comment, CtHelper, Datatype, Element, ElementKey, ElementValue,
    Hook, MapData, Object, Policy, Rule, Set, SetFlags, SetName, TableId, field,
};

/// The name of the table, as tools show it.
pub(crate) const TABLE: &str = "bridge nwfilter";
/// The same without its family.
pub(crate) const TABLE_NAME: &str = "nwfilter";
/// The priority of the chain that dispatches frames from guests: after connection tracking, which is at -200.
const PREROUTING_PRIORITY: i32 = -150;
/// The name of the set of [`zone_0`].
pub(crate) const ZONE_0: &str = "zone-0";
/// The priority of the chain that sets zones: before connection tracking.
const ZONES_PRIORITY: i32 = -300;
/// The number of zones beside zone 0.
const ZONES: u32 = u16::MAX as u32;
/// The priority of the chain that rejects packets to guests: after the rules of their senders.
const TOWARD_PRIORITY: i32 = PREROUTING_PRIORITY + 1;
/// The name of the map of [`dispatch_map`] for frames on their way to a guest.
pub(crate) const TOWARD_GUEST: &str = "toward-guest";
/// The most entries of a set that counts.
const COUNTED: u32 = 65_536;
/// How often packets of a port are logged.
const LOG_LIMIT: Limit =
    Limit { rate: LOG_RATE as u64, seconds: 1, burst: LOG_RATE, of: LimitOf::Packets, over: false };
/// The longest part of a filter's name in names of chains.
const TITLE: usize = 48;
/// `01:80:c2:00:00:00` to `01:80:c2:00:00:0f`: a bridge keeps such frames for itself.
const BRIDGE_GROUP: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0];
const BRIDGE_GROUP_MASK: [u8; 6] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xf0];

/// Makes a name of a text; invalid characters become `_`.
fn name<T: std::str::FromStr>(text: &str) -> Option<T> {
    let valid =
        |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/') { c } else { '_' };
    text.chars().map(valid).collect::<String>().parse().ok()
}

/// A name that is a valid constant.
#[expect(
    clippy::expect_used,
    reason = "called with names of this module, which begin with a letter and are short"
)]
pub(crate) fn fixed<T: std::str::FromStr>(text: &str) -> T {
    name(text).expect("a name")
}

/// The table.
pub(crate) fn table() -> TableId {
    TableId::bridge(fixed(TABLE_NAME))
}

/// Both tables.
pub(crate) fn tables() -> [TableId; 2] {
    [table(), host::table()]
}

/// The table of the chain, set or object with this name.
pub(crate) fn table_of(name: &str) -> TableId {
    if host::is_name(name) { host::table() } else { table() }
}

/// The map from ports to their chains; for frames on their way to a guest, from its bridge and MAC address.
pub(crate) fn dispatch_map(way: Way) -> Arc<Set> {
    let (name, key) = match way {
        Way::FromGuest => ("from-guest", vec![Datatype::Ifname]),
        Way::ToGuest => ("to-guest", vec![Datatype::Ifname]),
        Way::Ahead => (TOWARD_GUEST, vec![Datatype::Ifname, Datatype::EtherAddr]),
    };
    Arc::new(Set::map(fixed(name), key, MapData::Verdict))
}

fn base_chain(name: &str, hook: Hook, priority: i32) -> Chain {
    let base = BaseChain { kind: ChainType::Filter, hook, priority, policy: Policy::Accept };
    Chain { name: fixed(name), base: Some(base) }
}

/// The chain that dispatches frames to guests to the chains that reject them.
pub(crate) fn toward() -> (Chain, Vec<Rule>) {
    let map = dispatch_map(Way::Ahead);
    let rule = Rule::new().vmap(&[field::IBRNAME, field::ETHER_DADDR], &map.name);
    (base_chain("toward", Hook::Prerouting, TOWARD_PRIORITY), vec![rule])
}

/// The permanent base chains and their rules. `rejects` says whether any class rejects packets.
pub(crate) fn base_chains(rejects: bool) -> Vec<(Chain, Vec<Rule>)> {
    let base = |name: &str, hook, priority, rule| (base_chain(name, hook, priority), vec![rule]);
    let (from, to) = (dispatch_map(Way::FromGuest), dispatch_map(Way::ToGuest));
    let to_bridge = Rule::new().masked(field::ETHER_DADDR, BRIDGE_GROUP_MASK, Relation::Equal, BRIDGE_GROUP);
    let (postrouting, mut leaving) =
        base("postrouting", Hook::Postrouting, 0, Rule::new().vmap(&[field::OIFNAME], &to.name));
    if rejects {
        leaving.splice(0..0, answers());
    }
    vec![
        base(
            "prerouting",
            Hook::Prerouting,
            PREROUTING_PRIORITY,
            Rule::new().vmap(&[field::IIFNAME], &from.name),
        ),
        base("input", Hook::Input, 0, to_bridge.vmap(&[field::IIFNAME], &from.name)),
        (postrouting, leaving),
    ]
}

/// Accepts the kernel's own errors to a guest whose packet was rejected: the host sends them, outside of any connection.
fn answers() -> Vec<Rule> {
    // Protocol, type "unreachable", code "port".
    let answers = [([0x08, 0x00], 1, [3], [3]), ([0x86, 0xdd], 58, [1], [4])];
    let rule = |(ether_type, protocol, kind, code): ([u8; 2], u8, [u8; 1], [u8; 1])| {
        Rule::new()
            .equal(field::IIFNAME, [0; IFNAMSIZ])
            .equal(field::ETHER_TYPE, ether_type)
            .equal(field::L4PROTO, [protocol])
            .equal(field::ICMP_TYPE, kind)
            .equal(field::ICMP_CODE, code)
            .verdict(Verdict::Accept)
            .comment(Comment::new("answers to what is rejected"))
    };
    answers.into_iter().map(rule).collect()
}

/// The set with the bridge whose connections are in zone 0, as all are with iptables: its connections survive a change of the
/// backend.
pub(crate) fn zone_0() -> Arc<Set> {
    Arc::new(Set::new(fixed(ZONE_0), [Datatype::Ifname]))
}

/// The chain that gives each bridge a conntrack zone, so that guests with equal addresses do not share connections.
///
/// A zone is a hash of the bridge's name of 16 bits, so a new bridge has one with its first frame. Two bridges share a zone in
/// one of 65,535 cases. Traffic to the host stays in zone 0, where the kernel looks up the host's replies.
pub(crate) fn zones() -> (Chain, Vec<Rule>) {
    /// PACKET_HOST: a bridge sets this for a frame to its own MAC address, before any rule.
    const TO_HOST: [u8; 1] = [0];
    let rules = vec![
        Rule::new().equal(Load::Meta(MetaKey::Pkttype), TO_HOST).verdict(Verdict::Accept),
        Rule::new().is_in(&[field::IBRNAME], &zone_0().name).verdict(Verdict::Accept),
        zone_by_bridge(),
    ];
    (base_chain("zones", Hook::Prerouting, ZONES_PRIORITY), rules)
}

/// Sets the zone of the packet's bridge.
pub(crate) fn zone_by_bridge() -> Rule {
    let set_zone = Expr::CtSet { key: CtKey::Zone, sreg: Register::FIRST, direction: None };
    Rule::new().jhash(field::IBRNAME, ZONES, 0, 1).expr(set_zone)
}

/// The zone that [`zone_by_bridge`] sets, as the kernel computes it: `jhash` of the name's 16 bytes with seed 0, scaled.
pub(crate) fn zone_of(bridge: &Bridge) -> u16 {
    let word = |at: usize| u32::from_le_bytes([bridge[at], bridge[at + 1], bridge[at + 2], bridge[at + 3]]);
    // JHASH_INITVAL, the length and the seed.
    let begin = 0xdead_beef_u32.wrapping_add(bridge.len() as u32);
    let [mut a, mut b, mut c] = [word(0), word(4), word(8)].map(|word| begin.wrapping_add(word));
    let step = |to: &mut u32, by: &mut u32, with: u32, bits: u32| {
        *to = to.wrapping_sub(*by) ^ by.rotate_left(bits);
        *by = by.wrapping_add(with);
    };
    for bits in [[4, 6, 8], [16, 19, 4]] {
        step(&mut a, &mut c, b, bits[0]);
        step(&mut b, &mut a, c, bits[1]);
        step(&mut c, &mut b, a, bits[2]);
    }
    a = a.wrapping_add(word(12));
    let last = |to: &mut u32, by: u32, bits: u32| *to = (*to ^ by).wrapping_sub(by.rotate_left(bits));
    last(&mut c, b, 14);
    last(&mut a, c, 11);
    last(&mut b, a, 25);
    last(&mut c, b, 16);
    last(&mut a, c, 4);
    last(&mut b, a, 14);
    last(&mut c, b, 24);
    let scaled = (u64::from(c) * u64::from(ZONES)) >> 32;
    scaled as u16 + 1
}

/// Whether a rule tests connections.
pub(crate) fn tracks(rule: &Rule) -> bool {
    let limits = |stateful: &Stateful| matches!(stateful, Stateful::Connlimit(_));
    rule.exprs.iter().any(|expr| match expr {
        Expr::Load { load: Load::Ct { .. }, .. } | Expr::Object { kind: ObjectKind::CtHelper, .. } => true,
        Expr::Stateful(stateful) => limits(stateful),
        Expr::Dynset(dynset) => dynset.stateful.iter().any(limits),
        _ => false,
    })
}

/// Whether a rule rejects packets.
pub(crate) fn rejects(rule: &Rule) -> bool {
    rule.exprs.iter().any(|expr| matches!(expr, Expr::Reject(_)))
}

/// The set that compares fields of a packet with each other.
pub(crate) fn same_bytes() -> (Arc<Set>, Vec<Element>) {
    // A type of one byte. nft cannot list concatenations of numbers without a type.
    let set = Set::new(fixed(SAME_BYTES), [Datatype::InetProto, Datatype::InetProto]);
    let elements = (0..=u8::MAX).map(|byte| Element::new(ElementKey::one(&[[byte], [byte]]))).collect();
    (Arc::new(set), elements)
}

/// The object of a helper.
pub(crate) fn helper(kind: HelperKind) -> Object {
    let transport = if kind.protocol() == 6 { "tcp" } else { "udp" };
    Object::CtHelper(CtHelper {
        name: fixed(&format!("{}-{transport}", kind.name)),
        helper: kind.name.into(),
        protocol: kind.protocol(),
        l3proto: None,
        comment: None,
    })
}

/// The name of a class: its filter and its digest.
pub(crate) fn class_name(class: &Class) -> String {
    let title: String = class
        .title
        .chars()
        .take(TITLE)
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' })
        .collect();
    // Names start with a letter.
    let letter = if title.starts_with(|c: char| c.is_ascii_alphabetic()) { "" } else { "f-" };
    format!("{letter}{title}-{:012x}", class.digest() & 0xffff_ffff_ffff)
}

/// The class that a chain or set of the table belongs to.
pub(crate) fn class_of(name: &str) -> Option<&str> {
    name.split_once('.').map(|(class, _)| class)
}

/// Whether a chain of a class rejects packets to a guest.
pub(crate) fn is_ahead(name: &str) -> bool {
    name.split_once('.').is_some_and(|(_, suffix)| suffix.starts_with("toward"))
}

/// The key of a port in the maps.
pub(crate) fn port_key(port: &PortDev) -> Vec<u8> {
    // Names of ports are names of interfaces.
    field::ifname(port.as_str()).unwrap_or_default().to_vec()
}

/// A class as chains, rules and sets of the kernel.
#[derive(Debug)]
pub(crate) struct Rendered {
    /// Its name.
    pub(crate) name: String,
    /// Its chains, with their rules and origins.
    pub(crate) chains: Vec<(ChainName, Vec<(Rule, Origin)>)>,
    /// The sets of ports' values, as the class numbers them.
    pub(crate) sets: Vec<Arc<Set>>,
    /// The sets of counted addresses.
    pub(crate) counted: Vec<Arc<Set>>,
    /// The first chains for frames of its ports.
    pub(crate) entries: Vec<(Way, ChainName)>,
    /// The helpers it assigns.
    pub(crate) helpers: Vec<HelperKind>,
    /// Whether it compares fields with each other.
    pub(crate) needs_same_bytes: bool,
    /// Whether it tests connections.
    pub(crate) tracks: bool,
    /// Whether it rejects packets.
    pub(crate) rejects: bool,
    /// The chain that rejects packets to the guest.
    pub(crate) toward: Option<ChainName>,
    /// Whether packets to the guest are dropped although they should be rejected.
    pub(crate) lacks_answers: bool,
}

pub(crate) fn render(class: &Class) -> Rendered {
    let prefix = class_name(class);
    let chains: Vec<ChainName> =
        class.chains.iter().map(|chain| fixed(&clipped(&prefix, &chain.suffix))).collect();
    let set_name = |suffix: String| -> SetName { fixed(&format!("{prefix}.{suffix}")) };
    let sets = class.sets.iter().enumerate().map(|(index, set)| {
        let key: Vec<Datatype> =
            std::iter::once(Datatype::Ifname).chain(set.fields.iter().copied()).collect();
        let comment = Some(Comment::new(&set.variables));
        Arc::new(Set { comment, ..Set::new(set_name(index.to_string()), key) })
    });
    let counted = class.counted.iter().enumerate().map(|(index, counted)| {
        let key = match counted {
            Counted::Connections(address) => vec![Datatype::Ifname, *address],
            Counted::Logged(Way::FromGuest | Way::ToGuest) => vec![Datatype::Ifname],
            // Ahead of a guest the port is not known, but its address is.
            Counted::Logged(Way::Ahead) => vec![Datatype::EtherAddr],
        };
        Arc::new(Set {
            size: Some(COUNTED),
            flags: SetFlags { dynamic: true, ..SetFlags::default() },
            ..Set::new(set_name(format!("counted-{index}")), key)
        })
    });
    let names =
        Names { chains: &chains, sets: &sets.collect::<Vec<_>>(), counted: &counted.collect::<Vec<_>>() };
    let entries = [(Way::FromGuest, class.from_guest), (Way::ToGuest, class.to_guest)];
    let entries: Vec<_> =
        entries.into_iter().filter_map(|(way, index)| Some((way, chains[index?].clone()))).collect();
    let rendered = class.chains.iter().enumerate().map(|(index, chain)| {
        let rules = chain.rules.iter().map(|rule| (names.rule(rule, chain.way), rule.origin.clone()));
        (chains[index].clone(), rules.collect())
    });
    let rendered: Vec<(ChainName, Vec<(Rule, Origin)>)> = rendered.collect();
    let any =
        |is: &dyn Fn(&Rule) -> bool| rendered.iter().flat_map(|(_, rules)| rules).any(|(rule, _)| is(rule));
    Rendered {
        tracks: any(&tracks),
        rejects: any(&rejects),
        toward: class.toward_guest.map(|index| chains[index].clone()),
        lacks_answers: class.lacks_answers,
        chains: rendered,
        sets: names.sets.to_vec(),
        counted: names.counted.to_vec(),
        entries,
        helpers: class.helpers.iter().copied().collect(),
        needs_same_bytes: class.literals().any(|condition| matches!(condition, Condition::SameBytes { .. })),
        name: prefix,
    }
}

/// A chain's name, truncated if it is too long. The distinguishing part comes first.
fn clipped(prefix: &str, suffix: &str) -> String {
    let suffix = suffix.replace('.', "_");
    format!("{prefix}.{suffix}").chars().take(127).collect()
}

/// The names of the objects that rules of a class refer to.
struct Names<'a> {
    chains: &'a [ChainName],
    sets: &'a [Arc<Set>],
    counted: &'a [Arc<Set>],
}

impl Names<'_> {
    fn rule(&self, rule: &ClassRule, way: Way) -> Rule {
        let mut built = Rule::new();
        for m in &rule.matches {
            built = self.add(built, m, way);
        }
        let stops = matches!(rule.action, Action::Drop | Action::Reject(_) | Action::Continue);
        // What goes on meets the same rule again, and is counted there.
        let is_first = way != Way::Ahead || matches!(rule.action, Action::Reject(_));
        if is_first && (rule.comment.is_some() || stops) {
            built = built.counter();
        }
        built = match &rule.action {
            Action::Accept => built.verdict(Verdict::Accept),
            Action::Drop => built.verdict(Verdict::Drop),
            Action::Reject(reject) => built.reject(*reject),
            Action::Return => built.verdict(Verdict::Return),
            Action::Continue => built,
            Action::Jump(chain) => built.verdict(Verdict::Jump(self.chains[*chain].clone())),
            Action::Goto(chain) => built.verdict(Verdict::Goto(self.chains[*chain].clone())),
            Action::Helper(kind) => built.object(&helper(*kind)),
            Action::Log(group) => built.log(log(*group, way, &rule.origin)),
        };
        match &rule.comment {
            Some(comment) if is_first => built.comment(Comment::new(comment)),
            _ => built,
        }
    }

    fn add(&self, mut rule: Rule, m: &ClassMatch, way: Way) -> Rule {
        let port = match way {
            Way::FromGuest => field::IIFNAME,
            // Rules on their way to a guest have no sets: the port is not known.
            Way::ToGuest | Way::Ahead => field::OIFNAME,
        };
        match m {
            ClassMatch::Literal(condition) => {
                rule.exprs.extend(condition::literal(condition, &fixed(SAME_BYTES)));
                rule
            }
            ClassMatch::Member { set, loads, negated } => {
                let loads: Vec<Load> = std::iter::once(port).chain(loads.iter().copied()).collect();
                let set = &self.sets[*set].name;
                if *negated { rule.is_not_in(&loads, set) } else { rule.is_in(&loads, set) }
            }
            ClassMatch::LogLimit { counted } => {
                let key = if way == Way::Ahead { field::ETHER_DADDR } else { port };
                rule.concat(&[key]).expr(Expr::Dynset(Dynset {
                    set: self.counted[*counted].name.clone(),
                    op: DynsetOp::Add,
                    sreg: Register::FIRST,
                    timeout: None,
                    stateful: vec![Stateful::Limit(LOG_LIMIT)],
                    invert: false,
                }))
            }
            ClassMatch::Connlimit { counted, source, limit } => {
                rule.concat(&[port, *source]).expr(Expr::Dynset(Dynset {
                    set: self.counted[*counted].name.clone(),
                    op: DynsetOp::Add,
                    sreg: Register::FIRST,
                    timeout: None,
                    stateful: vec![Stateful::Connlimit(*limit)],
                    invert: false,
                }))
            }
        }
    }
}

/// Logs a packet that the next rule stops.
fn log(group: LogGroup, way: Way, origin: &Origin) -> Log {
    let side = match way {
        Way::FromGuest => LogSide::FromGuest,
        Way::ToGuest | Way::Ahead => LogSide::ToGuest,
    };
    Log {
        prefix: Some(LogPrefix::new(side, origin).to_string()),
        to: LogTo::Group { group: group.0, snaplen: None, threshold: None },
    }
}

/// The elements of a port in a set of its class.
pub(crate) fn value_element(port: &PortDev, fields: &[Vec<u8>]) -> Element {
    let key = std::iter::once(port_key(port)).chain(fields.iter().cloned()).collect::<Vec<_>>();
    Element::new(ElementKey::one(&key))
}

/// The element that dispatches a port to a chain.
pub(crate) fn dispatch_element(port: &PortDev, chain: &ChainName) -> Element {
    Element::with(ElementKey::One(port_key(port)), ElementValue::Verdict(Verdict::Goto(chain.clone())))
}

/// The element that dispatches frames to a guest to a chain. Its comment is the port.
pub(crate) fn toward_element(
    port: &PortDev,
    bridge: [u8; IFNAMSIZ],
    mac: MacAddr,
    chain: &ChainName,
) -> Element {
    let key = ElementKey::one(&[&bridge[..], &mac.0]);
    let verdict = ElementValue::Verdict(Verdict::Goto(chain.clone()));
    Element { comment: Some(Comment::new(port.as_str())), ..Element::with(key, verdict) }
}
