//! Rules and elements as text, for people: the expressions as `nft --debug=netlink` shows them.

use std::fmt::{self, Display, Formatter, Write};
use std::net::{Ipv4Addr, Ipv6Addr};

use super::expr::{
    Base, CtKey, DynsetOp, Expr, Extended, ExtensionPart, Limit, LimitOf, Load, LogTo, LookupResult, MetaKey,
    Order, Register, Reject, Relation, Stateful, Verdict,
};
use super::rule::Rule;
use super::set::{Datatype, Element, ElementKey, ElementValue, Set};

/// Bytes as hexadecimal digits; names in words.
struct Bytes<'a>(&'a [u8]);

impl Display for Bytes<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("0x")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

struct Reg(Register);

impl Display for Reg {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "reg {}", self.0.index())
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, expr) in self.exprs.iter().enumerate() {
            if index > 0 {
                f.write_char(' ')?;
            }
            write!(f, "[ {expr} ]")?;
        }
        match &self.comment {
            Some(comment) => write!(f, " comment \"{comment}\""),
            None => Ok(()),
        }
    }
}

impl Display for Expr {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load { load, dreg } => write!(f, "{load} => {}", Reg(*dreg)),
            Self::Immediate { value, dreg } => write!(f, "immediate {} {}", Reg(*dreg), Bytes(value)),
            Self::Cmp(cmp) => {
                let relation = match cmp.relation {
                    Relation::Equal => "eq",
                    Relation::NotEqual => "neq",
                    Relation::Less => "lt",
                    Relation::LessOrEqual => "lte",
                    Relation::Greater => "gt",
                    Relation::GreaterOrEqual => "gte",
                };
                write!(f, "cmp {relation} {} {}", Reg(cmp.sreg), Bytes(&cmp.value))
            }
            Self::Range(range) => {
                let relation = if range.negate { "neq" } else { "eq" };
                write!(f, "range {relation} {} {} {}", Reg(range.sreg), Bytes(&range.from), Bytes(&range.to))
            }
            Self::Bitwise(bitwise) => write!(
                f,
                "bitwise {} = ( {} & {} ) ^ {}",
                Reg(bitwise.dreg),
                Reg(bitwise.sreg),
                Bytes(&bitwise.mask),
                Bytes(&bitwise.xor)
            ),
            Self::Byteorder(order) => {
                let to = if order.to == Order::Host { "ntoh" } else { "hton" };
                write!(
                    f,
                    "byteorder {} = {to}({}, {}, {})",
                    Reg(order.dreg),
                    Reg(order.sreg),
                    order.size,
                    order.len
                )
            }
            Self::Hash(hash) => write!(
                f,
                "hash {} = jhash({}, {}, {:#x}) % mod {} offset {}",
                Reg(hash.dreg),
                Reg(hash.sreg),
                hash.len,
                hash.seed,
                hash.modulus,
                hash.offset
            ),
            Self::Lookup(lookup) => {
                write!(f, "lookup {} set {}", Reg(lookup.sreg), lookup.set)?;
                match lookup.result {
                    LookupResult::Match => Ok(()),
                    LookupResult::NoMatch => f.write_str(" not"),
                    LookupResult::Data(dreg) => write!(f, " => {}", Reg(dreg)),
                    LookupResult::Verdict => f.write_str(" => verdict"),
                }
            }
            Self::MetaSet { key, sreg } => write!(f, "meta set {key} with {}", Reg(*sreg)),
            Self::CtSet { key, sreg, direction } => {
                write!(f, "ct set {key} with {}", Reg(*sreg))?;
                direction.map_or(Ok(()), |direction| write!(f, " , dir {direction:?}"))
            }
            Self::Notrack => f.write_str("notrack"),
            Self::Stateful(stateful) => stateful.fmt(f),
            Self::Dynset(dynset) => {
                let op = match dynset.op {
                    DynsetOp::Add => "add",
                    DynsetOp::Update => "update",
                    DynsetOp::Delete => "delete",
                };
                write!(f, "dynset {op} {} set {}", Reg(dynset.sreg), dynset.set)?;
                dynset.stateful.iter().try_for_each(|stateful| write!(f, " expr [ {stateful} ]"))
            }
            Self::Object { kind, name } => write!(f, "objref {kind} {name}"),
            Self::ObjectMap { map, sreg } => write!(f, "objref {} map {map}", Reg(*sreg)),
            Self::Log(log) => {
                f.write_str("log")?;
                log.prefix.iter().try_for_each(|prefix| write!(f, " prefix {prefix}"))?;
                match log.to {
                    LogTo::Syslog { level, .. } => write!(f, " level {level}"),
                    LogTo::Group { group, .. } => write!(f, " group {group}"),
                }
            }
            Self::Reject(Reject::Unreachable(code)) => write!(f, "reject icmp {code}"),
            Self::Reject(Reject::TcpReset) => f.write_str("reject tcp reset"),
            Self::Reject(Reject::Icmpx(code)) => write!(f, "reject icmpx {code}"),
            Self::Verdict(verdict) => verdict.fmt(f),
            Self::Other { name, data } => write!(f, "{name} {}", Bytes(data)),
        }
    }
}

impl Display for Load {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Payload { base, offset, len } => {
                let base = match base {
                    Base::Link => "link",
                    Base::Network => "network",
                    Base::Transport => "transport",
                };
                write!(f, "payload load {len}b @ {base} header + {offset}")
            }
            Self::Meta(key) => write!(f, "meta load {key}"),
            Self::Ct { key, direction: None } => write!(f, "ct load {key}"),
            Self::Ct { key, direction: Some(direction) } => write!(f, "ct load {key} , dir {direction:?}"),
            Self::Extension { of, kind, part } => {
                let of = match of {
                    Extended::Ipv6 => "ipv6",
                    Extended::Tcp => "tcpopt",
                    Extended::Ipv4 => "ipv4",
                };
                match part {
                    ExtensionPart::Present => write!(f, "exthdr load {of} {kind} present"),
                    ExtensionPart::Bytes { offset, len } => {
                        write!(f, "exthdr load {of} {len}b @ {kind} + {offset}")
                    }
                }
            }
        }
    }
}

impl Display for MetaKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "length",
            Self::Protocol => "protocol",
            Self::Mark => "mark",
            Self::Iifname => "iifname",
            Self::Oifname => "oifname",
            Self::Iiftype => "iiftype",
            Self::Nftrace => "nftrace",
            Self::Nfproto => "nfproto",
            Self::L4proto => "l4proto",
            Self::Ibrname => "ibrname",
            Self::Obrname => "obrname",
            Self::Pkttype => "pkttype",
        })
    }
}

impl Display for CtKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::State => "state",
            Self::Direction => "direction",
            Self::Status => "status",
            Self::Mark => "mark",
            Self::Zone => "zone",
        })
    }
}

impl Display for Stateful {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Counter => f.write_str("counter"),
            Self::Limit(Limit { rate, seconds, of, over, .. }) => {
                let (over, unit) = (
                    if *over { "over " } else { "" },
                    if *of == LimitOf::Bytes { "bytes" } else { "packets" },
                );
                write!(f, "limit {over}{rate} {unit} in {seconds} s")
            }
            Self::Connlimit(limit) => {
                write!(f, "connlimit {}{}", if limit.over { "over " } else { "" }, limit.count)
            }
        }
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Continue => f.write_str("continue"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl Set {
    /// An element of the set as nft writes it: `"vnet0" . 52:54:00:7b:35:93`.
    pub fn show(&self, element: &Element) -> String {
        let mut text = match &element.key {
            ElementKey::One(key) => self.show_key(key),
            ElementKey::Range(from, to) => format!("{}-{}", self.show_key(from), self.show_key(to)),
        };
        // Writing to a String cannot fail.
        let _ = match &element.value {
            None => Ok(()),
            Some(ElementValue::Verdict(verdict)) => write!(text, " : {verdict}"),
            Some(ElementValue::Value(value)) => write!(text, " : {}", Bytes(value)),
            Some(ElementValue::Object(name)) => write!(text, " : {name}"),
        };
        text
    }

    fn show_key(&self, mut key: &[u8]) -> String {
        let fields = self.key.iter().map(|field| {
            let (value, _) = key.split_at(field.len().min(key.len()));
            key = key.get(field.len().next_multiple_of(Register::SIZE)..).unwrap_or_default();
            show_value(*field, value)
        });
        fields.collect::<Vec<_>>().join(" . ")
    }
}

fn show_value(datatype: Datatype, value: &[u8]) -> String {
    match (datatype, value) {
        (Datatype::Ifname, name) => {
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            format!("\"{}\"", String::from_utf8_lossy(&name[..end]))
        }
        (Datatype::EtherAddr, [a, b, c, d, e, f]) => {
            format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
        }
        (Datatype::Ipv4Addr, &[a, b, c, d]) => Ipv4Addr::new(a, b, c, d).to_string(),
        (Datatype::Ipv6Addr, value) => match <[u8; 16]>::try_from(value) {
            Ok(octets) => Ipv6Addr::from(octets).to_string(),
            Err(_) => Bytes(value).to_string(),
        },
        (Datatype::InetService, &[a, b]) => u16::from_be_bytes([a, b]).to_string(),
        (_, [number]) => number.to_string(),
        (_, value) => Bytes(value).to_string(),
    }
}
