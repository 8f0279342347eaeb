//! Reading filters: nwfilter-xml beside roxmltree alone on the same text. No root needed.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_main};

/// The text of every document in a directory of fixtures.
fn documents(below: &str) -> Vec<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../xml-fixtures").join(below);
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect()
}

/// One filter with many rules, as a program would write it.
fn many_rules() -> Vec<String> {
    let rule = |port: u32| {
        format!(
            "  <rule action='accept' direction='in' priority='500'>\n    \
             <tcp srcipaddr='10.0.0.0' srcipmask='8' dstportstart='{port}' state='NEW'/>\n  </rule>\n"
        )
    };
    vec![format!(
        "<filter name='many' chain='root'>\n{}</filter>\n",
        (1..=1000).map(rule).collect::<String>()
    )]
}

fn bytes_of(texts: &[String]) -> u64 {
    texts.iter().map(|text| text.len() as u64).sum()
}

fn read(texts: &[String]) {
    for text in texts {
        black_box(nwfilter_xml::read_filter("bench.xml", black_box(text)));
    }
}

fn parse(texts: &[String]) {
    for text in texts {
        black_box(roxmltree::Document::parse(black_box(text)).ok());
    }
}

/// The seconds of the fastest of many runs.
fn fastest(run: impl Fn()) -> f64 {
    let second = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..300).map(second).fold(f64::INFINITY, f64::min)
}

fn xml_reading(criterion: &mut Criterion) {
    for (name, texts) in
        [("seed", documents("seed")), ("stock", documents("stock")), ("1000 rules", many_rules())]
    {
        let mut group = criterion.benchmark_group(format!("xml_reading/{name}"));
        group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
        group.throughput(Throughput::Bytes(bytes_of(&texts)));
        group.bench_function("nwfilter-xml", |bencher| bencher.iter(|| read(&texts)));
        group.bench_function("roxmltree alone", |bencher| bencher.iter(|| parse(&texts)));
        group.finish();
        let (ours, alone) = (fastest(|| read(&texts)), fastest(|| parse(&texts)));
        println!(
            "{name}: {:.0} documents/s, {:.0} MB/s, {:.2} times the time of roxmltree alone\n",
            texts.len() as f64 / ours,
            bytes_of(&texts) as f64 / 1e6 / ours,
            ours / alone,
        );
    }
}

#[allow(missing_docs)] // The macro's functions have none.
mod group {
    criterion::criterion_group!(benches, super::xml_reading);
}

criterion_main!(group::benches);
