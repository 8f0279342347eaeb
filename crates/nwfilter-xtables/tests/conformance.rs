//! The kernel holds what libvirt's own driver would have put there.

use std::path::Path;

use anyhow::Result;
use nwfilter_testlab::conformance;
use nwfilter_testlab::{Need, skip_unless};

/// As many daemons as keep two cores busy: each waits for the tools it runs.
const ORACLES: usize = 2;

#[test]
fn generated_trees_make_the_rules_that_libvirt_makes() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Libvirtd);
    let report = conformance::run(1, 200, ORACLES, |line| eprintln!("{line}"))?;
    println!("{report}");
    assert!(report.failures.is_empty(), "{report}");
    Ok(())
}

#[test]
fn fixtures_make_the_rules_that_libvirt_makes() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Libvirtd);
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../xml-fixtures"));
    let cases = conformance::fixture_cases(fixtures)?;
    let report =
        conformance::compare(&|number| cases.get(number).cloned(), ORACLES, |line| eprintln!("{line}"))?;
    println!("{report}");
    assert_eq!(report.cases, cases.len());
    assert!(report.failures.is_empty(), "{report}");
    Ok(())
}
