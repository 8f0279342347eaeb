//! What becomes of a change that a tool refuses.

#![allow(clippy::unwrap_used)]

use std::sync::Mutex;

use anyhow::Result;
use nwfilter_rules::{Backend, Batch, Ruleset};
use nwfilter_testlab::{Host, Need, Tools, skip_unless};
use nwfilter_xtables::Xtables;

struct Records(Mutex<Vec<String>>);

static RECORDS: Records = Records(Mutex::new(Vec::new()));

impl log::Log for Records {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn nothing_is_taken_back_where_nothing_was_changed() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
    let tools = Tools::new()?;
    tools.script("ebtables-restore", "echo broken >&2; exit 1\n")?;
    // It answers until the restore has failed.
    let asked = tools.path().join("asked");
    let save = format!("[ -e {0} ] && exit 1; echo >> {0}; exec $REAL \"$@\"\n", asked.display());
    tools.script("ebtables-save", &save)?;
    tools.run_test("with_a_restore_tool_that_fails")
}

#[test]
#[ignore = "run by the test of what is taken back"]
fn with_a_restore_tool_that_fails() -> Result<()> {
    log::set_logger(&RECORDS).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let host = Host::new()?;
    let mut batch = Batch::default();
    batch.filter("tap0".parse()?, Ruleset::drop_all().into());
    let error = host.enter(|| Xtables::default().apply(&batch)).unwrap_err().to_string();
    assert!(error.contains("broken"), "{error}");
    assert_eq!(*RECORDS.0.lock().unwrap(), [""; 0]);
    Ok(())
}

#[test]
fn a_change_that_a_tool_loses_in_a_race_with_another_program_is_made_again() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"), Need::Tool("nft"));
    let tools = Tools::new()?;
    // What ebtables-restore says now and then when another program commits while it runs.
    let lost = tools.path().join("lost");
    let restore = format!(
        "[ -e {0} ] && {{ rm {0}; nft add table inet other; cat > /dev/null\n\
         printf 'ebtables-restore v1.8.9 (nf_tables): \\nline 3: RULE_DELETE failed (No such file or directory)\\n' >&2\n\
         exit 1; }}\nexec $REAL \"$@\"\n",
        lost.display()
    );
    tools.script("ebtables-restore", &restore)?;
    tools.run_test("with_a_restore_tool_that_loses_a_race")
}

#[test]
#[ignore = "run by the test of lost races"]
fn with_a_restore_tool_that_loses_a_race() -> Result<()> {
    let host = Host::new()?;
    let lost = Tools::of_this_test()?.join("lost");
    let mut batch = Batch::default();
    batch.filter("tap0".parse()?, Ruleset::drop_all().into());
    let xtables = Xtables::default();
    host.enter(|| xtables.apply(&batch))?;
    std::fs::write(&lost, "")?;
    let mut gone = Batch::default();
    gone.remove("tap0".parse()?);
    host.enter(|| xtables.apply(&gone))?;
    assert!(!lost.exists());
    assert!(!host.run(&["ebtables-save"])?.contains("tap0"));
    Ok(())
}
