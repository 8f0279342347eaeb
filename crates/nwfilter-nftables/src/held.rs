//! Which rule of a filter each rule of the table is, and what it has counted.
//!
//! Ports of one class share its rules, so that a count is that of all of them. Rules that pass packets on without being
//! of a filter have no counter.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nix::libc;
use nwfilter_rules::{Count, Held, HeldRule, Layer, LogGroup, Origin, RuleId, Verdict};
use nwfilter_xml::PortDev;

use crate::class::Way;
use crate::kernel::{ChainName, Expr, InstalledChain, InstalledRule, Rule, expr};
use crate::layout;
use crate::model::{Model, class_led_to, port_name};
use crate::plan::Wanted;

/// The rules that the table holds for ports that must have this, given what it holds.
pub(crate) fn rules(
    wanted: &BTreeMap<PortDev, Wanted>,
    model: &Model,
    chains: &BTreeMap<ChainName, InstalledChain>,
) -> Held {
    let users = users(model);
    let mut held = Held::default();
    let mut known = BTreeSet::new();
    for (port, wanted) in wanted {
        let Wanted::Class(class, ..) = wanted else { continue };
        let ports = users.get(class.name.as_str());
        // A class that lets everything pass has no chains, and nothing leads to it.
        if !class.entries.is_empty() && ports.is_none_or(|ports| !ports.contains(port)) {
            held.differing.insert(port.clone());
            continue;
        }
        let Some(ports) = ports.filter(|_| known.insert(class.name.as_str())) else { continue };
        for (name, rules) in &class.chains {
            let found = chains.get(name).map_or(&[][..], |chain| &chain.rules);
            if !found.iter().map(|rule| &rule.rule).eq(rules.iter().map(|(rule, _)| rule)) {
                held.differing.extend(ports.iter().cloned());
                continue;
            }
            let (layer, chain) = place(name);
            // What is not answered on its way to the guest meets the same rules again where it gets there.
            let is_ahead = layout::is_ahead(name.as_str());
            let counts = |rule: &Rule| !is_ahead || layout::rejects(rule);
            let rules = rules.iter().zip(found).filter(|((rule, _), _)| counts(rule));
            held.rules.extend(rules.map(|((rule, origin), found)| HeldRule {
                id: id(found),
                ports: ports.clone(),
                layer,
                chain: chain.clone(),
                origin: origin.clone(),
                verdict: verdict(rule, origin),
                count:
                    found.counts.first().map_or(Count::default(), |count| Count {
                        packets: count.packets,
                        bytes: count.bytes,
                    }),
            }));
        }
    }
    held
}

fn id(rule: &InstalledRule) -> RuleId {
    RuleId { family: libc::NFPROTO_BRIDGE as u8, table: layout::TABLE_NAME, handle: rule.handle }
}

/// The ports of each class.
fn users(model: &Model) -> BTreeMap<&str, Arc<BTreeSet<PortDev>>> {
    let mut users: BTreeMap<&str, BTreeSet<PortDev>> = BTreeMap::new();
    for port in model.ports() {
        let elements =
            [Way::FromGuest, Way::ToGuest].into_iter().filter_map(|way| model.dispatched(way, port));
        for class in elements.filter_map(class_led_to) {
            users.entry(class).or_default().extend(port_name(port));
        }
    }
    users.into_iter().map(|(class, ports)| (class, Arc::new(ports))).collect()
}

/// What a chain's name says of its place: `CLASS.from`, `CLASS.from-ip`, `CLASS.from-ipv4`, `CLASS.from-0-arp`.
fn place(chain: &ChainName) -> (Layer, Arc<str>) {
    let suffix = chain.as_str().split_once('.').map_or("", |(_, suffix)| suffix);
    let rest = suffix.split_once('-').map_or("", |(_, rest)| rest);
    match (rest, rest.split_once('-')) {
        ("ipv4", _) => (Layer::Ipv4, "root".into()),
        ("ipv6", _) => (Layer::Ipv6, "root".into()),
        (_, Some((_, sub_chain))) => (Layer::Ethernet, sub_chain.into()),
        _ => (Layer::Ethernet, "root".into()),
    }
}

fn log_group(log: &expr::Log) -> Option<LogGroup> {
    match log.to {
        expr::LogTo::Group { group, .. } => Some(LogGroup(group)),
        expr::LogTo::Syslog { .. } => None,
    }
}

/// What a rule does; `None` for one that only leads to another chain.
fn verdict(rule: &Rule, origin: &Origin) -> Option<Verdict> {
    match rule.exprs.last() {
        Some(Expr::Reject(_)) => Some(Verdict::Reject),
        Some(Expr::Verdict(expr::Verdict::Drop)) => Some(Verdict::Drop),
        Some(Expr::Verdict(expr::Verdict::Accept)) => Some(Verdict::Accept),
        Some(Expr::Verdict(expr::Verdict::Return)) => Some(Verdict::Return),
        // What a rule on frames accepts goes on to those on packets.
        Some(Expr::Verdict(expr::Verdict::Goto(_))) if *origin != Origin::BUILT_IN => Some(Verdict::Accept),
        Some(Expr::Log(log)) => log_group(log).map(Verdict::Log),
        Some(Expr::Verdict(_) | Expr::Object { .. }) => None,
        _ => Some(Verdict::Continue),
    }
}
