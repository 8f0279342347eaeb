//! Documents that must not be taken, and what `check` says of several of them.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

use std::fs;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A directory with stores and documents in it.
struct Cli(TempDir);

impl Cli {
    fn new(files: &[(&str, &str)]) -> Self {
        let cli = Self(tempfile::tempdir().unwrap());
        files.iter().for_each(|(name, text)| cli.write(name, text.as_bytes()));
        cli
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.0.path()).args(["--config-dir", "etc", "--state-dir", "run"]);
        let Output { status, stdout, stderr } = command.args(args).env_remove("RUST_LOG").output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (status.code(), text(stdout), text(stderr))
    }

    fn refused(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, Some(1), "{stdout}{stderr}");
        stderr
    }
}

const MISTYPED_PROTOCOL: &str = "<filter name='web'>
  <rule action='accept' direction='in'><tpc dstportstart='80'/></rule>
</filter>";
const MISTYPED_PORT: &str = "<filter name='web'>
  <rule action='accept' direction='in'><tcp dstportstrt='80'/></rule>
</filter>";

#[test]
fn a_mistyped_protocol_or_attribute_of_one_is_refused_because_the_rule_would_match_more() {
    for (text, expected) in [
        (MISTYPED_PROTOCOL, ["NWF0021", "the rule would match every frame", "did you mean <tcp>?"]),
        (
            MISTYPED_PORT,
            ["NWF0022", "the rule would match more than is written", "did you mean 'dstportstart'?"],
        ),
    ] {
        let cli = Cli::new(&[("web.xml", text)]);
        for verb in ["define", "check", "fmt"] {
            let said = cli.refused(&[verb, "web.xml"]);
            assert!(said.contains("web.xml:2:"), "{said}");
            assert!(expected.iter().all(|expected| said.contains(expected)), "{said}");
        }
        assert!(!cli.0.path().join("etc/web.xml").exists());
    }
}

#[test]
fn as_libvirt_takes_a_mistyped_protocol_and_says_what_the_rule_matches() {
    let cli = Cli::new(&[("web.xml", MISTYPED_PROTOCOL)]);
    for verb in ["check", "define"] {
        let (code, _, stderr) = cli.run(&[verb, "--as-libvirt", "web.xml"]);
        assert_eq!(code, Some(0), "{stderr}");
        assert!(
            stderr.contains("warning[NWF0021]") && stderr.contains("the rule matches every frame"),
            "{stderr}"
        );
    }
    let (_, dumped, _) = cli.run(&["dumpxml", "web"]);
    assert!(dumped.contains("<rule action='accept' direction='in' priority='500'/>"), "{dumped}");
}

#[test]
fn check_reports_every_problem_of_every_file() {
    let cli = Cli::new(&[
        (
            "good.xml",
            "<filter name='good'><filterref filter='other'/><filterref filter='clean-traffic'/></filter>",
        ),
        ("other.xml", "<filter name='other'><filterref filter='stored'/></filter>"),
        ("etc/stored.xml", "<filter name='stored'/>"),
        ("wrong.xml", "<filter name='wrong'>\n  <rule action='acept' direction='im'/>\n</filter>"),
        ("lost.xml", "<filter name='lost'>\n  <filterref filter='clean-trafic'/>\n</filter>"),
        ("loop.xml", "<filter name='loop'>\n  <filterref filter='pool'/>\n</filter>"),
        (
            "pool.xml",
            "<filter name='pool'>\n  <rule action='drop' direction='in'/>\n  <filterref filter='loop'/>\n</filter>",
        ),
        ("self.xml", "<filter name='self'><filterref filter='self'/></filter>"),
        ("cut.xml", "<filter name='cut'>\n  <rule action='drop' direction='in'>\n"),
        ("empty.xml", ""),
        (
            "port.xml",
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
<portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/>
  <filterref filter='nosuch'/></filterbinding>",
        ),
        (
            "guest.xml",
            "<domain><name>vm</name><devices><interface type='bridge'>
  <filterref filter='nosuch'/></interface></devices></domain>",
        ),
    ]);
    cli.write("latin.xml", b"<filter name='caf\xe9'/>");
    let utf16: Vec<u8> = "<filter name='wide'/>".encode_utf16().flat_map(u16::to_le_bytes).collect();
    cli.write("wide.xml", &[&[0xff, 0xfe], &utf16[..]].concat());
    let files = [
        "good.xml",
        "missing.xml",
        "other.xml",
        "wrong.xml",
        "lost.xml",
        "loop.xml",
        "pool.xml",
        "self.xml",
        "cut.xml",
        "empty.xml",
        "latin.xml",
        "wide.xml",
        "port.xml",
        "guest.xml",
    ];
    let (code, stdout, stderr) = cli.run(&[&["check"], &files[..]].concat());
    assert_eq!(code, Some(1), "{stdout}{stderr}");
    for expected in [
        "missing.xml:1:1: error[NWF0047]: cannot be read: No such file or directory",
        "wrong.xml:2:17: error[NWF0020]: unknown action 'acept'",
        "wrong.xml:2:35: error[NWF0020]: unknown direction 'im'",
        "lost.xml:2:3: error[NWF0045]: no filter is named 'clean-trafic'",
        "did you mean 'clean-traffic'?",
        "loop.xml:2:3: error[NWF0046]: filter 'loop' includes itself: loop → pool → loop",
        "pool.xml:3:3: error[NWF0046]: filter 'pool' includes itself: pool → loop → pool",
        "self.xml:1:21: error[NWF0046]: filter 'self' includes itself: self → self",
        "cut.xml:2:38: error[NWF0007]: the document ends inside <rule>, which starts at 2:3",
        "empty.xml:1:1: error[NWF0008]: the document is empty",
        "latin.xml:1:18: error[NWF0009]: byte 0xe9 is not UTF-8: the document seems to be ISO-8859-1",
        "iconv -f ISO-8859-1 -t UTF-8",
        "wide.xml:1:1: error[NWF0009]: the document is UTF-16",
        "port.xml:3:3: error[NWF0045]: no filter is named 'nosuch'",
        "guest.xml:2:3: error[NWF0045]: no filter is named 'nosuch'",
    ] {
        assert!(stderr.contains(expected), "'{expected}' in:\n{stderr}");
    }
    for good in ["good.xml", "other.xml", "stored.xml"] {
        assert!(!stderr.contains(good), "{stderr}");
    }
    assert_eq!(stdout, "14 documents checked, 13 errors, 0 warnings\n");
    assert!(!cli.0.path().join("run").exists());
    let (code, ..) = cli.run(&["check", "good.xml", "other.xml"]);
    assert_eq!(code, Some(0));
}

#[test]
fn check_reports_a_filter_that_expands_to_more_than_a_port_can_have() {
    let twice = |n: usize| {
        format!("<filter name='f{n}'>{}</filter>", format!("<filterref filter='f{}'/>", n + 1).repeat(2))
    };
    let mut files: Vec<_> = (0..40).map(|n| (format!("f{n}.xml"), twice(n))).collect();
    files.push(("f40.xml".into(), "<filter name='f40'><rule action='drop' direction='in'/></filter>".into()));
    let cli = Cli::new(&[]);
    files.iter().for_each(|(name, text)| cli.write(&format!("tree/{name}"), text.as_bytes()));
    let (code, _, stderr) = cli.run(&["check", "tree"]);
    assert_eq!(code, Some(1), "{stderr}");
    let expected = "f24.xml:1:20: error[NWF0049]: filter 'f24' expands to more than 100000 includes";
    assert!(stderr.contains(expected), "{stderr}");
    assert!(!stderr.contains("f25.xml"), "{stderr}");
}

#[test]
fn check_reads_no_file_beyond_the_largest_document_and_follows_no_link_to_a_directory() {
    let cli = Cli::new(&[("tree/good.xml", "<filter name='good'/>")]);
    let tree = cli.0.path().join("tree");
    std::os::unix::fs::symlink(&tree, tree.join("loop")).unwrap();
    std::os::unix::fs::symlink(&tree, tree.join("loop.xml")).unwrap();
    let (code, stdout, stderr) = cli.run(&["check", "tree"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.starts_with("1 document checked"), "{stdout}");
    // It takes no space on disk, and is larger than most memories.
    fs::File::create(cli.0.path().join("huge.xml")).unwrap().set_len(1 << 42).unwrap();
    for verb in ["check", "define"] {
        let said = cli.refused(&[verb, "huge.xml"]);
        assert!(said.contains("huge.xml") && said.contains("more than 64 MiB"), "{said}");
    }
}

#[test]
fn check_reports_some_of_very_many_missing_filters_and_counts_the_rest() {
    let includes: String = (0..60_000).map(|n| format!("<filterref filter='missing{n}'/>\n")).collect();
    let cli = Cli::new(&[("many.xml", &format!("<filter name='many'>{includes}</filter>"))]);
    let (code, _, stderr) = cli.run(&["check", "many.xml"]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("no filter is named 'missing199'") && !stderr.contains("missing200"), "{stderr}");
    assert!(stderr.contains("many.xml: 59800 more problems are not shown"), "{stderr}");
}

#[test]
fn sets_are_checked_and_formatted_like_other_documents() {
    let cli = Cli::new(&[
        (
            "right.xml",
            "<filterset family='ipv4' name='admins'><entry value='10.0.0.0-10.0.0.255'/></filterset>",
        ),
        ("wrong.xml", "<filterset name='admins' family='ipv4'>\n<entry value='fd00::1'/></filterset>"),
    ]);
    let (code, stdout, _) = cli.run(&["fmt", "right.xml"]);
    let written = "<filterset name='admins' family='ipv4'>\n  <entry value='10.0.0.0/24'/>\n</filterset>\n";
    assert_eq!((code, stdout.as_str()), (Some(0), written));
    let stderr = cli.refused(&["check", "right.xml", "wrong.xml"]);
    assert!(stderr.contains("wrong.xml:2:15: error[NWF0052]: 'fd00::1' is no entry of this set"), "{stderr}");
    assert!(!stderr.contains("right.xml"), "{stderr}");
}
