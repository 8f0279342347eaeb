//! Connections that the host itself opens to guests get conntrack helpers, on a kernel that tracks bridged connections.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, Desired, Ruleset, instantiate};
use nwfilter_testlab::seed::SeedLab;
use nwfilter_testlab::{Need, skip_unless};
use nwfilter_xml::{Filter, read_binding, read_filter};
use support::stock_and;

/// Skips the test where the kernel or a program is missing.
macro_rules! skip_without_ftp {
    () => {
        skip_unless!(
            Need::BridgeConntrack,
            Need::Tool("ip"),
            Need::Tool("nft"),
            Need::Tool("vsftpd"),
            Need::Tool("curl")
        )
    };
}

/// The lab of the seed's filters, with a host that has an address.
fn lab() -> Result<SeedLab> {
    let lab = SeedLab::new()?;
    lab.host().set_bridge_nf(false)?;
    lab.host().add_bridge_addr("10.0.0.254/24")?;
    Ok(lab)
}

/// The rules of the manual's second filter for a port, with FTP in passive mode; `address_of` is the port whose address the guest has.
fn filter(lab: &SeedLab, batch: &mut Batch, port: &str, address_of: &str) {
    let text = include_str!("../../../xml-fixtures/seed/ftp-by-state.xml");
    let text = text.replace("<all state='ESTABLISHED'/>", "<all state='ESTABLISHED,RELATED'/>");
    let seed: Filter = read_filter("f.xml", &text).into_result().unwrap();
    let binding = lab.binding(address_of, seed.name.as_str());
    let binding = binding.replace(&format!("portdev name='{address_of}'"), &format!("portdev name='{port}'"));
    let binding = read_binding("b.xml", &binding).into_result().unwrap();
    batch.filter(port.parse().unwrap(), Arc::new(instantiate(&stock_and(seed), &binding).unwrap()));
}

fn batch(lab: &SeedLab) -> Batch {
    let mut batch = Batch::default();
    SeedLab::PORTS.iter().for_each(|port| filter(lab, &mut batch, port, port));
    batch
}

fn gone(ports: &[&str]) -> Batch {
    let mut batch = Batch::default();
    ports.iter().for_each(|port| batch.remove(port.parse().unwrap()));
    batch
}

fn tables(lab: &SeedLab) -> Result<Vec<String>> {
    let tables = lab.host().run(&["nft", "list", "tables"])?;
    Ok(tables.lines().map(|line| line.trim_start_matches("table ").to_owned()).collect())
}

#[test]
fn a_transfer_that_the_host_begins_passes_in_both_modes_and_not_without_the_helper() -> Result<()> {
    skip_without_ftp!();
    let lab = lab()?;
    let backend = Nftables::new();
    let mut watch = lab.host().enter(|| backend.watch())?.unwrap();
    lab.host().enter(|| backend.apply(&batch(&lab)))?;
    for active in [true, false] {
        assert!(
            lab.ftp_of_host(active)?,
            "active {active}: {}",
            lab.host().run(&["nft", "list", "ruleset"])?
        );
    }
    assert!(lab.ftp()? && lab.passive_ftp()?, "a client outside");
    assert_eq!(watch.changes()?, []);

    lab.host().run(&["nft", "delete table inet nwfilter"])?;
    assert!(!lab.ftp_of_host(true)?, "without the helper");
    let told = format!("{:?}", watch.changes()?);
    assert!(told.contains("inet nwfilter") && told.contains("host-output"), "{told}");
    let mut repair = batch(&lab);
    repair.report_differences = true;
    let repaired = lab.host().enter(|| backend.apply(&repair))?;
    let differences = format!("{:?}", repaired.differences);
    assert!(differences.contains("host-ftp-tcp-ipv4"), "{differences}");
    assert!(lab.ftp_of_host(true)? && lab.ftp_of_host(false)?);
    assert_eq!(lab.host().enter(|| backend.apply(&repair))?.commits, 0);
    Ok(())
}

#[test]
fn a_helper_stays_while_another_guest_has_the_address_and_the_table_goes_with_the_last() -> Result<()> {
    skip_without_ftp!();
    let lab = lab()?;
    let backend = Nftables::new();
    let mut both = batch(&lab);
    filter(&lab, &mut both, "tap0", "vnet0");
    lab.host().enter(|| backend.apply(&both))?;
    // Another process reads the same.
    assert_eq!(lab.host().enter(|| Nftables::new().plan(&both))?.differences, []);

    lab.host().run(&["nft", "add element inet nwfilter host-ftp-tcp-ipv4 { 192.0.2.1 . 21 }"])?;
    let differences = lab.host().enter(|| backend.plan(&both))?.differences;
    assert!(format!("{differences:?}").contains("192.0.2.1"), "{differences:?}");
    lab.host().enter(|| backend.apply(&gone(&["tap0"])))?;
    let listed = lab.host().run(&["nft", "list", "set", "inet", "nwfilter", "host-ftp-tcp-ipv4"])?;
    assert!(listed.contains("elements = { 10.0.0.2 . 21 }"), "{listed}");
    assert!(lab.ftp_of_host(true)?);

    lab.host().enter(|| backend.apply(&gone(&["vnet0"])))?;
    assert_eq!(tables(&lab)?, ["bridge nwfilter"]);
    lab.host().enter(|| backend.apply(&both))?;
    lab.host().enter(|| Nftables::new().clear())?;
    assert_eq!(tables(&lab)?, [""; 0]);
    Ok(())
}

#[test]
fn the_table_comes_and_goes_with_the_helpers_of_a_filter() -> Result<()> {
    skip_without_ftp!();
    let lab = lab()?;
    let backend = Nftables::new();
    let mut bare = batch(&lab);
    for desired in bare.ports.values_mut() {
        let Desired::Filtered(ruleset) = desired else { continue };
        let without = Ruleset { helpers: Vec::new(), ..(**ruleset).clone() };
        *desired = Desired::Filtered(Arc::new(without));
    }
    for (wanted, expected) in [
        (&bare, &["bridge nwfilter"][..]),
        (&batch(&lab), &["bridge nwfilter", "inet nwfilter"]),
        (&bare, &["bridge nwfilter"]),
    ] {
        lab.host().enter(|| backend.apply(wanted))?;
        assert_eq!(tables(&lab)?, expected);
        assert_eq!(lab.host().enter(|| Nftables::new().plan(wanted))?.differences, []);
    }
    Ok(())
}
