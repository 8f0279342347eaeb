//! Answers as JSON, in the shapes of `nwfilterctl --json`.

use std::collections::BTreeSet;

use nwfilter::explain::{Explanation, Packet, Way};
use nwfilter::rules::{Counts, RuleCount, Ruleset, SetContent};
use nwfilter::xml::{FilterSet, PortDev};
use nwfilter::{
    Committed, Drift, Driver, Error, ExplainedPort, FailedPort, FailedSet, Metrics, Preview, Reloaded,
    with_causes,
};
use serde_json::{Value, json};

use crate::transaction::Draft;

pub(crate) fn filters(driver: &Driver) -> Result<String, Error> {
    let stored: BTreeSet<_> =
        driver.stored_filters()?.into_iter().map(|filter| filter.name.clone()).collect();
    let filters = driver.filters()?;
    let row = |filter: &nwfilter::xml::Filter| {
        let source = if stored.contains(&filter.name) { "store" } else { "stock" };
        json!({"name": filter.name, "uuid": filter.uuid, "source": source})
    };
    Ok(filters.iter().map(|filter| row(filter)).collect::<Value>().to_string())
}

pub(crate) fn bindings(driver: &Driver) -> Result<String, Error> {
    Ok(json!(driver.port_statuses()?).to_string())
}

pub(crate) fn sets(driver: &Driver) -> Result<String, Error> {
    Ok(driver.sets()?.iter().map(|set| set_row(set)).collect::<Value>().to_string())
}

pub(crate) fn content(content: &SetContent) -> String {
    texts(content.ranges()).to_string()
}

fn set_row(set: &FilterSet) -> Value {
    json!({
        "name": set.name,
        "family": set.family,
        "entries": set.entries.len(),
        "includes": set.includes,
        "tags": set.tags,
    })
}

pub(crate) fn committed(committed: &Committed, draft: &Draft) -> String {
    let filters = committed.filters.iter().map(|filter| json!({"name": filter.name, "uuid": filter.uuid}));
    let documents = draft.warnings.iter().flat_map(|found| {
        found.items.iter().map(|item| {
            json!({
                "document": found.document,
                "code": item.code.to_string(),
                "line": item.place.line,
                "column": item.place.column,
                "message": item.message,
                "help": item.help,
            })
        })
    });
    json!({
        "filters": filters.collect::<Value>(),
        "sets": committed.sets.iter().map(|set| set_row(set)).collect::<Value>(),
        "changed": names(&committed.applied.changed),
        "changed_sets": committed.applied.changed_sets,
        "warnings": texts(&committed.applied.warnings),
        "cut": {"ended": committed.cut.ended, "failures": texts(&committed.cut.failures)},
        "documents": documents.collect::<Value>(),
    })
    .to_string()
}

pub(crate) fn preview(preview: &Preview) -> String {
    json!({
        "stores": texts(&preview.events),
        "rules": preview.differences,
        "warnings": texts(&preview.warnings),
    })
    .to_string()
}

pub(crate) fn reloaded(reloaded: &Reloaded) -> String {
    let Reloaded { applied, failed, failed_sets, removed, unmanaged } = reloaded;
    let back: Vec<_> = applied.changed.iter().filter(|port| !removed.contains(port)).collect();
    json!({
        "changed": names(back),
        "removed": names(removed),
        "failed": failures(failed),
        "failed_sets": set_failures(failed_sets),
        "unbound": names(&unmanaged.unbound),
        "absent": names(&unmanaged.absent),
        "warnings": texts(&applied.warnings),
    })
    .to_string()
}

pub(crate) fn drift(drift: &Drift) -> String {
    json!({
        "differences": drift.differences,
        "failed": failures(&drift.failed),
        "failed_sets": set_failures(&drift.failed_sets),
        "unbound": names(&drift.unmanaged.unbound),
        "absent": names(&drift.unmanaged.absent),
        "warnings": texts(&drift.warnings),
    })
    .to_string()
}

pub(crate) fn status(driver: &Driver) -> Result<String, Error> {
    let (filters, stored) = (driver.filters()?.len(), driver.stored_filters()?.len());
    let (ports, problems) = (driver.port_statuses()?, driver.problems()?);
    let drift = driver.diff();
    Ok(json!({
        "backend": driver.backend_name(),
        "filters": stored,
        "stock_filters": filters - stored,
        "sets": driver.sets()?.len(),
        "ports": ports,
        "problems": texts(&problems),
        "differences": drift.as_ref().map(|drift| drift.differences.len()).ok(),
        "error": drift.as_ref().err().map(|error| with_causes(error)),
    })
    .to_string())
}

pub(crate) fn counters(counts: &Counts) -> String {
    let row = |rule: &RuleCount| {
        json!({
            "rule": rule.origin,
            "stops": rule.stops,
            "packets": rule.count.packets,
            "bytes": rule.count.bytes,
            "ports": names(rule.ports.iter()),
        })
    };
    let rules: Value = counts.rules.iter().map(row).collect();
    json!({"rules": rules, "differing": names(&counts.differing)}).to_string()
}

pub(crate) fn metrics(metrics: &Metrics) -> String {
    json!(metrics).to_string()
}

pub(crate) fn ruleset(ruleset: &Ruleset) -> String {
    json!(ruleset).to_string()
}

pub(crate) fn explanation(
    port: &ExplainedPort,
    way: Way,
    packet: &Packet,
    explanation: &Explanation,
) -> String {
    let mut answer = json!(explanation);
    answer["port"] = json!(port.binding.port);
    answer["filter"] = json!(port.binding.filter);
    answer["way"] = json!(way);
    answer["packet"] = json!(packet.to_string());
    answer["why"] = json!(explanation.nearest.as_ref().map(ToString::to_string));
    answer.to_string()
}

fn failures(failed: &[FailedPort]) -> Value {
    let row = |failed: &FailedPort| {
        json!({
            "port": failed.port,
            "filter": failed.filter,
            "fallback": failed.fallback.to_string(),
            "why": with_causes(&*failed.error),
        })
    };
    failed.iter().map(row).collect()
}

fn set_failures(failed: &[FailedSet]) -> Value {
    failed.iter().map(|failed| json!({"set": failed.set, "why": with_causes(&*failed.error)})).collect()
}

fn names<'a>(ports: impl IntoIterator<Item = &'a PortDev>) -> Value {
    ports.into_iter().map(PortDev::as_str).collect()
}

fn texts(items: &[impl ToString]) -> Value {
    items.iter().map(ToString::to_string).collect()
}
