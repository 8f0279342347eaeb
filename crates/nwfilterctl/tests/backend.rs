//! Ports move from one backend to the other with their guests running, and are never filtered by both for long.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Output;

use nwfilter_testlab::stream::{Stream, while_streaming};
use nwfilter_testlab::{Ends, Host, Mac, Need, Tap, frames, skip_unless};

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);

struct Lab {
    host: Host,
    guest: Tap,
    peer: Tap,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
        let lab = Self { host, guest, peer, dir: tempfile::tempdir().unwrap() };
        for (port, mac) in [("tap0", GUEST), ("tap1", STRANGER)] {
            let binding = format!(
                "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
                 <portdev name='{port}'/><mac address='{mac}'/><filterref filter='no-mac-spoofing'/></filterbinding>"
            );
            fs::write(lab.dir.path().join(format!("{port}.xml")), binding).unwrap();
        }
        lab
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]);
        command.args(args).env_remove("RUST_LOG").env_remove("NWFILTER_BACKEND").output().unwrap()
    }

    fn done(&self, args: &[&str]) {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn passes(&self, source: Mac) -> bool {
        let ends = Ends::v4(source, "10.0.0.2".parse().unwrap(), STRANGER, "10.0.0.9".parse().unwrap());
        self.guest.delivers(&self.peer, &frames::udp(&ends, 1000, 2000, b"frame")).unwrap()
    }

    /// Which backends have rules of ports.
    fn held_by(&self) -> (bool, bool) {
        let native =
            self.host.run(&["nft", "list", "tables", "bridge"]).unwrap().contains("table bridge nwfilter");
        (native, self.host.saved().unwrap().ebtables.contains("libvirt-I-tap0"))
    }

    fn is_filtered(&self) {
        assert!(self.passes(GUEST));
        assert!(!self.passes(STRANGER), "a spoofed frame passes");
        self.done(&["--backend", "auto", "diff"]);
    }
}

#[test]
fn reload_moves_ports_to_the_other_backend_and_back() {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("nft")
    );
    let lab = Lab::new();
    lab.done(&["binding-create", "tap0.xml"]);
    assert_eq!(lab.held_by(), (false, true));
    lab.is_filtered();

    lab.done(&["--backend", "nftables", "reload"]);
    assert_eq!(lab.held_by(), (true, false));
    lab.is_filtered();

    let refused = lab.refused(&["--backend", "xtables", "binding-create", "tap1.xml"]);
    assert!(refused.contains("filtered by nftables; use --backend nftables"), "{refused}");
    assert!(refused.contains("'nwfilterctl reload --backend xtables'"), "{refused}");
    lab.done(&["--backend", "auto", "binding-create", "tap1.xml"]);
    lab.done(&["--backend", "auto", "binding-delete", "tap1"]);
    assert_eq!(lab.held_by(), (true, false));

    lab.done(&["--backend", "xtables", "reload"]);
    assert_eq!(lab.held_by(), (false, true));
    lab.is_filtered();
    let refused = lab.refused(&["--backend", "nftables", "binding-create", "tap1.xml"]);
    assert!(refused.contains("filtered by xtables"), "{refused}");
    lab.done(&["--backend", "auto", "binding-delete", "tap0"]);
    assert_eq!(lab.held_by(), (false, false));
}

/// The tables of libvirt 12.8.0's nftables driver, as far as they matter, for a port of the filter no-mac-spoofing.
fn libvirts_tables(lab: &Lab, port: &str) {
    let chains = |own: &str, priority: u8| {
        format!(
            "map vmap-oif {{ type iface_index : verdict; }}
             map vmap-iif {{ type iface_index : verdict; }}
             chain postrouting {{ type filter hook postrouting priority {priority}; policy accept; oif vmap @vmap-oif; }}
             chain prerouting {{ type filter hook prerouting priority {priority}; policy accept; iif vmap @vmap-iif; }}
             chain {port}-in {{ }}
             {own}"
        )
    };
    let ethernet = chains(
        &format!(
            "chain {port}-out {{ jump {port}-mac-out; accept; }}
             chain {port}-mac-out {{ ether saddr {GUEST} return; drop; }}"
        ),
        0,
    );
    let inet = chains(&format!("chain {port}-out {{ }}"), 1);
    let mut script = String::new();
    for (table, chains) in [("libvirt_nwfilter_ethernet", ethernet), ("libvirt_nwfilter_inet", inet)] {
        script += &format!(
            "table bridge {table} {{ {chains}\n }}
             add element bridge {table} vmap-oif {{ \"{port}\" : jump {port}-in }}
             add element bridge {table} vmap-iif {{ \"{port}\" : jump {port}-out }}\n"
        );
    }
    fs::write(lab.dir.path().join("libvirt.nft"), script).unwrap();
    lab.host.run(&["nft", "-f", lab.dir.path().join("libvirt.nft").to_str().unwrap()]).unwrap();
}

#[test]
fn reload_takes_over_from_libvirts_nftables_driver_without_a_gap() {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("ebtables"),
        Need::Tool("iptables"),
        Need::Tool("nft")
    );
    let tables = |lab: &Lab| lab.host.run(&["nft", "list", "tables", "bridge"]).unwrap();
    for backend in ["nftables", "xtables"] {
        let lab = Lab::new();
        libvirts_tables(&lab, "tap0");
        assert!(lab.passes(GUEST) && !lab.passes(STRANGER));
        let frame = |source, text: &[u8]| {
            let ends = Ends::v4(source, "10.0.0.2".parse().unwrap(), STRANGER, "10.0.0.9".parse().unwrap());
            frames::udp(&ends, 1000, 2000, text)
        };
        let stream = Stream {
            from: &lab.guest,
            to: &lab.peer,
            allowed: Box::new(move |number| frame(GUEST, &number.to_be_bytes())),
            forbidden: vec![frame(STRANGER, b"spoofed")],
            rest: std::time::Duration::ZERO,
        };
        let tally = while_streaming(&[stream], |streaming| {
            lab.done(&["--backend", backend, "binding-create", "tap0.xml"]);
            assert!(tables(&lab).contains("libvirt_nwfilter_inet"));
            lab.done(&["--backend", backend, "reload"]);
            streaming.take()
        })
        .unwrap();
        assert!(!tables(&lab).contains("libvirt_nwfilter"), "{}", tables(&lab));
        assert!(tally.allowed > 0 && tally.forbidden > 0, "{tally:?}");
        assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
        lab.is_filtered();

        // A port that only libvirt's driver filters keeps its rules.
        libvirts_tables(&lab, "tap1");
        let kept = lab.run(&["--backend", backend, "reload"]);
        let told = String::from_utf8(kept.stderr).unwrap();
        assert!(kept.status.success() && told.contains("port 'tap1' is filtered by libvirt"), "{told}");
        assert!(tables(&lab).contains("libvirt_nwfilter_ethernet"));
    }
}
