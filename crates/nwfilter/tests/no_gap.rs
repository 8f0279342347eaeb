//! While filters change, under streams of frames: no forbidden frame gets through, no allowed one is lost.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::Ipv4Addr;
use std::time::Duration;

use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver, Xtables};
use nwfilter_rules::{Applied, ApplyError, Backend, Batch, Difference, Installed, Ruleset};
use nwfilter_testlab::frames::{self, Arp};
use nwfilter_testlab::stream::{Stream, Tally, while_streaming};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, skip_unless};

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore")];

/// The filtered ports. Frames go out of the first and in to the second; the others make the batches larger.
const PORTS: [&str; 6] = ["tap0", "tap1", "tap2", "tap3", "tap4", "tap5"];

/// The address whose frames no variant lets in.
const UNWANTED: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x66]);

/// A host with filtered ports and two that are not.
struct Lab {
    host: Host,
    driver: Driver,
    _dir: tempfile::TempDir,
    taps: Vec<Tap>,
    outside: [Tap; 2],
}

impl Lab {
    fn new(backend: impl Backend + 'static) -> Self {
        let host = Host::new().unwrap();
        let taps: Vec<_> = PORTS.iter().map(|name| host.tap(name).unwrap()).collect();
        let outside = ["out0", "out1"].map(|name| host.tap(name).unwrap());
        // What nobody has sent from yet would be flooded to all ports.
        let places = taps.iter().chain(&outside).zip((0..6).map(guest).chain([0, 1].map(outsider)));
        for (tap, (mac, _)) in places {
            let (mac, name) = (mac.to_string(), tap.name());
            host.run(&["bridge", "fdb", "replace", &mac, "dev", name, "master", "static"]).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let config =
            Config { config_dir: dir.path().join("filters"), state_dir: dir.path().join("bindings") };
        let driver = Driver::open(config, backend).unwrap();
        Self { host, driver, _dir: dir, taps, outside }
    }

    fn define(&self, xml: &str) {
        self.host.enter(|| self.driver.define_filter("test.xml", xml)).unwrap();
    }

    fn bind(&self, number: u8) {
        let (mac, ip) = guest(number);
        let port = PORTS[usize::from(number)];
        let xml = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{port}'/><mac address='{mac}'/>
             <filterref filter='f'><parameter name='IP' value='{ip}'/></filterref></filterbinding>"
        );
        let binding = read_binding("binding.xml", &xml).into_result().unwrap();
        self.host.enter(|| self.driver.create_binding(binding)).unwrap();
    }

    fn unbind(&self, number: u8) {
        self.host.enter(|| self.driver.delete_binding(PORTS[usize::from(number)])).unwrap();
    }

    /// Queries out of the first port and into the second, and what must not pass there.
    fn streams(&self) -> [Stream<'_>; 2] {
        let (out, into) = (ends(guest(0), outsider(0)), ends(outsider(1), guest(1)));
        let other_ip = Ipv4Addr::new(10, 0, 0, 99);
        let spoofed = ends((guest(0).0, other_ip), outsider(0));
        let ipv6 =
            Ends::v6(guest(0).0, "fd00::1".parse().unwrap(), outsider(0).0, "fd00::2".parse().unwrap());
        let arp = Arp::request(guest(0).0, other_ip, outsider(0).1);
        [
            Stream {
                from: &self.taps[0],
                to: &self.outside[0],
                allowed: Box::new(move |number| frames::udp(&out, 4000, 53, &number.to_be_bytes())),
                forbidden: vec![
                    frames::udp(&out, 4000, 54, b"to another port"),
                    frames::udp(&out.with_src_mac(Mac::new([0x52, 0x54, 0, 0, 0, 0x99])), 4000, 53, b"mac"),
                    frames::udp(&spoofed, 4000, 53, b"ip"),
                    frames::udp(&ipv6, 4000, 53, b"ipv6"),
                    frames::arp(guest(0).0, outsider(0).0, arp),
                ],
            },
            Stream {
                from: &self.outside[1],
                to: &self.taps[1],
                allowed: Box::new(move |number| frames::udp(&into, 4000, 5000, &number.to_be_bytes())),
                forbidden: vec![
                    frames::udp(&into, 4000, 5001, b"to another port"),
                    frames::udp(&into.with_src_mac(UNWANTED), 4000, 5000, b"unwanted"),
                    frames::tcp(&into, 4000, 5000, frames::tcp_flags::SYN),
                ],
            },
        ]
    }
}

/// The guest behind a filtered port.
fn guest(number: u8) -> (Mac, Ipv4Addr) {
    (Mac::new([0x52, 0x54, 0, 0, 0, number + 1]), Ipv4Addr::new(10, 0, 0, number + 1))
}

/// Who is behind a port without filter.
fn outsider(number: u8) -> (Mac, Ipv4Addr) {
    (Mac::new([0x52, 0x54, 0, 0, 1, number]), Ipv4Addr::new(10, 0, 0, 100 + number))
}

fn ends((from_mac, from): (Mac, Ipv4Addr), (to_mac, to): (Mac, Ipv4Addr)) -> Ends {
    Ends::v4(from_mac, from, to_mac, to)
}

const MANY: u32 = 200;

/// A filter that lets through and drops the same frames whatever the number; its chains and rules differ.
fn variant(number: u32) -> String {
    let state = if number % 2 == 0 { "" } else { " state='NEW,ESTABLISHED'" };
    let more: String = (0..number % 7 + 1)
        .map(|n| {
            format!("<rule action='accept' direction='in'><tcp dstportstart='{}'/></rule>", 6000 + number + n)
        })
        .collect();
    let ethernet = match number % 3 {
        0 => "<filterref filter='clean-traffic'/>",
        1 => {
            "<rule action='drop' direction='out' priority='-900'><mac match='no' srcmacaddr='$MAC'/></rule>
             <rule action='drop' direction='out' priority='-850'><ip match='no' srcipaddr='$IP'/></rule>
             <rule action='drop' direction='out' priority='-800'><arp match='no' arpsrcipaddr='$IP'/></rule>
             <rule action='drop' direction='inout' priority='-750'><ipv6/></rule>"
        }
        _ => "<filterref filter='no-arp-spoofing'/><filterref filter='no-mac-spoofing'/><filterref filter='no-ip-spoofing'/>
              <rule action='drop' direction='inout' priority='-750'><ipv6/></rule>",
    };
    format!(
        "<filter name='f' chain='root'>
           <rule action='drop' direction='in' priority='-950'><mac srcmacaddr='{UNWANTED}'/></rule>
           {ethernet}{more}
           <rule action='accept' direction='out'><udp dstportstart='53'{state}/></rule>
           <rule action='accept' direction='in'><udp dstportstart='5000'{state}/></rule>
           <rule action='drop' direction='inout'><all/></rule>
         </filter>"
    )
}

fn assert_exact(tally: Tally) {
    eprintln!("{tally:?}");
    assert!(tally.allowed > 0 && tally.forbidden > 0, "{tally:?}");
    assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
}

#[test]
fn two_hundred_redefinitions_let_nothing_through_and_lose_nothing() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(Xtables::default());
    lab.define(&variant(0));
    (0..6).for_each(|number| lab.bind(number));
    let tally = while_streaming(&lab.streams(), |streaming| {
        (1..=MANY).for_each(|number| lab.define(&variant(number)));
        streaming.take()
    });
    assert_exact(tally.unwrap());
}

/// A backend that goes through another state of the ports before it does what it is asked to.
struct Detour {
    through: Option<Ruleset>,
}

impl Backend for Detour {
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let mut detour = Batch::default();
        for port in batch.ports.keys() {
            match &self.through {
                Some(ruleset) => detour.filter(port.clone(), ruleset.clone().into()),
                None => detour.remove(port.clone()),
            }
        }
        Xtables::default().apply(&detour)?;
        Xtables::default().apply(batch)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        Xtables::default().installed()
    }

    fn diff(&self, batch: &Batch) -> Result<Vec<Difference>, ApplyError> {
        Xtables::default().diff(batch)
    }
}

#[test]
fn a_gap_of_one_transaction_is_seen() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    for through in [None, Some(Ruleset::drop_all())] {
        let opens = through.is_none();
        let lab = Lab::new(Detour { through });
        lab.define(&variant(0));
        (0..2).for_each(|number| lab.bind(number));
        let tally = while_streaming(&lab.streams(), |streaming| {
            streaming.take()?;
            (1..=5).for_each(|number| lab.define(&variant(number)));
            streaming.take()
        })
        .unwrap();
        eprintln!("{tally:?}");
        assert_eq!((tally.leaked > 0, tally.lost > 0), (opens, !opens), "{tally:?}");
    }
}

#[test]
fn a_port_passes_nothing_forbidden_from_the_moment_its_binding_is_there() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(Xtables::default());
    lab.define(&variant(0));
    // Ports beside them have their rules already.
    (2..6).for_each(|number| lab.bind(number));
    while_streaming(&lab.streams(), |streaming| {
        for _ in 0..20 {
            streaming.take()?;
            (0..2).for_each(|number| lab.bind(number));
            let before = streaming.take()?;
            assert!(before.leaked > 0, "nothing was forbidden before: {before:?}");
            assert_eq!(before.lost, 0, "{before:?}");
            std::thread::sleep(Duration::from_millis(20));
            assert_exact(streaming.take()?);
            (0..2).for_each(|number| lab.unbind(number));
            let after = streaming.take()?;
            assert_eq!(after.lost, 0, "{after:?}");
        }
        Ok(())
    })
    .unwrap();
}

/// Filters that drop the same frames, but each in another table: UDP to port 54 and TCP to port 5000.
const TABLES: [&str; 2] = [
    "<filter name='f' chain='root'>
       <rule action='drop' direction='out'><ip protocol='udp' dstportstart='54'/></rule>
       <rule action='drop' direction='in'><ip protocol='udp' dstportstart='5001'/></rule>
     </filter>",
    "<filter name='f' chain='root'>
       <rule action='drop' direction='out'><udp dstportstart='54'/></rule>
       <rule action='drop' direction='in'><udp dstportstart='5001'/></rule>
     </filter>",
];

#[test]
fn a_rule_that_moves_to_another_table_leaves_no_gap() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(Xtables::default());
    lab.define(TABLES[0]);
    (0..6).for_each(|number| lab.bind(number));
    let mut streams = lab.streams();
    streams.iter_mut().for_each(|stream| stream.forbidden.truncate(1));
    let mut tallies = [Tally::default(); 2];
    while_streaming(&streams, |streaming| {
        for number in 1..=20 {
            lab.define(TABLES[number % 2]);
            tallies[number % 2] += streaming.take()?;
        }
        Ok(())
    })
    .unwrap();
    tallies.into_iter().for_each(assert_exact);
}
