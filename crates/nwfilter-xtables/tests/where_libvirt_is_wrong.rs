//! Filters on which libvirt's own driver fails: here they work, and packets prove it, or they are refused with a
//! reason before anything is touched.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use nwfilter_rules::{Backend, Batch, RulesError, instantiate};
use nwfilter_testlab::frames::{self, Arp, tcp_flags};
use nwfilter_testlab::{BRIDGE_MAC, Ends, Host, Libvirtd, Mac, Need, Saved, Tap, skip_unless};
use nwfilter_xml::{Params, read_binding, read_filter};
use nwfilter_xtables::{Settings, Xtables};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);

/// A guest at `tap0` and its peer at `tap1`.
struct Lab {
    host: Host,
    guest: Tap,
    peer: Tap,
}

impl Lab {
    fn new() -> Result<Self> {
        let host = Host::new()?;
        let (guest, peer) = (host.tap("tap0")?, host.tap("tap1")?);
        Ok(Self { host, guest, peer })
    }

    fn apply(&self, backend: &Xtables, filter: &str, params: &[(&str, &str)]) -> Result<()> {
        let batch = batch(filter, params)?;
        self.host.enter(|| backend.apply(&batch))?;
        assert_eq!(self.host.enter(|| backend.plan(&batch))?.differences, []);
        Ok(())
    }

    fn sent_by_guest(&self, frame: &[u8]) -> Result<bool> {
        self.guest.delivers(&self.peer, frame)
    }

    fn to_guest(&self, frame: &[u8]) -> Result<bool> {
        self.peer.delivers(&self.guest, frame)
    }
}

fn batch(filter: &str, params: &[(&str, &str)]) -> Result<Batch> {
    let filter = read_filter("f.xml", filter).into_result()?;
    let mut values = Params::new();
    for (name, value) in params {
        values.insert(name.parse()?, value)?;
    }
    let mut binding = read_binding("b.xml", &binding(filter.name.as_str())).into_result()?;
    binding.params = values;
    let mut batch = Batch::default();
    let filters = BTreeMap::from([(filter.name.clone(), filter)]);
    batch.filter("tap0".parse()?, Arc::new(instantiate(&filters, &binding)?));
    Ok(batch)
}

fn binding(filter: &str) -> String {
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='tap0'/><mac address='{GUEST}'/><filterref filter='{filter}'/></filterbinding>"
    )
}

fn refusal(filter: &str, params: &[(&str, &str)]) -> String {
    let error = batch(filter, params).unwrap_err();
    assert!(error.downcast_ref::<RulesError>().is_some(), "{error}");
    error.to_string()
}

fn ends() -> Result<Ends> {
    Ok(Ends::v4(GUEST, "10.0.0.2".parse()?, PEER, "10.0.0.9".parse()?))
}

fn ends6() -> Result<Ends> {
    Ok(Ends::v6(GUEST, "2001:db8::2".parse()?, PEER, "2001:db8::9".parse()?))
}

/// What libvirt says to a filter that it should take.
fn libvirt_refuses(filter: &str) -> Result<String> {
    let host = Host::new()?;
    let _port = host.tap("tap0")?;
    let daemon = Libvirtd::start(&host)?;
    let name = read_filter("f.xml", filter).into_result()?.name;
    let refused = daemon.define(filter).and_then(|()| daemon.bind(&binding(name.as_str())));
    Ok(refused.err().context("libvirt takes it")?.to_string())
}

#[test]
fn continue_on_an_ip_rule_counts_and_goes_on_to_the_next() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let filter = "<filter name='f'>
        <rule action='continue' direction='out'><tcp dstportstart='80'/></rule>
        <rule action='drop' direction='out'><tcp dstportstart='80' dstportend='81'/></rule>
      </filter>";
    assert!(libvirt_refuses(filter)?.contains("CONTINUE"));
    let lab = Lab::new()?;
    lab.apply(&Xtables::default(), filter, &[])?;
    let passes = |port| lab.sent_by_guest(&frames::tcp(&ends()?, 1000, port, tcp_flags::SYN));
    assert!(!passes(80)?);
    assert!(!passes(81)?);
    assert!(passes(82)?);
    let counted = lab.host.run(&["iptables", "-nvxL", "FI-tap0"])?;
    let packets: Vec<_> = counted.lines().skip(2).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(packets, ["1", "2"], "{counted}");
    Ok(())
}

#[test]
fn dstipto_of_an_ipv6_rule_is_an_ipv6_address() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Libvirtd);
    let filter = "<filter name='f'>
        <rule action='drop' direction='out'>
          <udp-ipv6 dstipfrom='2001:db8::5' dstipto='2001:db8::9'/>
        </rule>
      </filter>";
    assert!(libvirt_refuses(filter)?.contains("dstipto"));
    let lab = Lab::new()?;
    lab.apply(&Xtables::default(), filter, &[])?;
    assert!(!lab.sent_by_guest(&frames::udp(&ends6()?, 1, 2, b"inside"))?);
    let outside = Ends::v6(GUEST, "2001:db8::2".parse()?, PEER, "2001:db8::a".parse()?);
    assert!(lab.sent_by_guest(&frames::udp(&outside, 1, 2, b"outside"))?);
    Ok(())
}

#[test]
fn sub_chains_of_either_direction_work_in_any_order_of_priorities() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    for priority in [-1000, -501, -1, 1, 1000] {
        for (direction, guest_passes, peer_passes) in
            [("out", false, true), ("in", true, false), ("inout", false, false)]
        {
            let filter = format!(
                "<filter name='f' chain='arp-x' priority='{priority}'>
                   <rule action='drop' direction='{direction}' priority='-1000'><arp opcode='Request'/></rule>
                   <rule action='accept' direction='inout' priority='900'/>
                 </filter>"
            );
            let lab = Lab::new()?;
            lab.apply(&Xtables::default(), &filter, &[])?;
            let request = |src: Mac| -> Result<Vec<u8>> {
                let arp = Arp::request(src, "10.0.0.2".parse()?, "10.0.0.9".parse()?);
                Ok(frames::arp(src, Mac::BROADCAST, arp))
            };
            assert_eq!(lab.sent_by_guest(&request(GUEST)?)?, guest_passes, "{priority} {direction}");
            assert_eq!(lab.to_guest(&request(PEER)?)?, peer_passes, "{priority} {direction}");
        }
    }
    Ok(())
}

#[test]
fn the_protocol_inside_a_vlan_tag_is_the_one_that_was_named() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let lab = Lab::new()?;
    let filter = "<filter name='f'>
        <rule action='drop' direction='out'><vlan encap-protocol='arp'/></rule>
      </filter>";
    lab.apply(&Xtables::default(), filter, &[])?;
    let arp = frames::arp(GUEST, PEER, Arp::request(GUEST, "10.0.0.2".parse()?, "10.0.0.9".parse()?));
    assert!(!lab.sent_by_guest(&frames::vlan(7, &arp))?);
    assert!(lab.sent_by_guest(&frames::vlan(7, &frames::udp(&ends()?, 1, 2, b"data")))?);
    assert!(lab.sent_by_guest(&arp)?);
    Ok(())
}

#[test]
fn two_negated_ports_match_where_both_are_others() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    for (ipv6, element) in [(false, "tcp"), (false, "udp"), (true, "tcp-ipv6"), (true, "udp-ipv6")] {
        let lab = Lab::new()?;
        let is_tcp = element.starts_with("tcp");
        let more = if element == "tcp" { " flags='SYN/SYN' comment='both'" } else { " comment='both'" };
        let filter = format!(
            "<filter name='f'><rule action='drop' direction='out'>
               <{element} match='no' srcportstart='1000' dstportstart='80'/><{element}{more}/>
             </rule></filter>"
        );
        lab.apply(&Xtables::default(), &filter, &[])?;
        let ends = if ipv6 { ends6()? } else { ends()? };
        let passes = |src, dst| match is_tcp {
            true => lab.sent_by_guest(&frames::tcp(&ends, src, dst, tcp_flags::SYN)),
            false => lab.sent_by_guest(&frames::udp(&ends, src, dst, b"data")),
        };
        assert!(passes(1000, 80)?, "{element}: both ports are those of the rule");
        assert!(passes(1000, 81)?, "{element}: the source port is that of the rule");
        assert!(passes(1001, 80)?, "{element}: the destination port is that of the rule");
        assert!(!passes(1001, 81)?, "{element}: both ports are others");
    }
    Ok(())
}

#[test]
fn gratuitous_may_be_a_variable() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let lab = Lab::new()?;
    let filter = "<filter name='f'>
        <rule action='drop' direction='out'><arp gratuitous='$WHICH'/></rule>
      </filter>";
    lab.apply(&Xtables::default(), filter, &[("WHICH", "true")])?;
    let addr = "10.0.0.2".parse()?;
    assert!(!lab.sent_by_guest(&frames::arp(GUEST, Mac::BROADCAST, Arp::gratuitous(GUEST, addr)))?);
    let request = Arp::request(GUEST, addr, "10.0.0.9".parse()?);
    assert!(lab.sent_by_guest(&frames::arp(GUEST, Mac::BROADCAST, request))?);
    Ok(())
}

#[test]
fn an_ipset_works_on_every_ip_element_and_a_comment_may_be_a_variable() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Libvirtd);
    let filter = "<filter name='f'>
        <rule action='drop' direction='out'><udp ipset='blocked' comment='$WHY'/></rule>
      </filter>";
    let lab = Lab::new()?;
    lab.host.run(&["ipset", "create", "blocked", "hash:ip"])?;
    lab.host.run(&["ipset", "add", "blocked", "10.0.0.2"])?;
    lab.apply(&Xtables::default(), filter, &[("WHY", "spam")])?;
    assert!(!lab.sent_by_guest(&frames::udp(&ends()?, 1, 2, b"data"))?);
    let unblocked = Ends::v4(GUEST, "10.0.0.3".parse()?, PEER, "10.0.0.9".parse()?);
    assert!(lab.sent_by_guest(&frames::udp(&unblocked, 1, 2, b"data"))?);
    Ok(())
}

#[test]
fn an_ipset_with_flags_is_matched_with_them() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"));
    let filter = "<filter name='f'>
        <rule action='accept' direction='out'><udp ipset='allowed' ipsetflags='dst'/></rule>
        <rule action='drop' direction='out'><udp/></rule>
      </filter>";
    let lab = Lab::new()?;
    lab.host.run(&["ipset", "create", "allowed", "hash:ip"])?;
    lab.apply(&Xtables::default(), filter, &[])?;
    assert!(!lab.sent_by_guest(&frames::udp(&ends()?, 1, 2, b"data"))?);
    lab.host.run(&["ipset", "add", "allowed", "10.0.0.9"])?;
    assert!(lab.sent_by_guest(&frames::udp(&ends()?, 1, 2, b"data"))?);
    Ok(())
}

#[test]
fn a_variable_of_the_wrong_type_is_refused_with_filter_line_variable_and_value() {
    let filter = "<filter name='web'>\n<rule action='accept' direction='in'>\n<tcp dstportstart='$PORT'/></rule></filter>";
    assert_eq!(
        refusal(filter, &[("PORT", "http")]),
        "web:2: $PORT is 'http' here, but dstportstart needs a number from 0 to 65535, decimal or 0x hex"
    );
    let filter = "<filter name='lan'><rule action='accept' direction='in'><ip srcipaddr='$LAN' srcipmask='$BITS'/></rule></filter>";
    assert_eq!(
        refusal(filter, &[("LAN", "2001:db8::1"), ("BITS", "24")]),
        "lan:1: $LAN is '2001:db8::1' here, but srcipaddr needs an IPv4 address"
    );
}

#[test]
fn ports_with_a_negated_protocol_are_refused_with_advice() {
    let filter = "<filter name='f'><rule action='drop' direction='out'>
        <ip match='no' protocol='tcp' dstportstart='80'/></rule></filter>";
    let error = refusal(filter, &[]);
    assert!(error.starts_with("f:1: ports cannot be matched together with a negated protocol"), "{error}");
}

#[test]
fn ip_rules_work_where_bridge_filtering_was_off_or_are_refused_where_it_must_stay_off() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let filter = "<filter name='f'><rule action='drop' direction='out'><udp/></rule></filter>";
    let host = Host::builder().bridge_nf(false).build()?;
    let (guest, peer) = (host.tap("tap0")?, host.tap("tap1")?);
    let lab = Lab { host, guest, peer };
    let before = lab.host.saved()?;

    let careful = Xtables::new(Settings { enable_bridge_filtering: false, ..Settings::default() });
    let error = lab.apply(&careful, filter, &[]).unwrap_err().to_string();
    assert!(error.contains("bridge-nf-call-iptables is 0, and the settings forbid to change it"), "{error}");
    assert_eq!(before.diff(&lab.host.saved()?), None);
    assert!(lab.sent_by_guest(&frames::udp(&ends()?, 1, 2, b"data"))?);
    let ethernet = "<filter name='f'><rule action='drop' direction='out'><arp/></rule></filter>";
    lab.apply(&careful, ethernet, &[])?;

    lab.apply(&Xtables::default(), filter, &[])?;
    assert!(!lab.sent_by_guest(&frames::udp(&ends()?, 1, 2, b"data"))?);
    Ok(())
}

#[test]
fn what_cannot_be_enforced_is_refused_and_the_kernel_stays_as_it_was() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let lab = Lab::new()?;
    let filtered = "<filter name='f'><rule action='drop' direction='out'><udp/></rule>
        <rule action='drop' direction='in'><arp/></rule>
        <rule action='drop' direction='in'><udp-ipv6/></rule></filter>";
    lab.apply(&Xtables::default(), filtered, &[])?;
    let before = lab.host.saved()?;
    let unchanged = |saved: Saved| before.diff(&saved);

    // Refused while it is read, while it is bound, and by the kernel at last: an ipset that does not exist.
    let unread =
        "<filter name='f'><rule action='drop' direction='out'><tcp connlimit-above='0x3'/></rule></filter>";
    assert!(batch(unread, &[]).is_err());
    let lists = "<filter name='f'><rule action='drop' direction='out'>
        <tcp srcipaddr='$A' dstipaddr='$B'/></rule></filter>";
    let error = refusal(lists, &[("A", "10.0.0.1"), ("A", "10.0.0.2"), ("B", "10.0.0.3")]);
    assert!(error.contains("$A has 2 values and $B has 1"), "{error}");
    assert_eq!(unchanged(lab.host.saved()?), None);

    let late = "<filter name='late' chain='arp'><rule action='accept' direction='inout'><arp/></rule>
        <rule action='drop' direction='out'><udp dstportstart='53'/></rule>
        <rule action='drop' direction='out'><all-ipv6 ipset='nosuchset' ipsetflags='src'/></rule></filter>";
    let error = lab.apply(&Xtables::default(), late, &[]).unwrap_err().to_string();
    assert_eq!(
        error,
        "late:3: refused on port tap0 in ip6tables: FI-tap0: Set nosuchset doesn't exist.\n  \
         rule: -A FI-tap0 -m set --match-set nosuchset src -j DROP"
    );
    assert_eq!(unchanged(lab.host.saved()?), None, "iptables had committed when ip6tables refused");

    let fresh = Lab::new()?;
    fresh.host.run(&["iptables", "-A", "FORWARD", "-p", "tcp", "-j", "ACCEPT"])?;
    let before = fresh.host.saved()?;
    assert!(fresh.apply(&Xtables::default(), late, &[]).is_err());
    assert_eq!(before.diff(&fresh.host.saved()?), None);
    assert!(fresh.sent_by_guest(&frames::udp(&ends()?, 1, 53, b"data"))?);
    Ok(())
}

#[test]
fn packets_to_the_host_meet_the_same_rules() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    let host = Host::builder().bridge_addr("10.0.0.254/24").build()?;
    let (guest, peer) = (host.tap("tap0")?, host.tap("tap1")?);
    let lab = Lab { host, guest, peer };
    let to_host = Ends::v4(GUEST, "10.0.0.2".parse()?, BRIDGE_MAC, "10.0.0.254".parse()?);
    lab.host.run(&["ip", "neigh", "replace", "10.0.0.2", "lladdr", &GUEST.to_string(), "dev", "br0"])?;
    let answered = |lab: &Lab, id| -> Result<bool> {
        lab.guest.drain()?;
        lab.guest.send(&frames::icmp_echo(&to_host, id, 1))?;
        let is_reply =
            |frame: &[u8]| frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == 1 && frame[34] == 0;
        Ok(lab.guest.expect(std::time::Duration::from_millis(150), is_reply)?.is_some())
    };
    assert!(answered(&lab, 1)?);
    let filter = "<filter name='f'><rule action='drop' direction='out'><icmp type='8'/></rule></filter>";
    lab.apply(&Xtables::default(), filter, &[])?;
    assert!(!answered(&lab, 2)?);
    Ok(())
}
