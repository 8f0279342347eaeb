//! Rules are named by file and line: in the store, and in the file that the operator wrote.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use nwfilter_testlab::{Host, Need, Tap, skip_unless};

/// The rules are on the lines 8 and 9; in the canonical form the comment and the blank lines are gone.
const FILTER: &str = "<?xml version='1.0'?>
<!-- What the web servers
     may be asked. -->

<filter name='web'>


  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='in'><tcp dstportstart='$PORT'/></rule>
</filter>
";

/// Stores of its own, and files to work with.
struct Cli(tempfile::TempDir);

impl Cli {
    fn new() -> Self {
        let cli = Self(tempfile::tempdir().unwrap());
        cli.file("web.xml", FILTER);
        cli
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn binding(&self, port: &str) {
        let text = format!(
            "<filterbinding>
               <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
               <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/>
               <filterref filter='web'><parameter name='PORT' value='{port}'/></filterref>
             </filterbinding>"
        );
        self.file("tap0.xml", &text);
    }

    fn run_as(&self, mut command: Command, args: &str) -> Output {
        command.current_dir(self.0.path()).args(["--config-dir", "etc", "--state-dir", "run"]);
        command.args(args.split(' ')).env_remove("RUST_LOG").output().unwrap()
    }

    fn run(&self, args: &str) -> Output {
        self.run_as(Command::new(env!("CARGO_BIN_EXE_nwfilterctl")), args)
    }
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn line_of(text: &str, what: &str) -> usize {
    1 + text.lines().position(|line| line.contains(what)).unwrap()
}

/// The line of the second rule in the canonical form, which gives the protocol a line of its own.
fn rule_with_port(text: &str) -> usize {
    line_of(text, "$PORT") - 1
}

#[test]
fn an_error_names_the_line_of_the_stored_document_and_of_the_file_while_that_says_the_same() {
    let cli = Cli::new();
    stdout(&cli.run("define web.xml"));
    cli.binding("word");
    let stored = rule_with_port(&fs::read_to_string(cli.0.path().join("etc/web.xml")).unwrap());
    assert_eq!(rule_with_port(&stdout(&cli.run("dumpxml web"))), stored, "dumpxml shows the same lines");
    let written = line_of(FILTER, "$PORT");
    assert_ne!(stored, written);

    let refused = stderr(&cli.run("render --binding tap0.xml"));
    let source = cli.0.path().canonicalize().unwrap().join("web.xml");
    let place = format!("\n  at: etc/web.xml:{stored} ({}:{written})\n", source.display());
    assert!(refused.contains(&place), "{refused}");
    assert!(refused.contains(&format!("web:{stored}: $PORT is 'word' here")), "{refused}");

    // With another comment the rules are still the same, on other lines; then one of them is another.
    cli.file("web.xml", &FILTER.replace("What the", "What\nthe"));
    let refused = stderr(&cli.run("render --binding tap0.xml"));
    assert!(refused.contains(&format!("web.xml:{})\n", written + 1)), "{refused}");
    cli.file("web.xml", &FILTER.replace("80", "81"));
    let refused = stderr(&cli.run("render --binding tap0.xml"));
    assert!(refused.contains(&format!("\n  at: etc/web.xml:{stored}\n")), "{refused}");
}

#[test]
fn the_rules_of_a_stock_filter_have_the_lines_that_dumpxml_shows() {
    let cli = Cli::new();
    let text = stdout(&cli.run("dumpxml no-arp-ip-spoofing"));
    cli.file("copy.xml", &text);
    stdout(&cli.run("define copy.xml"));
    let stored = fs::read_to_string(cli.0.path().join("etc/no-arp-ip-spoofing.xml")).unwrap();
    assert_eq!(line_of(&stored, "$IP"), line_of(&text, "$IP"));
    assert!(stored.starts_with(&text), "{stored}");
}

#[test]
fn diff_names_the_places_of_rules_and_a_definition_that_fails_those_of_the_new_file() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _tap: Tap = host.tap("tap0").unwrap();
    let run = |args: &str| cli.run_as(host.command(env!("CARGO_BIN_EXE_nwfilterctl")), args);
    stdout(&run("define web.xml"));
    cli.binding("443");
    stdout(&run("binding-create tap0.xml"));
    assert!(host.command("iptables").args(["-F", "FI-tap0"]).status().unwrap().success());
    let stored = rule_with_port(&stdout(&run("dumpxml web")));
    let drift = run("diff");
    let shown = String::from_utf8_lossy(&drift.stdout);
    assert!(shown.contains(&format!(" at etc/web.xml:{stored} (")), "{shown}");
    let drift: serde_json::Value = serde_json::from_slice(&run("diff --json").stdout).unwrap();
    let places: Vec<_> = drift.as_array().unwrap().iter().map(|row| row["at"].clone()).collect();
    let source = cli.0.path().canonicalize().unwrap().join("web.xml");
    let source = serde_json::json!({"path": source, "line": line_of(FILTER, "$PORT")});
    let place = serde_json::json!({"path": "etc/web.xml", "line": stored, "source": source});
    assert!(places.contains(&place), "{places:?}");

    cli.file("new.xml", "<filter name='web'>\n\n\n<rule action='drop' direction='in'><all srcmacaddr='$PORT'/></rule></filter>");
    let refused = stderr(&run("define new.xml"));
    assert!(refused.contains("\n  at: new.xml:4\n"), "{refused}");
}

#[test]
fn a_source_that_is_a_pipe_is_not_read_again() {
    let cli = Cli::new();
    stdout(&cli.run("define web.xml"));
    cli.binding("word");
    let source = cli.0.path().join("web.xml");
    fs::remove_file(&source).unwrap();
    nix::unistd::mkfifo(&source, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let refused = stderr(&cli.run("render --binding tap0.xml"));
    assert!(refused.contains("\n  at: etc/web.xml:6\n"), "{refused}");
}
