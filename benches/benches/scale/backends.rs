//! Both backends side by side: what a change of one port or of all costs beside a thousand ports, and what a frame costs.
//!
//! The filter is a seed filter where the kernel tracks bridged connections, else clean-traffic, which asks about none. Times are
//! those of `Backend::apply`: planning and kernel, without what a driver stores.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nwfilter_benches::seed_filters;
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, Ruleset, instantiate};
use nwfilter_testlab::Host;
use nwfilter_testlab::rate::{Between, RateLab};
use nwfilter_xml::{Filter, FilterName, read_binding, read_filter};
use nwfilter_xtables::Xtables;

use crate::{FEW, MANY, PORTS};

/// How many filters the ports of a host have that is started.
const FILTERS: usize = 10;
/// How long frames are sent for one rate.
const RUN: Duration = Duration::from_millis(200);
/// How often a pair of rates is measured. The fastest counts.
const RATES: usize = 3;

/// Filters, and the one that ports have if nothing else is said.
struct Filters {
    all: BTreeMap<FilterName, Filter>,
    usual: &'static str,
}

impl Filters {
    fn new() -> Result<Self> {
        let usual = match Host::new()?.enter(nwfilter_nftables::check_kernel) {
            Ok(()) => "ftp-by-state",
            Err(_) => "clean-traffic",
        };
        let mut filters = Self { all: seed_filters()?, usual };
        for number in 0..2 * PORTS {
            filters.add(&own(number), 1000 + number)?;
        }
        Ok(filters)
    }

    /// Adds or replaces a filter: the usual one and a rule about a port.
    fn add(&mut self, name: &str, port: usize) -> Result<()> {
        let text = format!(
            "<filter name='{name}' chain='root'>
               <rule action='drop' direction='out' priority='-900'>
                 <ip protocol='tcp' dstportstart='{port}'/>
               </rule>
               <filterref filter='{}'/>
             </filter>",
            self.usual
        );
        let filter: Filter = read_filter("filter", &text).into_result()?;
        self.all.insert(filter.name.clone(), filter);
        Ok(())
    }

    /// What a port has by a filter, with addresses of its own.
    fn ruleset(&self, port: usize, filter: &str, address: u8) -> Result<Arc<Ruleset>> {
        let [.., high, low] = port.to_be_bytes();
        let text = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='vnet{port}'/><mac address='52:54:00:00:{high:02x}:{low:02x}'/>
             <filterref filter='{filter}'><parameter name='IP' value='10.{address}.{high}.{low}'/></filterref>
             </filterbinding>"
        );
        Ok(Arc::new(instantiate(&self.all, &read_binding("binding", &text).into_result()?)?))
    }

    /// Ports from 0 on by what each has.
    fn batch(&self, filter: impl Fn(usize) -> String) -> Result<Batch> {
        let mut batch = Batch::default();
        for port in 0..PORTS {
            batch.filter(format!("vnet{port}").parse()?, self.ruleset(port, &filter(port), 1)?);
        }
        Ok(batch)
    }

    /// The first of those ports.
    fn batch_of_one(&self) -> Result<Batch> {
        let mut batch = Batch::default();
        batch.filter("vnet0".parse()?, self.ruleset(0, self.usual, 1)?);
        Ok(batch)
    }

    /// One port more, and what removes it.
    fn one_more(&self, filter: &str, address: u8) -> Result<[Batch; 2]> {
        let (mut more, mut less) = (Batch::default(), Batch::default());
        let port = format!("vnet{PORTS}");
        more.filter(port.parse()?, self.ruleset(PORTS, filter, address)?);
        less.remove(port.parse()?);
        Ok([more, less])
    }
}

fn own(number: usize) -> String {
    format!("own-{number}")
}

/// A host on which a backend works.
struct Side {
    host: Host,
    backend: Box<dyn Backend>,
}

impl Side {
    fn new(kind: Kind) -> Result<Self> {
        Ok(Self { host: Host::builder().bridge_nf(kind == Kind::Xtables).build()?, backend: kind.backend() })
    }

    fn apply(&self, batch: &Batch) -> Result<Duration> {
        self.host.enter(|| {
            let begin = Instant::now();
            self.backend.apply(batch)?;
            Ok(begin.elapsed())
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Nftables,
    Xtables,
}

impl Kind {
    pub(crate) fn backend(self) -> Box<dyn Backend> {
        match self {
            Self::Nftables => Box::new(Nftables::new()),
            Self::Xtables => Box::new(Xtables::default()),
        }
    }
}

/// Something measured of one backend.
#[derive(Clone, Copy)]
pub(crate) enum Found {
    /// A time, with what it is at most to be.
    Time(Duration, Duration),
    /// A ratio that is to be so much at most.
    AtMost(f64, f64),
    /// A ratio that is to be so much at least.
    AtLeast(f64, f64),
}

impl Found {
    fn value(self) -> String {
        match self {
            Self::Time(found, _) => format!("{found:.2?}"),
            Self::AtMost(found, _) | Self::AtLeast(found, _) => format!("{found:.2}"),
        }
    }

    fn expected(self) -> String {
        match self {
            Self::Time(_, most) => format!("≤ {most:?}"),
            Self::AtMost(_, most) => format!("≤ {most}"),
            Self::AtLeast(_, least) => format!("≥ {least}"),
        }
    }

    fn is_met(self) -> bool {
        match self {
            Self::Time(found, most) => found <= most,
            Self::AtMost(found, most) => found <= most,
            Self::AtLeast(found, least) => found >= least,
        }
    }
}

/// Measures both backends, and prints a table. What is expected is expected of nftables.
pub(crate) fn measure() -> Result<()> {
    let mut filters = Filters::new()?;
    let mut column = |kind| -> Result<Column> {
        let mut found = changes(&mut filters, kind)?;
        found.extend(frames(&filters, kind)?);
        Ok(found)
    };
    let columns = [column(Kind::Nftables)?, column(Kind::Xtables)?];
    println!("Both backends, by the filter {}:\n", filters.usual);
    print(columns);
    Ok(())
}

/// Prints what was found of each backend as a table.
pub(crate) fn print([nftables, xtables]: [Column; 2]) {
    println!("| what | nftables | expected | met | xtables |\n| --- | ---: | ---: | --- | ---: |");
    for ((what, ours), (_, theirs)) in nftables.into_iter().zip(xtables) {
        let met = if ours.is_met() { "yes" } else { "no" };
        println!("| {what} | {} | {} | {met} | {} |", ours.value(), ours.expected(), theirs.value());
    }
    println!();
}

type Column = Vec<(&'static str, Found)>;

/// What changes of one port and of all cost.
fn changes(filters: &mut Filters, kind: Kind) -> Result<Column> {
    let ms = Duration::from_millis;
    let usual = filters.usual;
    let (few, many) = (Side::new(kind)?, Side::new(kind)?);
    many.apply(&filters.batch(|_| usual.into())?)?;

    // The table and its class are there: what is compared is the number of ports.
    few.apply(&filters.batch_of_one()?)?;
    let [more, less] = filters.one_more(usual, 1)?;
    let attach = |side: &Side| -> Result<Duration> {
        let taken = side.apply(&more)?;
        side.apply(&less)?;
        Ok(taken)
    };
    let (last, first) = crate::fastest(MANY, || attach(&many), || attach(&few))?;

    let mut learned = Duration::MAX;
    for address in 1..MANY as u8 {
        learned = learned.min(many.apply(&filters.one_more(usual, address)?[0])?);
    }
    many.apply(&less)?;

    let mut distinct = Duration::MAX;
    for number in 0..MANY {
        let [more, less] = filters.one_more(&own(number), 1)?;
        distinct = distinct.min(many.apply(&more)?);
        many.apply(&less)?;
    }

    let cold = filters.batch(|port| own(port % FILTERS))?;
    let cold = (0..FEW).map(|_| Side::new(kind)?.apply(&cold)).collect::<Result<Vec<_>>>()?;
    let cold = cold.into_iter().min().context("no run")?;

    let side = Side::new(kind)?;
    let mut redefined = Duration::MAX;
    for run in 0..=FEW {
        filters.add("redefined", 5000 + run)?;
        let taken = side.apply(&filters.batch(|_| "redefined".into())?)?;
        redefined = if run == 0 { redefined } else { redefined.min(taken) };
    }
    Ok(vec![
        ("attach beside 1,000 ports of the same filter", Found::Time(last, ms(1))),
        ("the same, beside attach beside one", Found::AtMost(last.as_secs_f64() / first.as_secs_f64(), 2.0)),
        ("attach with a filter of its own beside 1,000", Found::Time(distinct, ms(60))),
        ("start of 1,000 ports of ten filters", Found::Time(cold, ms(100))),
        ("redefine the filter of 1,000 ports", Found::Time(redefined, ms(50))),
        ("another address of a port beside 1,000", Found::Time(learned, ms(1))),
    ])
}

/// What frames cost beside few ports and many, and without any filter.
fn frames(filters: &Filters, kind: Kind) -> Result<Column> {
    let lab = |others, between| -> Result<RateLab> {
        let lab = RateLab::new(others, between)?;
        lab.host().set_bridge_nf(kind == Kind::Xtables)?;
        Ok(lab)
    };
    let (few, many, own_of_each) =
        (lab(10, Between::Filtered)?, lab(PORTS, Between::Filtered)?, lab(PORTS, Between::Filtered)?);
    let (unfiltered, backend) = (lab(0, Between::Unfiltered)?, kind.backend());
    for lab in [&few, &many] {
        lab.filter(&*backend, &filters.all, filters.usual)?;
    }
    own_of_each.filter_each(&*kind.backend(), &filters.all, own)?;
    let mut rates = [0.0; 4];
    for _ in 0..RATES {
        for (rate, lab) in rates.iter_mut().zip([&few, &many, &own_of_each, &unfiltered]) {
            *rate = lab.frames_a_second(RUN)?.max(*rate);
        }
    }
    let [few, many, own_of_each, unfiltered] = rates;
    Ok(vec![
        ("frames a second beside 1,000 ports, of those beside 10", Found::AtLeast(many / few, 0.95)),
        ("the same, with 1,000 filters", Found::AtLeast(own_of_each / few, 0.95)),
        (
            "frames a second beside 1,000 ports, of those without filter",
            Found::AtLeast(many / unfiltered, 0.65),
        ),
    ])
}
