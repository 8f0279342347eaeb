//! Netlink messages as bytes: writing messages and attributes, and reading them.

use netlink_packet_core::{NLA_F_NESTED, NLA_HEADER_SIZE, NlasIterator};

use super::error::Error;

/// Bytes of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;
/// Bytes of `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
/// The version in it, `NFNETLINK_V0`.
const VERSION: u8 = 0;
/// The most that a message, and an attribute, can hold beside its header. An attribute counts itself in 16 bits.
pub(super) const ATTRIBUTE_MAX: usize = u16::MAX as usize - NLA_HEADER_SIZE;

/// Messages that are written one behind the other.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    /// Whether an attribute became longer than it can say.
    overflowed: bool,
}

/// What stands before the attributes of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// Subsystem and message type.
    pub(super) kind: u16,
    /// `NLM_F_*`
    pub(super) flags: u16,
    /// The sequence number.
    pub(super) sequence: u32,
    /// `NFPROTO_*`
    pub(super) family: u8,
    /// `nfgenmsg.res_id`, in the host's byte order.
    pub(super) resource: u16,
}

impl Writer {
    /// The bytes that were written.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether an attribute became too long since this was last asked.
    pub(super) fn take_overflow(&mut self) -> bool {
        std::mem::take(&mut self.overflowed)
    }

    /// Sets bits of a number of two bytes in the host's byte order.
    pub(super) fn set_u16_bits(&mut self, at: usize, bits: u16) {
        let number = u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]]) | bits;
        self.bytes[at..at + 2].copy_from_slice(&number.to_ne_bytes());
    }

    /// Forgets what was written from a place on.
    pub(super) fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    /// Writes a message.
    pub(super) fn message(&mut self, head: Head, attributes: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(head.kind.to_ne_bytes());
        self.bytes.extend(head.flags.to_ne_bytes());
        self.bytes.extend(head.sequence.to_ne_bytes());
        // The sender, which the kernel knows.
        self.bytes.extend([0; 4]);
        self.bytes.extend([head.family, VERSION]);
        self.bytes.extend(head.resource.to_be_bytes());
        attributes(self);
        let len = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Writes an attribute.
    pub(super) fn put(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |writer| writer.bytes.extend(value));
    }

    /// Writes attributes that are written already.
    pub(super) fn raw(&mut self, attributes: &[u8]) {
        self.bytes.extend(attributes);
    }

    /// Writes a number of one byte.
    pub(super) fn put_u8(&mut self, kind: u16, value: u8) {
        self.put(kind, &[value]);
    }

    /// Writes a number in network byte order.
    pub(super) fn put_u16(&mut self, kind: u16, value: u16) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Writes a number in network byte order.
    pub(super) fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Writes a number in network byte order.
    pub(super) fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Writes text and the NUL behind it.
    pub(super) fn put_str(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |writer| {
            writer.bytes.extend(value.as_bytes());
            writer.bytes.push(0);
        });
    }

    /// Writes an attribute of attributes.
    pub(super) fn nest(&mut self, kind: u16, attributes: impl FnOnce(&mut Self)) {
        self.attribute(kind | NLA_F_NESTED, attributes);
    }

    fn attribute(&mut self, kind: u16, value: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        value(self);
        let len = u16::try_from(self.bytes.len() - start).unwrap_or_else(|_| {
            self.overflowed = true;
            0
        });
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A message that was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    /// Subsystem and message type.
    pub(super) kind: u16,
    /// `NLM_F_*`
    pub(super) flags: u16,
    /// The sequence number of what it answers.
    pub(super) sequence: u32,
    /// The netlink port of whoever caused it.
    pub(super) port: u32,
    /// What stands behind the header.
    pub(super) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The family and the attributes of a message of nf_tables.
    pub(super) fn family(&self) -> Result<(u8, Attributes<'a>), Error> {
        let (head, attributes) =
            self.payload.split_at_checked(FAMILY_HEADER).ok_or_else(|| malformed("a message is cut"))?;
        Ok((head[0], Attributes(attributes)))
    }
}

/// The messages of a datagram.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Error>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let read = message(datagram);
        match &read {
            Ok((_, len)) => datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default(),
            Err(_) => datagram = &[],
        }
        Some(read.map(|(message, _)| message))
    })
}

fn message(bytes: &[u8]) -> Result<(Message<'_>, usize), Error> {
    let cut = || malformed("a message is cut");
    let len = ne_u32(bytes, 0).ok_or_else(cut)? as usize;
    let payload = bytes.get(HEADER..len).ok_or_else(cut)?;
    let kind_and_flags = bytes.get(4..8).ok_or_else(cut)?;
    Ok((
        Message {
            kind: u16::from_ne_bytes([kind_and_flags[0], kind_and_flags[1]]),
            flags: u16::from_ne_bytes([kind_and_flags[2], kind_and_flags[3]]),
            sequence: ne_u32(bytes, 8).ok_or_else(cut)?,
            port: ne_u32(bytes, 12).ok_or_else(cut)?,
            payload,
        },
        len,
    ))
}

/// A number in the host's byte order.
pub(super) fn ne_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// The kernel's answer is not as it should be.
pub(super) fn malformed(what: impl Into<String>) -> Error {
    Error::Malformed(what.into())
}

/// Attributes that were read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Attributes<'a> {
    /// Each kind and value. What is cut ends them.
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        NlasIterator::new(self.0).map_while(|attribute| {
            let attribute = attribute.ok()?;
            let (kind, len) = (attribute.kind(), usize::from(attribute.length()));
            Some((kind, attribute.into_inner().get(NLA_HEADER_SIZE..len)?))
        })
    }

    /// The value of the first attribute of a kind.
    pub(super) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The attributes in one.
    pub(super) fn nested(self, kind: u16) -> Option<Attributes<'a>> {
        self.get(kind).map(Attributes)
    }

    /// The attributes in each of a kind.
    pub(super) fn all(self, kind: u16) -> impl Iterator<Item = Attributes<'a>> {
        self.iter().filter(move |(found, _)| *found == kind).map(|(_, value)| Attributes(value))
    }

    /// A number.
    pub(super) fn u8(self, kind: u16) -> Option<u8> {
        self.get(kind)?.first().copied()
    }

    /// A number in network byte order.
    pub(super) fn u16(self, kind: u16) -> Option<u16> {
        self.get(kind)?.get(..2)?.try_into().ok().map(u16::from_be_bytes)
    }

    /// A number in network byte order.
    pub(super) fn u32(self, kind: u16) -> Option<u32> {
        self.get(kind)?.get(..4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A number in network byte order.
    pub(super) fn u64(self, kind: u16) -> Option<u64> {
        self.get(kind)?.get(..8)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// Text, without the NUL behind it.
    pub(super) fn str(self, kind: u16) -> Option<&'a str> {
        let value = self.get(kind)?;
        let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
        std::str::from_utf8(&value[..end]).ok()
    }

    /// A number that must be there.
    pub(super) fn need_u32(self, kind: u16, what: &str) -> Result<u32, Error> {
        self.u32(kind).ok_or_else(|| missing(what))
    }

    /// Text that must be there and must be read as a name.
    pub(super) fn name<T: std::str::FromStr>(self, kind: u16, what: &str) -> Result<T, Error> {
        let text = self.str(kind).ok_or_else(|| missing(what))?;
        text.parse().map_err(|_| malformed(format!("{what} '{text}'")))
    }
}

/// Something that must be there is not.
pub(super) fn missing(what: &str) -> Error {
    malformed(format!("no {what}"))
}
