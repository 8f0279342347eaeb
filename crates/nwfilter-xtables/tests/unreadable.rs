//! What becomes of changes while a table has a rule that iptables or ebtables cannot read.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use nwfilter_rules::{Backend, Batch, instantiate};
use nwfilter_testlab::{Host, Need, skip_unless};
use nwfilter_xml::{PortDev, read_binding, read_filter};
use nwfilter_xtables::Xtables;

/// A port with Ethernet rules and IP rules of both families.
fn batch(port: &str) -> Result<Batch> {
    let filter = "<filter name='f'><rule action='drop' direction='in'><mac protocolid='arp'/></rule>
        <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
        <rule action='drop' direction='inout'><all-ipv6/></rule></filter>";
    let binding = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/></filterbinding>"
    );
    let filter = read_filter("f.xml", filter).into_result()?;
    let binding = read_binding("b.xml", &binding).into_result()?;
    let filters = BTreeMap::from([(filter.name.clone(), Arc::new(filter))]);
    let ruleset = instantiate(&filters, &binding)?;
    let mut batch = Batch::default();
    batch.filter(port.parse::<PortDev>()?, ruleset.into());
    Ok(batch)
}

#[test]
fn a_table_with_a_rule_that_its_tool_cannot_read_is_left_alone_and_named() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let host = Host::new()?;
    let backend = Xtables::default();
    host.enter(|| backend.apply(&batch("vnet0")?).context("vnet0"))?;
    for (chain, rule, told) in [
        ("ip filter FORWARD", "log prefix x", "nft -a list table ip filter"),
        ("ip filter FI-vnet0", "log prefix x", "nft -a list table ip filter"),
        ("ip6 filter FORWARD", "fib daddr type local accept", "nft -a list table ip6 filter"),
        ("bridge nat POSTROUTING", "log prefix x", "nft -a list table bridge nat"),
        ("bridge nat POSTROUTING", "meta mark 1 accept", "nft -a list ruleset bridge"),
    ] {
        let table = chain.rsplit_once(' ').context("a table")?.0;
        let list = || host.run(&["nft", "-a", &format!("list table {table}")]);
        host.run(&["nft", &format!("insert rule {chain} {rule}")])?;
        let before = list()?;
        for change in [batch("vnet1")?, batch("vnet0")?] {
            let error = host.enter(|| backend.apply(&change)).err().context("it is refused")?.to_string();
            assert!(error.contains(told), "{chain} {rule}: {error}");
        }
        assert!(host.enter(|| backend.plan(&batch("vnet1")?).context("plan")).is_err(), "{chain}");
        assert_eq!(list()?, before, "{chain} {rule}");
        let line = before.lines().find(|line| line.contains(rule.split_once(' ').unwrap_or_default().0));
        let handle = line.and_then(|line| line.rsplit_once("handle ")).context("a handle")?.1;
        host.run(&["nft", &format!("delete rule {chain} handle {handle}")])?;
        host.enter(|| backend.apply(&batch("vnet1")?).context("vnet1"))?;
    }
    Ok(())
}

#[test]
fn a_rule_that_no_tool_can_read_in_a_table_of_others_disturbs_nothing() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let host = Host::new()?;
    host.run(&["iptables", "-t", "nat", "-A", "PREROUTING", "-j", "ACCEPT"])?;
    host.run(&["nft", "insert rule ip nat PREROUTING log prefix x"])?;
    let backend = Xtables::default();
    host.enter(|| backend.apply(&batch("vnet0")?).context("vnet0"))?;
    assert!(host.enter(|| backend.plan(&batch("vnet0")?).context("plan"))?.differences.is_empty());
    Ok(())
}
