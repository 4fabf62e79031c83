//! Criterion benches of the `merge` kernels.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that fails may panic; criterion generates the main")]

use criterion::{Criterion, criterion_group, criterion_main};
use shiftkern_kernels::Par;
use shiftkern_kernels::merge::{
    Deltas, Divide, Elect, Keep, Masked, Matrix, RankDrop, column_changes, compete, linear, masked, rank_drop,
    thresholds,
};

fn four_models(c: &mut Criterion) {
    let n = 4_000_000;
    let data = |step: usize| (0..n).map(|i| ((i * step) % 100_003) as f32 / 50_000.0 - 1.0).collect::<Vec<f32>>();
    let (base, models) = (data(7919), [data(104_729), data(1_299_709), data(15_485_863), data(179_424_673)]);
    let models: Vec<&[f32]> = models.iter().map(Vec::as_slice).collect();
    let deltas = Deltas::new("bench", Some(&base), &models).unwrap();
    let mut out = vec![0.0; n];
    let par = Par::threads(2);
    let mut group = c.benchmark_group("merge, 4 x 4 M");
    group.sample_size(10);
    group.bench_function("linear", |b| b.iter(|| linear(&deltas, &[0.3; 4], &mut out, par).unwrap()));
    group.bench_function("thresholds", |b| b.iter(|| thresholds(&[deltas], &[n / 5; 4], par).unwrap()));
    let (low, _) = thresholds(&[deltas], &[n / 5; 4], par).unwrap();
    let keep = Keep { low: &low, high: &[f32::INFINITY; 4], drop_rate: 0.0, keys: &[0; 4], offset: 0 };
    let how = Masked {
        keep,
        rescale: &[1.0; 4],
        weights: &[1.0; 4],
        scale: 1.0,
        elect: Elect::Unweighted,
        divide: Divide::Count,
        tie: 1.0,
    };
    let mut kept = vec![0.0; 4 * n];
    let drop = [RankDrop { density: 0.5, epsilon: 0.2, rescale: None, key: 1 }; 4];
    for row in [100, 4000] {
        let name = format!("rank_drop, rows of {row}");
        group.bench_function(name, |b| b.iter(|| rank_drop(&deltas, row, &drop, 0, &mut kept, par).unwrap()));
    }
    group.bench_function("compete", |b| {
        b.iter(|| compete(&[deltas], n / 5, 1.0, &mut [&mut out], par).unwrap());
    });
    let matrix = Matrix { rows: 2000, columns: 2000, by_row: false };
    let (mut sizes, mut turns) = (vec![0.0; 8000], vec![0.0; 8000]);
    group.bench_function("column_changes", |b| {
        b.iter(|| column_changes(&deltas, matrix, &mut sizes, &mut turns, par).unwrap());
    });
    group.bench_function("masked", |b| b.iter(|| masked(&deltas, &how, &mut out, par).unwrap()));
    group.finish();
}

criterion_group!(benches, four_models);
criterion_main!(benches);
