//! Rotations against dense matrices in `f64`, made from the definitions by naive loops.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Float, noise};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use shiftkern_kernels::rotation::{
    BlockShape, Givens, LowRankShape, Topology, block_rotate, block_rotate_backward, cayley, givens, givens_backward,
    low_rank_rotate, low_rank_rotate_backward,
};
use shiftkern_kernels::simd::Real;
use shiftkern_kernels::{KernelError, Par};

/// A dense matrix by rows.
#[derive(Clone)]
struct Matrix {
    side: usize,
    entries: Vec<f64>,
}

impl Matrix {
    fn identity(side: usize) -> Self {
        let mut entries = vec![0.0; side * side];
        for i in 0..side {
            entries[i * side + i] = 1.0;
        }
        Self { side, entries }
    }

    fn at(&mut self, r: usize, c: usize) -> &mut f64 {
        &mut self.entries[r * self.side + c]
    }

    fn times(&self, other: &Self) -> Self {
        let mut out = Self { side: self.side, entries: vec![0.0; self.side * self.side] };
        for r in 0..self.side {
            for k in 0..self.side {
                for c in 0..self.side {
                    *out.at(r, c) += self.entries[r * self.side + k] * other.entries[k * self.side + c];
                }
            }
        }
        out
    }

    fn transposed(&self) -> Self {
        let mut out = self.clone();
        for r in 0..self.side {
            for c in 0..self.side {
                *out.at(c, r) = self.entries[r * self.side + c];
            }
        }
        out
    }

    /// `M x` for each row.
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let rows = x.chunks_exact(self.side);
        let products = rows.flat_map(|x| {
            self.entries.chunks_exact(self.side).map(move |row| row.iter().zip(x).map(|(m, x)| m * x).sum::<f64>())
        });
        products.collect()
    }
}

/// All pairs in the order of their parameters.
fn pairs(topology: Topology, width: usize, layers: usize) -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    if topology == Topology::Brick {
        for layer in 0..layers {
            out.extend((layer % 2..width.saturating_sub(1)).step_by(2).map(|i| (i, i + 1)));
        }
        return out;
    }
    let mut stride = 1;
    while stride < width {
        for j in 0..width {
            let odd_multiple = j % stride == 0 && j / stride % 2 == 1;
            let bit_set = j / stride % 2 == 1;
            if if topology == Topology::Tree { odd_multiple } else { bit_set } {
                out.push((j - stride, j));
            }
        }
        stride *= 2;
    }
    out
}

/// The product of 2 x 2 matrices, the first one innermost.
fn dense(width: usize, pairs: &[(usize, usize)], parameters: &[f64], matrices: bool) -> Matrix {
    let mut product = Matrix::identity(width);
    for (n, &(i, j)) in pairs.iter().enumerate() {
        let [a, b, c, d] = if matrices {
            [0, 1, 2, 3].map(|k| parameters[4 * n + k])
        } else {
            let (sine, cosine) = parameters[n].sin_cos();
            [cosine, -sine, sine, cosine]
        };
        let mut step = Matrix::identity(width);
        (*step.at(i, i), *step.at(i, j), *step.at(j, i), *step.at(j, j)) = (a, b, c, d);
        product = step.times(&product);
    }
    product
}

fn assert_close(name: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    let size = expected.iter().fold(1.0_f64, |m, v| m.max(v.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance * size, "{name}[{i}]: {got} for {expected}, within {tolerance:e}");
    }
}

/// By central differences of `sum g . f(parameters)`.
fn slopes(parameters: &[f64], value: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    (0..parameters.len())
        .map(|i| {
            let moved = |by: f64| {
                let mut moved = parameters.to_vec();
                moved[i] += by;
                value(&moved)
            };
            (moved(step) - moved(-step)) / (2.0 * step)
        })
        .collect()
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn check_givens<T: Float>(rows: usize, width: usize, topology: Topology, matrices: bool, transpose: bool, seed: u64) {
    let pairs = pairs(topology, width, 3);
    let parameters: Vec<f64> = if matrices {
        noise(4 * pairs.len(), seed).iter().enumerate().map(|(i, v)| 0.3 * v + f64::from(i % 3 == 0)).collect()
    } else {
        noise(pairs.len(), seed).iter().map(|v| 3.0 * v).collect()
    };
    let x: Vec<T> = noise(rows * width, seed + 1).into_iter().map(T::of).collect();
    let g: Vec<T> = noise(rows * width, seed + 2).into_iter().map(T::of).collect();
    let (x_wide, g_wide): (Vec<f64>, Vec<f64>) =
        (x.iter().map(|v| v.value()).collect(), g.iter().map(|v| v.value()).collect());
    let matrix = |parameters: &[f64]| {
        let matrix = dense(width, &pairs, parameters, matrices);
        if transpose { matrix.transposed() } else { matrix }
    };
    let plan = Givens { width, topology, parameters: &parameters, matrices, transpose };
    let tolerance = 64.0 * T::ROUNDOFF[0] + T::ROUNDOFF[1];
    let mut y = vec![T::of(f64::NAN); x.len()];
    givens(&x, &plan, &mut y, Par::threads(2)).unwrap();
    let y_wide: Vec<f64> = y.iter().map(|v| v.value()).collect();
    assert_close("y", &y_wide, &matrix(&parameters).apply(&x_wide), tolerance);

    let mut by_x = vec![T::of(f64::NAN); x.len()];
    let mut by_parameters = vec![f64::NAN; parameters.len()];
    let kept = if matrices { &x } else { &y };
    givens_backward(&g, kept, &plan, (&mut by_x, &mut by_parameters), Par::threads(2)).unwrap();
    let by_x: Vec<f64> = by_x.iter().map(|v| v.value()).collect();
    assert_close("grad_x", &by_x, &matrix(&parameters).transposed().apply(&g_wide), tolerance);
    let expected = slopes(&parameters, |parameters| inner(&g_wide, &matrix(parameters).apply(&x_wide)));
    // What came out was rounded to the element type; differences are good to about 1e-9.
    let sums = tolerance * (rows as f64).sqrt() * 4.0 + 1e-8;
    assert_close("grad_parameters", &by_parameters, &expected, sums);
}

fn check_blocks<T: Float>(rows: usize, units: usize, block: usize, factors: usize, transposed: bool, seed: u64) {
    let width = (units * block) << (factors - 1);
    let shape = BlockShape { width, block, factors };
    let blocks: Vec<f64> =
        noise(factors * width * block, seed).iter().map(|v| f64::from(T::Acc::from_f64(*v).to_f64() as f32)).collect();
    let x: Vec<T> = noise(rows * width, seed + 1).into_iter().map(T::of).collect();
    let g: Vec<T> = noise(rows * width, seed + 2).into_iter().map(T::of).collect();
    let (x_wide, g_wide): (Vec<f64>, Vec<f64>) =
        (x.iter().map(|v| v.value()).collect(), g.iter().map(|v| v.value()).collect());
    let matrix = |blocks: &[f64]| {
        let mut product = Matrix::identity(width);
        for factor in 0..factors {
            let mut step = Matrix { side: width, entries: vec![0.0; width * width] };
            for number in 0..width / block {
                let at = |k: usize| {
                    if factor == 0 {
                        return number * block + k;
                    }
                    let (half, near) = (block / 2, 1 << factor);
                    let lower = number / near * 2 * near + number % near;
                    if k < half { lower * half + k } else { (lower + near) * half + k - half }
                };
                for r in 0..block {
                    for c in 0..block {
                        *step.at(at(r), at(c)) = blocks[((factor * (width / block) + number) * block + r) * block + c];
                    }
                }
            }
            product = step.times(&product);
        }
        if transposed { product.transposed() } else { product }
    };
    let narrow: Vec<T::Acc> = blocks.iter().map(|&v| T::Acc::from_f64(v)).collect();
    let tolerance = (block * factors + 8) as f64 * 4.0 * T::ROUNDOFF[0] + T::ROUNDOFF[1];
    let mut y = vec![T::of(f64::NAN); x.len()];
    block_rotate(&x, &narrow, &shape, transposed, &mut y, Par::threads(2)).unwrap();
    let y: Vec<f64> = y.iter().map(|v| v.value()).collect();
    assert_close("y", &y, &matrix(&blocks).apply(&x_wide), tolerance);
    let (mut by_x, mut by_blocks) = (vec![T::of(f64::NAN); x.len()], vec![f64::NAN; blocks.len()]);
    block_rotate_backward(&g, &x, &narrow, &shape, transposed, (&mut by_x, &mut by_blocks), Par::threads(2)).unwrap();
    let by_x: Vec<f64> = by_x.iter().map(|v| v.value()).collect();
    assert_close("grad_x", &by_x, &matrix(&blocks).transposed().apply(&g_wide), tolerance);
    let expected = slopes(&blocks, |blocks| inner(&g_wide, &matrix(blocks).apply(&x_wide)));
    assert_close("grad_blocks", &by_blocks, &expected, (rows + block * factors) as f64 * 8.0 * T::ROUNDOFF[0] + 1e-7);
}

fn check_low_rank<T: Float>(rows: usize, side: usize, blocks: usize, rank: usize, seed: u64) {
    let width = side * blocks;
    let shape = LowRankShape { width, blocks, rank };
    let directions = noise(width * rank, seed);
    let core = noise(blocks * rank * rank, seed + 3);
    let narrow: Vec<T::Acc> = directions.iter().map(|&v| T::Acc::from_f64(v)).collect();
    let directions: Vec<f64> = narrow.iter().map(|v| v.to_f64()).collect();
    let x: Vec<T> = noise(rows * width, seed + 1).into_iter().map(T::of).collect();
    let g: Vec<T> = noise(rows * width, seed + 2).into_iter().map(T::of).collect();
    let (x_wide, g_wide): (Vec<f64>, Vec<f64>) =
        (x.iter().map(|v| v.value()).collect(), g.iter().map(|v| v.value()).collect());
    let matrix = |directions: &[f64], core: &[f64]| {
        let mut out = Matrix::identity(width);
        for block in 0..blocks {
            for (i, j) in (0..rank).flat_map(|i| (0..rank).map(move |j| (i, j))) {
                for (r, c) in (0..side).flat_map(|r| (0..side).map(move |c| (r, c))) {
                    let entry = core[(block * rank + i) * rank + j];
                    let u = |k: usize, at: usize| directions[(block * rank + k) * side + at];
                    *out.at(block * side + r, block * side + c) += u(i, r) * entry * u(j, c);
                }
            }
        }
        out
    };
    let tolerance = (side + rank + 8) as f64 * 8.0 * T::ROUNDOFF[0] + T::ROUNDOFF[1];
    let mut y = vec![T::of(f64::NAN); x.len()];
    low_rank_rotate(&x, &narrow, &core, &shape, &mut y, Par::threads(2)).unwrap();
    let y: Vec<f64> = y.iter().map(|v| v.value()).collect();
    assert_close("y", &y, &matrix(&directions, &core).apply(&x_wide), tolerance);
    let mut by_x = vec![T::of(f64::NAN); x.len()];
    let (mut by_directions, mut by_core) = (vec![f64::NAN; directions.len()], vec![f64::NAN; core.len()]);
    let gradients = (&mut by_x[..], &mut by_directions[..], &mut by_core[..]);
    low_rank_rotate_backward(&g, &x, &narrow, &core, &shape, gradients, Par::threads(2)).unwrap();
    let by_x: Vec<f64> = by_x.iter().map(|v| v.value()).collect();
    assert_close("grad_x", &by_x, &matrix(&directions, &core).transposed().apply(&g_wide), tolerance);
    let sums = (rows + side + rank) as f64 * 8.0 * T::ROUNDOFF[0] + 1e-7;
    let value = |directions: &[f64], core: &[f64]| inner(&g_wide, &matrix(directions, core).apply(&x_wide));
    assert_close("grad_directions", &by_directions, &slopes(&directions, |u| value(u, &core)), sums);
    assert_close("grad_core", &by_core, &slopes(&core, |t| value(&directions, t)), sums);
}

fn topology() -> impl Strategy<Value = Topology> {
    prop_oneof![Just(Topology::Tree), Just(Topology::Butterfly), Just(Topology::Brick)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn givens_is_the_product_of_its_pairs(
        rows in 1_usize..70, width in 1_usize..21, topology in topology(), matrices: bool, transpose: bool, seed in 1_u64..1000
    ) {
        check_givens::<f64>(rows, width, topology, matrices, transpose, seed);
        check_givens::<f32>(rows, width, topology, matrices, transpose, seed);
        check_givens::<bf16>(rows, width, topology, matrices, transpose, seed);
        check_givens::<f16>(rows, width, topology, matrices, transpose, seed);
    }

    #[test]
    fn blocks_are_the_product_of_their_factors(
        rows in 1_usize..70, units in 1_usize..4, half in 1_usize..4, factors in 1_usize..4, transposed: bool, seed in 1_u64..1000
    ) {
        let block = if factors == 1 { 2 * half - 1 } else { 2 * half };
        check_blocks::<f64>(rows, units, block, factors, transposed, seed);
        check_blocks::<f32>(rows, units, block, factors, transposed, seed);
        check_blocks::<bf16>(rows, units, block, factors, transposed, seed);
    }

    #[test]
    fn low_rank_updates_are_their_matrices(
        rows in 1_usize..20, side in 1_usize..9, blocks in 1_usize..4, rank in 0_usize..6, seed in 1_u64..1000
    ) {
        check_low_rank::<f64>(rows, side, blocks, rank, seed);
        check_low_rank::<f32>(rows, side, blocks, rank, seed);
        check_low_rank::<f16>(rows, side, blocks, rank, seed);
    }

    #[test]
    fn the_cayley_transform_solves_its_equation(count in 0_usize..5, block in 1_usize..40, size in 0.01_f64..30.0, seed in 1_u64..1000) {
        let triangle = block * (block - 1) / 2;
        let skew: Vec<f64> = noise(count * triangle, seed).iter().map(|v| v * size).collect();
        let mut rotations = vec![f64::NAN; count * block * block];
        cayley(&skew, block, &mut rotations, Par::threads(2)).unwrap();
        for (number, rotation) in rotations.chunks_exact(block * block).enumerate() {
            let mut q = Matrix { side: block, entries: vec![0.0; block * block] };
            let mut entries = skew[number * triangle..].iter();
            for i in 0..block {
                for j in i + 1..block {
                    let v = *entries.next().unwrap();
                    (*q.at(i, j), *q.at(j, i)) = (v, -v);
                }
            }
            let (mut minus, mut plus) = (Matrix::identity(block), Matrix::identity(block));
            for (i, q) in q.entries.iter().enumerate() {
                minus.entries[i] -= q;
                plus.entries[i] += q;
            }
            let r = Matrix { side: block, entries: rotation.to_vec() };
            let tolerance = 1e-15 * (block * block) as f64 * (1.0 + size);
            assert_close("R (I - Q)", &r.times(&minus).entries, &plus.entries, tolerance);
            assert_close("R R^T", &r.times(&r.transposed()).entries, &Matrix::identity(block).entries, tolerance);
        }
    }
}

/// Widths around the strips that are brought in together, and enough rows for several runs.
#[test]
fn the_transpose_undoes_a_rotation_at_any_width() {
    for width in [127, 128, 129, 255, 256, 257, 700] {
        for topology in [Topology::Tree, Topology::Butterfly, Topology::Brick] {
            let count = pairs(topology, width, 4).len();
            let parameters: Vec<f64> = noise(count, 7).iter().map(|v| 3.0 * v).collect();
            let mut plan = Givens { width, topology, parameters: &parameters, matrices: false, transpose: false };
            let x = noise(37 * width, 3);
            let (mut y, mut back) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            givens(&x, &plan, &mut y, Par::threads(2)).unwrap();
            plan.transpose = true;
            givens(&y, &plan, &mut back, Par::threads(2)).unwrap();
            assert_close("x", &back, &x, 1e-14);
            assert!(x.iter().zip(&y).any(|(x, y)| (x - y).abs() > 0.1));
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (rows, width) = (300, 260);
    let x: Vec<f32> = noise(rows * width, 1).iter().map(|&v| v as f32).collect();
    let run = |threads: usize| {
        let par = Par::threads(threads);
        let mut bits = Vec::new();
        for matrices in [false, true] {
            let count = pairs(Topology::Butterfly, width, 0).len() * if matrices { 4 } else { 1 };
            let parameters = noise(count, 2);
            let plan =
                Givens { width, topology: Topology::Butterfly, parameters: &parameters, matrices, transpose: false };
            let (mut y, mut by_x, mut sums) = (x.clone(), x.clone(), vec![0.0; count]);
            givens(&x, &plan, &mut y, par).unwrap();
            givens_backward(&x, &y, &plan, (&mut by_x, &mut sums), par).unwrap();
            bits.extend(y.iter().chain(&by_x).map(|v| u64::from(v.to_bits())).chain(sums.iter().map(|v| v.to_bits())));
        }
        let shape = BlockShape { width, block: 26, factors: 2 };
        let blocks: Vec<f32> = noise(2 * width * 26, 4).iter().map(|&v| v as f32).collect();
        let (mut y, mut by_x, mut sums) = (x.clone(), x.clone(), vec![0.0; blocks.len()]);
        block_rotate(&x, &blocks, &shape, false, &mut y, par).unwrap();
        block_rotate_backward(&y, &x, &blocks, &shape, false, (&mut by_x, &mut sums), par).unwrap();
        bits.extend(y.iter().chain(&by_x).map(|v| u64::from(v.to_bits())).chain(sums.iter().map(|v| v.to_bits())));
        let shape = LowRankShape { width, blocks: 2, rank: 5 };
        let (directions, core) = (&blocks[..width * 5], noise(50, 5));
        let (mut y, mut by_x) = (x.clone(), x.clone());
        let (mut by_directions, mut by_core) = (vec![0.0; width * 5], vec![0.0; 50]);
        low_rank_rotate(&x, directions, &core, &shape, &mut y, par).unwrap();
        let gradients = (&mut by_x[..], &mut by_directions[..], &mut by_core[..]);
        low_rank_rotate_backward(&y, &x, directions, &core, &shape, gradients, par).unwrap();
        bits.extend(y.iter().chain(&by_x).map(|v| u64::from(v.to_bits())));
        bits.extend(by_directions.iter().chain(&by_core).map(|v| v.to_bits()));
        bits
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
fn wrong_sizes_are_refused() {
    let refused = |result: Result<(), KernelError>, argument: &str| {
        let Err(KernelError::Argument { argument: found, .. }) = result else { panic!("{argument}: {result:?}") };
        assert_eq!(found, argument);
    };
    let par = Par::threads(1);
    let (x, mut y) = ([0.0_f64; 12], [0.0_f64; 12]);
    let plan = |parameters, width, topology| Givens { width, topology, parameters, matrices: false, transpose: false };
    refused(givens(&x, &plan(&[0.0; 4], 4, Topology::Tree), &mut y, par), "parameters");
    refused(givens(&x, &plan(&[0.0; 2], 4, Topology::Tree), &mut y, par), "parameters");
    refused(givens(&x, &plan(&[0.0; 5], 4, Topology::Butterfly), &mut y, par), "parameters");
    refused(givens(&x, &plan(&[0.0; 4], 4, Topology::Brick), &mut y, par), "parameters");
    refused(givens(&x, &plan(&[0.0; 1], 1, Topology::Brick), &mut y, par), "parameters");
    refused(givens(&x, &plan(&[0.0; 4], 5, Topology::Tree), &mut y, par), "x");
    refused(givens(&x, &plan(&[], 0, Topology::Tree), &mut y, par), "x");
    refused(givens(&x, &plan(&[0.0; 3], 4, Topology::Tree), &mut y[..8], par), "y");
    let blocks = |block, factors| BlockShape { width: 4, block, factors };
    refused(block_rotate(&x, &[0.0; 12], &blocks(3, 1), false, &mut y, par), "blocks");
    refused(block_rotate(&x, &[0.0; 24], &blocks(2, 3), false, &mut y, par), "blocks");
    refused(block_rotate(&x, &[0.0; 8], &blocks(1, 2), false, &mut y, par), "blocks");
    refused(block_rotate(&x, &[0.0; 8], &blocks(2, 99), false, &mut y, par), "blocks");
    refused(block_rotate(&x, &[], &blocks(0, 1), false, &mut y, par), "blocks");
    refused(block_rotate(&x, &[0.0; 7], &blocks(2, 1), false, &mut y, par), "blocks");
    let low_rank = |blocks, rank| LowRankShape { width: 4, blocks, rank };
    refused(low_rank_rotate(&x, &[0.0; 4], &[0.0; 3], &low_rank(3, 1), &mut y, par), "directions");
    refused(low_rank_rotate(&x, &[0.0; 4], &[0.0; 3], &low_rank(2, 1), &mut y, par), "core");
    refused(low_rank_rotate(&x, &[0.0; 4], &[0.0; 2], &low_rank(2, 1), &mut y[..8], par), "y");
    refused(cayley(&[0.0; 2], 3, &mut y[..9], par), "skew");
    refused(cayley(&[0.0; 3], 3, &mut y[..8], par), "rotations");
}
