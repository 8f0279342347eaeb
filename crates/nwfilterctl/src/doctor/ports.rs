//! Checks of the stores, the ports and the kernel's rules.

use std::collections::BTreeSet;
use std::path::Path;

use nix::net::if_::if_nametoindex;
use nwfilter::xml::PortDev;
use nwfilter::{Attachment, Driver, with_causes};

use super::{Finding, Level, Patient};
use crate::output::number_of;

/// Where libvirt's own driver keeps its bindings.
const LIBVIRTS_BINDINGS: &str = "/run/libvirt/nwfilter-binding";
/// The most ports that a finding names.
const SHOWN: usize = 10;

pub(super) fn check(patient: &Patient<'_>) -> Vec<Finding> {
    let Some(driver) = patient.driver else { return Vec::new() };
    let installed: Vec<_> = patient
        .backends
        .iter()
        .filter_map(|backend| Some((backend.name(), backend.installed().ok()?.ports)))
        .filter(|(_, ports)| !ports.is_empty())
        .collect();
    let mut findings = files(driver);
    let names: Vec<_> = installed.iter().map(|(name, _)| *name).collect();
    if let [one, other] = names[..] {
        let keep = patient.chosen();
        findings.push(
            Finding::new(
                Level::Problem,
                "two-backends",
                format!(
                    "{one} and {other} both filter ports of this host: a packet has to pass the rules of both"
                ),
            )
            .help(format!("nwfilterctl reload --backend {keep}, which removes the rules of the other")),
        );
    }
    let bound: BTreeSet<_> =
        driver.bindings().unwrap_or_default().iter().map(|binding| binding.port.clone()).collect();
    let libvirts = Path::new(LIBVIRTS_BINDINGS);
    let libvirts = (!patient.options.state_dir.starts_with(libvirts)).then_some(libvirts);
    for (backend, ports) in &installed {
        findings.extend(stale(backend, ports, &bound, libvirts, |port| if_nametoindex(port).is_ok()));
    }
    findings.extend(kernel(driver));
    findings.extend(attachments(driver));
    findings
}

fn files(driver: &Driver) -> Vec<Finding> {
    let problems = match driver.problems() {
        Ok(problems) => problems,
        Err(error) => {
            let finding = Finding::new(Level::Problem, "stores", with_causes(&error));
            return vec![finding.help("see that the directories can be read")];
        }
    };
    if problems.is_empty() {
        return vec![Finding::new(Level::Good, "stores", "every document of the stores can be read")];
    }
    let finding = |problem: &nwfilter::Problem| {
        Finding::new(Level::Problem, "stores", problem.to_string())
            .help(format!("correct it (nwfilterctl check {}), or remove it", problem.path.display()))
    };
    problems.iter().map(finding).collect()
}

/// Ports that have rules, but no binding in our store.
fn stale(
    backend: &str,
    ports: &BTreeSet<PortDev>,
    bound: &BTreeSet<PortDev>,
    libvirts: Option<&Path>,
    exists: impl Fn(&str) -> bool,
) -> Vec<Finding> {
    const CHECK: &str = "stale-rules";
    let (mut gone, mut open, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for port in ports.difference(bound) {
        let is_libvirts = libvirts.is_some_and(|dir| dir.join(format!("{port}.xml")).exists());
        let which = match (is_libvirts, exists(port.as_str())) {
            (true, _) => &mut theirs,
            (false, true) => &mut open,
            (false, false) => &mut gone,
        };
        which.push(port);
    }
    let mut findings = Vec::new();
    if !gone.is_empty() {
        let what = format!("{backend} has rules of ports that do not exist: {}", list(&gone));
        findings.push(Finding::new(Level::Warning, CHECK, what).help("nwfilterctl reload removes them"));
    }
    if !open.is_empty() {
        let what = format!("{backend} has rules of ports without a binding in this store: {}", list(&open));
        findings.push(Finding::new(Level::Warning, CHECK, what).help(
            "if no other driver made them: bind the port (nwfilterctl binding-create) and release it (binding-delete)",
        ));
    }
    if !theirs.is_empty() {
        let what = format!("libvirt's own driver filters ports here: {}", list(&theirs));
        findings.push(Finding::new(Level::Note, CHECK, what));
    }
    findings
}

/// Whether the kernel has the rules that the bindings ask for.
fn kernel(driver: &Driver) -> Vec<Finding> {
    let drift = match driver.diff() {
        Ok(drift) => drift,
        Err(error) => {
            let what = format!("the kernel cannot be compared with the bindings: {}", with_causes(&error));
            return vec![Finding::new(Level::Problem, "kernel", what).help("nwfilterctl -v diff says more")];
        }
    };
    let mut findings: Vec<_> = drift
        .failed
        .iter()
        .map(|failed| {
            Finding::new(Level::Problem, "ports", with_causes(failed))
                .help(format!("correct filter '{}' or the parameters of the binding", failed.filter))
        })
        .collect();
    findings.extend(drift.failed_sets.iter().map(|failed| {
        Finding::new(Level::Problem, "sets", with_causes(failed))
            .help(format!("nwfilterctl set-dumpxml {}", failed.set))
    }));
    findings.extend(
        drift.warnings.iter().map(|warning| Finding::new(Level::Warning, "ports", warning.to_string())),
    );
    findings.push(match drift.differences.len() {
        0 => Finding::new(Level::Good, "kernel", "the kernel has the rules that the bindings ask for"),
        count => Finding::new(
            Level::Problem,
            "kernel",
            format!("the kernel is not as the bindings ask for: {}", number_of(count, "difference")),
        )
        .help(
            "nwfilterctl diff shows it, nwfilterctl reload repairs it, nwfilterctl keep repairs it for good",
        ),
    });
    findings
}

/// Ports whose interfaces do not exist. Those in no bridge are among the warnings of the kernel's check.
fn attachments(driver: &Driver) -> Option<Finding> {
    let statuses = driver.port_statuses().ok()?;
    let absent = statuses.iter().filter(|status| status.attachment == Attachment::Absent);
    let absent: Vec<_> = absent.map(|status| &status.binding.port).collect();
    (!absent.is_empty()).then(|| {
        Finding::new(
            Level::Note,
            "ports",
            format!("bindings of ports whose interface does not exist: {}", list(&absent)),
        )
        .help("nwfilterctl binding-delete PORT, unless the guest comes back")
    })
}

fn list(ports: &[&PortDev]) -> String {
    let shown: Vec<_> = ports.iter().take(SHOWN).map(|port| port.as_str()).collect();
    let more = ports.len().saturating_sub(SHOWN);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(names: &[&str]) -> BTreeSet<PortDev> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn rules_without_binding_are_parted_by_whose_they_may_be() {
        let libvirts = tempfile::tempdir().unwrap();
        std::fs::write(libvirts.path().join("vnet3.xml"), "").unwrap();
        let found = stale(
            "xtables",
            &ports(&["vnet0", "vnet1", "vnet2", "vnet3"]),
            &ports(&["vnet0"]),
            Some(libvirts.path()),
            |port| port == "vnet2",
        );
        let found: Vec<_> = found.iter().map(|finding| (finding.level, finding.what.as_str())).collect();
        assert_eq!(
            found,
            [
                (Level::Warning, "xtables has rules of ports that do not exist: vnet1"),
                (Level::Warning, "xtables has rules of ports without a binding in this store: vnet2"),
                (Level::Note, "libvirt's own driver filters ports here: vnet3"),
            ]
        );
    }

    #[test]
    fn a_long_list_of_ports_is_cut() {
        let many: BTreeSet<PortDev> =
            (0..13).map(|number| format!("vnet{number}").parse().unwrap()).collect();
        assert!(list(&many.iter().collect::<Vec<_>>()).ends_with("vnet6 and 3 more"));
    }
}
