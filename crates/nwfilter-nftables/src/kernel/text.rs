//! Rules and elements as text, for people: the expressions as `nft --debug=netlink` shows them.

use std::fmt::{self, Display, Formatter, Write};

use super::expr::{
    Base, CtKey, DynsetOp, Expr, Extended, ExtensionPart, Limit, LimitOf, Load, LogTo, LookupResult, MetaKey,
    Order, Register, Reject, Relation, Stateful, Verdict,
};
use super::rule::Rule;
use super::set::{Element, ElementKey, ElementValue};

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

impl Display for Element {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.key {
            ElementKey::One(key) => Bytes(key).fmt(f)?,
            ElementKey::Range(from, to) => write!(f, "{}-{}", Bytes(from), Bytes(to))?,
        }
        match &self.value {
            None => Ok(()),
            Some(ElementValue::Verdict(verdict)) => write!(f, " : {verdict}"),
            Some(ElementValue::Value(value)) => write!(f, " : {}", Bytes(value)),
            Some(ElementValue::Object(name)) => write!(f, " : {name}"),
        }
    }
}
