//! Every `virsh nwfilter-*` command, with libvirt's own module and with ours, compared.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nwfilter_testlab::{Connect, Host, Libvirtd, LibvirtdOptions, Need, Saved, Tools, skip_unless};
use tempfile::TempDir;

use common::compiled::Program;
use common::{Module, driver_dir, eventually, libvirtd, options};

const UUID: &str = "11111111-2222-4333-8444-555555555555";

/// Documents by the names that commands give instead of a path.
struct Documents(TempDir);

impl Documents {
    fn new() -> Result<Self> {
        let documents = Self(tempfile::tempdir()?);
        let rule = "<rule action='drop' direction='in' priority='500'><tcp dstportstart='22'/></rule>";
        let other_uuid = UUID.replace('5', "6");
        for (name, text) in [
            ("@mine", format!("<filter name='mine'><uuid>{UUID}</uuid>{rule}</filter>")),
            (
                "@edited",
                format!("<filter name='mine'><uuid>{UUID}</uuid>{}</filter>", rule.replace("drop", "accept")),
            ),
            ("@taken-uuid", format!("<filter name='other'><uuid>{UUID}</uuid></filter>")),
            ("@other-uuid", format!("<filter name='mine'><uuid>{other_uuid}</uuid></filter>")),
            ("@user", "<filter name='user'><filterref filter='mine'/></filter>".into()),
            (
                "@loop",
                format!("<filter name='mine'><uuid>{UUID}</uuid><filterref filter='user'/></filter>"),
            ),
            ("@dangling", "<filter name='dangling'><filterref filter='nothere'/></filter>".into()),
            (
                "@needs",
                "<filter name='needs'><rule action='drop' direction='in'><ip srcipaddr='$X'/></rule></filter>"
                    .into(),
            ),
            (
                "@bad-port",
                "<filter name='x'><rule action='drop' direction='in'><tcp srcportstart='70000'/></rule></filter>"
                    .into(),
            ),
            ("@not-a-filter", "<domain/>".into()),
            ("@binding", binding("mine")),
            ("@binding-nothere", binding("nothere")),
            ("@binding-dangling", binding("dangling")),
            ("@binding-needs", binding("needs")),
        ] {
            fs::write(documents.path(name), text)?;
        }
        Ok(documents)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn binding(filter: &str) -> String {
    format!(
        "<filterbinding>
          <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
          <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/>
          <filterref filter='{filter}'><parameter name='IP' value='10.0.0.2'/></filterref>
        </filterbinding>"
    )
}

/// One after the other, as a session at a shell.
const COMMANDS: &[&[&str]] = &[
    &["nwfilter-list", "--name"],
    &["nwfilter-dumpxml", "clean-traffic"],
    &["nwfilter-dumpxml", "nothere"],
    &["nwfilter-dumpxml", "99999999-2222-4333-8444-555555555555"],
    &["nwfilter-define", "@mine"],
    &["nwfilter-define", "--validate", "@mine"],
    &["nwfilter-dumpxml", "mine"],
    &["nwfilter-dumpxml", UUID],
    &["nwfilter-define", "@edited"],
    &["nwfilter-dumpxml", "mine"],
    &["nwfilter-define", "@taken-uuid"],
    &["nwfilter-define", "@other-uuid"],
    &["nwfilter-define", "@user"],
    &["nwfilter-define", "@loop"],
    &["nwfilter-dumpxml", "mine"],
    &["nwfilter-define", "@dangling"],
    &["nwfilter-define", "@needs"],
    &["nwfilter-define", "--validate", "@bad-port"],
    &["nwfilter-define", "@not-a-filter"],
    &["nwfilter-binding-list"],
    &["nwfilter-binding-create", "@binding"],
    &["nwfilter-binding-create", "@binding"],
    &["nwfilter-binding-list"],
    &["nwfilter-binding-dumpxml", "tap0"],
    &["nwfilter-binding-dumpxml", "tap9"],
    &["nwfilter-undefine", "mine"],
    &["nwfilter-undefine", "user"],
    &["nwfilter-undefine", "nothere"],
    &["nwfilter-define", "@mine"],
    &["nwfilter-binding-delete", "tap0"],
    &["nwfilter-binding-delete", "tap0"],
    &["nwfilter-binding-create", "@binding-nothere"],
    &["nwfilter-binding-create", "@binding-dangling"],
    &["nwfilter-binding-create", "@binding-needs"],
    &["nwfilter-binding-create", "--validate", "@binding"],
    &["nwfilter-undefine", UUID],
    &["nwfilter-binding-delete", "tap0"],
    &["nwfilter-undefine", UUID],
    &["nwfilter-list", "--name"],
    &["version"],
];

/// What one command gave.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    succeeded: bool,
    stdout: String,
    /// What libvirt puts before a message for its error code.
    code: Option<String>,
}

fn see(daemon: &Libvirtd, documents: &Documents, words: &[&str]) -> Result<(Seen, String)> {
    let mut command = daemon.virsh_command(Connect::Qemu);
    for word in words.iter().filter(|word| **word != "--name") {
        match word.starts_with('@') {
            true => command.arg(documents.path(word)),
            false => command.arg(word),
        };
    }
    let output = command.output()?;
    let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    // The first message is virsh's own.
    let code = |line: &str| Some(line.strip_prefix("error: ")?.split_once(": ")?.0.to_owned());
    let seen = Seen {
        succeeded: output.status.success(),
        stdout: comparable(&stdout, words.contains(&"--name")),
        code: stderr.lines().filter_map(code).next(),
    };
    Ok((seen, stderr))
}

/// The output without UUIDs that a driver made up, because the document had none, and without the word of newer
/// versions for what a binding's rules were made with.
fn comparable(stdout: &str, names_only: bool) -> String {
    let made_up = |line: &&str| line.contains("<uuid>") && !line.contains(UUID);
    let shown = |line: &str| match names_only {
        true => line.split_whitespace().last().unwrap_or_default().to_owned(),
        false => line.to_owned(),
    };
    let backend = |line: &&str| line.trim_start().starts_with("<backend ");
    stdout.lines().filter(|line| !made_up(line) && !backend(line)).map(|line| shown(line) + "\n").collect()
}

/// Every command with what it gave and what the kernel held then.
fn session(module: Module) -> Result<Vec<(Seen, String, Saved)>> {
    let documents = Documents::new()?;
    let host = Host::new()?;
    let _tap = host.tap("tap0")?;
    let (_dir, daemon) = libvirtd(&host, module)?;
    let step = |words: &&[&str]| {
        let (seen, stderr) = see(&daemon, &documents, words)?;
        let touches_kernel = ["nwfilter-define", "nwfilter-binding-create", "nwfilter-binding-delete"];
        if words[0] == "nwfilter-binding-delete" {
            // Our rules stay for a moment, in case that libvirt binds the port anew.
            std::thread::sleep(Duration::from_millis(700));
        }
        let saved = match touches_kernel.contains(&words[0]) {
            true => host.saved()?.port("tap0"),
            false => Saved::default(),
        };
        Ok((seen, stderr, saved))
    };
    COMMANDS.iter().map(step).collect()
}

#[test]
fn every_command_gives_what_it_gives_with_libvirts_own_module() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let (libvirts, ours) = (session(Module::Libvirts)?, session(Module::Ours)?);
    for ((words, libvirts), ours) in COMMANDS.iter().zip(libvirts).zip(ours) {
        let (expected, stderr, saved) = libvirts;
        let (seen, our_stderr, our_saved) = ours;
        assert_eq!(seen, expected, "{words:?}\nlibvirt: {stderr}\nours: {our_stderr}");
        assert_eq!(saved.diff(&our_saved), None, "after {words:?}");
    }
    Ok(())
}

#[test]
fn a_fresh_daemon_serves_every_command_to_a_connection_of_the_qemu_driver() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let documents = Documents::new()?;
    let host = Host::new()?;
    let _tap = host.tap("tap0")?;
    let (_dir, mut daemon) = libvirtd(&host, Module::Ours)?;
    for words in [["nwfilter-define", "@mine"], ["nwfilter-binding-create", "@binding"]] {
        let (seen, stderr) = see(&daemon, &documents, &words)?;
        ensure!(seen.succeeded, "{words:?}: {stderr}");
    }
    for words in [
        ["nwfilter-dumpxml", "mine"],
        ["nwfilter-binding-dumpxml", "tap0"],
        ["nwfilter-binding-delete", "tap0"],
        ["nwfilter-undefine", "mine"],
    ] {
        // Nobody has opened a connection of the nwfilter driver yet.
        daemon.restart()?;
        let (seen, stderr) = see(&daemon, &documents, &words)?;
        ensure!(seen.succeeded, "{words:?}: {stderr}");
    }
    Ok(())
}

#[test]
fn lookups_do_not_wait_for_the_removal_of_a_port() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let gate = tempfile::tempdir()?;
    let (closed, arrived) = (gate.path().join("closed"), gate.path().join("arrived"));
    let (tools, dir, host) = (Tools::new()?, driver_dir(Module::Ours)?, Host::new()?);
    tools.script(
        "ebtables-restore",
        &format!(
            "while [ -e {} ]; do : > {}; sleep 0.02; done; exec $REAL \"$@\"",
            closed.display(),
            arrived.display()
        ),
    )?;
    let mounts = vec![(tools.path().to_owned(), "/usr/local/sbin".into())];
    let daemon = Libvirtd::start_with(&host, LibvirtdOptions { mounts, ..options(&dir) })?;
    let _tap = host.tap("tap0")?;
    daemon.define("<filter name='mine'><filterref filter='clean-traffic'/></filter>")?;
    daemon.bind(&binding("mine"))?;

    fs::write(&closed, "")?;
    daemon.unbind("tap0")?;
    eventually("the rules are being removed", Duration::from_secs(30), || Ok(arrived.exists()))?;
    for (words, succeeds) in [
        (["nwfilter-binding-list"].as_slice(), true),
        (&["nwfilter-binding-dumpxml", "tap0"], false),
        (&["nwfilter-list"], true),
        (&["nwfilter-dumpxml", "mine"], true),
    ] {
        let mut virsh = daemon.virsh_command(Connect::Qemu).args(words).stdout(Stdio::null()).spawn()?;
        eventually(words[0], Duration::from_secs(20), || Ok(virsh.try_wait()?.is_some()))?;
        assert_eq!(virsh.wait()?.success(), succeeds, "{words:?}");
        ensure!(host.saved()?.ebtables.contains("tap0"), "the removal was over before {words:?}");
    }
    fs::remove_file(&closed)?;
    eventually("the rules are gone", Duration::from_secs(30), || Ok(!host.saved()?.ebtables.contains("tap0")))
}

/// Documents, and whether a document of its kind is taken with VALIDATE and without.
const DOCUMENTS: &[&str] = &[
    "<filter name='a b'/>",
    "<filter name='a'><filterref filter='b c'/></filter>",
    "<filter name='a'><filterref filter='1'/></filter>",
    "<filter name='a' priority='-700'/>",
    "<filter name='a' chain='ipv4-x' priority='-700'/>",
    "<filter name='a' chain='ipv4-x' priority='-7000'/>",
    "<filter name='a'><rule action='accept' direction='in'><tcp connlimit-above='2' state='NEW'/></rule></filter>",
    "<filter name='a'><rule action='accept' direction='in'><tpc dstportstart='80'/></rule></filter>",
    "<filter name='a'><rule action='accept' direction='in'><tcp dstportstrt='80'/></rule></filter>",
    "<filter name='a'><rule action='accept' direction='in' priority='5000'/></filter>",
    "<filter name='a'><uuid>not one</uuid></filter>",
    "<filter name='a'>text</filter>",
    "<!DOCTYPE filter><filter name='a'/>",
    "<!DOCTYPE filter SYSTEM 'filter.dtd'><filter name='a'/>",
    "<filter name='a'",
    "<filter name='a'></filte>",
    "",
    "text",
    "<domain/>",
];

#[test]
fn validate_refuses_what_libvirts_schema_does_not_allow_and_malformed_xml_has_libvirts_code() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let seen = |module| -> Result<Vec<String>> {
        let (documents, host) = (Documents::new()?, Host::new()?);
        let (_dir, daemon) = libvirtd(&host, module)?;
        let mut all = Vec::new();
        for document in DOCUMENTS {
            fs::write(documents.path("@document"), document)?;
            for words in
                [["nwfilter-define", "@document"].as_slice(), &["nwfilter-define", "--validate", "@document"]]
            {
                let (seen, _) = see(&daemon, &documents, words)?;
                let why = match seen.code.as_deref() {
                    None => "",
                    Some("XML document failed to validate against schema") => "not as the schema says",
                    Some(place) if place.contains(":1") || place.starts_with("at line") => "no XML",
                    // Without a schema libvirt has several codes for what is one here.
                    Some(_) => "wrong",
                };
                all.push(format!("{} {document}: {} {why}", words[1], seen.succeeded));
                for name in ["a", "a b"] {
                    let _ = daemon.undefine(name);
                }
            }
        }
        Ok(all)
    };
    let (libvirts, ours) = (seen(Module::Libvirts)?, seen(Module::Ours)?);
    for (libvirts, ours) in libvirts.iter().zip(&ours) {
        assert_eq!(ours, libvirts);
    }
    Ok(())
}

#[test]
fn a_rule_that_libvirt_widens_is_an_error_in_the_log() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    daemon.define(
        "<filter name='a'><rule action='accept' direction='in'><tpc dstportstart='80'/></rule></filter>",
    )?;
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("unknown element <tpc>"));
    ensure!(line.is_some_and(|line| line.contains("error :")), "{line:?}");
    Ok(())
}

#[test]
fn a_refusal_says_where_the_document_is_wrong() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let documents = Documents::new()?;
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let (_, stderr) = see(&daemon, &documents, &["nwfilter-define", "@bad-port"])?;
    ensure!(stderr.contains("XML error: filter:1:72: error[NWF0023]: srcportstart: expected"), "{stderr}");
    Ok(())
}

#[test]
fn a_uri_that_is_not_the_system_s_is_refused() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let session = daemon.uri(Connect::Nwfilter).replace("/system", "/session");
    let output = daemon.virsh_command(Connect::Nwfilter).args(["-c", &session, "nwfilter-list"]).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(stderr.contains("only nwfilter:///system"), "{stderr}");
    Ok(())
}

#[test]
fn a_handle_of_a_filter_that_is_gone_does_nothing_to_the_next_one_of_its_name() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("gcc"));
    let client = Program::compile(
        "#include <stdio.h>
         void *virConnectOpen(const char *), *virNWFilterDefineXML(void *, const char *);
         char *virNWFilterGetXMLDesc(void *, unsigned int);
         int virNWFilterUndefine(void *), virGetLastErrorCode(void);
         int main(int count, char **words) {
             void *connect = virConnectOpen(words[1]);
             void *old = virNWFilterDefineXML(connect, \"<filter name='f'/>\");
             printf(\"undefined: %d\\n\", virNWFilterUndefine(old));
             printf(\"defined: %d\\n\", virNWFilterDefineXML(connect, \"<filter name='f'/>\") != 0);
             printf(\"described: %d\", virNWFilterGetXMLDesc(old, 0) != 0);
             printf(\" (%d)\\n\", virGetLastErrorCode());
             printf(\"undefined: %d\", virNWFilterUndefine(old));
             printf(\" (%d)\\n\", virGetLastErrorCode());
             return !connect;
         }",
    )?;
    let seen = |module| -> Result<String> {
        let host = Host::new()?;
        let (_dir, daemon) = libvirtd(&host, module)?;
        let output = client.command().arg(daemon.uri(Connect::Qemu)).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8(output.stderr)?);
        ensure!(daemon.dumpxml("f").is_ok(), "the new filter is gone");
        Ok(String::from_utf8(output.stdout)?)
    };
    assert_eq!(seen(Module::Ours)?, seen(Module::Libvirts)?);
    Ok(())
}

#[test]
fn an_error_names_the_line_that_dumpxml_shows() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let documents = Documents::new()?;
    let host = Host::new()?;
    let _tap = host.tap("tap0")?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    ensure!(see(&daemon, &documents, &["nwfilter-define", "@dangling"])?.0.succeeded);
    let (shown, _) = see(&daemon, &documents, &["nwfilter-dumpxml", "dangling"])?;
    let line = 1 + shown.stdout.lines().position(|line| line.contains("nothere")).context("no such line")?;
    let (_, stderr) = see(&daemon, &documents, &["nwfilter-binding-create", "@binding-dangling"])?;
    // The line of the UUID is left out of what is compared.
    let place = format!("(at /etc/libvirt/nwfilter/dangling.xml:{})", line + 1);
    ensure!(stderr.contains(&place), "{stderr}");
    Ok(())
}
