//! From typed rulesets to the kernel, in network namespaces. Needs root.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use criterion::{Criterion, criterion_main};
use nwfilter_benches::{binding, seed_filters};
use nwfilter_nftables::Nftables;
use nwfilter_rules::{Backend, Batch, instantiate};
use nwfilter_testlab::{Host, Need, requirements};
use nwfilter_xtables::{Xtables, restore_texts};

fn batch(ports: usize) -> Result<Batch> {
    batch_of(ports, "ftp-by-port")
}

fn batch_of(ports: usize, filter: &str) -> Result<Batch> {
    let filters = seed_filters()?;
    let mut batch = Batch::default();
    for number in 0..ports {
        let port = format!("vnet{number}");
        let ruleset = instantiate(&filters, &binding(&port, filter)?)?;
        batch.filter(port.parse()?, Arc::new(ruleset));
    }
    Ok(batch)
}

/// The bar is a tenth of what the restore tools need for the same text, in the same run.
fn rendering_beside_the_tools(c: &mut Criterion) -> Result<()> {
    const PORTS: usize = 1000;
    const SHARE: f64 = 0.1;
    let batch = batch(PORTS)?;
    let render = || black_box(restore_texts(black_box(&batch)));
    c.bench_function("render 1,000 ports", |b| b.iter(render));
    let timed = |_| {
        let start = Instant::now();
        render();
        start.elapsed()
    };
    let rendering = (0..10).map(timed).min().unwrap_or_default();
    let host = Host::new()?;
    let mut parsing = Duration::ZERO;
    for (tool, text) in restore_texts(&batch) {
        // ebtables-restore cannot parse without committing.
        let test = (tool != "ebtables").then_some("--test");
        let restore = format!("{tool}-restore");
        let command: Vec<_> = [restore.as_str(), "--noflush"].into_iter().chain(test).collect();
        let start = Instant::now();
        host.run_with_stdin(&command, &text)?;
        let taken = start.elapsed();
        println!("{}: {} lines in {taken:?}", command.join(" "), text.lines().count());
        parsing += taken;
    }
    let share = rendering.as_secs_f64() / parsing.as_secs_f64();
    println!("rendering {rendering:?}, the tools {parsing:?}: a share of {share:.3}");
    ensure!(share < SHARE, "rendering takes {share:.3} of the time of the tools");
    Ok(())
}

/// New ports, and ports that are already as they must be.
fn applying(c: &mut Criterion) -> Result<()> {
    let backend = Xtables::default();
    let mut group = c.benchmark_group("apply");
    group.sample_size(10).measurement_time(Duration::from_secs(3));
    for ports in [1, 60, 1000] {
        let (batch, mut none) = (batch(ports)?, Batch::default());
        batch.ports.keys().for_each(|port| none.remove(port.clone()));
        let host = Host::new()?;
        let apply = |batch: &Batch| host.enter(|| backend.apply(batch)).map(drop);
        apply(&batch)?;
        group.bench_function(format!("{ports} ports that are so already"), |b| b.iter(|| apply(&batch)));
        group.bench_function(format!("{ports} new ports"), |b| {
            b.iter_custom(|rounds| {
                let mut taken = Duration::ZERO;
                for _ in 0..rounds {
                    let _ = apply(&none);
                    let start = Instant::now();
                    let _ = apply(&batch);
                    taken += start.elapsed();
                }
                taken
            });
        });
    }
    Ok(())
}

/// The bar is a fifth of a second for a thousand ports.
fn counting(c: &mut Criterion) -> Result<()> {
    const PORTS: usize = 1000;
    const BAR: Duration = Duration::from_millis(200);
    // The native backend has rules on connections only where the kernel follows those of a bridge.
    let backends: [(Box<dyn Backend>, &str); 2] =
        [(Box::new(Xtables::default()), "ftp-by-port"), (Box::new(Nftables::new()), "clean-traffic")];
    for (backend, filter) in backends {
        let (host, batch) = (Host::new()?, batch_of(PORTS, filter)?);
        let count = || host.enter(|| backend.rules(black_box(&batch)));
        host.enter(|| backend.apply(&batch))?;
        ensure!(count()?.differing.is_empty());
        c.bench_function(&format!("count the rules of 1,000 ports, {}", backend.name()), |b| b.iter(count));
        let timed = |_| {
            let start = Instant::now();
            count().map(|held| (start.elapsed(), held.rules.len()))
        };
        let times: Vec<_> = (0..10).map(timed).collect::<Result<_, _>>()?;
        let Some((taken, rules)) = times.into_iter().min() else { continue };
        println!("{}: {rules} rules counted in {taken:?}", backend.name());
        ensure!(taken < BAR, "counting takes {taken:?}");
    }
    Ok(())
}

fn benches() {
    if let Err(missing) = requirements(&[Need::Root, Need::Tool("ip"), Need::Tool("ebtables")]) {
        eprintln!("skipped: {missing}");
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    for bench in [rendering_beside_the_tools, applying, counting] {
        if let Err(error) = bench(&mut criterion) {
            panic!("{error:#}");
        }
    }
}

criterion_main!(benches);
