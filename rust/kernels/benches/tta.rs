//! Criterion benches of the `tta` kernels.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that fails may panic; criterion generates the main")]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use shiftkern_kernels::Par;
use shiftkern_kernels::tta::{Affinity, LameParams, lame};

fn solver(c: &mut Criterion) {
    let (n, width, classes) = (1000, 512, 10);
    let features: Vec<f32> = (0..n * width).map(|i| ((i * 7919) % 1009) as f32 - 504.0).collect();
    let probs: Vec<f64> =
        (0..n * classes).map(|i| if i % classes == i / 100 % classes { 0.55 } else { 0.05 }).collect();
    let mut out = vec![0.0; probs.len()];
    let mut group = c.benchmark_group("lame");
    group.sample_size(10);
    for affinity in [Affinity::Knn, Affinity::Rbf, Affinity::Linear] {
        let params = LameParams { affinity, k: 5, weight: 1.0, max_iter: 100, tol: 1e-8 };
        group.bench_function(BenchmarkId::from_parameter(format!("{affinity:?}")), |b| {
            b.iter(|| lame(&probs, &features, n, &params, &mut out, Par::threads(2)).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, solver);
criterion_main!(benches);
