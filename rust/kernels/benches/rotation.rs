//! Rotations of rows.

use criterion::{Criterion, criterion_group, criterion_main};
use shiftkern_kernels::Par;
use shiftkern_kernels::rotation::{Givens, Topology, givens, givens_backward};
use std::hint::black_box;

fn rotations(c: &mut Criterion) {
    let (rows, width) = (256, 2048);
    let x: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut y = vec![0.0_f32; x.len()];
    for (name, topology, stages) in [("tree", Topology::Tree, 1), ("butterfly", Topology::Butterfly, 11)] {
        let count = if stages == 1 { width - 1 } else { width / 2 * stages };
        let parameters: Vec<f64> = (0..count).map(|i| (i as f64).cos()).collect();
        let plan = Givens { width, topology, parameters: &parameters, matrices: false, transpose: false };
        c.bench_function(&format!("{name} forward"), |b| {
            b.iter(|| givens(black_box(&x), &plan, &mut y, Par::threads(1)));
        });
        let (mut by_x, mut by_parameters) = (vec![0.0_f32; x.len()], vec![0.0; count]);
        let kept = x.clone();
        c.bench_function(&format!("{name} backward"), |b| {
            b.iter(|| givens_backward(black_box(&x), &kept, &plan, (&mut by_x, &mut by_parameters), Par::threads(1)));
        });
    }
}

criterion_group!(benches, rotations);
criterion_main!(benches);
