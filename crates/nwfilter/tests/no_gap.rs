//! While filters change, under streams of frames: no forbidden frame gets through, no allowed one is lost.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod stream_support;

use std::time::Duration;

use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver};
use nwfilter_rules::{Applied, ApplyError, Backend, Batch, Installed, Planned, Ruleset, Unsupported};
use nwfilter_testlab::stream::{Stream, Tally, while_streaming};
use nwfilter_testlab::{Need, port_dev, skip_unless};
use nwfilter_xtables::{Dispatch, Settings, Xtables};

use stream_support::{Ports, assert_exact, binding, port, variant};

const NEEDS: [Need; 3] = [Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore")];

/// How many ports are filtered: as many as are dispatched by a tree, so that it comes and goes with one of them. Two
/// have traffic.
const COUNT: u8 = 8;

/// Ports, and a driver with stores of its own.
struct Lab {
    ports: Ports,
    driver: Driver,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new(backend: impl Backend + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let driver = Driver::open(stores(&dir), backend).unwrap();
        Self { ports: Ports::new(COUNT), driver, dir }
    }

    /// Another driver over the same stores.
    fn other_driver(&self, backend: impl Backend + 'static) -> Driver {
        Driver::open(stores(&self.dir), backend).unwrap()
    }

    fn define(&self, xml: &str) {
        self.ports.host.enter(|| self.driver.define_filter("test.xml", xml)).unwrap();
    }

    fn bind(&self, number: u8) {
        let binding = read_binding("binding.xml", &binding(number)).into_result().unwrap();
        self.ports.host.enter(|| self.driver.create_binding(binding)).unwrap();
    }

    fn unbind(&self, number: u8) {
        self.ports.host.enter(|| self.driver.delete_binding(&port_dev(&port(number)))).unwrap();
    }

    fn streams(&self) -> [Stream<'_>; 2] {
        self.ports.streams(Duration::ZERO)
    }
}

fn stores(dir: &tempfile::TempDir) -> Config {
    Config::new(dir.path().join("filters"), dir.path().join("bindings"))
}

#[test]
fn two_hundred_redefinitions_let_nothing_through_and_lose_nothing() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(Xtables::default());
    lab.define(&variant(0));
    (0..COUNT).for_each(|number| lab.bind(number));
    let tally = while_streaming(&lab.streams(), |streaming| {
        (1..=200).for_each(|number| lab.define(&variant(number)));
        streaming.take()
    });
    assert_exact(tally.unwrap());
}

/// A backend that goes through another state of the ports before it does what it is asked to.
struct Detour {
    through: Option<Ruleset>,
}

impl Backend for Detour {
    fn name(&self) -> &'static str {
        "detour"
    }

    fn check(&self, ruleset: &Ruleset) -> Result<(), Unsupported> {
        Xtables::default().check(ruleset)
    }

    fn plan(&self, batch: &Batch) -> Result<Planned, ApplyError> {
        Xtables::default().plan(batch)
    }

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

    fn clear(&self) -> Result<Applied, ApplyError> {
        Xtables::default().clear()
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
        assert_eq!((tally.leaked > 0, tally.lost > 0), (opens, !opens), "{tally:?}");
    }
}

#[test]
fn a_port_passes_nothing_forbidden_from_the_moment_its_binding_is_there() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(Xtables::default());
    lab.define(&variant(0));
    // Ports beside them have their rules already.
    (2..COUNT).for_each(|number| lab.bind(number));
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

#[test]
fn dispatch_changes_between_a_list_and_a_tree_without_a_gap() {
    skip_unless!(NEEDS[0], NEEDS[1], NEEDS[2]);
    let lab = Lab::new(Xtables::default());
    lab.define(&variant(0));
    (0..COUNT).for_each(|number| lab.bind(number));
    let driver = |dispatch| lab.other_driver(Xtables::new(Settings { dispatch, ..Settings::default() }));
    let drivers = [driver(Dispatch::List), driver(Dispatch::Tree)];
    let tally = while_streaming(&lab.streams(), |streaming| {
        for driver in drivers.iter().cycle().take(20) {
            let applied = lab.ports.host.enter(|| driver.reload())?.applied;
            assert_ne!(applied.commits, 0);
        }
        streaming.take()
    });
    assert_exact(tally.unwrap());
}

/// Filters that drop the same frames, but each in another table: UDP to ports 54 and 5001.
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
    (0..COUNT).for_each(|number| lab.bind(number));
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
