//! Finds elements that are nested too deep, before the XML parser, which recurses, gets to them.

/// Where the first element starts that is nested deeper than `limit`.
///
/// The scan follows the grammar as far as the parser does: what it misreads, behind the first syntax error, the parser
/// does not reach.
pub(crate) fn too_deep(text: &str, limit: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut depth = 0;
    let mut at = 0;
    loop {
        let start = at + memchr(b'<', &bytes[at..])?;
        let tag = start + 1;
        at = match bytes.get(tag)? {
            b'!' if bytes[tag..].starts_with(b"!--") => behind(text, tag + 3, "-->")?,
            b'!' if bytes[tag..].starts_with(b"![CDATA[") => behind(text, tag + 8, "]]>")?,
            b'?' => behind(text, tag + 1, "?>")?,
            b'!' => return None,
            b'/' => {
                depth = usize::checked_sub(depth, 1)?;
                tag + memchr(b'>', &bytes[tag..])? + 1
            }
            _ => {
                let end = end_of_tag(bytes, tag)?;
                if depth == limit {
                    return Some(start);
                }
                depth += usize::from(bytes[end - 1] != b'/');
                end + 1
            }
        };
    }
}

/// Where the `>` is that ends a start tag; one in a quoted value does not.
fn end_of_tag(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match bytes.get(at)? {
            b'>' => return Some(at),
            quote @ (b'"' | b'\'') => at += memchr(*quote, &bytes[at + 1..])? + 2,
            _ => at += 1,
        }
    }
}

fn behind(text: &str, from: usize, end: &str) -> Option<usize> {
    Some(from + text[from..].find(end)? + end.len())
}

fn memchr(byte: u8, within: &[u8]) -> Option<usize> {
    within.iter().position(|b| *b == byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_elements_nest() {
        for (text, deepest) in [
            ("", 0),
            ("text", 0),
            ("<a/>", 1),
            ("<?xml version='1.0'?><!-- <b> --><a><![CDATA[<b>]]><?pi <b>?></a>", 1),
            ("<a><b/><b></b><c d='>' e=\"/>\"><f/></c></a>", 3),
            ("<a><b></b></a>", 2),
            ("<a><b><c", 2),
            ("</a><a><b><c>", 0),
            ("<!DOCTYPE a><a><b>", 0),
        ] {
            assert_eq!(too_deep(text, deepest), None, "{text}");
            assert!(deepest == 0 || too_deep(text, deepest - 1).is_some(), "{text}");
        }
        assert_eq!(too_deep("<a>é<b/></a>", 1), Some(5));
    }
}
