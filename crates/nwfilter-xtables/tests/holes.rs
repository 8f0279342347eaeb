//! Ways around a port's rules that were open once, with real frames.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use nwfilter_rules::{Backend, Batch, Ruleset, Subject, instantiate};
use nwfilter_testlab::{Ends, Host, Mac, Need, frames, skip_unless};
use nwfilter_xml::{PortDev, read_binding, read_filter};
use nwfilter_xtables::Xtables;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);

const NO_SPOOFING: &str = "<filter name='f' chain='mac'><rule action='accept' direction='out'>\
     <mac srcmacaddr='$MAC'/></rule><rule action='drop' direction='out'><mac/></rule></filter>";

fn ruleset(filter: &str) -> Arc<Ruleset> {
    let filter = read_filter("f.xml", filter).into_result().unwrap();
    let binding = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='any'/><mac address='{GUEST}'/><filterref filter='f'/></filterbinding>"
    );
    let filters = BTreeMap::from([(filter.name.clone(), filter)]);
    Arc::new(instantiate(&filters, &read_binding("b.xml", &binding).into_result().unwrap()).unwrap())
}

fn port(name: &str) -> PortDev {
    name.parse().unwrap()
}

fn from(source: Mac) -> Vec<u8> {
    let ends = Ends::v4(source, "10.0.0.2".parse().unwrap(), PEER, "10.0.0.9".parse().unwrap());
    frames::udp(&ends, 1000, 2000, b"frame")
}

#[test]
fn a_port_keeps_its_rules_when_the_sub_chain_of_another_would_have_the_name_of_its_own() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let host = Host::new().unwrap();
    let [victim, other, peer] = ["web-arp", "web", "tap0"].map(|name| host.tap(name).unwrap());
    let accepts_all = "<filter name='f' chain='arp-mac'><rule action='accept' direction='out'/></filter>";
    let apply = |backend: &Xtables, name: &str, filter: &str| {
        let mut batch = Batch::default();
        batch.filter(port(name), ruleset(filter));
        host.enter(|| backend.apply(&batch)).unwrap();
    };
    for order in [[0, 1], [1, 0]] {
        let backend = Xtables::default();
        for index in order {
            let (name, filter) = [("web-arp", NO_SPOOFING), ("web", accepts_all)][index];
            apply(&backend, name, filter);
        }
        // A reload of both, by a process that knows nothing of the names that were given.
        let mut both = Batch::default();
        both.filter(port("web-arp"), ruleset(NO_SPOOFING));
        both.filter(port("web"), ruleset(accepts_all));
        assert_eq!(host.enter(|| Xtables::default().plan(&both)).unwrap().differences, []);
        for _ in 0..20 {
            assert!(!victim.delivers(&peer, &from(STRANGER)).unwrap(), "a spoofed frame passes");
        }
        assert!(victim.delivers(&peer, &from(GUEST)).unwrap());
        assert!(other.delivers(&peer, &from(STRANGER)).unwrap());
        // Each can be deleted, and takes nothing of the other along.
        let mut gone = Batch::default();
        gone.remove(port("web"));
        host.enter(|| backend.apply(&gone)).unwrap();
        assert!(!victim.delivers(&peer, &from(STRANGER)).unwrap());
        gone.remove(port("web-arp"));
        host.enter(|| backend.apply(&gone)).unwrap();
        let left = host.saved().unwrap();
        assert!(!left.ebtables.contains("web"), "{}", left.ebtables);
    }
}

#[test]
fn two_ports_that_share_a_sub_chain_since_an_older_version_are_parted() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let host = Host::new().unwrap();
    let [victim, _other, peer] = ["web-arp", "web", "tap0"].map(|name| host.tap(name).unwrap());
    let shared = "*nat\n:libvirt-I-web ACCEPT\n:libvirt-I-web-arp ACCEPT\n:I-web-arp-mac ACCEPT\n\
                  -A PREROUTING -i web -j libvirt-I-web\n-A PREROUTING -i web-arp -j libvirt-I-web-arp\n\
                  -A libvirt-I-web -p ARP -j I-web-arp-mac\n-A libvirt-I-web-arp -j I-web-arp-mac\n";
    host.run_with_stdin(&["ebtables-restore", "--noflush"], shared).unwrap();
    assert!(victim.delivers(&peer, &from(STRANGER)).unwrap());
    let mut batch = Batch::default();
    batch.filter(port("web-arp"), ruleset(NO_SPOOFING));
    host.enter(|| Xtables::default().apply(&batch)).unwrap();
    assert!(!victim.delivers(&peer, &from(STRANGER)).unwrap());
    let saved = host.saved().unwrap();
    assert!(saved.ebtables.contains("-A libvirt-I-web -p ARP -j I-web-arp-mac"), "{}", saved.ebtables);
    let mut gone = Batch::default();
    gone.remove(port("web"));
    gone.remove(port("web-arp"));
    host.enter(|| Xtables::default().apply(&gone)).unwrap();
    let left = host.saved().unwrap();
    assert!(!left.ebtables.contains("web"), "{}", left.ebtables);
}

#[test]
fn a_rule_of_others_that_accepts_before_ours_is_a_difference_and_loses_its_place() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let host = Host::new().unwrap();
    let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    let backend = Xtables::default();
    let mut batch = Batch::default();
    batch.filter(port("tap0"), ruleset(NO_SPOOFING));
    host.enter(|| backend.apply(&batch)).unwrap();
    for opening in ["-j ACCEPT", "-p IPv4 -j ACCEPT", "-i tap0 -j mark --mark-set 1 --mark-target ACCEPT"] {
        let command = format!("ebtables -t nat -I PREROUTING 1 {opening}");
        host.run(&command.split(' ').collect::<Vec<_>>()).unwrap();
        assert!(guest.delivers(&peer, &from(STRANGER)).unwrap(), "{opening} opens the port");
        let differences = host.enter(|| backend.plan(&batch)).unwrap().differences;
        let is_ours = |subject: &Subject| *subject == Subject::Port(port("tap0"));
        assert!(differences.iter().any(|difference| is_ours(&difference.subject)), "{differences:?}");
        host.enter(|| backend.apply(&batch)).unwrap();
        assert!(!guest.delivers(&peer, &from(STRANGER)).unwrap(), "{opening}");
        assert!(guest.delivers(&peer, &from(GUEST)).unwrap(), "{opening}");
        assert_eq!(host.enter(|| backend.plan(&batch)).unwrap().differences, []);
    }
}

#[test]
fn ours_come_before_a_jump_to_a_chain_of_others_whatever_that_holds_now() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Tool("iptables"));
    let host = Host::new().unwrap();
    let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    let backend = Xtables::default();
    let mut batch = Batch::default();
    batch.filter(port("tap0"), ruleset(NO_SPOOFING));
    host.enter(|| backend.apply(&batch)).unwrap();
    let ebtables = |arguments: &str| {
        let command = format!("ebtables -t nat {arguments}");
        host.run(&command.split(' ').collect::<Vec<_>>()).unwrap();
    };
    // The policy of a chain of ebtables is ACCEPT, where nobody says otherwise.
    ebtables("-N open");
    ebtables("-I PREROUTING 1 -j open");
    assert!(guest.delivers(&peer, &from(STRANGER)).unwrap(), "it opens the port");
    assert_ne!(host.enter(|| backend.plan(&batch)).unwrap().differences, []);
    host.enter(|| backend.apply(&batch)).unwrap();
    assert!(!guest.delivers(&peer, &from(STRANGER)).unwrap());

    // Rules that are added to it later are not watched.
    ebtables("-N later -P RETURN");
    ebtables("-I PREROUTING 1 -j later");
    host.enter(|| backend.apply(&batch)).unwrap();
    ebtables("-A later -j ACCEPT");
    assert!(!guest.delivers(&peer, &from(STRANGER)).unwrap());
    assert_eq!(host.enter(|| backend.plan(&batch)).unwrap().differences, []);
}
