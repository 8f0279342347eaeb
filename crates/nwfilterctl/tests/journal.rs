//! A daemon whose stderr is the journal logs with fields that name the port, the guest and the filter.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nwfilter_testlab::frames::ethernet;
use nwfilter_testlab::{Host, Mac, Need, skip_unless};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a program for which $JOURNAL is the socket of the journal.
const WITH_JOURNAL: &str = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && touch /run/systemd/journal/socket \
     && mount --bind \"$JOURNAL\" /run/systemd/journal/socket && exec \"$@\"";

/// The fields of a message in the journal's protocol: `NAME=text`, or the name, a length and so many bytes.
fn fields(mut message: &[u8]) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut fields = BTreeMap::new();
    while let Some(end) = message.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&message[..end], &message[end + 1..]);
        match line.iter().position(|byte| *byte == b'=') {
            Some(equal) => {
                fields.insert(text(&line[..equal]), text(&line[equal + 1..]));
                message = rest;
            }
            None => {
                let (length, rest) = rest.split_first_chunk().unwrap();
                let (value, rest) = rest.split_at(u64::from_le_bytes(*length).try_into().unwrap());
                fields.insert(text(line), text(value));
                message = &rest[1..];
            }
        }
    }
    fields
}

#[test]
fn messages_about_a_port_have_its_name_its_guest_and_its_filter_as_fields() {
    skip_unless!(
        Need::Root,
        Need::Tool("iptables-restore"),
        Need::Tool("ebtables-restore"),
        Need::Tool("unshare")
    );
    let (host, dir) = (Host::new().unwrap(), tempfile::tempdir().unwrap());
    let tap = host.tap("tap0").unwrap();
    let ctl = env!("CARGO_BIN_EXE_nwfilterctl");
    let stores = ["--config-dir", "etc", "--state-dir", "state"];
    fs::write(
        dir.path().join("b.xml"),
        "<filterbinding><owner><name>vm1</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='52:54:00:7b:35:93'/><filterref filter='no-mac-spoofing'>
         <parameter name='CTRL_LOG_DROPS' value='yes'/></filterref></filterbinding>",
    )
    .unwrap();
    let mut bind = host.command(ctl);
    assert!(
        bind.current_dir(dir.path())
            .args(stores)
            .args(["binding-create", "b.xml"])
            .status()
            .unwrap()
            .success()
    );

    let path = |name: &str| dir.path().join(name);
    let journal = UnixDatagram::bind(path("journal")).unwrap();
    journal.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let notified = UnixDatagram::bind(path("notify")).unwrap();
    notified.set_read_timeout(Some(PATIENCE)).unwrap();
    let stderr = File::create(path("stderr")).unwrap();
    let of_stderr = stderr.metadata().unwrap();
    let mut daemon = host
        .command("unshare")
        .args(["--mount", "sh", "-c", WITH_JOURNAL, "sh", ctl])
        .args(stores)
        .args(["keep", "--json"])
        .current_dir(dir.path())
        .env_remove("RUST_LOG")
        .env("JOURNAL", path("journal"))
        .env("JOURNAL_STREAM", format!("{}:{}", of_stderr.dev(), of_stderr.ino()))
        .env("NOTIFY_SOCKET", path("notify"))
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let mut buffer = vec![0; 64 << 10];
    let ready = notified.recv(&mut buffer).unwrap();
    assert!(buffer[..ready].starts_with(b"READY=1"), "{}", log_of(&path("stderr")));

    // The kernel's packet log may not be read yet when the daemon is ready.
    let spoofed = ethernet(Mac::new([2, 0, 0, 0, 0, 9]), Mac::BROADCAST, 0x88b5, b"spoofed");
    let deadline = Instant::now() + PATIENCE;
    let dropped = loop {
        assert!(Instant::now() < deadline, "nothing about the port: {}", log_of(&path("stderr")));
        tap.send(&spoofed).unwrap();
        let Ok(length) = journal.recv(&mut buffer) else { continue };
        let fields = fields(&buffer[..length]);
        if fields.contains_key("NWFILTER_PORT") {
            break fields;
        }
    };
    for (name, value) in [
        ("NWFILTER_PORT", "tap0"),
        ("NWFILTER_GUEST", "vm1"),
        ("NWFILTER_FILTER", "no-mac-spoofing"),
        ("PRIORITY", "4"),
        ("SYSLOG_IDENTIFIER", "nwfilterctl"),
    ] {
        assert_eq!(dropped.get(name).map(String::as_str), Some(value), "{name} of {dropped:?}");
    }
    assert!(dropped["MESSAGE"].starts_with("tap0 out, guest vm1: frame of type 0x88b5"), "{dropped:?}");
    // Open to the end: the daemon prints more than one, and to fail at that is an error.
    let mut events = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let event = events.next().unwrap().unwrap();
    let dropped = json!({
        "event": "packet-dropped",
        "port": "tap0",
        "guest": "vm1",
        "way": "from_guest",
        "src_mac": "02:00:00:00:00:09",
        "dst_mac": "ff:ff:ff:ff:ff:ff",
        "packet": "frame of type 0x88b5 02:00:00:00:00:09 → ff:ff:ff:ff:ff:ff",
        "origin": "no-mac-spoofing:6",
    });
    assert_eq!(serde_json::from_str::<Value>(&event).unwrap(), dropped);
    let mut explain = host.command(ctl);
    explain.current_dir(dir.path()).args(stores).args(["explain", "tap0", "out", "--frame"]);
    let frame: String = spoofed.iter().map(|byte| format!("{byte:02x}")).collect();
    let explained = explain.arg(frame).output().unwrap().stdout;
    let explained = String::from_utf8(explained).unwrap();
    assert!(explained.contains("what its rules drop is logged (CTRL_LOG_DROPS)"), "{explained}");
    assert!(explained.contains("by no-mac-spoofing:6"), "{explained}");
    assert_eq!(log_of(&path("stderr")), "", "what the journal has is not on stderr");
    kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM).unwrap();
    let status = daemon.wait().unwrap();
    assert!(status.success(), "{status}: {}", log_of(&path("stderr")));
}

fn log_of(stderr: &Path) -> String {
    fs::read_to_string(stderr).unwrap()
}
