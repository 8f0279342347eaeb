//! `config`: the settings of the host, and where each comes from.

use anyhow::Result;
use nwfilter_settings::{Key, Settings, Source};
use serde_json::json;

use crate::output::Answer;

/// Every setting with its value and where that comes from.
pub(crate) fn config(settings: &Settings, as_json: bool) -> Result<Answer> {
    if as_json {
        let values = Key::ALL.iter().map(|&key| {
            let from = match settings.source(key) {
                Source::Default => "default",
                Source::File { .. } => "file",
                Source::Environment(_) => "environment",
                Source::Option(_) => "option",
            };
            json!({
                "setting": key.name(),
                "value": settings.get(key),
                "from": from,
                "at": settings.source(key).to_string(),
                "variable": key.variable(),
                "about": key.about(),
            })
        });
        return Ok(Answer::json(&values.collect()));
    }
    let mut lines = vec![format!(" {:21}   {:24}   From", "Setting", "Value"), "-".repeat(79)];
    lines.extend(Key::ALL.iter().map(|&key| {
        let value = settings.get(key).unwrap_or("-");
        format!(" {:21}   {value:24}   {}", key.name(), settings.source(key))
    }));
    Ok(Answer::lines(lines))
}
