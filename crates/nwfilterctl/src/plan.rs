//! `plan`: shows what a verb would change in the stores and in the kernel, and changes nothing.

use anyhow::Result;
use nwfilter::rules::{Difference, DifferenceKind};
use nwfilter::{Driver, Preview};
use serde_json::json;

use crate::archive;
use crate::cli::Change;
use crate::documents::strictness;
use crate::output::{Answer, number_of};
use crate::places::Places;
use crate::set;
use crate::verbs;

pub(crate) fn plan(driver: &Driver, change: Change, as_json: bool) -> Result<Answer> {
    let preview = match change {
        Change::Define { files, as_libvirt, .. } => {
            driver.preview(&verbs::definitions(&files, strictness(as_libvirt))?.0)?
        }
        Change::Undefine { names } => driver.preview(&verbs::undefinitions(driver, &names)?.0)?,
        Change::BindingCreate { files, .. } => driver.preview(&verbs::new_bindings(&files)?.0)?,
        Change::BindingDelete { ports } => driver.preview(&verbs::deletions(&ports)?)?,
        Change::Import(asked) => driver.preview(&archive::imports(driver, &asked)?.transaction)?,
        Change::Set(change) => driver.preview(&set::transaction(driver, &change)?)?,
        Change::Reload => {
            let drift = driver.diff()?;
            verbs::report_failed_sets(&drift.failed_sets);
            verbs::report_ports(&mut Places::new(driver), &drift.failed, &drift.unmanaged);
            Preview { differences: drift.differences, warnings: drift.warnings, ..Preview::default() }
        }
    };
    Ok(shown(&preview, as_json))
}

fn shown(preview: &Preview, as_json: bool) -> Answer {
    let Preview { events, differences, warnings, .. } = preview;
    if as_json {
        let (texts, warnings): (Vec<_>, Vec<_>) = (
            events.iter().map(ToString::to_string).collect(),
            warnings.iter().map(ToString::to_string).collect(),
        );
        return Answer::json(&json!({"stores": texts, "rules": differences, "warnings": warnings}));
    }
    verbs::warn_all(warnings);
    let is_new = |difference: &&Difference| difference.kind == DifferenceKind::Missing;
    let written = differences.iter().filter(is_new).count();
    let rule = |difference: &Difference| {
        let sign = if is_new(&difference) { '+' } else { '-' };
        let Difference { subject, object, rule, origin, .. } = difference;
        let origin = origin.as_ref().map(|origin| format!("  ({origin})")).unwrap_or_default();
        format!("{sign} {subject} {object} {rule}{origin}")
    };
    let events = events.iter().map(|event| format!("stores: {event}"));
    let (written, removed) = (number_of(written, "rule"), number_of(differences.len() - written, "rule"));
    let sum = format!("would write {written} and remove {removed}; nothing was changed");
    Answer::lines(events.chain(differences.iter().map(rule)).chain([sum]))
}
