//! The verbs about sets.

use std::path::Path;

use anyhow::{Result, anyhow};
use nwfilter::xml::{FilterSet, SetEntry, SetName, SetRange, read_set, write_set};
use nwfilter::{Driver, Transaction};
use serde_json::{Value, json};

use crate::cli::SetChange;
use crate::cut;
use crate::documents::{accepted, read, shown};
use crate::output::{Answer, number_of};

/// The transaction of a verb.
pub(crate) fn transaction(driver: &Driver, change: &SetChange) -> Result<Transaction> {
    let mut transaction = Transaction::new();
    match change {
        SetChange::SetDefine { files, .. } => {
            for file in files {
                transaction.define_set(set_in(file)?);
            }
        }
        SetChange::SetUndefine { names } => {
            for name in names {
                transaction.undefine_set(&name.parse()?);
            }
        }
        SetChange::SetAdd { name, entries, comment } => {
            let (set, ranges) = given(driver, name, entries)?;
            let entry = |range| SetEntry { range, comment: comment.clone() };
            transaction.add_to_set(&set.name, ranges.into_iter().map(entry).collect());
        }
        SetChange::SetRemove { name, entries, .. } => {
            let (set, ranges) = given(driver, name, entries)?;
            transaction.remove_from_set(&set.name, ranges);
        }
        SetChange::SetReplace { name, file, .. } => {
            let set = driver.set(&name.parse()?)?;
            let entries = FilterSet::read_entries(set.family, &shown(file), &read(file)?)?;
            transaction.replace_in_set(&set.name, entries);
        }
    }
    Ok(transaction)
}

/// Carries out a verb.
pub(crate) fn change(driver: &Driver, change: &SetChange, as_json: bool) -> Result<Answer> {
    let mut transaction = transaction(driver, change)?;
    let cut = match change {
        SetChange::SetDefine { cut, .. }
        | SetChange::SetRemove { cut, .. }
        | SetChange::SetReplace { cut, .. } => cut.cut,
        SetChange::SetAdd { .. } | SetChange::SetUndefine { .. } => false,
    };
    if cut {
        transaction.cut_connections();
    }
    let committed = driver.commit(transaction)?;
    let undefined = match change {
        SetChange::SetUndefine { names } => names.as_slice(),
        _ => &[],
    };
    let rows: Vec<_> = match as_json {
        true => committed.sets.iter().map(|set| row(driver, set)).collect::<Result<_>>()?,
        false => Vec::new(),
    };
    let lines = || {
        let verb = if matches!(change, SetChange::SetDefine { .. }) { "defined" } else { "changed" };
        let line = |set: &std::sync::Arc<FilterSet>| format!("Set {} {verb}: {}", set.name, entries(set));
        let gone = undefined.iter().map(|name| format!("Set {name} undefined"));
        committed.sets.iter().map(line).chain(gone).collect()
    };
    let json = || json!({"sets": rows, "undefined": undefined});
    Ok(cut::answer(&committed, cut, as_json, json, lines))
}

/// Every set.
pub(crate) fn list(driver: &Driver, as_json: bool) -> Result<Answer> {
    let sets = driver.sets()?;
    if as_json {
        let sets: Vec<_> = sets.iter().map(|set| row(driver, set)).collect::<Result<_>>()?;
        return Ok(Answer::json(&json!(sets)));
    }
    let mut lines = vec![format!(" {:22}   {:6}   Entries", "Name", "Family"), "-".repeat(72)];
    let line = |set: &FilterSet| {
        format!(" {:22}   {:6}   {}", set.name.as_str(), set.family.to_string(), entries(set))
    };
    lines.extend(sets.iter().map(|set| line(set)));
    Ok(Answer::lines(lines))
}

/// A set in canonical form, or its whole content.
pub(crate) fn dumpxml(driver: &Driver, name: &str, resolved: bool, as_json: bool) -> Result<Answer> {
    let set = driver.set(&name.parse()?)?;
    if resolved {
        let content = driver.set_content(&set.name)?;
        let ranges: Vec<_> = content.ranges().iter().map(ToString::to_string).collect();
        return Ok(match as_json {
            true => {
                Answer::json(&json!({"name": set.name.as_str(), "family": set.family, "content": ranges}))
            }
            false => Answer::lines(ranges),
        });
    }
    Ok(match as_json {
        true => {
            Answer::json(&json!({"name": set.name.as_str(), "family": set.family, "xml": write_set(&set)}))
        }
        false => Answer::text(write_set(&set)),
    })
}

fn row(driver: &Driver, set: &FilterSet) -> Result<Value> {
    Ok(json!({
        "name": set.name.as_str(),
        "family": set.family,
        "entries": set.entries.len(),
        "includes": set.includes,
        "tags": set.tags,
        "ranges": driver.set_content(&set.name)?.len(),
    }))
}

/// `3 entries, includes others, tag web`.
fn entries(set: &FilterSet) -> String {
    let mut text = match set.entries.len() {
        1 => "1 entry".to_owned(),
        count => format!("{count} entries"),
    };
    if !set.includes.is_empty() {
        let names: Vec<_> = set.includes.iter().map(SetName::as_str).collect();
        text += &format!(", includes {}", names.join(", "));
    }
    if !set.tags.is_empty() {
        let tags: Vec<_> = set.tags.iter().map(ToString::to_string).collect();
        text += &format!(", {} {}", if tags.len() == 1 { "tag" } else { "tags" }, tags.join(", "));
    }
    text
}

/// A set, and the entries of its family that the command line gives.
fn given(
    driver: &Driver,
    name: &str,
    entries: &[String],
) -> Result<(std::sync::Arc<FilterSet>, Vec<SetRange>)> {
    let set = driver.set(&name.parse()?)?;
    let ranges = entries.iter().map(|entry| SetRange::parse(set.family, entry));
    let ranges = ranges.collect::<Result<_, _>>().map_err(|why| anyhow!("set '{}': {why}", set.name))?;
    Ok((set, ranges))
}

fn set_in(file: &Path) -> Result<FilterSet> {
    accepted(read_set(&shown(file), &read(file)?))
}

/// What is lost when libvirt's own driver takes over stores: it has no sets.
pub(crate) fn unknown_to_libvirt(driver: &Driver, config_dir: &Path) -> Result<Option<String>> {
    let sets = driver.sets()?.len();
    let is_libvirts = config_dir == "/etc/libvirt/nwfilter";
    Ok((is_libvirts && sets > 0).then(|| {
        format!(
            "libvirt's own driver does not know the {} in {}/sets: under it, filters that use one are refused",
            number_of(sets, "set"),
            config_dir.display()
        )
    }))
}
