//! Manual pages that man can show, and completion of verbs, options and names in a shell.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use nwfilter_testlab::{Need, skip_unless};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_nwfilterctl");

fn manuals() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    assert!(Command::new(PROGRAM).args(["manuals".as_ref(), dir.path()]).status().unwrap().success());
    dir
}

/// What bash offers for a line whose last word is not complete.
fn bash(dir: &Path, words: &[&str]) -> Vec<String> {
    let script = "source \"$1\"; shift; COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1)) COMP_TYPE=9
        _clap_complete_nwfilterctl \"$1\" \"${@: -1}\" ''; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let path = Path::new(PROGRAM).parent().unwrap();
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(dir.join("completions/bash/nwfilterctl")).args(words);
    bash.current_dir(dir).env("NWFILTER_CONFIG", "n.toml");
    bash.env("PATH", format!("{}:/usr/bin:/bin", path.display()));
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim_end().to_owned()).collect()
}

#[test]
fn man_shows_each_page_without_a_warning() {
    skip_unless!(Need::Tool("man"));
    let dir = manuals();
    let pages: Vec<_> =
        fs::read_dir(dir.path().join("man")).unwrap().map(|page| page.unwrap().path()).collect();
    assert!(pages.len() > 20, "{pages:?}");
    for page in pages {
        let output = Command::new("man").args(["--warnings", "--local-file"]).arg(&page).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}: {output:?}", page.display());
        assert!(String::from_utf8(output.stdout).unwrap().contains("SEE ALSO"), "{}", page.display());
    }
}

#[test]
fn a_shell_completes_verbs_options_and_the_names_of_filters_and_ports() {
    let dir = manuals();
    let (store, state) = (dir.path().join("store"), dir.path().join("state"));
    fs::write(dir.path().join("n.toml"), format!("config-dir = {store:?}\nstate-dir = {state:?}\n")).unwrap();
    for file in ["store/clean-mine.xml", "state/vnet0.xml", "other/elsewhere.xml"] {
        let file = dir.path().join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "").unwrap();
    }
    let of = |words: &[&str]| bash(dir.path(), words);
    assert_eq!(of(&["nwfilterctl", "binding-d"]), ["binding-delete", "binding-dumpxml"]);
    assert_eq!(
        of(&["nwfilterctl", "dumpxml", "clean"]),
        ["clean-mine", "clean-traffic", "clean-traffic-gateway"]
    );
    assert_eq!(of(&["nwfilterctl", "undefine", "clean-mine", "clean-m"]), ["clean-mine"]);
    assert_eq!(of(&["nwfilterctl", "binding-delete", "v"]), ["vnet0"]);
    assert_eq!(of(&["nwfilterctl", "plan", "binding-delete", "v"]), ["vnet0"]);
    assert_eq!(of(&["nwfilterctl", "--config-dir", "other", "edit", "else"]), ["elsewhere"]);
    assert_eq!(of(&["nwfilterctl", "--backend", "n"]), ["nftables"]);
    assert_eq!(of(&["nwfilterctl", "define", "n."]), ["n.toml"]);
}

#[test]
fn there_are_completions_for_three_shells() {
    let dir = manuals();
    for (file, begin) in
        [("zsh/_nwfilterctl", "#compdef nwfilterctl\n"), ("fish/nwfilterctl.fish", "complete ")]
    {
        let text = fs::read_to_string(dir.path().join("completions").join(file)).unwrap();
        assert!(text.starts_with(begin) && text.contains("COMPLETE="), "{text}");
    }
}
