//! The reader: text to model, with every problem of the document and its place.

use roxmltree::{Attribute as XmlAttribute, Document, Node, ParsingOptions};
use uuid::Uuid;

use crate::binding::{Binding, Owner};
use crate::diag::{Diagnostic, Diagnostics, Severity, nearest};
use crate::model::{Action, Direction, Entry, Filter, Include, Item, Matches, Params, Place, Rule};
use crate::names::{ChainName, FilterName, Priority, VarName};
use crate::schema::{Attribute, Field, PROTOCOLS, Protocol};
use crate::value::{Kind, Literal, SetDirection, Value, VarRef};

/// Largest document that is read, in bytes. A filter with 1,000 rules has about 100,000.
pub const MAX_BYTES: usize = 16 << 20;
/// Most XML nodes of a document.
const MAX_NODES: u32 = 2_000_000;
/// After this many problems the rest of a document is not shown.
const MAX_DIAGNOSTICS: usize = 200;

/// What reading a document gave.
#[derive(Clone, Debug)]
pub struct Reading<T> {
    /// The value; `None` if the document was refused.
    pub value: Option<T>,
    /// Errors and warnings, in document order.
    pub diagnostics: Diagnostics,
}

impl<T> Reading<T> {
    /// The value with warnings dropped, or all problems.
    pub fn into_result(self) -> Result<T, Diagnostics> {
        self.value.ok_or(self.diagnostics)
    }
}

/// Reads a `<filter>` document. `document` names it in messages.
pub fn read_filter(document: &str, text: &str) -> Reading<Filter> {
    read(document, text, "filter", Reader::filter)
}

/// Reads a `<filterbinding>` document, or the `<filterbindingstatus>` around one that libvirt keeps on disk.
pub fn read_binding(document: &str, text: &str) -> Reading<Binding> {
    read(document, text, "filterbinding", Reader::binding)
}

fn read<'t, T>(
    document: &str,
    text: &'t str,
    root: &'static str,
    parse: impl Fn(&mut Reader<'t>, Node<'_, '_>) -> Option<T>,
) -> Reading<T> {
    let mut reader = Reader { text, line_starts: line_starts(text), items: Vec::new() };
    let value = reader.parse_document(root, parse);
    let mut items = reader.items;
    items.sort_by_key(|item| (item.place.line, item.place.column));
    items.truncate(MAX_DIAGNOSTICS);
    let diagnostics = Diagnostics { document: document.to_owned(), items };
    Reading { value: value.filter(|_| !diagnostics.has_errors()), diagnostics }
}

fn line_starts(text: &str) -> Vec<usize> {
    let after_newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(after_newlines).collect()
}

struct Reader<'t> {
    text: &'t str,
    line_starts: Vec<usize>,
    items: Vec<Diagnostic>,
}

impl Reader<'_> {
    fn parse_document<T>(
        &mut self,
        root: &'static str,
        parse: impl Fn(&mut Self, Node<'_, '_>) -> Option<T>,
    ) -> Option<T> {
        if self.text.len() > MAX_BYTES {
            let size = self.text.len();
            self.error(0..0, format!("the document has {size} bytes; at most {MAX_BYTES} are read"), None);
            return None;
        }
        let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES };
        let text = self.text;
        match Document::parse_with_options(text, options) {
            Ok(xml) => {
                let node = self.document_element(&xml, root)?;
                parse(self, node)
            }
            Err(error) => {
                let at = self.offset(error.pos());
                self.error(at..at, format!("malformed XML: {}", without_position(&error)), None);
                None
            }
        }
    }

    /// The element the document is about: the root element, or the only child of a status document.
    fn document_element<'a, 'i>(
        &mut self,
        xml: &'a Document<'i>,
        root: &'static str,
    ) -> Option<Node<'a, 'i>> {
        let node = xml.root_element();
        let name = node.tag_name().name();
        let status = format!("{root}status");
        let found = match name {
            _ if name == root => Some(node),
            _ if name == status => node.children().find(|child| child.tag_name().name() == root),
            _ => None,
        };
        if found.is_none() {
            self.error(self.tag(node), format!("the document is a <{name}>, expected a <{root}>"), None);
        }
        found
    }

    // ---- <filter> ----

    fn filter(&mut self, node: Node<'_, '_>) -> Option<Filter> {
        self.warn_unknown_attributes(node, &["name", "chain", "priority"]);
        let name = self.filter_name(node, "name");
        let chain_attribute = attribute(node, "chain").filter(|a| !a.value().is_empty());
        let chain = match &chain_attribute {
            Some(a) => self.parsed(a, a.value().parse::<ChainName>()),
            None => Some(ChainName::root()),
        };
        let given = attribute(node, "priority").filter(|a| !a.value().is_empty());
        let given = given.and_then(|a| self.filter_priority(&a).map(|priority| (a, priority)));
        let priority = match (&chain, given) {
            (Some(_), Some((a, _))) if chain_attribute.is_none() => {
                self.warn(a.range(), "without a chain the priority is ignored".into(), None);
                Priority::default()
            }
            (_, Some((_, priority))) => priority,
            (Some(chain), None) => chain.default_priority(),
            (None, None) => Priority::default(),
        };
        let uuid = self.filter_uuid(node);
        let mut entries = Vec::new();
        for child in node.children().filter(Node::is_element) {
            match child.tag_name().name() {
                "rule" => entries.extend(self.rule(child).map(Entry::Rule)),
                "filterref" => entries.extend(self.include(child).map(Entry::Include)),
                "uuid" => (),
                other => self.warn_unknown_element(child, other, &["rule", "filterref", "uuid"]),
            }
        }
        Some(Filter { name: name?, uuid, chain: chain?, priority, entries })
    }

    fn filter_name(&mut self, node: Node<'_, '_>, name: &str) -> Option<FilterName> {
        let Some(a) = attribute(node, name) else {
            let element = node.tag_name().name();
            self.error(self.tag(node), format!("<{element}> has no attribute '{name}'"), None);
            return None;
        };
        self.parsed(&a, a.value().parse())
    }

    fn filter_priority(&mut self, a: &XmlAttribute<'_, '_>) -> Option<Priority> {
        let priority = parse_int(a.value()).and_then(Priority::new);
        if priority.is_none() {
            let value = a.value();
            self.error(
                a.range_value(),
                format!("'{value}' is not a priority: a number from -1000 to 1000"),
                None,
            );
        }
        priority
    }

    fn filter_uuid(&mut self, node: Node<'_, '_>) -> Option<Uuid> {
        let element = node.children().find(|child| child.tag_name().name() == "uuid")?;
        let text: String = element.descendants().filter_map(|n| n.text().filter(|_| n.is_text())).collect();
        if text.is_empty() {
            return None;
        }
        let uuid = parse_uuid(&text);
        if uuid.is_none() {
            self.error(element.range(), "malformed UUID: expected 32 hex digits".into(), None);
        }
        uuid
    }

    fn include(&mut self, node: Node<'_, '_>) -> Option<Include> {
        self.warn_unknown_attributes(node, &["filter"]);
        let filter = self.filter_name(node, "filter");
        let params = self.params(node);
        Some(Include { filter: filter?, params, place: self.place(node.range().start) })
    }

    fn params(&mut self, node: Node<'_, '_>) -> Params {
        let mut params = Params::new();
        for child in node.children().filter(Node::is_element) {
            let element = child.tag_name().name();
            if element != "parameter" {
                self.warn_unknown_element(child, element, &["parameter"]);
                continue;
            }
            self.warn_unknown_attributes(child, &["name", "value"]);
            let (name, value) = (attribute(child, "name"), attribute(child, "value"));
            let added = match (&name, &value) {
                (Some(name), Some(value)) => {
                    name.value().parse::<VarName>().is_ok_and(|name| params.push(name, value.value()))
                }
                _ => false,
            };
            if !added {
                let help = "name needs [a-zA-Z0-9_], value needs one or more of [a-zA-Z0-9_.:]";
                self.warn(child.range(), "this parameter is ignored".into(), Some(help.into()));
            }
        }
        params
    }

    // ---- <rule> ----

    fn rule(&mut self, node: Node<'_, '_>) -> Option<Rule> {
        self.warn_unknown_attributes(node, &["action", "direction", "priority", "statematch"]);
        let action = self.named(node, "action", &Action::NAMES);
        let direction = self.named(node, "direction", &Direction::NAMES);
        let priority = self.rule_priority(node);
        let statematch = attribute(node, "statematch")
            .is_none_or(|a| a.value() != "0" && !a.value().eq_ignore_ascii_case("false"));
        let matches = self.matches(node);
        let place = self.place(node.range().start);
        Some(Rule { action: action?, direction: direction?, priority, statematch, matches: matches?, place })
    }

    fn named<T: Copy>(&mut self, node: Node<'_, '_>, name: &str, names: &[(T, &'static str)]) -> Option<T> {
        let element = node.tag_name().name();
        let all = names.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
        let Some(a) = attribute(node, name) else {
            self.error(
                self.tag(node),
                format!("<{element}> has no attribute '{name}'"),
                Some(format!("one of {all}")),
            );
            return None;
        };
        let found = names.iter().find(|(_, name)| *name == a.value()).map(|(value, _)| *value);
        if found.is_none() {
            let help = match nearest(a.value(), names.iter().map(|(_, name)| *name)) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("one of {all}"),
            };
            self.error(a.range_value(), format!("unknown {name} '{}'", a.value()), Some(help));
        }
        found
    }

    /// A rule's priority; libvirt puts 500 in place of one it cannot use.
    fn rule_priority(&mut self, node: Node<'_, '_>) -> Priority {
        let Some(a) = attribute(node, "priority") else { return Priority::RULE_DEFAULT };
        parse_int(a.value()).and_then(Priority::new).unwrap_or_else(|| {
            let message = format!("'{}' is no number from -1000 to 1000, so the priority is 500", a.value());
            self.warn(a.range_value(), message, None);
            Priority::RULE_DEFAULT
        })
    }

    /// The protocol elements of a rule as one; the outer `None` means that something in them was refused.
    fn matches(&mut self, rule: Node<'_, '_>) -> Option<Option<Matches>> {
        let mut matches: Option<Matches> = None;
        let mut valid = true;
        for element in rule.children().filter(Node::is_element) {
            let name = element.tag_name().name();
            match (Protocol::of_element(name), &mut matches) {
                (Some(protocol), Some(matches)) if protocol == matches.protocol => {
                    valid &= self.protocol_element(element, matches);
                }
                (Some(_), Some(matches)) => {
                    let first = matches.protocol.spec().element;
                    let message =
                        format!("<{name}> is ignored: this rule is about <{first}>, which came first");
                    self.warn(self.tag(element), message, None);
                }
                (Some(protocol), None) => {
                    let mut first = Matches { protocol, items: Vec::new() };
                    valid &= self.protocol_element(element, &mut first);
                    matches = Some(first);
                }
                (None, _) => {
                    let names: Vec<_> = PROTOCOLS.iter().map(|spec| spec.element).collect();
                    self.warn_unknown_element(element, name, &names);
                }
            }
        }
        if let Some(matches) = &mut matches {
            self.settle_signs(matches);
            self.settle_ipset(matches);
        }
        valid.then_some(matches)
    }

    /// Adds the attributes of one element; false if one was refused.
    fn protocol_element(&mut self, element: Node<'_, '_>, matches: &mut Matches) -> bool {
        let negated = attribute(element, "match").is_some_and(|a| a.value() == "no");
        let table = matches.protocol.spec().attributes;
        let known: Vec<_> = std::iter::once("match").chain(table.iter().map(|a| a.name)).collect();
        self.warn_unknown_attributes(element, &known);
        let mut valid = true;
        for row in table {
            let Some(a) = attribute(element, row.name) else { continue };
            match self.attribute_value(row, &a) {
                Some(value) => {
                    let place = self.place(a.range().start);
                    set_item(matches, Item { attribute: row, negated, value, place });
                }
                None => valid = false,
            }
        }
        valid & self.ports_have_a_protocol(element, matches)
    }

    fn attribute_value(&mut self, row: &Attribute, a: &XmlAttribute<'_, '_>) -> Option<Value> {
        let text = a.value();
        if let Some(reference) = text.strip_prefix('$') {
            return match VarRef::parse(reference) {
                Ok(variable) => Some(Value::Variable(variable)),
                Err(why) => {
                    self.error(a.range_value(), format!("malformed variable '{text}': {why}"), None);
                    None
                }
            };
        }
        let literal = row.kind.parse(text);
        if literal.is_none() {
            let near = nearest(text, row.kind.names().iter().map(|(_, name)| *name));
            let help = near.map(|near| format!("did you mean '{near}'?"));
            let expected = row.kind.expected();
            self.error(a.range_value(), format!("{}: '{text}' is not {expected}", row.name), help);
        }
        literal.map(Value::Literal)
    }

    /// libvirt refuses ports on ip and ipv6 elements whose protocol has none. It checks after each element, and
    /// takes a variable as protocol 0.
    fn ports_have_a_protocol(&mut self, element: Node<'_, '_>, matches: &Matches) -> bool {
        const WITH_PORTS: [u8; 4] = [6, 17, 33, 132];
        const PORTS: [Field; 4] =
            [Field::SrcPortStart, Field::SrcPortEnd, Field::DstPortStart, Field::DstPortEnd];
        let checked = matches!(matches.protocol, Protocol::Ip | Protocol::Ipv6);
        if !checked || !PORTS.iter().any(|port| matches.get(*port).is_some()) {
            return true;
        }
        let protocol = matches.get(Field::IpProtocol).map(|item| &item.value);
        let has_ports = match protocol {
            Some(Value::Literal(Literal::U8(number))) => WITH_PORTS.contains(&number.value),
            _ => false,
        };
        if !has_ports {
            let help = "add protocol='tcp', 'udp', 'dccp' (33) or 'sctp'";
            self.error(self.tag(element), "ports need a protocol that has ports".into(), Some(help.into()));
        }
        has_ports
    }

    /// Gives each attribute whose sign is another's that sign, as the table says.
    fn settle_signs(&mut self, matches: &mut Matches) {
        let signs: Vec<_> = matches.items.iter().map(|item| (item.attribute.field, item.negated)).collect();
        for item in &mut matches.items {
            let Some(decider) = item.attribute.sign_of else { continue };
            let negated =
                signs.iter().find(|(field, _)| *field == decider).is_some_and(|(_, negated)| *negated);
            if negated != item.negated {
                let decider = matches.protocol.attribute(decider).map_or("", |a| a.name);
                let (name, sign) = (item.attribute.name, if negated { "" } else { "not " });
                let message = format!("{name} is {sign}negated, because its sign is that of {decider}");
                self.items.push(self.diagnostic(Severity::Warning, self.at(item.place), message, None));
            }
            item.negated = negated;
        }
    }

    /// libvirt gives an ipset without flags the flags `src`, and drops an ipset that has flags, both except
    /// on `all` and `all-ipv6` elements.
    fn settle_ipset(&mut self, matches: &mut Matches) {
        let Some(row) = matches.protocol.attribute(Field::IpSetFlags) else { return };
        if matches!(matches.protocol, Protocol::All | Protocol::AllOn6) {
            return;
        }
        match (matches.get(Field::IpSet), matches.get(Field::IpSetFlags)) {
            (None, None) => (),
            (Some(set), None) => {
                let value = Value::Literal(Literal::IpSetFlags(vec![SetDirection::Src]));
                let place = set.place;
                set_item(matches, Item { attribute: row, negated: false, value, place });
            }
            (set, flags) => {
                let place = set.or(flags).map_or_else(Place::default, |item| item.place);
                let message =
                    "libvirt drops ipset and ipsetflags where both are given: this rule matches without them";
                let help = "use <all>, or an ipset without ipsetflags, which means src";
                let diagnostic =
                    self.diagnostic(Severity::Warning, self.at(place), message.into(), Some(help.into()));
                self.items.push(diagnostic);
                matches.items.retain(|item| !matches!(item.attribute.kind, Kind::IpSet | Kind::IpSetFlags));
            }
        }
    }

    // ---- <filterbinding> ----

    fn binding(&mut self, node: Node<'_, '_>) -> Option<Binding> {
        self.warn_unknown_children(node, &["owner", "portdev", "linkdev", "mac", "filterref"]);
        let owner = self.owner(node);
        let port = self.child_attribute(node, "portdev", "name", None);
        let link = child(node, "linkdev").and_then(|n| attribute(n, "name").map(|a| a.value().to_owned()));
        let mac = self.child_attribute(node, "mac", "address", Some("<mac address='52:54:00:12:34:56'/>"));
        let filter =
            self.child_attribute(node, "filterref", "filter", Some("<filterref filter='clean-traffic'/>"));
        let params = child(node, "filterref").map(|n| self.params(n)).unwrap_or_default();
        Some(Binding { owner: owner?, port: port?, link, mac: mac?, filter: filter?, params })
    }

    fn owner(&mut self, node: Node<'_, '_>) -> Option<Owner> {
        let help = "<owner><name>GUEST</name><uuid>…</uuid></owner>";
        let missing = |reader: &mut Self, what: &str| {
            reader.error(reader.tag(node), format!("the binding has no {what}"), Some(help.into()));
        };
        let Some(owner) = child(node, "owner") else {
            missing(self, "<owner>");
            return None;
        };
        let text = |name| child(owner, name).and_then(|n| n.text()).map(str::trim).filter(|t| !t.is_empty());
        let (name, uuid) = (text("name"), text("uuid"));
        if name.is_none() {
            missing(self, "owner <name>");
        }
        let parsed = uuid.and_then(parse_uuid);
        match (uuid, parsed) {
            (None, _) => missing(self, "owner <uuid>"),
            (Some(_), None) => {
                self.error(owner.range(), "malformed UUID: expected 32 hex digits".into(), None)
            }
            (Some(_), Some(_)) => (),
        }
        Some(Owner { name: name?.to_owned(), uuid: parsed? })
    }

    /// The attribute of a child element, both of which must be there.
    fn child_attribute<T: std::str::FromStr<Err = crate::Error>>(
        &mut self,
        node: Node<'_, '_>,
        element: &str,
        name: &str,
        help: Option<&str>,
    ) -> Option<T> {
        let found = child(node, element).and_then(|n| attribute(n, name));
        let Some(a) = found else {
            let at = child(node, element).unwrap_or(node);
            self.error(
                self.tag(at),
                format!("the binding has no <{element} {name}=…>"),
                help.map(str::to_owned),
            );
            return None;
        };
        self.parsed(&a, a.value().parse())
    }

    // ---- problems ----

    fn parsed<T>(&mut self, a: &XmlAttribute<'_, '_>, result: Result<T, crate::Error>) -> Option<T> {
        result.map_err(|error| self.error(a.range_value(), error.to_string(), None)).ok()
    }

    fn warn_unknown_attributes(&mut self, node: Node<'_, '_>, known: &[&str]) {
        for a in node.attributes().filter(|a| a.namespace().is_none() && !known.contains(&a.name())) {
            let help = nearest(a.name(), known.iter().copied()).map(|near| format!("did you mean '{near}'?"));
            let element = node.tag_name().name();
            self.warn(a.range(), format!("<{element}> has no attribute '{}': it is ignored", a.name()), help);
        }
    }

    fn warn_unknown_element(&mut self, node: Node<'_, '_>, name: &str, known: &[&str]) {
        let help = nearest(name, known.iter().copied()).map(|near| format!("did you mean <{near}>?"));
        self.warn(self.tag(node), format!("unknown element <{name}>: it is ignored"), help);
    }

    fn warn_unknown_children(&mut self, node: Node<'_, '_>, known: &[&str]) {
        for child in node.children().filter(Node::is_element) {
            let name = child.tag_name().name();
            if !known.contains(&name) {
                self.warn_unknown_element(child, name, known);
            }
        }
    }

    fn error(&mut self, range: std::ops::Range<usize>, message: String, help: Option<String>) {
        self.items.push(self.diagnostic(Severity::Error, range, message, help));
    }

    fn warn(&mut self, range: std::ops::Range<usize>, message: String, help: Option<String>) {
        self.items.push(self.diagnostic(Severity::Warning, range, message, help));
    }

    fn diagnostic(
        &self,
        severity: Severity,
        range: std::ops::Range<usize>,
        message: String,
        help: Option<String>,
    ) -> Diagnostic {
        let place = self.place(range.start);
        let line = self.line(range.start);
        let covered = self.text.get(range).unwrap_or("").lines().next().unwrap_or("");
        let length = u32::try_from(covered.chars().count()).unwrap_or(u32::MAX).max(1);
        Diagnostic { severity, place, length, message, help, line: line.to_owned() }
    }

    /// The start tag of an element without its attributes.
    fn tag(&self, node: Node<'_, '_>) -> std::ops::Range<usize> {
        let start = node.range().start;
        let end = self.text[start..].find(['>', '/', ' ', '\n', '\t', '\r']).map_or(start, |n| start + n);
        start..end
    }

    fn place(&self, offset: usize) -> Place {
        let line = self.line_starts.partition_point(|start| *start <= offset).max(1);
        let start = self.line_starts[line - 1];
        let column = self.text.get(start..offset).map_or(0, |before| before.chars().count()) + 1;
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Place { line: narrow(line), column: narrow(column) }
    }

    fn line(&self, offset: usize) -> &str {
        let line = self.line_starts.partition_point(|start| *start <= offset).max(1);
        self.text[self.line_starts[line - 1]..].lines().next().unwrap_or("")
    }

    /// The empty range at a place.
    fn at(&self, place: Place) -> std::ops::Range<usize> {
        let at = self.offset(roxmltree::TextPos { row: place.line, col: place.column });
        let name = self.text[at..].find('=').unwrap_or(0);
        at..at + name
    }

    fn offset(&self, position: roxmltree::TextPos) -> usize {
        let start = self.line_starts.get((position.row as usize).saturating_sub(1)).copied().unwrap_or(0);
        let line = self.text[start..].lines().next().unwrap_or("");
        let column = (position.col as usize).saturating_sub(1);
        start + line.char_indices().nth(column).map_or(line.len(), |(at, _)| at)
    }
}

/// Puts an item in its place in the order of the table; a second one for an attribute replaces the first.
fn set_item(matches: &mut Matches, item: Item) {
    let rank = |field| matches.protocol.spec().attributes.iter().position(|a| a.field == field);
    let new = rank(item.attribute.field);
    match matches.items.binary_search_by_key(&new, |old| rank(old.attribute.field)) {
        Ok(at) => matches.items[at] = item,
        Err(at) => matches.items.insert(at, item),
    }
}

fn attribute<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<XmlAttribute<'a, 'i>> {
    node.attributes().find(|a| a.name() == name)
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.is_element() && child.tag_name().name() == name)
}

/// A decimal number as C's `strtol` reads it; nothing may follow.
fn parse_int(text: &str) -> Option<i32> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    text.parse().ok()
}

/// A UUID as libvirt reads it: 16 bytes in hex, with `-` anywhere between two of them, white space around.
fn parse_uuid(text: &str) -> Option<Uuid> {
    let text = text.trim_matches(|c: char| c.is_ascii_whitespace());
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    let digits = std::str::from_utf8(&digits).ok().filter(|d| d.len() == 32 && !text.starts_with('{'))?;
    Uuid::try_parse(digits).ok()
}

/// roxmltree ends its messages with the position, which we show in our own way.
fn without_position(error: &roxmltree::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at ") {
        Some((message, position)) if position.bytes().all(|b| b.is_ascii_digit() || b == b':') => {
            message.to_owned()
        }
        _ => text,
    }
}
