//! Advice for errors about which the command line knows more than the driver: similar names, and verbs.

use std::path::PathBuf;

use nix::net::if_::{if_indextoname, if_nameindex, if_nametoindex};
use nwfilter::xml::{PortDev, nearest};
use nwfilter::{Driver, Error};

/// Adds advice to an error.
pub(crate) fn with_advice(driver: &Driver, error: anyhow::Error) -> anyhow::Error {
    let Some(advice) = error.downcast_ref::<Error>().and_then(|error| advice(driver, error)) else {
        return error;
    };
    anyhow::anyhow!("{error}\n  help: {advice}")
}

fn advice(driver: &Driver, error: &Error) -> Option<String> {
    Some(match error {
        Error::NoSuchFilter(name) => {
            let filters = driver.filters().unwrap_or_default();
            let names = filters.iter().map(|filter| filter.name.as_str());
            meant(name.as_str(), names).unwrap_or_else(|| "'nwfilterctl list' shows the filters".to_owned())
        }
        Error::NoSuchBinding(port) => {
            // Its name is right: a similar one would be another guest's.
            if let Some(damaged) = damaged_binding(driver, port) {
                return Some(format!(
                    "its binding is damaged: see {}; its rules stay until binding-create has stored it anew",
                    damaged.display()
                ));
            }
            let bindings = driver.bindings().unwrap_or_default();
            let ports = bindings.iter().map(|binding| binding.port.as_str());
            meant(port.as_str(), ports)
                .unwrap_or_else(|| "'nwfilterctl binding-list' shows the ports that have one".to_owned())
        }
        Error::NoSuchPort(port) => {
            let other = if_nametoindex(port.as_str()).and_then(if_indextoname).ok();
            if let Some(name) = other.as_deref().and_then(|name| name.to_str().ok()) {
                return Some(format!("'{port}' is an alternative name of '{name}': bind that"));
            }
            let interfaces = if_nameindex().ok();
            let names = interfaces.iter().flat_map(|interfaces| interfaces.iter());
            let names: Vec<_> = names.filter_map(|interface| interface.name().to_str().ok()).collect();
            meant(port.as_str(), names.into_iter()).unwrap_or_else(|| {
                "a guest has its interface while it runs; 'ip -brief link' shows all".to_owned()
            })
        }
        Error::BindingExists(port) => format!("nwfilterctl binding-delete {port}"),
        Error::FilterInUse { name, .. } => {
            format!("'nwfilterctl users {name}' shows by what; 'define' changes a filter that is in use")
        }
        _ => return None,
    })
}

/// The damaged file, also one that was moved aside, of a port without binding.
fn damaged_binding(driver: &Driver, port: &PortDev) -> Option<PathBuf> {
    let name = format!("{port}.xml");
    let is_of_port = |path: &PathBuf| {
        let rest = path.file_name().and_then(|file| file.to_str()?.strip_prefix(&name));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(".damaged"))
    };
    driver.problems().ok()?.into_iter().map(|problem| problem.path).find(is_of_port)
}

fn meant<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    // The name itself is skipped: an earlier operation of the transaction may have removed it.
    nearest(name, names.filter(|other| *other != name)).map(|near| format!("did you mean '{near}'?"))
}
