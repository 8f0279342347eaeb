//! Lists, as tables for people and as JSON for programs.

use anyhow::Result;
use nwfilter::{Difference, Driver};
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

/// Every port with its filter.
pub(crate) fn print_bindings(driver: &Driver, as_json: bool) -> Result<()> {
    let bindings = driver.bindings()?;
    if as_json {
        let rows: Vec<_> = bindings
            .iter()
            .map(|binding| {
                json!({
                    "port": binding.port.as_str(),
                    "filter": binding.filter.as_str(),
                    "mac": binding.mac.to_string(),
                    "owner": {"name": binding.owner.name, "uuid": binding.owner.uuid.to_string()},
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(" {:15}   Filter\n{}", "Port Dev", "-".repeat(50));
    for binding in bindings {
        println!(" {:15}   {}", binding.port, binding.filter);
    }
    Ok(())
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
