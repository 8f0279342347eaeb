//! From the bytes of a file to text: which encoding it has, and what to do if it is not UTF-8.

use crate::code::Code;
use crate::diag::Diagnostics;
use crate::problems::Problems;

/// Bytes at the beginning of a file that tell whether it is text.
const LOOK: usize = 512;

/// The text of a document; an error that names the encoding it seems to have if it is not UTF-8.
///
/// ```
/// assert_eq!(nwfilter_xml::decode("web.xml", b"<filter/>")?, "<filter/>");
/// let latin1 = nwfilter_xml::decode("web.xml", b"<filter name='caf\xe9'/>").unwrap_err();
/// assert!(latin1.to_string().contains("iconv -f ISO-8859-1 -t UTF-8"));
/// # Ok::<(), nwfilter_xml::Diagnostics>(())
/// ```
pub fn decode<'b>(document: &str, bytes: &'b [u8]) -> Result<&'b str, Diagnostics> {
    if let Some(encoding) = wide_encoding(bytes) {
        let message = format!("the document is {encoding}, and only UTF-8 is read");
        return Err(refuse(document, "", Code::NotUtf8, 0, message, advice(encoding)));
    }
    let begins_as_xml = bytes.trim_ascii_start().starts_with(b"<");
    if let Some(at) = bytes.iter().take(LOOK).position(|byte| *byte == 0 && !begins_as_xml) {
        let message = format!("the document is no text: byte {} is zero", at + 1);
        let help = "name a file with a <filter>, <filterbinding> or <domain>".to_owned();
        return Err(refuse(document, "", Code::NotUtf8, 0, message, help));
    }
    std::str::from_utf8(bytes).map_err(|error| {
        let valid = error.valid_up_to();
        let text = String::from_utf8_lossy(&bytes[..(valid + 80).min(bytes.len())]);
        let byte = bytes.get(valid).copied().unwrap_or_default();
        if error.error_len().is_none() {
            let message = "the document ends inside a UTF-8 character";
            let help = "is the file complete?".to_owned();
            return refuse(document, &text, Code::EndsEarly, valid, message, help);
        }
        let declared = declared_encoding(&text[..valid]);
        let (encoding, why) = match declared {
            Some(declared) if !declared.eq_ignore_ascii_case("utf-8") => {
                (declared, "as its XML declaration says")
            }
            _ => ("ISO-8859-1", "as the bytes of most files are that are not UTF-8"),
        };
        let message = format!(
            "byte {byte:#04x} is not UTF-8: the document seems to be {encoding}, {why}, and only UTF-8 is read"
        );
        refuse(document, &text, Code::NotUtf8, valid, message, advice(encoding))
    })
}

fn refuse(
    document: &str,
    text: &str,
    code: Code,
    at: usize,
    message: impl Into<String>,
    help: String,
) -> Diagnostics {
    let mut problems = Problems::new(text);
    problems.error(code, at..at, message, Some(help));
    problems.into_diagnostics(document)
}

fn advice(encoding: &str) -> String {
    format!("convert it: iconv -f {encoding} -t UTF-8 FILE, and correct the encoding in its XML declaration")
}

/// The encoding of a text whose characters have two or four bytes, which its first bytes tell.
fn wide_encoding(bytes: &[u8]) -> Option<&'static str> {
    const SIGNS: [(&[u8], &str); 8] = [
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"<\0\0\0", "UTF-32LE"),
        (b"\0\0\0<", "UTF-32BE"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
        (b"<\0", "UTF-16LE"),
        (b"\0<", "UTF-16BE"),
    ];
    SIGNS.iter().find(|(sign, _)| bytes.starts_with(sign)).map(|(_, encoding)| *encoding)
}

/// What `<?xml … encoding='…'?>` says.
fn declared_encoding(text: &str) -> Option<&str> {
    let declaration = text.trim_start_matches('\u{feff}').strip_prefix("<?xml")?.split_once("?>")?.0;
    let value = declaration.split_once("encoding")?.1.trim_start().strip_prefix('=')?.trim_start();
    let quote = value.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let name = value[1..].split_once(quote)?.0;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.:-".contains(&b);
    (!name.is_empty() && name.len() <= 40 && name.bytes().all(plain)).then_some(name)
}

#[cfg(test)]
#[allow(clippy::expect_used)] // A test fails by panicking.
mod tests {
    use super::*;

    fn refused(bytes: &[u8]) -> String {
        decode("f.xml", bytes).map_err(|refused| refused.to_string()).expect_err("it is not UTF-8")
    }

    #[test]
    fn a_document_in_another_encoding_is_refused_with_its_name_and_how_to_convert_it() {
        let text = "<filter name='café'/>";
        let utf16: Vec<u8> =
            [0xff, 0xfe].into_iter().chain(text.encode_utf16().flat_map(u16::to_le_bytes)).collect();
        for bytes in [&utf16[..], &utf16[2..]] {
            let shown = refused(bytes);
            assert!(shown.starts_with("f.xml:1:1: error[NWF0009]: the document is UTF-16"), "{shown}");
            assert!(shown.contains("iconv -f UTF-16"), "{shown}");
        }
        let shown = refused(b"<?xml version='1.0' encoding='windows-1252'?>\n<filter name='caf\xe9'/>");
        assert!(shown.starts_with("f.xml:2:18: error[NWF0009]: byte 0xe9 is not UTF-8"), "{shown}");
        assert!(shown.contains("iconv -f windows-1252"), "{shown}");
        assert!(refused(b"<filter name='caf\xe9'/>").contains("iconv -f ISO-8859-1"));
        assert!(refused(b"<filter name='caf\xc3").contains("ends inside a UTF-8 character"));
    }

    #[test]
    fn utf_8_is_read_with_and_without_a_byte_order_mark() {
        for text in ["", "<filter name='café'/>", "\u{feff}<filter/>"] {
            assert_eq!(decode("f.xml", text.as_bytes()), Ok(text));
        }
    }
}
