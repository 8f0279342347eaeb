//! Hosts and taps on the real kernel.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use nwfilter_testlab::{
    BRIDGE_MAC, Ends, Host, Mac, Need, Netns, Tool, frames, requirements, skip_unless, sweep,
};

const A: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x0a]);
const B: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x0b]);

fn ends() -> Ends {
    Ends::v4(A, [10, 0, 0, 1].into(), B, [10, 0, 0, 2].into())
}

fn ends6() -> Ends {
    let addr = |last| [0xfd00, 0, 0, 0, 0, 0, 0, last].into();
    Ends::v6(A, addr(1), B, addr(2))
}

fn named(netns: &Netns) -> PathBuf {
    PathBuf::from("/run/netns").join(netns.name())
}

#[test]
fn a_missing_tool_is_a_reason_to_skip() {
    let skip = requirements(&[Need::Tool("sh"), Need::Tool("no-such-tool")]).unwrap_err();
    assert_eq!(skip.to_string(), "no program no-such-tool on the PATH");
    assert_eq!(requirements(&[Need::Tool("sh")]), Ok(()));
}

#[test]
fn taps_exchange_frames_until_a_rule_drops_them() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let host = Host::new()?;
    let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
    let frame = frames::udp(&ends(), 1000, 2000, b"hello");
    let back = frames::udp(&ends().reverse(), 2000, 1000, b"hello");
    assert!(a.delivers(&b, &frame)?);
    assert!(b.delivers(&a, &back)?);

    host.run(&["ebtables", "-A", "FORWARD", "-i", "tap0", "-j", "DROP"])?;
    assert!(!a.delivers(&b, &frame)?);
    assert!(b.delivers(&a, &back)?);
    Ok(())
}

#[test]
fn only_the_frames_of_the_test_are_seen() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
    assert_eq!(b.recv(Duration::from_millis(1500))?, None);
    let frame = |last| frames::arp(A, Mac::BROADCAST, frames::Arp::gratuitous(A, [10, 0, 0, last].into()));
    a.send(&frame(1))?;
    a.send(&frame(2))?;
    a.send(&frame(3))?;
    assert_eq!(b.expect(Duration::from_secs(1), |seen| seen == frame(2))?, Some(frame(2)));
    assert_eq!(b.drain()?, [frame(3)]);
    assert_eq!(a.drain()?, Vec::<Vec<u8>>::new());
    Ok(())
}

#[test]
fn every_kind_of_frame_passes_the_bridge() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
    let group = [224, 0, 0, 251].into();
    let mut all = vec![
        frames::ethernet(A, B, 0x88b5, b"some protocol"),
        frames::vlan(42, &frames::tcp(&ends(), 1, 2, frames::tcp_flags::SYN)),
        frames::arp(A, B, frames::Arp::reply(A, [10, 0, 0, 1].into(), B, [10, 0, 0, 2].into())),
        frames::rarp(A, Mac::BROADCAST, frames::Arp::rarp_request(A)),
        frames::igmp(&Ends::v4(A, [10, 0, 0, 1].into(), Mac::new([1, 0, 0x5e, 0, 0, 0xfb]), group), group),
        frames::dscp(frames::udp(&ends(), 1, 2, b""), 46),
        frames::bad_l4_checksum(frames::udp(&ends(), 1, 2, b"")),
    ];
    for ends in [ends(), ends6()] {
        all.extend([
            frames::udp(&ends, 1, 2, b"data"),
            frames::tcp(&ends, 1, 2, frames::tcp_flags::SYN),
            frames::icmp_echo(&ends, 1, 1),
            frames::icmp_echo_reply(&ends, 1, 1),
            frames::sctp(&ends, 1, 2),
            frames::ip(&ends, frames::protocol::ESP, &[0; 32]),
        ]);
    }
    for frame in all {
        assert!(a.delivers(&b, &frame)?, "{frame:02x?}");
    }
    // bridge-nf looks into the IP header and drops what is broken.
    let broken = frames::bad_ip_checksum(frames::udp(&ends(), 1, 2, b""));
    assert!(!a.delivers(&b, &broken)?);
    host.set_bridge_nf(false)?;
    assert!(a.delivers(&b, &broken)?);
    Ok(())
}

#[test]
fn bpdus_pass_as_the_bridge_does_not_speak_stp() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
    assert!(a.delivers(&b, &frames::stp(A))?);
    Ok(())
}

#[test]
fn iptables_sees_bridged_packets_only_with_bridge_nf() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("iptables"), Need::Tool("ip6tables"));
    for (bridge_nf, passes) in [(true, false), (false, true)] {
        let host = Host::builder().bridge_nf(bridge_nf).build()?;
        let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
        for tool in ["iptables", "ip6tables"] {
            host.run(&[tool, "-A", "FORWARD", "-m", "physdev", "--physdev-in", "tap0", "-j", "DROP"])?;
        }
        assert_eq!(a.delivers(&b, &frames::udp(&ends(), 1, 2, b""))?, passes);
        assert_eq!(a.delivers(&b, &frames::udp(&ends6(), 1, 2, b""))?, passes);
        assert!(a.delivers(&b, &frames::arp(A, B, frames::Arp::gratuitous(A, [10, 0, 0, 1].into())))?);
    }
    Ok(())
}

#[test]
fn a_bridge_with_an_address_answers() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::builder().bridge_addr("10.0.0.254/24").build()?;
    let tap = host.tap("tap0")?;
    let ask = frames::Arp::request(A, [10, 0, 0, 1].into(), [10, 0, 0, 254].into());
    tap.send(&frames::arp(A, Mac::BROADCAST, ask))?;
    let told = frames::Arp::reply(BRIDGE_MAC, [10, 0, 0, 254].into(), A, [10, 0, 0, 1].into());
    let answer = tap.recv(Duration::from_secs(5))?.unwrap();
    assert_eq!(answer, frames::arp(BRIDGE_MAC, A, told));
    Ok(())
}

#[test]
fn code_that_enters_a_namespace_acts_in_it() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let _tap = host.tap("only-here")?;
    let read = |path: &str| fs::read_to_string(path).unwrap();
    assert!(host.enter(|| read("/proc/thread-self/net/dev")).contains("only-here"));
    assert!(!read("/proc/thread-self/net/dev").contains("only-here"));
    assert!(host.run(&["cat", "/proc/net/dev"])?.contains("only-here"));
    host.sysctl("net.ipv4.ip_forward", "1")?;
    assert_eq!(host.enter(|| read("/proc/sys/net/ipv4/ip_forward")), "1\n");
    Ok(())
}

#[test]
fn an_error_of_a_program_has_its_stderr() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    assert_eq!(host.run_with_stdin(&["cat"], "to and fro")?, "to and fro");
    let error = host.run(&["sh", "-c", "echo what went wrong >&2; exit 3"]).unwrap_err();
    assert!(error.to_string().contains("what went wrong"), "{error}");
    assert!(host.run(&["/no/such/program"]).is_err());
    Ok(())
}

#[test]
fn saved_tables_tell_a_rule_and_no_counters() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("iptables"), Need::Tool("ebtables"));
    let host = Host::new()?;
    let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
    let before = host.saved()?;
    assert!(before.is_empty());

    host.run(&["iptables", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "-j", "ACCEPT"])?;
    host.run(&["ebtables", "-t", "nat", "-N", "libvirt-I-tap0"])?;
    host.run(&["ebtables", "-t", "nat", "-A", "PREROUTING", "-i", "tap0", "-j", "libvirt-I-tap0"])?;
    host.run(&["ip6tables", "-P", "FORWARD", "DROP"])?;
    let after = host.saved()?;
    assert_eq!(after.table(Tool::Iptables, "raw"), ["-A PREROUTING -p tcp -j ACCEPT"]);
    assert_eq!(after.table(Tool::Ip6tables, "filter"), [":FORWARD DROP"]);
    assert_eq!(after.port("tap0").ebtables.lines().count(), 3);
    assert!(before.diff(&after).is_some());

    a.delivers(&b, &frames::tcp(&ends(), 1, 2, frames::tcp_flags::SYN))?;
    assert_eq!(after.diff(&host.saved()?), None);

    host.run(&["iptables", "-t", "raw", "-F"])?;
    host.run(&["ebtables", "-t", "nat", "-F"])?;
    host.run(&["ebtables", "-t", "nat", "-X"])?;
    host.run(&["ip6tables", "-P", "FORWARD", "ACCEPT"])?;
    assert_eq!(before, host.saved()?);
    Ok(())
}

#[test]
fn nothing_is_left_of_a_dropped_host() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("sleep"));
    let host = Host::new()?;
    let name = named(&host);
    let tap = host.tap("tap0")?;
    let process = host.spawn(&["sleep", "1000"])?;
    // A process that is not in the process group the handle kills.
    host.run(&["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"])?;
    let pids = host.pids();
    assert_eq!(pids.len(), 2);
    assert!(pids.contains(&process.pid()));
    drop((host, process));
    assert!(name.exists(), "the tap still lives in the namespace");
    drop(tap);
    assert!(!name.exists());
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert!(status.is_empty() || status.contains("State:\tZ"), "{pid} runs:\n{status}");
    }
    Ok(())
}

#[test]
fn nothing_is_left_after_a_panic() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    let name = named(&host);
    let result = catch_unwind(AssertUnwindSafe(move || {
        let _tap = host.tap("tap0");
        host.enter(|| panic!("a panic on purpose"));
    }));
    assert!(result.is_err());
    assert!(!name.exists());
    Ok(())
}

#[test]
fn a_sweep_removes_what_a_killed_test_left() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::new()?;
    // No process can have this id: it is above the kernel's greatest.
    let stale = format!("nwf-4294967295-{}-host", std::process::id());
    host.run(&["ip", "netns", "add", &stale])?;
    let mut left =
        std::process::Command::new("ip").args(["netns", "exec", &stale, "sleep", "1000"]).spawn()?;
    while !std::process::Command::new("ip")
        .args(["netns", "pids", &stale])
        .output()?
        .stdout
        .starts_with(left.id().to_string().as_bytes())
    {}
    sweep();
    assert!(!PathBuf::from("/run/netns").join(stale).exists());
    assert!(left.wait()?.code().is_none(), "killed by a signal");
    assert!(named(&host).exists());
    Ok(())
}
