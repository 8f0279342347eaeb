//! `users`: lists the filters that include a filter, and the ports that have it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use nwfilter::Driver;
use nwfilter::xml::FilterName;
use serde_json::json;

use crate::output::Answer;
use crate::verbs::filter;

/// The filters and ports that use a filter, directly or through others.
pub(crate) fn users(driver: &Driver, name: &str, as_json: bool) -> Result<Answer> {
    let name = filter(driver, name)?.name.clone();
    let filters = driver.filters()?;
    let mut includers: BTreeMap<&FilterName, BTreeSet<&FilterName>> = BTreeMap::new();
    for filter in &filters {
        for include in filter.includes() {
            includers.entry(&include.filter).or_default().insert(&filter.name);
        }
    }
    let (mut users, mut waiting) = (BTreeSet::new(), vec![&name]);
    while let Some(used) = waiting.pop() {
        let new = includers.get(used).into_iter().flatten().filter(|user| users.insert(**user));
        waiting.extend(new.copied());
    }
    let is_direct = |user: &FilterName| includers.get(&name).is_some_and(|direct| direct.contains(user));
    let bindings = driver.bindings()?;
    let ports = bindings.iter().filter(|binding| binding.filter == name || users.contains(&binding.filter));
    if as_json {
        let filters: Vec<_> =
            users.iter().map(|user| json!({"name": user.as_str(), "direct": is_direct(user)})).collect();
        let ports = ports.map(|binding| {
            json!({
                "port": binding.port.as_str(),
                "filter": binding.filter.as_str(),
                "owner": binding.owner.name,
            })
        });
        let ports: Vec<_> = ports.collect();
        return Ok(Answer::json(&json!({"filters": filters, "ports": ports})));
    }
    let mut lines = vec![format!(" {:6}   {:24}   Through", "Kind", "Name"), "-".repeat(72)];
    for user in &users {
        let through = if is_direct(user) { "itself" } else { "other filters" };
        lines.push(format!(" {:6}   {:24}   {through}", "filter", user.as_str()));
    }
    for binding in ports {
        lines.push(format!(" {:6}   {:24}   {}", "port", binding.port.as_str(), binding.filter));
    }
    Ok(Answer::lines(lines))
}
