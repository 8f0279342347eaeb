//! Splits rulesets into classes, which ports of the same filter share, and values, which each port has.
//!
//! A class is a ruleset without the values of the port's variables. If a rule compares a field with such a value, the class
//! looks up the port and the field in a set: `iifname . ether saddr @clean-1c0ffee-0`. Two ports share a class only if
//! their rulesets without these values are equal:
//!
//! * Successive rules that differ only in values of variables, such as those of a list, become one rule, and its set holds the
//!   values of all. Several variables of one rule become one set of concatenations.
//! * A negated rule tests that the value is not in the set, which is equivalent only for one value. With more values, each
//!   rule keeps its value in the class.
//! * A value that is not a single value of a field (a network, a range, masked bits) stays in the class. So does a value of a
//!   field without an nft type.
//!
//! Ports with equal sets and chains share a class, so a class is named after the digest of these.

mod builder;
mod flat;

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};

use nwfilter_rules::{LogGroup, Origin, Ruleset, Transport, Unsupported};

use builder::Builder;

use crate::condition::Condition;
use crate::kernel::Datatype;
use crate::kernel::expr::{Connlimit, Load, Reject};

/// The chains and sets that ports of the same filter share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Class {
    /// The name of the filter, for people.
    pub(crate) title: String,
    /// Its chains.
    pub(crate) chains: Vec<ClassChain>,
    /// The first chain for frames from the guest; `None` if all pass.
    pub(crate) from_guest: Option<ChainIndex>,
    /// The first chain for frames to the guest; `None` if all pass.
    pub(crate) to_guest: Option<ChainIndex>,
    /// The first chain for frames to the guest when they enter the bridge; `None` if the class rejects none.
    pub(crate) toward_guest: Option<ChainIndex>,
    /// Whether packets to the guest are dropped although they should be rejected.
    pub(crate) lacks_answers: bool,
    /// The sets of its ports' values.
    pub(crate) sets: Vec<ClassSet>,
    /// The sets in which something is counted for each port.
    pub(crate) counted: Vec<Counted>,
    /// The conntrack helpers that it assigns.
    pub(crate) helpers: BTreeSet<HelperKind>,
}

/// The values of one port for each set of its class: the fields after the port's name.
pub(crate) type Values = Vec<BTreeSet<Vec<Vec<u8>>>>;

/// A chain of a class.
pub(crate) type ChainIndex = usize;

/// A set of a class. Its keys begin with the port's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ClassSet {
    /// The fields after the name.
    pub(crate) fields: Vec<Datatype>,
    /// The variables that the values come from.
    pub(crate) variables: String,
}

/// What a set of a class counts for each port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Counted {
    /// The connections of each address.
    Connections(Datatype),
    /// The packets that were logged lately, of one way.
    Logged(Way),
}

/// A chain of a class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ClassChain {
    /// Its name, without that of the class.
    pub(crate) suffix: String,
    /// Whether it is for frames that the guest sends.
    pub(crate) way: Way,
    /// Its rules.
    pub(crate) rules: Vec<ClassRule>,
}

/// The frames of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Way {
    /// From the guest: the port is the input interface.
    FromGuest,
    /// To the guest: the port is the output interface.
    ToGuest,
    /// To the guest, when they enter the bridge: only there the kernel can reject. The rules are those for frames to the guest,
    /// but frames that they drop or accept continue, and meet the rules again on their way out.
    Ahead,
}

/// The ways that are dispatched by the names of ports.
pub(crate) const BY_PORT: [Way; 2] = [Way::FromGuest, Way::ToGuest];

/// A rule of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClassRule {
    /// Its conditions.
    pub(crate) matches: Vec<ClassMatch>,
    /// Its verdict.
    pub(crate) action: Action,
    /// The filter's rule; built-in for rules between chains.
    pub(crate) origin: Origin,
    /// Its comment: its origin, and the comment in the filter.
    pub(crate) comment: Option<String>,
}

impl Hash for ClassRule {
    /// Does not hash the rule's line: a filter has other lines in the store than in the file it was defined from.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.matches.hash(state);
        self.action.hash(state);
        self.origin.filter.hash(state);
        let origin = self.origin.to_string();
        self.comment.as_deref().map(|comment| comment.strip_prefix(&origin).unwrap_or(comment)).hash(state);
    }
}

/// A condition of a rule of a class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ClassMatch {
    /// The same for all ports.
    Literal(Condition),
    /// The port and fields of the packet are in a set, or are not.
    Member { set: usize, loads: Vec<Load>, negated: bool },
    /// The port and an address have more connections than that, or not.
    Connlimit { counted: usize, source: Load, limit: Connlimit },
    /// Packets of the port were not logged too often.
    LogLimit { counted: usize },
}

/// The verdict of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// It passes.
    Accept,
    /// It is dropped.
    Drop,
    /// It is rejected.
    Reject(Reject),
    /// It continues after the jump to this chain.
    Return,
    /// It is counted.
    Continue,
    /// It continues in another chain, and returns at its end.
    Jump(ChainIndex),
    /// It continues in another chain.
    Goto(ChainIndex),
    /// Its connection gets a helper.
    Helper(HelperKind),
    /// It is logged.
    Log(LogGroup),
}

/// A conntrack helper object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HelperKind {
    /// The kernel's name of the helper.
    pub(crate) name: &'static str,
    /// The transport protocol.
    pub(crate) transport: Transport,
}

impl HelperKind {
    /// The transport's number.
    pub(crate) fn protocol(self) -> u8 {
        match self.transport {
            Transport::Tcp => 6,
            Transport::Udp => 17,
        }
    }
}

/// The class of a ruleset, and the port's values.
pub(crate) fn of(ruleset: &Ruleset) -> Result<(Class, Values), Unsupported> {
    let mut builder = Builder { class: Class::empty(title(ruleset)), values: Values::new() };
    builder.side(ruleset, Way::FromGuest)?;
    builder.side(ruleset, Way::ToGuest)?;
    builder.answers(ruleset)?;
    Ok((builder.class, builder.values))
}

/// The filter of the first rule of a ruleset.
fn title(ruleset: &Ruleset) -> String {
    let first = ruleset.rules().find_map(|rule| rule.origin().filter.clone());
    first.map_or_else(|| "nwfilter".to_string(), |filter| filter.to_string())
}

impl Class {
    fn empty(title: String) -> Self {
        Self {
            title,
            chains: Vec::new(),
            from_guest: None,
            to_guest: None,
            toward_guest: None,
            lacks_answers: false,
            sets: Vec::new(),
            counted: Vec::new(),
            helpers: BTreeSet::new(),
        }
    }

    /// Its digest.
    pub(crate) fn digest(&self) -> u64 {
        let mut digest = Digest::default();
        self.hash(&mut digest);
        digest.finish()
    }

    /// The conditions of its rules that are the same for all ports.
    pub(crate) fn literals(&self) -> impl Iterator<Item = &Condition> {
        let rules = self.chains.iter().flat_map(|chain| &chain.rules);
        rules.flat_map(|rule| &rule.matches).filter_map(|m| match m {
            ClassMatch::Literal(condition) => Some(condition),
            _ => None,
        })
    }
}

/// A hash of 64 bits, eight bytes at a time: the same in every build, unlike the standard library's.
struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Digest {
    fn finish(&self) -> u64 {
        // The last steps of MurmurHash3, so that each bit counts in all of them.
        let mut digest = self.0;
        digest = (digest ^ (digest >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        digest = (digest ^ (digest >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        digest ^ (digest >> 33)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let word = u64::from_le_bytes(word);
            self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nwfilter_rules::instantiate;
    use nwfilter_xml::{Filter, read_binding, read_filter};

    use super::*;

    /// The class and values of a filter's rules, for a port with these parameters.
    fn class(rules: &str, parameters: &[(&str, &str)]) -> (Class, Values) {
        let text = format!("<filter name='f' chain='root'>{rules}</filter>");
        let filter: Filter = read_filter("f.xml", &text).into_result().unwrap();
        let parameters: String = parameters
            .iter()
            .map(|(name, value)| format!("<parameter name='{name}' value='{value}'/>"))
            .collect();
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='port0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'>{parameters}</filterref></filterbinding>"
        );
        let binding = read_binding("b.xml", &binding).into_result().unwrap();
        of(&instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding).unwrap()).unwrap()
    }

    const ACCEPT_IP: &str = "<rule action='accept' direction='out'><ip srcipaddr='$IP'/></rule>";
    const DROP_OTHERS: &str = "<rule action='drop' direction='out'><ip match='no' srcipaddr='$IP'/></rule>";

    #[test]
    fn a_list_of_any_length_is_membership() {
        let (one, values) = class(ACCEPT_IP, &[("IP", "10.0.0.1")]);
        let (three, more) = class(ACCEPT_IP, &[("IP", "10.0.0.1"), ("IP", "10.0.0.2"), ("IP", "10.0.0.3")]);
        assert_eq!(one, three);
        assert_eq!(one.digest(), three.digest());
        assert_eq!((values[0].len(), more[0].len()), (1, 3));
    }

    #[test]
    fn not_one_value_is_absence_and_not_one_of_several_is_a_class_of_its_own() {
        let (one, values) = class(DROP_OTHERS, &[("IP", "10.0.0.1")]);
        assert_eq!(one, class(DROP_OTHERS, &[("IP", "10.0.0.2")]).0);
        assert_eq!(values, [BTreeSet::from([vec![vec![10, 0, 0, 1]]])]);
        let several = |last: &str| class(DROP_OTHERS, &[("IP", "10.0.0.1"), ("IP", last)]);
        assert_ne!(several("10.0.0.2").0, several("10.0.0.3").0);
        assert!(several("10.0.0.2").1.is_empty());
    }

    #[test]
    fn parallel_lists_are_concatenations() {
        let rule = "<rule action='accept' direction='out'><ip srcipaddr='$IP' dstipaddr='$TO'/></rule>";
        let lists = [("IP", "10.0.0.1"), ("IP", "10.0.0.2"), ("TO", "10.1.0.1"), ("TO", "10.1.0.2")];
        let (class, values) = class(rule, &lists);
        assert_eq!(class.sets.len(), 1);
        assert_eq!(class.sets[0].fields, [Datatype::Ipv4Addr, Datatype::Ipv4Addr]);
        let pair = |last| vec![vec![10, 0, 0, last], vec![10, 1, 0, last]];
        assert!(values[0].contains(&pair(1)) && values[0].contains(&pair(2)), "{values:?}");
    }

    #[test]
    fn networks_stay_in_the_class() {
        let rule = "<rule action='accept' direction='out'><ip srcipaddr='$IP' srcipmask='24'/></rule>";
        let of = |addr: &str| class(rule, &[("IP", addr)]);
        assert!(of("10.0.0.1").1.is_empty());
        assert_ne!(of("10.0.0.1").0, of("10.0.1.1").0);
    }

    #[test]
    fn fields_of_a_spanning_tree_frame_are_those_of_a_configuration() {
        let dropping = |attributes: &str| {
            let rule = format!("<rule action='drop' direction='out'><stp {attributes}/></rule>");
            let (class, _) = class(&rule, &[]);
            class.chains[0].rules.iter().filter(|rule| rule.action == Action::Drop).count()
        };
        assert_eq!(
            dropping("root-priority='1' root-cost='2' sender-priority='3' port='4' hello-time='5'"),
            1
        );
        assert_eq!(dropping("match='no' type='1' root-priority='1'"), 1);
        // A frame of another type has none of the fields.
        assert_eq!(dropping("match='no' type='0' root-priority='1'"), 0);
        assert_eq!(dropping("type='128' root-priority='1'"), 0);
    }

    #[test]
    fn limits_on_connections_are_counted_for_each_rule() {
        let rule =
            "<rule action='drop' direction='in'><tcp dstportstart='$PORT' connlimit-above='3'/></rule>";
        let (class, values) = class(rule, &[("PORT", "22"), ("PORT", "80")]);
        assert_eq!((class.counted.len(), values.len()), (2, 0));
    }
}
