//! The two FTP filters of the libvirt manual: real programs, raw frames, and the same chains as libvirt's.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver};
use nwfilter_testlab::seed::SeedLab;
use nwfilter_testlab::{Host, Libvirtd, Need, port_dev, skip_unless};
use nwfilter_xtables::Xtables;

const BY_PORT: (&str, &str) = ("ftp-by-port", include_str!("../../../xml-fixtures/seed/ftp-by-port.xml"));
const BY_STATE: (&str, &str) = ("ftp-by-state", include_str!("../../../xml-fixtures/seed/ftp-by-state.xml"));

const NEEDS: [Need; 6] = [
    Need::Root,
    Need::Tool("iptables-restore"),
    Need::Tool("ebtables-restore"),
    Need::Tool("vsftpd"),
    Need::Tool("curl"),
    Need::Tool("ping"),
];

/// A driver with stores of its own.
fn driver() -> (Driver, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
    (Driver::open(config, Xtables::default()).unwrap(), dir)
}

fn bind(driver: &Driver, xml: &str) -> nwfilter::Applied {
    driver.create_binding(read_binding("binding.xml", xml).into_result().unwrap()).unwrap()
}

fn keeps_its_promises((name, filter): (&str, &str)) {
    let lab = SeedLab::new().unwrap();
    let (driver, _dir) = driver();
    lab.host().enter(|| {
        driver.define_filter(name, filter).unwrap();
        for port in SeedLab::PORTS {
            let applied = bind(&driver, &lab.binding(port, name));
            assert_eq!(applied.warnings, []);
        }
    });
    let broken: Vec<_> = lab.checks(|_| ()).unwrap().into_iter().filter(|check| !check.holds()).collect();
    assert_eq!(broken, [], "with {name}\n{}", lab.host().saved().unwrap().iptables);
    for chain in ["I-tap0-mac", "I-tap0-ipv4-ip", "I-tap0-arp-mac", "I-tap0-arp-ip"] {
        assert_ne!(dropped(lab.host(), chain), 0, "what was spoofed is counted in {chain}");
    }
    lab.host().enter(|| {
        for port in SeedLab::PORTS {
            driver.delete_binding(&port_dev(port)).unwrap();
        }
    });
    for port in SeedLab::PORTS {
        let left = lab.host().saved().unwrap().port(port);
        assert!(left.is_empty(), "{left:?}");
    }
    assert!(!lab.host().run(&["iptables-save", "-t", "raw"]).unwrap().contains("CT-"));
}

/// Packets that the DROP rules of an ebtables chain counted.
fn dropped(host: &Host, chain: &str) -> u64 {
    let listed = host.run(&["ebtables", "-t", "nat", "-L", chain, "--Lc"]).unwrap();
    let counts = listed.lines().filter(|line| line.starts_with("-j DROP")).map(|line| {
        let count = line.split_once("pcnt = ").and_then(|(_, rest)| rest.split_ascii_whitespace().next());
        count.and_then(|count| count.parse::<u64>().ok()).expect("a DROP rule has a counter")
    });
    counts.sum()
}

#[test]
fn the_filter_by_port_lets_through_what_the_manual_says_and_nothing_else() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3], NEEDS[4], NEEDS[5]);
    keeps_its_promises(BY_PORT);
}

#[test]
fn the_filter_by_state_lets_through_what_the_manual_says_and_nothing_else() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3], NEEDS[4], NEEDS[5]);
    keeps_its_promises(BY_STATE);
}

#[test]
fn without_a_conntrack_helper_ftp_data_does_not_get_out() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], NEEDS[3], NEEDS[4], NEEDS[5]);
    let lab = SeedLab::new().unwrap();
    let (driver, _dir) = driver();
    lab.host().enter(|| {
        driver.define_filter(BY_PORT.0, BY_PORT.1).unwrap();
        let off = "<parameter name='CTRL_CT_HELPERS' value='none'/></filterref>";
        bind(&driver, &lab.binding("vnet0", BY_PORT.0).replace("</filterref>", off));
    });
    let checks = lab.checks(|_| ()).unwrap();
    let ftp = checks.iter().find(|check| check.what.contains("FTP")).unwrap();
    assert!(!ftp.holds(), "the check notices a transfer that hangs");
}

#[test]
fn the_helper_is_given_to_connections_of_the_port_alone() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let host = Host::new().unwrap();
    let _taps = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
    let (driver, _dir) = driver();
    host.enter(|| {
        driver.define_filter(BY_STATE.0, BY_STATE.1).unwrap();
        bind(&driver, &BINDING.replace("PORT", "tap0").replace("FILTER", BY_STATE.0));
        bind(&driver, &BINDING.replace("PORT", "tap1").replace("FILTER", "clean-traffic"));
    });
    let raw = host.run(&["iptables-save", "-t", "raw"]).unwrap();
    let rules: Vec<_> = raw.lines().filter(|line| line.starts_with("-A")).collect();
    assert_eq!(
        rules,
        [
            "-A PREROUTING -j nwfilter-ct",
            "-A OUTPUT -j nwfilter-ct",
            "-A CT-tap0 -d 10.0.0.2/32 -p tcp -m tcp --dport 21 -j CT --helper ftp",
            "-A nwfilter-ct -j CT-tap0",
        ]
    );
}

const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='PORT'/><mac address='52:54:00:7b:35:93'/>
  <filterref filter='FILTER'><parameter name='IP' value='10.0.0.2'/></filterref>
</filterbinding>";

#[test]
fn the_chains_are_those_that_libvirt_makes_rule_for_rule() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2], Need::Libvirtd);
    let (theirs, ours) = (Host::new().unwrap(), Host::new().unwrap());
    let _taps = [&theirs, &ours].map(|host| host.tap("tap0").unwrap());
    let libvirtd = Libvirtd::start(&theirs).unwrap();
    let (driver, _dir) = driver();
    for (name, filter) in [BY_PORT, BY_STATE] {
        let binding = BINDING.replace("PORT", "tap0").replace("FILTER", name);
        libvirtd.define(filter).unwrap();
        libvirtd.bind(&binding).unwrap();
        ours.enter(|| {
            driver.define_filter(name, filter).unwrap();
            bind(&driver, &binding);
        });
        let saved = [&theirs, &ours].map(|host| {
            use nwfilter_testlab::Tool;
            let saved = host.saved().unwrap();
            [(Tool::Ebtables, "nat"), (Tool::Iptables, "filter"), (Tool::Ip6tables, "filter")]
                .map(|(tool, table)| saved.table(tool, table))
        });
        assert_eq!(saved[0], saved[1], "{name}");
        assert_eq!(libvirtd.binding_dumpxml("tap0").unwrap().trim(), {
            let binding = driver.binding(&port_dev("tap0")).unwrap();
            nwfilter::xml::write_binding(&binding).trim().to_owned()
        });
        libvirtd.unbind("tap0").unwrap();
        ours.enter(|| driver.delete_binding(&port_dev("tap0")).unwrap());
    }
}
