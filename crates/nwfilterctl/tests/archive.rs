//! `export` and `import`: the stores as one file, and back, all or nothing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use nwfilter_testlab::{Host, Need, skip_unless};
use tempfile::TempDir;

const FILTER: &str =
    "<filter name='web'><rule action='accept' direction='in'><tcp dstportstart='80'/></rule></filter>";
const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='allow-arp'/>
</filterbinding>
";

fn with(mut command: Command, dir: &Path, args: &[&str]) -> Output {
    command.current_dir(dir).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
    command.env_remove("RUST_LOG").output().unwrap()
}

/// Runs it where it need not touch a kernel.
fn run(dir: &TempDir, args: &[&str]) -> Output {
    with(Command::new(env!("CARGO_BIN_EXE_nwfilterctl")), dir.path(), args)
}

fn run_on(host: &Host, dir: &TempDir, args: &[&str]) -> Output {
    with(host.command(env!("CARGO_BIN_EXE_nwfilterctl")), dir.path(), args)
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Stores that hold these filters.
fn stores(filters: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (number, filter) in filters.iter().enumerate() {
        let file = format!("{number}.xml");
        fs::write(dir.path().join(&file), filter).unwrap();
        stdout(&run(&dir, &["define", &file]));
    }
    dir
}

#[test]
fn what_is_exported_is_the_same_in_the_stores_that_import_it() {
    let (from, to) = (stores(&[FILTER, "<filter name='a'/>"]), stores(&[]));
    let file = to.path().join("all.json");
    let said = stdout(&run(&from, &["export", file.to_str().unwrap()]));
    assert_eq!(said, format!("2 filters, 0 sets and 0 bindings exported to {}\n", file.display()));
    assert_eq!(fs::read_to_string(&file).unwrap(), stdout(&run(&from, &["export"])));
    let said = stdout(&run(&to, &["import", "all.json"]));
    assert_eq!(said, "2 filters, 0 sets and 0 bindings imported from all.json, 0 unchanged\n");
    assert_eq!(stdout(&run(&from, &["export"])), stdout(&run(&to, &["export", "-"])));
    let again: serde_json::Value =
        serde_json::from_str(&stdout(&run(&to, &["import", "all.json", "--json"]))).unwrap();
    assert_eq!((&again["filters"], &again["unchanged"]), (&serde_json::json!([]), &serde_json::json!(2)));
}

#[test]
fn documents_that_differ_are_only_replaced_when_that_is_asked_for() {
    let (from, to) = (stores(&[FILTER]), stores(&[&FILTER.replace("80", "443"), "<filter name='own'/>"]));
    fs::write(to.path().join("all.json"), stdout(&run(&from, &["export"]))).unwrap();
    let before = stdout(&run(&to, &["export"]));
    let said = refusal(&run(&to, &["import", "all.json"]));
    assert_eq!(
        said,
        "error: the stores have other documents of the same names: filter 'web'\n  help: --replace puts those of \
         all.json in their place\n"
    );
    assert!(
        stdout(&run(&to, &["import", "all.json", "--replace", "--dry-run"])).contains("filter 'web' defined")
    );
    assert_eq!(stdout(&run(&to, &["export"])), before, "nothing is changed");

    let uuid = |dir| -> String {
        let json: serde_json::Value =
            serde_json::from_str(&stdout(&run(dir, &["dumpxml", "web", "--json"]))).unwrap();
        json["uuid"].to_string()
    };
    let old = uuid(&to);
    stdout(&run(&to, &["import", "all.json", "--replace"]));
    assert!(stdout(&run(&to, &["dumpxml", "web"])).contains("'80'"));
    assert_eq!(uuid(&to), old, "the store's UUID stays");
    stdout(&run(&to, &["dumpxml", "own"]));
}

#[test]
fn a_file_that_is_no_export_or_is_damaged_changes_nothing() {
    let (from, to) = (stores(&[FILTER]), stores(&[]));
    let good = stdout(&run(&from, &["export"]));
    for (text, expected) in [
        ("<filter/>".to_owned(), "is not an export: a file that 'nwfilterctl export' wrote is expected"),
        (
            good.replace("\"version\": 1", "\"version\": 9"),
            "has version 9 of the format, and only 1 is known",
        ),
        (good.replace("\"format\": \"nwfilter\"", "\"format\": \"x\""), "has the format 'x'"),
        (
            good.replace("\"name\": \"web\"", "\"name\": \"wob\""),
            "filters[0] is named 'wob', but its document is about 'web'",
        ),
        (good.replace("dstportstart", "dstportstrt"), "bad.json: filters[0]:"),
        (good.replace("\"bindings\"", "\"bindigs\""), "unknown field `bindigs`"),
    ] {
        fs::write(to.path().join("bad.json"), text).unwrap();
        let said = refusal(&run(&to, &["import", "bad.json"]));
        assert!(said.contains(expected), "{expected}: {said}");
        assert!(!to.path().join("etc").exists());
    }
}

#[test]
fn an_export_that_lacks_a_damaged_file_says_so() {
    let dir = stores(&[FILTER]);
    fs::write(dir.path().join("etc/broken.xml"), "<filter").unwrap();
    let output = run(&dir, &["export"]);
    let said = refusal(&output);
    assert!(said.contains("warning: etc/broken.xml is not in the export"), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("web"));
}

#[test]
fn bindings_are_enforced_by_an_import_all_or_none() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (host, dir) = (Host::new().unwrap(), stores(&[FILTER]));
    let taps = [host.tap("tap0").unwrap(), host.tap("tap1").unwrap()];
    for port in ["tap0", "tap1"] {
        let file = format!("{port}.xml");
        let binding = BINDING.replace("tap0", port).replace("allow-arp", "web");
        fs::write(dir.path().join(&file), binding).unwrap();
        stdout(&run_on(&host, &dir, &["binding-create", &file]));
    }
    stdout(&run_on(&host, &dir, &["export", "all.json"]));
    let before = host.saved().unwrap();
    stdout(&run_on(&host, &dir, &["binding-delete", "tap0", "tap1"]));
    stdout(&run_on(&host, &dir, &["undefine", "web"]));

    let [tap0, tap1] = taps;
    host.ip(&["link del tap1"]).unwrap();
    drop(tap1);
    let said = refusal(&run_on(&host, &dir, &["import", "all.json"]));
    assert!(said.contains("there is no network interface 'tap1'"), "{said}");
    assert!(host.saved().unwrap().port("tap0").is_empty());
    assert!(!dir.path().join("etc/web.xml").exists());
    stdout(&run_on(&host, &dir, &["import", "all.json", "--filters-only"]));
    assert!(host.saved().unwrap().port("tap0").is_empty());

    let _tap1 = host.tap("tap1").unwrap();
    let said = stdout(&run_on(&host, &dir, &["import", "all.json"]));
    assert_eq!(said, "0 filters, 0 sets and 2 bindings imported from all.json, 1 unchanged\n");
    assert_eq!(host.saved().unwrap(), before);
    drop(tap0);
}

#[test]
fn sets_are_imported_after_those_that_they_include() {
    skip_unless!(Need::Root, Need::Tool("ipset"), Need::Tool("iptables-restore"));
    let (host, dir) = (Host::new().unwrap(), stores(&[]));
    for (file, set) in [
        ("b.xml", "<filterset name='b' family='ipv4'><entry value='10.0.0.1'/></filterset>"),
        ("a.xml", "<filterset name='a' family='ipv4'><include set='b'/></filterset>"),
    ] {
        fs::write(dir.path().join(file), set).unwrap();
        stdout(&run_on(&host, &dir, &["set-define", file]));
    }
    let said = stdout(&run_on(&host, &dir, &["export", "all.json"]));
    assert_eq!(said, "0 filters, 2 sets and 0 bindings exported to all.json\n");
    stdout(&run_on(&host, &dir, &["set-undefine", "a", "b"]));
    let said = stdout(&run_on(&host, &dir, &["import", "all.json"]));
    assert_eq!(said, "0 filters, 2 sets and 0 bindings imported from all.json, 0 unchanged\n");
    assert!(stdout(&run_on(&host, &dir, &["set-dumpxml", "--resolved", "a"])).contains("10.0.0.1"));
    assert!(host.run(&["ipset", "list"]).unwrap().contains("10.0.0.1"));

    let other = "<filterset name='b' family='ipv4'><entry value='10.0.0.2'/></filterset>";
    fs::write(dir.path().join("b.xml"), other).unwrap();
    stdout(&run_on(&host, &dir, &["set-define", "b.xml"]));
    assert!(refusal(&run_on(&host, &dir, &["import", "all.json"])).contains("of the same names: set 'b'"));
    stdout(&run_on(&host, &dir, &["import", "all.json", "--replace"]));
    assert!(host.run(&["ipset", "list"]).unwrap().contains("10.0.0.1"));
}
