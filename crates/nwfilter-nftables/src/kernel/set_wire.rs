//! Sets and their elements as the kernel takes and shows them.

use nix::libc;

use super::error::Error;
use super::expr::Order;
use super::expr_wire::{
    Data, LIST_ELEM, need_value, object_kind, put_stateful, put_value, put_verdict, read_data,
    read_object_kind, read_stateful,
};
use super::installed::{Count, InstalledElement};
use super::set::{Datatype, Element, ElementKey, ElementValue, MapData, Set, SetFlags};
use super::udata::{self, ByteOrder};
use super::wire::{Attributes, Writer, malformed};

/// `NFTA_SET_TABLE`
pub(super) const SET_TABLE: u16 = 1;
/// `NFTA_SET_NAME`
pub(super) const SET_NAME: u16 = 2;
/// `NFTA_SET_FLAGS`
const SET_FLAGS: u16 = 3;
/// `NFTA_SET_KEY_TYPE`
const SET_KEY_TYPE: u16 = 4;
/// `NFTA_SET_KEY_LEN`
const SET_KEY_LEN: u16 = 5;
/// `NFTA_SET_DATA_TYPE`
const SET_DATA_TYPE: u16 = 6;
/// `NFTA_SET_DATA_LEN`
const SET_DATA_LEN: u16 = 7;
/// `NFTA_SET_DESC`
const SET_DESC: u16 = 9;
/// `NFTA_SET_DESC_SIZE`
const SET_DESC_SIZE: u16 = 1;
/// `NFTA_SET_DESC_CONCAT`
const SET_DESC_CONCAT: u16 = 2;
/// `NFTA_SET_FIELD_LEN`
const SET_FIELD_LEN: u16 = 1;
/// `NFTA_SET_ID`
const SET_ID: u16 = 10;
/// `NFTA_SET_TIMEOUT`
const SET_TIMEOUT: u16 = 11;
/// `NFTA_SET_USERDATA`
const SET_USERDATA: u16 = 13;
/// `NFTA_SET_OBJ_TYPE`
const SET_OBJ_TYPE: u16 = 15;
/// `NFTA_SET_EXPR`
const SET_EXPR: u16 = 17;
/// `NFTA_SET_EXPRESSIONS`
const SET_EXPRESSIONS: u16 = 18;

/// `NFT_SET_OBJECT`
const F_OBJECT: u32 = 0x40;
/// `NFT_SET_CONCAT`
const F_CONCAT: u32 = 0x80;
/// `NFT_SET_EXPR`
const F_EXPRESSIONS: u32 = 0x100;
const F_CONSTANT: u32 = libc::NFT_SET_CONSTANT as u32;
const F_INTERVAL: u32 = libc::NFT_SET_INTERVAL as u32;
const F_MAP: u32 = libc::NFT_SET_MAP as u32;
const F_TIMEOUT: u32 = libc::NFT_SET_TIMEOUT as u32;
const F_EVAL: u32 = libc::NFT_SET_EVAL as u32;

/// `NFTA_SET_ELEM_LIST_TABLE`
pub(super) const LIST_TABLE: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`
pub(super) const LIST_SET: u16 = 2;
/// `NFTA_SET_ELEM_LIST_ELEMENTS`
pub(super) const LIST_ELEMENTS: u16 = 3;

/// `NFTA_SET_ELEM_KEY`
const ELEM_KEY: u16 = 1;
/// `NFTA_SET_ELEM_DATA`
const ELEM_DATA: u16 = 2;
/// `NFTA_SET_ELEM_FLAGS`
const ELEM_FLAGS: u16 = 3;
/// `NFTA_SET_ELEM_TIMEOUT`
const ELEM_TIMEOUT: u16 = 4;
/// `NFTA_SET_ELEM_EXPIRATION`
const ELEM_EXPIRATION: u16 = 5;
/// `NFTA_SET_ELEM_USERDATA`
const ELEM_USERDATA: u16 = 6;
/// `NFTA_SET_ELEM_EXPR`
const ELEM_EXPR: u16 = 7;
/// `NFTA_SET_ELEM_OBJREF`
const ELEM_OBJREF: u16 = 9;
/// `NFTA_SET_ELEM_KEY_END`
const ELEM_KEY_END: u16 = 10;
/// `NFTA_SET_ELEM_EXPRESSIONS`
const ELEM_EXPRESSIONS: u16 = 11;

/// Bits that nft has for the type of a field in a concatenation, `TYPE_BITS`.
const TYPE_BITS: u32 = 6;
/// `TYPE_INTEGER`
const INTEGER: u32 = 4;

/// nft's numbers of types, `enum datatypes`.
const DATATYPES: &[(Datatype, u32)] = &[
    (Datatype::Ipv4Addr, 7),
    (Datatype::Ipv6Addr, 8),
    (Datatype::EtherAddr, 9),
    (Datatype::EtherType, 10),
    (Datatype::ArpOp, 11),
    (Datatype::InetProto, 12),
    (Datatype::InetService, 13),
    (Datatype::IcmpType, 14),
    (Datatype::Mark, 19),
    (Datatype::Icmpv6Type, 29),
    (Datatype::Ifname, 41),
];

fn datatype_number(datatype: Datatype) -> u32 {
    match datatype {
        Datatype::Other { id, .. } => id,
        Datatype::Integer { .. } => INTEGER,
        named => DATATYPES.iter().find(|(known, _)| *known == named).map_or(INTEGER, |(_, id)| *id),
    }
}

fn read_datatype(id: u32, len: u32) -> Datatype {
    let known = DATATYPES.iter().find(|(datatype, known)| *known == id && datatype.len() == len as usize);
    match known {
        Some((datatype, _)) => *datatype,
        None if id == INTEGER => Datatype::Integer { len },
        None => Datatype::Other { id, len },
    }
}

fn byte_order(fields: &[Datatype]) -> ByteOrder {
    match fields {
        [field] if field.order() == Order::Host => ByteOrder::Host,
        [_] => ByteOrder::Big,
        _ => ByteOrder::None,
    }
}

fn flags(set: &Set) -> u32 {
    let concatenated = set.key.len() > 1;
    let map = match set.data {
        None => 0,
        Some(MapData::Object(_)) => F_OBJECT,
        Some(_) => F_MAP,
    };
    let bits = [
        (set.flags.constant, F_CONSTANT),
        (set.flags.interval, F_INTERVAL),
        (set.flags.timeout || set.timeout.is_some(), F_TIMEOUT),
        (set.flags.dynamic, F_EVAL),
        (set.flags.interval && concatenated, F_CONCAT),
        (set.stateful.len() > 1, F_EXPRESSIONS),
    ];
    bits.iter().filter(|(set, _)| *set).fold(map, |flags, (_, bit)| flags | bit)
}

/// The attributes of a new set behind its table. `id` is a number for it in its transaction.
pub(super) fn put_set(w: &mut Writer, set: &Set, id: u32) {
    w.put_str(SET_NAME, set.name.as_str());
    w.put_u32(SET_FLAGS, flags(set));
    let key_type = set.key.iter().fold(0u32, |id, field| id << TYPE_BITS | datatype_number(*field));
    w.put_u32(SET_KEY_TYPE, key_type);
    w.put_u32(SET_KEY_LEN, set.key_len() as u32);
    let value = match set.data {
        None => None,
        Some(MapData::Verdict) => {
            w.put_u32(SET_DATA_TYPE, libc::NFT_DATA_VERDICT);
            w.put_u32(SET_DATA_LEN, 0);
            Some(ByteOrder::None)
        }
        Some(MapData::Value(datatype)) => {
            w.put_u32(SET_DATA_TYPE, datatype_number(datatype));
            w.put_u32(SET_DATA_LEN, datatype.len() as u32);
            Some(byte_order(&[datatype]))
        }
        Some(MapData::Object(kind)) => {
            w.put_u32(SET_OBJ_TYPE, object_kind(kind));
            None
        }
    };
    w.put_u32(SET_ID, id);
    let ranges = set.flags.interval && set.key.len() > 1;
    if ranges || set.size.is_some() {
        w.nest(SET_DESC, |w| {
            if let Some(size) = set.size {
                w.put_u32(SET_DESC_SIZE, size);
            }
            if ranges {
                w.nest(SET_DESC_CONCAT, |w| {
                    for field in &set.key {
                        w.nest(LIST_ELEM, |w| w.put_u32(SET_FIELD_LEN, field.len() as u32));
                    }
                });
            }
        });
    }
    if let Some(timeout) = set.timeout {
        w.put_u64(SET_TIMEOUT, timeout);
    }
    w.put(SET_USERDATA, &udata::of_set(byte_order(&set.key), value, set.comment.as_ref()));
    match &*set.stateful {
        [] => {}
        [one] => put_stateful(w, SET_EXPR, *one),
        several => {
            w.nest(SET_EXPRESSIONS, |w| several.iter().for_each(|one| put_stateful(w, LIST_ELEM, *one)))
        }
    }
}

/// Reads a set; `None` for one that only a rule has.
pub(super) fn read_set(set: Attributes<'_>) -> Result<Option<Set>, Error> {
    let flags = set.u32(SET_FLAGS).unwrap_or(0);
    if flags & libc::NFT_SET_ANONYMOUS as u32 != 0 {
        return Ok(None);
    }
    let desc = set.nested(SET_DESC).unwrap_or(Attributes(&[]));
    let data = if flags & F_OBJECT != 0 {
        set.u32(SET_OBJ_TYPE).and_then(read_object_kind).map(MapData::Object)
    } else if flags & F_MAP != 0 {
        Some(match set.need_u32(SET_DATA_TYPE, "type of a map")? {
            libc::NFT_DATA_VERDICT => MapData::Verdict,
            id => MapData::Value(read_datatype(id, set.need_u32(SET_DATA_LEN, "length of a map's values")?)),
        })
    } else {
        None
    };
    let mut counts = Vec::new();
    let one = set.nested(SET_EXPR).into_iter();
    let several = set.nested(SET_EXPRESSIONS).unwrap_or(Attributes(&[])).all(LIST_ELEM);
    let timeout = set.u64(SET_TIMEOUT);
    Ok(Some(Set {
        name: set.name(SET_NAME, "set")?,
        key: read_key(set)?,
        data,
        flags: SetFlags {
            interval: flags & F_INTERVAL != 0,
            constant: flags & F_CONSTANT != 0,
            dynamic: flags & F_EVAL != 0,
            // A set with a timeout has the flag, too.
            timeout: flags & F_TIMEOUT != 0 && timeout.is_none(),
        },
        size: desc.u32(SET_DESC_SIZE),
        timeout,
        stateful: one
            .chain(several)
            .map(|expr| read_stateful(expr, &mut counts))
            .collect::<Result<_, _>>()?,
        comment: set.get(SET_USERDATA).and_then(udata::set_comment),
    }))
}

/// The fields of a key, by nft's number: six bits for each.
fn read_key(set: Attributes<'_>) -> Result<Vec<Datatype>, Error> {
    let id = set.need_u32(SET_KEY_TYPE, "type of a key")?;
    let len = set.need_u32(SET_KEY_LEN, "length of a key")?;
    let mut ids = Vec::new();
    let mut rest = id;
    while rest != 0 {
        ids.push(rest & ((1 << TYPE_BITS) - 1));
        rest >>= TYPE_BITS;
    }
    ids.reverse();
    if ids.len() < 2 {
        return Ok(vec![read_datatype(id, len)]);
    }
    let lengths: Vec<u32> = set
        .nested(SET_DESC)
        .and_then(|desc| desc.nested(SET_DESC_CONCAT))
        .map(|fields| fields.all(LIST_ELEM).filter_map(|field| field.u32(SET_FIELD_LEN)).collect())
        .unwrap_or_default();
    let field = |(index, id): (usize, &u32)| match lengths.get(index) {
        Some(len) => Some(read_datatype(*id, *len)),
        None => DATATYPES.iter().find(|(_, known)| known == id).map(|(datatype, _)| *datatype),
    };
    let fields: Option<Vec<_>> = ids.iter().enumerate().map(field).collect();
    Ok(fields.unwrap_or_else(|| vec![Datatype::Other { id, len }]))
}

// ---- elements ----

/// An element as the kernel has it. A range of a set without concatenation is two of them.
pub(super) enum Part<'a> {
    /// A key, or the begin of a range, with all that belongs to it.
    Begin { element: &'a Element, key: &'a [u8], key_end: Option<&'a [u8]> },
    /// The first key behind a range.
    End { key: Vec<u8> },
}

/// Calls for each part of an element.
pub(super) fn parts<'a>(set: &Set, element: &'a Element, mut each: impl FnMut(Part<'a>)) {
    let (from, to) = match &element.key {
        ElementKey::One(key) => (key, key),
        ElementKey::Range(from, to) => (from, to),
    };
    if !set.flags.interval {
        each(Part::Begin { element, key: from, key_end: None });
    } else if set.key.len() > 1 {
        each(Part::Begin { element, key: from, key_end: Some(to) });
    } else {
        each(Part::Begin { element, key: from, key_end: None });
        if let Some(key) = next(to) {
            each(Part::End { key });
        }
    }
}

/// The key behind a key; `None` behind the last.
fn next(key: &[u8]) -> Option<Vec<u8>> {
    let mut next = key.to_vec();
    for byte in next.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return Some(next);
        }
    }
    None
}

fn previous(key: &[u8]) -> Vec<u8> {
    let mut previous = key.to_vec();
    for byte in previous.iter_mut().rev() {
        *byte = byte.wrapping_sub(1);
        if *byte != 0xff {
            break;
        }
    }
    previous
}

/// Writes a part of an element; only its key, where it is to be deleted.
pub(super) fn put_part(w: &mut Writer, part: &Part<'_>, key_only: bool) {
    w.nest(LIST_ELEM, |w| match part {
        Part::End { key } => {
            w.put_u32(ELEM_FLAGS, libc::NFT_SET_ELEM_INTERVAL_END as u32);
            put_value(w, ELEM_KEY, key);
        }
        Part::Begin { element, key, key_end } => {
            if let (Some(timeout), false) = (element.timeout, key_only) {
                w.put_u64(ELEM_TIMEOUT, timeout);
            }
            put_value(w, ELEM_KEY, key);
            if let Some(key_end) = key_end {
                put_value(w, ELEM_KEY_END, key_end);
            }
            if key_only {
                return;
            }
            match &element.value {
                Some(ElementValue::Verdict(verdict)) => put_verdict(w, ELEM_DATA, verdict),
                Some(ElementValue::Value(value)) => put_value(w, ELEM_DATA, value),
                _ => {}
            }
            let data = udata::of_element(element.comment.as_ref());
            if !data.is_empty() {
                w.put(ELEM_USERDATA, &data);
            }
            if let Some(ElementValue::Object(name)) = &element.value {
                w.put_str(ELEM_OBJREF, name.as_str());
            }
        }
    });
}

/// What was read of an element, before the ends of ranges are with their begins.
pub(super) struct ReadPart {
    installed: InstalledElement,
    end: bool,
}

/// Reads an element of a list; `None` for the one that stands for all keys that have none, which this crate does not
/// write.
pub(super) fn read_part(set: &Set, element: Attributes<'_>) -> Result<Option<ReadPart>, Error> {
    if element.get(ELEM_KEY).is_none() {
        return Ok(None);
    }
    let key = need_value(element, ELEM_KEY)?;
    let end =
        element.u32(ELEM_FLAGS).is_some_and(|flags| flags & libc::NFT_SET_ELEM_INTERVAL_END as u32 != 0);
    let key = match element.get(ELEM_KEY_END) {
        Some(_) => canonical(key, need_value(element, ELEM_KEY_END)?),
        None => ElementKey::One(key),
    };
    let value = match (element.nested(ELEM_DATA), element.get(ELEM_OBJREF)) {
        (Some(data), _) => Some(match read_data(data)? {
            Data::Value(value) => ElementValue::Value(value),
            Data::Verdict(verdict) => ElementValue::Verdict(verdict),
        }),
        (None, Some(_)) => Some(ElementValue::Object(element.name(ELEM_OBJREF, "object")?)),
        (None, None) => None,
    };
    let mut counts: Vec<Count> = Vec::new();
    let one = element.nested(ELEM_EXPR).into_iter();
    let several = element.nested(ELEM_EXPRESSIONS).unwrap_or(Attributes(&[])).all(LIST_ELEM);
    for expr in one.chain(several) {
        read_stateful(expr, &mut counts)?;
    }
    Ok(Some(ReadPart {
        installed: InstalledElement {
            element: Element {
                key,
                value,
                timeout: element.u64(ELEM_TIMEOUT).filter(|timeout| Some(*timeout) != set.timeout),
                comment: element.get(ELEM_USERDATA).and_then(udata::element_comment),
            },
            expires: element.u64(ELEM_EXPIRATION),
            counts,
        },
        end,
    }))
}

/// A range of one key is that key.
fn canonical(from: Vec<u8>, to: Vec<u8>) -> ElementKey {
    if from == to { ElementKey::One(from) } else { ElementKey::Range(from, to) }
}

/// Puts begins and ends of ranges together, and the elements in the order of their keys.
pub(super) fn join(set: &Set, mut parts: Vec<ReadPart>) -> Result<Vec<InstalledElement>, Error> {
    if !set.flags.interval || set.key.len() > 1 {
        parts.sort_by(|a, b| a.installed.element.key.cmp(&b.installed.element.key));
        return Ok(parts.into_iter().map(|part| part.installed).collect());
    }
    let key = |part: &ReadPart| match &part.installed.element.key {
        ElementKey::One(key) | ElementKey::Range(key, _) => key.clone(),
    };
    // One range may end where the next begins.
    parts.sort_by_cached_key(|part| (key(part), !part.end));
    let mut elements: Vec<InstalledElement> = Vec::new();
    let mut open = false;
    for part in parts {
        let at = key(&part);
        if !part.end {
            if open {
                return Err(malformed(format!("ranges of the set {} overlap", set.name)));
            }
            open = true;
            elements.push(part.installed);
        } else if let (true, Some(last)) = (open, elements.last_mut()) {
            close(last, previous(&at));
            open = false;
        }
        // nft writes an end before the first range, too.
    }
    if let (true, Some(last)) = (open, elements.last_mut()) {
        close(last, vec![0xff; set.key_len()]);
    }
    Ok(elements)
}

fn close(element: &mut InstalledElement, to: Vec<u8>) {
    if let ElementKey::One(from) = &mut element.element.key {
        element.element.key = canonical(std::mem::take(from), to);
    }
}

/// Says what is wrong with an element for a set.
pub(super) fn is_consistent(set: &Set, element: &Element) -> Result<(), String> {
    let len = set.key_len();
    let keys = match &element.key {
        ElementKey::One(key) => vec![key],
        ElementKey::Range(_, _) if !set.flags.interval => {
            return Err(format!("the set {} takes no ranges", set.name));
        }
        ElementKey::Range(from, to) => vec![from, to],
    };
    if let Some(key) = keys.iter().find(|key| key.len() != len) {
        return Err(format!("the set {} has keys of {len} bytes, this has {}", set.name, key.len()));
    }
    let fits = matches!(
        (&set.data, &element.value),
        (None, _)
            | (_, None)
            | (Some(MapData::Verdict), Some(ElementValue::Verdict(_)))
            | (Some(MapData::Value(_)), Some(ElementValue::Value(_)))
            | (Some(MapData::Object(_)), Some(ElementValue::Object(_)))
    );
    if fits { Ok(()) } else { Err(format!("the map {} has other values", set.name)) }
}

/// The elements of a message, where it has some.
pub(super) fn elements(message: Attributes<'_>) -> Option<Attributes<'_>> {
    message.nested(LIST_ELEMENTS)
}
