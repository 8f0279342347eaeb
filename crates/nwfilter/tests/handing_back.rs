//! A host with many ports goes from libvirt to us and back to libvirt.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use nwfilter::{Config, Driver};
use nwfilter_testlab::{Host, Libvirtd, Need, Saved, skip_unless};
use nwfilter_xtables::{Dispatch, Settings, Xtables};

const PORTS: usize = 9;

#[test]
fn libvirt_takes_ports_back_from_a_list_as_it_left_them() {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let host = Host::new().unwrap();
    let _taps: Vec<_> = (0..PORTS).map(|index| host.tap(&format!("vnet{index}")).unwrap()).collect();
    let mut daemon = Libvirtd::start(&host).unwrap();
    daemon
        .define(
            "<filter name='f'><filterref filter='no-mac-spoofing'/>
               <rule action='accept' direction='in'><tcp dstportstart='22'/></rule></filter>",
        )
        .unwrap();
    for index in 0..PORTS {
        daemon
            .bind(&format!(
                "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-{index:012x}</uuid></owner>
                 <portdev name='vnet{index}'/><mac address='52:54:00:00:00:{index:02x}'/>
                 <filterref filter='f'/></filterbinding>"
            ))
            .unwrap();
    }
    let libvirts = host.saved().unwrap();
    daemon.stop().unwrap();

    let take_over = |dispatch| {
        let config = Config::new(
            daemon.path("/etc/libvirt/nwfilter").unwrap(),
            daemon.path("/run/libvirt/nwfilter-binding").unwrap(),
        );
        let settings = Settings { dispatch, ..Settings::default() };
        let driver = Driver::open(config, Xtables::new(settings)).unwrap();
        host.enter(|| driver.reload()).unwrap();
        assert!(host.enter(|| driver.diff()).unwrap().is_empty());
    };
    take_over(Dispatch::Tree);
    assert!(host.saved().unwrap().iptables.contains("-j nwfilter-in"));

    take_over(Dispatch::List);
    assert_same(&libvirts, &host.saved().unwrap());
    daemon.start_again().unwrap();
    assert_eq!(daemon.virsh(&["nwfilter-binding-list"]).unwrap().matches("vnet").count(), PORTS);
    assert_same(&libvirts, &host.saved().unwrap());
}

/// The same rules for each port, and none besides; libvirt's list has an order of its own each time.
fn assert_same(expected: &Saved, found: &Saved) {
    for port in (0..PORTS).map(|port| format!("vnet{port}")) {
        assert_eq!(expected.port(&port).diff(&found.port(&port)), None);
    }
    let count =
        |saved: &Saved| [&saved.ebtables, &saved.iptables, &saved.ip6tables].map(|text| text.lines().count());
    assert_eq!(count(expected), count(found));
}
