//! A rule, and how one is built without counting registers.

use std::fmt;

use super::expr::{
    Bitwise, Byteorder, Cmp, Connlimit, Dynset, DynsetOp, Expr, Hash, Limit, Load, Log, Lookup, LookupResult,
    Order, Range, Register, Reject, Relation, Stateful, Verdict,
};
use super::name::{ObjectName, SetName};
use super::table::Object;

/// What is done with a packet: expressions from the first to the last, until one does not match.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// The expressions.
    pub exprs: Vec<Expr>,
    /// What `nft list` shows behind the rule.
    pub comment: Option<Comment>,
}

impl Rule {
    /// A rule that does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an expression.
    pub fn expr(mut self, expr: Expr) -> Self {
        self.exprs.push(expr);
        self
    }

    /// Sets the comment.
    pub fn comment(mut self, comment: Comment) -> Self {
        self.comment = Some(comment);
        self
    }

    /// Goes on if a value is in a relation to a constant, which is as long as the value.
    pub fn cmp(self, load: Load, relation: Relation, value: impl Into<Vec<u8>>) -> Self {
        let sreg = Register::FIRST;
        self.load(load).expr(Expr::Cmp(Cmp { sreg, relation, value: value.into() }))
    }

    /// Goes on if a value equals a constant.
    pub fn equal(self, load: Load, value: impl Into<Vec<u8>>) -> Self {
        self.cmp(load, Relation::Equal, value)
    }

    /// Goes on if the bits of a value that a mask keeps are in a relation to a constant of the same length.
    pub fn masked(
        self,
        load: Load,
        mask: impl Into<Vec<u8>>,
        relation: Relation,
        value: impl Into<Vec<u8>>,
    ) -> Self {
        let (mask, sreg) = (mask.into(), Register::FIRST);
        let xor = vec![0; mask.len()];
        self.load(load).expr(Expr::Bitwise(Bitwise { sreg, dreg: sreg, mask, xor })).expr(Expr::Cmp(Cmp {
            sreg,
            relation,
            value: value.into(),
        }))
    }

    /// Goes on if a value is between two constants of its length in network byte order, both included; or, negated,
    /// if it is not. A value in the host's byte order is turned.
    pub fn range(
        mut self,
        load: Load,
        negate: bool,
        from: impl Into<Vec<u8>>,
        to: impl Into<Vec<u8>>,
    ) -> Self {
        let sreg = Register::FIRST;
        let len = load.len() as u32;
        self = self.load(load);
        if load.order() == Order::Host && len > 1 {
            self = self.expr(Expr::Byteorder(Byteorder {
                sreg,
                dreg: sreg,
                to: Order::Network,
                len,
                size: len,
            }));
        }
        let (from, to) = (from.into(), to.into());
        if negate {
            return self.expr(Expr::Range(Range { sreg, negate, from, to }));
        }
        // As nft does: two comparisons are faster than `range`.
        self.expr(Expr::Cmp(Cmp { sreg, relation: Relation::GreaterOrEqual, value: from }))
            .expr(Expr::Cmp(Cmp { sreg, relation: Relation::LessOrEqual, value: to }))
    }

    /// Goes on if a concatenation of values is in a set.
    pub fn is_in(self, loads: &[Load], set: &SetName) -> Self {
        self.lookup(loads, set, LookupResult::Match)
    }

    /// Goes on if a concatenation of values is not in a set.
    pub fn is_not_in(self, loads: &[Load], set: &SetName) -> Self {
        self.lookup(loads, set, LookupResult::NoMatch)
    }

    /// Does what a verdict map has for a concatenation of values; goes on if it has nothing.
    pub fn vmap(self, loads: &[Load], map: &SetName) -> Self {
        self.lookup(loads, map, LookupResult::Verdict)
    }

    /// Loads what a map has for a concatenation of values into the first register; ends the rule if it has nothing.
    pub fn map(self, loads: &[Load], map: &SetName) -> Self {
        self.lookup(loads, map, LookupResult::Data(Register::FIRST))
    }

    fn lookup(self, loads: &[Load], set: &SetName, result: LookupResult) -> Self {
        let set = set.clone();
        self.concat(loads).expr(Expr::Lookup(Lookup { set, sreg: Register::FIRST, result }))
    }

    /// Loads a number that a value always gives, from `offset` on and `modulus` of them, into the first register.
    pub fn jhash(self, load: Load, modulus: u32, seed: u32, offset: u32) -> Self {
        // The register of 16 bytes behind the first one, as nft has it.
        let (sreg, dreg) = (Register::SECOND_WIDE, Register::FIRST);
        let len = load.len() as u32;
        self.expr(Expr::Load { load, dreg: sreg }).expr(Expr::Hash(Hash {
            sreg,
            dreg,
            len,
            modulus,
            seed,
            offset,
        }))
    }

    /// Counts the packet.
    pub fn counter(self) -> Self {
        self.expr(Expr::Stateful(Stateful::Counter))
    }

    /// Goes on within (or over) a limit.
    pub fn limit(self, limit: Limit) -> Self {
        self.expr(Expr::Stateful(Stateful::Limit(limit)))
    }

    /// Goes on by the number of connections that came here.
    pub fn connlimit(self, limit: Connlimit) -> Self {
        self.expr(Expr::Stateful(Stateful::Connlimit(limit)))
    }

    /// Goes on by the number of connections that came here with the same concatenation of values, which are kept in a
    /// dynamic set.
    pub fn connlimit_by(self, loads: &[Load], set: &SetName, limit: Connlimit) -> Self {
        self.concat(loads).expr(Expr::Dynset(Dynset {
            set: set.clone(),
            op: DynsetOp::Add,
            sreg: Register::FIRST,
            timeout: None,
            stateful: vec![Stateful::Connlimit(limit)],
            invert: false,
        }))
    }

    /// Tells of the packet.
    pub fn log(self, log: Log) -> Self {
        self.expr(Expr::Log(log))
    }

    /// Runs an object: assigns a conntrack helper.
    pub fn object(self, object: &Object) -> Self {
        let name: ObjectName = object.name().clone();
        self.expr(Expr::Object { kind: object.kind(), name })
    }

    /// Answers the packet and drops it.
    pub fn reject(self, reject: Reject) -> Self {
        self.expr(Expr::Reject(reject))
    }

    /// Ends with a verdict.
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.expr(Expr::Verdict(verdict))
    }

    /// Loads a value into the first registers.
    fn load(self, load: Load) -> Self {
        self.expr(Expr::Load { load, dreg: Register::FIRST })
    }

    /// Loads values into adjacent registers.
    ///
    /// # Panics
    ///
    /// When they take more than the 64 bytes that there are.
    pub fn concat(mut self, loads: &[Load]) -> Self {
        let mut next = Some(Register::FIRST);
        for load in loads {
            let Some(dreg) = next else { panic!("{loads:?} take more than all registers") };
            next = dreg.after(load.len());
            self = self.expr(Expr::Load { load: *load, dreg });
        }
        self
    }
}

/// A comment that `nft list` shows and a kernel keeps: at most 127 bytes, without `"` and control characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Comment(String);

/// Bytes that nft reads of a comment, without the NUL at its end.
const COMMENT_MAX: usize = 127;

impl Comment {
    /// A comment of a text: what cannot be kept is replaced, what is too long is cut.
    pub fn new(text: &str) -> Self {
        let mut kept: String = text
            .chars()
            .map(|c| match c {
                '"' => '\'',
                c if c.is_control() => ' ',
                c => c,
            })
            .collect();
        if kept.len() > COMMENT_MAX {
            while kept.len() > COMMENT_MAX - '…'.len_utf8() {
                kept.pop();
            }
            kept.push('…');
        }
        Self(kept)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Comment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Comment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::field;

    #[test]
    fn a_comment_is_cut_between_characters_and_keeps_no_quotes() {
        assert_eq!(Comment::new("say \"a\"\n").as_str(), "say 'a' ");
        let cut = Comment::new(&"ü".repeat(100));
        assert_eq!(cut.as_str(), format!("{}…", "ü".repeat(62)));
        assert_eq!(Comment::new(&"a".repeat(127)).as_str().len(), 127);
    }

    #[test]
    fn loads_of_a_concatenation_are_adjacent() {
        let rule = Rule::new().concat(&[field::IIFNAME, field::ETHER_SADDR, field::IP_SADDR]);
        let registers = rule.exprs.iter().map(|expr| match expr {
            Expr::Load { dreg, .. } => dreg.index(),
            other => panic!("{other:?}"),
        });
        assert_eq!(registers.collect::<Vec<_>>(), [0, 4, 6]);
    }
}
