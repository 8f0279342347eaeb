//! Guests with an IP stack and the services in them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use nwfilter_testlab::{Guest, Host, Mac, Need, frames, skip_unless};

const TIMEOUT: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);

fn guest(host: &Host, number: u8) -> Result<Guest> {
    let mac = Mac::new([0x52, 0x54, 0, 0, 0, number]);
    host.guest(&format!("vnet{number}"), mac)
        .addr(&format!("10.0.0.{number}/24"))
        .addr(&format!("fd00::{number}/64"))
        .start()
}

#[test]
fn guests_ping_each_other_until_a_rule_drops_it() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ping"), Need::Tool("iptables"));
    let host = Host::builder().bridge_addr("10.0.0.254/24").bridge_addr("fd00::254/64").build()?;
    let (one, _two) = (guest(&host, 1)?, guest(&host, 2)?);
    for addr in ["10.0.0.2", "fd00::2", "10.0.0.254", "fd00::254"] {
        assert!(one.ping(addr)?, "{addr}");
    }
    assert!(host.ping("10.0.0.1")?);
    host.run(&["iptables", "-A", "FORWARD", "-m", "physdev", "--physdev-in", "vnet1", "-j", "DROP"])?;
    assert!(!one.ping("10.0.0.2")?);
    assert!(one.ping("fd00::2")?);
    assert!(one.ping("10.0.0.254")?);
    Ok(())
}

#[test]
fn a_gateway_leads_out_of_the_network() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ping"));
    let host = Host::builder().bridge_addr("10.0.0.254/24").bridge_addr("192.0.2.1/32").build()?;
    let mac = Mac::new([0x52, 0x54, 0, 0, 0, 1]);
    let guest = host.guest("vnet0", mac).addr("10.0.0.1/24").gateway("10.0.0.254").start()?;
    assert!(guest.ping("192.0.2.1")?);
    assert!(guest.run(&["ip", "link", "show", "eth0"])?.contains(&mac.to_string()));
    assert_eq!((guest.port(), guest.mac()), ("vnet0", mac));
    Ok(())
}

#[test]
fn a_guest_without_ipv6_sends_nothing_by_itself() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let tap = host.tap("tap0")?;
    let mac = Mac::new([0x52, 0x54, 0, 0, 0, 1]);
    let guest = host.guest("vnet0", mac).addr("10.0.0.1/24").start()?;
    assert_eq!(tap.recv(Duration::from_millis(1500))?, None);

    let tap_mac = Mac::new([0x52, 0x54, 0, 0, 0, 2]);
    let ask = frames::Arp::request(tap_mac, [10, 0, 0, 2].into(), [10, 0, 0, 1].into());
    tap.send(&frames::arp(tap_mac, Mac::BROADCAST, ask))?;
    let told = frames::Arp::reply(guest.mac(), [10, 0, 0, 1].into(), tap_mac, [10, 0, 0, 2].into());
    assert_eq!(tap.recv(TIMEOUT)?, Some(frames::arp(mac, tap_mac, told)));
    Ok(())
}

#[test]
fn a_dropped_guest_frees_its_port_at_once() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let netns = {
        let guest = guest(&host, 1)?;
        guest.name().to_owned()
    };
    assert!(!fs::exists(format!("/run/netns/{netns}"))?);
    assert!(!host.run(&["ip", "link"])?.contains("vnet1"));
    guest(&host, 1)?;
    Ok(())
}

#[test]
fn curl_gets_files_from_vsftpd_actively_and_passively() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("vsftpd"), Need::Tool("curl"));
    let host = Host::new()?;
    let (client, server) = (guest(&host, 1)?, guest(&host, 2)?);
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("file"), "some content")?;
    let daemon = server.vsftpd(dir.path())?;
    let curl = |args: &[&str]| client.run(&[&["curl", "-sS", "--max-time", "10"], args].concat());
    assert!(curl(&["--ftp-pasv", "ftp://10.0.0.2/"])?.contains("file"));
    assert_eq!(curl(&["--ftp-pasv", "ftp://10.0.0.2/file"])?, "some content");
    assert_eq!(curl(&["--ftp-port", "-", "ftp://10.0.0.2/file"])?, "some content");
    drop(daemon);
    assert!(curl(&["ftp://10.0.0.2/"]).is_err());
    assert!(server.pids().is_empty());
    Ok(())
}

#[test]
fn curl_gets_files_by_http() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("curl"));
    let host = Host::new()?;
    let (client, server) = (guest(&host, 1)?, guest(&host, 2)?);
    let dir = tempfile::tempdir()?;
    let content = "some content ".repeat(100_000);
    fs::write(dir.path().join("file"), &content)?;
    let _http = server.http(dir.path(), 80)?;
    let curl = |url: &str| client.run(&["curl", "-sSf", "--max-time", "10", url]);
    assert_eq!(curl("http://10.0.0.2/file")?, content);
    assert_eq!(curl("http://[fd00::2]/file")?, content);
    assert!(curl("http://10.0.0.2/no-file").is_err());
    Ok(())
}

#[test]
fn tcp_and_udp_services_answer_as_long_as_they_live() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let (client, server) = (guest(&host, 1)?, guest(&host, 2)?);
    let services = (server.tcp_service(22, "a banner\n")?, server.udp_echo(7)?);
    assert!(server.tcp_service(22, "another").is_err());
    for addr in ["10.0.0.2", "[fd00::2]"] {
        assert_eq!(client.tcp_fetch(&format!("{addr}:22"), TIMEOUT)?, "a banner\n");
        let echo = client.udp_exchange(&format!("{addr}:7"), b"to and fro", TIMEOUT)?;
        assert_eq!(echo.as_deref(), Some(&b"to and fro"[..]));
    }

    let start = Instant::now();
    drop(services);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(client.tcp_fetch("10.0.0.2:22", SHORT).is_err());
    assert!(client.udp_exchange("10.0.0.2:7", b"anyone?", SHORT).is_err(), "port unreachable");
    assert_eq!(client.udp_exchange("10.0.0.255:7", b"anyone?", SHORT).ok().flatten(), None);
    Ok(())
}

#[test]
fn the_dns_responder_answers_a_query() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let (client, server) = (guest(&host, 1)?, guest(&host, 2)?);
    let _dns = server.dns_responder([192, 0, 2, 7].into())?;
    let header = [0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let query = [&header[..], b"\x07example\x03org\x00", &[0, 1, 0, 1]].concat();
    let answer = client.udp_exchange("10.0.0.2:53", &query, TIMEOUT)?.unwrap();
    assert_eq!(answer[..2], query[..2]);
    assert!(answer.ends_with(&[192, 0, 2, 7]));
    Ok(())
}

#[test]
fn a_spawned_program_is_stopped_and_its_output_read() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let guest = guest(&host, 1)?;
    let mut short = guest.spawn(&["sh", "-c", "echo out; echo err >&2; exit 3"])?;
    assert_eq!(short.wait(TIMEOUT)?.code(), Some(3));
    assert_eq!(short.log(), "out\nerr\n");

    let mut long = guest.spawn(&["sleep", "1000"])?;
    assert!(long.wait(Duration::from_millis(50)).is_err());
    assert_eq!(long.ended()?, None);
    assert!(!long.stop(TIMEOUT)?.success());
    assert!(guest.pids().is_empty());
    Ok(())
}
