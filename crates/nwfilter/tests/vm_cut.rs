//! Connections that new rules refuse end with the change that asks for it; with the native backend, on a kernel that
//! tracks bridged connections.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cut_support;

use anyhow::Result;
use cut_support::{Lab, OPENS, Tcp, ends, filter};
use nwfilter_nftables::Nftables;
use nwfilter_testlab::{Host, Need, skip_unless};

fn lab(filter: &str) -> Result<Lab> {
    Lab::new(Host::builder().bridge_nf(false).build()?, Nftables::new(), filter)
}

#[test]
fn a_connection_ends_and_that_of_a_guest_with_the_same_address_on_another_bridge_goes_on() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"));
    for unfiltered in ["tap2", "tap0"] {
        let lab = lab(&filter(""))?;
        let (guest, peer) = (lab.host.tap("tap2")?, lab.host.tap("tap3")?);
        lab.host.ip(&["link add br1 type bridge", "link set br1 up"])?;
        lab.host.ip(&["link set tap2 master br1", "link set tap3 master br1"])?;
        let other = Tcp { opener: &peer, other: &guest, ends: ends("10.0.0.9"), ports: (1009, 22) };
        // The bridge that was filtered first has zone 0, and the other one a zone of its own.
        lab.bind("tap2")?;
        let (revoked, kept) = (lab.to_guest("10.0.0.9", 1009), lab.to_guest("10.0.0.8", 1008));
        assert!(revoked.opens()? && kept.opens()? && other.opens()?);
        lab.host.enter(|| lab.driver.delete_binding(&unfiltered.parse().unwrap()))?;
        let cut = lab.revoke("10.0.0.9")?;
        assert_eq!((cut.ended.len(), cut.failures.len()), (1, 0), "{cut:?}");
        let (ended, goes_on) = if unfiltered == "tap2" { (&revoked, &other) } else { (&other, &revoked) };
        assert!(!ended.carries()? && !ended.carries_back()?);
        assert!(goes_on.carries()? && goes_on.carries_back()?);
        assert!(kept.carries()? && kept.carries_back()?);
        // Of the connections of the unfiltered guest nothing was forgotten: its filter lets them go on.
        lab.bind(unfiltered)?;
        assert!(goes_on.carries()? && goes_on.carries_back()?, "{unfiltered}");
    }
    Ok(())
}

#[test]
fn a_guest_that_may_open_connections_does_not_take_a_cut_one_up_again() -> Result<()> {
    skip_unless!(Need::BridgeConntrack, Need::Tool("ip"));
    let lab = lab(&filter(OPENS))?;
    let (revoked, own) = (lab.to_guest("10.0.0.9", 1009), lab.of_guest("10.0.0.9", 443));
    assert!(revoked.opens()? && own.opens()?);
    assert_eq!(lab.revoke("10.0.0.9")?.ended.len(), 1);
    assert!(!revoked.carries()?);
    revoked.carries_back()?;
    assert!(!revoked.carries()?, "the guest's data made it a connection of its own");
    assert!(own.carries()? && own.carries_back()?);
    Ok(())
}
