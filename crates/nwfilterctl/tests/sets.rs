//! The verbs about sets, with both backends.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::process::{Command, Output};

use nwfilter_testlab::{Host, Need, skip_unless};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Cli<'a> {
    dir: TempDir,
    host: &'a Host,
    backend: &'a str,
}

impl Cli<'_> {
    fn output(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).env_remove("RUST_LOG");
        command.args(["--config-dir", "etc", "--state-dir", "run", "--backend", self.backend]).args(args);
        self.host.enter(|| command.output()).unwrap()
    }

    fn run(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.dir.path().join(file), text).unwrap();
    }

    /// What the kernel has, whatever it is called there.
    fn kernel(&self) -> String {
        match self.backend {
            "nftables" => self.host.run(&["nft", "list", "set", "bridge", "nwfilter", "set-admins"]).unwrap(),
            _ => self.host.run(&["ipset", "save", "nwfilter-admins"]).unwrap(),
        }
    }
}

#[test]
fn sets_are_defined_changed_listed_and_removed() {
    skip_unless!(Need::Root, Need::Tool("nft"), Need::Tool("ipset"), Need::Tool("ebtables"));
    for backend in ["nftables", "xtables"] {
        let host = Host::new().unwrap();
        let cli = Cli { dir: tempfile::tempdir().unwrap(), host: &host, backend };
        let _tap = host.tap("tap0").unwrap();
        cli.write(
            "admins.xml",
            "<filterset name='admins' family='ipv4'><entry value='10.0.0.1'/><tag name='web'/></filterset>",
        );
        cli.write(
            "f.xml",
            "<filter name='f'><rule action='drop' direction='in' statematch='false'>\
             <all ipset='admins' ipsetflags='src'/></rule></filter>",
        );
        cli.write("b.xml", "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='52:54:00:00:00:01'/><filterref filter='f'>
             <parameter name='CTRL_TAGS' value='web'/><parameter name='IP' value='10.7.0.1'/></filterref></filterbinding>");
        assert_eq!(cli.run(&["set-define", "admins.xml"]), "Set admins defined: 1 entry, tag web\n");
        cli.run(&["define", "f.xml"]);
        cli.run(&["binding-create", "b.xml"]);
        assert!(cli.kernel().contains("10.7.0.1"), "{}", cli.kernel());
        let said = cli.run(&["set-add", "admins", "10.3.0.0/16", "10.4.0.1", "--comment", "branch"]);
        assert_eq!(said, "Set admins changed: 3 entries, tag web\n");
        assert!(
            cli.kernel().contains("10.3.0.0/16") && cli.kernel().contains("10.4.0.1"),
            "{}",
            cli.kernel()
        );
        assert_eq!(
            cli.run(&["set-dumpxml", "admins", "--resolved"]),
            "10.0.0.1\n10.3.0.0/16\n10.4.0.1\n10.7.0.1\n"
        );

        // All or nothing, and what is wrong is said.
        let kernel = cli.kernel();
        for (args, expected) in [
            (
                &["set-remove", "admins", "10.4.0.1", "10.3.0.1"][..],
                "'10.3.0.1' is no entry of its own, but a part of '10.3.0.0/16'",
            ),
            (
                &["set-add", "admins", "10.9.0.1", "fd00::1"],
                "set 'admins': 'fd00::1' is no entry of this set",
            ),
            (&["set-add", "admin", "10.9.0.1"], "no set is named 'admin'"),
            (&["set-undefine", "admins"], "set 'admins' is in use by filter 'f'"),
            (&["set-replace", "admins", "--file", "f.xml"], "f.xml:1: "),
        ] {
            let said = cli.refused(args);
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(cli.kernel(), kernel);
        let planned = cli.run(&["plan", "set-add", "admins", "10.9.0.1"]);
        assert!(
            planned.contains("stores: set 'admins' changed") && planned.contains("10.9.0.1"),
            "{planned}"
        );
        assert_eq!(cli.kernel(), kernel);

        cli.run(&["set-remove", "admins", "10.3.0.0/16"]);
        cli.write("new.txt", "# branches\n10.5.0.0/16\n10.6.0.1-10.6.0.4 # four\n");
        cli.run(&["set-replace", "admins", "--file", "new.txt"]);
        assert!(
            cli.kernel().contains("10.5.0.0/16") && !cli.kernel().contains("10.4.0.1"),
            "{}",
            cli.kernel()
        );
        let list: Value = serde_json::from_str(&cli.run(&["set-list", "--json"])).unwrap();
        let expected = json!([{"name": "admins", "family": "ipv4", "entries": 2, "includes": [], "tags": ["web"], "ranges": 3}]);
        assert_eq!(list, expected);
        assert!(cli.run(&["set-list"]).contains("admins"));
        assert!(cli.run(&["status"]).contains("Sets      1 in etc/sets"));
        cli.run(&["diff"]);

        cli.run(&["binding-delete", "tap0"]);
        cli.run(&["undefine", "f"]);
        assert_eq!(cli.run(&["set-undefine", "admins"]), "Set admins undefined\n");
        assert_eq!(cli.run(&["set-list", "--json"]), "[]\n");
    }
}

#[test]
fn connections_that_a_change_refuses_are_ended_where_that_is_asked_for() {
    use nwfilter_testlab::frames::{self, tcp_flags};
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ipset"), Need::Tool("ebtables"));
    let host = Host::new().unwrap();
    let cli = Cli { dir: tempfile::tempdir().unwrap(), host: &host, backend: "xtables" };
    let (guest, peer) = (host.tap("tap0").unwrap(), host.tap("tap1").unwrap());
    cli.write(
        "admins.xml",
        "<filterset name='admins' family='ipv4'><entry value='10.0.0.9'/><entry value='10.0.0.8'/></filterset>",
    );
    cli.write(
        "f.xml",
        "<filter name='f'><rule action='accept' direction='inout' priority='100'><all state='ESTABLISHED'/></rule>
         <rule action='accept' direction='in'><tcp ipset='admins' ipsetflags='src' state='NEW'/></rule>
         <rule action='drop' direction='inout' priority='900'><all/></rule></filter>",
    );
    let binding = |parameter: &str| {
        format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='52:54:00:00:00:02'/><filterref filter='f'>{parameter}</filterref></filterbinding>"
        )
    };
    cli.write("b.xml", &binding("<parameter name='IP' value='10.0.0.2'/>"));
    cli.write("anonymous.xml", &binding(""));
    cli.run(&["set-define", "admins.xml"]);
    cli.run(&["define", "f.xml"]);
    cli.run(&["binding-create", "b.xml", "--cut"]);
    let ends = nwfilter_testlab::Ends::v4(
        "52:54:00:00:00:09".parse().unwrap(),
        "10.0.0.9".parse().unwrap(),
        "52:54:00:00:00:02".parse().unwrap(),
        "10.0.0.2".parse().unwrap(),
    );
    let open = frames::tcp_segment(&ends, (1009, 22), (1, 0), tcp_flags::SYN, &[]);
    let answer = tcp_flags::SYN | tcp_flags::ACK;
    let answer = frames::tcp_segment(&ends.reverse(), (22, 1009), (1, 2), answer, &[]);
    assert!(peer.delivers(&guest, &open).unwrap() && guest.delivers(&peer, &answer).unwrap());
    let said = cli.run(&["set-remove", "admins", "10.0.0.9", "--cut"]);
    assert_eq!(
        said,
        "Set admins changed: 1 entry\nConnection ended on tap0: tcp 10.0.0.9:1009 → 10.0.0.2:22\n"
    );
    let told: Value =
        serde_json::from_str(&cli.run(&["--json", "set-define", "admins.xml", "--cut"])).unwrap();
    assert_eq!(told["cut"], json!({"ended": [], "failures": []}));

    // The change is made although not all can be ended.
    cli.run(&["binding-delete", "tap0"]);
    cli.run(&["binding-create", "anonymous.xml"]);
    let said = cli.refused(&["set-remove", "admins", "10.0.0.9", "--cut"]);
    assert!(said.contains("port 'tap0': its connections are not known"), "{said}");
    assert!(cli.run(&["set-dumpxml", "admins"]).contains("10.0.0.8"));
    assert!(!cli.run(&["set-dumpxml", "admins"]).contains("10.0.0.9"));
}

#[test]
fn a_reload_fails_for_a_set_that_the_kernel_refuses_and_brings_in_the_others() {
    skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ipset"), Need::Tool("ebtables"));
    let host = Host::new().unwrap();
    let cli = Cli { dir: tempfile::tempdir().unwrap(), host: &host, backend: "xtables" };
    for name in ["admins", "others"] {
        cli.write(
            "s.xml",
            &format!("<filterset name='{name}' family='ipv4'><entry value='10.0.0.9'/></filterset>"),
        );
        cli.run(&["set-define", "s.xml"]);
    }
    // Somebody puts a set of another type in the place of one, and uses it.
    host.run(&["ipset", "destroy"]).unwrap();
    host.run(&["ipset", "create", "nwfilter-others", "bitmap:port", "range", "0-9"]).unwrap();
    host.run(&["iptables", "-A", "INPUT", "-m", "set", "--match-set", "nwfilter-others", "src"]).unwrap();
    let said = cli.refused(&["reload"]);
    assert!(said.contains("error: set 'others' does not hold in the kernel what it must"), "{said}");
    let output = cli.output(&["reload", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["failed_sets"][0]["set"], json!("others"), "{told}");
    assert!(cli.kernel().contains("10.0.0.9"));
}

#[test]
fn what_is_lost_with_libvirts_driver_is_said_on_its_stores_before() {
    skip_unless!(
        Need::Root,
        Need::Libvirtd,
        Need::Tool("unshare"),
        Need::Tool("ebtables"),
        Need::Tool("ipset")
    );
    let host = Host::new().unwrap();
    // libvirt's own directories are hidden by empty ones.
    let script = r#"set -e
        mount --make-rprivate /; mount -t tmpfs none /etc/libvirt; mount -t tmpfs none /run
        mkdir -p /etc/libvirt/nwfilter /run/libvirt/nwfilter-binding
        ctl() { "$0" --config-dir /etc/libvirt/nwfilter --state-dir /run/libvirt/nwfilter-binding "$@" 2>&1; }
        ctl reload
        echo "<filterset name='admins' family='ipv4'/>" | ctl set-define -
        ctl status; ctl --dispatch list reload"#;
    let said = host.run(&["unshare", "-m", "sh", "-c", script, env!("CARGO_BIN_EXE_nwfilterctl")]).unwrap();
    let note = "libvirt's own driver does not know the 1 set in /etc/libvirt/nwfilter/sets";
    assert_eq!(said.matches(note).count(), 2, "{said}");
    assert!(said.contains(&format!("warning: {note}")), "{said}");
}
