//! The backend keeps every promise of a backend, on a kernel that tracks bridged connections.

#![allow(clippy::unwrap_used)]

use nwfilter_nftables::Nftables;
use nwfilter_testlab::contract::Contract;
use nwfilter_testlab::{Host, Need, skip_unless};

fn nftables(check: fn(&Contract<'_>)) {
    skip_unless!(Need::BridgeConntrack, Need::Tool("nft"));
    let host = Host::builder().bridge_nf(false).build().unwrap();
    let lose = |port: &nwfilter_xml::PortDev| {
        host.run(&["nft", &format!("delete element bridge nwfilter from-guest {{ \"{port}\" }}")]).unwrap();
    };
    check(&Contract { backend: &Nftables::new(), host: Some(&host), lose: &lose });
}

nwfilter_testlab::backend_contract!(nftables);
