//! Which rule of a filter each rule of the kernel is, and what it has counted.
//!
//! The nf_tables variants of the tools keep their rules where the kernel shows them with handle and counter, in the
//! order in which they were written. The save tools would take a second for a thousand ports, the kernel takes
//! milliseconds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nwfilter_rules::{
    ApplyError, Batch, EthernetSide, Family, Held, HeldRule, IpRule, Layer, Origin, RootEntry, Rule, RuleId,
    Ruleset, Scope, Verdict,
};
use nwfilter_xml::PortDev;

use crate::canonical::same_rules;
use crate::memory::Tables;
use crate::names::{IpChain, SubChains, Way};
use crate::nftables::{self, KernelRule};
use crate::render::{self, Line};
use crate::saved::SavedTable;
use crate::tool::{self, TableId, Tool};

/// Up to so many ports, each chain is asked for by itself; for more, whole tables are.
const FEW: usize = 20;

/// A rule of a chain, before it is known which rule of the kernel it is.
struct Known<'a> {
    origin: &'a Origin,
    verdict: Option<Verdict>,
}

/// A chain of a port.
struct PortChain<'a> {
    table: TableId,
    name: String,
    layer: Layer,
    /// What the ruleset calls it.
    chain: &'a str,
    rules: Vec<Known<'a>>,
}

/// The rules that the kernel holds for the ports of a batch, given what its tables hold.
pub(crate) fn rules(batch: &Batch, tables: &Tables) -> Result<Held, ApplyError> {
    for tool in Tool::ALL {
        if tool::is_legacy(tool)? {
            return Err(ApplyError::Unavailable {
                scope: Scope::Everything,
                what: tool.name().to_owned(),
                why: "this is the legacy variant, whose rules cannot be counted: use the nf_tables one"
                    .to_owned(),
            });
        }
    }
    const EMPTY: &SavedTable = &SavedTable::new();
    let ethernet = tables.get(&TableId::EbtablesNat).unwrap_or(EMPTY);
    // Both give the same names, one after the other.
    let (mut names, mut names_again) = (SubChains::beside(ethernet), SubChains::beside(ethernet));
    let mut kernel = Kernel::of(batch.filtered().count())?;
    let mut held = Held::default();
    for (port, ruleset) in batch.filtered() {
        let ports = Arc::new(BTreeSet::from([port.clone()]));
        let rendered = render::render(port, ruleset, &mut names);
        for chain in chains(port, ruleset, &mut names_again) {
            let lines = rendered.get(&chain.table).and_then(|table| table.chains.get(&chain.name));
            let saved = tables.get(&chain.table).and_then(|table| table.get(&chain.name));
            let found = match (lines, saved) {
                (Some(lines), Some(saved)) if is_as_rendered(chain.table, saved, lines) => {
                    kernel.rules(chain.table, &chain.name)?
                }
                _ => Vec::new(),
            };
            // ebtables has one rule more, which is the policy of the chain.
            let policies = usize::from(chain.table == TableId::EbtablesNat);
            if found.len() != chain.rules.len() + policies {
                held.differing.insert(port.clone());
                continue;
            }
            let name: Arc<str> = chain.chain.into();
            held.rules.extend(chain.rules.iter().zip(&found).map(|(rule, of_kernel)| HeldRule {
                id: id(chain.table, of_kernel.handle),
                ports: ports.clone(),
                layer: chain.layer,
                chain: name.clone(),
                origin: rule.origin.clone(),
                verdict: rule.verdict,
                count: of_kernel.count,
            }));
        }
    }
    Ok(held)
}

fn id(table: TableId, handle: u64) -> RuleId {
    // The numbers of families are small.
    RuleId { family: nftables::family(table.tool()) as u8, table: table.name(), handle }
}

fn is_as_rendered(table: TableId, saved: &[String], lines: &[Line]) -> bool {
    same_rules(table.tool(), saved.iter().map(String::as_str), lines.iter().map(|line| line.text.as_str()))
}

/// The chains that a port must have, as they are rendered, without those of conntrack helpers.
fn chains<'a>(port: &PortDev, ruleset: &'a Ruleset, names: &mut SubChains<'_>) -> Vec<PortChain<'a>> {
    let mut chains = Vec::new();
    let sides = [(&ruleset.ethernet.from_guest, Way::FromGuest), (&ruleset.ethernet.to_guest, Way::ToGuest)];
    for (side, way) in sides {
        let Some(side) = side else { continue };
        let ethernet = |name, chain, rules| {
            let (table, layer) = (TableId::EbtablesNat, Layer::Ethernet);
            PortChain { table, name, layer, chain, rules }
        };
        chains.push(ethernet(way.root(port), "root", root(side)));
        for sub in &side.chains {
            let rules = sub.rules.iter().map(known).chain(end(sub.end)).collect();
            chains.push(ethernet(names.name(way, port, &sub.name), sub.name.as_str(), rules));
        }
    }
    for (family, table) in [(Family::Ipv4, TableId::IptablesFilter), (Family::Ipv6, TableId::Ip6tablesFilter)]
    {
        let Some(part) = ruleset.ip(family) else { continue };
        for chain in IpChain::ALL {
            let rules: &[IpRule] = match chain {
                IpChain::FromGuest | IpChain::ToHost => &part.from_guest,
                IpChain::ToGuest => &part.to_guest,
            };
            let (name, layer) = (chain.of(port), family.into());
            let rules = rules.iter().map(known).collect();
            chains.push(PortChain { table, name, layer, chain: "root", rules });
        }
    }
    chains
}

fn root(side: &EthernetSide) -> Vec<Known<'_>> {
    let entries = side.root.iter().map(|entry| match entry {
        RootEntry::Rule(rule) => known(rule),
        RootEntry::Jump(_) => Known { origin: &Origin::BUILT_IN, verdict: None },
    });
    entries.chain(end(side.end)).collect()
}

fn known<T>(rule: &Rule<T>) -> Known<'_> {
    Known { origin: &rule.origin, verdict: Some(rule.verdict) }
}

/// The rule at the end of a chain, where one is rendered.
fn end(verdict: Verdict) -> Option<Known<'static>> {
    render::ethernet_end(verdict).map(|_| Known { origin: &Origin::BUILT_IN, verdict: Some(verdict) })
}

/// The rules of the kernel, as far as they were asked for.
enum Kernel {
    /// Those of every table.
    All(BTreeMap<TableId, BTreeMap<String, Vec<KernelRule>>>),
    /// None yet.
    One,
}

impl Kernel {
    /// For so many ports.
    fn of(ports: usize) -> Result<Self, ApplyError> {
        if ports <= FEW {
            return Ok(Self::One);
        }
        let tables = [TableId::EbtablesNat, TableId::IptablesFilter, TableId::Ip6tablesFilter];
        let all = tables.into_iter().map(|table| Ok((table, dump(table, None)?)));
        all.collect::<Result<_, _>>().map(Self::All)
    }

    fn rules(&mut self, table: TableId, chain: &str) -> Result<Vec<KernelRule>, ApplyError> {
        match self {
            Self::All(tables) => {
                Ok(tables.get_mut(&table).and_then(|table| table.remove(chain)).unwrap_or_default())
            }
            Self::One => Ok(dump(table, Some(chain))?.remove(chain).unwrap_or_default()),
        }
    }
}

fn dump(table: TableId, chain: Option<&str>) -> Result<BTreeMap<String, Vec<KernelRule>>, ApplyError> {
    let cannot = |error: std::io::Error| {
        tool::unavailable(format!("the rules of {}", table.label()), error.to_string())
    };
    nftables::rules(table, chain).map_err(cannot)
}
