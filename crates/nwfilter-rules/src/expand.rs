//! Expands a filter tree for a binding: includes, variables, priorities and order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use nwfilter_xml::{
    Access, Binding, ChainKind, ChainName, Entry, Field, Filter, FilterName, Layer, Literal, Matches, Params,
    Priority, Rule as XmlRule, Value, VarRef,
};

use crate::error::RulesError;
use crate::helper;
use crate::lower_ethernet;
use crate::lower_ip;
use crate::packet::EthernetTest;
use crate::ruleset::{
    EthernetRule, EthernetSide, IpPart, Jump, Match, Origin, RootEntry, Ruleset, SubChain, Verdict,
};
use crate::sets;
use crate::tree::{Filters, MAX_EXPANSION, Size, sizes};
use crate::variables::Combination;

/// The ruleset of a binding.
///
/// MAC is the binding's `<mac>` unless a parameter sets it. If [`RulesError::MissingVariables`] names only `IP`, the caller
/// may learn the address and call this again with it.
///
/// A tree with more than [`MAX_EXPANSION`] rules, counting every combination of list values, or with more includes than
/// that, is refused before it is expanded.
pub fn instantiate(filters: &impl Filters, binding: &Binding) -> Result<Ruleset, RulesError> {
    let mut binding = binding.clone();
    binding.pass_mac();
    let mac = binding.mac;
    let params = Arc::new(binding.params);
    let sizes = sizes(filters, &binding.filter)?;
    let mut expansion =
        Expansion { filters, sizes, rules: Vec::new(), made: 0, missing: BTreeSet::new(), passed: 0 };
    expansion.follow(&binding.filter, params.clone())?;
    let Expansion { mut rules, missing, .. } = expansion;
    if !missing.is_empty() {
        return Err(RulesError::MissingVariables { names: missing.into_iter().collect() });
    }
    // The sort is stable: rules of equal priority keep their order.
    rules.sort_by_key(|rule| (!rule.chain.is_root(), rule.rule.priority));
    let mut ruleset = lower(&rules)?;
    sets::resolve(filters, &mut ruleset)?;
    ruleset.helpers = helper::helpers(&rules, &params)?;
    ruleset.guest_addresses = helper::guest_addresses(&params);
    ruleset.guest_mac = Some(mac);
    Ok(ruleset)
}

/// A rule of the tree with its scope of variables.
pub(crate) struct Scoped<'a> {
    pub(crate) rule: &'a XmlRule,
    pub(crate) chain: &'a ChainName,
    pub(crate) chain_priority: Priority,
    pub(crate) params: Arc<Params>,
    pub(crate) origin: Origin,
    /// The number of rules before it in the tree.
    pub(crate) position: usize,
}

struct Expansion<'a, F> {
    filters: &'a F,
    sizes: HashMap<&'a FilterName, Size>,
    rules: Vec<Scoped<'a>>,
    /// The number of rules after list values are multiplied, with repeated combinations.
    made: usize,
    missing: BTreeSet<String>,
    /// The number of variables in the scopes of includes.
    passed: usize,
}

/// A filter that is being expanded.
struct Level<'a> {
    filter: &'a Filter,
    source: Arc<FilterName>,
    params: Arc<Params>,
    /// The entries that are not yet expanded.
    entries: std::slice::Iter<'a, Entry>,
}

impl<'a, F: Filters> Expansion<'a, F> {
    /// Collects the rules of a filter and its includes. Does not recurse, because chains of includes may be deeper than the
    /// stack.
    fn follow(&mut self, name: &FilterName, params: Arc<Params>) -> Result<(), RulesError> {
        let mut levels: Vec<_> = self.enter(name, params).into_iter().collect();
        while let Some(level) = levels.last_mut() {
            match level.entries.next() {
                Some(Entry::Rule(rule)) => {
                    let Level { filter, source, params, .. } = level;
                    self.rule(filter, rule, source, params)?;
                }
                Some(Entry::Include(include)) => {
                    let params = match include.params.is_empty() {
                        true => level.params.clone(),
                        false => {
                            self.passed += include.params.len() + level.params.len();
                            if self.passed > MAX_EXPANSION {
                                let (filter, limit) = (level.filter.name.clone(), MAX_EXPANSION);
                                return Err(RulesError::PassesTooMuch { filter, limit });
                            }
                            Arc::new(include.params.overlaid_by(&level.params))
                        }
                    };
                    levels.extend(self.enter(&include.filter, params));
                }
                None => drop(levels.pop()),
            }
        }
        Ok(())
    }

    /// `None` if there is no rule to be found.
    fn enter(&self, name: &FilterName, params: Arc<Params>) -> Option<Level<'a>> {
        let filters: &'a F = self.filters;
        let filter = filters.filter(name)?;
        let size = self.sizes.get(&filter.name)?;
        let entries = filter.entries.iter();
        let source = Arc::new(filter.name.clone());
        (size.rules > 0).then_some(Level { filter, source, params, entries })
    }

    fn rule(
        &mut self,
        filter: &'a Filter,
        rule: &'a XmlRule,
        source: &Arc<FilterName>,
        params: &Arc<Params>,
    ) -> Result<(), RulesError> {
        let origin = Origin { filter: Some(source.clone()), line: rule.place.line };
        let mut made = 1_usize;
        let mut iterators = Vec::new();
        for item in rule.matches.iter().flat_map(|matches| &matches.items) {
            let Value::Variable(variable) = &item.value else { continue };
            let values = params.get(variable.name.as_str());
            let given = match variable.access {
                Access::Iterator(id) => {
                    if !iterators.contains(&id) {
                        iterators.push(id);
                        made = made.saturating_mul(values.map_or(1, <[String]>::len));
                    }
                    values.is_some()
                }
                Access::Element(index) => values.is_some_and(|values| (index as usize) < values.len()),
            };
            if !given {
                self.missing.insert(variable.to_string().trim_start_matches('$').to_owned());
            }
        }
        self.made = self.made.saturating_add(made);
        if self.made > MAX_EXPANSION {
            return Err(RulesError::TooManyRules { origin, limit: MAX_EXPANSION });
        }
        self.rules.push(Scoped {
            rule,
            chain: &filter.chain,
            chain_priority: filter.priority,
            params: params.clone(),
            origin,
            position: self.rules.len(),
        });
        Ok(())
    }
}

/// The values of a rule's attributes, with the variables of one combination.
pub(crate) struct Fields<'a> {
    pub(crate) origin: &'a Origin,
    matches: Option<&'a Matches>,
    /// A bit for each field that the rule has. Lowering looks up all fields, and a rule has few.
    present: u128,
    combination: &'a Combination<'a>,
}

impl Fields<'_> {
    /// The value of a field, and whether it is negated. `None` if the rule does not have the field.
    #[inline]
    pub(crate) fn get(&self, field: Field) -> Result<Option<(Literal, bool)>, RulesError> {
        if self.present & bit(field) == 0 { Ok(None) } else { self.value(field) }
    }

    fn value(&self, field: Field) -> Result<Option<(Literal, bool)>, RulesError> {
        let Some(item) = self.matches.and_then(|matches| matches.get(field)) else { return Ok(None) };
        let literal = match &item.value {
            Value::Literal(literal) => literal.clone(),
            Value::Variable(variable) => {
                let text = self.combination.value(variable).unwrap_or_default();
                item.attribute.kind.parse(text).ok_or_else(|| RulesError::BadValue {
                    origin: self.origin.clone(),
                    attribute: item.attribute.name,
                    variable: variable.to_string().trim_start_matches('$').to_owned(),
                    value: text.to_owned(),
                    expected: item.attribute.kind.expected(),
                })?
            }
        };
        Ok(Some((literal, item.negated)))
    }

    /// The variables that stand for the values of these fields.
    pub(crate) fn variables(&self, fields: &[Field]) -> Vec<VarRef> {
        let items = fields.iter().filter(|field| self.present & bit(**field) != 0);
        let items = items.filter_map(|field| self.matches.and_then(|matches| matches.get(*field)));
        let variables = items.filter_map(|item| match &item.value {
            Value::Variable(variable) => Some(variable.clone()),
            Value::Literal(_) => None,
        });
        variables.collect()
    }

    /// An error about this rule.
    pub(crate) fn inexpressible(&self, why: impl Into<String>) -> RulesError {
        RulesError::Inexpressible { origin: self.origin.clone(), why: why.into() }
    }
}

fn bit(field: Field) -> u128 {
    const { assert!((Field::Comment as u8) < 128) };
    1 << field as u8
}

/// Calls `each` with every combination of values of the rule's variables.
pub(crate) fn for_each_combination(
    scoped: &Scoped<'_>,
    mut each: impl FnMut(&Fields<'_>) -> Result<(), RulesError>,
) -> Result<(), RulesError> {
    let variables = scoped.rule.variables();
    let mut combination = Combination::first(variables, &scoped.params, &scoped.origin)?;
    let matches = scoped.rule.matches.as_ref();
    let items = matches.iter().flat_map(|matches| &matches.items);
    let present = items.fold(0, |present, item| present | bit(item.attribute.field));
    loop {
        let fields = Fields { origin: &scoped.origin, matches, present, combination: &combination };
        each(&fields)?;
        if !combination.advance() {
            return Ok(());
        }
    }
}

/// The rules, sorted, as a ruleset.
fn lower(rules: &[Scoped<'_>]) -> Result<Ruleset, RulesError> {
    let (mut from_guest, mut to_guest) = (SideBuilder::default(), SideBuilder::default());
    let (mut ipv4, mut ipv6) = (None::<IpPart>, None::<IpPart>);
    for scoped in rules {
        let direction = scoped.rule.direction;
        let layer = scoped.rule.matches.as_ref().map_or(Layer::Ethernet, |matches| matches.protocol.layer());
        if layer == Layer::Ethernet {
            if direction.is_out() {
                from_guest.enter(scoped);
            }
            if direction.is_in() {
                to_guest.enter(scoped);
            }
        }
        for_each_combination(scoped, |fields| {
            match layer {
                Layer::Ethernet => {
                    if direction.is_out() {
                        from_guest
                            .push(scoped, lower_ethernet::lower(scoped.rule, fields, direction.is_in())?);
                    }
                    if direction.is_in() {
                        to_guest.push(scoped, lower_ethernet::lower(scoped.rule, fields, false)?);
                    }
                }
                Layer::Ipv4 => lower_ip::lower(scoped.rule, fields, ipv4.get_or_insert_default())?,
                Layer::Ipv6 => lower_ip::lower(scoped.rule, fields, ipv6.get_or_insert_default())?,
            }
            Ok(())
        })?;
    }
    let ethernet = crate::Ethernet { from_guest: from_guest.finish(), to_guest: to_guest.finish() };
    Ok(Ruleset { ethernet, ipv4, ipv6, ..Ruleset::default() })
}

/// Collects the chains of one Ethernet direction.
#[derive(Default)]
struct SideBuilder {
    /// Whether any rule applies to this direction.
    used: bool,
    /// Rules of the root chain with their priority.
    root: Vec<(Priority, EthernetRule)>,
    chains: BTreeMap<ChainName, ChainBuilder>,
}

struct ChainBuilder {
    /// The priority of the last rule's filter, in sorted order: filters may give one chain different priorities.
    priority: Priority,
    first_position: usize,
    rules: Vec<EthernetRule>,
}

impl SideBuilder {
    /// Adds the chain of a rule if it does not exist.
    fn enter(&mut self, scoped: &Scoped<'_>) {
        self.used = true;
        if scoped.chain.is_root() {
            return;
        }
        let (priority, position) = (scoped.chain_priority, scoped.position);
        match self.chains.get_mut(scoped.chain) {
            Some(chain) => {
                chain.priority = priority;
                chain.first_position = chain.first_position.min(position);
            }
            None => {
                let new = ChainBuilder { priority, first_position: position, rules: Vec::new() };
                self.chains.insert(scoped.chain.clone(), new);
            }
        }
    }

    fn push(&mut self, scoped: &Scoped<'_>, rule: EthernetRule) {
        match self.chains.get_mut(scoped.chain) {
            Some(chain) => chain.rules.push(rule),
            None => self.root.push((scoped.rule.priority, rule)),
        }
    }

    /// Jumps go before the root rules of their priority; among themselves by priority, then first appearance.
    fn finish(self) -> Option<EthernetSide> {
        if !self.used {
            return None;
        }
        let mut chains: Vec<_> = self.chains.into_iter().collect();
        chains.sort_by_key(|(_, chain)| (chain.priority, chain.first_position));
        let mut side = EthernetSide::of_rules([]);
        let mut rules = self.root.into_iter().peekable();
        for (name, chain) in chains {
            while let Some((_, rule)) = rules.next_if(|(priority, _)| *priority < chain.priority) {
                side.root.push(RootEntry::Rule(rule));
            }
            side.root.push(RootEntry::Jump(Jump { chain: name.clone(), matches: frames_of(&name) }));
            // libvirt creates its chains with ebtables' default policy.
            side.chains.push(SubChain { name, rules: chain.rules, end: Verdict::Accept });
        }
        side.root.extend(rules.map(|(_, rule)| RootEntry::Rule(rule)));
        Some(side)
    }
}

/// The condition for a sub-chain: frames of the protocol that its name starts with.
fn frames_of(chain: &ChainName) -> Vec<Match<EthernetTest>> {
    let test = match chain.kind() {
        ChainKind::Root | ChainKind::Mac => return Vec::new(),
        ChainKind::Stp => EthernetTest::DstMac(lower_ethernet::BRIDGE_GROUP.into()),
        ChainKind::Vlan => EthernetTest::EtherType(0x8100),
        ChainKind::Arp => EthernetTest::EtherType(0x0806),
        ChainKind::Rarp => EthernetTest::EtherType(0x8035),
        ChainKind::Ipv4 => EthernetTest::EtherType(0x0800),
        ChainKind::Ipv6 => EthernetTest::EtherType(0x86dd),
    };
    vec![Match::is(test)]
}
