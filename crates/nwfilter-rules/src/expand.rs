//! From a binding and its filter tree to a ruleset: includes, variables, priorities, order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_xml::{
    Access, Binding, ChainName, Entry, Field, Filter, FilterName, Layer, Literal, Matches, Params, Priority,
    Rule as XmlRule, Value, VarName,
};

use crate::error::RulesError;
use crate::helper;
use crate::lower_ethernet;
use crate::lower_ip;
use crate::ruleset::{EthernetSide, IpPart, Origin, RootEntry, Rule, Ruleset, SubChain};
use crate::tree::Filters;
use crate::variables::Combination;

/// Most rules a port can have; lists multiply, so a small filter can mean a very large one.
const MAX_RULES: usize = 200_000;

/// The ruleset that `binding` asks for.
///
/// MAC is set from the binding's `<mac>` unless a parameter gives it. Where [`RulesError::MissingVariables`] names
/// exactly `IP`, the address may be learned and the binding instantiated again with it.
pub fn instantiate(filters: &impl Filters, binding: &Binding) -> Result<Ruleset, RulesError> {
    let mut params = binding.params.clone();
    if params.get(VarName::MAC).is_none()
        && let Ok(mac) = VarName::MAC.parse()
    {
        params.push(mac, &binding.mac.to_string());
    }
    let mut expansion = Expansion { filters, rules: Vec::new(), missing: BTreeSet::new(), path: Vec::new() };
    expansion.include(&binding.filter, None, Arc::new(params.clone()))?;
    let Expansion { mut rules, missing, .. } = expansion;
    if !missing.is_empty() {
        return Err(RulesError::MissingVariables { names: missing.into_iter().collect() });
    }
    // Stable: rules of equal priority keep the order in which they were met.
    rules.sort_by_key(|rule| (!rule.chain.is_root(), rule.rule.priority));
    let mut ruleset = lower(&rules)?;
    ruleset.helpers = helper::helpers(&rules, &params)?;
    Ok(ruleset)
}

/// A rule of the tree, with the scope it stands in.
pub(crate) struct Scoped<'a> {
    pub(crate) rule: &'a XmlRule,
    pub(crate) chain: &'a ChainName,
    pub(crate) chain_priority: Priority,
    pub(crate) params: Arc<Params>,
    pub(crate) origin: Origin,
    /// How many rules were met before it.
    pub(crate) position: usize,
}

struct Expansion<'a, F> {
    filters: &'a F,
    rules: Vec<Scoped<'a>>,
    missing: BTreeSet<String>,
    path: Vec<&'a FilterName>,
}

impl<'a, F: Filters> Expansion<'a, F> {
    fn include(
        &mut self,
        name: &FilterName,
        by: Option<Origin>,
        params: Arc<Params>,
    ) -> Result<(), RulesError> {
        let filter = self.filters.filter(name);
        let filter: &'a Filter = filter.ok_or_else(|| RulesError::NoSuchFilter { name: name.clone(), by })?;
        if let Some(start) = self.path.iter().position(|entered| **entered == filter.name) {
            let cycle = self.path[start..].iter().copied().chain([&filter.name]).cloned().collect();
            return Err(RulesError::IncludesItself { cycle });
        }
        self.path.push(&filter.name);
        let source = Arc::new(filter.name.clone());
        for entry in &filter.entries {
            match entry {
                Entry::Rule(rule) => self.rule(filter, rule, &source, &params),
                Entry::Include(include) => {
                    let by = Origin { filter: Some(source.clone()), line: include.place.line };
                    let scope = match include.params.is_empty() {
                        true => params.clone(),
                        false => Arc::new(include.params.overlaid_by(&params)),
                    };
                    self.include(&include.filter, Some(by), scope)?;
                }
            }
        }
        self.path.pop();
        Ok(())
    }

    fn rule(
        &mut self,
        filter: &'a Filter,
        rule: &'a XmlRule,
        source: &Arc<FilterName>,
        params: &Arc<Params>,
    ) {
        for item in rule.matches.iter().flat_map(|matches| &matches.items) {
            let Value::Variable(variable) = &item.value else { continue };
            let values = params.get(variable.name.as_str());
            let given = match variable.access {
                Access::Iterator(_) => values.is_some(),
                Access::Element(index) => values.is_some_and(|values| (index as usize) < values.len()),
            };
            if !given {
                self.missing.insert(variable.to_string().trim_start_matches('$').to_owned());
            }
        }
        self.rules.push(Scoped {
            rule,
            chain: &filter.chain,
            chain_priority: filter.priority,
            params: params.clone(),
            origin: Origin { filter: Some(source.clone()), line: rule.place.line },
            position: self.rules.len(),
        });
    }
}

/// The values of a rule's attributes, with variables replaced by what they are in one combination.
pub(crate) struct Fields<'a> {
    pub(crate) origin: &'a Origin,
    matches: Option<&'a Matches>,
    /// A bit for each field that the rule asks for: lowering asks for all fields there are, and a rule has few.
    present: u128,
    combination: &'a Combination<'a>,
}

impl Fields<'_> {
    /// The value of a field and whether it is negated; `None` if the rule does not ask for the field.
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
    let mut made = 0;
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
            made += 1;
            if made > MAX_RULES {
                return Err(RulesError::TooManyRules { origin: scoped.origin.clone(), limit: MAX_RULES });
            }
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
    Ok(Ruleset { ethernet, ipv4, ipv6, helpers: Vec::new() })
}

/// Collects the chains of one Ethernet direction.
#[derive(Default)]
struct SideBuilder {
    /// Whether any rule is about this direction.
    used: bool,
    /// Rules of the root chain with their priority.
    root: Vec<(Priority, Rule)>,
    chains: BTreeMap<ChainName, ChainBuilder>,
}

struct ChainBuilder {
    /// That of the last rule's filter, in sorted order: filters may give one chain different priorities.
    priority: Priority,
    first_position: usize,
    rules: Vec<Rule>,
}

impl SideBuilder {
    /// Makes sure that the chain of a rule exists.
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

    fn push(&mut self, scoped: &Scoped<'_>, rule: Rule) {
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
        let mut side = EthernetSide::default();
        let mut rules = self.root.into_iter().peekable();
        for (name, chain) in chains {
            while let Some((_, rule)) = rules.next_if(|(priority, _)| *priority < chain.priority) {
                side.root.push(RootEntry::Rule(rule));
            }
            side.root.push(RootEntry::Jump(name.clone()));
            side.chains.push(SubChain { name, rules: chain.rules });
        }
        side.root.extend(rules.map(|(_, rule)| RootEntry::Rule(rule)));
        Some(side)
    }
}
