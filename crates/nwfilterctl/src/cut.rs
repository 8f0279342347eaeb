//! What is said of the connections that a change with `--cut` ended.

use nwfilter::{Committed, Cut};
use nwfilterctl_shared::say;
use serde_json::{Value, json};

use crate::output::Answer;

/// The answer of a verb: JSON, or else lines. With `--cut` it says which connections were ended; what may go on although the
/// rules refuse it is said on stderr, and is an error.
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
