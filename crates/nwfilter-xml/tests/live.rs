//! What a live libvirtd makes of the same documents.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod common;

use anyhow::{Context, Result};
use nwfilter_testlab::generate::Generator;
use nwfilter_testlab::{Host, Libvirtd, LibvirtdOptions, Need, skip_unless};
use nwfilter_xml::{
    Filter, FilterName, Params, Strictness, read_binding, read_filter, read_filter_with, write_binding,
    write_filter,
};

/// How many generated filters of either kind are tried.
const GENERATED: u64 = 300;

/// What libvirt takes and nwfilter refuses, of the wrong documents under xml-fixtures and of the generated ones;
/// docs/language.md says why.
const TAKEN_BY_LIBVIRT: [&str; 8] = [
    "condition-as-an-element.xml",
    "condition-misspelt.xml",
    "condition-of-another-element.xml",
    "condition-unknown.xml",
    "include-of-an-impossible-name.xml",
    "protocol-misspelt-beside-another.xml",
    "protocol-misspelt.xml",
    "xml-document-type.xml",
];

/// What is wrong with a fixture for nwfilter, and depends on the host for libvirt: an address with a zone is read where
/// the interface exists.
const DEPENDS_ON_THE_HOST: [&str; 1] = ["value-ipv6-zone.xml"];

/// What libvirt reads otherwise; docs/language.md says how.
const READ_OTHERWISE: [&str; 1] = ["ipset-with-flags.xml"];

/// A daemon with a host to live in.
fn daemon() -> Result<(Host, Libvirtd)> {
    let host = Host::new()?;
    let options = LibvirtdOptions { keep_stock_filters: false, ..Default::default() };
    let daemon = Libvirtd::start_with(&host, options)?;
    Ok((host, daemon))
}

/// Defines each document under the name in it, and gives what libvirt writes of it, without the uuid, or its error.
fn define_all(daemon: &Libvirtd, documents: &[(String, String)]) -> Result<Vec<Result<String>>> {
    let command = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut commands = Vec::new();
    for (index, (name, text)) in documents.iter().enumerate() {
        // In a directory of the daemon, for it is gone with the daemon.
        let file = format!("/var/lib/libvirt/documents/{index}.xml");
        daemon.write_file(&file, text)?;
        let file = daemon.path(&file)?;
        commands.push(command(&["nwfilter-define", file.to_str().context("path")?]));
        commands.push(command(&["nwfilter-dumpxml", name]));
        commands.push(command(&["nwfilter-undefine", name]));
    }
    let mut results = daemon.virsh_batch(&commands)?.into_iter();
    let mut outcomes = Vec::new();
    while let (Some(defined), Some(dumped), Some(_)) = (results.next(), results.next(), results.next()) {
        outcomes.push(defined.and(dumped).map(|text| without_uuid(&text)));
    }
    Ok(outcomes)
}

fn without_uuid(text: &str) -> String {
    let kept = text.trim_end().lines().filter(|line| !line.starts_with("  <uuid>"));
    kept.map(|line| format!("{line}\n")).collect()
}

fn written(filter: &Filter) -> String {
    write_filter(&Filter { uuid: None, ..filter.clone() })
}

fn generated_name(seed: u64) -> FilterName {
    format!("generated-{seed}").parse().unwrap()
}

#[test]
fn libvirt_writes_every_fixture_as_we_do() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let (_host, daemon) = daemon()?;
    let mut documents = Vec::new();
    let mut expected = Vec::new();
    for (name, text) in ["seed", "stock", "filters"].into_iter().flat_map(common::fixtures) {
        let filter = read_filter(&name, &text).into_result()?;
        expected.push(written(&filter));
        documents.push((filter.name.to_string(), text));
    }
    for ((outcome, expected), (name, _)) in
        define_all(&daemon, &documents)?.iter().zip(expected).zip(&documents)
    {
        assert_eq!(*outcome.as_ref().unwrap(), expected, "{name}");
    }
    Ok(())
}

#[test]
fn libvirt_writes_every_generated_filter_as_we_do() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let (_host, daemon) = daemon()?;
    let filters = (0..GENERATED).map(|seed| {
        let mut generator = Generator::new(seed);
        generator.options_mut().includes = vec!["clean-traffic".parse().unwrap()];
        let filter = generator.filter(generated_name(seed));
        let document = generator.document(&filter);
        (filter, document)
    });
    let filters: Vec<_> = filters.collect();
    let documents: Vec<_> =
        filters.iter().map(|(filter, document)| (filter.name.to_string(), document.clone())).collect();
    for (outcome, (filter, document)) in define_all(&daemon, &documents)?.iter().zip(&filters) {
        let outcome = outcome.as_ref().unwrap_or_else(|error| panic!("{error}\n{document}"));
        assert_eq!(*outcome, written(filter), "{document}");
    }
    Ok(())
}

#[test]
fn libvirt_refuses_every_generated_document_that_is_wrong() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let (_host, daemon) = daemon()?;
    let mut documents = Vec::new();
    let mut mistakes = Vec::new();
    for seed in 0..GENERATED {
        let (document, wrong) = Generator::new(seed).invalid_document(generated_name(seed));
        assert!(
            read_filter_with("", &document, Strictness::AsLibvirt).value.is_none(),
            "{wrong}:\n{document}"
        );
        documents.push((generated_name(seed).to_string(), document));
        mistakes.push(wrong);
    }
    for ((outcome, wrong), (_, document)) in
        define_all(&daemon, &documents)?.iter().zip(mistakes).zip(&documents)
    {
        assert!(outcome.is_err(), "libvirt takes {wrong}:\n{document}");
    }
    Ok(())
}

#[test]
fn libvirt_refuses_the_fixtures_that_are_wrong_and_takes_those_that_are_only_odd() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let (_host, daemon) = daemon()?;
    let of_filters = |below: &str| {
        let mut fixtures = common::fixtures(below);
        let others = ["binding-", "domain-", "metadata-"];
        fixtures
            .retain(|(name, text)| !others.iter().any(|other| name.starts_with(other)) && !text.is_empty());
        fixtures
    };
    let named = |fixtures: Vec<(String, String)>, name: &str| -> Vec<_> {
        fixtures.into_iter().map(|(_, text)| (name.to_owned(), text)).collect()
    };

    let wrong = of_filters("invalid");
    for (outcome, (file, _)) in define_all(&daemon, &named(wrong.clone(), "wrong"))?.iter().zip(&wrong) {
        let taken = outcome.as_ref().is_ok_and(|text| !text.is_empty());
        let allowed = TAKEN_BY_LIBVIRT.contains(&file.as_str());
        assert!(taken == allowed || DEPENDS_ON_THE_HOST.contains(&file.as_str()), "{file}: {outcome:?}");
    }
    let odd = of_filters("invalid/warnings");
    for (outcome, (file, text)) in define_all(&daemon, &named(odd.clone(), "odd"))?.iter().zip(&odd) {
        let ours = written(&read_filter(file, text).into_result()?);
        let theirs = outcome.as_ref().unwrap();
        assert_eq!(*theirs == ours, !READ_OTHERWISE.contains(&file.as_str()), "{file}: {theirs}{ours}");
    }
    Ok(())
}

#[test]
fn libvirt_writes_a_binding_as_we_do() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let (host, daemon) = daemon()?;
    let _tap = host.tap("tap0")?;
    daemon.define("<filter name='empty'/>")?;
    for (name, text) in common::fixtures("bindings") {
        // The link makes the port a macvtap, which a tap is not; on disk a binding has another element around it.
        if name == "status.xml" {
            continue;
        }
        let mut binding = read_binding(&name, &text).into_result()?;
        binding.port = "tap0".parse()?;
        binding.link = None;
        binding.filter = "empty".parse()?;
        let mut params = Params::new();
        for (name, values) in binding.params.iter().filter(|(name, _)| name.as_str() != "CTRL_IP_LEARNING") {
            for value in values {
                params.insert(name.clone(), value)?;
            }
        }
        // libvirt tells the filter the port's MAC address, and writes what it told.
        params.insert("MAC".parse()?, &binding.mac.to_string())?;
        binding.params = params;
        daemon.bind(&write_binding(&binding))?;
        let dumped = daemon.binding_dumpxml("tap0")?;
        assert_eq!(dumped.trim_end(), write_binding(&binding).trim_end(), "{name}");
        daemon.unbind("tap0")?;
    }
    Ok(())
}
