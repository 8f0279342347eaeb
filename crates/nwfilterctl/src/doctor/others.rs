//! Checks for other programs whose rules see packets of guests.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Finding, Level, ask};

/// Programs: the prefixes of their chains and tables, and how to make them accept bridged traffic.
const PROGRAMS: [(&str, &[&str], &str); 7] = [
    ("docker", &["DOCKER", "docker"], "iptables -A FORWARD -m physdev --physdev-is-bridged -j ACCEPT"),
    (
        "firewalld",
        &["FORWARD_direct", "FORWARD_IN", "FORWARD_OUT", "FORWARD_POLICIES", "FWD", "firewalld"],
        "firewall-cmd --permanent --zone=trusted --add-interface=BRIDGE, then firewall-cmd --reload",
    ),
    ("ufw", &["ufw"], "ufw route allow in on BRIDGE out on BRIDGE"),
    ("Kubernetes", &["KUBE-"], ""),
    ("Calico", &["cali-"], ""),
    ("Podman", &["NETAVARK", "CNI-", "netavark"], ""),
    ("libvirt's virtual networks", &["LIBVIRT_FW", "libvirt_network"], ""),
];

/// The chains in FORWARD that are ours and libvirt's.
const OURS: [&str; 3] = ["libvirt-in", "libvirt-out", "libvirt-in-post"];
/// The tables that iptables and its kin have.
const XTABLES: [&str; 6] = ["filter", "nat", "mangle", "raw", "security", "broute"];

pub(super) fn check() -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut programs = Programs::default();
    for tool in ["iptables", "ip6tables"] {
        // Another check reports a tool that fails.
        let Ok(output) = ask(tool, &["-w", "5", "-S", "FORWARD"]) else { continue };
        let listed = String::from_utf8_lossy(&output.stdout);
        let (drops, targets) = forward(&listed);
        if drops {
            findings.push(policy(tool));
        }
        targets.iter().for_each(|target| programs.add(target, format!("{tool} FORWARD -j {target}")));
    }
    match ask("nft", &["--json", "list", "chains"]) {
        Ok(output) if output.status.success() => {
            for (table, chain) in foreign_chains(&output.stdout) {
                programs.add(
                    table.rsplit(' ').next().unwrap_or_default(),
                    format!("table {table}, chain {chain}"),
                );
            }
        }
        _ => findings.push(
            Finding::new(
                Level::Note,
                "others",
                "nft cannot list tables, so those of other programs are not examined",
            )
            .help("apt-get install nftables"),
        ),
    }
    findings.extend(programs.findings());
    findings
}

/// The places in which each program has rules for packets of guests.
#[derive(Default)]
struct Programs(BTreeMap<&'static str, BTreeSet<String>>);

impl Programs {
    fn add(&mut self, name: &str, place: String) {
        let known = PROGRAMS.iter().find(|(_, starts, _)| starts.iter().any(|start| name.starts_with(start)));
        let program = known.map_or("another program", |(program, ..)| program);
        self.0.entry(program).or_default().insert(place);
    }

    fn findings(self) -> impl Iterator<Item = Finding> {
        self.0.into_iter().map(|(program, places)| {
            const SHOWN: usize = 5;
            let more = if places.len() > SHOWN { ", …" } else { "" };
            let places: Vec<_> = places.into_iter().take(SHOWN).collect();
            let what = format!("{program} filters packets that guests forward: {}{more}", places.join("; "));
            let remedy =
                PROGRAMS.iter().find(|(name, ..)| *name == program).map_or("", |(_, _, remedy)| remedy);
            let (level, help) = match remedy {
                "" => {
                    (Level::Note, "what it drops is lost, whatever the filters of guests accept".to_owned())
                }
                _ => (Level::Warning, format!("if packets of guests are lost there: {remedy}")),
            };
            Finding::new(level, "others", what).help(help)
        })
    }
}

/// Whether the policy of FORWARD is to drop, and which chains of others are in it.
fn forward(listed: &str) -> (bool, BTreeSet<&str>) {
    let drops = listed.lines().any(|line| line == "-P FORWARD DROP");
    let target = |line: &str| -> Option<usize> { line.find(" -j ").map(|at| at + 4) };
    let targets = listed
        .lines()
        .filter(|line| line.starts_with("-A FORWARD"))
        .filter_map(|line| target(line).and_then(|at| line[at..].split(' ').next()))
        .filter(|target| !OURS.contains(target));
    (drops, targets.collect())
}

fn policy(tool: &str) -> Finding {
    Finding::new(
        Level::Warning,
        "forward-policy",
        format!(
            "the policy of {tool}'s FORWARD is DROP: it drops what no IP rule of a guest's filter accepts"
        ),
    )
    .help(format!("{tool} -A FORWARD -m physdev --physdev-is-bridged -j ACCEPT"))
}

/// The base chains of others that packets of bridges pass, as `inet firewalld` and the chain's name.
fn foreign_chains(listed: &[u8]) -> Vec<(String, String)> {
    let listed: Value = serde_json::from_slice(listed).unwrap_or_default();
    let chains = listed["nftables"].as_array().into_iter().flatten().map(|object| &object["chain"]);
    let foreign = chains.filter_map(|chain| {
        let field = |name: &str| chain[name].as_str();
        let (family, table, hook) = (field("family")?, field("table")?, field("hook")?);
        let is_passed = family == "bridge" || (matches!(family, "ip" | "ip6" | "inet") && hook == "forward");
        let is_ours = (family, table) == ("bridge", "nwfilter");
        let is_known = is_ours || (family != "inet" && XTABLES.contains(&table));
        (is_passed && !is_known)
            .then(|| (format!("{family} {table}"), field("name").unwrap_or_default().to_owned()))
    });
    foreign.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_others_in_forward_are_told_from_ours() {
        let listed = "-P FORWARD DROP\n-A FORWARD -j libvirt-in\n-A FORWARD -i docker0 -j DOCKER-USER -m comment\n\
                      -A FORWARD -j libvirt-in-post\n";
        assert_eq!(forward(listed), (true, BTreeSet::from(["DOCKER-USER"])));
        assert_eq!(forward("-P FORWARD ACCEPT\n"), (false, BTreeSet::new()));
    }

    #[test]
    fn tables_of_iptables_and_our_own_are_not_foreign() {
        let chain = |family: &str, table: &str, hook: &str| serde_json::json!({"chain": {"family": family, "table": table, "name": "c", "hook": hook}});
        let listed = serde_json::json!({"nftables": [
            chain("ip", "filter", "forward"), chain("bridge", "nwfilter", "prerouting"),
            chain("inet", "firewalld", "forward"), chain("inet", "firewalld", "input"),
            chain("bridge", "mine", "input"), {"chain": {"family": "ip", "table": "x", "name": "no-base"}},
        ]});
        let found: Vec<_> =
            foreign_chains(listed.to_string().as_bytes()).into_iter().map(|(table, _)| table).collect();
        assert_eq!(found, ["inet firewalld", "bridge mine"]);
    }

    #[test]
    fn an_unknown_program_is_a_note() {
        let mut programs = Programs::default();
        programs.add("my-firewall", "iptables FORWARD -j my-firewall".into());
        programs.add("ufw-before-forward", "iptables FORWARD -j ufw-before-forward".into());
        let levels: Vec<_> = programs.findings().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Note, Level::Warning]);
    }
}
