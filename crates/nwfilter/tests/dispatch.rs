//! Many ports: packets find the chains of their port through a tree, to the same effect as through libvirt's list.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, frames, port_dev, skip_unless};
use nwfilter_xtables::{Dispatch, Settings, Xtables};

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore")];

/// Each guest may only be who it is, and only reach UDP port 1000 and up, each by its own number.
const FILTER: &str = "<filter name='f'>
  <filterref filter='no-mac-spoofing'/>
  <rule action='accept' direction='out'><tcp dstportstart='21'/></rule>
  <rule action='accept' direction='in'><tcp state='RELATED'/></rule>
  <rule action='accept' direction='inout'><udp dstportstart='$PORT'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

/// Taps by name, some of whose names begin alike, and one that is never bound.
const PORTS: [&str; 14] = [
    "vnet0", "vnet1", "vnet2", "vnet10", "vnet11", "vnet12", "vnet100", "vnet101", "vnet3", "vnet4", "tap",
    "tap1", "tap12", "v",
];
const UNBOUND: &str = "vnet1000";

struct Lab {
    host: Host,
    taps: Vec<Tap>,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let taps = PORTS.iter().chain([&UNBOUND]).map(|name| host.tap(name).unwrap()).collect();
        Self { host, taps, dir: tempfile::tempdir().unwrap() }
    }

    fn driver(&self, dispatch: Dispatch) -> Driver {
        let config = Config::new(self.dir.path().join("filters"), self.dir.path().join("bindings"));
        Driver::open(config, Xtables::new(Settings { dispatch, ..Settings::default() })).unwrap()
    }

    fn bind(&self, driver: &Driver, index: usize) {
        let text = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{}'/><mac address='{}'/><filterref filter='f'>
             <parameter name='PORT' value='{}'/></filterref></filterbinding>",
            PORTS[index],
            mac(index),
            1000 + index
        );
        let binding = read_binding("binding.xml", &text).into_result().unwrap();
        self.host.enter(|| driver.create_binding(binding)).unwrap();
    }

    /// Whether a frame to a UDP port passes from a port to another, `after` which a frame to another UDP port does.
    fn passes(&self, (from, to): (usize, usize), (number, after): (usize, usize), spoofed: bool) -> bool {
        let sender = if spoofed { Mac::new([0x52, 0x54, 0, 0, 0xff, from as u8]) } else { mac(from) };
        let ip = |index: usize| format!("10.0.0.{}", index + 1).parse().unwrap();
        let frame = |sender, number: usize| {
            let number = number as u16;
            frames::udp(&Ends::v4(sender, ip(from), mac(to), ip(to)), number, number, b"x")
        };
        let (tried, last) = (frame(sender, number), frame(mac(from), after));
        self.taps[to].drain().unwrap();
        self.taps[from].send(&tried).unwrap();
        self.taps[from].send(&last).unwrap();
        let both = [&tried, &last];
        let first =
            self.taps[to].expect(Duration::from_secs(5), |frame| both.iter().any(|sent| *sent == frame));
        first.unwrap().expect("a frame that passes") == tried
    }

    /// Checks that the first `bound` ports are filtered, each by its own number, and the others by none.
    fn check(&self, bound: usize) {
        let unbound = PORTS.len();
        for (index, port) in PORTS.iter().enumerate() {
            let (own, other) = (1000 + index, 1000 + (index + 1) % PORTS.len());
            let filtered = index < bound;
            let (sent, received) = ((index, unbound), (unbound, index));
            assert_eq!(self.passes(sent, (other, own), false), !filtered, "{port} sends another's");
            assert_eq!(self.passes(sent, (own, own), true), !filtered, "{port} is somebody else");
            assert_eq!(self.passes(received, (other, own), false), !filtered, "{port} gets another's");
        }
    }

    fn rules(&self, chain: &str) -> Vec<String> {
        let saved = self.host.run(&["iptables-save", "-t", "filter"]).unwrap();
        let prefix = format!("-A {chain} ");
        saved.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect()
    }
}

fn mac(index: usize) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 0, index as u8])
}

#[test]
fn ports_are_filtered_alike_by_the_list_the_tree_and_on_the_way_from_one_to_the_other() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    let driver = lab.driver(Dispatch::Tree);
    lab.host.enter(|| driver.define_filter("f.xml", FILTER)).unwrap();
    for index in 0..7 {
        lab.bind(&driver, index);
    }
    assert_eq!(lab.rules("libvirt-in").len(), 7);
    lab.check(7);
    for index in 7..PORTS.len() {
        lab.bind(&driver, index);
    }
    assert_eq!(lab.rules("libvirt-in"), ["-j nwfilter-in"]);
    assert!(lab.rules("nwfilter-in-vnet1").contains(&"-m physdev --physdev-in vnet1 -g FI-vnet1".to_owned()));
    assert!(lab.host.saved().unwrap().iptables.contains("-j CTD-tcp-21"));
    lab.check(PORTS.len());

    // What is no port's packet gets to the rules of others behind the tree.
    let theirs = ["ebtables", "-t", "nat", "-A", "PREROUTING", "-i", UNBOUND, "-p", "ARP", "-j", "DROP"];
    lab.host.run(&theirs).unwrap();
    let arp = frames::arp(
        mac(90),
        mac(91),
        frames::Arp::request(mac(90), "10.0.0.90".parse().unwrap(), "10.0.0.91".parse().unwrap()),
    );
    assert!(!lab.taps[PORTS.len()].delivers(&lab.taps[0], &arp).unwrap());

    // Another process with other words for the same thing finds nothing to do.
    let other = lab.driver(Dispatch::Tree);
    assert!(lab.host.enter(|| other.diff()).unwrap().is_empty());
    assert_eq!(lab.host.enter(|| other.reload()).unwrap().applied.commits, 0);

    let beside = lab.driver(Dispatch::Keep);
    assert!(lab.host.enter(|| beside.diff()).unwrap().is_empty());

    let list = lab.driver(Dispatch::List);
    lab.host.enter(|| list.reload()).unwrap();
    assert!(lab.host.enter(|| beside.diff()).unwrap().is_empty());
    let saved = lab.host.saved().unwrap();
    assert_eq!(lab.rules("libvirt-in").len(), PORTS.len());
    assert!(!format!("{saved:?}").contains("nwfilter-in") && !format!("{saved:?}").contains("CTD"));
    lab.check(PORTS.len());

    lab.host.enter(|| driver.reload()).unwrap();
    for port in &PORTS[7..] {
        lab.host.enter(|| driver.delete_binding(&port_dev(port))).unwrap();
    }
    assert_eq!(lab.rules("libvirt-in").len(), 7);
    lab.check(7);
}

#[test]
fn damage_to_the_dispatch_tree_is_found_and_repaired() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new();
    let driver = lab.driver(Dispatch::Tree);
    lab.host.enter(|| driver.define_filter("f.xml", FILTER)).unwrap();
    (0..PORTS.len()).for_each(|index| lab.bind(&driver, index));
    let whole = lab.host.saved().unwrap();
    for damage in [
        "iptables -F libvirt-in",
        "iptables -F nwfilter-in-vnet1",
        "iptables -I nwfilter-in-vnet 1 -j ACCEPT",
        "iptables -D nwfilter-out-tap -m physdev --physdev-out tap1 --physdev-is-bridged -g FO-tap1",
        "iptables -t raw -F CTD-tcp-21",
        "ebtables -t nat -F nwfilter-in",
        "ebtables -t nat -D PREROUTING -j nwfilter-in",
        "iptables -A libvirt-in -m physdev --physdev-in vnet1 -g FI-vnet1",
    ] {
        let words: Vec<_> = damage.split(' ').collect();
        lab.host.run(&words).unwrap();
        assert!(!lab.host.enter(|| driver.diff()).unwrap().is_empty(), "{damage}");
        lab.host.enter(|| driver.reload()).unwrap();
        assert_eq!(whole.diff(&lab.host.saved().unwrap()), None, "{damage}");
    }
}
