//! By how much each run of a tool raises the generation of the kernel's ruleset: facts that the backend relies on.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use anyhow::Result;
use nwfilter_testlab::{Host, Need, skip_unless};
use nwfilter_xtables::generation;

/// By how much a run of a program raises it; whether the program succeeds is not looked at.
fn raised(host: &Host, program: &[&str], input: &str) -> Result<u32> {
    let before = host.enter(generation)?;
    let _ = host.run_with_stdin(program, input);
    Ok(host.enter(generation)? - before)
}

#[test]
fn a_restore_raises_the_generation_by_one_for_each_table_that_it_changes() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let host = Host::new()?;
    for tool in ["iptables-restore", "ip6tables-restore"] {
        let restore = |text: &str| raised(&host, &[tool, "--noflush", "--wait"], text);
        let filter = "*filter\n:a - [0:0]\n-A a -j DROP\n-I FORWARD 1 -j a\nCOMMIT\n";
        let raw = "*raw\n:b - [0:0]\n-A b -j DROP\nCOMMIT\n";
        assert_eq!(restore(filter)?, 1, "{tool} makes a table with its base chains");
        assert_eq!(restore(filter)?, 1, "{tool} replaces a chain by its like");
        assert_eq!(restore(&[raw, filter].concat())?, 2, "{tool} makes one table and changes another");
        assert_eq!(restore(&[raw, filter].concat())?, 2, "{tool} changes two tables");
        assert_eq!(restore("*raw\nCOMMIT\n*filter\n-D FORWARD -j a\nCOMMIT\n")?, 1, "{tool}, one empty part");
        assert_eq!(restore("*raw\n-F b\n-X b\nCOMMIT\n")?, 1, "{tool} deletes");
        assert_eq!(restore("*filter\n:c - [0:0]\nCOMMIT\n*raw\n-A nosuch -j DROP\nCOMMIT\n")?, 1, "{tool}");
        assert_eq!(restore("*filter\n:c - [0:0]\nCOMMIT\n")?, 0, "{tool} declares an empty chain again");
        assert_eq!(restore("*filter\n-A c -j DROP\n-A nosuch -j DROP\nCOMMIT\n")?, 0, "{tool} is refused");
    }
    let restore = |text: &str| raised(&host, &["ebtables-restore", "--noflush"], text);
    let nat = "*nat\n:x ACCEPT\n-A x -j DROP\n-A PREROUTING -i nosuch -j x\n";
    assert_eq!(restore(nat)?, 1, "makes a table with its base chains");
    assert_eq!(restore(nat)?, 1, "replaces a chain by its like");
    assert_eq!(restore(&[nat, "*filter\n:y ACCEPT\n-A y -j DROP\n"].concat())?, 2, "two tables");
    assert_eq!(restore("*nat\n-A nosuch -j DROP\n")?, 0, "is refused");
    Ok(())
}

#[test]
fn what_only_reads_does_not_raise_the_generation() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let host = Host::new()?;
    let read = || -> Result<()> {
        for command in [
            "iptables-save",
            "ip6tables-save",
            "ebtables-save",
            "iptables -L",
            "iptables -t raw -S",
            "iptables -C FORWARD -j ACCEPT",
            "ip6tables -t raw -L",
            "ebtables -t nat -L",
            "ebtables -t nat -L PREROUTING",
            "nft list ruleset",
        ] {
            let words: Vec<_> = command.split(' ').collect();
            assert_eq!(raised(&host, &words, "")?, 0, "{command}");
        }
        Ok(())
    };
    read()?;
    assert_eq!(raised(&host, &["iptables", "-A", "FORWARD", "-j", "ACCEPT"], "")?, 1);
    assert_eq!(raised(&host, &["ebtables", "-t", "nat", "-P", "PREROUTING", "DROP"], "")?, 1);
    read()?;
    host.run(&["ebtables", "-t", "nat", "-N", "x"])?;
    assert_eq!(raised(&host, &["ebtables-save"], "")?, 0);
    assert_eq!(raised(&host, &["ebtables", "-t", "nat", "-L", "x"], "")?, 1, "it writes the policy anew");
    assert_eq!(raised(&host, &["iptables", "-F"], "")?, 1);
    assert_eq!(raised(&host, &["nft", "flush", "ruleset"], "")?, 1);
    read()
}

#[test]
fn each_network_namespace_counts_for_itself() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"));
    let (host, other) = (Host::new()?, Host::new()?);
    let before = other.enter(generation)?;
    assert_eq!(raised(&host, &["iptables", "-N", "a"], "")?, 1);
    assert_eq!(other.enter(generation)?, before);
    Ok(())
}
