//! The verbs on filters, bindings and the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use nwfilter::xml::{
    DocumentKind, Filter, PortDev, Strictness, Uuid, read_binding, read_filter, read_set, write_binding,
    write_filter, write_set,
};
use nwfilter::{
    Applied, Committed, Difference, Driver, Error, FailedPort, FailedSet, ProblemKind, Reloaded, Subject,
    Transaction, UnmanagedPorts, Warning,
};
use nwfilter_nftables::{LibvirtsTables, remove_libvirts_tables};
use nwfilter_xtables::restore_text;
use nwfilterctl_shared::{say, warn, with_causes};
use serde_json::json;

use crate::cut;
use crate::documents::{accepted, binding_in, filter_in, is_stdin, read, shown};
use crate::output::{Answer, differences, number_of};
use crate::places::{Places, in_files};
use crate::progress::Watch;
use crate::set;

// ---- filters ----

pub(crate) fn define(
    driver: &Driver,
    watch: &Watch,
    files: &[PathBuf],
    strictness: Strictness,
    cut: bool,
    as_json: bool,
) -> Result<Answer> {
    let (mut transaction, read_from) = definitions(files, strictness)?;
    if cut {
        transaction.cut_connections();
    }
    let committed =
        watch.during(|| driver.commit(transaction)).map_err(|error| in_files(error, &read_from))?;
    warn_all(&committed.applied.warnings);
    let sources: Vec<_> = files.iter().map(|file| shown(file)).collect();
    Ok(defined(&committed, &sources, cut, as_json))
}

/// The transaction that defines the filters of files, and the file of each filter.
pub(crate) fn definitions(
    files: &[PathBuf],
    strictness: Strictness,
) -> Result<(Transaction, BTreeMap<String, PathBuf>)> {
    let mut transaction = Transaction::new();
    let mut read_from = BTreeMap::new();
    for file in files {
        let filter = filter_in(file, strictness)?;
        read_from.insert(filter.name.to_string(), file.clone());
        match is_stdin(file) {
            true => transaction.define_filter(filter),
            false => transaction.define_filter_from(file, filter),
        };
    }
    Ok((transaction, read_from))
}

/// The answer of `define`: each filter with its source.
pub(crate) fn defined(committed: &Committed, sources: &[String], cut: bool, as_json: bool) -> Answer {
    let Committed { filters, applied, .. } = committed;
    let filters = || filters.iter().zip(sources);
    let json = || {
        let filter = |(filter, source): (&Arc<Filter>, &String)| json!({"name": filter.name.as_str(), "uuid": filter.uuid, "file": source});
        json!({
            "filters": filters().map(filter).collect::<Vec<_>>(),
            "updated": names(&applied.changed),
            "warnings": warnings(applied),
        })
    };
    let lines = || {
        let mut lines: Vec<_> = filters()
            .map(|(filter, source)| format!("Network filter {} defined from {source}", filter.name))
            .collect();
        if let (Some(last), ports @ 1..) = (lines.last_mut(), applied.changed.len()) {
            *last += &format!(", {} updated", number_of(ports, "port"));
        }
        lines
    };
    cut::answer(committed, cut, as_json, json, lines)
}

pub(crate) fn undefine(driver: &Driver, names: &[String], as_json: bool) -> Result<Answer> {
    let (transaction, undefined) = undefinitions(driver, names)?;
    driver.commit(transaction)?;
    if as_json {
        return Ok(Answer::json(&json!({ "undefined": undefined })));
    }
    Ok(Answer::lines(undefined.iter().map(|name| format!("Network filter {name} undefined"))))
}

/// The transaction that removes filters, and their names.
pub(crate) fn undefinitions(driver: &Driver, names: &[String]) -> Result<(Transaction, Vec<String>)> {
    let (mut transaction, mut undefined) = (Transaction::new(), Vec::new());
    for name in names {
        let filter = filter(driver, name)?;
        transaction.undefine_filter(&filter.name);
        undefined.push(filter.name.to_string());
    }
    Ok((transaction, undefined))
}

pub(crate) fn dumpxml(driver: &Driver, name: &str, as_json: bool) -> Result<Answer> {
    let filter = filter(driver, name)?;
    let xml = write_filter(&filter);
    if as_json {
        return Ok(Answer::json(&json!({"name": filter.name.as_str(), "uuid": filter.uuid, "xml": xml})));
    }
    Ok(Answer::text(xml))
}

/// Looks up a filter by UUID, or else by name, as virsh does.
pub(crate) fn filter(driver: &Driver, name: &str) -> Result<Arc<Filter>, Error> {
    if let Ok(uuid) = name.parse::<Uuid>() {
        let filters = driver.filters()?;
        if let Some(filter) = filters.into_iter().find(|filter| filter.uuid == Some(uuid)) {
            return Ok(filter);
        }
    }
    driver.filter(&name.parse()?)
}

// ---- bindings ----

pub(crate) fn binding_create(
    driver: &Driver,
    watch: &Watch,
    files: &[PathBuf],
    cut: bool,
    as_json: bool,
) -> Result<Answer> {
    let (mut transaction, created) = new_bindings(files)?;
    if cut {
        transaction.cut_connections();
    }
    let committed = watch.during(|| driver.commit(transaction))?;
    warn_all(&committed.applied.warnings);
    let json = || {
        let created: Vec<_> =
            created.iter().map(|(port, file)| json!({"port": port.as_str(), "file": file})).collect();
        json!({"created": created, "warnings": warnings(&committed.applied)})
    };
    let line =
        |(port, file): &(PortDev, String)| format!("Network filter binding on {port} created from {file}");
    Ok(cut::answer(&committed, cut, as_json, json, || created.iter().map(line).collect()))
}

/// The transaction that creates the bindings of files, and the file of each port.
pub(crate) fn new_bindings(files: &[PathBuf]) -> Result<(Transaction, Vec<(PortDev, String)>)> {
    let (mut transaction, mut created) = (Transaction::new(), Vec::new());
    for file in files {
        let binding = binding_in(file)?;
        created.push((binding.port.clone(), shown(file)));
        transaction.create_binding(binding);
    }
    Ok((transaction, created))
}

/// The transaction that removes bindings.
pub(crate) fn deletions(ports: &[String]) -> Result<Transaction> {
    let mut transaction = Transaction::new();
    for port in ports {
        transaction.delete_binding(&port.parse()?);
    }
    Ok(transaction)
}

pub(crate) fn binding_delete(driver: &Driver, ports: &[String], as_json: bool) -> Result<Answer> {
    driver.commit(deletions(ports)?)?;
    if as_json {
        return Ok(Answer::json(&json!({ "deleted": ports })));
    }
    Ok(Answer::lines(ports.iter().map(|port| format!("Network filter binding on {port} deleted"))))
}

pub(crate) fn binding_dumpxml(driver: &Driver, port: &str, as_json: bool) -> Result<Answer> {
    let binding = driver.binding(&port.parse()?)?;
    let xml = write_binding(&binding);
    if as_json {
        let (port, filter) = (binding.port.as_str(), binding.filter.as_str());
        return Ok(Answer::json(&json!({"port": port, "filter": filter, "xml": xml})));
    }
    Ok(Answer::text(xml))
}

// ---- documents ----

pub(crate) fn fmt(files: &[PathBuf], as_json: bool) -> Result<Answer> {
    let mut documents = Vec::new();
    for file in files {
        let (text, document) = (read(file)?, shown(file));
        let canonical = match DocumentKind::of(&text) {
            DocumentKind::Binding => write_binding(&accepted(read_binding(&document, &text))?),
            DocumentKind::Set => write_set(&accepted(read_set(&document, &text))?),
            _ => write_filter(&accepted(read_filter(&document, &text))?),
        };
        documents.push((document, canonical));
    }
    if as_json {
        let documents: Vec<_> =
            documents.iter().map(|(file, xml)| json!({"file": file, "xml": xml})).collect();
        return Ok(Answer::json(&json!(documents)));
    }
    Ok(Answer::text(documents.into_iter().map(|(_, xml)| xml).collect()))
}

pub(crate) fn render(driver: &Driver, file: &Path, helpers: bool, as_json: bool) -> Result<Answer> {
    let binding = binding_in(file)?;
    let mut ruleset = driver.ruleset(&binding)?;
    if !helpers {
        ruleset.helpers.clear();
    }
    if as_json {
        return Ok(Answer::json(&serde_json::to_value(&ruleset)?));
    }
    Ok(Answer::text(restore_text(&binding.port, &ruleset)))
}

// ---- the kernel ----

pub(crate) fn diff(driver: &Driver, as_json: bool) -> Result<Answer> {
    let drift = driver.diff()?;
    warn_all(&drift.warnings);
    let mut places = Places::new(driver);
    report_failed_sets(&drift.failed_sets);
    report_ports(&mut places, &drift.failed, &drift.unmanaged);
    Ok(differences(&mut places, &drift.differences, as_json)?.good_if(drift.is_empty()))
}

pub(crate) fn reload(driver: &Driver, watch: &Watch, config_dir: &Path, as_json: bool) -> Result<Answer> {
    let reloaded = watch.during(|| driver.reload())?;
    let is_complete = reloaded.is_complete();
    let Reloaded { applied, failed, failed_sets, removed, unmanaged } = reloaded;
    warn_all(&applied.warnings);
    if let Some(lost) = set::unknown_to_libvirt(driver, config_dir)? {
        warn(lost);
    }
    report_failed_sets(&failed_sets);
    report_ports(&mut Places::new(driver), &failed, &unmanaged);
    let back: Vec<_> = applied.changed.iter().filter(|port| !removed.contains(port)).collect();
    let answer = if as_json {
        let failed = failed.iter().map(|port| {
            json!({
                "port": port.port.as_str(),
                "filter": port.filter.as_str(),
                "fallback": port.fallback.to_string(),
                "why": port.error.to_string(),
            })
        });
        Answer::json(&json!({
            "changed": names(back),
            "removed": names(&removed),
            "failed": failed.collect::<Vec<_>>(),
            "failed_sets": failed_sets.iter().map(|failed| {
                json!({"set": failed.set.as_str(), "why": with_causes(anyhow::Chain::new(&*failed.error))})
            }).collect::<Vec<_>>(),
            "unbound": names(&unmanaged.unbound),
            "absent": names(&unmanaged.absent),
            "warnings": warnings(&applied),
        }))
    } else {
        let all = driver.bindings()?.len();
        let is_shared = |difference: &Difference| difference.subject == Subject::Host;
        let mut lines = vec![match back.is_empty() && applied.differences.iter().any(is_shared) {
            true => format!("what all ports share brought back, {} in all", number_of(all, "port")),
            false => format!("{} brought back, {all} in all", number_of(back.len(), "port")),
        }];
        if !removed.is_empty() {
            lines.push(format!("{} without interface removed", number_of(removed.len(), "port")));
        }
        Answer::lines(lines)
    };
    Ok(answer.good_if(is_complete))
}

/// Removes the rules of libvirt's own nftables driver, when every port has its rules here.
pub(crate) fn take_over_from_libvirt(driver: &Driver) -> Result<()> {
    let bound: BTreeSet<_> = driver.bindings()?.iter().map(|binding| binding.port.clone()).collect();
    match remove_libvirts_tables(|port| bound.contains(port))? {
        LibvirtsTables::None => {}
        LibvirtsTables::Removed(ports) => {
            log::info!(
                "the tables of libvirt's nftables driver are removed, with the rules of {} ports",
                ports.len()
            );
        }
        LibvirtsTables::Left(ports) => {
            let ports: Vec<_> = ports.into_iter().collect();
            report_many(
                &ports,
                "is filtered by libvirt's nftables driver, and has no binding here: libvirt's tables stay",
            );
        }
    }
    Ok(())
}

// ---- messages on stderr ----

/// Reports damaged files that were moved aside earlier. Files that are found damaged now are in the log.
pub(crate) fn report_damaged_files(driver: &Driver) -> Result<()> {
    let aside = driver.problems()?.into_iter().filter(|problem| problem.kind == ProblemKind::SetAside);
    aside.for_each(warn);
    Ok(())
}

/// Reports for each set why it does not have its content.
pub(crate) fn report_failed_sets(failed: &[FailedSet]) {
    for set in failed {
        say(format_args!("error: {}", with_causes(anyhow::Chain::new(set))));
    }
}

/// Reports for each port why it does not have its filter, or why it is left alone.
pub(crate) fn report_ports(places: &mut Places<'_>, failed: &[FailedPort], unmanaged: &UnmanagedPorts) {
    for port in failed {
        let place = port.error.origin().and_then(|origin| places.find(origin));
        let place = place.map(|place| format!("\n  at: {place}")).unwrap_or_default();
        say(format_args!("error: {}{place}", with_causes(anyhow::Chain::new(port))));
    }
    report_many(&unmanaged.unbound, "has rules but no binding here; they are left as they are");
    report_many(&unmanaged.absent, "has a binding, but there is no network interface of that name");
}

/// Reports the same about several ports; names some and counts the others.
fn report_many(ports: &[PortDev], what: &str) {
    const SHOWN: usize = 10;
    ports.iter().take(SHOWN).for_each(|port| warn(format_args!("port '{port}' {what}")));
    if ports.len() > SHOWN {
        warn(format_args!("the same is true of {}", number_of(ports.len() - SHOWN, "more port")));
    }
}

pub(crate) fn warn_all(warnings: &[Warning]) {
    warnings.iter().for_each(warn);
}

pub(crate) fn warnings(applied: &Applied) -> Vec<String> {
    applied.warnings.iter().map(ToString::to_string).collect()
}

pub(crate) fn names<'a>(ports: impl IntoIterator<Item = &'a PortDev>) -> Vec<&'a str> {
    ports.into_iter().map(PortDev::as_str).collect()
}
