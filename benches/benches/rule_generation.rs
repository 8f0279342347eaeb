//! From parsed filters to the typed ruleset of a port. No root needed.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_main};
use nwfilter_benches::{binding, seed_filters};
use nwfilter_rules::instantiate;
use nwfilter_xml::{Filter, FilterName, read_filter};

/// The bar for one port.
const AT_MOST: Duration = Duration::from_micros(25);

fn one_port(c: &mut Criterion) -> Result<()> {
    let filters = seed_filters()?;
    for name in ["ftp-by-port", "ftp-by-state"] {
        let binding = binding("vnet0", name)?;
        let run = || black_box(instantiate(black_box(&filters), black_box(&binding)));
        c.bench_function(name, |b| b.iter(run));
        // The fastest of many runs does not depend on what else the machine does.
        let timed = |_| {
            let start = Instant::now();
            let _ = run();
            start.elapsed()
        };
        let fastest = (0..10_000).map(timed).min().unwrap_or_default();
        println!("{name}: {fastest:?} at best, the bar is {AT_MOST:?}");
        ensure!(fastest <= AT_MOST, "{name} takes {fastest:?}");
    }
    Ok(())
}

/// The time for each element stays the same.
fn many_ports(c: &mut Criterion) -> Result<()> {
    let filters = seed_filters()?;
    let mut group = c.benchmark_group("ports");
    for count in [1, 10, 100, 1000] {
        let bindings: Vec<_> =
            (0..count).map(|n| binding(&format!("vnet{n}"), "ftp-by-port")).collect::<Result<_>>()?;
        group.throughput(Throughput::Elements(count));
        group.bench_with_input(BenchmarkId::from_parameter(count), &bindings, |b, bindings| {
            b.iter(|| bindings.iter().for_each(|binding| drop(black_box(instantiate(&filters, binding)))));
        });
    }
    Ok(())
}

fn many_rules(c: &mut Criterion) -> Result<()> {
    let mut group = c.benchmark_group("rules");
    for count in [10, 100, 1000, 10_000] {
        let rules: String = (0..count)
            .map(|n| format!("<rule action='accept' direction='in'><tcp dstportstart='{n}'/></rule>"))
            .collect();
        let filters = only(&format!("<filter name='f'>{rules}</filter>"))?;
        let binding = binding("vnet0", "f")?;
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| instantiate(&filters, black_box(&binding)));
        });
    }
    Ok(())
}

fn a_list_in_a_rule(c: &mut Criterion) -> Result<()> {
    let filters = only(
        "<filter name='f'><rule action='accept' direction='in'><tcp srcipaddr='$PEERS'/></rule></filter>",
    )?;
    let mut group = c.benchmark_group("list");
    for count in [1u64, 10, 100, 1000] {
        let mut binding = binding("vnet0", "f")?;
        for n in 0..count {
            binding.params.insert("PEERS".parse()?, &format!("10.1.{}.{}", n / 250, n % 250 + 1))?;
        }
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| instantiate(&filters, black_box(&binding)));
        });
    }
    Ok(())
}

fn only(text: &str) -> Result<BTreeMap<FilterName, Filter>> {
    let filter = read_filter("filter", text).into_result()?;
    Ok(BTreeMap::from([(filter.name.clone(), filter)]))
}

fn benches() {
    let mut criterion = Criterion::default().configure_from_args();
    for bench in [one_port, many_ports, many_rules, a_list_in_a_rule] {
        if let Err(error) = bench(&mut criterion) {
            panic!("{error:#}");
        }
    }
}

criterion_main!(benches);
