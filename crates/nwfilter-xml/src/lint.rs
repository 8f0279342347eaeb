//! Warnings about what libvirt takes, and the reader with it, but hardly as it is meant.

use std::ops::Range;

use roxmltree::Attribute as XmlAttribute;

use crate::code::Code;
use crate::model::Item;
use crate::names::{ChainKind, ChainName};
use crate::read::Reader;
use crate::read_filter::{Found, FoundItem};
use crate::schema::{Attribute, Field, Protocol};
use crate::value::{COMMENT_MAX, Kind, Literal, Number, Value};

impl Reader<'_> {
    /// One value whose spelling hides what it is.
    pub(crate) fn lint_literal(&mut self, row: &Attribute, a: &XmlAttribute<'_, '_>, literal: &Literal) {
        let (text, kind) = (a.value(), row.kind);
        let written = || {
            let mut written = String::new();
            kind.write(literal, &mut written);
            written
        };
        let message = match literal {
            Literal::Text(_) if text.len() > COMMENT_MAX => {
                format!("the comment has {} bytes and is cut after {COMMENT_MAX}", text.len())
            }
            Literal::Mac(_) if text.contains(char::is_whitespace) => {
                "what follows the address is ignored".to_owned()
            }
            Literal::Ipv4(addr) if text.parse() != Ok(*addr) => format!("'{text}' is read as {addr}"),
            Literal::Prefix(bits) if !is_plain_mask(kind, text) => format!("'{text}' is read as {bits}"),
            Literal::Bool(false) if !matches!(text, "false" | "no" | "0") => {
                format!("'{text}' counts as false")
            }
            Literal::U8(Number { hex, .. })
            | Literal::U16(Number { hex, .. })
            | Literal::U32(Number { hex, .. })
                if is_odd_number(text, *hex) =>
            {
                format!("'{text}' is read as {}", written())
            }
            _ => return,
        };
        let code = match literal {
            Literal::Text(_) => Code::CommentCut,
            Literal::Bool(_) => Code::OddTruthValue,
            _ => Code::OddSpelling,
        };
        self.problems.warn(code, a.range_value(), format!("{}: {message}", row.name), None);
    }

    /// The attributes of a rule taken together.
    pub(crate) fn lint_rule(
        &mut self,
        found: &Found,
        tag: Range<usize>,
        statematch: bool,
        chain: Option<&ChainName>,
    ) {
        for FoundItem { item, range, .. } in &found.items {
            if let Some((code, message)) = without_effect(found, item, statematch) {
                self.problems.warn(code, range.clone(), message, None);
            }
        }
        let Some(chain) = chain else { return };
        let wrong = frames_of(found).filter(|(_, kind)| !may_pass(chain.kind(), *kind));
        if let Some((what, kind)) = wrong {
            let message = format!("this rule never matches: no {what} frame enters the chain '{chain}'");
            let help = match kind {
                Some(kind) => format!("put it into a filter with chain='{}' or 'root'", prefix_of(kind)),
                None => "put it into a filter with chain='root'".to_owned(),
            };
            self.problems.warn(Code::NeverMatches, tag, message, Some(help));
        }
    }
}

/// Why an attribute of a rule does nothing, or not what it seems to.
fn without_effect(found: &Found, item: &Item, statematch: bool) -> Option<(Code, String)> {
    let Attribute { name, field, needs, .. } = *item.attribute;
    let name_of = |field| found.protocol.attribute(field).map_or("", |a| a.name);
    if let Some(needed) = needs.filter(|needed| found.get(*needed).is_none()) {
        return Some((Code::WithoutEffect, format!("{name} has no effect without {}", name_of(needed))));
    }
    let address = match field {
        Field::SrcIpFrom => Some(Field::SrcIp),
        Field::DstIpFrom => Some(Field::DstIp),
        _ => None,
    };
    if let Some(address) = address.filter(|address| found.get(*address).is_some()) {
        return Some((Code::WithoutEffect, format!("{name} has no effect beside {}", name_of(address))));
    }
    if field == Field::States {
        let why = match &item.value {
            _ if !statematch => "in a rule with statematch='false'",
            _ if found.get(Field::ConnlimitAbove).is_some() => "beside connlimit-above",
            Value::Literal(Literal::States(states)) if states.is_empty() => "without the name of a state",
            _ => return None,
        };
        return Some((Code::WithoutEffect, format!("state has no effect {why}")));
    }
    let start = &field.range_start().and_then(|start| found.get(start))?.item;
    let (Value::Literal(low), Value::Literal(high)) = (&start.value, &item.value) else { return None };
    (order(low) > order(high)).then(|| {
        let write = |literal: &Literal| {
            let mut text = String::new();
            item.attribute.kind.write(literal, &mut text);
            text
        };
        let (start, low, high) = (start.attribute.name, write(low), write(high));
        (Code::EmptyRange, format!("the range from {start} {low} to {name} {high} is empty"))
    })
}

/// A number that orders the literals of one kind.
fn order(literal: &Literal) -> u128 {
    match literal {
        Literal::Ipv4(addr) => u128::from(addr.to_bits()),
        Literal::Ipv6(addr) => addr.to_bits(),
        Literal::U8(number) => u128::from(number.value),
        Literal::U16(number) => u128::from(number.value),
        Literal::U32(number) => u128::from(number.value),
        _ => 0,
    }
}

/// Which frames a rule matches, where its protocol or its protocolid says so: what they are called and the chain that
/// they enter, `None` if they enter no chain of their own.
fn frames_of(found: &Found) -> Option<(String, Option<ChainKind>)> {
    if let Some(kind) = found.protocol.chain() {
        return Some((found.protocol.spec().element.to_owned(), Some(kind)));
    }
    let item = &found.get(Field::EtherType).filter(|_| found.protocol == Protocol::Mac)?.item;
    match (&item.value, item.negated) {
        (Value::Literal(literal @ Literal::U16(number)), false) => {
            let kind = match number.value {
                0x0806 => Some(ChainKind::Arp),
                0x8035 => Some(ChainKind::Rarp),
                0x0800 => Some(ChainKind::Ipv4),
                0x86dd => Some(ChainKind::Ipv6),
                0x8100 => Some(ChainKind::Vlan),
                _ => None,
            };
            let mut name = String::new();
            Kind::EtherType.write(literal, &mut name);
            Some((name, kind))
        }
        _ => None,
    }
}

/// Whether frames of a protocol can enter a chain.
fn may_pass(chain: ChainKind, frames: Option<ChainKind>) -> bool {
    matches!(chain, ChainKind::Root | ChainKind::Mac) || frames == Some(chain)
}

fn prefix_of(kind: ChainKind) -> &'static str {
    ChainKind::TABLE.iter().find(|(other, ..)| *other == kind).map_or("", |(_, prefix, _)| prefix)
}

/// Whether a mask is a decimal number or an address that is spelt out.
fn is_plain_mask(kind: Kind, text: &str) -> bool {
    let number = text.bytes().all(|b| b.is_ascii_digit());
    number
        || match kind {
            Kind::Ipv4Prefix => text.parse::<std::net::Ipv4Addr>().is_ok(),
            _ => text.parse::<std::net::Ipv6Addr>().is_ok(),
        }
}

/// Whether a number wraps around below 0, or is hex without saying so.
fn is_odd_number(text: &str, hex: bool) -> bool {
    let digits = text.trim_start().trim_start_matches(['+', '-']);
    let negative = text.contains('-') && digits.bytes().any(|b| b != b'0');
    let named = digits.starts_with("0x") || digits.starts_with("0X");
    negative && !text.trim_start().starts_with(char::is_alphabetic) || hex && !named
}
