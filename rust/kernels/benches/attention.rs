//! Criterion benches of the `attention` kernels.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that fails may panic; criterion generates the main")]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use shiftkern_kernels::Par;
use shiftkern_kernels::attention::{BlockMask, Inputs, Reshape, Tokens, block_sparse_attention};

fn band(c: &mut Criterion) {
    let (heads, n, width, block) = (8, 4096, 64, 64);
    let shape = [1, heads, n, width];
    let data = |step: usize| (0..heads * n * width).map(|i| ((i * step) % 1009) as f32 / 504.0 - 1.0).collect();
    let (q, k, v): (Vec<f32>, Vec<f32>, Vec<f32>) = (data(7919), data(104_729), data(1_299_709));
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; heads * n]);
    let mut group = c.benchmark_group("block_sparse_attention");
    group.sample_size(10);
    for reach in [0, 1, 64] {
        let rows = (n / block) as i64;
        let (mut indptr, mut indices) = (vec![0], Vec::new());
        for row in 0..rows {
            indices.extend((row - reach).max(0)..(row + reach + 1).min(rows));
            indptr.push(indices.len() as i64);
        }
        let inner = vec![-1; indices.len()];
        let arrays = (&indptr[..], &indices[..], &inner[..], &[][..]);
        let mask = BlockMask::new("bench", arrays, [1, 1], [block, block], [n, n]).unwrap();
        let [q, k, v] = [&q, &k, &v].map(|data| Tokens::dense(data, shape));
        let inputs = Inputs { q, k, v, mask, scale: 0.125 };
        group.bench_function(BenchmarkId::from_parameter(format!("{} blocks", indices.len())), |b| {
            b.iter(|| {
                block_sparse_attention("bench", &inputs, Reshape::Plain, &mut out, &mut lse, Par::threads(2)).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, band);
criterion_main!(benches);
