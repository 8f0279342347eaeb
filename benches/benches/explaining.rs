//! One packet explained: below a millisecond, with the filters of the seed and with one of a thousand rules.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use criterion::{Criterion, criterion_main};
use nwfilter::explain::{Explainer, Guest, Question};
use nwfilter_benches::{binding, seed_filters};
use nwfilter_rules::{Ruleset, instantiate};

const BAR: Duration = Duration::from_millis(1);

fn of_the_seed() -> Result<(Guest, Ruleset)> {
    let binding = binding("vnet0", "ftp-by-port")?;
    let ruleset = instantiate(&seed_filters()?, &binding)?;
    Ok((Guest::of(&binding, &ruleset), ruleset))
}

fn of_a_thousand_rules() -> Result<(Guest, Ruleset)> {
    let mut text = "<filter name='long'>".to_owned();
    for port in 1..=1000 {
        write!(text, "<rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule>")?;
    }
    text.push_str("<rule action='drop' direction='inout'><all/></rule></filter>");
    let filter = nwfilter_xml::read_filter("long.xml", &text).into_result()?;
    let binding = binding("vnet0", "long")?;
    let ruleset = instantiate(&BTreeMap::from([(filter.name.clone(), filter)]), &binding)?;
    Ok((Guest::of(&binding, &ruleset), ruleset))
}

fn explaining(c: &mut Criterion) -> Result<()> {
    for (name, (guest, ruleset)) in [("seed filter", of_the_seed()?), ("1,000 rules", of_a_thousand_rules()?)]
    {
        let question = Question::read(&guest, &["in", "tcp", "to", ":4000"])?;
        let explain = || Explainer::new(&ruleset).explain(question.way, black_box(&question.packet));
        ensure!(!explain()?.passes(), "every rule is asked");
        c.bench_function(&format!("explain a packet, {name}"), |b| b.iter(explain));
        let timed = |_| {
            let start = Instant::now();
            let explained = explain().map(drop);
            explained.map(|()| start.elapsed())
        };
        let fastest = (0..100).map(timed).collect::<Result<Vec<_>, _>>()?.into_iter().min();
        let fastest = fastest.context("it was timed")?;
        ensure!(fastest < BAR, "{name}: {fastest:?} for a packet");
    }
    Ok(())
}

fn benches() {
    let mut c = Criterion::default().configure_from_args();
    explaining(&mut c).unwrap_or_else(|error| panic!("{error:?}"));
}

criterion_main!(benches);
