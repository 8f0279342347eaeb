//! `edit`: a filter in the user's editor, checked before it is stored.

use std::env;
use std::fs;
use std::io::{IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use nwfilter::xml::{Filter, read_filter, write_filter};
use nwfilter::{Committed, Driver, Transaction};
use nwfilterctl_shared::{say, with_causes};

use crate::documents::{accepted, read};
use crate::output::Answer;
use crate::progress::Watch;
use crate::verbs::{self, filter};

/// The editor if the environment names none.
const EDITOR: &str = "vi";

/// Opens a filter in an editor and defines the result. If that is refused, asks whether to edit again; if not, the edited
/// file is kept.
pub(crate) fn edit(driver: &Driver, watch: &Watch, name: &str, as_json: bool) -> Result<Answer> {
    let filter = filter(driver, name)?;
    let text = write_filter(&filter);
    let directory = tempfile::Builder::new().prefix("nwfilter-edit-").tempdir()?;
    let file = directory.path().join("filter.xml");
    fs::write(&file, &text)?;
    loop {
        run_editor(&file)?;
        if fs::read_to_string(&file).is_ok_and(|edited| edited == text) {
            return Ok(match as_json {
                true => verbs::defined(&Committed::default(), &[], false, true),
                false => Answer::lines([format!("Network filter {} not changed", filter.name)]),
            });
        }
        match define(driver, watch, &filter, &file) {
            Ok(committed) => {
                return Ok(verbs::defined(&committed, &["the editor".to_owned()], false, as_json));
            }
            Err(error) => {
                say(format_args!("error: {}", with_causes(error.chain())));
                if !goes_on()? {
                    let kept = directory.keep().join("filter.xml");
                    bail!("filter '{}' is as it was; what was edited is in {}", filter.name, kept.display());
                }
            }
        }
    }
}

fn define(driver: &Driver, watch: &Watch, old: &Arc<Filter>, file: &Path) -> Result<Committed> {
    let new = accepted(read_filter("edited", &read(file)?))?;
    ensure!(
        driver.filter(&old.name).is_ok_and(|now| now == *old),
        "somebody else changed filter '{}' meanwhile",
        old.name
    );
    let mut transaction = Transaction::new();
    transaction.define_filter(new);
    let committed = watch.during(|| driver.commit(transaction))?;
    verbs::warn_all(&committed.applied.warnings);
    Ok(committed)
}

/// Runs `$VISUAL`, `$EDITOR` or vi, split into words at blanks, and waits for its end.
fn run_editor(file: &Path) -> Result<()> {
    let named = ["VISUAL", "EDITOR"].into_iter().filter_map(|name| env::var(name).ok());
    let editor = named.into_iter().find(|editor| !editor.trim().is_empty()).unwrap_or(EDITOR.to_owned());
    let words: Vec<_> = editor.split_whitespace().collect();
    let (program, args) = (PathBuf::from(words[0]), &words[1..]);
    let status = Command::new(&program).args(args).arg(file).status();
    let status = status.with_context(|| format!("cannot run the editor '{editor}' ($VISUAL, $EDITOR)"))?;
    ensure!(status.success(), "the editor '{editor}' failed: {status}");
    Ok(())
}

/// Asks whether to open the editor again. If standard input is no terminal, the answer is no.
fn goes_on() -> Result<bool> {
    if !stdin().is_terminal() {
        return Ok(false);
    }
    say("edit again? [Y/n]");
    let mut answer = String::new();
    let length = stdin().read_line(&mut answer)?;
    Ok(length > 0 && !answer.trim_start().starts_with(['n', 'N']))
}
