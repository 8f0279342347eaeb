//! Checks of the kernel and the tools.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use nix::unistd::geteuid;
use nwfilter::rules::KNOWN_HELPERS;
use nwfilter::{Backend, check_learning, with_causes};
use nwfilter_nftables::check_kernel;

use super::{Finding, Level, Patient, ask};

const TOOLS: [&str; 3] = ["iptables", "ip6tables", "ebtables"];

pub(super) fn check(patient: &Patient<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !geteuid().is_root() {
        findings.push(
            Finding::new(Level::Warning, "root", "without root most of the kernel cannot be looked at")
                .help("run it as root"),
        );
    }
    findings.extend(backends(patient));
    findings.push(bridge_conntrack(patient));
    findings.extend(bridge_filtering(patient));
    findings.push(learning());
    findings.push(helpers());
    findings.extend(connections());
    findings.extend(tools(patient.chosen() == "xtables"));
    findings.extend(legacy_tables());
    findings
}

/// Whether each backend can be asked at all.
fn backends(patient: &Patient<'_>) -> Vec<Finding> {
    let finding = |(number, backend): (usize, &dyn Backend)| {
        let name = backend.name();
        let which = if number == 0 { "the chosen backend" } else { "the other backend" };
        match backend.installed() {
            Ok(_) => Finding::new(Level::Good, "backend", format!("{which}, {name}, works")),
            Err(error) => {
                let level = if number == 0 { Level::Problem } else { Level::Note };
                let what = format!("{which}, {name}, does not work: {}", with_causes(&error));
                Finding::new(level, "backend", what)
                    .help("see the findings about the tools and the kernel, or choose another with --backend")
            }
        }
    };
    patient.backends.iter().map(|backend| &**backend).enumerate().map(finding).collect()
}

fn bridge_conntrack(patient: &Patient<'_>) -> Finding {
    const CHECK: &str = "bridge-conntrack";
    match check_kernel() {
        Ok(()) => Finding::new(Level::Good, CHECK, "the kernel tracks connections in bridges"),
        Err(error) => {
            let level = if patient.chosen() == "nftables" { Level::Warning } else { Level::Note };
            let what = format!(
                "backend nftables would refuse filters with rules on connections: {}",
                with_causes(&error)
            );
            Finding::new(level, CHECK, what)
                .help("use --backend xtables, or a kernel with nf_conntrack_bridge (Linux 5.3 and newer)")
        }
    }
}

/// br_netfilter and its switches.
fn bridge_filtering(patient: &Patient<'_>) -> Vec<Finding> {
    const CHECK: &str = "bridge-filtering";
    if patient.chosen() != "xtables" {
        return Vec::new();
    }
    let switch = |name: &str| fs::read_to_string(format!("/proc/sys/net/bridge/bridge-nf-{name}"));
    let mut findings = Vec::new();
    for name in ["call-iptables", "call-ip6tables"] {
        let tool = name.trim_start_matches("call-");
        findings.push(match switch(name) {
            Ok(value) if value.trim() != "0" => {
                Finding::new(Level::Good, CHECK, format!("{tool} sees the packets of bridges"))
            }
            Ok(_) => Finding::new(
                Level::Warning,
                CHECK,
                format!("net.bridge.bridge-nf-{name} is 0: {tool}'s rules see no packet of a bridge"),
            )
            .help(format!(
                "sysctl net.bridge.bridge-nf-{name}=1; nwfilterctl does so when a port gets such rules, unless \
                 --keep-bridge-nf forbids it; look for the file in /etc/sysctl.d that switches it off"
            )),
            Err(_) => Finding::new(
                Level::Warning,
                CHECK,
                format!("{tool}'s rules see no packet of a bridge, because br_netfilter is not loaded"),
            )
            .help("modprobe br_netfilter; nwfilterctl does so when a port gets such rules"),
        });
    }
    for (name, what) in [("filter-vlan-tagged", "VLAN"), ("filter-pppoe-tagged", "PPPoE")] {
        if switch(name).is_ok_and(|value| value.trim() == "0") {
            let what = format!("IP rules do not see packets in {what} frames");
            findings.push(Finding::new(Level::Note, CHECK, what).help(format!(
                "have filters refuse such frames, as clean-traffic does, or sysctl net.bridge.bridge-nf-{name}=1"
            )));
        }
    }
    findings
}

fn learning() -> Finding {
    match check_learning() {
        Ok(()) => Finding::new(Level::Good, "learning", "addresses of guests can be learned"),
        Err(error) => Finding::new(
            Level::Warning,
            "learning",
            format!(
                "addresses of guests cannot be learned: the kernel refuses a BPF program on a socket: {error}"
            ),
        )
        .help("give the parameter IP in bindings, or run it with CAP_NET_RAW and CAP_BPF (or CAP_SYS_ADMIN)"),
    }
}

fn helpers() -> Finding {
    const CHECK: &str = "conntrack-helpers";
    let names: BTreeSet<_> = KNOWN_HELPERS.iter().map(|known| known.helper.name()).collect();
    let missing: Vec<_> =
        names.iter().copied().filter(|name| !has_module(&format!("nf_conntrack_{name}"))).collect();
    if missing.is_empty() {
        let names: Vec<_> = names.into_iter().collect();
        return Finding::new(Level::Good, CHECK, format!("the kernel has {}", names.join(", ")));
    }
    Finding::new(Level::Note, CHECK, format!("the kernel has no conntrack helper for {}", missing.join(", ")))
        .help("filters that use state RELATED for these protocols need the module nf_conntrack_NAME")
}

/// Whether a module is in the kernel, or could be loaded.
fn has_module(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
        || ask("modprobe", &["--dry-run", "--quiet", name]).is_ok_and(|output| output.status.success())
}

/// Whether the table of connections has room.
fn connections() -> Option<Finding> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).ok()?.trim().parse().ok()
    };
    Some(judge_connections(number("nf_conntrack_count")?, number("nf_conntrack_max")?))
}

fn judge_connections(count: u64, max: u64) -> Finding {
    let what = format!("{count} of {max} connections are tracked");
    if count < max / 10 * 9 {
        return Finding::new(Level::Good, "connections", what);
    }
    let what = format!("{what}: packets of new connections are dropped when the table is full");
    Finding::new(Level::Warning, "connections", what)
        .help(format!("sysctl net.netfilter.nf_conntrack_max={}", max.saturating_mul(4)))
}

/// Whether the tools exist, and all use the same part of the kernel.
fn tools(are_needed: bool) -> Vec<Finding> {
    let said: Vec<_> = TOOLS
        .map(|tool| {
            let said =
                ask(tool, &["--version"]).map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            (tool, said.map_err(|failure| failure.to_string()))
        })
        .into();
    judge_tools(&said, are_needed)
}

fn judge_tools(said: &[(&str, Result<String, String>)], are_needed: bool) -> Vec<Finding> {
    const CHECK: &str = "tools";
    let (mut findings, mut legacy, mut found) = (Vec::new(), Vec::new(), Vec::new());
    for (tool, said) in said {
        match said {
            Ok(version) => {
                found.push(version.trim().to_owned());
                if !version.contains("nf_tables") {
                    legacy.push(*tool);
                }
            }
            Err(why) => {
                let level = if are_needed { Level::Problem } else { Level::Note };
                findings.push(Finding::new(level, CHECK, format!("{tool} cannot be run: {why}")).help(
                    format!("apt-get install {}", if *tool == "ebtables" { *tool } else { "iptables" }),
                ));
            }
        }
    }
    if legacy.is_empty() && findings.is_empty() {
        findings.push(Finding::new(Level::Good, CHECK, found.join(", ")));
    }
    for tool in legacy {
        let level = if tool == "ebtables" && are_needed { Level::Problem } else { Level::Note };
        let what = match tool {
            "ebtables" => "ebtables is the legacy variant, which cannot replace rules without a gap",
            _ => "is the legacy variant: changes of others are found by asking every 5 seconds only",
        };
        let what = if tool == "ebtables" { what.to_owned() } else { format!("{tool} {what}") };
        let help = format!("update-alternatives --set {tool} /usr/sbin/{tool}-nft");
        findings.push(Finding::new(level, CHECK, what).help(help));
    }
    findings
}

/// Tables of the legacy variants in use beside those of nf_tables.
fn legacy_tables() -> Vec<Finding> {
    let is_legacy = |tool| {
        ask(tool, &["--version"])
            .is_ok_and(|output| !String::from_utf8_lossy(&output.stdout).contains("nf_tables"))
    };
    let families = [("iptables", "/proc/net/ip_tables_names"), ("ip6tables", "/proc/net/ip6_tables_names")];
    let mut findings = Vec::new();
    for (tool, file) in families {
        let tables = fs::read_to_string(file).unwrap_or_default();
        if !tables.is_empty() && !is_legacy(tool) {
            findings.push(judge_legacy(tool, &tables));
        }
    }
    findings
}

fn judge_legacy(tool: &str, tables: &str) -> Finding {
    let mut tables: Vec<_> = tables.lines().collect();
    tables.sort_unstable();
    Finding::new(
        Level::Warning,
        "legacy-tables",
        format!(
            "somebody uses {tool}-legacy ({}) beside {tool}: packets pass the rules of both",
            tables.join(", ")
        ),
    )
    .help(format!("look with {tool}-legacy-save whose rules they are, and move that program to {tool}-nft"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_a_problem_only_where_it_is_needed() {
        let said =
            [("iptables", Ok("iptables v1.8.9 (nf_tables)\n".into())), ("ebtables", Err("not found".into()))];
        let problem = &judge_tools(&said, true)[0];
        assert_eq!(
            (problem.level, problem.help.as_deref()),
            (Level::Problem, Some("apt-get install ebtables"))
        );
        assert_eq!(judge_tools(&said, false)[0].level, Level::Note);
    }

    #[test]
    fn legacy_ebtables_is_a_problem_and_legacy_iptables_a_note() {
        let legacy = |tool: &'static str| [(tool, Ok(format!("{tool} v1.8.9 (legacy)")))];
        assert_eq!(judge_tools(&legacy("ebtables"), true)[0].level, Level::Problem);
        let note = &judge_tools(&legacy("iptables"), true)[0];
        assert_eq!(note.level, Level::Note);
        assert!(note.what.starts_with("iptables is the legacy variant"), "{note}");
    }

    #[test]
    fn a_table_of_connections_that_is_nearly_full_is_a_warning() {
        assert_eq!(judge_connections(10, 1000).level, Level::Good);
        let full = judge_connections(990, 1000);
        assert_eq!(full.level, Level::Warning);
        assert_eq!(full.help.as_deref(), Some("sysctl net.netfilter.nf_conntrack_max=4000"));
    }
}
