//! What the kernel's own connection tracking of bridged packets does, without br_netfilter.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use nwfilter_testlab::frames::{self, tcp_flags};
use nwfilter_testlab::{Ends, Guest, Host, Mac, Need, Process, Tap, skip_unless};
use tempfile::TempDir;

const PER_PORT: &str = include_str!("nft/per-port-chains.nft");
const SHARED: &str = include_str!("nft/shared-chains.nft");

/// The line of the rulesets that gives connections of port 21 the helper.
const HELPER: &str = "ct helper set \"ftp-std\"";

/// A bridge with a guest that serves FTP behind `vnet0`, and a client.
struct Lab {
    client: Guest,
    server: Guest,
    host: Host,
    dir: TempDir,
    _ftp: Process,
}

fn mac(last: u8) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 0, last])
}

impl Lab {
    fn new(ruleset: &str) -> Self {
        let host = Host::builder().without_bridge_nf().bridge_addr("10.0.0.254/24").build().unwrap();
        let server = host.guest("vnet0", mac(1)).addr("10.0.0.1/24").start().unwrap();
        let client = host.guest("outside0", mac(2)).addr("10.0.0.2/24").start().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "contents").unwrap();
        let ftp = server.vsftpd(dir.path()).unwrap();
        host.run_with_stdin(&["nft", "-f", "-"], ruleset).unwrap();
        Self { client, server, host, dir, _ftp: ftp }
    }

    /// Whether the client gets the file.
    fn ftp(&self, options: &[&str]) -> bool {
        let got = self.dir.path().join("got");
        let mut curl = self.client.command("curl");
        curl.args(["--silent", "--max-time", "5", "--output"]).arg(&got);
        curl.args(options).arg("ftp://10.0.0.1/file");
        let passed = curl.status().unwrap().success();
        assert_eq!(passed, std::fs::read_to_string(&got).is_ok_and(|text| text == "contents"));
        let _ = std::fs::remove_file(got);
        passed
    }

    fn pings_from(&self, addr: &str) -> bool {
        let ping = ["ping", "-c", "1", "-W", "1", "-I", addr, "10.0.0.2"];
        self.server.run(&ping).is_ok()
    }
}

fn serves_ftp_and_stops_spoofing(ruleset: &str) {
    let lab = Lab::new(ruleset);
    assert!(lab.ftp(&["--ftp-port", "-"]), "EPRT");
    assert!(lab.ftp(&["--ftp-port", "-", "--disable-eprt"]), "PORT");
    assert!(lab.ftp(&[]), "EPSV");
    assert!(lab.ftp(&["--disable-epsv"]), "PASV");
    assert!(lab.pings_from("10.0.0.1"));
    lab.server.ip(&["addr add 10.0.0.9/24 dev eth0"]).unwrap();
    assert!(!lab.pings_from("10.0.0.9"), "the guest may not use an address of its own choice");
    assert!(lab.pings_from("10.0.0.1"));
    let listed = lab.host.run(&["nft", "list", "ruleset"]).unwrap();
    assert!(listed.contains("ct state invalid counter packets 0"), "{listed}");
}

#[test]
fn chains_for_each_port_serve_ftp_and_stop_spoofing() {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"), Need::Tool("ping"));
    serves_ftp_and_stops_spoofing(PER_PORT);
}

#[test]
fn chains_shared_by_ports_serve_ftp_and_stop_spoofing() {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"), Need::Tool("ping"));
    serves_ftp_and_stops_spoofing(SHARED);
}

#[test]
fn without_the_helper_object_no_data_connection_is_related() {
    skip_unless!(Need::BridgeConntrack, Need::Tool("vsftpd"), Need::Tool("curl"));
    assert!(PER_PORT.contains(HELPER));
    let lab = Lab::new(&PER_PORT.replace(HELPER, "accept"));
    assert!(!lab.ftp(&["--ftp-port", "-"]), "active");
    assert!(!lab.ftp(&[]), "passive");
}

#[test]
fn bridged_connections_have_states_without_br_netfilter() {
    skip_unless!(Need::BridgeConntrack);
    let host = Host::builder().without_bridge_nf().build().unwrap();
    let (guest, peer): (Tap, Tap) = (host.tap("tap0").unwrap(), host.tap("tap1").unwrap());
    let rules = "table bridge lab { chain c { type filter hook forward priority 0; policy drop;
        ct state invalid drop; iifname \"tap0\" ct state new,established accept; ct state established accept; }; }";
    host.run_with_stdin(&["nft", "-f", "-"], rules).unwrap();
    let ends = Ends::v4(mac(1), "10.0.0.1".parse().unwrap(), mac(2), "10.0.0.2".parse().unwrap());
    let there = |from, to, flags| frames::tcp(&ends, from, to, flags);
    let back = |from, to, flags| frames::tcp(&ends.reverse(), from, to, flags);
    let (syn, ack) = (tcp_flags::SYN, tcp_flags::ACK);

    assert!(!peer.delivers(&guest, &back(80, 1000, syn | ack)).unwrap(), "an answer to nobody");
    assert!(!peer.delivers(&guest, &back(1001, 22, syn)).unwrap(), "a connection from outside");
    assert!(guest.delivers(&peer, &there(1000, 80, syn)).unwrap(), "a connection to outside");
    assert!(
        peer.delivers(&guest, &frames::tcp_segment(&ends.reverse(), (80, 1000), (1, 2), syn | ack, &[]))
            .unwrap()
    );
}
