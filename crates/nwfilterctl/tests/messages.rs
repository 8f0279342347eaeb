//! Every verb with every kind of wrong input, in one snapshot: each message says what is wrong, where, and what to do.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write;
use std::fs;
use std::process::{Command, Stdio};

use insta::assert_snapshot;

const FILTER: &str = "<filter name='f'>\n  <rule action='drop' direction='inout'/>\n</filter>\n";

const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='vnet7'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/>
</filterbinding>
";

/// What was run, how it ended, and what it said.
fn transcript(dir: &std::path::Path, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
    command.current_dir(dir).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
    command.env_remove("RUST_LOG").env("EDITOR", "true").stdin(Stdio::null());
    let output = command.output().unwrap();
    let mut text = format!("$ nwfilterctl {}\n", args.join(" "));
    text += &String::from_utf8_lossy(&output.stdout);
    text += &String::from_utf8_lossy(&output.stderr);
    writeln!(text, "[exit code {}]\n", output.status.code().unwrap()).unwrap();
    text
}

#[test]
fn each_message_says_what_is_wrong_where_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
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
    let files = [
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
    let mut messages = String::new();
    for verb in ["check", "define", "binding-create"] {
        for file in files {
            messages += &transcript(path, &[verb, file]);
        }
    }
    for verb in [&["fmt"][..], &["plan", "define"], &["render", "--binding"]] {
        messages += &transcript(path, &[verb, &["missing.xml"]].concat());
        messages += &transcript(path, &[verb, &["other.xml"]].concat());
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
    for verb in ["binding-dumpxml", "binding-delete"] {
        messages += &transcript(path, &[verb, "vnet0"]);
    }
    messages += &transcript(path, &["defin"]);
    messages += &transcript(path, &["define"]);
    messages += &transcript(path, &["list", "--timeout", "soon"]);
    assert_snapshot!(messages);
}
