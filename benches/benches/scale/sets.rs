//! A large set with both backends: what loading it and one entry more cost.
//!
//! Times are those of a driver in one process: with the document that it stores, which one entry more writes anew.

use std::time::{Duration, Instant};

use anyhow::Result;
use nwfilter::{Driver, Transaction};
use nwfilter_testlab::Host;
use nwfilter_xml::{FilterSet, SetEntry, SetRange, read_set};

use crate::MANY;
use crate::backends::{Found, Kind};

/// The number of networks. None touches another, so that the kernel gets each.
const NETWORKS: u32 = 100_000;

/// What a set of [`NETWORKS`] costs.
pub(crate) fn changes(kind: Kind) -> Result<Vec<(&'static str, Found)>> {
    let entry =
        |number: u32| format!("<entry value='{}/26'/>", std::net::Ipv4Addr::from((10 << 24) + 128 * number));
    let entries: String = (0..NETWORKS).map(entry).collect();
    let text = format!("<filterset name='large' family='ipv4'>{entries}</filterset>");
    let set: FilterSet = read_set("large.xml", &text).into_result()?;
    let (host, dir) = (Host::new()?, tempfile::tempdir()?);
    host.enter(|| {
        let builder = Driver::builder().config_dir(dir.path().join("etc")).state_dir(dir.path().join("run"));
        let driver = builder.without_learner().open(kind.backend())?;
        let timed = |transaction| -> Result<Duration> {
            let begin = Instant::now();
            driver.commit(transaction)?;
            Ok(begin.elapsed())
        };
        let mut transaction = Transaction::new();
        transaction.define_set(set.clone());
        let load = timed(transaction)?;
        let mut one_more = Duration::MAX;
        for number in 1..=MANY {
            let range = SetRange::parse(set.family, &format!("192.168.0.{}", 2 * number))?;
            let mut transaction = Transaction::new();
            transaction.add_to_set(&set.name, vec![SetEntry { range, comment: None }]);
            one_more = one_more.min(timed(transaction)?);
        }
        Ok(vec![
            ("load a set of 100,000 networks", Found::Time(load, Duration::from_secs(1))),
            ("one entry more in that set", Found::Time(one_more, Duration::from_millis(5))),
        ])
    })
}
