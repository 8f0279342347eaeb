//! A transaction as one batch of messages, and which message came of which operation.

use std::ops::Range;

use nix::libc;

use super::error::{CommitError, Error};
use super::expr_wire::{LIST_ELEM, put_expr};
use super::rule::Rule;
use super::set::{Element, Set};
use super::set_wire::{
    LIST_ELEMENTS, LIST_SET, LIST_TABLE, Part, SET_NAME, SET_TABLE, is_consistent, parts, put_part, put_set,
};
use super::table::{BaseChain, ChainType, CtHelper, Family, Hook, Object, Policy, TableFlags, TableId};
use super::transaction::{Operation, Place, Transaction};
use super::udata;
use super::wire::{ATTRIBUTE_MAX, HEADER, Head, Writer, malformed, messages};
use super::{expr::Expr, expr_wire::object_kind};

/// `NFTA_TABLE_NAME`
pub(super) const TABLE_NAME: u16 = 1;
/// `NFTA_TABLE_FLAGS`
pub(super) const TABLE_FLAGS: u16 = 2;
/// `NFT_TABLE_F_DORMANT`
pub(super) const F_DORMANT: u32 = 1;
/// `NFT_TABLE_F_OWNER`
pub(super) const F_OWNER: u32 = 2;
/// `NFT_TABLE_F_PERSIST`
pub(super) const F_PERSIST: u32 = 4;

/// `NFTA_CHAIN_TABLE`
pub(super) const CHAIN_TABLE: u16 = 1;
/// `NFTA_CHAIN_NAME`
pub(super) const CHAIN_NAME: u16 = 3;
/// `NFTA_CHAIN_HOOK`
pub(super) const CHAIN_HOOK: u16 = 4;
/// `NFTA_CHAIN_POLICY`
pub(super) const CHAIN_POLICY: u16 = 5;
/// `NFTA_CHAIN_TYPE`
pub(super) const CHAIN_TYPE: u16 = 7;
/// `NFTA_HOOK_HOOKNUM`
pub(super) const HOOK_NUMBER: u16 = 1;
/// `NFTA_HOOK_PRIORITY`
pub(super) const HOOK_PRIORITY: u16 = 2;

/// `NFTA_RULE_TABLE`
pub(super) const RULE_TABLE: u16 = 1;
/// `NFTA_RULE_CHAIN`
pub(super) const RULE_CHAIN: u16 = 2;
/// `NFTA_RULE_HANDLE`
pub(super) const RULE_HANDLE: u16 = 3;
/// `NFTA_RULE_EXPRESSIONS`
pub(super) const RULE_EXPRESSIONS: u16 = 4;
/// `NFTA_RULE_POSITION`
const RULE_POSITION: u16 = 6;
/// `NFTA_RULE_USERDATA`
pub(super) const RULE_USERDATA: u16 = 7;

/// `NFTA_OBJ_TABLE`
pub(super) const OBJ_TABLE: u16 = 1;
/// `NFTA_OBJ_NAME`
pub(super) const OBJ_NAME: u16 = 2;
/// `NFTA_OBJ_TYPE`
pub(super) const OBJ_TYPE: u16 = 3;
/// `NFTA_OBJ_DATA`
pub(super) const OBJ_DATA: u16 = 4;
/// `NFTA_OBJ_USERDATA`
pub(super) const OBJ_USERDATA: u16 = 8;
/// `NFTA_CT_HELPER_NAME`
pub(super) const HELPER_NAME: u16 = 1;
/// `NFTA_CT_HELPER_L3PROTO`
pub(super) const HELPER_L3PROTO: u16 = 2;
/// `NFTA_CT_HELPER_L4PROTO`
pub(super) const HELPER_L4PROTO: u16 = 3;

/// `NFNL_BATCH_GENID`
const BATCH_GENERATION: u16 = 1;

/// Bytes of elements in one message. Longer messages are no faster.
const ELEMENTS_BYTES: usize = ATTRIBUTE_MAX / 2;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const CREATE: u16 = REQUEST | libc::NLM_F_CREATE as u16;

/// The message type of an operation of nf_tables.
pub(super) fn message_type(operation: i32) -> u16 {
    (libc::NFNL_SUBSYS_NFTABLES << 8 | operation) as u16
}

/// `NFPROTO_*`
pub(super) fn family_number(family: Family) -> u8 {
    (match family {
        Family::Bridge => libc::NFPROTO_BRIDGE,
        Family::Inet => libc::NFPROTO_INET,
    }) as u8
}

/// Hooks by their numbers.
pub(super) const HOOKS: [Hook; 5] =
    [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

/// A batch that can be sent.
#[derive(Debug)]
pub(super) struct Batch {
    writer: Writer,
    /// Each message between begin and end: where it starts, and the operation it came of.
    messages: Vec<(usize, usize)>,
    /// The sequence number of the first message, which begins the batch.
    first: u32,
}

/// What a batch says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHead {
    /// The generation for which it was made.
    pub generation: Option<u32>,
}

/// Reads a batch of another process, which must do nothing but change these tables. The error says what else it does.
pub fn check_batch(batch: &[u8], tables: &[TableId]) -> Result<BatchHead, Error> {
    let mut head = None;
    let mut ended = false;
    for message in messages(batch) {
        let message = message?;
        let kind = i32::from(message.kind);
        let (family, attributes) = message.family()?;
        match (head, kind) {
            (None, libc::NFNL_MSG_BATCH_BEGIN) => {
                head = Some(BatchHead { generation: attributes.u32(BATCH_GENERATION) })
            }
            (Some(_), libc::NFNL_MSG_BATCH_END) if !ended => ended = true,
            (Some(_), _) if !ended && CHANGES.contains(&(kind ^ (libc::NFNL_SUBSYS_NFTABLES << 8))) => {
                // Table, chain, rule, set, element or object: the first attribute of each is the table's name.
                let name = attributes.str(TABLE_NAME);
                let is_of = |table: &TableId| {
                    family == family_number(table.family) && name == Some(table.name.as_str())
                };
                if !tables.iter().any(is_of) {
                    let names: Vec<_> = tables.iter().map(TableId::to_string).collect();
                    return Err(malformed(format!("it is about another table than {}", names.join(" and "))));
                }
            }
            _ => return Err(malformed(format!("a message of type {kind:#x} is none of a batch"))),
        }
    }
    head.filter(|_| ended).ok_or_else(|| malformed("a batch without begin or end"))
}

/// Operations that change a table.
const CHANGES: [i32; 12] = [
    libc::NFT_MSG_NEWTABLE,
    libc::NFT_MSG_DELTABLE,
    libc::NFT_MSG_NEWCHAIN,
    libc::NFT_MSG_DELCHAIN,
    libc::NFT_MSG_NEWRULE,
    libc::NFT_MSG_DELRULE,
    libc::NFT_MSG_NEWSET,
    libc::NFT_MSG_DELSET,
    libc::NFT_MSG_NEWSETELEM,
    libc::NFT_MSG_DELSETELEM,
    libc::NFT_MSG_NEWOBJ,
    libc::NFT_MSG_DELOBJ,
];

/// Whether the kernel keeps what a batch does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It does.
    Commit,
    /// Without end the kernel looks at all operations and takes them back.
    Abort,
}

impl Batch {
    /// The batch of a transaction; its messages are numbered from `first` on.
    pub(super) fn new<T: Clone + std::fmt::Debug>(
        transaction: &Transaction<T>,
        generation: Option<u32>,
        first: u32,
        ending: Ending,
    ) -> Result<Self, CommitError<T>> {
        let mut batch = Self { writer: Writer::default(), messages: Vec::new(), first };
        batch.control(libc::NFNL_MSG_BATCH_BEGIN, generation);
        for (index, (operation, tag)) in transaction.operations().iter().enumerate() {
            batch.operation(index, operation).map_err(|why| CommitError::Invalid {
                tag: tag.clone(),
                what: operation.to_string(),
                why,
            })?;
        }
        batch.acknowledge_last();
        if ending == Ending::Commit {
            batch.control(libc::NFNL_MSG_BATCH_END, None);
        }
        Ok(batch)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.writer.bytes()
    }

    /// How many sequence numbers it takes.
    pub(super) fn sequence_numbers(&self) -> u32 {
        self.messages.len() as u32 + 2
    }

    /// The sequence number of the last operation's last message, which is acknowledged.
    pub(super) fn last(&self) -> u32 {
        self.first.wrapping_add(self.messages.len() as u32)
    }

    /// Whether a sequence number is that of the batch's begin.
    pub(super) fn is_begin(&self, sequence: u32) -> bool {
        sequence == self.first
    }

    /// The index of the operation of a sequence number, and the message's bytes.
    pub(super) fn origin(&self, sequence: u32) -> Option<(usize, &[u8])> {
        let index = sequence.wrapping_sub(self.first).checked_sub(1)? as usize;
        let (start, operation) = *self.messages.get(index)?;
        let end = self.messages.get(index + 1).map_or(self.bytes().len(), |(start, _)| *start);
        Some((operation, &self.bytes()[start..end]))
    }

    fn control(&mut self, kind: i32, generation: Option<u32>) {
        let sequence = self.next_sequence();
        let head = Head {
            kind: kind as u16,
            flags: REQUEST,
            sequence,
            family: libc::AF_UNSPEC as u8,
            resource: libc::NFNL_SUBSYS_NFTABLES as u16,
        };
        self.writer.message(head, |w| {
            if let Some(generation) = generation {
                w.put_u32(BATCH_GENERATION, generation);
            }
        });
    }

    fn next_sequence(&self) -> u32 {
        // The begin has none before it.
        let begun = u32::from(!self.bytes().is_empty());
        self.first.wrapping_add(self.messages.len() as u32 + begun)
    }

    /// Sets `NLM_F_ACK` of the last operation's last message, so that the kernel says something when all went well.
    fn acknowledge_last(&mut self) {
        if let Some((start, _)) = self.messages.last() {
            let flags = *start + 6;
            self.writer.set_u16_bits(flags, libc::NLM_F_ACK as u16);
        }
    }

    fn message(
        &mut self,
        operation: usize,
        table: &TableId,
        kind: i32,
        flags: u16,
        attributes: impl FnOnce(&mut Writer),
    ) -> Result<(), String> {
        let start = self.bytes().len();
        let head = Head {
            kind: message_type(kind),
            flags,
            sequence: self.next_sequence(),
            family: family_number(table.family),
            resource: 0,
        };
        self.writer.message(head, attributes);
        if self.writer.take_overflow() {
            self.writer.truncate(start);
            return Err(format!("an attribute is longer than {ATTRIBUTE_MAX} bytes"));
        }
        self.messages.push((start, operation));
        Ok(())
    }

    fn operation(&mut self, index: usize, operation: &Operation) -> Result<(), String> {
        match operation {
            Operation::AddTable { table, flags } => {
                self.message(index, table, libc::NFT_MSG_NEWTABLE, CREATE, |w| {
                    w.put_str(TABLE_NAME, table.name.as_str());
                    w.put_u32(TABLE_FLAGS, table_flags(*flags));
                })
            }
            Operation::DeleteTable { table } => {
                self.message(index, table, libc::NFT_MSG_DELTABLE, REQUEST, |w| {
                    w.put_str(TABLE_NAME, table.name.as_str());
                })
            }
            Operation::AddChain { table, chain } => {
                self.message(index, table, libc::NFT_MSG_NEWCHAIN, CREATE, |w| {
                    w.put_str(CHAIN_TABLE, table.name.as_str());
                    w.put_str(CHAIN_NAME, chain.name.as_str());
                    if let Some(base) = &chain.base {
                        put_base(w, base);
                    }
                })
            }
            Operation::FlushChain { table, chain } => {
                self.message(index, table, libc::NFT_MSG_DELRULE, REQUEST, |w| {
                    w.put_str(RULE_TABLE, table.name.as_str());
                    w.put_str(RULE_CHAIN, chain.as_str());
                })
            }
            Operation::DeleteChain { table, chain } => {
                self.message(index, table, libc::NFT_MSG_DELCHAIN, REQUEST, |w| {
                    w.put_str(CHAIN_TABLE, table.name.as_str());
                    w.put_str(CHAIN_NAME, chain.as_str());
                })
            }
            Operation::AddRule { table, chain, place, rule } => {
                let append = libc::NLM_F_APPEND as u16;
                let (flags, position) = match *place {
                    Place::End => (CREATE | append, None),
                    Place::Beginning => (CREATE, None),
                    Place::After(handle) => (CREATE | append, Some(handle)),
                    Place::Before(handle) => (CREATE, Some(handle)),
                };
                self.message(index, table, libc::NFT_MSG_NEWRULE, flags, |w| {
                    w.put_str(RULE_TABLE, table.name.as_str());
                    w.put_str(RULE_CHAIN, chain.as_str());
                    if let Some(position) = position {
                        w.put_u64(RULE_POSITION, position);
                    }
                    put_rule(w, rule);
                })
            }
            Operation::ReplaceRule { table, chain, handle, rule } => {
                let flags = REQUEST | libc::NLM_F_REPLACE as u16;
                self.message(index, table, libc::NFT_MSG_NEWRULE, flags, |w| {
                    w.put_str(RULE_TABLE, table.name.as_str());
                    w.put_str(RULE_CHAIN, chain.as_str());
                    w.put_u64(RULE_HANDLE, *handle);
                    put_rule(w, rule);
                })
            }
            Operation::DeleteRule { table, chain, handle } => {
                self.message(index, table, libc::NFT_MSG_DELRULE, REQUEST, |w| {
                    w.put_str(RULE_TABLE, table.name.as_str());
                    w.put_str(RULE_CHAIN, chain.as_str());
                    w.put_u64(RULE_HANDLE, *handle);
                })
            }
            Operation::AddSet { table, set } => {
                let id = self.messages.len() as u32 + 1;
                self.message(index, table, libc::NFT_MSG_NEWSET, CREATE, |w| {
                    w.put_str(SET_TABLE, table.name.as_str());
                    put_set(w, set, id);
                })
            }
            Operation::FlushSet { table, set } => {
                self.message(index, table, libc::NFT_MSG_DELSETELEM, REQUEST, |w| {
                    w.put_str(LIST_TABLE, table.name.as_str());
                    w.put_str(LIST_SET, set.as_str());
                })
            }
            Operation::DeleteSet { table, set } => {
                self.message(index, table, libc::NFT_MSG_DELSET, REQUEST, |w| {
                    w.put_str(SET_TABLE, table.name.as_str());
                    w.put_str(SET_NAME, set.as_str());
                })
            }
            Operation::AddElements { table, set, elements } => {
                self.elements(index, table, set, elements, libc::NFT_MSG_NEWSETELEM)
            }
            Operation::DeleteElements { table, set, elements } => {
                self.elements(index, table, set, elements, libc::NFT_MSG_DELSETELEM)
            }
            Operation::AddObject { table, object } => {
                self.message(index, table, libc::NFT_MSG_NEWOBJ, CREATE, |w| {
                    put_object(w, table, object, false)
                })
            }
            Operation::DeleteObject { table, object } => {
                self.message(index, table, libc::NFT_MSG_DELOBJ, REQUEST, |w| {
                    put_object(w, table, object, true)
                })
            }
        }
    }

    /// Elements in as many messages as they take.
    fn elements(
        &mut self,
        index: usize,
        table: &TableId,
        set: &Set,
        elements: &[Element],
        kind: i32,
    ) -> Result<(), String> {
        let (flags, key_only) =
            if kind == libc::NFT_MSG_NEWSETELEM { (CREATE, false) } else { (REQUEST, true) };
        let mut list = Writer::default();
        for element in elements {
            is_consistent(set, element)?;
            // Both ends of a range stay in one message.
            parts(set, element, |part: Part<'_>| put_part(&mut list, &part, key_only));
            if list.bytes().len() > ELEMENTS_BYTES {
                self.element_list(index, table, set, kind, flags, &mut list)?;
            }
        }
        if list.bytes().is_empty() {
            return Ok(());
        }
        self.element_list(index, table, set, kind, flags, &mut list)
    }

    fn element_list(
        &mut self,
        index: usize,
        table: &TableId,
        set: &Set,
        kind: i32,
        flags: u16,
        list: &mut Writer,
    ) -> Result<(), String> {
        self.message(index, table, kind, flags, |w| {
            w.put_str(LIST_TABLE, table.name.as_str());
            w.put_str(LIST_SET, set.name.as_str());
            w.nest(LIST_ELEMENTS, |w| w.raw(list.bytes()));
        })?;
        list.truncate(0);
        Ok(())
    }
}

/// The attribute of a message at an offset from its begin, where it is an expression of a rule: which one.
pub(super) fn expression_at(message: &[u8], offset: usize) -> Option<usize> {
    // struct nfgenmsg
    let attributes = HEADER + 4;
    let list = walk(message, attributes..message.len()).find(|(_, kind, _)| *kind == RULE_EXPRESSIONS)?.2;
    walk(message, list).position(|(at, kind, _)| at == offset && kind == LIST_ELEM)
}

/// Where each attribute begins, its kind, and where its value is.
fn walk(message: &[u8], within: Range<usize>) -> impl Iterator<Item = (usize, u16, Range<usize>)> {
    let mut at = within.start;
    std::iter::from_fn(move || {
        let head = message.get(at..at + 4).filter(|_| at < within.end)?;
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        // Without NLA_F_NESTED.
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let found = (at, kind, at + 4..at + len.max(4));
        at += len.max(4).next_multiple_of(4);
        Some(found)
    })
}

fn table_flags(flags: TableFlags) -> u32 {
    let bits = [(flags.dormant, F_DORMANT), (flags.owner, F_OWNER), (flags.persist, F_PERSIST)];
    bits.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
}

fn put_base(w: &mut Writer, base: &BaseChain) {
    let ChainType::Filter = base.kind;
    w.put_str(CHAIN_TYPE, "filter");
    let policy = if base.policy == Policy::Accept { libc::NF_ACCEPT } else { libc::NF_DROP };
    w.put_u32(CHAIN_POLICY, policy.cast_unsigned());
    w.nest(CHAIN_HOOK, |w| {
        let hook = HOOKS.iter().position(|hook| *hook == base.hook).unwrap_or_default();
        w.put_u32(HOOK_NUMBER, hook as u32);
        w.put_u32(HOOK_PRIORITY, base.priority.cast_unsigned());
    });
}

fn put_rule(w: &mut Writer, rule: &Rule) {
    w.nest(RULE_EXPRESSIONS, |w| rule.exprs.iter().for_each(|expr: &Expr| put_expr(w, expr)));
    if rule.comment.is_some() {
        w.put(RULE_USERDATA, &udata::of_rule(rule.comment.as_ref()));
    }
}

fn put_object(w: &mut Writer, table: &TableId, object: &Object, key_only: bool) {
    w.put_str(OBJ_TABLE, table.name.as_str());
    w.put_str(OBJ_NAME, object.name().as_str());
    w.put_u32(OBJ_TYPE, object_kind(object.kind()));
    if key_only {
        return;
    }
    let Object::CtHelper(CtHelper { helper, protocol, l3proto, comment, .. }) = object;
    w.nest(OBJ_DATA, |w| {
        w.put_str(HELPER_NAME, helper);
        if let Some(l3proto) = l3proto {
            w.put_u16(HELPER_L3PROTO, *l3proto);
        }
        w.put_u8(HELPER_L4PROTO, *protocol);
    });
    if comment.is_some() {
        w.put(OBJ_USERDATA, &udata::of_object(comment.as_ref()));
    }
}
