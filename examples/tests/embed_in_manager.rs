//! The manager on a host with two taps.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Read;
use std::process::Stdio;

use nwfilter_testlab::{Host, Need, skip_unless};

#[test]
fn a_guest_is_filtered_while_it_runs_and_the_manager_hears_of_it() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let (host, store) = (Host::new().unwrap(), tempfile::tempdir().unwrap());
    let _taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    let mut command = host.command(env!("CARGO_BIN_EXE_embed-in-manager"));
    command.arg(store.path()).args(["tap0", "52:54:00:00:00:01", "10.0.0.1"]);
    command.args(["tap1", "52:54:00:00:00:02", "10.0.0.2"]);
    let mut manager = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut said, mut output) = (String::new(), manager.stdout.take().unwrap());
    let running = "the guest may run\n";
    while !said.contains(running) {
        let mut bytes = [0; 4096];
        let count = output.read(&mut bytes).unwrap();
        assert!(count > 0, "the manager ended: {said}");
        said.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    let saved = host.saved().unwrap();
    for port in ["tap0", "tap1"] {
        assert!(saved.port(port).iptables.contains("--dport 80"), "{saved:?}");
    }
    drop(manager.stdin.take());
    output.read_to_string(&mut said).unwrap();
    assert!(manager.wait().unwrap().success());
    assert!(host.saved().unwrap().port("tap0").is_empty());
    for event in
        ["filter 'web-server' defined", "port 'tap0' bound", "port 'tap1' bound", "port 'tap1' unbound"]
    {
        assert!(said.lines().any(|line| line == event), "{event}: {said}");
    }
}
