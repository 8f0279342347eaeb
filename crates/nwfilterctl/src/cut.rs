//! Output about the connections that a change with `--cut` ended.

use nwfilter::{Committed, Cut};
use nwfilterctl_shared::say;
use serde_json::{Value, json};

use crate::output::Answer;

/// The answer of a verb, as JSON or lines. With `--cut` it lists the ended connections. Connections that may go on although
/// the rules refuse them are reported on stderr, and make the exit code 1.
pub(crate) fn answer(
    committed: &Committed,
    is_asked: bool,
    as_json: bool,
    json: impl FnOnce() -> Value,
    lines: impl FnOnce() -> Vec<String>,
) -> Answer {
    let Cut { ended, failures } = &committed.cut;
    for failure in failures {
        say(format_args!("error: {failure}"));
    }
    let answer = if as_json {
        let mut value = json();
        if is_asked {
            let failures: Vec<_> = failures.iter().map(ToString::to_string).collect();
            value["cut"] = json!({"ended": ended, "failures": failures});
        }
        Answer::json(&value)
    } else {
        let ended = ended.iter().map(|connection| format!("Connection ended on {connection}"));
        Answer::lines(lines().into_iter().chain(ended))
    };
    answer.good_if(failures.is_empty())
}
