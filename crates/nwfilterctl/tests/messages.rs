//! Every verb with every kind of wrong input, in one snapshot: each message says what is wrong, where, and what to do.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use insta::assert_snapshot;
use nix::fcntl::{Flock, FlockArg};
use nwfilter_testlab::{Host, Need, skip_unless};

const FILTER: &str = "<filter name='f'>\n  <rule action='drop' direction='inout'/>\n</filter>\n";

const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='vnet7'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/>
</filterbinding>
";

/// What was run, how it ended, and what it said.
fn transcript(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
    command.args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
    shown(args, &ended(dir, command))
}

fn ended(dir: &Path, mut command: Command) -> Output {
    command.current_dir(dir).env_remove("RUST_LOG").env_remove("VISUAL").env("EDITOR", "true");
    command.stdin(Stdio::null()).output().unwrap()
}

fn shown(args: &[&str], output: &Output) -> String {
    let mut text = format!("$ nwfilterctl {}\n", args.join(" "));
    text += &String::from_utf8_lossy(&output.stdout);
    text += &String::from_utf8_lossy(&output.stderr);
    writeln!(text, "[exit code {}]\n", output.status.code().unwrap()).unwrap();
    assert!(
        !text.contains("os error")
            && !text.contains(".nwfilter-")
            && !text.contains("Error {")
            && !text.contains("Some("),
        "{text}"
    );
    text
}

/// Files that are not as they should be, and one that is.
const FILES: [&str; 9] = [
    "missing.xml",
    "empty.xml",
    "binary.xml",
    "utf16.xml",
    "latin1.xml",
    "truncated.xml",
    "other.xml",
    "directory",
    "crlf.xml",
];

fn write_files(path: &Path) {
    let utf16: Vec<u8> = FILTER.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (name, content) in [
        ("empty.xml", &b""[..]),
        ("binary.xml", b"\x7fELF\x02\x01\x01\0\0\0"),
        ("utf16.xml", &[b"\xff\xfe", &utf16[..]].concat()),
        ("latin1.xml", b"<filter name='f\xfcr'/>"),
        ("crlf.xml", FILTER.replace('\n', "\r\n").as_bytes()),
        ("truncated.xml", &FILTER.as_bytes()[..30]),
        ("other.xml", b"<network><name>default</name></network>"),
    ] {
        fs::write(path.join(name), content).unwrap();
    }
    fs::create_dir(path.join("directory")).unwrap();
    fs::write(path.join("directory/in.xml"), "<filter name='in'/>").unwrap();
}

#[test]
fn each_message_says_what_is_wrong_where_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    write_files(path);
    let mut messages = String::new();
    let verbs: [&[&str]; 8] = [
        &["check"],
        &["define"],
        &["binding-create"],
        &["fmt"],
        &["render", "--binding"],
        &["explain", "in", "tcp", "to", ":80", "--binding"],
        &["import"],
        &["plan", "define"],
    ];
    for verb in verbs {
        for file in FILES {
            messages += &transcript(path, &[verb, &[file]].concat());
        }
    }
    for verb in ["dumpxml", "users", "edit", "undefine"] {
        messages += &transcript(path, &[verb, "nosuch"]);
    }
    messages += &transcript(path, &["dumpxml", "clean-trafic"]);
    messages += &transcript(path, &["undefine", "clean-traffic"]);
    fs::create_dir_all(path.join("run")).unwrap();
    fs::write(path.join("run/vnet7.xml"), BINDING).unwrap();
    messages += &transcript(path, &["define", "run/vnet7.xml"]);
    messages += &transcript(path, &["binding-create", "run/vnet7.xml"]);
    messages += &transcript(path, &["undefine", "f"]);
    messages += &transcript(path, &["binding-dumpxml", "vnet"]);
    fs::remove_file(path.join("run/vnet7.xml")).unwrap();
    messages += &transcript(path, &["undefine", "f"]);
    for verb in ["binding-dumpxml", "binding-delete", "explain"] {
        messages += &transcript(path, &[verb, "vnet0"]);
    }
    messages += &transcript(path, &["export", "nodir/all.json"]);
    messages += &transcript(path, &["export", "directory"]);
    fs::write(path.join("etc/damaged.xml"), "<filter").unwrap();
    messages += &transcript(path, &["export", "all.json"]);
    messages += &transcript(path, &["binding-list", "-q"]);
    messages += &transcript(path, &["defin"]);
    messages += &transcript(path, &["define"]);
    messages += &transcript(path, &["list", "--timeout", "soon"]);
    messages += &transcript(path, &["list", "--dry-run"]);
    messages += &transcript(path, &["list", "--backend", "iptables"]);
    assert_snapshot!(messages);
}

/// Runs it in the namespace of a host, after the shell commands `before` in mounts of its own.
fn on_host(host: &Host, dir: &Path, before: &str, args: &[&str]) -> String {
    let script = format!("{before}\nexec \"$0\" --config-dir etc --state-dir run \"$@\"");
    let mut command = host.command("unshare");
    command.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_nwfilterctl")]).args(args);
    shown(args, &ended(dir, command))
}

#[test]
fn each_message_about_the_host_names_what_is_missing_and_what_to_do() {
    const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (host, dir) = (Host::new().unwrap(), tempfile::tempdir().unwrap());
    let path = dir.path();
    let _tap = host.tap("tap0").unwrap();
    fs::write(path.join("f.xml"), FILTER).unwrap();
    for port in ["tap0", "tap1", "eth77"] {
        fs::write(path.join(format!("{port}.xml")), BINDING.replace("vnet7", port)).unwrap();
    }
    let mut messages = String::new();
    let mut add = |heading: &str, text: &str| write!(messages, "==== {heading} ====\n\n{text}").unwrap();
    add("a filter that does not exist", &on_host(&host, path, "", &["binding-create", "tap0.xml"]));
    on_host(&host, path, "", &["define", "f.xml"]);
    add("no such port", &on_host(&host, path, "", &["binding-create", "tap1.xml"]));
    add("no such port, nor one like it", &on_host(&host, path, "", &["binding-create", "eth77.xml"]));

    let no_tools = "mount -t tmpfs none /usr/sbin";
    for args in [&["binding-create", "tap0.xml"][..], &["diff"], &["reload"], &["status"]] {
        add("no tools", &on_host(&host, path, no_tools, args));
    }
    let full = "mount -t tmpfs -o size=4k none etc && head -c 4096 /dev/zero > etc/full";
    add("full disk", &on_host(&host, path, full, &["define", "f.xml"]));
    add("full disk", &on_host(&host, path, full, &["export", "etc/all.json"]));
    let read_only = "mount -t tmpfs -o ro none etc";
    add("read-only", &on_host(&host, path, read_only, &["define", "f.xml"]));

    let lock = Flock::lock(File::create(path.join("run/.lock")).unwrap(), FlockArg::LockExclusive).unwrap();
    let locked = on_host(&host, path, "", &["undefine", "f", "--timeout", "0"]);
    let holder = locked.split_once("held by ").unwrap().1;
    let holder = holder.split_once(')').map_or(holder, |(holder, _)| holder).to_owned() + ")";
    add("locked", &locked.replace(&holder, "PROGRAM (process NUMBER)"));
    drop(lock);

    let program = path.join("nwfilterctl");
    assert!(
        Command::new("cp").arg(env!("CARGO_BIN_EXE_nwfilterctl")).arg(&program).status().unwrap().success()
    );
    for public in [path, &program, &path.join("etc"), &path.join("run")] {
        fs::set_permissions(public, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(path.join("etc/f.xml"), fs::Permissions::from_mode(0o600)).unwrap();
    for args in [&["list"][..], &["define", "f.xml"], &["status"]] {
        let mut command = host.command("setpriv");
        command.args(NOBODY).arg(&program).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
        add("no root", &shown(args, &ended(path, command)));
    }
    fs::set_permissions(path.join("etc/f.xml"), fs::Permissions::from_mode(0o644)).unwrap();
    for args in [&["define", "f.xml"][..], &["binding-create", "tap0.xml"], &["reload"], &["diff"]] {
        let mut command = host.command("setpriv");
        command.args(NOBODY).arg(&program).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
        add("no root, stores that all may read", &shown(args, &ended(path, command)));
    }
    let messages = messages.replace(&path.display().to_string(), "DIR");
    assert_snapshot!(messages);
}
