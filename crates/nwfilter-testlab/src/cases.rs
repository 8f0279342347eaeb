//! Filter trees with a binding: random ones, those of the fixtures, and smaller forms of one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use nwfilter_rules::{IpTest, Ruleset, Verdict, instantiate};
use nwfilter_xml::{
    Binding, ChainName, Entry, Field, Filter, FilterName, Include, Kind, Layer, Literal, Params, Place,
    Priority, Protocol, Rule, Value, VarName, read_binding, read_filter,
};

use crate::generate::{Generator, Options};

/// The ipset of each family that rules may name: its name, and the family as ipset calls it.
pub(crate) const IPSETS: [(&str, &str); 2] = [("conformance", "inet"), ("conformance6", "inet6")];

/// A filter tree and the binding of a port to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// What to call it in reports.
    pub name: String,
    /// The filters; each is included only by later ones, and the port is bound to the last.
    pub filters: Vec<Filter>,
    /// The parameters of the binding.
    pub params: Params,
}

impl Case {
    /// Its ruleset for a guest with the MAC address 52:54:00:7b:35:93 at port `tap0`; `None` if it is refused.
    pub fn ruleset(&self) -> Option<Ruleset> {
        let filters: BTreeMap<_, _> =
            self.filters.iter().map(|filter| (filter.name.clone(), filter.clone())).collect();
        instantiate(&filters, &self.binding().ok()?).ok()
    }

    fn binding(&self) -> Result<Binding> {
        let last = &self.filters.last().context("no filter")?.name;
        let text = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='{last}'/></filterbinding>"
        );
        let mut binding = read_binding("b.xml", &text).into_result()?;
        binding.params = self.params.clone();
        Ok(binding)
    }
}

/// A ruleset as far as it needs no tracking of connections and no ipset, and answers nobody.
pub fn stateless(mut ruleset: Ruleset) -> Ruleset {
    ruleset.helpers.clear();
    for part in [&mut ruleset.ipv4, &mut ruleset.ipv6].into_iter().flatten() {
        for rules in [&mut part.from_guest, &mut part.to_guest] {
            rules.retain(|rule| !rule.matches.iter().any(|m| matches!(m.test, IpTest::IpSet { .. })));
            for rule in rules {
                rule.matches.retain(|m| {
                    !matches!(m.test, IpTest::States(_) | IpTest::CtDirection(_) | IpTest::ConnlimitAbove(_))
                });
                if rule.verdict == Verdict::Reject {
                    rule.verdict = Verdict::Drop;
                }
            }
        }
    }
    ruleset
}

// ---- of the fixtures ----

/// The cases that a directory of fixtures makes: every filter of `seed` and `stock` with what it includes, and every
/// rule of `filters` alone, so that one that is refused does not hide the others.
pub fn fixture_cases(fixtures: &Path) -> Result<Vec<Case>> {
    let mut whole = documents(&fixtures.join("seed"))?;
    whole.extend(documents(&fixtures.join("stock"))?);
    let mut cases: Vec<_> = whole.keys().map(|name| whole_case(&whole, name)).collect::<Result<_>>()?;
    for filter in documents(&fixtures.join("filters"))?.values() {
        for (number, rule) in filter.rules().enumerate() {
            cases.push(rule_case(filter, rule, number)?);
        }
    }
    Ok(cases)
}

fn documents(dir: &Path) -> Result<BTreeMap<FilterName, Filter>> {
    let mut filters = BTreeMap::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "xml") {
            let text = std::fs::read_to_string(&path)?;
            let filter = read_filter(&path.display().to_string(), &text).into_result()?;
            filters.insert(filter.name.clone(), filter);
        }
    }
    Ok(filters)
}

fn whole_case(filters: &BTreeMap<FilterName, Filter>, name: &FilterName) -> Result<Case> {
    fn add(filters: &BTreeMap<FilterName, Filter>, name: &FilterName, tree: &mut Vec<Filter>) -> Result<()> {
        if tree.iter().any(|filter| filter.name == *name) {
            return Ok(());
        }
        let filter = filters.get(name).with_context(|| format!("no fixture is named {name}"))?;
        filter.includes().try_for_each(|include| add(filters, &include.filter, tree))?;
        tree.push(filter.clone());
        Ok(())
    }
    let mut tree = Vec::new();
    add(filters, name, &mut tree)?;
    let mut params = Params::new();
    for (name, value) in [
        ("IP", "10.0.0.2"),
        ("IP", "10.0.0.3"),
        ("IPV6", "2001:db8::2"),
        ("DHCPSERVER", if name.as_str().contains("dhcpv6") { "2001:db8::9" } else { "10.0.0.9" }),
        ("GATEWAY_MAC", "52:54:00:00:00:fe"),
    ] {
        params.insert(name.parse()?, value)?;
    }
    Ok(Case { name: name.to_string(), filters: tree, params })
}

fn rule_case(filter: &Filter, rule: &Rule, number: usize) -> Result<Case> {
    let mut rule = rule.clone();
    let mut params = Params::new();
    if let Some(matches) = &mut rule.matches {
        // No parameter can have such a value: it needs characters that parameters may not have.
        matches.items.retain(|item| {
            !(item.attribute.kind == Kind::TcpFlags && matches!(item.value, Value::Variable(_)))
        });
        for item in &matches.items {
            let Value::Variable(variable) = &item.value else { continue };
            let more = usize::from(params.get(variable.name.as_str()).is_none());
            (0..more).for_each(|_| {
                let _ = params.insert(variable.name.clone(), example(item.attribute.kind));
            });
        }
    }
    let name = format!("rule {} of {}", number + 1, filter.name);
    let mut filters = vec![Filter { entries: vec![Entry::Rule(rule)], ..filter.clone() }];
    settle_ipsets(&mut filters);
    Ok(Case { name, filters, params })
}

/// A value that a variable of a kind may have.
fn example(kind: Kind) -> &'static str {
    match kind {
        Kind::Mac => "52:54:00:0a:0b:0c",
        Kind::MacMask => "ff:ff:ff:00:00:00",
        Kind::Ipv4 => "10.2.3.4",
        Kind::Ipv4Prefix => "24",
        Kind::Ipv6 => "2001:db8::7",
        Kind::Ipv6Prefix => "64",
        Kind::EtherType | Kind::VlanEncap => "arp",
        Kind::ArpOpcode => "Reply",
        Kind::IpProtocol => "udp",
        Kind::Bool => "true",
        Kind::States => "NEW",
        Kind::IpSet => IPSETS[0].0,
        Kind::IpSetFlags => "src",
        Kind::Comment => "hello",
        _ => "7",
    }
}

// ---- smaller ones ----

impl Case {
    /// The case with one thing less, in every way, the largest things first.
    pub(crate) fn smaller(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for at in 0..self.filters.len().saturating_sub(1) {
            let mut less = self.clone();
            let gone = less.filters.remove(at).name;
            for filter in &mut less.filters {
                filter
                    .entries
                    .retain(|entry| !matches!(entry, Entry::Include(include) if include.filter == gone));
            }
            cases.push(less);
        }
        for (at, filter) in self.filters.iter().enumerate() {
            for entry in 0..filter.entries.len() {
                let mut less = self.clone();
                less.filters[at].entries.remove(entry);
                cases.push(less);
            }
        }
        for (at, filter) in self.filters.iter().enumerate() {
            for (number, entry) in filter.entries.iter().enumerate() {
                let Entry::Rule(rule) = entry else { continue };
                for item in 0..rule.matches.as_ref().map_or(0, |matches| matches.items.len()) {
                    let mut less = self.clone();
                    if let Entry::Rule(Rule { matches: Some(matches), .. }) =
                        &mut less.filters[at].entries[number]
                    {
                        matches.items.remove(item);
                    }
                    cases.push(less);
                }
            }
        }
        for (name, _) in self.params.iter().filter(|(_, values)| values.len() > 1) {
            let mut less = self.clone();
            let value = self.params.get(name.as_str()).and_then(|values| values.first().cloned());
            less.params.remove(name.as_str());
            if let Some(value) = value {
                let _ = less.params.insert(name.clone(), &value);
            }
            cases.push(less);
        }
        cases
    }
}

// ---- random ones ----

/// A random tree, the same for the same seed and number: most are of filters that the kernel takes. The others are
/// small, so that there is one reason to refuse them.
pub fn random_case(seed: u64, number: usize) -> Case {
    let wild = number % 5 == 4;
    let options = Options {
        entries: 1..=match number % 10 {
            0 => 8,
            _ if wild => 1,
            _ => 4,
        },
        instantiable: !wild,
        variables: !wild,
        ipsets: vec![IPSETS[0].0.to_owned()],
        ..Options::default()
    };
    let mut dice = Dice(seed.rotate_left(32) ^ number as u64);
    let mut generator = Generator::with_options(dice.next(), options);
    let mut filters: Vec<Filter> = Vec::new();
    let included = if wild { 0 } else { dice.below(4) };
    for index in 0..included {
        filters.push(generator.filter(name(index)));
    }
    generator.options_mut().includes = filters.iter().map(|filter| filter.name.clone()).collect();
    let mut root = generator.filter(name(included));
    for filter in &filters {
        if root.includes().any(|include| include.filter == filter.name) {
            continue;
        }
        let include = Include { filter: filter.name.clone(), params: Params::new(), place: Place::default() };
        root.entries.insert(dice.below(root.entries.len() + 1), Entry::Include(include));
    }
    filters.push(root);
    settle_chains(&mut filters);
    settle_ipsets(&mut filters);
    // libvirt refuses every port whose filter has an ipset elsewhere: a few of those are enough.
    if !dice.one_in(20) {
        keep_ipsets_to_all(&mut filters);
    }
    let mut case = Case { name: format!("tree {number} of seed {seed}"), params: Params::new(), filters };
    case.params = generator.params(&case.filters);
    pass_down(&mut case, &mut dice);
    case
}

fn name(index: usize) -> FilterName {
    // Letters and digits are always a name.
    format!("conformance{index}").parse().unwrap_or_else(|error| unreachable!("{error}"))
}

/// Gives each chain one priority, and no two chains the same: libvirt sorts equal ones by chance.
fn settle_chains(filters: &mut [Filter]) {
    let mut priorities: BTreeMap<ChainName, Priority> = BTreeMap::new();
    for filter in filters {
        if !filter.chain.is_root() && !priorities.contains_key(&filter.chain) {
            let free = |priority: &Priority| {
                // libvirt does not write a priority of 0, and so forgets it.
                priority.get() != 0 && !priorities.values().any(|taken| taken == priority)
            };
            let from = i32::from(filter.priority.get());
            let next = (from..=1000).chain(-1000..from).filter_map(Priority::new).find(free);
            priorities.insert(filter.chain.clone(), next.unwrap_or(filter.priority));
        }
        filter.priority = priorities.get(&filter.chain).copied().unwrap_or(filter.priority);
    }
}

/// Lets rules name only sets that there are, of their own family.
fn settle_ipsets(filters: &mut [Filter]) {
    for entry in filters.iter_mut().flat_map(|filter| &mut filter.entries) {
        let Entry::Rule(Rule { matches: Some(matches), .. }) = entry else { continue };
        let (set, _) = IPSETS[usize::from(matches.protocol.layer() == Layer::Ipv6)];
        for item in matches.items.iter_mut().filter(|item| item.attribute.field == Field::IpSet) {
            item.value = Value::Literal(Literal::IpSet(set.to_owned()));
        }
    }
}

fn keep_ipsets_to_all(filters: &mut [Filter]) {
    for entry in filters.iter_mut().flat_map(|filter| &mut filter.entries) {
        if let Entry::Rule(Rule { matches: Some(matches), .. }) = entry
            && !matches!(matches.protocol, Protocol::All | Protocol::AllOn6)
        {
            matches.items.retain(|item| !matches!(item.attribute.field, Field::IpSet | Field::IpSetFlags));
        }
    }
}

/// Lets some variables get their values from the includes instead of from the binding, or from both.
fn pass_down(case: &mut Case, dice: &mut Dice) {
    let Some((root, included)) = case.filters.split_last_mut() else { return };
    let variables = |filter: &Filter| -> BTreeSet<VarName> {
        filter.rules().flat_map(Rule::variables).map(|variable| variable.name.clone()).collect()
    };
    let own = variables(root);
    let below: BTreeSet<_> = included.iter().flat_map(variables).filter(|name| !own.contains(name)).collect();
    for name in below {
        let Some(values) = case.params.get(name.as_str()).map(<[String]>::to_vec) else { continue };
        let (in_binding, in_include) =
            dice.pick(&[(true, false), (true, false), (false, true), (true, true)]);
        if in_include {
            for entry in &mut root.entries {
                let Entry::Include(include) = entry else { continue };
                include.params.remove(name.as_str());
                values.iter().rev().for_each(|value| {
                    let _ = include.params.insert(name.clone(), value);
                });
            }
        }
        if !in_binding {
            case.params.remove(name.as_str());
        }
    }
    if dice.one_in(8) {
        let first = case.params.iter().next().map(|(name, values)| (name.clone(), values[0].clone()));
        if let Some((name, value)) = first {
            let _ = case.params.insert(name, &value);
        }
    }
}

/// Random numbers of the cases themselves (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
