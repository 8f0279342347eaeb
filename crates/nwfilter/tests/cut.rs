//! Connections that new rules refuse end with the change that asks for it; with the backend xtables.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cut_support;

use anyhow::Result;
use cut_support::{GUEST, Lab, OPENS, PEER, Tcp, ends, filter};
use nwfilter::{CutFailure, Ending};
use nwfilter_testlab::{Ends, Host, Need, frames, skip_unless};
use nwfilter_xtables::Xtables;

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ipset")];

fn lab(filter: &str) -> Result<Lab> {
    Lab::new(Host::new()?, Xtables::default(), filter)
}

#[test]
fn an_established_connection_ends_when_its_address_leaves_a_set_and_others_go_on() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(""))?;
    let (revoked, kept) = (lab.to_guest("10.0.0.9", 1009), lab.to_guest("10.0.0.8", 1008));
    assert!(revoked.opens()? && kept.opens()?);
    // Without the cut a rule on established connections lets it go on.
    lab.remove("10.0.0.9")?;
    assert!(revoked.carries()? && revoked.carries_back()?);
    lab.add("10.0.0.9")?;
    let cut = lab.revoke("10.0.0.9")?;
    let ended: Vec<_> = cut.ended.iter().map(ToString::to_string).collect();
    assert_eq!(ended, ["tap0: tcp 10.0.0.9:1009 → 10.0.0.2:22"]);
    assert_eq!(cut.failures, []);
    assert!(!revoked.carries()? && !revoked.carries_back()?);
    assert!(kept.carries()? && kept.carries_back()?);
    Ok(())
}

#[test]
fn a_guest_that_may_open_connections_does_not_take_a_cut_one_up_again() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(OPENS))?;
    let (revoked, kept) = (lab.to_guest("10.0.0.9", 1009), lab.to_guest("10.0.0.8", 1008));
    let own = lab.of_guest("10.0.0.9", 443);
    assert!(revoked.opens()? && kept.opens()? && own.opens()?);
    let cut = lab.revoke("10.0.0.9")?;
    assert_eq!(cut.ended.iter().map(|ended| ended.ending).collect::<Vec<_>>(), [Ending::Stalled], "{cut:?}");
    assert!(!revoked.carries()?);
    revoked.carries_back()?;
    assert!(!revoked.carries()?, "the guest's data made it a connection of its own");
    // What the guest itself opens to that address is allowed still.
    assert!(own.carries()? && own.carries_back()?);
    assert!(kept.carries()? && kept.carries_back()?);
    Ok(())
}

#[test]
fn where_the_kernel_takes_no_connection_up_a_cut_one_is_forgotten_for_good() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(OPENS))?;
    lab.host.netns().sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")?;
    let revoked = lab.to_guest("10.0.0.9", 1009);
    assert!(revoked.opens()?);
    let cut = lab.revoke("10.0.0.9")?;
    assert_eq!(
        cut.ended.iter().map(|ended| ended.ending).collect::<Vec<_>>(),
        [Ending::Forgotten],
        "{cut:?}"
    );
    // Not even a RST that the guest ignores brings it back.
    let reset = frames::tcp_segment(&revoked.ends, revoked.ports, (3, 2), frames::tcp_flags::RST, &[]);
    assert!(!lab.peer.delivers(&lab.guest, &reset)?);
    assert!(!revoked.carries_back()? && !revoked.carries()?);
    Ok(())
}

#[test]
fn a_connection_of_the_guest_ends_when_a_filter_forbids_it() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(OPENS))?;
    let (forbidden, kept) = (lab.of_guest("10.0.0.7", 25), lab.of_guest("10.0.0.7", 443));
    assert!(forbidden.opens()? && kept.opens()?);
    let cut = lab.define(&filter(
        "<rule action='accept' direction='out' priority='300'><tcp dstportstart='443'/></rule>",
    ))?;
    assert_eq!(cut.ended.len(), 1, "{cut:?}");
    assert!(!forbidden.carries()? && !forbidden.carries_back()?);
    assert!(kept.carries()? && kept.carries_back()?);
    Ok(())
}

#[test]
fn rules_that_judge_each_packet_stop_a_connection_by_themselves_and_a_cut_does_not_revive_it() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let rules = "<rule action='accept' direction='in'><tcp dstportstart='22' ipset='admins' ipsetflags='src'/></rule>";
    let drop = "<rule action='drop' direction='inout' priority='900'><all/></rule>";
    let lab = lab(&format!("<filter name='f'>{rules}{OPENS}{drop}</filter>"))?;
    let connection = lab.to_guest("10.0.0.9", 1009);
    assert!(connection.opens()?);
    let cut = lab.revoke("10.0.0.9")?;
    assert_eq!((cut.ended.len(), cut.failures.len()), (0, 0), "{cut:?}");
    assert!(!connection.carries()? && !connection.carries_back()?);
    // Forgotten, the guest's data would have made it a connection of its own.
    assert!(!connection.carries()?);
    Ok(())
}

#[test]
fn a_connection_of_ipv6_ends_when_a_filter_forbids_it() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let filter = |ports: &str| {
        format!(
            "<filter name='f'><rule action='accept' direction='inout'><all-ipv6 state='ESTABLISHED'/></rule>
             <rule action='accept' direction='in'><tcp-ipv6 {ports} state='NEW'/></rule>
             <rule action='drop' direction='inout' priority='900'><all-ipv6/></rule></filter>"
        )
    };
    let lab = lab(&filter(""))?;
    lab.unbind("tap0")?;
    lab.bind_with("tap0", "<parameter name='IPV6' value='fd00::2'/>")?;
    let ends = Ends::v6(PEER, "fd00::9".parse()?, GUEST, "fd00::2".parse()?);
    let tcp = |port| Tcp { opener: &lab.peer, other: &lab.guest, ends, ports: (1009, port) };
    let (forbidden, kept) = (tcp(22), tcp(443));
    assert!(forbidden.opens()? && kept.opens()?);
    let cut = lab.define(&filter("dstportstart='443'"))?;
    let ended: Vec<_> = cut.ended.iter().map(ToString::to_string).collect();
    assert_eq!(ended, ["tap0: tcp [fd00::9]:1009 → [fd00::2]:22"]);
    assert!(!forbidden.carries()? && !forbidden.carries_back()?);
    assert!(kept.carries()? && kept.carries_back()?);
    Ok(())
}

#[test]
fn a_flow_of_udp_ends_when_its_address_leaves_a_set() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(""))?;
    let ends = ends("10.0.0.9");
    let (ask, answer) = (frames::udp(&ends, 5000, 53, b"?"), frames::udp(&ends.reverse(), 53, 5000, b"!"));
    assert!(lab.peer.delivers(&lab.guest, &ask)? && lab.guest.delivers(&lab.peer, &answer)?);
    assert_eq!(lab.revoke("10.0.0.9")?.ended.len(), 1);
    assert!(!lab.peer.delivers(&lab.guest, &ask)? && !lab.guest.delivers(&lab.peer, &answer)?);
    Ok(())
}

#[test]
fn connections_that_cannot_be_told_apart_are_left_alone_and_reported() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(""))?;
    let connection = lab.to_guest("10.0.0.9", 1009);
    assert!(connection.opens()?);
    let _other = lab.host.tap("tap2")?;
    lab.host.ip(&["link add br1 type bridge", "link set br1 up", "link set tap2 master br1"])?;
    lab.bind("tap2")?;
    let cut = lab.revoke("10.0.0.9")?;
    assert_eq!(cut.ended, []);
    assert!(
        matches!(&cut.failures[..], [CutFailure::SharedAddress { .. }, CutFailure::SharedAddress { .. }]),
        "{cut:?}"
    );
    assert!(connection.carries()?);
    Ok(())
}

#[test]
fn a_rule_on_what_conntrack_does_not_know_leaves_connections_alone_and_is_reported() -> Result<()> {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = lab(&filter(OPENS))?;
    let connection = lab.to_guest("10.0.0.9", 1009);
    assert!(connection.opens()?);
    let by_mac = format!(
        "<rule action='accept' direction='in' priority='150'><tcp srcmacaddr='{PEER}' dstportstart='22'/></rule>"
    );
    let cut = lab.define(&filter(&by_mac))?;
    assert_eq!(cut.ended, []);
    let told: Vec<_> = cut.failures.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("asks for the source MAC of packets"), "{told:?}");
    assert!(connection.carries()?);
    Ok(())
}
