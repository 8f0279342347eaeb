//! The output of verbs on stdout: text or JSON.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{Write, stdout};
use std::process::ExitCode;

use anyhow::{Context, Result};
use nwfilter::{Attachment, BindingState, Difference, Driver, Location, PortStatus};
use serde_json::{Value, json};

use crate::places::Places;

/// The output and exit code of a verb. It is printed when the verb has done its work, so that a closed or full output stops
/// nothing.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    text: String,
    is_bad: bool,
}

impl Answer {
    pub(crate) fn text(text: String) -> Self {
        Self { text, is_bad: false }
    }

    pub(crate) fn lines(lines: impl IntoIterator<Item = impl Display>) -> Self {
        Self::text(lines.into_iter().map(|line| format!("{line}\n")).collect())
    }

    pub(crate) fn json(value: &Value) -> Self {
        Self::text(format!("{value:#}\n"))
    }

    /// Whether the exit code is 0.
    pub(crate) fn is_good(&self) -> bool {
        !self.is_bad
    }

    /// The same, with exit code 1 if `good` is false.
    pub(crate) fn good_if(self, good: bool) -> Self {
        Self { is_bad: !good, ..self }
    }

    pub(crate) fn print(&self) -> Result<ExitCode> {
        let mut out = stdout().lock();
        let written = out.write_all(self.text.as_bytes()).and_then(|()| out.flush());
        written.context("the verb is done, but its output cannot be written")?;
        Ok(if self.is_bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// `1 port`, `2 ports`.
pub(crate) fn number_of(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// The list of filters, each with its UUID and where it is stored.
pub(crate) fn filters(driver: &Driver, as_json: bool) -> Result<Answer> {
    let stored: BTreeSet<_> =
        driver.stored_filters()?.into_iter().map(|filter| filter.name.clone()).collect();
    let mut rows = Vec::new();
    for filter in driver.filters()? {
        let source = if stored.contains(&filter.name) { "store" } else { "stock" };
        let uuid = filter.uuid.map(|uuid| uuid.to_string()).unwrap_or_default();
        rows.push((uuid, filter.name.to_string(), source));
    }
    if as_json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(uuid, name, source)| json!({"name": name, "uuid": uuid, "source": source}))
            .collect();
        return Ok(Answer::json(&json!(rows)));
    }
    let mut lines = vec![format!(" {:36}   {:6}   Name", "UUID", "From"), "-".repeat(72)];
    lines.extend(rows.iter().map(|(uuid, name, source)| format!(" {uuid:36}   {source:6}   {name}")));
    Ok(Answer::lines(lines))
}

/// The list of ports, each with its filter and its guest's address.
pub(crate) fn bindings(driver: &Driver, as_json: bool) -> Result<Answer> {
    let ports = driver.port_statuses()?;
    if as_json {
        return Ok(Answer::json(&json!(ports)));
    }
    let mut lines = vec![format!(" {:15}   {:24}   Address", "Port Dev", "Filter"), "-".repeat(72)];
    for status in &ports {
        let (port, filter) = (status.binding.port.as_str(), status.binding.filter.as_str());
        lines.push(format!(" {port:15}   {filter:24}   {}", address_text(status)).trim_end().to_owned());
    }
    Ok(Answer::lines(lines))
}

/// The address of a port's guest and how it is known, or why the port is not filtered. May be empty.
pub(crate) fn address_text(PortStatus { state, attachment, .. }: &PortStatus) -> String {
    match (attachment, state) {
        (Attachment::Absent, _) => "not filtered: no such interface".to_owned(),
        (Attachment::Unbridged, _) => "not filtered: in no bridge".to_owned(),
        (_, Ok(BindingState::Filtered)) => String::new(),
        (_, Ok(state)) => state.to_string(),
        (_, Err(error)) => format!("no rules: {error}"),
    }
}

/// The rules that are missing (-) or foreign (+), with their places.
pub(crate) fn differences(
    places: &mut Places<'_>,
    differences: &[Difference],
    as_json: bool,
) -> Result<Answer> {
    let mut place =
        |difference: &Difference| difference.origin.as_ref().and_then(|origin| places.find(origin));
    if as_json {
        let rows = differences.iter().map(|difference| {
            let mut row = serde_json::to_value(difference)?;
            if let Some(Location { path, line, source }) = place(difference) {
                row["at"] = json!({"path": path, "line": line});
                if let Some((path, line)) = source {
                    row["at"]["source"] = json!({"path": path, "line": line});
                }
            }
            Ok(row)
        });
        return Ok(Answer::json(&rows.collect::<serde_json::Result<_>>()?));
    }
    let line = |difference: &Difference| match place(difference) {
        Some(place) => format!("{difference} at {place}"),
        None => difference.to_string(),
    };
    let mut lines: Vec<_> = differences.iter().map(line).collect();
    lines.push(number_of(differences.len(), "difference"));
    Ok(Answer::lines(lines))
}
