//! Looks at the tags of a document before the XML parser does, which needs time quadratic in the attributes of an
//! element and in the namespaces of a document.

/// What a document has more of than is read, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Excess {
    Depth(usize),
    Attributes(usize),
    Namespaces(usize),
}

/// Most of what a document may have.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Elements within each other.
    pub(crate) depth: usize,
    /// Attributes of one element.
    pub(crate) attributes: usize,
    /// Declarations of namespaces.
    pub(crate) namespaces: usize,
}

/// What the tags of a document say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scan {
    /// The first excess.
    pub(crate) excess: Option<Excess>,
    /// Where the innermost element, comment or tag starts that the end of the text leaves open.
    pub(crate) open: Option<usize>,
    /// Whether there is a document type, and each there is declares nothing.
    pub(crate) plain_type: bool,
}

/// Scans a document.
///
/// The scan follows the grammar as far as the parser does: what it misreads, after the first syntax error, the parser
/// does not reach.
pub(crate) fn scan(text: &str, limits: Limits) -> Scan {
    let bytes = text.as_bytes();
    let mut open: Vec<usize> = Vec::new();
    let mut namespaces = 0;
    let mut at = 0;
    let mut plain_type = false;
    let excess = |excess| Scan { excess: Some(excess), ..Scan::default() };
    loop {
        let Some(start) = memchr(b'<', &bytes[at..]).map(|found| at + found) else {
            return Scan { excess: None, open: open.last().copied(), plain_type };
        };
        let tag = start + 1;
        let end = match bytes.get(tag) {
            Some(b'!') if bytes[tag..].starts_with(b"!--") => behind(text, tag + 3, "-->"),
            Some(b'!') if bytes[tag..].starts_with(b"![CDATA[") => behind(text, tag + 8, "]]>"),
            Some(b'?') => behind(text, tag + 1, "?>"),
            Some(b'!') => match document_type(bytes, tag) {
                Some(end) => {
                    plain_type = true;
                    Some(end)
                }
                None => return Scan::default(),
            },
            Some(b'/') => {
                if open.pop().is_none() {
                    return Scan::default();
                }
                memchr(b'>', &bytes[tag..]).map(|end| tag + end + 1)
            }
            Some(_) => {
                let start_tag = start_tag(bytes, tag);
                namespaces += start_tag.namespaces;
                if open.len() == limits.depth {
                    return excess(Excess::Depth(start));
                }
                if start_tag.attributes > limits.attributes {
                    return excess(Excess::Attributes(start));
                }
                if namespaces > limits.namespaces {
                    return excess(Excess::Namespaces(start));
                }
                if start_tag.end.is_some_and(|end| bytes[end - 1] != b'/') {
                    open.push(start);
                }
                start_tag.end.map(|end| end + 1)
            }
            None => None,
        };
        match end {
            Some(end) => at = end,
            None => return Scan { excess: None, open: Some(start), plain_type },
        }
    }
}

struct StartTag {
    /// Where the `>` is that ends it; one in a quoted value does not.
    end: Option<usize>,
    attributes: usize,
    namespaces: usize,
}

fn start_tag(bytes: &[u8], from: usize) -> StartTag {
    let mut tag = StartTag { end: None, attributes: 0, namespaces: 0 };
    let mut at = from;
    let mut name = from;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'>' => {
                tag.end = Some(at);
                return tag;
            }
            b'"' | b'\'' => {
                tag.attributes += 1;
                tag.namespaces += usize::from(bytes[name..at].starts_with(b"xmlns"));
                let Some(quote) = memchr(*byte, &bytes[at + 1..]) else { return tag };
                at += quote + 2;
                name = at;
            }
            b' ' | b'\t' | b'\r' | b'\n' if !bytes[name..at].starts_with(b"xmlns") => {
                at += 1;
                name = at;
            }
            _ => at += 1,
        }
    }
    tag
}

/// Where a document type ends that declares nothing, as entities are declared between brackets.
fn document_type(bytes: &[u8], tag: usize) -> Option<usize> {
    let mut at = tag + bytes[tag..].strip_prefix(b"!DOCTYPE").map(|_| "!DOCTYPE".len())?;
    loop {
        match bytes.get(at)? {
            b'>' => return Some(at + 1),
            b'[' | b'<' => return None,
            quote @ (b'"' | b'\'') => at += memchr(*quote, &bytes[at + 1..])? + 2,
            _ => at += 1,
        }
    }
}

fn behind(text: &str, from: usize, end: &str) -> Option<usize> {
    Some(from + text.get(from..)?.find(end)? + end.len())
}

fn memchr(byte: u8, within: &[u8]) -> Option<usize> {
    within.iter().position(|b| *b == byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { depth: 100, attributes: 100, namespaces: 100 };

    fn excess(text: &str, limits: Limits) -> Option<Excess> {
        scan(text, limits).excess
    }

    #[test]
    fn only_elements_count_towards_the_nesting() {
        for (text, deepest) in [
            ("", 0),
            ("text", 0),
            ("<a/>", 1),
            ("<?xml version='1.0'?><!-- <b> --><a><![CDATA[<b>]]><?pi <b>?></a>", 1),
            ("<a><b/><b></b><c d='>' e=\"/>\"><f/></c></a>", 3),
            ("<a><b></b></a>", 2),
            ("<a><b><c", 2),
            ("</a><a><b><c>", 0),
            ("<!DOCTYPE a><a><b>", 2),
            ("<!DOCTYPE a SYSTEM '>[' \"<\"><a><b>", 2),
            ("<!DOCTYPE a [<!ENTITY e ''>]><a><b>", 0),
        ] {
            // The third of `<a><b><c` is not a whole tag, but may become one.
            let deepest = deepest + usize::from(text.ends_with("<c"));
            assert_eq!(excess(text, Limits { depth: deepest, ..LIMITS }), None, "{text}");
            if deepest > 0 {
                assert!(excess(text, Limits { depth: deepest - 1, ..LIMITS }).is_some(), "{text}");
            }
        }
        assert_eq!(excess("<a>é<b/></a>", Limits { depth: 1, ..LIMITS }), Some(Excess::Depth(5)));
    }

    #[test]
    fn attributes_are_counted_for_each_element_and_namespaces_for_the_document() {
        let text = "<a b='1' c = \"'2'\"\n d='>'><e xmlns='u' f=''/><g xmlns:h = 'u'/></a>";
        assert_eq!(excess(text, Limits { attributes: 3, namespaces: 2, ..LIMITS }), None);
        assert_eq!(excess(text, Limits { attributes: 2, ..LIMITS }), Some(Excess::Attributes(0)));
        let second = text.find("<g").map(Excess::Namespaces);
        assert_eq!(excess(text, Limits { namespaces: 1, ..LIMITS }), second);
    }

    #[test]
    fn a_document_type_is_plain_if_none_declares_anything() {
        for (text, plain) in [
            ("<a/>", false),
            ("<!-- <!DOCTYPE a> --><a/>", false),
            ("<!DOCTYPE a><a/>", true),
            ("<!DOCTYPE a PUBLIC '[' \">\" ><a/>", true),
            ("<!DOCTYPE a []><a/>", false),
            ("<!DOCTYPE a [<!ENTITY e ''>]><a/>", false),
            ("<!DOCTYPE a><!DOCTYPE a [<!ENTITY e ''>]><a/>", false),
            ("<!DOCTYPE a", false),
        ] {
            assert_eq!(scan(text, LIMITS).plain_type, plain, "{text}");
        }
    }

    #[test]
    fn an_unclosed_element_is_found_at_the_end() {
        for (text, open) in [
            ("<a/>", None),
            ("<a></a>", None),
            ("<a><b></b>", Some(0)),
            ("<a><b", Some(3)),
            ("<a><b c='", Some(3)),
            ("<a><!-- b", Some(3)),
            ("<a>text", Some(0)),
            ("<a></a", Some(3)),
        ] {
            assert_eq!(scan(text, LIMITS).open, open, "{text}");
        }
    }
}
