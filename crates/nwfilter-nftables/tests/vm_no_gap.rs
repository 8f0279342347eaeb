//! While the rules of the manual's FTP filter change, its connections go on and nothing else passes, on a kernel that tracks
//! bridged connections.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, instantiate};
use nwfilter_testlab::frames::{self, tcp_flags};
use nwfilter_testlab::seed::SeedLab;
use nwfilter_testlab::stream::{Stream, Tally, while_streaming};
use nwfilter_testlab::{Mac, Need, skip_unless};
use nwfilter_xml::{Filter, read_binding, read_filter};
use nwfilter_xtables::Xtables;
use support::stock_and;

/// How long the streams rest after some dozens of frames, to leave the processors to the transfers.
const REST: Duration = Duration::from_millis(2);

const BY_STATE: &str = include_str!("../../../xml-fixtures/seed/ftp-by-state.xml");
/// The stations of [`SeedLab::taps`].
const GUEST: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 3]);
const OBSERVER: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 4]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);

/// How often something is done: as many times as a variable of the environment says, or this number, which fits into a run of
/// all tests.
fn times(variable: &str, usual: usize) -> usize {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(usual)
}

/// The manual's filter with a name and a rule that differ by number, which decide nothing of the traffic.
fn variant(lab: &SeedLab, number: usize) -> Batch {
    let name = format!("ftp-{}", number % 3);
    let other = format!(
        "<rule action='drop' direction='inout' priority='400'><udp dstportstart='{}'/></rule></filter>",
        20_000 + number
    );
    let text = BY_STATE
        .replace("filter name='ftp-by-state'", &format!("filter name='{name}'"))
        .replace("</filter>", &other);
    let filter: Filter = read_filter("f.xml", &text).into_result().unwrap();
    let filters = stock_and(filter);
    let mut batch = Batch::default();
    for port in SeedLab::PORTS {
        let binding = read_binding("b.xml", &lab.binding(port, &name)).into_result().unwrap();
        batch.filter(port.parse().unwrap(), Arc::new(instantiate(&filters, &binding).unwrap()));
    }
    batch
}

/// Files that were fetched.
#[derive(Clone, Copy, Debug, Default)]
struct Transfers {
    /// Those that came unchanged.
    whole: usize,
    /// Those that did not come, because their control connection has no helper.
    without_helper: usize,
}

struct Lab(SeedLab);

impl Lab {
    /// The guest of raw frames has asked the observer's DNS server: only of that connection frames pass to the guest.
    fn new(backend: &dyn Backend) -> Result<Self> {
        let lab = Self(SeedLab::new()?);
        lab.0.host().set_bridge_nf(false)?;
        let (guest, observer) = lab.0.taps();
        let ends = SeedLab::ends();
        // Frames to an address that nobody has sent from yet would be flooded.
        for (mac, port) in [(GUEST, guest), (OBSERVER, observer), (STRANGER, observer)] {
            let mac = mac.to_string();
            lab.0.host().run(&["bridge", "fdb", "replace", &mac, "dev", port.name(), "master", "static"])?;
        }
        lab.apply(backend, 0)?;
        let answer = frames::udp(&ends.reverse(), 53, 4000, b"answer");
        ensure!(!observer.delivers(guest, &answer)?, "nobody asked");
        ensure!(guest.delivers(observer, &frames::udp(&ends, 4000, 53, b"question"))?, "the guest may ask");
        ensure!(observer.delivers(guest, &answer)?, "the answer passes");
        Ok(lab)
    }

    fn apply(&self, backend: &dyn Backend, number: usize) -> Result<()> {
        self.0.host().enter(|| backend.apply(&variant(&self.0, number)))?;
        Ok(())
    }

    /// The connection, both ways, and what is none of it.
    fn streams(&self) -> [Stream<'_>; 2] {
        let (guest, observer) = self.0.taps();
        let (from, to) = (SeedLab::ends(), SeedLab::ends().reverse());
        let stranger = from.with_src_mac(STRANGER);
        [
            Stream {
                from: guest,
                to: observer,
                allowed: Box::new(move |number| frames::udp(&from, 4000, 53, &number.to_be_bytes())),
                forbidden: vec![
                    frames::udp(&stranger, 4000, 53, b"spoofed"),
                    frames::udp(&from, 4000, 54, b"no server"),
                    frames::tcp(&from, 80, 4002, tcp_flags::SYN | tcp_flags::ACK),
                ],
                rest: REST,
            },
            Stream {
                from: observer,
                to: guest,
                allowed: Box::new(move |number| frames::udp(&to, 53, 4000, &number.to_be_bytes())),
                forbidden: vec![
                    frames::udp(&to, 53, 4001, b"nobody asked"),
                    frames::tcp(&to, 4001, 8081, tcp_flags::SYN),
                ],
                rest: REST,
            },
        ]
    }

    /// Fetches files by FTP in active mode, each unchanged, until `done`. One fails only where its control connection has no
    /// helper.
    fn transfers(&self, done: &AtomicBool) -> Result<Transfers> {
        let mut transfers = Transfers::default();
        while !done.load(Ordering::Relaxed) {
            if self.0.ftp_in_a_minute()? {
                transfers.whole += 1;
                continue;
            }
            let control = self.0.host().run(&["conntrack", "-L", "-p", "tcp", "--orig-port-dst", "21"])?;
            ensure!(
                control.lines().any(|connection| !connection.contains("helper=ftp")),
                "a transfer fails whose connection has a helper: {control}"
            );
            transfers.without_helper += 1;
            self.0.host().run(&["conntrack", "-D", "-p", "tcp", "--orig-port-dst", "21"])?;
        }
        Ok(transfers)
    }

    /// Does something while the streams run and files are fetched.
    fn under_traffic(&self, change: impl FnOnce() -> Result<()>) -> Result<(Tally, Transfers)> {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let transfers = scope.spawn(|| self.transfers(&done));
            let tally = while_streaming(&self.streams(), |streaming| {
                change()?;
                streaming.take()
            });
            done.store(true, Ordering::Relaxed);
            let transfers = transfers.join().expect("no panic");
            Ok((tally?, transfers?))
        })
    }
}

/// Nothing was lost and nothing leaked, of the many frames that were sent.
fn assert_exact(tally: Tally, transfers: Transfers) {
    eprintln!("{tally:?}, {transfers:?}");
    assert!(tally.allowed > 0 && tally.forbidden > 0 && transfers.whole > 0, "{tally:?}, {transfers:?}");
    assert_eq!((tally.lost, tally.leaked), (0, 0), "{tally:?}");
}

#[test]
fn connections_go_on_and_nothing_else_passes_while_the_filter_is_redefined() -> Result<()> {
    skip_unless!(
        Need::BridgeConntrack,
        Need::Tool("bridge"),
        Need::Tool("conntrack"),
        Need::Tool("vsftpd"),
        Need::Tool("curl")
    );
    let nftables = Nftables::new();
    let lab = Lab::new(&nftables)?;
    let redefine =
        || (1..=times("NWFILTER_REDEFINITIONS", 5)).try_for_each(|number| lab.apply(&nftables, number));
    let (tally, transfers) = lab.under_traffic(redefine)?;
    assert_exact(tally, transfers);
    assert_eq!(transfers.without_helper, 0);
    Ok(())
}

#[test]
fn connections_go_on_and_nothing_else_passes_while_the_backend_is_switched() -> Result<()> {
    skip_unless!(
        Need::BridgeConntrack,
        Need::Tool("bridge"),
        Need::Tool("conntrack"),
        Need::Tool("vsftpd"),
        Need::Tool("curl"),
        Need::Tool("iptables"),
        Need::Tool("ebtables")
    );
    let backends: [Box<dyn Backend>; 2] = [Box::new(Nftables::new()), Box::new(Xtables::default())];
    let lab = Lab::new(&*backends[0])?;
    let switches = times("NWFILTER_SWITCHES", 2);
    let switch = || {
        for number in 1..=switches {
            let (new, old) = (&backends[number % 2], &backends[(number + 1) % 2]);
            lab.apply(&**new, 0)?;
            lab.0.host().enter(|| old.clear())?;
            ensure!(lab.0.host().enter(|| old.installed())?.ports.is_empty());
        }
        Ok(())
    };
    let (tally, transfers) = lab.under_traffic(switch)?;
    assert_exact(tally, transfers);
    // While the rules of both are there, only one of them can assign a helper.
    assert!(transfers.without_helper <= switches, "{transfers:?}");
    Ok(())
}
