//! `status`: filters, ports and kernel on one screen.

use std::collections::BTreeMap;

use anyhow::Result;
use nwfilter::{Driver, PortStatus};
use nwfilterctl_shared::{Options, with_causes};
use serde_json::json;

use crate::output::{Answer, address_text, number_of};
use crate::places::Places;
use crate::set;
use crate::verbs::{report_failed_sets, report_ports, warn_all};

/// The status of a driver and its kernel. The exit code is 1 if the kernel differs or cannot be read.
pub(crate) fn status(driver: &Driver, options: &Options, as_json: bool) -> Result<Answer> {
    let (filters, stored) = (driver.filters()?.len(), driver.stored_filters()?.len());
    let (ports, problems) = (driver.port_statuses()?, driver.problems()?);
    let drift = driver.diff();
    if let Ok(drift) = &drift {
        warn_all(&drift.warnings);
        report_failed_sets(&drift.failed_sets);
        report_ports(&mut Places::new(driver), &drift.failed, &drift.unmanaged);
    }
    let is_good = drift.as_ref().is_ok_and(nwfilter::Drift::is_empty);
    if as_json {
        let differences = drift.as_ref().map(|drift| drift.differences.len()).ok();
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let status = json!({
            "backend": driver.backend_name(),
            "filters": stored,
            "stock_filters": filters - stored,
            "sets": driver.sets()?.len(),
            "ports": ports,
            "problems": problems,
            "differences": differences,
            "error": drift.err().map(|error| with_causes(anyhow::Chain::new(&error))),
        });
        return Ok(Answer::json(&status).good_if(is_good));
    }
    let kernel = match drift {
        Ok(_) if is_good => "as it should be".to_owned(),
        Ok(drift) => format!("{} (nwfilterctl diff)", number_of(drift.differences.len(), "difference")),
        Err(error) => format!("not known: {}", with_causes(anyhow::Chain::new(&error))),
    };
    let mut lines = vec![
        format!("Backend   {}", driver.backend_name()),
        format!("Filters   {stored} in {}, {} stock", options.config_dir.display(), filters - stored),
        format!("Ports     {} in {}{}", ports.len(), options.state_dir.display(), states(&ports)),
        format!("Kernel    {kernel}"),
    ];
    let sets = driver.sets()?.len();
    if sets > 0 {
        lines.insert(2, format!("Sets      {sets} in {}/sets", options.config_dir.display()));
    }
    if let Some(lost) = set::unknown_to_libvirt(driver, &options.config_dir)? {
        lines.push(format!("Note      {lost}"));
    }
    lines.extend(problems.iter().map(|problem| format!("Problem   {problem}")));
    if !ports.is_empty() {
        let head = format!(" {:15}   {:15}   {:20}   Address", "Port Dev", "Guest", "Filter");
        lines.extend([String::new(), head, "-".repeat(72)]);
    }
    for port in &ports {
        let (name, guest) = (port.binding.port.as_str(), &port.binding.owner.name);
        let (filter, address) = (port.binding.filter.as_str(), address_text(port));
        lines.push(format!(" {name:15}   {guest:15}   {filter:20}   {address}").trim_end().to_owned());
    }
    Ok(Answer::lines(lines).good_if(is_good))
}

/// The number of ports in each state: `: 2 filtered, 1 learning`.
fn states(ports: &[PortStatus]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for port in ports {
        *counts.entry(port.state_name()).or_default() += 1;
    }
    let counts: Vec<_> = counts.into_iter().map(|(state, count)| format!("{count} {state}")).collect();
    if counts.is_empty() { String::new() } else { format!(": {}", counts.join(", ")) }
}
