//! What was written is read back as what was wanted, whatever names and short forms the tools print.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nwfilter_rules::{Backend, Batch, RulesError, Ruleset, instantiate};
use nwfilter_testlab::generate::{Generator, Options};
use nwfilter_testlab::{Host, Need, Tools, skip_unless};
use nwfilter_xml::{Entry, Filter, Layer, Literal, Value, read_binding, read_filter};
use nwfilter_xtables::Xtables;

const SETS: [&str; 2] = ["web", "a+b:c. d"];

#[test]
fn after_an_apply_nothing_differs_and_applying_again_changes_nothing() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Tool("ebtables"));
    applied_reads_back(24)
}

#[test]
fn the_legacy_variant_of_iptables_works_too() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Tool("iptables-legacy"));
    let host = Host::new()?;
    if let Err(error) = host.run(&["iptables-legacy", "-t", "filter", "-nL"]) {
        eprintln!("skipped: this kernel has no legacy iptables: {error}");
        return Ok(());
    }
    Tools::legacy()?.run_test("with_the_tools_of_the_search_path")
}

#[test]
#[ignore = "run by the test of the legacy variant"]
fn with_the_tools_of_the_search_path() -> Result<()> {
    let version = Command::new("iptables").arg("--version").output()?;
    ensure!(String::from_utf8_lossy(&version.stdout).contains("legacy"));
    applied_reads_back(4)
}

fn applied_reads_back(rounds: u64) -> Result<()> {
    let host = Host::new()?;
    for set in SETS {
        host.run(&["ipset", "create", set, "hash:ip,port,ip"])?;
        host.run(&["ipset", "create", &format!("{set}6"), "hash:ip,port,ip", "family", "inet6"])?;
    }
    let backend = Xtables::default();
    for seed in 0..rounds {
        let sane = seed % 4 == 0;
        let mut generator = Generator::with_options(
            seed,
            Options {
                entries: 1..=if sane { 12 } else { 4 },
                instantiable: sane,
                variables: sane,
                ipsets: SETS.map(str::to_owned).to_vec(),
                like_libvirt: false,
                ..Options::default()
            },
        );
        let mut batch = Batch::default();
        for port in 0..60 {
            if let Ok(ruleset) = ruleset(&mut generator)? {
                batch.filter(format!("vnet{port}").parse()?, Arc::new(ruleset));
            }
        }
        host.enter(|| -> Result<()> {
            let applied = backend.apply(&batch).with_context(|| format!("seed {seed}"))?;
            assert_eq!(applied.changed.len(), batch.ports.len());
            let differences = backend.plan(&batch)?.differences;
            assert!(differences.is_empty(), "seed {seed}: {}", differences[0]);
            assert_eq!(backend.apply(&batch)?.commits, 0);
            let installed = backend.installed()?;
            assert!(installed.ports.iter().eq(batch.ports.keys()), "{installed:?}");

            let ports: Vec<_> = batch.ports.keys().cloned().collect();
            ports.into_iter().for_each(|port| batch.remove(port));
            backend.apply(&batch)?;
            assert!(backend.installed()?.ports.is_empty());
            Ok(())
        })?;
    }
    Ok(())
}

/// What a random filter means, or why it means nothing.
fn ruleset(generator: &mut Generator) -> Result<Result<Ruleset, RulesError>> {
    let mut filter = generator.filter("random".parse()?);
    settle_sets(&mut filter);
    let mut binding = read_binding(
        "binding",
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='random'/></filterbinding>",
    )
    .into_result()?;
    binding.params = generator.params([&filter]);
    Ok(instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding))
}

/// An IPv6 rule can only ask sets of IPv6 addresses.
fn settle_sets(filter: &mut Filter) {
    for entry in &mut filter.entries {
        let Entry::Rule(rule) = entry else { continue };
        let of_ipv6 = rule.matches.iter_mut().filter(|matches| matches.protocol.layer() == Layer::Ipv6);
        for item in of_ipv6.flat_map(|matches| &mut matches.items) {
            if let Value::Literal(Literal::IpSet(name)) = &mut item.value {
                name.push('6');
            }
        }
    }
}

#[test]
fn a_comment_may_look_like_an_option_and_hold_any_character() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let host = Host::new()?;
    let backend = Xtables::default();
    let long = "ä".repeat(200);
    for comment in [
        "-j",
        "--",
        "!",
        "",
        " ",
        "a  b",
        "\"",
        "\\",
        "'",
        "a\"b'c\\d",
        "x$(reboot)",
        "#x",
        "\u{85}",
        "COMMIT",
        &long,
    ] {
        let escaped = comment.replace('"', "&quot;").replace('\'', "&apos;");
        let text = format!(
            "<filter name='f'><rule action='drop' direction='in'><all comment='{escaped}'/></rule>
             <rule action='accept' direction='in'><tcp dstportstart='22' comment='{escaped}'/></rule></filter>"
        );
        let filter = read_filter("f.xml", &text).into_result()?;
        let binding = read_binding(
            "binding",
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
             <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/></filterbinding>",
        )
        .into_result()?;
        let ruleset = instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding)?;
        let mut batch = Batch::default();
        batch.filter(binding.port, Arc::new(ruleset));
        host.enter(|| backend.apply(&batch))?;
        assert_eq!(host.enter(|| backend.plan(&batch))?.differences, [], "{comment:?}");
    }
    Ok(())
}
