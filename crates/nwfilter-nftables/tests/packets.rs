//! What passes a port of this backend is what passes one of the backend for iptables and ebtables.
//!
//! Rules on states need the tracking of bridged connections, which not every kernel has: `vm_packets.rs` is about them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{
    Applied, Backend, Batch, EthernetSide, EthernetTest, KernelObject, Match, Rule, Ruleset, Verdict,
};
use nwfilter_testlab::conformance::{Case, random_case, stateless};
use nwfilter_testlab::{Host, Mac, Need, skip_unless};
use nwfilter_xml::{MacAddr, Params, read_filter};
use nwfilter_xtables::{Settings, Xtables};
use support::{GUEST, PEER, Side, fixtures};

#[test]
fn the_same_frames_pass_as_with_iptables_and_ebtables() -> Result<()> {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("nft")
    );
    let mut cases = fixtures()?;
    cases.extend((0..100).map(|number| random_case(14, number)));
    let (theirs, ours) = (Side::new()?, Side::new()?);
    let (xtables, nftables) = (Xtables::new(Settings::default()), Nftables::new());
    let (mut compared, mut passed) = (0, 0);
    for case in cases {
        let Some(ruleset) = case.ruleset().map(stateless).map(Arc::new) else { continue };
        // What the tools refuse is no matter of this backend.
        if theirs.apply(&xtables, ruleset.clone()).is_err() {
            continue;
        }
        ours.apply(&nftables, ruleset.clone()).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        let listed = ours.host.run(&["nft", "list", "ruleset"])?;
        let (theirs, ours_passed) = (theirs.passed()?, ours.passed()?);
        assert_eq!(theirs, ours_passed, "{}: {ruleset:#?}\n{listed}", case.name);
        compared += 1;
        passed += theirs.iter().flatten().count();
    }
    assert!(compared > 100 && passed > 1000, "{compared} rulesets, {passed} frames");
    Ok(())
}

#[test]
fn a_filter_with_states_is_refused_with_advice_if_the_kernel_does_not_track_bridged_connections() -> Result<()>
{
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let side = Side::new()?;
    let mut rulesets = fixtures()?.into_iter().filter_map(|case| case.ruleset());
    let with_states =
        rulesets.find(|ruleset| stateless(ruleset.clone()) != *ruleset).expect("the seed has states");
    let applied = side.apply(&Nftables::new(), Arc::new(with_states));
    match side.host.enter(nwfilter_nftables::check_kernel) {
        Ok(()) => assert!(applied.is_ok(), "{applied:?}"),
        Err(_) => {
            let error = applied.unwrap_err().to_string();
            assert!(
                error.starts_with("tracking of bridged connections: this kernel has no nf_conntrack_bridge"),
                "{error}"
            );
            assert!(error.contains("use the backend xtables"), "{error}");
            assert!(!side.host.run(&["nft", "list", "tables"])?.contains("nwfilter"));
        }
    }
    Ok(())
}

fn mac(address: &str) -> MacAddr {
    address.parse().unwrap()
}

#[test]
fn ports_of_one_filter_share_its_chains_and_have_their_own_values() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::new()?;
    let nftables = Nftables::new();
    let own_mac = |address: &str| {
        let drop = Rule::built_in([Match::is_not(EthernetTest::SrcMac(mac(address).into()))], Verdict::Drop);
        let mut ruleset = Ruleset::default();
        ruleset.ethernet.from_guest = Some(EthernetSide::of_rules([drop]));
        Arc::new(ruleset)
    };
    let taps = [host.tap("tap0")?, host.tap("tap1")?];
    let mut batch = Batch::default();
    batch.filter("tap0".parse()?, own_mac("52:54:00:7b:35:93"));
    batch.filter("tap1".parse()?, own_mac("52:54:00:00:00:09"));
    let applied = host.enter(|| nftables.apply(&batch))?;
    assert_eq!((applied.changed.len(), applied.commits), (2, 1));

    let listed = host.run(&["nft", "list", "ruleset"])?;
    let roots = listed.lines().filter(|line| line.starts_with("\tchain ") && line.ends_with(".from {"));
    assert_eq!(roots.count(), 1, "{listed}");
    let frame = |from: Mac, to: Mac| nwfilter_testlab::frames::ethernet(from, to, 0x88b5, b"data");
    assert!(taps[0].delivers(&taps[1], &frame(GUEST, PEER))?);
    assert!(!taps[0].delivers(&taps[1], &frame(PEER, PEER))?, "tap1's address does not pass at tap0");
    assert!(taps[1].delivers(&taps[0], &frame(PEER, GUEST))?);
    assert!(!taps[1].delivers(&taps[0], &frame(GUEST, GUEST))?);

    // The last port of a class takes the class along.
    let mut gone = Batch::default();
    gone.remove("tap0".parse()?);
    gone.remove("tap1".parse()?);
    host.enter(|| nftables.apply(&gone))?;
    let listed = host.run(&["nft", "list", "ruleset"])?;
    assert!(!listed.contains(".from") && !listed.contains("tap"), "{listed}");
    assert!(host.enter(|| nftables.installed())?.ports.is_empty());
    Ok(())
}

#[test]
fn attaching_beside_ports_of_the_same_filter_adds_elements_only() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let nftables = Nftables::new();
    let case = fixtures()?.into_iter().find(|case| case.name == "clean-traffic").unwrap();
    let attach = |number: u8| -> Result<Applied> {
        let mut case = case.clone();
        case.params = Params::new();
        case.params.insert("IP".parse()?, &format!("10.0.0.{number}"))?;
        let ruleset = case.ruleset().expect("the filter and its parameter are right");
        let mut batch = Batch { report_differences: true, ..Batch::default() };
        batch.filter(format!("vnet{number}").parse()?, Arc::new(ruleset));
        Ok(host.enter(|| nftables.apply(&batch))?)
    };
    let first = attach(1)?;
    assert!(
        first.differences.iter().any(|difference| matches!(difference.object, KernelObject::Chain { .. }))
    );
    for number in 2..20 {
        let applied = attach(number)?;
        let address = format!("\"vnet{number}\" . 10.0.0.{number}");
        assert!(applied.differences.iter().any(|d| d.rule == address), "{:#?}", applied.differences);
        assert_eq!(applied.commits, 1);
        let objects = applied.differences.iter().map(|difference| &difference.object);
        assert!(
            objects.clone().all(|object| matches!(object, KernelObject::Set { .. })),
            "{:#?}",
            applied.differences
        );
        // Its addresses, alone and as the filter has them together, and where its frames go both ways.
        assert!(objects.count() <= 8, "{:#?}", applied.differences);
    }
    Ok(())
}

#[test]
fn what_others_add_to_the_table_does_not_keep_it_from_being_read() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::new()?;
    let nftables = Nftables::new();
    let mut batch = Batch::default();
    batch.filter("tap0".parse()?, Arc::new(Ruleset::drop_all()));
    host.enter(|| nftables.apply(&batch))?;
    host.run(&["nft", "add element bridge nwfilter to-guest { * : drop }"])?;
    host.run(&["nft", "add chain bridge nwfilter other { tcp dport { 1, 2 } accept; }"])?;
    host.run(&["nft", "delete element bridge nwfilter from-guest { \"tap0\" }"])?;
    assert_eq!(host.enter(|| nftables.apply(&batch))?.changed.len(), 1);
    assert_eq!(host.enter(|| nftables.plan(&batch))?.differences, []);
    Ok(())
}

/// ebtables takes the version for the type; it finds the fields that follow in every frame.
#[test]
fn fields_of_a_configuration_are_not_in_other_frames_of_spanning_tree() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (theirs, ours) = (Side::new()?, Side::new()?);
    let (xtables, nftables) = (Xtables::new(Settings::default()), Nftables::new());
    let mut change = nwfilter_testlab::frames::stp(GUEST);
    // The type of a topology change notification.
    change[20] = 0x80;
    let passes = |side: &Side, backend: &dyn Backend, ruleset: &Arc<Ruleset>| -> Result<bool> {
        side.apply(backend, ruleset.clone())?;
        side.port.delivers(&side.peer, &change)
    };
    for (attributes, is_dropped) in [
        ("match='no' type='0' flags='0x44' root-priority='1' root-priority-hi='2'", false),
        ("type='0' root-priority='7'", false),
        ("match='no' type='5'", true),
    ] {
        let text = format!(
            "<filter name='f' chain='root'><rule action='drop' direction='out'><stp {attributes}/></rule></filter>"
        );
        let filter = read_filter("f.xml", &text).into_result()?;
        let case = Case { name: attributes.into(), filters: vec![filter], params: Params::new() };
        let ruleset = Arc::new(case.ruleset().unwrap());
        assert_eq!(passes(&ours, &nftables, &ruleset)?, !is_dropped, "{attributes}");
        assert_eq!(passes(&theirs, &xtables, &ruleset)?, !is_dropped, "{attributes}, ebtables");
    }
    Ok(())
}

#[test]
fn a_set_that_others_made_again_with_another_type_is_repaired() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::new()?;
    let nftables = Nftables::new();
    let case = fixtures()?.into_iter().find(|case| case.name == "clean-traffic").unwrap();
    let mut batch = Batch { report_differences: true, ..Batch::default() };
    batch.filter("tap0".parse()?, Arc::new(case.ruleset().map(stateless).unwrap()));
    let apply = || host.enter(|| nftables.apply(&batch));
    apply()?;
    let listed = host.run(&["nft", "list", "table", "bridge", "nwfilter"])?;
    let names = |kind: &str| -> Vec<String> {
        let lines = listed.lines().filter_map(|line| line.trim().strip_prefix(kind)?.strip_suffix(" {"));
        lines.map(str::to_owned).collect()
    };
    let (sets, chains) = (names("set "), names("chain "));
    assert!(sets.len() > 1, "{listed}");

    // A set goes only when no rule looks into it.
    let flush: String = chains.iter().map(|chain| format!("flush chain bridge nwfilter {chain}; ")).collect();
    let recreate = |set: &str| {
        format!(
            "delete set bridge nwfilter {set}; add set bridge nwfilter {set} {{ type mark; }}; \
             add rule bridge nwfilter prerouting meta mark @{set} accept; "
        )
    };
    let class_sets: Vec<_> = sets.iter().filter(|set| set.contains('.')).collect();
    let sets: String = class_sets.iter().map(|set| recreate(set)).collect();
    let map = "delete map bridge nwfilter from-guest; \
               add map bridge nwfilter from-guest { type mark : verdict; }; \
               add element bridge nwfilter from-guest { 1 : accept }";
    for change in [format!("{flush}{sets}"), format!("{flush}{map}"), format!("{flush}{sets}{map}")] {
        host.run(&["nft", &change])?;
        let planned = host.enter(|| nftables.plan(&batch))?.differences;
        let applied = apply()?;
        assert_eq!((applied.differences.len(), applied.commits), (planned.len(), 1));
        assert!(!planned.is_empty() && applied.changed.contains("tap0"), "{applied:?}");
        // New sets are listed behind old ones.
        let now = host.run(&["nft", "list", "table", "bridge", "nwfilter"])?;
        let sorted = |text: &str| {
            let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&now), sorted(&listed));
        assert_eq!(apply()?.commits, 0);
    }
    Ok(())
}
