//! What an operator asks about packets, and what is answered.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const WEB: &str = "<filter name='web'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='in'><tcp dstportstart='22' srcipaddr='$ADMIN'/></rule>
  <rule action='reject' direction='in'><tcp dstportstart='113'/></rule>
  <rule action='drop' direction='in'><all ipset='blocked' ipsetflags='src'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='accept' direction='out'><icmp/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

fn binding(filter: &str, parameters: &str) -> String {
    format!(
        "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/>
  <filterref filter='{filter}'>{parameters}</filterref>
</filterbinding>"
    )
}

const PARAMETERS: &str = "<parameter name='IP' value='10.0.0.2'/><parameter name='ADMIN' value='192.0.2.9'/>";

/// Stores with the filters of the seed and `web`, and bindings in files.
struct Cli(tempfile::TempDir);

impl Cli {
    fn new() -> Self {
        let cli = Self(tempfile::tempdir().unwrap());
        let seed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-fixtures/seed");
        for name in ["ftp-by-port", "ftp-by-state"] {
            fs::copy(seed.join(format!("{name}.xml")), cli.path(&format!("{name}.xml"))).unwrap();
            fs::write(cli.path(&format!("{name}-binding.xml")), binding(name, PARAMETERS)).unwrap();
        }
        fs::write(cli.path("web.xml"), WEB).unwrap();
        fs::write(cli.path("vnet0.xml"), binding("web", PARAMETERS)).unwrap();
        fs::write(cli.path("no-ip.xml"), binding("clean-traffic", "")).unwrap();
        for name in ["web", "ftp-by-port", "ftp-by-state"] {
            let defined = cli.run(&["define", &cli.path(&format!("{name}.xml"))]);
            assert!(defined.status.success(), "{}", String::from_utf8_lossy(&defined.stderr));
        }
        cli
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.args(["--config-dir", &self.path("filters"), "--state-dir", &self.path("bindings")]);
        command.args(args).output().unwrap()
    }

    /// What is answered about a binding, with paths as they are on every run.
    fn ask(&self, binding: &str, words: &str) -> String {
        let file = self.path(binding);
        let mut args = vec!["explain", "--binding", &file];
        args.extend(words.split_whitespace());
        self.answer(&args)
    }

    fn answer(&self, args: &[&str]) -> String {
        let Output { stdout, stderr, .. } = self.run(args);
        let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
        text.replace(&self.path("filters"), "/etc/nwfilter").replace(&self.path(""), "/root/")
    }
}

/// What users ask. The words are those behind the port.
const QUESTIONS: [&str; 20] = [
    // Why does my web server answer, and why only on one port?
    "in tcp from 192.0.2.7:40000 to :80",
    "in tcp from 192.0.2.7:40000 to :443 new",
    "in tcp from :40000 to :80 established",
    // Who may log in?
    "in tcp from 192.0.2.9 to :22",
    "in tcp from 192.0.2.10 to :22",
    // What is rejected rather than dropped?
    "in tcp to :113",
    // What may the guest do?
    "out udp to 192.0.2.53:53",
    "out tcp to :443",
    "out icmp echo-request",
    "in icmp echo-reply established reply",
    "in icmp echo-request",
    // What if it lies about its addresses?
    "out arp request sender 10.0.0.9",
    "out arp reply sender-mac 52:54:00:00:00:66",
    "out udp from 10.0.0.9 to :53",
    "out udp mac 52:54:00:00:00:66 to :53",
    // What of other protocols?
    "out tcp to [2001:db8::9]:80",
    "out udp to :53 vlan 7",
    "out mac type 0x88cc",
    // What of a packet that belongs to nothing?
    "in tcp to :80 flags RST",
    "in tcp to :443 reply",
];

#[test]
fn questions_of_users_are_answered_with_the_rule_that_decides() {
    let cli = Cli::new();
    let mut text = String::new();
    for words in QUESTIONS {
        let answer = cli.ask("vnet0.xml", &format!("--ipset blocked=203.0.113.0/24 {words}"));
        writeln!(text, "$ nwfilterctl explain vnet0 {words}\n{answer}").unwrap();
    }
    insta::assert_snapshot!(text);
}

#[test]
fn wrong_questions_get_a_reason_and_an_example() {
    let cli = Cli::new();
    let mut text = String::new();
    for words in [
        "",
        "up tcp",
        "in",
        "in tpc",
        "in tcp to",
        "in tcp to :eighty",
        "in tcp colour red",
        "in tcp from 10.0.0.1 to 2001:db8::1",
        "in icmp to :80",
        "in icmpv6 from 10.0.0.1",
        "in tcp new reply",
        "in tcp to :9 --ipset blocked",
        "in tcp to :9",
        "--frame 0x",
        "--frame ffff",
        "--conversation ftp",
        "in --conversation gopher",
        "--pcap /dev/null",
    ] {
        writeln!(text, "$ nwfilterctl explain --binding vnet0.xml {words}\n{}", cli.ask("vnet0.xml", words))
            .unwrap();
    }
    writeln!(text, "$ nwfilterctl explain vnet9 in tcp\n{}", cli.answer(&["explain", "vnet9", "in", "tcp"]))
        .unwrap();
    insta::assert_snapshot!(text);
}

#[test]
fn a_port_that_still_learns_is_explained_by_the_rules_in_force() {
    let cli = Cli::new();
    let answer = cli.ask("no-ip.xml", "out icmpv6 echo-request");
    assert!(answer.contains("is dropped\n  by a rule of nwfilter's own"), "{answer}");
}

#[test]
fn json_has_the_steps_and_the_place_of_the_rule() {
    let cli = Cli::new();
    let answer = cli.ask("vnet0.xml", "--json --ipset blocked= in tcp to :443");
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    let packet = &answer["packets"][0];
    assert_eq!(packet["outcome"], "dropped");
    let deciding = packet["decided_by"].as_u64().unwrap() as usize;
    let origin = packet["steps"][deciding]["origin"].as_str().unwrap();
    assert_eq!(Some(origin), packet["at"]["line"].as_u64().map(|line| format!("web:{line}")).as_deref());
}

#[test]
fn frames_of_a_capture_are_followed_as_connections() {
    let cli = Cli::new();
    // An ARP request of the guest, in hexadecimal and in a capture of two frames.
    let frame =
        "ffffffffffff 5254007b3593 0806 0001 0800 06 04 0001 5254007b3593 0a000002 000000000000 0a000001";
    let answer = cli.answer(&["explain", "--binding", &cli.path("vnet0.xml"), "--frame", frame]);
    assert!(answer.starts_with("vnet0 out: ARP request, sender 10.0.0.2"), "{answer}");
    let digits: String = frame.split_whitespace().collect();
    let bytes: Vec<u8> =
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect();
    let mut capture: Vec<u8> = Vec::new();
    for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65535, 1u32] {
        capture.extend(word.to_le_bytes());
    }
    for _ in 0..2 {
        for word in [0, 0, bytes.len() as u32, bytes.len() as u32] {
            capture.extend(word.to_le_bytes());
        }
        capture.extend(&bytes);
    }
    fs::write(cli.path("trace.pcap"), capture).unwrap();
    let answer = cli.ask("vnet0.xml", &format!("--pcap {}", cli.path("trace.pcap")));
    assert_eq!(answer.matches("ARP request").count(), 2, "{answer}");
    assert!(answer.contains("frame 2"), "{answer}");
}

/// What is between the lines that name a command and the next fence is what the command prints.
#[test]
fn the_story_of_ftp_in_the_docs_is_what_the_command_tells() {
    let cli = Cli::new();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/explain.md");
    let text = fs::read_to_string(&docs).unwrap();
    let mut told = String::new();
    let mut rest = text.as_str();
    let mut stories = 0;
    while let Some((before, command)) = rest.split_once("```\n$ nwfilterctl ") {
        let (line, output) = command.split_once('\n').unwrap();
        let (_, after) = output.split_once("```\n").unwrap();
        let mut args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        for arg in &mut args {
            if arg.ends_with(".xml") {
                *arg = cli.path(arg);
            }
        }
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        write!(told, "{before}```\n$ nwfilterctl {line}\n{}```\n", cli.answer(&args)).unwrap();
        rest = after;
        stories += 1;
    }
    told.push_str(rest);
    assert!(stories >= 2);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&docs, told).unwrap();
    } else {
        assert_eq!(told, text, "run the test with UPDATE_DOCS=1 to write what the command prints now");
    }
}
