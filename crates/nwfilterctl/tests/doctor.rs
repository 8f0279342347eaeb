//! `doctor` on hosts with planted faults: each is found, with what to do about it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use nwfilter_testlab::{Host, Need, skip_unless};
use serde_json::Value;

const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='allow-arp'/>
</filterbinding>
";

fn with(mut command: Command, dir: &Path, args: &[&str]) -> Output {
    command.current_dir(dir).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
    command.env_remove("RUST_LOG").output().unwrap()
}

fn run(host: &Host, dir: &Path, args: &[&str]) -> Output {
    with(host.command(env!("CARGO_BIN_EXE_nwfilterctl")), dir, args)
}

fn must(host: &Host, dir: &Path, args: &[&str]) {
    let output = run(host, dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What `doctor` finds: `problem[kernel]: …`, a finding each, with its help.
struct Findings(Vec<(String, String, Option<String>)>);

impl Findings {
    /// Examines the host; the exit code must say whether there is a problem.
    fn of(host: &Host, dir: &Path, args: &[&str]) -> Self {
        let output = run(host, dir, &[&["doctor", "--json"], args].concat());
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error}: {}", String::from_utf8_lossy(&output.stderr));
        });
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let finding = |row: &Value| {
            let name = format!("{}[{}]", text(&row["level"]), text(&row["check"]));
            (name, text(&row["what"]), row["help"].as_str().map(str::to_owned))
        };
        let found = Self(rows.iter().map(finding).collect());
        let is_bad = found.0.iter().any(|(name, ..)| name.starts_with("problem"));
        assert_eq!(output.status.code(), Some(i32::from(is_bad)), "{:#?}", found.0);
        found
    }

    /// The help of the finding of that name whose text contains `what`.
    fn help(&self, name: &str, what: &str) -> &str {
        let found = self.0.iter().find(|(found, text, _)| found == name && text.contains(what));
        let found = found.unwrap_or_else(|| panic!("no {name} '{what}' in {:#?}", self.0));
        found.2.as_deref().unwrap_or_default()
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(found, ..)| found == name)
    }
}

/// A host with a bound port, and its stores.
fn bound() -> (Host, nwfilter_testlab::Tap, tempfile::TempDir) {
    let (host, dir) = (Host::new().unwrap(), tempfile::tempdir().unwrap());
    let tap = host.tap("tap0").unwrap();
    fs::write(dir.path().join("tap0.xml"), BINDING).unwrap();
    must(&host, dir.path(), &["binding-create", "tap0.xml"]);
    (host, tap, dir)
}

macro_rules! skip_unless_tools {
    () => {
        skip_unless!(
            Need::Root,
            Need::Tool("iptables-legacy"),
            Need::Tool("ebtables-restore"),
            Need::Tool("nft"),
        );
    };
}

#[test]
fn a_host_in_order_has_no_problem_and_each_check_says_so() {
    skip_unless_tools!();
    let (host, _tap, dir) = bound();
    let found = Findings::of(&host, dir.path(), &[]);
    for check in ["backend", "bridge-filtering", "conntrack-helpers", "kernel", "learning", "stores", "tools"]
    {
        assert!(found.has(&format!("good[{check}]")), "{check}: {:#?}", found.0);
    }
    let bad: Vec<_> = found.0.iter().filter(|(name, ..)| name.starts_with(['p', 'w'])).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    let text = String::from_utf8(run(&host, dir.path(), &["doctor"]).stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with("0 problems, 0 warnings, "), "{text}");
}

#[test]
fn firewalls_of_others_in_the_way_of_guests_are_found() {
    skip_unless_tools!();
    let (host, _tap, dir) = bound();
    for rule in [
        "iptables -P FORWARD DROP",
        "iptables -N DOCKER-USER",
        "iptables -A FORWARD -j DOCKER-USER",
        "ip6tables -N ufw6-before-forward",
        "ip6tables -A FORWARD -j ufw6-before-forward",
        "nft add table inet firewalld",
        "nft add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }",
        "nft add table bridge strange",
        "nft add chain bridge strange c { type filter hook prerouting priority 10; }",
        "iptables-legacy -A INPUT -j ACCEPT",
    ] {
        host.run(&rule.splitn(8, ' ').collect::<Vec<_>>()).unwrap();
    }
    let found = Findings::of(&host, dir.path(), &[]);
    let help = found.help("warning[forward-policy]", "iptables's FORWARD is DROP");
    assert_eq!(help, "iptables -A FORWARD -m physdev --physdev-is-bridged -j ACCEPT");
    assert!(found.help("warning[others]", "docker").contains("physdev-is-bridged"));
    assert!(found.help("warning[others]", "ufw").contains("ufw route allow"));
    assert!(found.help("warning[others]", "firewalld").contains("firewall-cmd"));
    found.help(
        "note[others]",
        "another program filters packets that guests forward: table bridge strange, chain c",
    );
    assert!(
        found.help("warning[legacy-tables]", "iptables-legacy (filter)").contains("iptables-legacy-save")
    );
    let mut help = help.split(' ').collect::<Vec<_>>();
    host.run(&help).unwrap();
    help[0] = "ip6tables";
    host.run(&help).unwrap();
    assert!(
        !Findings::of(&host, dir.path(), &[]).has("problem[kernel]"),
        "the advice keeps our rules in force"
    );
}

#[test]
fn switches_of_the_kernel_that_are_off_are_found() {
    skip_unless_tools!();
    let (host, _tap, dir) = bound();
    host.set_bridge_nf(false).unwrap();
    let found = Findings::of(&host, dir.path(), &[]);
    let help = found.help("warning[bridge-filtering]", "bridge-nf-call-ip6tables is 0");
    assert!(help.starts_with("sysctl net.bridge.bridge-nf-call-ip6tables=1"), "{help}");
    found.help("note[bridge-filtering]", "VLAN");
    assert!(!Findings::of(&host, dir.path(), &["--backend", "nftables"]).has("warning[bridge-filtering]"));
}

#[test]
fn rules_that_differ_from_the_bindings_and_rules_without_binding_are_found() {
    skip_unless_tools!();
    let (host, tap, dir) = bound();
    host.run(&["ebtables", "-t", "nat", "-F", "libvirt-I-tap0"]).unwrap();
    let found = Findings::of(&host, dir.path(), &[]);
    assert!(found.help("problem[kernel]", "difference").contains("nwfilterctl reload"));

    fs::remove_file(dir.path().join("run/tap0.xml")).unwrap();
    let found = Findings::of(&host, dir.path(), &[]);
    found.help("warning[stale-rules]", "ports without a binding in this store: tap0");
    host.ip(&["link del tap0"]).unwrap();
    drop(tap);
    let found = Findings::of(&host, dir.path(), &[]);
    assert!(found.help("warning[stale-rules]", "do not exist: tap0").contains("nwfilterctl reload"));
    must(&host, dir.path(), &["reload"]);
    assert!(!Findings::of(&host, dir.path(), &[]).has("warning[stale-rules]"));
}

#[test]
fn two_backends_at_once_are_found_and_the_advice_leaves_one() {
    skip_unless_tools!();
    let (host, _tap, dir) = bound();
    let saved = host.run(&["ebtables-save"]).unwrap();
    must(&host, dir.path(), &["reload", "--backend", "nftables"]);
    host.run_with_stdin(&["ebtables-restore"], &saved).unwrap();
    let found = Findings::of(&host, dir.path(), &["--backend", "nftables"]);
    let help = found.help("problem[two-backends]", "both filter ports");
    assert!(help.starts_with("nwfilterctl reload --backend nftables,"), "{help}");
    must(&host, dir.path(), &["reload", "--backend", "nftables"]);
    assert!(!Findings::of(&host, dir.path(), &["--backend", "nftables"]).has("problem[two-backends]"));
}

#[test]
fn damaged_documents_absent_ports_and_ports_without_bridge_are_found() {
    skip_unless_tools!();
    let (host, _tap, dir) = bound();
    fs::create_dir_all(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/broken.xml"), "<filter").unwrap();
    fs::write(dir.path().join("run/tap7.xml"), BINDING.replace("tap0", "tap7")).unwrap();
    fs::write(dir.path().join("run/tap8.xml"), BINDING.replace("tap0", "tap8")).unwrap();
    host.ip(&["tuntap add dev tap8 mode tap"]).unwrap();
    let found = Findings::of(&host, dir.path(), &[]);
    assert!(found.help("problem[stores]", "broken.xml").contains("nwfilterctl check etc/broken.xml"));
    assert!(found.help("note[ports]", "does not exist: tap7").contains("binding-delete"));
    found.help("warning[ports]", "tap8: is in no bridge");
    assert!(dir.path().join("etc/broken.xml").exists(), "doctor moves nothing");
}
