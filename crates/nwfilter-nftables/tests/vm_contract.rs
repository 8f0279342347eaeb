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

/// A backend that asks the table's owner for every change.
mod beside_an_owner {
    use std::sync::Arc;

    use nwfilter_rules::{Backend, Batch, Ruleset};

    use super::*;

    fn asking(check: fn(&Contract<'_>)) {
        skip_unless!(Need::BridgeConntrack, Need::Tool("nft"));
        let host = Host::builder().bridge_nf(false).build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (owner, other) = (Nftables::new().owning(dir.path()), Nftables::new().beside(dir.path()));
        let apply = |backend: &Nftables, batch: &Batch| host.enter(|| backend.apply(batch)).unwrap();
        // There is a table to own once a port is filtered.
        let mut one = Batch::default();
        one.filter("first".parse().unwrap(), Arc::new(Ruleset::drop_all()));
        apply(&owner, &one);
        let mut gone = Batch::default();
        gone.remove("first".parse().unwrap());
        apply(&owner, &gone);
        let lose = |port: &nwfilter_xml::PortDev| {
            let mut lost = Batch::default();
            lost.remove(port.clone());
            apply(&owner, &lost);
        };
        check(&Contract { backend: &other, host: Some(&host), lose: &lose });
    }

    nwfilter_testlab::backend_contract!(asking);
}
