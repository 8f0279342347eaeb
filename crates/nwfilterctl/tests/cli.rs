//! The command line as scripts use it: outputs, exit codes, and errors that name the place.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nwfilter_testlab::{Host, Need, Tap, skip_unless};
use tempfile::TempDir;

/// Stores of its own, and files to work with.
struct Cli {
    dir: TempDir,
}

impl Cli {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn with(&self, command: Command, args: &[&str]) -> Output {
        let mut command = command;
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]);
        command.args(args).env_remove("RUST_LOG").output().unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        self.with(Command::new(env!("CARGO_BIN_EXE_nwfilterctl")), args)
    }

    fn run_on(&self, host: &Host, args: &[&str]) -> Output {
        self.with(host.command(env!("CARGO_BIN_EXE_nwfilterctl")), args)
    }
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "stdout: {}", String::from_utf8_lossy(&output.stdout));
    stderr(output)
}

const FILTER: &str = "<filter name='ssh'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='0x16'/></rule>
</filter>
";

const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='tap0'/>
  <mac address='52:54:00:7b:35:93'/>
  <filterref filter='ssh'><parameter name='IP' value='10.0.0.2'/></filterref>
</filterbinding>
";

#[test]
fn filters_are_defined_listed_shown_and_undefined() {
    let cli = Cli::new();
    cli.file("ssh.xml", FILTER);
    assert_eq!(stdout(&cli.run(&["define", "ssh.xml"])), "Network filter ssh defined from ssh.xml\n");
    let shown = stdout(&cli.run(&["dumpxml", "ssh"]));
    assert!(shown.starts_with("<filter name='ssh' chain='root'>\n  <uuid>"), "{shown}");
    assert!(shown.contains("    <tcp dstportstart='0x16'/>\n"), "{shown}");
    let listed = stdout(&cli.run(&["list"]));
    assert!(listed.lines().any(|line| line.contains("store") && line.ends_with("ssh")), "{listed}");
    assert!(listed.lines().any(|line| line.contains("stock") && line.ends_with("clean-traffic")), "{listed}");
    let json: serde_json::Value = serde_json::from_str(&stdout(&cli.run(&["list", "--json"]))).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 25);
    assert_eq!(stdout(&cli.run(&["undefine", "ssh"])), "Network filter ssh undefined\n");
    assert_eq!(
        refused(&cli.run(&["dumpxml", "ssh"])),
        "error: no filter is named 'ssh'\n  help: 'nwfilterctl list' shows the filters\n"
    );
    assert!(refused(&cli.run(&["undefine", "clean-traffic"])).contains("stock filter"));
}

#[test]
fn a_port_is_bound_listed_shown_and_released() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _tap: Tap = host.tap("tap0").unwrap();
    cli.file("ssh.xml", FILTER);
    cli.file("b.xml", BINDING);
    stdout(&cli.run_on(&host, &["define", "ssh.xml"]));
    let created = stdout(&cli.run_on(&host, &["binding-create", "b.xml"]));
    assert_eq!(created, "Network filter binding on tap0 created from b.xml\n");
    assert!(refused(&cli.run_on(&host, &["binding-create", "b.xml"])).contains("has a binding already"));
    assert!(stdout(&cli.run(&["binding-list"])).contains("tap0"));
    let json: serde_json::Value =
        serde_json::from_str(&stdout(&cli.run(&["binding-list", "--json"]))).unwrap();
    assert_eq!(json[0]["filter"], "ssh");
    let shown = stdout(&cli.run(&["binding-dumpxml", "tap0"]));
    assert!(shown.contains("<parameter name='MAC' value='52:54:00:7b:35:93'/>"), "{shown}");
    assert_eq!(stdout(&cli.run_on(&host, &["diff"])), "0 differences\n");
    let updated = stdout(&cli.run_on(
        &host,
        &["define", &cli.file("ssh2.xml", &FILTER.replace("0x16", "80")).display().to_string()],
    ));
    assert!(updated.trim_end().ends_with("1 port updated"), "{updated}");
    host.run(&["ebtables", "-t", "nat", "-F", "libvirt-I-tap0"]).unwrap();
    assert_eq!(cli.run_on(&host, &["diff"]).status.code(), Some(1));
    assert_eq!(stdout(&cli.run_on(&host, &["reload"])), "1 port brought back, 1 in all\n");
    stdout(&cli.run_on(&host, &["diff"]));
    stdout(&cli.run_on(&host, &["binding-delete", "tap0"]));
    assert!(host.saved().unwrap().port("tap0").is_empty());
}

#[test]
fn a_port_without_interface_or_bridge_is_not_listed_as_filtered_and_warned_of() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _tap: Tap = host.tap("tap0").unwrap();
    host.ip(&["tuntap add dev tap1 mode tap"]).unwrap();
    for port in ["tap0", "tap1", "tap2"] {
        cli.file(&format!("run/{port}.xml"), &BINDING.replace("tap0", port).replace("'ssh'", "'allow-arp'"));
    }
    let list = stdout(&cli.run_on(&host, &["binding-list", "--json"]));
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let states: Vec<_> = (0..3).map(|port| list[port]["address"]["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["filtered", "unbridged", "absent"]);
    let table = stdout(&cli.run_on(&host, &["binding-list"]));
    let rows: Vec<_> = table.lines().skip(2).collect();
    assert_eq!(
        rows,
        [
            " tap0              allow-arp",
            " tap1              allow-arp                  not filtered: in no bridge",
            " tap2              allow-arp                  not filtered: no such interface",
        ]
    );
    stdout(&cli.run_on(&host, &["binding-delete", "tap1"]));
    let file = cli.file("b.xml", &BINDING.replace("tap0", "tap1").replace("'ssh'", "'allow-arp'"));
    let created = cli.run_on(&host, &["binding-create", file.to_str().unwrap()]);
    let warning =
        "warning: tap1: is in no bridge, so its rules see none of its packets until it is put into one\n";
    assert_eq!(stderr(&created), warning);
    stdout(&created);
    stdout(&cli.run_on(&host, &["reload"]));
    let diff = cli.run_on(&host, &["diff"]);
    assert!(stdout(&diff).starts_with("0 differences") && stderr(&diff).starts_with(warning), "{diff:?}");
}

#[test]
fn a_reload_names_the_ports_that_it_cannot_bring_in_and_brings_in_the_others() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _taps: [Tap; 2] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    cli.file("etc/ssh.xml", FILTER);
    cli.file("run/tap0.xml", BINDING);
    cli.file("run/tap1.xml", &BINDING.replace("tap0", "tap1").replace("'ssh'", "'lost'"));
    let reloaded = cli.run_on(&host, &["reload"]);
    let told = refused(&reloaded);
    assert_eq!(String::from_utf8_lossy(&reloaded.stdout), "2 ports brought back, 2 in all\n");
    let expected = "error: port 'tap1' does not get filter 'lost' but a drop of everything\n  because: ";
    assert!(told.starts_with(expected) && told.contains("no filter is named 'lost'"), "{told}");
    let told = refused(&cli.run_on(&host, &["diff"]));
    assert!(told.contains("port 'tap1' does not get filter 'lost' but the rules it has"), "{told}");
    assert!(host.saved().unwrap().port("tap0").iptables.contains("--dport 22"));
    fs::remove_file(cli.dir.path().join("run/tap1.xml")).unwrap();
    cli.file("run/tap9.xml", &BINDING.replace("tap0", "tap9"));
    for (verb, expected) in [("diff", "0 differences\n"), ("reload", "0 ports brought back, 2 in all\n")] {
        let output = cli.run_on(&host, &[verb]);
        assert_eq!(stdout(&output), expected);
        assert_eq!(
            stderr(&output),
            "warning: port 'tap1' has rules but no binding here; they are left as they are\n\
             warning: port 'tap9' has a binding, but there is no network interface of that name\n"
        );
    }
}

#[test]
fn damaged_files_are_reported_on_stderr_and_moved_by_verbs_that_write() {
    let cli = Cli::new();
    cli.file("f.xml", FILTER);
    let broken = cli.file("etc/broken.xml", "<filter name='broken'>");
    let told = stderr(&cli.run(&["list"]));
    assert!(told.contains("etc/broken.xml is damaged and ignored:"), "{told}");
    assert!(broken.exists());
    stdout(&cli.run(&["define", "f.xml"]));
    assert!(!broken.exists());
    for verb in ["list", "binding-list", "list"] {
        let told = stderr(&cli.run(&[verb]));
        assert_eq!(told, "warning: etc/broken.xml.damaged is damaged and was moved aside\n");
    }
}

#[test]
fn for_a_port_whose_binding_is_damaged_the_port_of_another_guest_is_not_proposed() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _taps = ["tap0", "tap1"].map(|port| {
        let tap = host.tap(port).unwrap();
        cli.file("b.xml", &BINDING.replace("tap0", port).replace("'ssh'", "'clean-traffic'"));
        stdout(&cli.run_on(&host, &["binding-create", "b.xml"]));
        tap
    });
    cli.file("run/tap1.xml", "<filterbinding>");
    // The first time it is moved aside.
    for _ in 0..2 {
        let said = refused(&cli.run_on(&host, &["binding-delete", "tap1"]));
        assert!(said.contains("its binding is damaged: see run/tap1.xml.damaged;"), "{said}");
        assert!(!said.contains("tap0"), "{said}");
    }
}

#[test]
fn damaged_files_of_libvirts_own_store_stay_where_they_are_until_their_name_is_taken() {
    skip_unless!(Need::Root, Need::Tool("unshare"), Need::Tool("mount"));
    skip_unless!(Need::Libvirtd); // Its directory has to be there.
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    cli.file("f.xml", FILTER);
    // A mount namespace of its own, in which libvirt's directory is empty.
    let script = "mount --make-rprivate / && mount -t tmpfs tmpfs /etc/libvirt && mkdir /etc/libvirt/nwfilter \
                  && cd /etc/libvirt/nwfilter && echo '<filter' > other.xml && echo '<filter' > ssh.xml \
                  && \"$0\" --config-dir $PWD --state-dir /etc/libvirt/state define \"$1\" && ls";
    let mut command = host.command("unshare");
    command
        .args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_nwfilterctl")])
        .arg(cli.dir.path().join("f.xml"));
    let listed = stdout(&command.output().unwrap());
    let files: Vec<_> = listed.lines().skip(1).collect();
    assert_eq!(files, ["other.xml", "ssh.xml", "ssh.xml.damaged"]);
}

#[test]
fn several_documents_are_taken_together_or_not_at_all() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _taps: [Tap; 2] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    cli.file("ssh.xml", FILTER);
    cli.file("web.xml", &FILTER.replace("'ssh'", "'web'").replace("0x16", "80"));
    cli.file("b0.xml", BINDING);
    cli.file("b1.xml", &BINDING.replace("tap0", "tap1").replace("'ssh'", "'web'"));
    assert!(refused(&cli.run_on(&host, &["define", "ssh.xml", "b0.xml"])).contains("b0.xml:1:1"));
    stdout(&cli.run_on(&host, &["define", "ssh.xml"]));
    assert!(refused(&cli.run_on(&host, &["binding-create", "b0.xml", "b1.xml"])).contains("'web'"));
    assert!(host.saved().unwrap().port("tap0").is_empty());
    assert_eq!(
        stdout(&cli.run_on(&host, &["define", "web.xml", "ssh.xml"])),
        "Network filter web defined from web.xml\nNetwork filter ssh defined from ssh.xml\n"
    );
    assert_eq!(
        stdout(&cli.run_on(&host, &["binding-create", "b0.xml", "b1.xml"])),
        "Network filter binding on tap0 created from b0.xml\nNetwork filter binding on tap1 created from b1.xml\n"
    );
    let updated = stdout(&cli.run_on(&host, &["define", "web.xml", "ssh.xml"]));
    assert!(updated.ends_with("from ssh.xml\n"), "nothing has changed: {updated}");
}

#[test]
fn bad_documents_are_refused_with_file_line_and_column() {
    let cli = Cli::new();
    for (text, expected) in [
        ("<filter name='f'>\n  <rule></filter>", "bad.xml:2:"),
        (
            "<filter name='f'>\n  <rule action='acept' direction='in'/>\n</filter>",
            "bad.xml:2:17: error[NWF0020]: unknown action 'acept'",
        ),
        (
            "<filter name='f'>\n  <rule action='accept'/>\n</filter>",
            "bad.xml:2:3: error[NWF0011]: <rule> has no attribute 'direction'",
        ),
        ("<filter/>", "bad.xml:1:1: error[NWF0011]: <filter> has no attribute 'name'"),
        ("<filter name='../x'/>", "bad.xml:1:15: error[NWF0013]: '../x' cannot be a filter name"),
        ("<filter name='a&#9;b'/>", "bad.xml:1:15: error[NWF0013]: 'a\\tb' cannot be a filter name"),
    ] {
        cli.file("bad.xml", text);
        let message = refused(&cli.run(&["define", "bad.xml"]));
        assert!(message.starts_with("error: ") && message.contains(expected), "{message}");
        refused(&cli.run(&["check", "bad.xml"]));
    }
    let without_mac = BINDING.replace("  <mac address='52:54:00:7b:35:93'/>\n", "");
    cli.file("bad.xml", &without_mac);
    let message = refused(&cli.run(&["binding-create", "bad.xml"]));
    assert!(message.contains("bad.xml:1:1: error[NWF0012]: the binding has no <mac address=…>"), "{message}");
    assert!(refused(&cli.run(&["define", "nosuch.xml"])).contains("cannot read nosuch.xml"));
    assert!(!cli.dir.path().join("etc").exists(), "nothing was changed");
}

#[test]
fn a_filter_is_found_by_its_uuid_and_several_are_undefined_together_or_not_at_all() {
    let cli = Cli::new();
    cli.file("ssh.xml", FILTER);
    cli.file("web.xml", &FILTER.replace("'ssh'", "'web'").replace("0x16", "80"));
    let defined = stdout(&cli.run(&["define", "ssh.xml", "web.xml", "--json"]));
    let defined: serde_json::Value = serde_json::from_str(&defined).unwrap();
    assert_eq!(defined["filters"][1]["name"], "web");
    let uuid = defined["filters"][0]["uuid"].as_str().unwrap();
    assert_eq!(stdout(&cli.run(&["dumpxml", uuid])), stdout(&cli.run(&["dumpxml", "ssh"])));
    assert!(refused(&cli.run(&["undefine", uuid, "nosuch"])).contains("no filter is named 'nosuch'"));
    assert_eq!(
        stdout(&cli.run(&["undefine", uuid, "web"])),
        "Network filter ssh undefined\nNetwork filter web undefined\n"
    );
    assert!(refused(&cli.run(&["dumpxml", uuid])).contains("no filter is named"));
}

#[test]
fn a_document_may_come_from_standard_input() {
    let cli = Cli::new();
    let with_input = |args: &[&str], text: &str| {
        let file = fs::File::open(cli.file("input", text)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.stdin(file);
        cli.with(command, args)
    };
    assert_eq!(stdout(&with_input(&["define", "-"], FILTER)), "Network filter ssh defined from <stdin>\n");
    assert!(stdout(&with_input(&["fmt", "-"], BINDING)).starts_with("<filterbinding>"));
    let wrong = refused(&with_input(&["check", "-"], &FILTER.replace("accept", "acept")));
    assert!(wrong.starts_with("<stdin>:3:17: error[NWF0020]"), "{wrong}");
}

#[test]
fn users_lists_filters_and_ports_that_use_a_filter() {
    let cli = Cli::new();
    cli.file("etc/ssh.xml", FILTER);
    cli.file("etc/all.xml", "<filter name='all'><filterref filter='ssh'/></filter>");
    cli.file("etc/other.xml", "<filter name='other'/>");
    cli.file("run/tap0.xml", &BINDING.replace("'ssh'", "'all'"));
    let users = |name: &str| {
        let text = stdout(&cli.run(&["users", name, "--json"]));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    assert_eq!(
        users("ssh"),
        serde_json::json!({
            "filters": [{"name": "all", "direct": true}],
            "ports": [{"port": "tap0", "filter": "all", "owner": "vm"}],
        })
    );
    assert_eq!(users("allow-incoming-ipv4")["filters"].as_array().unwrap().len(), 3);
    assert_eq!(users("other"), serde_json::json!({"filters": [], "ports": []}));
    let table = stdout(&cli.run(&["users", "clean-traffic"]));
    assert!(table.contains(" filter   ssh                        itself\n"), "{table}");
    assert!(table.contains(" filter   all                        other filters\n"), "{table}");
    assert!(refused(&cli.run(&["users", "nosuch"])).contains("no filter is named"));
}

#[test]
fn edit_defines_what_the_editor_leaves_and_keeps_what_is_refused() {
    let cli = Cli::new();
    cli.file("etc/ssh.xml", FILTER);
    let edit = |editor: &str, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.env("EDITOR", editor).env_remove("VISUAL").stdin(std::process::Stdio::null());
        command.env("TMPDIR", cli.dir.path());
        cli.with(command, &[&["edit", "ssh"], args].concat())
    };
    assert_eq!(stdout(&edit("true", &[])), "Network filter ssh not changed\n");
    let done = edit("sed -i s/0x16/0x17/", &[]);
    assert_eq!(stdout(&done), "Network filter ssh defined from the editor\n");
    assert!(stdout(&cli.run(&["dumpxml", "ssh"])).contains("dstportstart='0x17'"));
    let told = refused(&edit("sed -i s/tcp/tpc/", &[]));
    assert!(told.starts_with("error: edited:") && told.contains("did you mean"), "{told}");
    let kept = told.trim_end().rsplit_once(' ').unwrap().1;
    assert!(fs::read_to_string(kept).unwrap().contains("<tpc "), "{kept}");
    assert!(stdout(&cli.run(&["dumpxml", "ssh"])).contains("<tcp "));
    assert!(refused(&edit("false", &[])).contains("the editor 'false' failed"));
    assert!(refused(&edit("no-such-editor", &[])).contains("cannot run the editor"));
}

#[test]
fn status_shows_filters_ports_and_kernel() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _tap: Tap = host.tap("tap0").unwrap();
    cli.file("ssh.xml", FILTER);
    cli.file("b0.xml", BINDING);
    cli.file("run/tap1.xml", &BINDING.replace("tap0", "tap1"));
    stdout(&cli.run_on(&host, &["define", "ssh.xml"]));
    stdout(&cli.run_on(&host, &["binding-create", "b0.xml"]));
    assert_eq!(
        stdout(&cli.run_on(&host, &["status"])),
        "Backend   xtables
Filters   1 in etc, 24 stock
Ports     2 in run: 1 absent, 1 filtered
Kernel    as it should be

 Port Dev          Guest             Filter                 Address
------------------------------------------------------------------------
 tap0              vm                ssh
 tap1              vm                ssh                    not filtered: no such interface
"
    );
    host.run(&["iptables", "-D", "FORWARD", "1"]).unwrap();
    let output = cli.run_on(&host, &["status", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(status["differences"].as_u64() > Some(0) && status["backend"] == "xtables", "{status:#}");
    assert_eq!(status["ports"][1]["address"]["state"], "absent");
}

#[test]
fn plan_shows_what_a_change_would_do_and_changes_nothing() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (cli, host) = (Cli::new(), Host::new().unwrap());
    let _taps: [Tap; 2] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    cli.file("ssh.xml", FILTER);
    cli.file("web.xml", &FILTER.replace("0x16", "80"));
    cli.file("b0.xml", BINDING);
    cli.file("b1.xml", &BINDING.replace("tap0", "tap1"));
    let plan = |args: &[&str]| stdout(&cli.run_on(&host, &[&["plan"], args].concat()));
    assert_eq!(
        plan(&["define", "ssh.xml"]),
        "stores: filter 'ssh' defined\nwould write 0 rules and remove 0 rules; nothing was changed\n"
    );
    assert!(!cli.dir.path().join("etc").exists());
    stdout(&cli.run_on(&host, &["define", "ssh.xml"]));
    stdout(&cli.run_on(&host, &["binding-create", "b0.xml"]));
    let (kernel, stored) = (host.saved().unwrap(), fs::read(cli.dir.path().join("etc/ssh.xml")).unwrap());

    let planned = plan(&["define", "web.xml"]);
    let has = |sign: char, port: u16| {
        let is_such = |line: &str| line.starts_with(sign) && line.contains(&format!("--dport {port} "));
        planned.lines().any(is_such)
    };
    assert!(has('+', 80) && has('-', 22) && !has('-', 80), "{planned}");
    assert!(
        planned.starts_with("stores: filter 'ssh' defined\n") && planned.contains("(ssh:3)"),
        "{planned}"
    );
    assert_eq!(plan(&["reload"]), "would write 0 rules and remove 0 rules; nothing was changed\n");
    let planned = plan(&["binding-create", "b1.xml", "--json"]);
    let planned: serde_json::Value = serde_json::from_str(&planned).unwrap();
    assert_eq!(planned["stores"], serde_json::json!(["port 'tap1' bound"]));
    assert!(planned["rules"].as_array().unwrap().iter().all(|rule| rule["kind"] == "missing"));
    let deleted = stdout(&cli.run_on(&host, &["binding-delete", "tap0", "--dry-run"]));
    assert!(deleted.starts_with("stores: port 'tap0' unbound\n- "), "{deleted}");
    assert!(refused(&cli.run_on(&host, &["plan", "undefine", "ssh"])).contains("in use by tap0"));
    assert_eq!(cli.run(&["list", "--dry-run"]).status.code(), Some(2));
    assert_eq!(host.saved().unwrap().diff(&kernel), None);
    assert_eq!(fs::read(cli.dir.path().join("etc/ssh.xml")).unwrap(), stored);
    assert!(!cli.dir.path().join("run/tap1.xml").exists());
}

#[test]
fn the_reference_names_every_verb() {
    let help = stdout(&Cli::new().run(&["--help"]));
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let lines = commands.lines().take_while(|line| !line.is_empty());
    let verbs: Vec<_> = lines.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(verbs.contains(&"binding-create") && verbs.contains(&"users"), "{verbs:?}");
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/commands.md");
    let reference = fs::read_to_string(reference).unwrap();
    for verb in verbs.into_iter().filter(|verb| *verb != "help") {
        let is_named =
            reference.contains(&format!("| `{verb}`")) || reference.contains(&format!("| `{verb} "));
        assert!(is_named, "docs/commands.md has no row of {verb}");
    }
}

#[test]
fn the_manual_page_of_each_verb_has_an_example() {
    let cli = Cli::new();
    assert!(cli.run(&["manuals", "out"]).status.success());
    let help = stdout(&cli.run(&["--help"]));
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let lines = commands.lines().take_while(|line| !line.is_empty());
    let verbs: Vec<_> = lines.filter_map(|line| line.split_whitespace().next()).collect();
    for verb in verbs.into_iter().filter(|verb| *verb != "help") {
        let page = fs::read_to_string(cli.dir.path().join(format!("out/man/nwfilterctl-{verb}.8"))).unwrap();
        assert!(page.contains("\n.SH EXAMPLES\n"), "src/manuals/examples.rs has no example of {verb}");
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    let cli = Cli::new();
    assert_eq!(cli.run(&["defin"]).status.code(), Some(2));
    assert_eq!(cli.run(&["define"]).status.code(), Some(2));
}

#[cfg(feature = "listen")]
#[test]
fn the_listener_names_itself() {
    let version = Command::new(env!("CARGO_BIN_EXE_nwfilterctl-listen")).arg("--version").output().unwrap();
    assert_eq!(stdout(&version), format!("nwfilterctl-listen {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn check_finds_every_mistake_in_a_directory() {
    let cli = Cli::new();
    for number in 0..100 {
        let text = match number {
            7 => FILTER.replace("accept", "accpt"),
            42 => FILTER.replace("0x16", "0x16x"),
            99 => FILTER.replace("</rule>", ""),
            _ => FILTER.to_owned(),
        };
        cli.file(&format!("filters/{number:03}.xml"), &text);
    }
    let message = refused(&cli.run(&["check", "filters"]));
    for file in ["filters/007.xml:3:", "filters/042.xml:3:", "filters/099.xml:"] {
        assert!(message.contains(file), "{message}");
    }
    let output = cli.run(&["check", "filters", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let files: std::collections::BTreeSet<_> =
        json.as_array().unwrap().iter().map(|problem| problem["file"].as_str().unwrap()).collect();
    assert_eq!(
        files.into_iter().collect::<Vec<_>>(),
        ["filters/007.xml", "filters/042.xml", "filters/099.xml"]
    );
    stdout(&cli.run(&["check", "filters/000.xml"]));
}

#[test]
fn warnings_fail_a_strict_check_only() {
    let cli = Cli::new();
    cli.file("f.xml", &FILTER.replace("direction='in'", "direction='in' priority='9999'"));
    stdout(&cli.run(&["check", "f.xml"]));
    assert!(refused(&cli.run(&["check", "--strict", "f.xml"])).contains("priority is 500"));
}

#[test]
fn define_warns_about_what_it_ignores() {
    let cli = Cli::new();
    let file = cli.file("f.xml", &FILTER.replace("<rule ", "<rule prio='1' "));
    let output = cli.run(&["define", file.to_str().unwrap()]);
    assert!(stdout(&output).starts_with("Network filter ssh defined"));
    let said = stderr(&output);
    assert!(said.contains("warning[NWF0027]: <rule> has no attribute 'prio': it is ignored"), "{said}");
    let output = cli.run(&["define", cli.file("g.xml", FILTER).to_str().unwrap()]);
    assert_eq!((stdout(&output).is_empty(), stderr(&output).as_str()), (false, ""));
}

#[test]
fn fmt_prints_the_canonical_form_of_filters_and_bindings() {
    let cli = Cli::new();
    let filter = stdout(&cli.run(&["fmt", cli.file("f.xml", FILTER).to_str().unwrap()]));
    assert_eq!(
        filter,
        "<filter name='ssh' chain='root'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in' priority='500'>
    <tcp dstportstart='0x16'/>
  </rule>
</filter>
"
    );
    let binding = stdout(&cli.run(&["fmt", cli.file("b.xml", BINDING).to_str().unwrap()]));
    assert!(
        binding.contains("  <filterref filter='ssh'>\n    <parameter name='IP' value='10.0.0.2'/>\n"),
        "{binding}"
    );
}

#[test]
fn render_shows_the_rules_without_a_kernel() {
    let cli = Cli::new();
    cli.file("ssh.xml", FILTER);
    cli.file("b.xml", BINDING);
    stdout(&cli.run(&["define", "ssh.xml"]));
    let text = stdout(&cli.run(&["render", "--binding", "b.xml"]));
    assert!(text.contains("-A FO-tap0 -p tcp -m tcp --dport 22 "), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&stdout(&cli.run(&["render", "--binding", "b.xml", "--format", "json"])))
            .unwrap();
    assert!(json["ipv4"]["to_guest"][0]["origin"].as_str().unwrap().starts_with("ssh:"), "{json:#}");
}

#[test]
fn render_without_helpers_shows_none() {
    let cli = Cli::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-fixtures/seed/ftp-by-port.xml");
    stdout(&cli.run(&["define", fixture.to_str().unwrap()]));
    cli.file("b.xml", &BINDING.replace("'ssh'", "'ftp-by-port'"));
    let render = |args: &[&str]| stdout(&cli.run(&[&["render", "--binding", "b.xml"], args].concat()));
    let json = |args: &[&str]| serde_json::from_str::<serde_json::Value>(&render(args)).unwrap();
    assert!(render(&[]).contains("--helper ftp"));
    assert_eq!(json(&["--json"])["helpers"].as_array().unwrap().len(), 1);
    assert!(!render(&["--no-helpers"]).contains("--helper"));
    assert_eq!(json(&["--json", "--no-helpers"])["helpers"].as_array().unwrap().len(), 0);
}

#[test]
fn the_seed_and_stock_fixtures_pass_a_strict_check() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-fixtures");
    let cli = Cli::new();
    for directory in ["seed", "stock"] {
        stdout(&cli.run(&["check", "--strict", fixtures.join(directory).to_str().unwrap()]));
    }
}
