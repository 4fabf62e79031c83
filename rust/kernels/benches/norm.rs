//! Criterion benches of the `norm` kernels: in L2, in L3, beyond.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that fails may panic; criterion generates the main")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use shiftkern_kernels::Par;
use shiftkern_kernels::exec::Io;
use shiftkern_kernels::norm::{Layout, MixedParams, Moments, Source, channel_moments, mixed_batch_norm};

fn layouts() -> [(&'static str, Layout); 3] {
    let of = |outer, channels, inner| Layout { outer, channels, inner, groups: 1 };
    [("L2", of(8, 32, 28 * 28)), ("L3", of(32, 64, 28 * 28)), ("memory", of(64, 64, 56 * 56))]
}

fn norm(c: &mut Criterion) {
    let mut group = c.benchmark_group("norm");
    group.sample_size(20);
    for (name, layout) in layouts() {
        let x: Vec<f32> = (0..layout.len()).map(|i| (i % 251) as f32 * 0.01).collect();
        group.throughput(Throughput::Bytes(4 * layout.len() as u64));
        let mut moments = vec![Moments::default(); layout.channels];
        group.bench_function(BenchmarkId::new("channel_moments", name), |b| {
            b.iter(|| channel_moments(&x, layout, None, &mut moments, Par::threads(2)).unwrap());
        });
        let (zero, one) = (vec![0.0; layout.channels], vec![1.0; layout.channels]);
        let source = Source { mean: &zero, var: &one, weight: Some(&one), bias: Some(&zero) };
        let params = MixedParams { source_weight: 0.5, eps: 1e-5, unbiased: false };
        let (mut y, mut mean, mut var) = (x.clone(), zero.clone(), zero.clone());
        group.bench_function(BenchmarkId::new("mixed_batch_norm", name), |b| {
            b.iter(|| {
                let mut io = Io::split(&x, &mut y).unwrap();
                mixed_batch_norm(&mut io, layout, source, &params, &mut mean, &mut var, Par::threads(2)).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, norm);
criterion_main!(benches);
