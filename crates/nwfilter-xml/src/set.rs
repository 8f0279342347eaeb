//! Live sets: named groups of addresses, MAC addresses or ports that rules of many filters share.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::Error;
use crate::names::{MacAddr, string_newtype};
use crate::text::serde_as_text;

/// Most entries that a set may have, those of the sets that it includes and of its tags among them.
pub const MAX_SET_ENTRIES: usize = 262_144;
/// Largest `<filterset>` document that is read, in bytes.
pub const MAX_SET_BYTES: usize = 64 << 20;
/// Bytes that a comment of an entry may have.
pub const MAX_SET_COMMENT: usize = 256;
/// Bytes a set's name may have. Names of the kernel's own sets have at most 31, of which some say whose they are.
const NAME_MAX: usize = 22;
/// Bytes a tag may have.
const TAG_MAX: usize = 64;

string_newtype! {
    /// The name of a set: a letter, then up to 21 of `[a-zA-Z0-9_-]`.
    SetName
}

string_newtype! {
    /// What ports are marked with, so that sets may hold the addresses of all that have it: 1 to 64 of `[a-zA-Z0-9_.]`.
    Tag
}

impl FromStr for SetName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why| Error::name("set name", text, why);
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        match text {
            "" => Err(wrong("it is empty")),
            _ if text.len() > NAME_MAX => Err(wrong("it is longer than 22 characters")),
            _ if !text.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                Err(wrong("it does not start with a letter"))
            }
            _ if !text.chars().all(allowed) => Err(wrong("only [a-zA-Z0-9_-] are allowed")),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

impl FromStr for Tag {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why| Error::name("tag", text, why);
        match text {
            "" => Err(wrong("it is empty")),
            _ if text.len() > TAG_MAX => Err(wrong("it is longer than 64 characters")),
            _ if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.".contains(&b)) => {
                Err(wrong("only [a-zA-Z0-9_.] are allowed"))
            }
            _ => Ok(Self(text.to_owned())),
        }
    }
}

/// What a set holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetFamily {
    /// IPv4 addresses.
    Ipv4,
    /// IPv6 addresses.
    Ipv6,
    /// MAC addresses.
    Mac,
    /// Ports of TCP and UDP.
    Port,
}

impl SetFamily {
    /// Every family and its name.
    pub const NAMES: [(SetFamily, &'static str); 4] = [
        (SetFamily::Ipv4, "ipv4"),
        (SetFamily::Ipv6, "ipv6"),
        (SetFamily::Mac, "mac"),
        (SetFamily::Port, "port"),
    ];

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            SetFamily::Ipv4 => 4,
            SetFamily::Ipv6 => 16,
            SetFamily::Mac => 6,
            SetFamily::Port => 2,
        }
    }

    /// The highest value.
    pub fn highest(self) -> u128 {
        u128::MAX >> (128 - 8 * self.bytes())
    }

    /// What an entry looks like, for messages and documentation.
    pub fn expected(self) -> &'static str {
        match self {
            SetFamily::Ipv4 => {
                "an IPv4 address, a network or a range: 10.0.0.1, 10.1.0.0/16 or 10.0.0.1-10.0.0.9"
            }
            SetFamily::Ipv6 => {
                "an IPv6 address, a network or a range: fd00::1, fd00:1::/32 or fd00::1-fd00::9"
            }
            SetFamily::Mac => "a MAC address: 52:54:00:12:34:56",
            SetFamily::Port => "a port or a range: 80 or 8000-8080",
        }
    }

    /// What its values are, in the plural.
    pub fn holds(self) -> &'static str {
        match self {
            SetFamily::Ipv4 => "IPv4 addresses",
            SetFamily::Ipv6 => "IPv6 addresses",
            SetFamily::Mac => "MAC addresses",
            SetFamily::Port => "ports",
        }
    }
}

impl fmt::Display for SetFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES.iter().find(|(family, _)| family == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for SetFamily {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let row = Self::NAMES.iter().find(|(_, name)| *name == text);
        row.map(|(family, _)| *family)
            .ok_or_else(|| Error::name("family of a set", text, "expected ipv4, ipv6, mac or port"))
    }
}

serde_as_text!(SetName, Tag, SetFamily);

/// Values of one family from the first to the last, both included, as numbers in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetRange {
    family: SetFamily,
    first: u128,
    last: u128,
}

/// Why a text is no entry of a set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadSetEntry(String);

impl SetRange {
    /// The values from the first to the last; `None` where there are none, or not of this family.
    pub fn new(family: SetFamily, first: u128, last: u128) -> Option<Self> {
        (first <= last && last <= family.highest()).then_some(Self { family, first, last })
    }

    /// One IP address.
    pub fn of_ip(addr: IpAddr) -> Self {
        let (family, value) = match addr {
            IpAddr::V4(addr) => (SetFamily::Ipv4, u128::from(u32::from(addr))),
            IpAddr::V6(addr) => (SetFamily::Ipv6, u128::from(addr)),
        };
        Self { family, first: value, last: value }
    }

    /// One MAC address.
    pub fn of_mac(addr: MacAddr) -> Self {
        let value = addr.0.iter().fold(0, |value, byte| value << 8 | u128::from(*byte));
        Self { family: SetFamily::Mac, first: value, last: value }
    }

    /// Reads an entry of a family as it is written in a document.
    ///
    /// ```
    /// use nwfilter_xml::{SetFamily, SetRange};
    ///
    /// let network = SetRange::parse(SetFamily::Ipv4, "10.1.0.0/16")?;
    /// assert_eq!(network, SetRange::parse(SetFamily::Ipv4, "10.1.0.0-10.1.255.255")?);
    /// let wrong = SetRange::parse(SetFamily::Ipv4, "10.1.0.1/16").unwrap_err();
    /// assert_eq!(wrong.to_string(), "'10.1.0.1/16' is not the address of its network: write 10.1.0.0/16");
    /// # Ok::<(), nwfilter_xml::BadSetEntry>(())
    /// ```
    pub fn parse(family: SetFamily, text: &str) -> Result<Self, BadSetEntry> {
        let shown: String = text.chars().take(80).collect::<String>().escape_debug().to_string();
        let wrong =
            || BadSetEntry(format!("'{shown}' is no entry of this set: expected {}", family.expected()));
        let is_ip = matches!(family, SetFamily::Ipv4 | SetFamily::Ipv6);
        if let (true, Some((addr, prefix))) = (is_ip, text.split_once('/')) {
            let first = value(family, addr).ok_or_else(wrong)?;
            let bits = 8 * family.bytes() as u32;
            let is_number = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
            let prefix: u32 = prefix.parse().ok().filter(|n| is_number && *n <= bits).ok_or_else(wrong)?;
            let host = if prefix == bits { 0 } else { u128::MAX >> (128 - (bits - prefix)) };
            if first & host != 0 {
                let network = Shown(family, first & !host);
                let message =
                    format!("'{shown}' is not the address of its network: write {network}/{prefix}");
                return Err(BadSetEntry(message));
            }
            return Ok(Self { family, first, last: first | host });
        }
        if let (true, Some((from, to))) = (family != SetFamily::Mac, text.split_once('-')) {
            let (first, last) =
                (value(family, from).ok_or_else(wrong)?, value(family, to).ok_or_else(wrong)?);
            let backwards = || BadSetEntry(format!("the range '{shown}' ends before it begins"));
            return Self::new(family, first, last).ok_or_else(backwards);
        }
        let only = value(family, text).ok_or_else(wrong)?;
        Ok(Self { family, first: only, last: only })
    }

    /// What the values are.
    pub fn family(self) -> SetFamily {
        self.family
    }

    /// The first value.
    pub fn first(self) -> u128 {
        self.first
    }

    /// The last value.
    pub fn last(self) -> u128 {
        self.last
    }

    /// The values of both, where they overlap or touch and the other does not begin before this.
    pub fn joined_with(self, next: Self) -> Option<Self> {
        let touches = next.first >= self.first && next.first <= self.last.saturating_add(1);
        (self.family == next.family && touches).then_some(Self { last: self.last.max(next.last), ..self })
    }

    /// Whether all values of another range are in it.
    pub fn covers(self, other: Self) -> bool {
        self.family == other.family && self.first <= other.first && other.last <= self.last
    }
}

/// One value as a number, without the laxness of other places: no leading zeros, no white space.
fn value(family: SetFamily, text: &str) -> Option<u128> {
    match family {
        SetFamily::Ipv4 => text.parse::<Ipv4Addr>().ok().map(|addr| u128::from(u32::from(addr))),
        SetFamily::Ipv6 => text.parse::<Ipv6Addr>().ok().map(u128::from),
        SetFamily::Mac => text.parse().ok().map(|addr| SetRange::of_mac(addr).first),
        SetFamily::Port => {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u16>().ok().filter(|_| digits).map(u128::from)
        }
    }
}

/// One value as it is written.
struct Shown(SetFamily, u128);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shown(family, value) = *self;
        match family {
            // A value of a family is not higher than its highest.
            SetFamily::Ipv4 => Ipv4Addr::from(value as u32).fmt(f),
            SetFamily::Ipv6 => Ipv6Addr::from(value).fmt(f),
            SetFamily::Mac => {
                let [_, _, a, b, c, d, e, g] = (value as u64).to_be_bytes();
                MacAddr([a, b, c, d, e, g]).fmt(f)
            }
            SetFamily::Port => (value as u16).fmt(f),
        }
    }
}

/// As in a document: an address, a network where the range is one, else a range.
impl fmt::Display for SetRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, first, last } = *self;
        let shown = |value| Shown(family, value);
        if first == last {
            return shown(first).fmt(f);
        }
        let host = first ^ last;
        let is_network = matches!(family, SetFamily::Ipv4 | SetFamily::Ipv6)
            && host & host.wrapping_add(1) == 0
            && first & host == 0;
        if is_network {
            let prefix = 8 * family.bytes() as u32 - host.count_ones();
            write!(f, "{}/{prefix}", shown(first))
        } else {
            write!(f, "{}-{}", shown(first), shown(last))
        }
    }
}

impl fmt::Debug for SetRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for SetRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A `<filterset>` document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FilterSet {
    /// Its name, unique in a store.
    pub name: SetName,
    /// What it holds.
    pub family: SetFamily,
    /// What it holds by itself, in document order; each range once.
    pub entries: Vec<SetEntry>,
    /// The sets of the same family whose content it holds, too; sorted, each once.
    pub includes: Vec<SetName>,
    /// The tags whose ports' addresses it holds, too; sorted, each once.
    pub tags: Vec<Tag>,
}

/// An `<entry>` of a set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SetEntry {
    /// The values.
    #[serde(rename = "value")]
    pub range: SetRange,
    /// What people say of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

impl From<SetRange> for SetEntry {
    fn from(range: SetRange) -> Self {
        Self { range, comment: None }
    }
}

impl FilterSet {
    /// A set that holds nothing.
    pub fn empty(name: SetName, family: SetFamily) -> Self {
        Self { name, family, entries: Vec::new(), includes: Vec::new(), tags: Vec::new() }
    }

    /// Reads entries from lines of text: one a line, comments from `#` on and blank lines left out. `document` names the
    /// text in errors, which say the line.
    pub fn read_entries(family: SetFamily, document: &str, text: &str) -> Result<Vec<SetEntry>, BadSetEntry> {
        let mut entries = Vec::new();
        if text.len() > MAX_SET_BYTES {
            return Err(BadSetEntry(format!("{document}: has more than {MAX_SET_BYTES} bytes")));
        }
        for (number, line) in (1..).zip(text.lines()) {
            let (value, comment) = line.split_once('#').unwrap_or((line, ""));
            let (value, comment) = (value.trim(), comment.trim());
            if value.is_empty() {
                continue;
            }
            let at = |why: &dyn fmt::Display| BadSetEntry(format!("{document}:{number}: {why}"));
            if entries.len() == MAX_SET_ENTRIES {
                return Err(at(&format_args!("a set has at most {MAX_SET_ENTRIES} entries")));
            }
            let range = SetRange::parse(family, value).map_err(|why| at(&why))?;
            let comment = Some(comment).filter(|comment| !comment.is_empty());
            if comment.is_some_and(|comment| !is_comment(comment)) {
                return Err(at(&format_args!("{COMMENT}")));
            }
            entries.push(SetEntry { range, comment: comment.map(str::to_owned) });
        }
        Ok(entries)
    }
}

/// What a comment may be, for messages.
pub(crate) const COMMENT: &str = "a comment has at most 256 bytes and no control characters";

/// Whether a text can be the comment of an entry.
pub(crate) fn is_comment(text: &str) -> bool {
    text.len() <= MAX_SET_COMMENT
        && !text.chars().any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by panicking.
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_written_in_its_shortest_form_and_read_back() {
        for (family, text, written) in [
            (SetFamily::Ipv4, "10.0.0.1", "10.0.0.1"),
            (SetFamily::Ipv4, "10.0.0.1/32", "10.0.0.1"),
            (SetFamily::Ipv4, "10.0.0.0-10.0.0.255", "10.0.0.0/24"),
            (SetFamily::Ipv4, "10.0.0.1-10.0.0.2", "10.0.0.1-10.0.0.2"),
            (SetFamily::Ipv4, "0.0.0.0/0", "0.0.0.0/0"),
            (SetFamily::Ipv6, "::/0", "::/0"),
            (SetFamily::Ipv6, "FD00:0:0::1/128", "fd00::1"),
            (SetFamily::Ipv6, "fd00::/15", "fd00::/15"),
            (SetFamily::Mac, "52:54:0:1:2:A", "52:54:00:01:02:0a"),
            (SetFamily::Port, "80", "80"),
            (SetFamily::Port, "0-65535", "0-65535"),
        ] {
            let range = SetRange::parse(family, text).unwrap();
            assert_eq!(range.to_string(), written);
            assert_eq!(SetRange::parse(family, written).unwrap(), range);
        }
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        let of = |family, texts: &[&str]| {
            for text in texts {
                let why = SetRange::parse(family, text).unwrap_err().to_string();
                assert!(why.contains(&*text.escape_debug().to_string()) || text.is_empty(), "{why}");
            }
        };
        of(
            SetFamily::Ipv4,
            &[
                "",
                "10.0.0",
                "010.0.0.1",
                "10.0.0.1/33",
                "10.0.0.1/+8",
                "10.0.0.0/",
                "10.0.0.9-10.0.0.1",
                "fd00::1",
            ],
        );
        of(SetFamily::Ipv6, &["10.0.0.1", "fd00::1%eth0", "fd00::1/64", "::/129", "\u{1}"]);
        of(SetFamily::Mac, &["52:54:00", "52:54:00:00:00:01-52:54:00:00:00:02", "525400123456"]);
        of(SetFamily::Port, &["65536", "+80", "http", "80-70", "80/90"]);
    }

    #[test]
    fn lines_of_text_are_entries_with_comments() {
        let text = "# office\n10.0.0.1\n\n  10.1.0.0/16 # branch\n";
        let entries = FilterSet::read_entries(SetFamily::Ipv4, "a.txt", text).unwrap();
        let shown: Vec<_> = entries.iter().map(|e| (e.range.to_string(), e.comment.as_deref())).collect();
        assert_eq!(shown, [("10.0.0.1".to_owned(), None), ("10.1.0.0/16".to_owned(), Some("branch"))]);
        let wrong = FilterSet::read_entries(SetFamily::Ipv4, "a.txt", "10.0.0.1\nfd00::1").unwrap_err();
        assert!(wrong.to_string().starts_with("a.txt:2: 'fd00::1' is no entry"), "{wrong}");
    }
}
