//! The settings of a host: the file, the environment and the options, and the verb that shows them.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

struct Place(TempDir);

impl Place {
    fn with(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("n.toml"), text).unwrap();
        Self(dir)
    }

    fn run(&self, variables: &[(&str, &str)], args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.0.path()).env("NWFILTER_CONFIG", "n.toml").env_remove("RUST_LOG");
        command.envs(variables.iter().copied()).args(args).output().unwrap()
    }

    fn config(&self, variables: &[(&str, &str)], args: &[&str]) -> Value {
        let output = self.run(variables, &[&["config", "--json"], args].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn of<'a>(settings: &'a Value, name: &str) -> (&'a Value, &'a str, &'a str) {
    let settings = settings.as_array().unwrap();
    let setting = settings.iter().find(|setting| setting["setting"] == name).unwrap();
    (&setting["value"], setting["from"].as_str().unwrap(), setting["at"].as_str().unwrap())
}

#[test]
fn config_shows_each_value_and_where_it_comes_from() {
    let place = Place::with("helpers = false\nbackend = 'auto'\ntimeout = 5\n");
    let settings = place.config(&[("NWFILTER_BACKEND", "nftables")], &["--timeout", "7"]);
    assert_eq!(of(&settings, "helpers"), (&"false".into(), "file", "n.toml:1"));
    assert_eq!(of(&settings, "backend"), (&"nftables".into(), "environment", "NWFILTER_BACKEND"));
    assert_eq!(of(&settings, "timeout"), (&"7".into(), "option", "--timeout"));
    assert_eq!(of(&settings, "config-dir"), (&"/etc/nwfilter".into(), "default", "default"));
    assert_eq!(of(&settings, "guard"), (&Value::Null, "default", "default"));
    // A switch that the file turns off can be turned on again.
    let settings = place.config(&[], &["--no-helpers=false"]);
    assert_eq!(of(&settings, "helpers"), (&"true".into(), "option", "--no-helpers"));

    let text = String::from_utf8(place.run(&[], &["config"]).stdout).unwrap();
    let line = text.lines().find(|line| line.contains("timeout")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["timeout", "5", "n.toml:3"]);
}

#[test]
fn verbs_use_the_directories_of_the_settings() {
    let place = Place::with("");
    let (store, state) = (place.0.path().join("store"), place.0.path().join("state"));
    fs::create_dir(&store).unwrap();
    fs::write(store.join("mine.xml"), "<filter name='mine'/>").unwrap();
    let text = format!("config-dir = {store:?}\nstate-dir = {state:?}\n");
    fs::write(place.0.path().join("n.toml"), text).unwrap();
    let listed = String::from_utf8(place.run(&[], &["list"]).stdout).unwrap();
    assert!(listed.contains("mine"), "{listed}");
}

#[test]
fn no_verb_works_under_settings_that_cannot_be() {
    let place = Place::with("bakend = 'auto'\ndispatch = 'fast'\n");
    let expected = "error: n.toml:1:1: there is no setting 'bakend'; the nearest is 'backend'\n\
                    n.toml:2:12: dispatch cannot be 'fast'; it takes tree or list, in quotes\n";
    for args in [&["list"][..], &["config"], &["keep"], &["listen"], &["fmt", "n.toml"]] {
        let output = place.run(&[], args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), expected, "{args:?}");
    }
    let output = place.run(&[], &["--config", "missing.toml", "list"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let expected = "error: cannot read missing.toml\n  because: No such file or directory\n";
    assert_eq!(stderr, expected);
}
