//! Reads `<filter>`: its rules, their protocol elements and the values of their attributes.

use std::ops::Range;

use roxmltree::{Attribute as XmlAttribute, Node};
use uuid::Uuid;

use crate::code::Code;
use crate::diag::nearest;
use crate::model::{Action, Direction, Entry, Filter, Include, Item, Matches, Rule};
use crate::names::{ChainName, FilterName, Priority};
use crate::read::{MAX_ENTRIES, Reader, attribute, child, is_of_the_language, name_of, parse_uuid, text_of};
use crate::schema::{Attribute, Field, PROTOCOLS, Protocol, ProtocolSpec};
use crate::value::{Kind, Literal, SetDirection, Value, VarRef};

/// The attributes that a rule's protocol elements gave so far.
pub(crate) struct Found {
    pub(crate) protocol: Protocol,
    /// In the order of the table.
    pub(crate) items: Vec<FoundItem>,
}

/// An attribute that was given.
pub(crate) struct FoundItem {
    /// Where its row is in the table.
    row: usize,
    pub(crate) item: Item,
    /// Its name and value in the text.
    pub(crate) range: Range<usize>,
}

impl Found {
    pub(crate) fn get(&self, field: Field) -> Option<&FoundItem> {
        self.items.iter().find(|found| found.item.attribute.field == field)
    }

    /// Puts an item in its place in the order of the table; gives back the one it replaces.
    fn set(&mut self, new: FoundItem) -> Option<FoundItem> {
        match self.items.binary_search_by_key(&new.row, |old| old.row) {
            Ok(at) => Some(std::mem::replace(&mut self.items[at], new)),
            Err(at) => {
                self.items.insert(at, new);
                None
            }
        }
    }
}

impl Reader<'_> {
    pub(crate) fn filter(&mut self, node: Node<'_, '_>) -> Option<Filter> {
        self.warn_unknown_attributes(node, &["name", "chain", "priority"]);
        let name = self.filter_name(node, own_attribute(node, "name"), "name");
        let given_chain = own_attribute(node, "chain").filter(|a| !a.value().is_empty());
        let chain = match &given_chain {
            Some(a) => self.parsed(Code::BadChain, a, a.value().parse::<ChainName>()),
            None => Some(ChainName::root()),
        };
        let given = own_attribute(node, "priority").filter(|a| !a.value().is_empty());
        let given = given.and_then(|a| self.filter_priority(&a).map(|priority| (a, priority)));
        let priority = match (&chain, given) {
            (Some(_), Some((a, _))) if given_chain.is_none() => {
                let help = "add chain='root'";
                let message = "the priority is ignored without a chain";
                self.problems.warn(Code::PriorityWithoutChain, a.range(), message, Some(help.into()));
                Priority::default()
            }
            (_, Some((_, priority))) => priority,
            (Some(chain), None) => chain.default_priority(),
            (None, None) => Priority::default(),
        };
        let uuid = self.filter_uuid(node);
        let entries = self.entries(node, chain.as_ref());
        Some(Filter { name: name?, uuid, chain: chain?, priority, entries })
    }

    fn entries(&mut self, node: Node<'_, '_>, chain: Option<&ChainName>) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut uuids = 0;
        for child in self.child_elements(node) {
            if entries.len() == MAX_ENTRIES {
                let message = format!("the filter has more than {MAX_ENTRIES} rules and includes");
                self.problems.error(Code::TooManyEntries, self.tag(child), message, None);
                break;
            }
            match child.tag_name().name() {
                "rule" => entries.extend(self.rule(child, chain).map(Entry::Rule)),
                "filterref" => entries.extend(self.include(child).map(Entry::Include)),
                "uuid" => uuids += 1,
                _ => self.warn_unknown_element(child, &["rule", "filterref", "uuid"]),
            }
            if uuids > 1 {
                uuids = 1;
                self.problems.warn(Code::SecondUuid, self.tag(child), "only the first <uuid> counts", None);
            }
        }
        entries
    }

    pub(crate) fn filter_name(
        &mut self,
        node: Node<'_, '_>,
        given: Option<XmlAttribute<'_, '_>>,
        expected: &str,
    ) -> Option<FilterName> {
        let Some(a) = given else {
            let element = node.tag_name().name();
            let message = format!("<{element}> has no attribute '{expected}'");
            let help = format!("<{element} {expected}='NAME'>");
            self.problems.error(Code::MissingAttribute, self.tag(node), message, Some(help));
            return None;
        };
        self.parsed(Code::BadName, &a, a.value().parse())
    }

    fn filter_priority(&mut self, a: &XmlAttribute<'_, '_>) -> Option<Priority> {
        let priority = parse_int(a.value()).and_then(Priority::new);
        if priority.is_none() {
            let message = format!("'{}' is not a priority: a number from -1000 to 1000", a.value());
            self.problems.error(Code::BadPriority, a.range_value(), message, None);
        }
        priority
    }

    fn filter_uuid(&mut self, node: Node<'_, '_>) -> Option<Uuid> {
        let element = child(node, "uuid").filter(|element| element.tag_name().namespace().is_none())?;
        let text = text_of(element);
        if text.is_empty() {
            return None;
        }
        let uuid = parse_uuid(&text);
        if uuid.is_none() {
            let range = element.first_child().filter(Node::is_text).unwrap_or(element).range();
            let help = "leave <uuid> out to get one";
            self.problems.error(
                Code::BadUuid,
                range,
                "malformed UUID: expected 32 hex digits",
                Some(help.into()),
            );
        }
        uuid
    }

    pub(crate) fn include(&mut self, node: Node<'_, '_>) -> Option<Include> {
        self.warn_unknown_attributes(node, &["filter"]);
        let filter = self.filter_name(node, attribute(node, "filter"), "filter");
        let params = self.params(node);
        let place = self.problems.place(node.range().start);
        Some(Include { filter: filter?, params, place })
    }

    // ---- rules ----

    fn rule(&mut self, node: Node<'_, '_>, chain: Option<&ChainName>) -> Option<Rule> {
        let place = self.problems.place(node.range().start);
        self.warn_unknown_attributes(node, &["action", "direction", "priority", "statematch"]);
        let action = self.named(node, "action", &Action::NAMES);
        let direction = self.named(node, "direction", &Direction::NAMES);
        let priority = self.rule_priority(node);
        let statematch = self.statematch(node);
        let matches = self.matches(node, statematch, chain);
        Some(Rule { action: action?, direction: direction?, priority, statematch, matches: matches?, place })
    }

    fn named<T: Copy>(&mut self, node: Node<'_, '_>, name: &str, names: &[(T, &'static str)]) -> Option<T> {
        let given = attribute(node, name);
        let found = given.as_ref().and_then(|a| names.iter().find(|(_, name)| *name == a.value()));
        if let Some((value, _)) = found {
            return Some(*value);
        }
        let all = names.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
        let Some(a) = given else {
            let message = format!("<{}> has no attribute '{name}'", node.tag_name().name());
            self.problems.error(
                Code::MissingAttribute,
                self.tag(node),
                message,
                Some(format!("one of {all}")),
            );
            return None;
        };
        let near = nearest(a.value(), names.iter().map(|(_, name)| *name));
        let help = near.map_or_else(|| format!("one of {all}"), |near| format!("did you mean '{near}'?"));
        let message = format!("unknown {name} '{}'", a.value());
        self.problems.error(Code::UnknownWord, a.range_value(), message, Some(help));
        None
    }

    /// A rule's priority; libvirt puts 500 in place of one it cannot use.
    fn rule_priority(&mut self, node: Node<'_, '_>) -> Priority {
        let Some(a) = attribute(node, "priority") else { return Priority::RULE_DEFAULT };
        parse_int(a.value()).and_then(Priority::new).unwrap_or_else(|| {
            let message = format!("'{}' is no number from -1000 to 1000, so the priority is 500", a.value());
            self.problems.warn(Code::RulePriority, a.range_value(), message, None);
            Priority::RULE_DEFAULT
        })
    }

    fn statematch(&mut self, node: Node<'_, '_>) -> bool {
        let Some(a) = attribute(node, "statematch") else { return true };
        let is = |word: &str| a.value().eq_ignore_ascii_case(word);
        let off = is("0") || is("false");
        if !off && !is("1") && !is("true") {
            let message = format!("statematch='{}' counts as true", a.value());
            self.problems.warn(
                Code::OddTruthValue,
                a.range_value(),
                message,
                Some("'false' or '0' switches it off".into()),
            );
        }
        !off
    }

    /// The protocol elements of a rule as one; the outer `None` means that something in them was refused.
    fn matches(
        &mut self,
        rule: Node<'_, '_>,
        statematch: bool,
        chain: Option<&ChainName>,
    ) -> Option<Option<Matches>> {
        let mut found: Option<(Found, Range<usize>)> = None;
        let mut unknown = Vec::new();
        let mut valid = true;
        for element in self.child_elements(rule) {
            let name = element.tag_name().name();
            match (Protocol::of_element(name), &mut found) {
                (Some(protocol), Some((found, _))) if protocol == found.protocol => {
                    valid &= self.protocol_element(element, found);
                }
                (Some(_), Some((found, _))) => {
                    let first = found.protocol.spec().element;
                    let message =
                        format!("<{name}> is ignored: this rule is about <{first}>, which came first");
                    let help = "give it a rule of its own";
                    self.problems.warn(Code::SecondProtocol, self.tag(element), message, Some(help.into()));
                }
                (Some(protocol), None) => {
                    let mut first = Found { protocol, items: Vec::new() };
                    valid &= self.protocol_element(element, &mut first);
                    found = Some((first, self.tag(element)));
                }
                (None, _) => unknown.push(element),
            }
        }
        for element in unknown {
            self.unknown_protocol(element, found.as_ref().map(|(found, _)| found.protocol));
        }
        let Some((mut found, tag)) = found else { return valid.then_some(None) };
        self.settle_signs(&mut found);
        self.settle_ipset(&mut found);
        if valid {
            self.lint_rule(&found, tag, statematch, chain);
        }
        let items = found.items.into_iter().map(|found| found.item).collect();
        valid.then_some(Some(Matches { protocol: found.protocol, items }))
    }

    /// Adds the attributes of one element; false if one was refused.
    fn protocol_element(&mut self, element: Node<'_, '_>, found: &mut Found) -> bool {
        for child in self.child_elements(element) {
            self.element_in_protocol(element, child);
        }
        let negated = self.is_negated(element);
        let table = found.protocol.spec().attributes;
        let mut valid = true;
        let mut seen = 0u64;
        for a in element.attributes().filter(|a| a.name() != "match") {
            let Some(row) = table.iter().position(|row| row.name == a.name()) else {
                if is_of_the_language(&a) {
                    self.unknown_condition(element, &a, table);
                }
                continue;
            };
            // Of attributes that differ only in their namespace, the first counts.
            if seen & 1 << row != 0 {
                continue;
            }
            seen |= 1 << row;
            match self.attribute_value(&table[row], &a) {
                Some(value) => {
                    let place = self.problems.place(a.range().start);
                    let item = Item { attribute: &table[row], negated, value, place };
                    if let Some(old) = found.set(FoundItem { row, item, range: a.range() }) {
                        let message = format!("this {} is replaced by a later one of the rule", a.name());
                        self.problems.warn(Code::ReplacedAttribute, old.range, message, None);
                    }
                }
                None => valid = false,
            }
        }
        valid & self.ports_have_a_protocol(element, found)
    }

    fn is_negated(&mut self, element: Node<'_, '_>) -> bool {
        let Some(a) = attribute(element, "match") else { return false };
        if !matches!(a.value(), "yes" | "no") {
            let message = format!("match='{}' counts as 'yes'", a.value());
            self.problems.warn(
                Code::OddTruthValue,
                a.range_value(),
                message,
                Some("expected 'yes' or 'no'".into()),
            );
        }
        a.value() == "no"
    }

    /// Reports an element that is no protocol. `protocol` is what the rule is about without it.
    fn unknown_protocol(&mut self, element: Node<'_, '_>, protocol: Option<Protocol>) {
        let names = || PROTOCOLS.iter().map(|spec| spec.element);
        if element.tag_name().namespace().is_some() {
            let names: Vec<_> = names().collect();
            return self.warn_unknown_element(element, &names);
        }
        self.widens(Code::UnknownProtocol, self.tag(element), |verb| {
            let name = name_of(element);
            let widened = match protocol {
                None => "every frame".to_owned(),
                Some(protocol) => format!("all that <{}> matches", protocol.spec().element),
            };
            let message = format!("unknown element <{name}>: without it the rule {verb} {widened}");
            let near = nearest(name, names()).map(|near| format!("did you mean <{near}>?"));
            let help = near.unwrap_or_else(|| "docs/language.md lists the elements".to_owned());
            (message, Some(help))
        });
    }

    /// Reports an element in a protocol element, which has none.
    fn element_in_protocol(&mut self, protocol: Node<'_, '_>, child: Node<'_, '_>) {
        if child.tag_name().namespace().is_some() {
            return self.warn_unknown_element(child, &[]);
        }
        self.widens(Code::UnknownCondition, self.tag(child), |verb| {
            let (protocol, child) = (name_of(protocol), name_of(child));
            let message = format!(
                "<{protocol}> has no element <{child}>: without it the rule {verb} more than is written"
            );
            (message, Some(format!("what <{protocol}> matches is written in its attributes")))
        });
    }

    /// Reports an attribute that a protocol does not have, and says which protocols have it.
    fn unknown_condition(&mut self, element: Node<'_, '_>, a: &XmlAttribute<'_, '_>, table: &[Attribute]) {
        self.widens(Code::UnknownCondition, a.range(), |verb| {
            let (element, name) = (name_of(element), a.name());
            let message = format!(
                "<{element}> has no attribute '{name}': without it the rule {verb} more than is written"
            );
            (message, elements_with(name).or_else(|| near_condition(name, table)))
        });
    }

    // ---- values ----

    fn attribute_value(&mut self, row: &Attribute, a: &XmlAttribute<'_, '_>) -> Option<Value> {
        let text = a.value();
        if let Some(reference) = text.strip_prefix('$') {
            return self.variable(a, reference).map(Value::Variable);
        }
        let literal = row.kind.parse(text);
        match &literal {
            Some(literal) => self.lint_literal(row, a, literal),
            None => self.refuse_value(row, a),
        }
        literal.map(Value::Literal)
    }

    fn variable(&mut self, a: &XmlAttribute<'_, '_>, reference: &str) -> Option<VarRef> {
        match VarRef::parse(reference) {
            Ok(variable) => {
                let surplus = reference.split_once(']').map_or("", |(_, surplus)| surplus);
                if !surplus.is_empty() {
                    let start = a.range_value().end.saturating_sub(surplus.len());
                    let message = "what follows the variable is ignored";
                    let range = start..a.range_value().end;
                    self.problems.warn(Code::TextAfterVariable, range, message, None);
                }
                Some(variable)
            }
            Err(why) => {
                let message = format!("malformed variable '{}': {why}", a.value().escape_debug());
                let help = "$NAME, $NAME[3] or $NAME[@2]; a name has letters, digits and _";
                self.problems.error(Code::BadVariable, a.range_value(), message, Some(help.into()));
                None
            }
        }
    }

    fn refuse_value(&mut self, row: &Attribute, a: &XmlAttribute<'_, '_>) {
        let text = a.value();
        let near = nearest(text, row.kind.names().iter().map(|(_, name)| *name));
        let help = match (near, row.kind) {
            (Some(near), _) => Some(format!("did you mean '{near}'?")),
            (None, Kind::Ipv4) if text.contains('/') => {
                Some("the prefix length is an attribute of its own".into())
            }
            (None, Kind::Ipv6) if text.contains('/') => {
                Some("the prefix length is an attribute of its own".into())
            }
            (None, Kind::Ipv6) if text.contains('%') => {
                Some("an address with a zone is of one host only".into())
            }
            (None, Kind::Ipv4) if text.contains(':') => {
                Some("IPv6 has elements of its own, as <tcp-ipv6>".into())
            }
            (None, Kind::U16) if text.contains(['-', ':', ',']) => {
                Some("a range is two attributes, as dstportstart='80' dstportend='90'".into())
            }
            _ => None,
        };
        let expected = row.kind.expected();
        let message = format!("{}: expected {expected}, found '{}'", row.name, text.escape_debug());
        self.problems.error(Code::BadValue, a.range_value(), message, help);
    }

    // ---- attributes that depend on each other ----

    /// libvirt refuses ports on ip and ipv6 elements whose protocol has none. It checks after each element, and
    /// takes a variable as protocol 0.
    fn ports_have_a_protocol(&mut self, element: Node<'_, '_>, found: &Found) -> bool {
        const WITH_PORTS: [u8; 4] = [6, 17, 33, 132];
        const PORTS: [Field; 4] =
            [Field::SrcPortStart, Field::SrcPortEnd, Field::DstPortStart, Field::DstPortEnd];
        let checked = matches!(found.protocol, Protocol::Ip | Protocol::Ipv6);
        let port = PORTS.iter().find_map(|port| found.get(*port)).filter(|_| checked);
        let Some(FoundItem { item: port, range, .. }) = port else { return true };
        let protocol = found.get(Field::IpProtocol).map(|found| &found.item.value);
        let message = match protocol {
            Some(Value::Literal(Literal::U8(number))) if WITH_PORTS.contains(&number.value) => return true,
            Some(Value::Literal(literal)) => {
                let mut name = String::new();
                Kind::IpProtocol.write(literal, &mut name);
                format!("{} needs a protocol that has ports, which '{name}' has not", port.attribute.name)
            }
            Some(Value::Variable(variable)) => {
                format!("{} needs a protocol that is no variable, as {variable} is", port.attribute.name)
            }
            None => format!("{} needs a protocol", port.attribute.name),
        };
        let range = if element.range().contains(&range.start) { range.clone() } else { self.tag(element) };
        let help = "add protocol='tcp', 'udp', '33' (DCCP) or 'sctp'";
        self.problems.error(Code::PortWithoutProtocol, range, message, Some(help.into()));
        false
    }

    /// Gives each attribute whose sign is another's that sign, as the table says.
    fn settle_signs(&mut self, found: &mut Found) {
        for at in 0..found.items.len() {
            let FoundItem { item, range, .. } = &found.items[at];
            let Some(decider) = item.attribute.sign_of else { continue };
            let negated = found.get(decider).is_some_and(|decider| decider.item.negated);
            if negated != item.negated {
                let decider = found.protocol.attribute(decider).map_or("", |a| a.name);
                let (name, sign) = (item.attribute.name, if negated { "" } else { "not " });
                let message = format!("{name} is {sign}negated, because its sign is that of {decider}");
                self.problems.warn(Code::SignOfAnother, range.clone(), message, None);
            }
            found.items[at].item.negated = negated;
        }
    }

    /// Except on `all` and `all-ipv6` elements an ipset without flags gets the flags `src`. libvirt drops an ipset that
    /// has flags there, so that the rule matches whatever is in the set; here it is kept, and that said.
    fn settle_ipset(&mut self, found: &mut Found) {
        let table = found.protocol.spec().attributes;
        let Some(row) = table.iter().position(|row| row.field == Field::IpSetFlags) else { return };
        if matches!(found.protocol, Protocol::All | Protocol::AllOn6) {
            return;
        }
        let source = || Value::Literal(Literal::IpSetFlags(vec![SetDirection::Src]));
        match (found.get(Field::IpSet), found.get(Field::IpSetFlags)) {
            (None, None) => (),
            (Some(set), None) => {
                let item =
                    Item { attribute: &table[row], negated: false, value: source(), place: set.item.place };
                found.set(FoundItem { row, item, range: set.range.clone() });
            }
            // What this crate wrote for an ipset without flags.
            (Some(_), Some(flags)) if flags.item.value == source() && !flags.item.negated => (),
            (Some(_), Some(flags)) => {
                let message = "libvirt drops an ipset that has ipsetflags here; nwfilter matches on it";
                let help = "use <all>, or leave ipsetflags out, which means src, to mean the same to both";
                self.problems.warn(Code::IpsetFlags, flags.range.clone(), message, Some(help.to_owned()));
            }
            (None, Some(flags)) => {
                self.problems.warn(
                    Code::IpsetFlags,
                    flags.range.clone(),
                    "ipsetflags has no effect without ipset",
                    None,
                );
                found.items.retain(|found| found.item.attribute.kind != Kind::IpSetFlags);
            }
        }
    }
}

/// Says which elements have an attribute of that name.
fn elements_with(name: &str) -> Option<String> {
    let has_it = |spec: &&ProtocolSpec| spec.attributes.iter().any(|row| row.name == name);
    let others: Vec<_> = PROTOCOLS.iter().filter(has_it).map(|spec| format!("<{}>", spec.element)).collect();
    Some(match others.as_slice() {
        [] => return None,
        [one] => format!("{one} has it"),
        [first, .., last] if others.len() > 6 => format!("other elements have it, from {first} to {last}"),
        [all @ .., last] => format!("{} and {last} have it", all.join(", ")),
    })
}

fn near_condition(name: &str, table: &[Attribute]) -> Option<String> {
    let known = table.iter().map(|row| row.name).chain(["match"]);
    nearest(name, known).map(|near| format!("did you mean '{near}'?"))
}

/// An attribute in no namespace, which libvirt asks for on the filter itself.
fn own_attribute<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<XmlAttribute<'a, 'i>> {
    attribute(node, name)
        .filter(|a| a.namespace().is_none())
        .or_else(|| node.attributes().find(|a| a.name() == name && a.namespace().is_none()))
}

/// A decimal number as C's `strtol` reads it; nothing may follow.
fn parse_int(text: &str) -> Option<i32> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    text.parse().ok()
}
