//! Criterion benches of the `ot` kernels: in L2, in L3, beyond.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that fails may panic; criterion generates the main")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use shiftkern_kernels::Par;
use shiftkern_kernels::ot::{Dense, Metric, Problem, Samples, SinkhornParams, assign, solve};

/// Ten iterations each.
fn transport(c: &mut Criterion) {
    let mut group = c.benchmark_group("ot");
    group.sample_size(10);
    for (name, n) in [("L2", 256), ("L3", 1000), ("memory", 4000)] {
        let costs: Vec<f32> = (0..n * n).map(|k| (k % 251) as f32 * 0.004).collect();
        let weights = vec![1.0 / n as f64; n];
        let problem = Problem { a: &weights, b: &weights, reg: 0.05, tol: 0.0, start: None };
        group.throughput(Throughput::Elements(10 * (n * n) as u64));
        for scaling in [false, true] {
            let params = SinkhornParams { max_iter: 10, scaling, ..SinkhornParams::default() };
            let what = if scaling { "sinkhorn scaling" } else { "sinkhorn log" };
            group.bench_function(BenchmarkId::new(what, name), |b| {
                b.iter(|| {
                    let cost = Dense::new(&costs, n, n, n);
                    solve(&[cost], &[problem], &params, Par::threads(2)).unwrap()
                });
            });
        }
        let points: Vec<f32> = (0..16 * n).map(|k| (k % 61) as f32 * 0.01).collect();
        let params = SinkhornParams { max_iter: 10, ..SinkhornParams::default() };
        group.bench_function(BenchmarkId::new("sinkhorn samples", name), |b| {
            b.iter(|| {
                let cost = Samples::new(&points, &points, 16, Metric::SqEuclidean, Par::threads(2)).unwrap();
                solve(&[cost], &[problem], &params, Par::threads(2)).unwrap()
            });
        });
        let mut out = costs.clone();
        group.throughput(Throughput::Elements((n * n) as u64));
        group.bench_function(BenchmarkId::new("sinkhorn_assign", name), |b| {
            b.iter(|| assign(&costs, n, 0.05, 3, &mut out, Par::threads(2)).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, transport);
criterion_main!(benches);
