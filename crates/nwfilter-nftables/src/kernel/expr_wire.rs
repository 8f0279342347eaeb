//! Expressions as the kernel takes and shows them. Attributes stand in the order in which nft sends them.
//!
//! Numbers of attributes are those of `linux/netfilter/nf_tables.h`, each under the name of its enum.

use nix::libc;

use super::error::Error;
use super::expr::{
    Base, Bitwise, Byteorder, Cmp, Connlimit, CtKey, Direction, Dynset, DynsetOp, Expr, Extended,
    ExtensionPart, Hash, Limit, LimitOf, Load, Log, LogTo, Lookup, LookupResult, MetaKey, ObjectKind, Order,
    Range, Register, Reject, Relation, Stateful, Verdict,
};
use super::installed::Count;
use super::wire::{Attributes, Writer, malformed, missing};

/// `NFTA_LIST_ELEM`
pub(super) const LIST_ELEM: u16 = 1;
/// `NFTA_EXPR_NAME`
const EXPR_NAME: u16 = 1;
/// `NFTA_EXPR_DATA`
const EXPR_DATA: u16 = 2;

/// `NFTA_DATA_VALUE`
const DATA_VALUE: u16 = 1;
/// `NFTA_DATA_VERDICT`
const DATA_VERDICT: u16 = 2;
/// `NFTA_VERDICT_CODE`
const VERDICT_CODE: u16 = 1;
/// `NFTA_VERDICT_CHAIN`
const VERDICT_CHAIN: u16 = 2;

/// `NFT_EXTHDR_F_PRESENT`
const EXTHDR_PRESENT: u32 = 1;
/// `NFT_CONNLIMIT_F_INV`
const CONNLIMIT_OVER: u32 = 1;
/// `NFT_HASH_JENKINS`
const HASH_JENKINS: u32 = 0;
/// `NFT_DYNSET_F_EXPR`
const DYNSET_EXPRESSIONS: u32 = 2;

// ---- the pieces of expressions ----

/// The kernel's number for a register: one of 16 bytes where one begins there.
fn register(register: Register) -> u32 {
    let index = u32::from(register.index());
    if index.is_multiple_of(4) {
        index / 4 + libc::NFT_REG_1 as u32
    } else {
        index + libc::NFT_REG32_00 as u32
    }
}

fn read_register(number: u32) -> Result<Register, Error> {
    let index = match number {
        1..=4 => (number - 1) * 4,
        8..=23 => number - 8,
        other => return Err(malformed(format!("register {other}"))),
    };
    u8::try_from(index).ok().and_then(Register::new).ok_or_else(|| malformed("register"))
}

fn need_register(attributes: Attributes<'_>, kind: u16) -> Result<Register, Error> {
    read_register(attributes.need_u32(kind, "register")?)
}

/// A value, `NFTA_DATA_VALUE`.
pub(super) fn put_value(writer: &mut Writer, kind: u16, value: &[u8]) {
    writer.nest(kind, |writer| writer.put(DATA_VALUE, value));
}

/// A verdict, `NFTA_DATA_VERDICT`.
pub(super) fn put_verdict(writer: &mut Writer, kind: u16, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Accept => (libc::NF_ACCEPT, None),
        Verdict::Drop => (libc::NF_DROP, None),
        Verdict::Continue => (libc::NFT_CONTINUE, None),
        Verdict::Return => (libc::NFT_RETURN, None),
        Verdict::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
        Verdict::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
    };
    writer.nest(kind, |writer| {
        writer.nest(DATA_VERDICT, |writer| {
            writer.put_u32(VERDICT_CODE, code.cast_unsigned());
            if let Some(chain) = chain {
                writer.put_str(VERDICT_CHAIN, chain.as_str());
            }
        });
    });
}

/// What stands in `NFTA_*_DATA`.
pub(super) enum Data {
    Value(Vec<u8>),
    Verdict(Verdict),
}

pub(super) fn read_data(data: Attributes<'_>) -> Result<Data, Error> {
    if let Some(value) = data.get(DATA_VALUE) {
        return Ok(Data::Value(value.to_vec()));
    }
    let verdict = data.nested(DATA_VERDICT).ok_or_else(|| missing("data"))?;
    let code = verdict.need_u32(VERDICT_CODE, "verdict")?.cast_signed();
    let chain = || verdict.name(VERDICT_CHAIN, "chain");
    Ok(Data::Verdict(match code {
        libc::NF_ACCEPT => Verdict::Accept,
        libc::NF_DROP => Verdict::Drop,
        libc::NFT_CONTINUE => Verdict::Continue,
        libc::NFT_RETURN => Verdict::Return,
        libc::NFT_JUMP => Verdict::Jump(chain()?),
        libc::NFT_GOTO => Verdict::Goto(chain()?),
        other => return Err(malformed(format!("verdict {other}"))),
    }))
}

pub(super) fn need_value(attributes: Attributes<'_>, kind: u16) -> Result<Vec<u8>, Error> {
    match read_data(attributes.nested(kind).ok_or_else(|| missing("value"))?)? {
        Data::Value(value) => Ok(value),
        Data::Verdict(_) => Err(malformed("a verdict in place of a value")),
    }
}

/// Finds the pair of a table by either side.
fn number_of<T: PartialEq>(table: &[(T, u32)], wanted: &T) -> u32 {
    // Every table here lists all variants of its type.
    table.iter().find(|(value, _)| value == wanted).map_or(u32::MAX, |(_, number)| *number)
}

fn value_of<T: Copy>(table: &[(T, u32)], wanted: u32) -> Option<T> {
    table.iter().find(|(_, number)| *number == wanted).map(|(value, _)| *value)
}

const BASES: &[(Base, u32)] = &[
    (Base::Link, libc::NFT_PAYLOAD_LL_HEADER as u32),
    (Base::Network, libc::NFT_PAYLOAD_NETWORK_HEADER as u32),
    (Base::Transport, libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32),
];

const META_KEYS: &[(MetaKey, u32)] = &[
    (MetaKey::Length, libc::NFT_META_LEN as u32),
    (MetaKey::Protocol, libc::NFT_META_PROTOCOL as u32),
    (MetaKey::Mark, libc::NFT_META_MARK as u32),
    (MetaKey::Iifname, libc::NFT_META_IIFNAME as u32),
    (MetaKey::Oifname, libc::NFT_META_OIFNAME as u32),
    (MetaKey::Iiftype, libc::NFT_META_IIFTYPE as u32),
    (MetaKey::Nftrace, libc::NFT_META_NFTRACE as u32),
    (MetaKey::Nfproto, libc::NFT_META_NFPROTO as u32),
    (MetaKey::L4proto, libc::NFT_META_L4PROTO as u32),
    (MetaKey::Ibrname, libc::NFT_META_BRI_IIFNAME as u32),
    (MetaKey::Obrname, libc::NFT_META_BRI_OIFNAME as u32),
    (MetaKey::Pkttype, libc::NFT_META_PKTTYPE as u32),
];

const CT_KEYS: &[(CtKey, u32)] = &[
    (CtKey::State, libc::NFT_CT_STATE as u32),
    (CtKey::Direction, libc::NFT_CT_DIRECTION as u32),
    (CtKey::Status, libc::NFT_CT_STATUS as u32),
    (CtKey::Mark, libc::NFT_CT_MARK as u32),
    (CtKey::Zone, libc::NFT_CT_ZONE as u32),
];

const DIRECTIONS: &[(Direction, u32)] = &[(Direction::Original, 0), (Direction::Reply, 1)];

const EXTENDED: &[(Extended, u32)] = &[(Extended::Ipv6, 0), (Extended::Tcp, 1), (Extended::Ipv4, 2)];

const RELATIONS: &[(Relation, u32)] = &[
    (Relation::Equal, libc::NFT_CMP_EQ as u32),
    (Relation::NotEqual, libc::NFT_CMP_NEQ as u32),
    (Relation::Less, libc::NFT_CMP_LT as u32),
    (Relation::LessOrEqual, libc::NFT_CMP_LTE as u32),
    (Relation::Greater, libc::NFT_CMP_GT as u32),
    (Relation::GreaterOrEqual, libc::NFT_CMP_GTE as u32),
];

const ORDERS: &[(Order, u32)] =
    &[(Order::Host, libc::NFT_BYTEORDER_NTOH as u32), (Order::Network, libc::NFT_BYTEORDER_HTON as u32)];

const DYNSET_OPS: &[(DynsetOp, u32)] = &[
    (DynsetOp::Add, libc::NFT_DYNSET_OP_ADD as u32),
    (DynsetOp::Update, libc::NFT_DYNSET_OP_UPDATE as u32),
    // NFT_DYNSET_OP_DELETE
    (DynsetOp::Delete, 2),
];

const OBJECT_KINDS: &[(ObjectKind, u32)] =
    &[(ObjectKind::Counter, 1), (ObjectKind::CtHelper, 3), (ObjectKind::Limit, 4)];

/// `NFT_OBJECT_*`
pub(super) fn object_kind(kind: ObjectKind) -> u32 {
    number_of(OBJECT_KINDS, &kind)
}

pub(super) fn read_object_kind(number: u32) -> Option<ObjectKind> {
    value_of(OBJECT_KINDS, number)
}

// ---- writing ----

impl Expr {
    /// The kernel's name for its kind, `NFTA_EXPR_NAME`.
    pub fn kind(&self) -> &str {
        match self {
            Self::Load { load: Load::Payload { .. }, .. } => "payload",
            Self::Load { load: Load::Meta(_), .. } | Self::MetaSet { .. } => "meta",
            Self::Load { load: Load::Ct { .. }, .. } | Self::CtSet { .. } => "ct",
            Self::Load { load: Load::Extension { .. }, .. } => "exthdr",
            Self::Immediate { .. } | Self::Verdict(_) => "immediate",
            Self::Cmp(_) => "cmp",
            Self::Range(_) => "range",
            Self::Bitwise(_) => "bitwise",
            Self::Byteorder(_) => "byteorder",
            Self::Hash(_) => "hash",
            Self::Lookup(_) => "lookup",
            Self::Notrack => "notrack",
            Self::Stateful(stateful) => stateful.kind(),
            Self::Dynset(_) => "dynset",
            Self::Object { .. } | Self::ObjectMap { .. } => "objref",
            Self::Log(_) => "log",
            Self::Reject(_) => "reject",
            Self::Other { name, .. } => name,
        }
    }
}

impl Stateful {
    fn kind(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Limit(_) => "limit",
            Self::Connlimit(_) => "connlimit",
        }
    }
}

/// Writes an expression as an attribute of a list.
pub(super) fn put_expr(writer: &mut Writer, expr: &Expr) {
    writer.nest(LIST_ELEM, |writer| {
        writer.put_str(EXPR_NAME, expr.kind());
        if !matches!(expr, Expr::Notrack) {
            writer.nest(EXPR_DATA, |writer| put_expr_data(writer, expr));
        }
    });
}

/// Writes a stateful expression of a set or of its elements.
pub(super) fn put_stateful(writer: &mut Writer, kind: u16, stateful: Stateful) {
    writer.nest(kind, |writer| {
        writer.put_str(EXPR_NAME, stateful.kind());
        writer.nest(EXPR_DATA, |writer| put_stateful_data(writer, stateful));
    });
}

fn put_expr_data(w: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Load { load, dreg } => put_load(w, *load, register(*dreg)),
        Expr::Immediate { value, dreg } => {
            w.put_u32(1, register(*dreg));
            put_value(w, 2, value);
        }
        Expr::Verdict(verdict) => {
            w.put_u32(1, libc::NFT_REG_VERDICT as u32);
            put_verdict(w, 2, verdict);
        }
        Expr::Cmp(cmp) => {
            w.put_u32(1, register(cmp.sreg));
            w.put_u32(2, number_of(RELATIONS, &cmp.relation));
            put_value(w, 3, &cmp.value);
        }
        Expr::Range(range) => {
            w.put_u32(1, register(range.sreg));
            w.put_u32(2, u32::from(range.negate));
            put_value(w, 3, &range.from);
            put_value(w, 4, &range.to);
        }
        Expr::Bitwise(bitwise) => {
            w.put_u32(1, register(bitwise.sreg));
            w.put_u32(2, register(bitwise.dreg));
            w.put_u32(3, bitwise.mask.len() as u32);
            put_value(w, 4, &bitwise.mask);
            put_value(w, 5, &bitwise.xor);
        }
        Expr::Byteorder(order) => {
            w.put_u32(1, register(order.sreg));
            w.put_u32(2, register(order.dreg));
            w.put_u32(3, number_of(ORDERS, &order.to));
            w.put_u32(4, order.len);
            w.put_u32(5, order.size);
        }
        Expr::Hash(hash) => {
            w.put_u32(1, register(hash.sreg));
            w.put_u32(2, register(hash.dreg));
            w.put_u32(3, hash.len);
            w.put_u32(4, hash.modulus);
            w.put_u32(5, hash.seed);
            if hash.offset != 0 {
                w.put_u32(6, hash.offset);
            }
            w.put_u32(7, HASH_JENKINS);
        }
        Expr::Lookup(lookup) => {
            w.put_u32(2, register(lookup.sreg));
            match lookup.result {
                LookupResult::Data(dreg) => w.put_u32(3, register(dreg)),
                LookupResult::Verdict => w.put_u32(3, libc::NFT_REG_VERDICT as u32),
                LookupResult::Match | LookupResult::NoMatch => {}
            }
            w.put_str(1, lookup.set.as_str());
            if lookup.result == LookupResult::NoMatch {
                w.put_u32(5, libc::NFT_LOOKUP_F_INV as u32);
            }
        }
        Expr::MetaSet { key, sreg } => {
            w.put_u32(2, number_of(META_KEYS, key));
            w.put_u32(3, register(*sreg));
        }
        Expr::CtSet { key, sreg, direction } => {
            w.put_u32(2, number_of(CT_KEYS, key));
            if let Some(direction) = direction {
                w.put_u8(3, number_of(DIRECTIONS, direction) as u8);
            }
            w.put_u32(4, register(*sreg));
        }
        Expr::Notrack => {}
        Expr::Stateful(stateful) => put_stateful_data(w, *stateful),
        Expr::Dynset(dynset) => put_dynset(w, dynset),
        Expr::Object { kind, name } => {
            w.put_u32(1, object_kind(*kind));
            w.put_str(2, name.as_str());
        }
        Expr::ObjectMap { map, sreg } => {
            w.put_u32(3, register(*sreg));
            w.put_str(4, map.as_str());
        }
        Expr::Log(log) => put_log(w, log),
        Expr::Reject(reject) => {
            let (kind, code) = match *reject {
                Reject::Unreachable(code) => (libc::NFT_REJECT_ICMP_UNREACH, code),
                Reject::TcpReset => (libc::NFT_REJECT_TCP_RST, 0),
                Reject::Icmpx(code) => (libc::NFT_REJECT_ICMPX_UNREACH, code),
            };
            w.put_u32(1, kind as u32);
            w.put_u8(2, code);
        }
        Expr::Other { data, .. } => w.raw(data),
    }
}

fn put_load(w: &mut Writer, load: Load, dreg: u32) {
    match load {
        Load::Payload { base, offset, len } => {
            w.put_u32(1, dreg);
            w.put_u32(2, number_of(BASES, &base));
            w.put_u32(3, offset);
            w.put_u32(4, len);
        }
        Load::Meta(key) => {
            w.put_u32(2, number_of(META_KEYS, &key));
            w.put_u32(1, dreg);
        }
        Load::Ct { key, direction } => {
            w.put_u32(2, number_of(CT_KEYS, &key));
            w.put_u32(1, dreg);
            if let Some(direction) = direction {
                w.put_u8(3, number_of(DIRECTIONS, &direction) as u8);
            }
        }
        Load::Extension { of, kind, part } => {
            let (offset, len, flags) = match part {
                ExtensionPart::Present => (0, 1, EXTHDR_PRESENT),
                ExtensionPart::Bytes { offset, len } => (offset, len, 0),
            };
            w.put_u32(1, dreg);
            w.put_u8(2, kind);
            w.put_u32(3, offset);
            w.put_u32(4, len);
            w.put_u32(6, number_of(EXTENDED, &of));
            w.put_u32(5, flags);
        }
    }
}

fn put_stateful_data(w: &mut Writer, stateful: Stateful) {
    match stateful {
        // Without attributes it begins at zero.
        Stateful::Counter => {}
        Stateful::Limit(limit) => {
            w.put_u64(1, limit.rate);
            w.put_u64(2, limit.seconds);
            w.put_u32(3, limit.burst);
            w.put_u32(4, u32::from(limit.of == LimitOf::Bytes));
            w.put_u32(5, u32::from(limit.over));
        }
        Stateful::Connlimit(limit) => {
            w.put_u32(1, limit.count);
            w.put_u32(2, if limit.over { CONNLIMIT_OVER } else { 0 });
        }
    }
}

fn put_dynset(w: &mut Writer, dynset: &Dynset) {
    let invert = if dynset.invert { libc::NFT_DYNSET_F_INV as u32 } else { 0 };
    w.put_u32(4, register(dynset.sreg));
    w.put_u32(3, number_of(DYNSET_OPS, &dynset.op));
    w.put_str(1, dynset.set.as_str());
    if let Some(timeout) = dynset.timeout {
        w.put_u64(6, timeout);
    }
    let flags = match &*dynset.stateful {
        [] => invert,
        [one] => {
            put_stateful(w, 7, *one);
            invert
        }
        several => {
            w.nest(10, |w| several.iter().for_each(|stateful| put_stateful(w, LIST_ELEM, *stateful)));
            invert | DYNSET_EXPRESSIONS
        }
    };
    if flags != 0 {
        w.put_u32(9, flags);
    }
}

fn put_log(w: &mut Writer, log: &Log) {
    if let Some(prefix) = &log.prefix {
        w.put_str(2, prefix);
    }
    match log.to {
        LogTo::Syslog { level, flags } => {
            w.put_u32(5, level);
            if flags != 0 {
                w.put_u32(6, flags);
            }
        }
        LogTo::Group { group, snaplen, threshold } => {
            w.put_u16(1, group);
            if let Some(snaplen) = snaplen {
                w.put_u32(3, snaplen);
            }
            if let Some(threshold) = threshold {
                w.put_u16(4, threshold);
            }
        }
    }
}

// ---- reading ----

/// Reads the expressions of a list, and what its counters have counted.
pub(super) fn read_exprs(list: Attributes<'_>, counts: &mut Vec<Count>) -> Result<Vec<Expr>, Error> {
    list.all(LIST_ELEM).map(|attributes| read_expr(attributes, counts)).collect()
}

/// Reads the stateful expressions of a list.
pub(super) fn read_stateful(attributes: Attributes<'_>, counts: &mut Vec<Count>) -> Result<Stateful, Error> {
    match read_expr(attributes, counts)? {
        Expr::Stateful(stateful) => Ok(stateful),
        other => Err(malformed(format!("the expression {} at an element", other.kind()))),
    }
}

fn read_expr(attributes: Attributes<'_>, counts: &mut Vec<Count>) -> Result<Expr, Error> {
    let name = attributes.str(EXPR_NAME).ok_or_else(|| missing("name of an expression"))?;
    let data = attributes.nested(EXPR_DATA).unwrap_or(Attributes(&[]));
    let known = match name {
        "payload" => read_payload(data)?,
        "meta" => read_meta(data)?,
        "ct" => read_ct(data)?,
        "exthdr" => read_exthdr(data)?,
        "immediate" => Some(read_immediate(data)?),
        "cmp" => Some(Expr::Cmp(Cmp {
            sreg: need_register(data, 1)?,
            relation: value_of(RELATIONS, data.need_u32(2, "relation")?).ok_or_else(|| malformed("cmp"))?,
            value: need_value(data, 3)?,
        })),
        "range" => Some(Expr::Range(Range {
            sreg: need_register(data, 1)?,
            negate: data.u32(2) == Some(1),
            from: need_value(data, 3)?,
            to: need_value(data, 4)?,
        })),
        "bitwise" => read_bitwise(data)?,
        "byteorder" => Some(Expr::Byteorder(Byteorder {
            sreg: need_register(data, 1)?,
            dreg: need_register(data, 2)?,
            to: value_of(ORDERS, data.need_u32(3, "byte order")?).ok_or_else(|| malformed("byteorder"))?,
            len: data.need_u32(4, "length")?,
            size: data.need_u32(5, "size")?,
        })),
        "hash" => read_hash(data)?,
        "lookup" => Some(read_lookup(data)?),
        "notrack" => Some(Expr::Notrack),
        "counter" => {
            counts.push(Count { bytes: data.u64(1).unwrap_or(0), packets: data.u64(2).unwrap_or(0) });
            Some(Expr::Stateful(Stateful::Counter))
        }
        "limit" => Some(Expr::Stateful(Stateful::Limit(Limit {
            rate: data.u64(1).unwrap_or(0),
            seconds: data.u64(2).unwrap_or(0),
            burst: data.u32(3).unwrap_or(0),
            of: if data.u32(4) == Some(1) { LimitOf::Bytes } else { LimitOf::Packets },
            over: data.u32(5).is_some_and(|flags| flags & 1 != 0),
        }))),
        "connlimit" => Some(Expr::Stateful(Stateful::Connlimit(Connlimit {
            count: data.u32(1).unwrap_or(0),
            over: data.u32(2).is_some_and(|flags| flags & CONNLIMIT_OVER != 0),
        }))),
        "dynset" => read_dynset(data)?,
        "objref" => read_objref(data)?,
        "log" => Some(read_log(data)),
        "reject" => read_reject(data),
        _ => None,
    };
    Ok(known.unwrap_or_else(|| Expr::Other { name: name.into(), data: data.0.to_vec() }))
}

fn read_payload(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    // Without destination it writes to the packet.
    if data.u32(1).is_none() {
        return Ok(None);
    }
    let Some(base) = value_of(BASES, data.need_u32(2, "base")?) else { return Ok(None) };
    let load = Load::Payload { base, offset: data.need_u32(3, "offset")?, len: data.need_u32(4, "length")? };
    Ok(Some(Expr::Load { load, dreg: need_register(data, 1)? }))
}

fn read_meta(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    let Some(key) = value_of(META_KEYS, data.need_u32(2, "key")?) else { return Ok(None) };
    Ok(Some(if data.u32(3).is_some() {
        Expr::MetaSet { key, sreg: need_register(data, 3)? }
    } else {
        Expr::Load { load: Load::Meta(key), dreg: need_register(data, 1)? }
    }))
}

fn read_ct(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    let Some(key) = value_of(CT_KEYS, data.need_u32(2, "key")?) else { return Ok(None) };
    let direction = data.u8(3).and_then(|direction| value_of(DIRECTIONS, direction.into()));
    Ok(Some(if data.u32(4).is_some() {
        Expr::CtSet { key, sreg: need_register(data, 4)?, direction }
    } else {
        Expr::Load { load: Load::Ct { key, direction }, dreg: need_register(data, 1)? }
    }))
}

fn read_exthdr(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    let Some(of) = value_of(EXTENDED, data.u32(6).unwrap_or(0)) else { return Ok(None) };
    // Without destination it writes to the packet.
    if data.u32(1).is_none() {
        return Ok(None);
    }
    let part = if data.u32(5).is_some_and(|flags| flags & EXTHDR_PRESENT != 0) {
        ExtensionPart::Present
    } else {
        ExtensionPart::Bytes { offset: data.u32(3).unwrap_or(0), len: data.u32(4).unwrap_or(0) }
    };
    let kind = data.u8(2).ok_or_else(|| missing("extension"))?;
    Ok(Some(Expr::Load { load: Load::Extension { of, kind, part }, dreg: need_register(data, 1)? }))
}

fn read_immediate(data: Attributes<'_>) -> Result<Expr, Error> {
    let value = data.nested(2).ok_or_else(|| missing("data"))?;
    Ok(match read_data(value)? {
        Data::Verdict(verdict) => Expr::Verdict(verdict),
        Data::Value(value) => Expr::Immediate { value, dreg: need_register(data, 1)? },
    })
}

fn read_bitwise(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    // Others shift.
    if data.u32(6).is_some_and(|op| op != 0) {
        return Ok(None);
    }
    Ok(Some(Expr::Bitwise(Bitwise {
        sreg: need_register(data, 1)?,
        dreg: need_register(data, 2)?,
        mask: need_value(data, 4)?,
        xor: need_value(data, 5)?,
    })))
}

fn read_hash(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    // Others have no seed, or are of the packet's flow.
    let Some(seed) = data.u32(5).filter(|_| data.u32(7).unwrap_or(HASH_JENKINS) == HASH_JENKINS) else {
        return Ok(None);
    };
    Ok(Some(Expr::Hash(Hash {
        sreg: need_register(data, 1)?,
        dreg: need_register(data, 2)?,
        len: data.need_u32(3, "length")?,
        modulus: data.need_u32(4, "modulus")?,
        seed,
        offset: data.u32(6).unwrap_or(0),
    })))
}

fn read_lookup(data: Attributes<'_>) -> Result<Expr, Error> {
    let negated = data.u32(5).is_some_and(|flags| flags & libc::NFT_LOOKUP_F_INV as u32 != 0);
    let result = match data.u32(3) {
        Some(dreg) if dreg == libc::NFT_REG_VERDICT as u32 => LookupResult::Verdict,
        Some(dreg) => LookupResult::Data(read_register(dreg)?),
        None if negated => LookupResult::NoMatch,
        None => LookupResult::Match,
    };
    Ok(Expr::Lookup(Lookup { set: data.name(1, "set")?, sreg: need_register(data, 2)?, result }))
}

fn read_dynset(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    // With a value it writes to a map.
    let Some(op) = value_of(DYNSET_OPS, data.u32(3).unwrap_or(0)) else { return Ok(None) };
    if data.u32(5).is_some() {
        return Ok(None);
    }
    let mut counts = Vec::new();
    let one = data.nested(7).into_iter();
    let several = data.nested(10).unwrap_or(Attributes(&[])).all(LIST_ELEM);
    Ok(Some(Expr::Dynset(Dynset {
        set: data.name(1, "set")?,
        op,
        sreg: need_register(data, 4)?,
        timeout: data.u64(6).filter(|timeout| *timeout != 0),
        stateful: one
            .chain(several)
            .map(|expr| read_stateful(expr, &mut counts))
            .collect::<Result<_, _>>()?,
        invert: data.u32(9).is_some_and(|flags| flags & libc::NFT_DYNSET_F_INV as u32 != 0),
    })))
}

fn read_objref(data: Attributes<'_>) -> Result<Option<Expr>, Error> {
    if data.get(4).is_some() {
        return Ok(Some(Expr::ObjectMap { map: data.name(4, "map")?, sreg: need_register(data, 3)? }));
    }
    let kind = read_object_kind(data.need_u32(1, "kind of object")?);
    kind.map(|kind| Ok(Expr::Object { kind, name: data.name(2, "object")? })).transpose()
}

fn read_log(data: Attributes<'_>) -> Expr {
    let to = match data.u16(1) {
        Some(group) => LogTo::Group {
            group,
            snaplen: data.u32(3).filter(|len| *len != 0),
            threshold: data.u16(4).filter(|threshold| *threshold != 0),
        },
        None => {
            LogTo::Syslog { level: data.u32(5).unwrap_or(DEFAULT_LOG_LEVEL), flags: data.u32(6).unwrap_or(0) }
        }
    };
    Expr::Log(Log { prefix: data.str(2).map(Into::into), to })
}

/// `NFT_LOGLEVEL_WARNING`, what the kernel takes where none is said.
const DEFAULT_LOG_LEVEL: u32 = 4;

fn read_reject(data: Attributes<'_>) -> Option<Expr> {
    let code = data.u8(2).unwrap_or(0);
    let reject = match data.u32(1)?.cast_signed() {
        libc::NFT_REJECT_ICMP_UNREACH => Reject::Unreachable(code),
        libc::NFT_REJECT_TCP_RST => Reject::TcpReset,
        libc::NFT_REJECT_ICMPX_UNREACH => Reject::Icmpx(code),
        _ => return None,
    };
    Some(Expr::Reject(reject))
}
