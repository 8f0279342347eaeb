//! What files and environments mean, and how those that cannot be are refused.

#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use nwfilter_settings::{Error, FILE_VARIABLE, Key, MAX_FILE, Settings, Source};

const ALL: &str = "# Everything
backend = 'auto'
config-dir = '/srv/filters'
connect = 'qemu:///system'
dispatch = 'list'
guard = 'vnet'
helpers = false
keep-bridge-nf = true
learning.dhcp-servers = ['10.0.0.1', 'fd00::1']
learning.method = 'dhcp'
log = 'debug'
log-group = 5
metrics = 'unix:/run/nwfilter/metrics'
state-dir = '/run/filters'
timeout = 0x1e
";

fn read(text: &str) -> Result<Settings, Error> {
    Settings::read(Path::new("n.toml"), text, |_| None)
}

fn problems(text: &str) -> Vec<String> {
    match read(text) {
        Err(Error::Invalid(problems)) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_setting_can_be_set_in_the_file() {
    let settings = read(ALL).unwrap();
    let names: Vec<_> = Key::ALL.iter().map(|key| key.name()).collect();
    assert!(names.is_sorted());
    for (index, &key) in Key::ALL.iter().enumerate() {
        assert_eq!(settings.source(key).to_string(), format!("n.toml:{}", index + 2), "{key:?}");
        assert_ne!(settings.get(key), key.default(), "{key:?}");
    }
    assert_eq!(settings.get(Key::Timeout), Some("30"));
    assert!(settings.is_on(Key::KeepBridgeNf) && !settings.is_on(Key::Helpers));
}

#[test]
fn a_table_has_the_settings_whose_names_begin_with_its_own() {
    let settings =
        read("log = 'debug'\n[learning]\nmethod = 'none'\ndhcp-servers = ['10.0.0.1', 'fd00::1']\n").unwrap();
    assert_eq!(settings.get(Key::LearningMethod), Some("none"));
    assert_eq!(settings.source(Key::LearningMethod).to_string(), "n.toml:3");
    assert_eq!(settings.get(Key::LearningServers), Some("10.0.0.1,fd00::1"));
    assert_eq!(
        problems(
            "[learning]\nmetod = 'any'\nmethod = 'arp'\ndhcp-servers = ['dhcp.example.org']\n[log]\na = 1\n"
        ),
        [
            "n.toml:2:1: there is no setting 'learning.metod'; the nearest is 'learning.method'",
            "n.toml:3:10: learning.method cannot be 'arp'; it takes any, dhcp or none, in quotes",
            "n.toml:4:16: learning.dhcp-servers cannot be ['dhcp.example.org']; it takes a list of IP addresses",
            "n.toml:5:1: log cannot be [log]; it takes error, warn, info, debug or trace, in quotes",
        ]
    );
}

#[test]
fn an_empty_file_sets_nothing() {
    let settings = read("").unwrap();
    for &key in Key::ALL {
        assert_eq!((settings.get(key), settings.source(key)), (key.default(), &Source::Default));
    }
}

#[test]
fn the_environment_comes_before_the_file_and_options_before_both() {
    let environment = |name| match name {
        "NWFILTER_BACKEND" => Some(OsString::from("nftables")),
        "NWFILTER_GUARD" => Some(OsString::new()),
        _ => None,
    };
    let mut settings = Settings::read(Path::new("n.toml"), ALL, environment).unwrap();
    assert_eq!(settings.get(Key::Backend), Some("nftables"));
    assert_eq!(settings.source(Key::Backend), &Source::Environment("NWFILTER_BACKEND"));
    assert_eq!(settings.get(Key::Guard), Some("vnet"), "an empty variable sets nothing");
    settings.set(Key::Backend, "xtables", "--backend");
    assert_eq!(settings.source(Key::Backend).to_string(), "--backend");
    let differences = read(ALL).unwrap().differences(&settings);
    let told: Vec<_> = differences.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["backend was 'auto' and is 'xtables'"]);
}

#[test]
fn every_key_and_value_that_cannot_be_is_reported_with_its_place() {
    let text = "bakend = 'auto'\nbackend = 'iptables'\n  helpers = 'no'\ntimeout = 86401\n\
                config-dir = 'here'\nstate_dir = '/run'\nguard = ''\nxyzzy = 1\nlog = warn\n";
    // A syntax error hides what else is wrong: what was read is not what was meant.
    assert_eq!(problems(text).len(), 1);
    let text = text.replace("log = warn\n", "[metrics]\naddress = 'x'\n");
    let expected = [
        "n.toml:1:1: there is no setting 'bakend'; the nearest is 'backend'",
        "n.toml:2:11: backend cannot be 'iptables'; it takes auto, nftables or xtables, in quotes",
        "n.toml:3:13: helpers cannot be 'no'; it takes true or false",
        "n.toml:4:11: timeout cannot be 86401; it takes a number of seconds from 0 to 86400",
        "n.toml:5:14: config-dir cannot be 'here'; it takes the absolute path of a directory",
        "n.toml:6:1: there is no setting 'state_dir'; the nearest is 'state-dir'",
        "n.toml:7:9: guard cannot be ''; it takes a text that is not empty",
        "n.toml:8:1: there is no setting 'xyzzy'; 'nwfilterctl config' lists the settings",
        "n.toml:9:1: metrics cannot be [metrics]; it takes a text that is not empty",
    ];
    assert_eq!(problems(&text), expected);
}

#[test]
fn a_syntax_error_and_a_second_value_have_their_place() {
    assert!(problems("backend = 'auto\n")[0].starts_with("n.toml:1:"));
    assert!(problems("guard = 'a'\nguard = 'b'\n")[0].starts_with("n.toml:2:1: duplicate key"));
}

#[test]
fn a_variable_that_cannot_be_is_named() {
    let environment = |name| (name == "NWFILTER_TIMEOUT").then(|| OsString::from("soon"));
    let error = Settings::read(Path::new("n.toml"), "", environment).unwrap_err();
    let expected = "NWFILTER_TIMEOUT: 'soon' cannot be; it takes a number of seconds from 0 to 86400";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_file_that_was_named_has_to_be_readable_and_small() {
    // None of the variables is set where tests run, and none is set here: threads share the environment.
    assert!(std::env::var_os(FILE_VARIABLE).is_none());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("n.toml");
    let refused = |file: &Path| match Settings::load(Some(file)) {
        Err(Error::Unreadable { source, .. }) => source.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(refused(&file).contains("No such file"));
    assert!(refused(dir.path()).contains("no regular file"));
    fs::write(&file, "#".repeat(usize::try_from(MAX_FILE).unwrap() + 1)).unwrap();
    assert!(refused(&file).contains("more than 65536 bytes"));
    fs::write(&file, b"\xff").unwrap();
    assert!(refused(&file).contains("UTF-8"));
    fs::write(&file, "guard = 'vnet'").unwrap();
    assert_eq!(Settings::load(Some(&file)).unwrap().get(Key::Guard), Some("vnet"));
}

#[test]
fn the_file_that_packages_install_sets_the_guard_and_shows_each_setting() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dist/nwfilter.toml");
    let text = fs::read_to_string(file).unwrap();
    let installed = read(&text).unwrap();
    let set: Vec<_> = Key::ALL.iter().filter(|&&key| installed.source(key) != &Source::Default).collect();
    assert_eq!(set, [&Key::Guard]);
    let commented = text.lines().map(|line| line.strip_prefix('#').unwrap_or(line));
    let shown: String =
        commented.filter(|line| line.contains(" = ")).fold(String::new(), |text, line| text + line + "\n");
    let settings = read(&shown).unwrap();
    for &key in Key::ALL {
        assert_ne!(settings.source(key), &Source::Default, "{key:?}");
        assert!(key.default().is_none_or(|default| settings.get(key) == Some(default)), "{key:?}");
    }
}
