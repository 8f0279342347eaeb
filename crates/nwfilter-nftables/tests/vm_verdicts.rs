//! Every probe has the same effect with either backend, on a kernel that tracks bridged connections.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, Ruleset};
use nwfilter_testlab::probes::{Place, Stations, probes};
use nwfilter_testlab::{Arrival, Host, Need, Tap, Verdicts, skip_unless};
use nwfilter_xtables::Xtables;
use support::fixtures;

/// A host with the port `tap0`, a neighbour and an uplink.
struct Lab {
    host: Host,
    taps: [Tap; 3],
}

impl Lab {
    fn new(bridge_nf: bool) -> Result<Self> {
        let host = Host::builder().bridge_nf(bridge_nf).build()?;
        let taps = [host.tap("tap0")?, host.tap("tap1")?, host.tap("tap2")?];
        Ok(Self { host, taps })
    }

    fn verdicts(&self) -> Result<Verdicts<'_>> {
        Verdicts::new(&self.host, self.taps.each_ref(), &Stations::default())
    }
}

fn batch(ruleset: &Arc<Ruleset>) -> Batch {
    let mut batch = Batch::default();
    batch.filter("tap0".parse().unwrap(), ruleset.clone());
    batch
}

#[test]
fn every_probe_has_the_same_effect_as_with_iptables_and_ebtables() -> Result<()> {
    skip_unless!(
        Need::BridgeConntrack,
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("conntrack")
    );
    let (theirs, ours) = (Lab::new(true)?, Lab::new(false)?);
    let (their_verdicts, our_verdicts) = (theirs.verdicts()?, ours.verdicts()?);
    let (xtables, nftables) = (Xtables::default(), Nftables::new());
    let probes = probes(&Stations::default());
    let (mut compared, mut differences) = (0, Vec::new());
    // Each rule by itself is compared in `vm_packets.rs`.
    for case in fixtures()?.into_iter().filter(|case| !case.name.starts_with("rule ")) {
        let Some(ruleset) = case.ruleset().map(Arc::new) else { continue };
        if nftables.check(&ruleset).is_err() || theirs.host.enter(|| xtables.apply(&batch(&ruleset))).is_err()
        {
            continue;
        }
        ours.host.enter(|| nftables.apply(&batch(&ruleset)))?;
        let (of_theirs, of_ours) = (their_verdicts.of(&probes)?, our_verdicts.of(&probes)?);
        for (probe, (theirs, ours)) in probes.iter().zip(of_theirs.iter().zip(&of_ours)) {
            if theirs != ours && !is_known(&probe.name, theirs, ours) {
                let [theirs, ours] = [theirs, ours].map(|arrivals| text(arrivals));
                differences
                    .push(format!("{}, {}: iptables [{theirs}], nftables [{ours}]", case.name, probe.name));
            }
        }
        compared += 1;
    }
    assert!(compared >= 20, "only {compared} filters");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// Whether the backends differ so on purpose.
fn is_known(probe: &str, theirs: &[Arrival], ours: &[Arrival]) -> bool {
    // br_netfilter drops what is not a whole IP packet, whatever the filter says.
    let malformed = probe.contains("IPv4, cut off")
        || probe.contains("IPv6, cut off")
        || probe.contains("bad IP checksum");
    // iptables' rules are not asked about what the host itself sends to a guest, among it the host's answers.
    let host = probe.starts_with("host to guest") || probe.starts_with("guest to host");
    let missing = || theirs.iter().filter(|arrival| !ours.contains(arrival));
    let fewer = || {
        ours.iter().all(|arrival| theirs.contains(arrival))
            && missing().all(|arrival| arrival.at == Place::Guest)
    };
    (malformed && theirs.is_empty()) || (host && fewer())
}

fn text(arrivals: &[Arrival]) -> String {
    arrivals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
