//! Lists, as tables for people and as JSON for programs.

use anyhow::Result;
use nwfilter::{BindingState, Difference, Driver, Error, PortStatus, RemainingLease};
use serde_json::json;

/// Every filter with its UUID and where it is.
pub(crate) fn print_filters(driver: &Driver, as_json: bool) -> Result<()> {
    let mut rows = Vec::new();
    for filter in driver.filters()? {
        let source = if driver.is_stored(filter.name.as_str())? { "store" } else { "stock" };
        let uuid = filter.uuid.map(|uuid| uuid.to_string()).unwrap_or_default();
        rows.push((uuid, filter.name.to_string(), source));
    }
    if as_json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(uuid, name, source)| json!({"name": name, "uuid": uuid, "source": source}))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(" {:36}   {:6}   Name\n{}", "UUID", "From", "-".repeat(72));
    for (uuid, name, source) in rows {
        println!(" {uuid:36}   {source:6}   {name}");
    }
    Ok(())
}

/// Every port with its filter, and how its guest's address is known.
pub(crate) fn print_bindings(driver: &Driver, as_json: bool) -> Result<()> {
    let ports = driver.port_statuses()?;
    if as_json {
        let rows: Vec<_> = ports
            .iter()
            .map(|PortStatus { binding, state }| {
                json!({
                    "port": binding.port.as_str(),
                    "filter": binding.filter.as_str(),
                    "mac": binding.mac.to_string(),
                    "owner": {"name": binding.owner.name, "uuid": binding.owner.uuid.to_string()},
                    "address": address(state),
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(" {:15}   {:24}   Address\n{}", "Port Dev", "Filter", "-".repeat(72));
    for PortStatus { binding, state } in ports {
        let (port, filter) = (binding.port.as_str(), binding.filter.as_str());
        match state {
            Ok(BindingState::Filtered) => println!(" {port:15}   {filter}"),
            Ok(state) => println!(" {port:15}   {filter:24}   {state}"),
            Err(error) => println!(" {port:15}   {filter:24}   no rules: {error}"),
        }
    }
    Ok(())
}

fn address(state: &Result<BindingState, Error>) -> serde_json::Value {
    match state {
        Ok(BindingState::Filtered) => json!({"state": "filtered"}),
        Ok(BindingState::Learning { family, method }) => {
            json!({"state": "learning", "variable": family.variable(), "method": method.to_string()})
        }
        Ok(BindingState::Learned { addresses, source }) => {
            json!({"state": "learned", "addresses": addresses, "source": source.to_string()})
        }
        Ok(BindingState::Leased { leases }) => {
            let lease = |lease: &RemainingLease| {
                let remaining = lease.remaining.map(|remaining| remaining.as_secs());
                json!({"address": lease.address, "server": lease.server, "remaining": remaining})
            };
            json!({"state": "leased", "leases": leases.iter().map(lease).collect::<Vec<_>>()})
        }
        Ok(other) => json!({"state": other.to_string()}),
        Err(error) => json!({"state": "invalid", "error": error.to_string()}),
    }
}

/// Every rule that is missing (-) or foreign (+).
pub(crate) fn print_differences(differences: &[Difference], as_json: bool) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string_pretty(differences)?);
        return Ok(());
    }
    for difference in differences {
        println!("{difference}");
    }
    println!("{} differences", differences.len());
    Ok(())
}
