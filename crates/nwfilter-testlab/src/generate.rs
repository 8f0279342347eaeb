//! Random filters, the same for the same seed: valid ones as values and as documents, and documents that are wrong
//! in a known way. All of them come from the attribute table of nwfilter-xml.

use std::ops::RangeInclusive;

use nwfilter_xml::value::{Number, SetDirection, States};
use nwfilter_xml::{
    Access, Action, ChainKind, ChainName, Direction, Entry, Field, Filter, FilterName, Include, Item, Kind,
    Layer, Literal, Matches, Params, Place, Priority, Protocol, Rule, Value, VarName, VarRef,
    schema::{Attribute, PROTOCOLS},
};

/// What a [`Generator`] makes.
#[derive(Clone, Debug)]
pub struct Options {
    /// The protocols of its rules; all by default.
    pub protocols: Vec<Protocol>,
    /// The chains of its filters; empty for any name and priority, which is the default.
    pub chains: Vec<ChainName>,
    /// How many entries a filter has; 1 to 6 by default.
    pub entries: RangeInclusive<usize>,
    /// The filters that may be included; none by default.
    pub includes: Vec<FilterName>,
    /// Whether values may be variables; by default they may.
    pub variables: bool,
    /// The ipsets that may be named; empty for any name, or for no ipset at all in instantiable filters.
    pub ipsets: Vec<String>,
    /// Whether every rule must be one that the kernel takes; by default it need not be. Then ranges are not empty,
    /// masks have an address, protocols have the ports that are asked for, and variables stand only for
    /// addresses and ports.
    pub instantiable: bool,
    /// Whether libvirt 9.0.0 must read and write the filters as nwfilter does; by default it must. The
    /// differences are listed in docs/language.md.
    pub like_libvirt: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            protocols: PROTOCOLS.iter().map(|spec| spec.protocol).collect(),
            chains: Vec::new(),
            entries: 1..=6,
            includes: Vec::new(),
            variables: true,
            ipsets: Vec::new(),
            instantiable: false,
            like_libvirt: true,
        }
    }
}

impl Options {
    /// Options of filters that the kernel takes.
    pub fn instantiable() -> Self {
        Self { instantiable: true, ..Self::default() }
    }
}

/// How many values [`Generator::params`] gives a variable.
pub const VALUES_PER_VARIABLE: usize = 2;

/// A source of random filters.
///
/// ```
/// use nwfilter_testlab::generate::Generator;
/// use nwfilter_xml::{Strictness, read_filter_with};
///
/// let filter = Generator::new(7).filter("random".parse()?);
/// assert_eq!(filter, Generator::new(7).filter("random".parse()?));
/// let spelt_oddly = Generator::new(8).document(&filter);
/// let read = read_filter_with("", &spelt_oddly, Strictness::AsLibvirt).into_result()?;
/// assert_eq!(read.without_places(), filter);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Generator {
    state: u64,
    options: Options,
}

impl Generator {
    /// A generator with the default options.
    pub fn new(seed: u64) -> Self {
        Self::with_options(seed, Options::default())
    }

    /// A generator with other options.
    pub fn with_options(seed: u64, options: Options) -> Self {
        Self { state: seed, options }
    }

    /// The options, to be changed between two filters.
    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    /// The next random number (SplitMix64).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 up to, but not including, `end`; 0 if that is 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn between(&mut self, range: RangeInclusive<u32>) -> u32 {
        let width = u64::from(range.end() - range.start()) + 1;
        range.start() + (self.next() % width) as u32
    }

    /// True in `percent` of 100 cases.
    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for end in (1..list.len()).rev() {
            let other = self.below(end + 1);
            list.swap(end, other);
        }
    }

    // ---- filters ----

    /// A valid filter.
    pub fn filter(&mut self, name: FilterName) -> Filter {
        let (chain, priority) = self.chain();
        let count = self.between(*self.options.entries.start() as u32..=*self.options.entries.end() as u32);
        let entries = (0..count)
            .map(|_| {
                let include = !self.options.includes.is_empty() && self.chance(20);
                if include { Entry::Include(self.include()) } else { Entry::Rule(self.rule()) }
            })
            .collect();
        Filter { name, uuid: None, chain, priority, entries }
    }

    fn chain(&mut self) -> (ChainName, Priority) {
        let at = self.below(self.options.chains.len());
        let chain = match self.options.chains.get(at).cloned() {
            Some(chain) => chain,
            None if self.chance(50) => ChainName::root(),
            None => self.chain_name(),
        };
        let default = chain.default_priority();
        let priority = if self.chance(60) { default } else { self.priority() };
        // libvirt does not write a priority of 0, and so forgets it.
        let forgotten = self.options.like_libvirt && priority.get() == 0;
        (chain, if forgotten { default } else { priority })
    }

    fn chain_name(&mut self) -> ChainName {
        let (_, prefix, _) = self.pick(&ChainKind::TABLE[1..]);
        let tail = match self.below(3) {
            0 => String::new(),
            1 => format!("-{}", self.between(0..=9999)),
            _ => format!("_.:{}", self.between(0..=99)),
        };
        // The prefix alone is a chain as well.
        format!("{prefix}{tail}").parse().unwrap_or_else(|_| ChainName::root())
    }

    fn priority(&mut self) -> Priority {
        let number = self.between(0..=2000) as i32 - 1000;
        Priority::new(number).unwrap_or_default()
    }

    fn include(&mut self) -> Include {
        let at = self.below(self.options.includes.len());
        let filter = self.options.includes[at].clone();
        let mut params = Params::new();
        for _ in 0..self.below(3) {
            let kind = self.pick(&[Kind::Mac, Kind::Ipv4, Kind::Ipv6, Kind::U16]);
            let name = self.variable_name(kind);
            for _ in 0..VALUES_PER_VARIABLE {
                let value = self.text(kind);
                let _ = params.insert(name.clone(), &value);
            }
        }
        Include { filter, params, place: Place::default() }
    }

    /// A valid rule.
    pub fn rule(&mut self) -> Rule {
        let matches = (!self.options.protocols.is_empty() && !self.chance(4)).then(|| self.matches());
        let ip = matches.as_ref().is_some_and(|matches| matches.protocol.layer() != Layer::Ethernet);
        let action = loop {
            let (action, _) = self.pick(&Action::NAMES);
            // iptables has no target of that name.
            if !(action == Action::Continue && ip && self.options.instantiable) {
                break action;
            }
        };
        let (mut direction, _) = self.pick(&Direction::NAMES);
        let source_only =
            matches.as_ref().is_some_and(|m| m.protocol == Protocol::Stp && m.get(Field::SrcMac).is_some());
        if self.options.instantiable && source_only && direction == Direction::InOut {
            direction = Direction::Out;
        }
        let priority = if self.chance(50) { Priority::RULE_DEFAULT } else { self.priority() };
        Rule { action, direction, priority, statematch: !self.chance(15), matches, place: Place::default() }
    }

    fn matches(&mut self) -> Matches {
        let at = self.below(self.options.protocols.len());
        let protocol = self.options.protocols[at];
        let mut matches = Matches { protocol, items: Vec::new() };
        let density = self.pick(&[10, 25, 60]);
        for attribute in protocol.spec().attributes {
            if self.chance(density)
                && let Some(value) = self.value(&matches, attribute)
            {
                let negated = match attribute.sign_of {
                    Some(field) => matches.get(field).is_some_and(|item| item.negated),
                    None => self.may_be_negated(attribute.field) && self.chance(20),
                };
                matches.items.push(Item { attribute, negated, value, place: Place::default() });
            }
        }
        self.give_ports_a_protocol(&mut matches);
        self.give_ipset_its_flags(&mut matches);
        matches
    }

    fn may_be_negated(&self, field: Field) -> bool {
        let pointless =
            [Field::States, Field::IpProtocol, Field::Comment, Field::IpSetFlags, Field::ArpGratuitous];
        !(self.options.instantiable && pointless.contains(&field))
    }

    /// A value for an attribute of a rule that has the attributes before it; `None` if it shall have none.
    fn value(&mut self, before: &Matches, attribute: &Attribute) -> Option<Value> {
        let Attribute { field, kind, needs, .. } = *attribute;
        let broken = self.options.like_libvirt && field == Field::DstIpTo && kind == Kind::Ipv6;
        if broken {
            return None;
        }
        if !self.options.instantiable {
            return Some(match self.options.variables && self.chance(15) {
                true => Value::Variable(self.variable(kind)),
                false => Value::Literal(self.literal(kind)?),
            });
        }
        let needed = needs.or(field.range_start()).map(|field| before.get(field).map(|item| &item.value));
        if matches!(needed, Some(None | Some(Value::Variable(_))))
            || self.refused_by_the_kernel(before, field, kind)
        {
            return None;
        }
        if let Some(Some(Value::Literal(start))) = needed
            && field.range_start().is_some()
        {
            return Some(Value::Literal(self.range_end(kind, start)));
        }
        let variable = matches!(kind, Kind::Mac | Kind::Ipv4 | Kind::Ipv6)
            || matches!(field, Field::SrcPortStart | Field::DstPortStart);
        if variable && self.options.variables && self.chance(20) {
            return Some(Value::Variable(self.variable(kind)));
        }
        self.literal(kind).map(Value::Literal)
    }

    fn refused_by_the_kernel(&self, before: &Matches, field: Field, kind: Kind) -> bool {
        let has = |field| before.get(field).is_some();
        let inside = |protocol: u8| {
            matches!(
                before.get(Field::IpProtocol).map(|item| &item.value),
                Some(Value::Literal(Literal::U8(number))) if number.value == protocol
            )
        };
        let has_ports = [6, 17, 33, 132].into_iter().any(inside);
        match field {
            Field::IpSet => self.options.ipsets.is_empty(),
            Field::SrcIpFrom => has(Field::SrcIp),
            Field::DstIpFrom => has(Field::DstIp),
            Field::SrcPortStart | Field::DstPortStart => has(Field::IpProtocol) && !has_ports,
            Field::IcmpType | Field::IcmpCode if before.protocol == Protocol::Ipv6 => !inside(58),
            Field::ArpGratuitous => has(Field::ArpOpcode),
            _ => kind == Kind::IpSet,
        }
    }

    fn range_end(&mut self, kind: Kind, start: &Literal) -> Literal {
        let candidate = self.literal(kind).filter(|end| order(start) <= order(end));
        candidate.unwrap_or_else(|| start.clone())
    }

    /// Ports of ip and ipv6 elements are refused without a protocol that has ports.
    fn give_ports_a_protocol(&mut self, matches: &mut Matches) {
        let ports = [Field::SrcPortStart, Field::SrcPortEnd, Field::DstPortStart, Field::DstPortEnd];
        let Some(attribute) = matches.protocol.attribute(Field::IpProtocol) else { return };
        if !ports.iter().any(|port| matches.get(*port).is_some()) {
            return;
        }
        let value = self.pick(&[6, 17, 33, 132]);
        let literal = Literal::U8(Number { value, hex: value == 33 });
        let value = Value::Literal(literal);
        let rank = |field| matches.protocol.spec().attributes.iter().position(|a| a.field == field);
        let mine = rank(Field::IpProtocol);
        let item = Item { attribute, negated: false, value, place: Place::default() };
        match matches.items.binary_search_by_key(&mine, |item| rank(item.attribute.field)) {
            Ok(at) => matches.items[at] = item,
            Err(at) => matches.items.insert(at, item),
        }
    }

    /// Only `all` elements can have any flags; the others have `src` if they have an ipset, else none.
    fn give_ipset_its_flags(&mut self, matches: &mut Matches) {
        let Some(attribute) = matches.protocol.attribute(Field::IpSetFlags) else { return };
        let all = matches!(matches.protocol, Protocol::All | Protocol::AllOn6);
        let set = matches.items.iter().position(|item| item.attribute.field == Field::IpSet);
        if all && !self.options.instantiable {
            return;
        }
        let flags = match matches.get(Field::IpSetFlags) {
            Some(flags) if all => flags.value.clone(),
            _ => Value::Literal(Literal::IpSetFlags(vec![SetDirection::Src])),
        };
        matches.items.retain(|item| item.attribute.field != Field::IpSetFlags);
        if let Some(set) = set {
            let item = Item { attribute, negated: false, value: flags, place: Place::default() };
            matches.items.insert(set + 1, item);
        }
    }

    fn variable_name(&mut self, kind: Kind) -> VarName {
        let kind = format!("{kind:?}").to_uppercase();
        let name = format!("{kind}_{}", self.below(3));
        // Letters, digits and an underscore are always a name.
        name.parse().unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// A variable; its name tells its kind, so that one name never stands for values of two kinds.
    fn variable(&mut self, kind: Kind) -> VarRef {
        let name = self.variable_name(kind);
        let access = match self.below(6) {
            0 => Access::Iterator(self.between(1..=3) as u16),
            1 => Access::Element(self.below(VALUES_PER_VARIABLE) as u32),
            _ => Access::Iterator(0),
        };
        VarRef { name, access }
    }

    /// Values for every variable of some filters: [`VALUES_PER_VARIABLE`] for each.
    pub fn params<'f>(&mut self, filters: impl IntoIterator<Item = &'f Filter>) -> Params {
        let mut params = Params::new();
        let rules = filters.into_iter().flat_map(Filter::rules);
        for item in rules.flat_map(|rule| &rule.matches).flat_map(|matches| &matches.items) {
            let Value::Variable(variable) = &item.value else { continue };
            if params.get(variable.name.as_str()).is_some() {
                continue;
            }
            for _ in 0..VALUES_PER_VARIABLE {
                let value = self.text(item.attribute.kind);
                let _ = params.insert(variable.name.clone(), &value);
            }
        }
        params
    }

    // ---- values ----

    fn literal(&mut self, kind: Kind) -> Option<Literal> {
        let text = self.text(kind);
        kind.parse(&text)
    }

    /// A value of a kind as text.
    fn text(&mut self, kind: Kind) -> String {
        let sane = self.options.instantiable;
        match kind {
            // The first byte is even: a multicast address is no source.
            Kind::Mac => {
                let b = self.next().to_be_bytes();
                format!(
                    "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}",
                    b[0] & 0xfe,
                    b[1],
                    b[2],
                    b[3],
                    b[4],
                    b[5]
                )
            }
            Kind::MacMask => {
                let bits = self.between(if sane { 8 } else { 0 }..=48);
                let mask = (u64::MAX << 16).checked_shl(48 - bits).unwrap_or(0).to_be_bytes();
                mask[..6].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
            }
            Kind::Ipv4 => {
                let [_, b, c, d] = self.between(0..=u32::MAX).to_be_bytes();
                format!("{}.{b}.{c}.{d}", self.between(1..=223))
            }
            Kind::Ipv4Prefix => self.between(if sane { 1 } else { 0 }..=32).to_string(),
            Kind::Ipv6 => self.ipv6(),
            Kind::Ipv6Prefix => self.between(if sane { 1 } else { 0 }..=128).to_string(),
            Kind::U8 if sane => self.number(1..=254),
            Kind::U8 => self.number(0..=255),
            // iptables takes no hex ports for some protocols.
            Kind::U16 if sane => self.between(1..=65535).to_string(),
            Kind::U16 => self.number(0..=65535),
            Kind::U16Decimal => self.between(0..=65535).to_string(),
            Kind::U32 => self.number(0..=u32::MAX),
            Kind::VlanId => self.number(0..=if sane { 4094 } else { 4095 }),
            Kind::EtherType => self.name_or_number(kind, 0x600..=0xffff),
            // What is below is the length of a frame.
            Kind::VlanEncap => self.name_or_number(kind, if sane { 0x600 } else { 0x3c }..=0xffff),
            Kind::ArpOpcode => self.name_or_number(kind, 1..=if sane { 9 } else { 0xffff }),
            Kind::IpProtocol => self.name_or_number(kind, 1..=255),
            Kind::Dscp => self.number(0..=63),
            Kind::Bool if sane => "true".to_owned(),
            Kind::Bool => self.pick(&["true", "false"]).to_string(),
            Kind::States if self.chance(15) => States::NONE.to_string(),
            Kind::States => self.list(&["NEW", "ESTABLISHED", "RELATED", "INVALID"], sane),
            Kind::TcpFlags => {
                let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
                let mask = if self.chance(30) { "ALL".to_owned() } else { self.list(&names, true) };
                let among: Vec<&str> =
                    names.into_iter().filter(|n| mask == "ALL" || mask.contains(n)).collect();
                let set = if self.chance(30) { "NONE".to_owned() } else { self.list(&among, true) };
                format!("{mask}/{set}")
            }
            Kind::IpSet if !self.options.ipsets.is_empty() => {
                let at = self.below(self.options.ipsets.len());
                self.options.ipsets[at].clone()
            }
            Kind::IpSet => self.characters(b"abcXYZ019_.:+- ", 1..=31),
            Kind::IpSetFlags => {
                let count = if sane { 1 } else { self.between(1..=6) };
                (0..count).map(|_| self.pick(&["src", "dst"])).collect::<Vec<_>>().join(",")
            }
            Kind::Comment if sane => self.characters(b"abc XYZ 019 .,:()=", 1..=60).trim().to_owned(),
            Kind::Comment => self.comment(),
        }
    }

    fn ipv6(&mut self) -> String {
        let bits = u128::from(self.next()) << 64 | u128::from(self.next());
        let addr = match self.below(4) {
            0 => bits,
            1 => 0xfe80 << 112 | bits >> 64,
            2 => 0x2001_0db8 << 96 | bits & 0xffff,
            _ if self.options.instantiable => bits,
            _ => bits & 0xffff_0000_0000_ffff_0000_0000_ffff_ffff,
        };
        std::net::Ipv6Addr::from_bits(addr).to_string()
    }

    fn number(&mut self, range: RangeInclusive<u32>) -> String {
        let number = match self.below(4) {
            0 => *range.start(),
            1 => *range.end(),
            _ => self.between(range),
        };
        if self.chance(30) { format!("0x{number:x}") } else { number.to_string() }
    }

    fn name_or_number(&mut self, kind: Kind, range: RangeInclusive<u32>) -> String {
        if self.chance(60) { self.pick(kind.names()).1.to_owned() } else { self.number(range) }
    }

    fn list(&mut self, names: &[&str], not_empty: bool) -> String {
        let mut list: Vec<&str> = names.iter().copied().filter(|_| self.chance(40)).collect();
        if list.is_empty() && not_empty {
            list.push(self.pick(names));
        }
        list.join(",")
    }

    fn characters(&mut self, alphabet: &[u8], length: RangeInclusive<u32>) -> String {
        (0..self.between(length)).map(|_| char::from(self.pick(alphabet))).collect()
    }

    /// A comment with everything that is special to XML, to a shell or to a terminal.
    fn comment(&mut self) -> String {
        const SPECIAL: [&str; 16] = [
            "<", ">", "&", "'", "\"", "`id`", "$(id)", "${IP}", "\\", "--", "]]>", "é", "日本", "😀", " ",
            "\u{85}",
        ];
        let mut text = String::from("c");
        for _ in 0..self.below(24) {
            let word = self.pick(&SPECIAL);
            text.push_str(word);
            text.push_str(&self.characters(b"abc ", 0..=4));
        }
        if !self.options.like_libvirt && self.chance(20) {
            text.push_str("\t\n\r");
        }
        text
    }
}

/// A number that orders the literals of one kind as the kernel does.
fn order(literal: &Literal) -> u128 {
    match literal {
        Literal::Ipv4(addr) => u128::from(addr.to_bits()),
        Literal::Ipv6(addr) => addr.to_bits(),
        Literal::U8(number) => u128::from(number.value),
        Literal::U16(number) => u128::from(number.value),
        Literal::U32(number) => u128::from(number.value),
        _ => 0,
    }
}

// ---- documents ----

/// An XML element under construction.
#[derive(Clone, Debug, Default)]
struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    children: Vec<Element>,
}

impl Element {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.set(name, value);
        self
    }

    fn set(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        match self.attributes.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = value,
            None => self.attributes.push((name.to_owned(), value)),
        }
    }

    fn remove(&mut self, name: &str) {
        self.attributes.retain(|(other, _)| other != name);
    }
}

impl Generator {
    /// A document that reads as `filter`, spelt in one of the many other ways.
    pub fn document(&mut self, filter: &Filter) -> String {
        let mut root = self.filter_element(filter);
        self.scatter(&mut root);
        let mut out = String::new();
        if self.chance(30) {
            out.push_str("<?xml version='1.0' encoding='UTF-8'?>\n<!-- <filter name='none'/> -->\n");
        }
        self.write_element(&mut out, &root);
        out
    }

    fn filter_element(&mut self, filter: &Filter) -> Element {
        let mut root = Element::new("filter").with("name", filter.name.as_str());
        if !filter.chain.is_root() || filter.priority.get() != 0 || self.chance(50) {
            root.set("chain", filter.chain.as_str());
        }
        if filter.priority != filter.chain.default_priority() || self.chance(20) {
            root.set("priority", self.odd_priority(filter.priority));
        }
        for entry in &filter.entries {
            let element = match entry {
                Entry::Rule(rule) => self.rule_element(rule),
                Entry::Include(include) => self.include_element(include),
            };
            root.children.push(element);
        }
        root
    }

    fn odd_priority(&mut self, priority: Priority) -> String {
        match self.below(4) {
            0 => format!(" {priority}"),
            1 if priority.get() >= 0 => format!("+0{priority}"),
            _ => priority.to_string(),
        }
    }

    fn include_element(&mut self, include: &Include) -> Element {
        let mut element = Element::new("filterref").with("filter", include.filter.as_str());
        for (name, values) in include.params.iter() {
            let parameter = |value: &String| {
                Element::new("parameter").with("name", name.as_str()).with("value", value.as_str())
            };
            element.children.extend(values.iter().map(parameter));
        }
        element
    }

    fn rule_element(&mut self, rule: &Rule) -> Element {
        let mut element = Element::new("rule")
            .with("action", rule.action.to_string())
            .with("direction", rule.direction.to_string());
        if rule.priority != Priority::RULE_DEFAULT {
            element.set("priority", self.odd_priority(rule.priority));
        } else if self.chance(40) {
            // What is no priority counts as the default.
            element.set("priority", self.pick(&["500", "1001", "-4000", "high", "", "5.0"]));
        }
        if !rule.statematch {
            element.set("statematch", self.pick(&["0", "false", "False", "fAlsE"]));
        } else if self.chance(20) {
            element.set("statematch", self.pick(&["true", "1", "no", ""]));
        }
        element.children = rule.matches.iter().flat_map(|matches| self.matches_elements(matches)).collect();
        element
    }

    fn matches_elements(&mut self, matches: &Matches) -> Vec<Element> {
        let name = matches.protocol.spec().element;
        let both = matches.items.iter().any(|item| item.negated) || self.chance(30);
        let [mut plain, mut negated] = [Element::new(name), Element::new(name).with("match", "no")];
        for item in &matches.items {
            let left_out = item.attribute.field == Field::IpSetFlags
                && !matches!(matches.protocol, Protocol::All | Protocol::AllOn6);
            if left_out {
                continue;
            }
            let value = match &item.value {
                Value::Literal(literal) => self.odd_literal(item.attribute.kind, literal),
                Value::Variable(variable) => self.odd_variable(variable),
            };
            // A sign that is another's is not asked for.
            let sign = if item.attribute.sign_of.is_some() { both && self.chance(50) } else { item.negated };
            let element = if sign { &mut negated } else { &mut plain };
            element.attributes.push((item.attribute.name.to_owned(), value));
        }
        self.shuffle(&mut plain.attributes);
        self.shuffle(&mut negated.attributes);
        if !both {
            return vec![plain];
        }
        let mut elements = vec![plain, negated];
        self.shuffle(&mut elements);
        // Ports are checked against the protocol known so far; libvirt loses a comment when a dscp follows it in
        // another element.
        let has = |element: &Element, names: &[&str]| {
            element.attributes.iter().any(|(name, _)| names.contains(&name.as_str()))
        };
        let ports = ["srcportstart", "srcportend", "dstportstart", "dstportend", "comment"];
        let wrong = has(&elements[0], &ports) && has(&elements[1], &["protocol", "dscp"]);
        if wrong {
            elements.swap(0, 1);
            if has(&elements[0], &ports) && has(&elements[1], &["protocol", "dscp"]) {
                return self.canonical_elements(matches);
            }
        }
        elements
    }

    /// The elements as they are written: the sign changes from one to the next.
    fn canonical_elements(&mut self, matches: &Matches) -> Vec<Element> {
        let chunks = matches.items.chunk_by(|a, b| a.negated == b.negated);
        chunks
            .map(|items| {
                let mut element = Element::new(matches.protocol.spec().element);
                if items.iter().any(|item| item.negated) {
                    element.set("match", "no");
                }
                for item in items {
                    let mut value = String::new();
                    match &item.value {
                        Value::Literal(literal) => item.attribute.kind.write(literal, &mut value),
                        Value::Variable(variable) => value = variable.to_string(),
                    }
                    let left_out = item.attribute.field == Field::IpSetFlags
                        && !matches!(matches.protocol, Protocol::All | Protocol::AllOn6);
                    if !left_out {
                        element.set(item.attribute.name, value);
                    }
                }
                element
            })
            .collect()
    }

    fn odd_variable(&mut self, variable: &VarRef) -> String {
        let name = &variable.name;
        match (variable.access, self.below(3)) {
            (Access::Iterator(id), 0) => format!("${name}[ @ {id} ]"),
            (Access::Iterator(id), 1) => format!("${name}[@+0{id}]"),
            (Access::Element(index), 0) => format!("${name}[ {index} ] and more"),
            _ => variable.to_string(),
        }
    }

    /// Another spelling of a literal, which reads as the same.
    fn odd_literal(&mut self, kind: Kind, literal: &Literal) -> String {
        let mut canonical = String::new();
        kind.write(literal, &mut canonical);
        let odd = match literal {
            Literal::Mac(mac) if self.chance(50) => {
                mac.0.map(|byte| format!("{byte:X}")).join(":") + self.pick(&["", " ", "\t(mine)"])
            }
            Literal::Ipv4(addr) => {
                let [a, b, c, d] = addr.octets();
                match self.below(5) {
                    0 => format!("0x{a:x}.{b}.{c}.{d}"),
                    1 => format!("{a}.0{b:o}.{c}.{d}"),
                    2 => format!("{a}.{b}.{}", u16::from_be_bytes([c, d])),
                    3 => format!("::ffff:{addr}"),
                    _ => canonical.clone(),
                }
            }
            Literal::Ipv6(addr) if self.chance(50) => {
                addr.segments().map(|part| format!("{part:04X}")).join(":")
            }
            Literal::Prefix(bits) if kind == Kind::Ipv4Prefix && self.chance(40) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(*bits)).unwrap_or(0);
                std::net::Ipv4Addr::from_bits(mask).to_string()
            }
            Literal::Prefix(bits) if kind == Kind::Ipv6Prefix && self.chance(40) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(*bits)).unwrap_or(0);
                std::net::Ipv6Addr::from_bits(mask).to_string()
            }
            Literal::U8(Number { value, hex }) => self.odd_number(u32::from(*value), *hex),
            Literal::U16(Number { value, hex }) => self.odd_number(u32::from(*value), *hex),
            Literal::U32(Number { value, hex }) => self.odd_number(*value, *hex),
            Literal::Bool(true) => self.pick(&["true", "yes", "1"]).to_string(),
            Literal::Bool(false) => self.pick(&["false", "no", "0", "", "TRUE"]).to_string(),
            Literal::States(_) => {
                let mut names: Vec<_> = canonical.split(',').collect();
                self.shuffle(&mut names);
                let separator = self.pick(&[",", ", ", " ", ",,"]);
                names.join(separator)
            }
            Literal::TcpFlags { .. } => canonical.replace("ALL", "fin,syn,rst,psh,ack,urg"),
            Literal::IpSetFlags(_) => canonical.to_uppercase(),
            _ => canonical.clone(),
        };
        let odd = if self.chance(30) && !kind.names().is_empty() { mixed_case(&canonical) } else { odd };
        if kind.parse(&odd).as_ref() == Some(literal) { odd } else { canonical }
    }

    fn odd_number(&mut self, value: u32, hex: bool) -> String {
        match (hex, self.below(4)) {
            (true, 0) => format!("0X{value:04X}"),
            (true, 1) => format!("{value:x}"),
            (true, _) => format!("0x{value:x}"),
            (false, 0) => format!("0{value}"),
            (false, 1) => format!(" +{value}"),
            (false, _) => value.to_string(),
        }
    }

    /// Adds what has no effect: unknown attributes and elements, and attributes in another order.
    fn scatter(&mut self, element: &mut Element) {
        self.shuffle(&mut element.attributes);
        if self.chance(10) {
            element.set("x-unknown", "ignored");
        }
        for child in &mut element.children {
            self.scatter(child);
        }
        if self.chance(10) {
            let at = self.below(element.children.len() + 1);
            element.children.insert(at, Element::new("x-unknown").with("action", "ignored"));
        }
    }

    fn write_element(&mut self, out: &mut String, element: &Element) {
        out.push('<');
        out.push_str(&element.name);
        for (name, value) in &element.attributes {
            out.push_str(self.pick(&[" ", "  ", "\n\t"]));
            out.push_str(name);
            out.push_str(self.pick(&["=", "=", " = "]));
            let quote = self.pick(&['"', '\'']);
            out.push(quote);
            value.chars().for_each(|c| self.write_character(out, c, quote));
            out.push(quote);
        }
        if element.children.is_empty() && self.chance(70) {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for child in &element.children {
            out.push_str(self.pick(&["\n  ", "", "\n<!-- a comment -->\n"]));
            self.write_element(out, child);
        }
        out.push_str(self.pick(&["\n", "", " "]));
        out.push_str(&format!("</{}>", element.name));
    }

    fn write_character(&mut self, out: &mut String, c: char, quote: char) {
        let named = match c {
            '<' => Some("&lt;"),
            '&' => Some("&amp;"),
            '"' => Some("&quot;"),
            '\'' => Some("&apos;"),
            _ => None,
        };
        let must = c == '<' || c == '&' || c == quote || c.is_ascii_control();
        match named {
            Some(named) if must || self.chance(50) => out.push_str(named),
            _ if must || self.chance(2) => out.push_str(&format!("&#x{:x};", u32::from(c))),
            _ => out.push(c),
        }
    }
}

fn mixed_case(text: &str) -> String {
    let case =
        |(at, c): (usize, char)| if at % 2 == 0 { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
    text.chars().enumerate().map(case).collect()
}

// ---- what is wrong ----

type Change = fn(&mut Element);
type TextChange = fn(&str) -> String;
/// What to change in a document, and what is wrong then.
type Mistake<F> = (F, &'static str);

/// Ways for a document to be wrong that concern its structure.
const MISTAKES: [Mistake<Change>; 16] = [
    (|filter| filter.remove("name"), "a filter without a name"),
    (|filter| filter.set("name", "a/b"), "a filter name with a slash"),
    (|filter| filter.set("chain", "ip"), "a chain with an unknown prefix"),
    (|filter| filter.set("chain", "rootling"), "a chain that starts with root"),
    (|filter| filter.set("chain", "ipv4-far-too-long"), "a chain longer than 12 characters"),
    (|filter| filter.set("chain", "arp/x"), "a chain with a character that is not allowed"),
    (|filter| filter.set("priority", "1001"), "a chain priority out of range"),
    (|filter| filter.set("priority", "high"), "a chain priority that is no number"),
    (|filter| filter.children.insert(0, Element::new("filterref")), "an include without a filter"),
    (|filter| first_rule(filter).remove("action"), "a rule without an action"),
    (|filter| first_rule(filter).remove("direction"), "a rule without a direction"),
    (|filter| first_rule(filter).set("action", "deny"), "an unknown action"),
    (|filter| first_rule(filter).set("action", "Drop"), "an action in upper case"),
    (|filter| first_rule(filter).set("direction", "both"), "an unknown direction"),
    (|filter| filter.name = "filters".to_owned(), "another root element"),
    (
        |filter| first_rule(filter).children = vec![Element::new("ip").with("dstportstart", "80")],
        "a port without a protocol",
    ),
];

/// Ways for the text of a document to be wrong.
const BROKEN_TEXT: [Mistake<TextChange>; 7] = [
    (|text| text.replacen("</filter>", "", 1), "an element that does not end"),
    (|text| text.replacen("<filter ", "<filter name='twice' ", 1), "an attribute given twice"),
    (|text| text.replacen("<filter ", "<filter chain=root ", 1), "an attribute without quotes"),
    (|text| text.replacen("</filter>", "&nosuch;</filter>", 1), "an unknown entity"),
    (|text| format!("{text}<filter/>"), "two root elements"),
    (|text| format!("filter {text}"), "text before the root element"),
    (|text| text.replacen("</filter>", "<uuid>12345</uuid></filter>", 1), "a malformed UUID"),
];

fn first_rule(filter: &mut Element) -> &mut Element {
    if !filter.children.iter().any(|child| child.name == "rule") {
        filter.children.push(Element::new("rule").with("action", "drop").with("direction", "in"));
    }
    let at = filter.children.iter().position(|child| child.name == "rule").unwrap_or(0);
    &mut filter.children[at]
}

/// Texts that are no value of a kind, and what is wrong with them.
fn bad_values(kind: Kind) -> &'static [(&'static str, &'static str)] {
    match kind {
        Kind::Mac => &[
            ("52:54:00:12:34", "a MAC address of five bytes"),
            ("52:54:00:12:34:zz", "a MAC address that is not hex"),
        ],
        Kind::MacMask => &[("ff:00:ff:00:00:00", "a MAC mask with a hole")],
        Kind::Ipv4 => &[
            ("10.0.0.256", "an IPv4 address with a byte over 255"),
            ("10.0.0.1/24", "an IPv4 address with a prefix length"),
            ("fe80::1", "an IPv6 address where IPv4 is expected"),
        ],
        Kind::Ipv4Prefix => &[("33", "a prefix length over 32"), ("255.0.255.0", "an IPv4 mask with a hole")],
        Kind::Ipv6 => &[
            ("fe80::1::2", "an IPv6 address with two gaps"),
            ("1:2:3:4:5:6:7:8:9", "an IPv6 address of nine parts"),
        ],
        Kind::Ipv6Prefix => &[("129", "a prefix length over 128"), ("ff00:ff::", "an IPv6 mask with a hole")],
        Kind::U8 => &[("256", "a number over 255"), ("seven", "a word where a number is expected")],
        Kind::U16 => &[("65536", "a number over 65535"), ("0x10000", "a hex number over 65535")],
        Kind::U16Decimal => &[("0x10", "a hex number where only decimal is read")],
        Kind::U32 => &[("4294967296", "a number over 4294967295")],
        Kind::EtherType => &[("0x5ff", "an Ethernet protocol below 0x600"), ("ipx", "an unknown protocol")],
        Kind::VlanEncap => &[("0x3b", "a VLAN encapsulation below 0x3c")],
        Kind::VlanId => &[("4096", "a VLAN number over 4095")],
        Kind::ArpOpcode => &[("Query", "an unknown ARP operation")],
        Kind::IpProtocol => &[("256", "an IP protocol over 255"), ("dccp", "an IP protocol without a name")],
        Kind::Dscp => &[("64", "a DSCP over 63")],
        Kind::States => &[("NEW,OLD", "an unknown state")],
        Kind::TcpFlags => &[("SYN", "TCP flags without a mask"), ("SYN/ECE", "an unknown TCP flag")],
        Kind::IpSet => {
            &[("a/b", "an ipset name with a slash"), (LONG_NAME, "an ipset name of 32 characters")]
        }
        Kind::IpSetFlags => {
            &[("src,both", "an unknown ipset flag"), ("src,src,src,src,src,src,src", "seven ipset flags")]
        }
        Kind::Bool | Kind::Comment => &[],
    }
}

const LONG_NAME: &str = "abcdefghijklmnopqrstuvwxyz012345";

/// Variables that are none, and what is wrong with them.
const BAD_VARIABLES: [(&str, &str); 5] = [
    ("$A-B", "a variable name with a dash"),
    ("$A[", "a variable with an open bracket"),
    ("$A[x]", "a variable with a name for an index"),
    ("$A[@1001]", "an iterator over 1000"),
    ("$ A", "a space before a variable name"),
];

impl Generator {
    /// A document that libvirt refuses, and what is wrong with it.
    pub fn invalid_document(&mut self, name: FilterName) -> (String, &'static str) {
        let filter = self.filter(name);
        let mut root = self.filter_element(&filter);
        if self.chance(15) {
            let (change, wrong) = self.pick(&BROKEN_TEXT);
            // Without children there is no end tag to change.
            first_rule(&mut root);
            return (change(&plain(&root)), wrong);
        }
        let wrong = match self.below(10) {
            0..4 => {
                let (change, wrong) = self.pick(&MISTAKES);
                change(&mut root);
                wrong
            }
            _ => {
                let (element, wrong) = self.bad_element();
                first_rule(&mut root).children = vec![element];
                wrong
            }
        };
        let mut out = String::new();
        self.write_element(&mut out, &root);
        (out, wrong)
    }

    /// A protocol element with an attribute that has no value of its kind.
    fn bad_element(&mut self) -> (Element, &'static str) {
        loop {
            let spec = &PROTOCOLS[self.below(PROTOCOLS.len())];
            let attribute = &spec.attributes[self.below(spec.attributes.len())];
            let bad = if self.chance(20) { &BAD_VARIABLES } else { bad_values(attribute.kind) };
            if !bad.is_empty() {
                let (value, wrong) = self.pick(bad);
                return (Element::new(spec.element).with(attribute.name, value), wrong);
            }
        }
    }
}

/// The element on one line.
fn plain(element: &Element) -> String {
    let mut out = format!("<{}", element.name);
    for (name, value) in &element.attributes {
        let value = value.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        out.push_str(&format!(" {name}=\"{value}\""));
    }
    out.push('>');
    out.extend(element.children.iter().map(plain));
    out + &format!("</{}>", element.name)
}

#[cfg(test)]
mod tests {
    use nwfilter_xml::{Strictness, read_filter_with};

    use super::*;

    fn name() -> FilterName {
        "random".parse().unwrap()
    }

    #[test]
    fn a_document_reads_as_the_filter_it_was_made_of() {
        for seed in 0..500 {
            let mut generator = Generator::new(seed);
            let filter = generator.filter(name());
            let text = generator.document(&filter);
            let read = read_filter_with("random.xml", &text, Strictness::AsLibvirt).into_result();
            let read = read.map(Filter::without_places);
            assert_eq!(read.map_err(|problems| problems.to_string()), Ok(filter), "seed {seed}:\n{text}");
        }
    }

    #[test]
    fn an_invalid_document_is_refused() {
        for seed in 0..500 {
            let (text, wrong) = Generator::new(seed).invalid_document(name());
            assert!(
                read_filter_with("", &text, Strictness::AsLibvirt).value.is_none(),
                "seed {seed}, {wrong}:\n{text}"
            );
        }
    }

    #[test]
    fn what_is_instantiable_has_values_for_its_variables_and_no_empty_range() {
        let options = Options { includes: vec!["other".parse().unwrap()], ..Options::instantiable() };
        let mut variables = 0;
        for seed in 0..500 {
            let mut generator = Generator::with_options(seed, options.clone());
            let filter = generator.filter(name());
            let params = generator.params([&filter]);
            for variable in filter.rules().flat_map(Rule::variables) {
                let values = params.get(variable.name.as_str());
                assert_eq!(values.map(<[_]>::len), Some(VALUES_PER_VARIABLE), "{variable}");
                variables += 1;
            }
            for matches in filter.rules().filter_map(|rule| rule.matches.as_ref()) {
                for end in &matches.items {
                    let start = end.attribute.field.range_start().and_then(|field| matches.get(field));
                    if let Some(Value::Literal(start)) = start.map(|item| &item.value) {
                        let Value::Literal(end) = &end.value else { panic!("{matches:?}") };
                        assert!(order(start) <= order(end), "{matches:?}");
                    }
                }
            }
        }
        assert!(variables > 100, "{variables}");
    }
}
