//! The reader: text to XML to model, within limits, with every problem of the document and its place.

use std::ops::Range;

use roxmltree::{Attribute as XmlAttribute, Document, Node, ParsingOptions};
use uuid::Uuid;

use crate::binding::Binding;
use crate::code::Code;
use crate::diag::{Diagnostics, Severity, nearest};
use crate::domain::Domain;
use crate::model::{Filter, Params};
use crate::names::VarName;
use crate::problems::Problems;
use crate::scan::{Excess, Limits, Scan, scan};
use crate::set::{FilterSet, MAX_SET_BYTES, MAX_SET_ENTRIES};
use crate::value::Kind;

/// Largest document that is read, in bytes: the longest string that libvirt's protocol carries. A filter with 1,000
/// rules has about 100,000.
pub const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting of elements that is read, as in libxml2.
pub const MAX_DEPTH: usize = 257;
/// Most rules and includes that a filter may have.
pub const MAX_ENTRIES: usize = 65_536;
/// Most values that a document may pass to filters.
pub const MAX_VALUES: usize = 65_536;
/// Most attributes that an element may have; the time to read them is quadratic in their number.
pub const MAX_ATTRIBUTES: usize = 256;
/// Most namespaces that a document may declare; the time to find one is linear in their number.
pub const MAX_NAMESPACES: usize = 256;
/// Most XML nodes of a document.
const MAX_NODES: u32 = 1_000_000;
/// Most XML nodes of a set: elements, and white space between them.
const MAX_SET_NODES: u32 = 4 * MAX_SET_ENTRIES as u32;

/// How much of a document is read.
#[derive(Clone, Copy)]
struct Size {
    bytes: usize,
    nodes: u32,
}

const SIZE: Size = Size { bytes: MAX_BYTES, nodes: MAX_NODES };
const SET_SIZE: Size = Size { bytes: MAX_SET_BYTES, nodes: MAX_SET_NODES };

/// What the reader does where libvirt ignores a part of a rule, so that the rule matches more than is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strictness {
    /// It refuses a rule with an element that is no protocol ([`Code::UnknownProtocol`]) and a protocol with an attribute
    /// that it does not have ([`Code::UnknownCondition`]).
    #[default]
    Strict,
    /// It takes them with a warning, as libvirt does without one.
    AsLibvirt,
}

/// What reading a document gave.
#[derive(Clone, Debug)]
pub struct Reading<T> {
    /// The value; `None` if the document was refused.
    pub value: Option<T>,
    /// Errors and warnings, in document order.
    pub diagnostics: Diagnostics,
}

impl<T> Reading<T> {
    /// What of a document that is not refused is ignored or replaced, if anything is.
    pub fn warnings(&self) -> Option<&Diagnostics> {
        Some(&self.diagnostics).filter(|found| self.value.is_some() && !found.items.is_empty())
    }

    /// The value with warnings dropped, or all problems.
    pub fn into_result(self) -> Result<T, Diagnostics> {
        self.value.ok_or(self.diagnostics)
    }
}

/// Reads a `<filter>` document, [strictly](Strictness::Strict). `document` names it in messages.
pub fn read_filter(document: &str, text: &str) -> Reading<Filter> {
    read_filter_with(document, text, Strictness::default())
}

/// Reads a `<filter>` document. `document` names it in messages.
///
/// ```
/// use nwfilter_xml::{Strictness, read_filter, read_filter_with};
///
/// let mistyped = "<filter name='web'>
///   <rule action='accept' direction='in'><tpc dstportstart='80'/></rule>
/// </filter>";
/// let refused = read_filter("web.xml", mistyped).into_result().unwrap_err().to_string();
/// assert!(refused.contains("the rule would match every frame"));
/// assert!(refused.contains("did you mean <tcp>?"));
/// assert!(read_filter_with("web.xml", mistyped, Strictness::AsLibvirt).value.is_some());
/// ```
pub fn read_filter_with(document: &str, text: &str, strictness: Strictness) -> Reading<Filter> {
    read(document, text, strictness, SIZE, "filter", None, Reader::filter)
}

/// Reads a `<filterbinding>` document, or the `<filterbindingstatus>` around one that libvirt keeps on disk.
pub fn read_binding(document: &str, text: &str) -> Reading<Binding> {
    let wrapper = Some("filterbindingstatus");
    read(document, text, Strictness::default(), SIZE, "filterbinding", wrapper, Reader::binding)
}

/// Reads what concerns filters in a `<domain>` document, or in the `<domstatus>` around one that libvirt keeps on
/// disk: who the guest is, and its network interfaces with their filters.
pub fn read_domain(document: &str, text: &str) -> Reading<Domain> {
    read(document, text, Strictness::default(), SIZE, "domain", Some("domstatus"), Reader::domain)
}

/// Reads a `<filterset>` document. Whatever it has that a set does not is an error.
///
/// ```
/// let set = nwfilter_xml::read_set("admins.xml", "<filterset name='admins' family='ipv4'>
///   <entry value='10.0.0.1' comment='office'/>
///   <entry value='10.1.0.0/16'/>
///   <include set='more-admins'/>
///   <tag name='web'/>
/// </filterset>").into_result()?;
/// assert_eq!(set.entries.len(), 2);
/// # Ok::<(), nwfilter_xml::Diagnostics>(())
/// ```
pub fn read_set(document: &str, text: &str) -> Reading<FilterSet> {
    read(document, text, Strictness::default(), SET_SIZE, "filterset", None, Reader::filter_set)
}

/// The problems of a document of any of these kinds, which its root element tells.
pub fn check(document: &str, text: &str) -> Diagnostics {
    check_with(document, text, Strictness::default())
}

/// The same, with filters read as strictly as that.
pub fn check_with(document: &str, text: &str, strictness: Strictness) -> Diagnostics {
    match DocumentKind::of(text) {
        DocumentKind::Filter => read_filter_with(document, text, strictness).diagnostics,
        DocumentKind::Binding => read_binding(document, text).diagnostics,
        DocumentKind::Domain => read_domain(document, text).diagnostics,
        DocumentKind::Set => read_set(document, text).diagnostics,
    }
}

/// What a document is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DocumentKind {
    /// A filter; also a document whose root element is of no kind.
    Filter,
    /// A binding.
    Binding,
    /// A domain.
    Domain,
    /// A set.
    Set,
}

impl DocumentKind {
    /// What the root element says.
    pub fn of(text: &str) -> Self {
        match root_name(text) {
            Some("filterbinding" | "filterbindingstatus") => Self::Binding,
            Some("domain" | "domstatus") => Self::Domain,
            Some("filterset") => Self::Set,
            _ => Self::Filter,
        }
    }
}

/// The name of the root element, as far as it can be told without parsing.
fn root_name(text: &str) -> Option<&str> {
    let mut rest = text;
    loop {
        rest = rest.split_once('<')?.1;
        if let Some(comment) = rest.strip_prefix("!--") {
            rest = comment.split_once("-->")?.1;
        } else if !rest.starts_with(['?', '!']) {
            return rest.split(|c: char| c.is_whitespace() || "/><".contains(c)).next();
        }
    }
}

fn read<'t, T>(
    document: &str,
    text: &'t str,
    strictness: Strictness,
    size: Size,
    root: &str,
    wrapper: Option<&str>,
    parse: impl Fn(&mut Reader<'t>, Node<'_, '_>) -> Option<T>,
) -> Reading<T> {
    let mut reader = Reader { text, strictness, size, problems: Problems::new(text), values: 0 };
    let value = reader.document(root, wrapper, parse);
    let refused = reader.problems.has_errors();
    let diagnostics = reader.problems.into_diagnostics(document);
    Reading { value: value.filter(|_| !refused), diagnostics }
}

/// The document being read.
pub(crate) struct Reader<'t> {
    text: &'t str,
    strictness: Strictness,
    size: Size,
    pub(crate) problems: Problems<'t>,
    pub(crate) values: usize,
}

impl Reader<'_> {
    fn document<T>(
        &mut self,
        root: &str,
        wrapper: Option<&str>,
        parse: impl Fn(&mut Self, Node<'_, '_>) -> Option<T>,
    ) -> Option<T> {
        let Size { bytes: limit, nodes } = self.size;
        if self.text.len() > limit {
            let size = self.text.len();
            let message = format!("the document has {size} bytes; at most {limit} are read");
            self.problems.error(Code::DocumentTooLong, 0..0, message, None);
            return None;
        }
        let limits = Limits { depth: MAX_DEPTH, attributes: MAX_ATTRIBUTES, namespaces: MAX_NAMESPACES };
        let Scan { excess, open, plain_type } = scan(self.text, limits);
        if let Some(excess) = excess {
            self.excessive(excess);
            return None;
        }
        let options =
            ParsingOptions { nodes_limit: nodes, allow_dtd: plain_type, ..ParsingOptions::default() };
        let text = self.text;
        match Document::parse_with_options(text, options) {
            Ok(xml) => {
                let node = self.document_element(&xml, root, wrapper)?;
                parse(self, node)
            }
            Err(error) => {
                self.malformed(&error, open);
                None
            }
        }
    }

    fn excessive(&mut self, excess: Excess) {
        let (code, at, message) = match excess {
            Excess::Depth(at) => {
                (Code::TooDeep, at, format!("elements are nested more than {MAX_DEPTH} deep"))
            }
            Excess::Attributes(at) => {
                let message = format!("the element has more than {MAX_ATTRIBUTES} attributes");
                (Code::TooManyAttributes, at, message)
            }
            Excess::Namespaces(at) => {
                let message = format!("the document declares more than {MAX_NAMESPACES} namespaces");
                (Code::TooManyParts, at, message)
            }
        };
        self.problems.error(code, self.tag_at(at), message, None);
    }

    /// Says why a text is no XML. `open` is what its end leaves open.
    fn malformed(&mut self, error: &roxmltree::Error, open: Option<usize>) {
        let text = self.text;
        let end = text.trim_end().len();
        match error {
            _ if text.trim_start_matches('\u{feff}').trim().is_empty() => {
                let help = "write a <filter>, <filterbinding> or <domain> into it";
                self.problems.error(Code::EmptyDocument, 0..0, "the document is empty", Some(help.into()));
            }
            roxmltree::Error::DtdDetected => {
                let at = text.find("<!DOCTYPE").unwrap_or(0);
                let help = "take it out: a filter needs no entities, and none is expanded";
                let covered = if text[at..].starts_with("<!DOCTYPE") { "<!DOCTYPE".len() } else { 0 };
                let message = "a document type with declarations is not read";
                self.problems.error(Code::DocumentType, at..at + covered, message, Some(help.into()));
            }
            roxmltree::Error::NodesLimitReached => {
                let message = format!("the document has more than {} parts", self.size.nodes);
                self.problems.error(Code::TooManyParts, 0..0, message, None);
            }
            roxmltree::Error::NoRootNode if open.is_none() => {
                let help = "write a <filter>, <filterbinding> or <domain> into it";
                let message = "the document has no element";
                self.problems.error(Code::EmptyDocument, end..end, message, Some(help.into()));
            }
            _ => {
                let position = error.pos();
                let at = self.problems.offset(position.row, position.col);
                // Errors that have no position are about the end of the text.
                let at_end = matches!(
                    error,
                    roxmltree::Error::UnexpectedEndOfStream
                        | roxmltree::Error::UnclosedRootNode
                        | roxmltree::Error::NoRootNode
                ) || at >= end;
                match open.filter(|_| at_end) {
                    Some(open) => {
                        let place = self.problems.place(open);
                        let open: String = match &text[self.tag_at(open)] {
                            tag if tag.starts_with("<!--") => "a comment".to_owned(),
                            tag => tag.chars().take(40).chain(['>']).collect(),
                        };
                        let message = format!("the document ends inside {open}, which starts at {place}");
                        let help = "is the file complete?";
                        self.problems.error(Code::EndsEarly, end..end, message, Some(help.into()));
                    }
                    None => {
                        let at = if at_end { end } else { at };
                        let message = format!("malformed XML: {}", without_position(error));
                        self.problems.error(Code::MalformedXml, at..at, message, None);
                    }
                }
            }
        }
    }

    /// The element the document is about: the root element, or a child of the wrapper.
    fn document_element<'a, 'i>(
        &mut self,
        xml: &'a Document<'i>,
        root: &str,
        wrapper: Option<&str>,
    ) -> Option<Node<'a, 'i>> {
        let node = xml.root_element();
        let name = node.tag_name().name();
        let found = match name {
            _ if name == root => Some(node),
            _ if Some(name) == wrapper => child(node, root),
            _ => None,
        };
        if found.is_none() {
            let message = format!("the document is a <{name}>, expected a <{root}>");
            self.problems.error(Code::WrongDocument, self.tag(node), message, None);
        }
        found
    }

    // ---- what all documents have ----

    /// The `<parameter>` children of an element.
    pub(crate) fn params(&mut self, node: Node<'_, '_>) -> Params {
        let mut params = Params::new();
        for child in self.child_elements(node) {
            if child.tag_name().name() != "parameter" {
                self.warn_unknown_element(child, &["parameter"]);
                continue;
            }
            self.values += 1;
            if self.values > MAX_VALUES {
                let message = format!("more than {MAX_VALUES} values are passed");
                self.problems.error(Code::TooManyValues, self.tag(child), message, None);
                break;
            }
            self.parameter(child, &mut params);
        }
        params
    }

    /// One parameter; libvirt ignores one whose name or value it does not like. An address of the guest that is none
    /// is refused.
    fn parameter(&mut self, node: Node<'_, '_>, params: &mut Params) {
        self.warn_unknown_attributes(node, &["name", "value"]);
        let ignored = |reader: &mut Self, range, what: String, help: &str| {
            let message = format!("{what}: the parameter is ignored");
            reader.problems.warn(Code::IgnoredParameter, range, message, Some(help.to_owned()));
        };
        let (name_help, value_help) =
            ("letters, digits and _ are allowed", "letters, digits and _ . : are allowed");
        let (Some(name), Some(value)) = (attribute(node, "name"), attribute(node, "value")) else {
            let example = "<parameter name='IP' value='10.0.0.1'/>";
            return ignored(self, self.tag(node), "a parameter needs a name and a value".into(), example);
        };
        let Ok(variable) = name.value().parse::<VarName>() else {
            let what = format!("'{}' is no variable name", name.value().escape_debug());
            return ignored(self, name.range_value(), what, name_help);
        };
        // Without it, the guest would have any address that it says it has.
        if variable.holds_addresses() && !is_address(value.value()) {
            let what = format!("{variable} is '{}', which is no IP address", value.value().escape_debug());
            let help =
                "one address without a prefix length, as 10.0.0.1; each address is a parameter of its own";
            return self.problems.error(Code::BadAddress, value.range_value(), what, Some(help.to_owned()));
        }
        if params.insert(variable, value.value()).is_err() {
            let what = format!("'{}' cannot be a value", value.value().escape_debug());
            ignored(self, value.range_value(), what, value_help);
        }
    }

    /// The children that are elements; text between them has no effect.
    pub(crate) fn child_elements<'a, 'i>(
        &mut self,
        node: Node<'a, 'i>,
    ) -> impl Iterator<Item = Node<'a, 'i>> + use<'a, 'i> {
        let text = node.children().find(|child| child.is_text() && child.text().is_some_and(is_not_blank));
        if let Some(text) = text {
            let start = text.range().start;
            let blank = self.text[start..].find(|c: char| !c.is_whitespace()).unwrap_or(0);
            let element = node.tag_name().name();
            let range = start + blank..text.range().end;
            let message = format!("text in <{element}> is ignored");
            self.problems.warn(Code::IgnoredText, range, message, None);
        }
        node.children().filter(Node::is_element)
    }

    /// The value of an attribute, or what is wrong with it.
    pub(crate) fn parsed<T>(
        &mut self,
        code: Code,
        a: &XmlAttribute<'_, '_>,
        result: Result<T, crate::Error>,
    ) -> Option<T> {
        result.map_err(|error| self.problems.error(code, a.range_value(), error.to_string(), None)).ok()
    }

    pub(crate) fn warn_unknown_attributes(&mut self, node: Node<'_, '_>, known: &[&str]) {
        for a in node.attributes().filter(|a| !known.contains(&a.name()) && is_of_the_language(a)) {
            let text = || {
                let near = nearest(a.name(), known.iter().copied());
                let message = format!("<{}> has no attribute '{}': it is ignored", name_of(node), a.name());
                (message, near.map(|near| format!("did you mean '{near}'?")))
            };
            self.problems.report(Severity::Warning, Code::UnknownAttribute, a.range(), text);
        }
    }

    pub(crate) fn warn_unknown_element(&mut self, node: Node<'_, '_>, known: &[&str]) {
        let text = || {
            let name = name_of(node);
            let help = nearest(name, known.iter().copied()).map(|near| format!("did you mean <{near}>?"));
            (format!("unknown element <{name}>: it is ignored"), help)
        };
        self.problems.report(Severity::Warning, Code::UnknownElement, self.tag(node), text);
    }

    /// Reports a part of a rule that libvirt ignores, so that the rule matches more than is written.
    pub(crate) fn widens(
        &mut self,
        code: Code,
        range: Range<usize>,
        text: impl FnOnce(&'static str) -> (String, Option<String>),
    ) {
        let (severity, verb) = match self.strictness {
            Strictness::Strict => (Severity::Error, "would match"),
            Strictness::AsLibvirt => (Severity::Warning, "matches"),
        };
        self.problems.report(severity, code, range, || text(verb));
    }

    pub(crate) fn warn_unknown_children(&mut self, node: Node<'_, '_>, known: &[&str]) {
        for child in self.child_elements(node) {
            if !known.contains(&child.tag_name().name()) {
                self.warn_unknown_element(child, known);
            }
        }
    }

    /// The start tag of an element without its attributes.
    pub(crate) fn tag(&self, node: Node<'_, '_>) -> Range<usize> {
        self.tag_at(node.range().start)
    }

    fn tag_at(&self, start: usize) -> Range<usize> {
        let ends = |c: char| matches!(c, '>' | '/' | ' ' | '\n' | '\t' | '\r');
        let name = start + if self.text[start..].starts_with("</") { 2 } else { 1 };
        let length = self.text.get(name..).and_then(|rest| rest.find(ends));
        start..length.map_or(self.text.len(), |length| name + length)
    }
}

/// The name of an element; like libvirt the reader does not look at its namespace.
pub(crate) fn name_of<'a>(node: Node<'a, '_>) -> &'a str {
    node.tag_name().name()
}

/// Attributes of a foreign namespace are somebody's extension, and no mistake.
pub(crate) fn is_of_the_language(a: &XmlAttribute<'_, '_>) -> bool {
    a.namespace().is_none()
}

fn is_not_blank(text: &str) -> bool {
    !text.trim_ascii().is_empty()
}

/// An attribute by its name; like libvirt it does not look at namespaces.
pub(crate) fn attribute<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<XmlAttribute<'a, 'i>> {
    node.attributes().find(|a| a.name() == name)
}

/// A child element by its name.
pub(crate) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.is_element() && child.tag_name().name() == name)
}

/// All text of an element, that of the elements in it included.
pub(crate) fn text_of(node: Node<'_, '_>) -> String {
    node.descendants().filter_map(|n| n.text().filter(|_| n.is_text())).collect()
}

/// A UUID as libvirt reads it: 16 bytes in hex, with any number of `-` and white space before each of them, and white
/// space at the end.
pub(crate) fn parse_uuid(text: &str) -> Option<Uuid> {
    let mut rest = text;
    let mut bytes = [0; 16];
    for byte in &mut bytes {
        rest = rest.trim_start_matches(|c: char| c == '-' || c.is_ascii_whitespace());
        let digits = rest.get(..2).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
        rest = &rest[2..];
    }
    (!is_not_blank(rest)).then(|| Uuid::from_bytes(bytes))
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

/// Whether a text is an IP address of either family, as libvirt reads one.
fn is_address(text: &str) -> bool {
    [Kind::Ipv4, Kind::Ipv6].iter().any(|kind| kind.parse(text).is_some())
}
