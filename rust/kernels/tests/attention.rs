//! Attention over kept pairs against naive loops in `f64`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Float, noise};
use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use shiftkern_kernels::attention::{
    BlockMask, Captured, Gradients, Inputs, Reshape, State, StateGradients, Tokens, Upstream, block_sparse_attention,
    block_sparse_attention_backward, merge_states, merge_states_backward, reattention_capture,
};
use shiftkern_kernels::simd::Real;
use shiftkern_kernels::{KernelError, Par};

const INF: f64 = f64::INFINITY;

fn values<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&v| v.value()).collect()
}

fn wide<R: Real>(x: &[R]) -> Vec<f64> {
    x.iter().map(|v| v.to_f64()).collect()
}

/// A tensor `(batch, heads, tokens, channels)`, dense or with tokens before heads and NaN in the gaps.
struct Tensor<T> {
    memory: Vec<T>,
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<T: Float> Tensor<T> {
    fn new(shape: [usize; 4], seed: u64, size: f64, apart: bool) -> Self {
        let [batch, heads, tokens, channels] = shape;
        let strides = if apart {
            let wide = channels + 3;
            [tokens * heads * wide, wide, heads * wide]
        } else {
            [heads * tokens * channels, tokens * channels, channels]
        };
        let len = if apart { batch * heads * tokens * (channels + 3) } else { batch * heads * tokens * channels };
        let mut tensor = Self { memory: vec![T::of(f64::NAN); len], shape, strides };
        let mut noise = noise(shape.iter().product(), seed).into_iter();
        for place in tensor.places() {
            tensor.memory[place] = T::of(noise.next().unwrap() * size);
        }
        tensor
    }

    /// Places of the elements in memory, in order.
    fn places(&self) -> Vec<usize> {
        let [batch, heads, tokens, channels] = self.shape;
        let mut places = Vec::new();
        for b in 0..batch {
            for h in 0..heads {
                for t in 0..tokens {
                    let start = b * self.strides[0] + h * self.strides[1] + t * self.strides[2];
                    places.extend(start..start + channels);
                }
            }
        }
        places
    }

    fn set(&mut self, token: usize, value: f64) {
        let ([_, _, tokens, channels], places) = (self.shape, self.places());
        for (i, place) in places.into_iter().enumerate() {
            if i / channels % tokens == token {
                self.memory[place] = T::of(value);
            }
        }
    }

    fn tokens(&self) -> Tokens<'_, T> {
        Tokens::new("test", "x", &self.memory, self.shape, self.strides).unwrap()
    }

    fn values(&self) -> Vec<f64> {
        self.places().into_iter().map(|place| self.memory[place].value()).collect()
    }
}

/// Blocks that are absent, full, or kept in part.
struct Mask {
    dense: Vec<bool>,
    indptr: Vec<i64>,
    indices: Vec<i64>,
    inner: Vec<i64>,
    patterns: Vec<u8>,
    maps: [usize; 2],
    block: [usize; 2],
    tokens: [usize; 2],
}

impl Mask {
    fn new(maps: [usize; 2], block: [usize; 2], tokens: [usize; 2], seed: u64, empty: f64) -> Self {
        let [rows, columns] = [tokens[0].div_ceil(block[0]), tokens[1].div_ceil(block[1])];
        let mut mask = Self {
            dense: Vec::new(),
            indptr: Vec::new(),
            indices: Vec::new(),
            inner: Vec::new(),
            patterns: Vec::new(),
            maps,
            block,
            tokens,
        };
        let pairs = tokens[0] * tokens[1];
        for map in 0..maps[0] * maps[1] {
            let kinds = noise(rows * columns, seed + 17 * map as u64);
            let bits = noise(pairs, seed + 17 * map as u64 + 1);
            let mut dense = vec![false; pairs];
            mask.indptr.push(mask.indices.len() as i64);
            for row in 0..rows {
                for column in 0..columns {
                    let kind = kinds[row * columns + column] / 2.0 + 0.5;
                    if kind < empty {
                        continue;
                    }
                    let full = kind > f64::midpoint(empty, 1.0);
                    mask.indices.push(column as i64);
                    let bytes = block[1].div_ceil(32) * 4;
                    mask.inner.push(if full { -1 } else { (mask.patterns.len() / (block[0] * bytes)) as i64 });
                    let mut pattern = vec![0_u8; block[0] * bytes];
                    for i in 0..block[0] {
                        for j in 0..block[1] {
                            let (query, key) = (row * block[0] + i, column * block[1] + j);
                            if query < tokens[0] && key < tokens[1] && (full || bits[query * tokens[1] + key] > 0.2) {
                                dense[query * tokens[1] + key] = true;
                                pattern[i * bytes + j / 8] |= 1 << (j % 8);
                            }
                        }
                    }
                    if !full {
                        mask.patterns.extend(pattern);
                    }
                }
                mask.indptr.push(mask.indices.len() as i64);
            }
            mask.dense.extend(dense);
        }
        mask
    }

    fn blocks(&self) -> Result<BlockMask<'_>, KernelError> {
        let arrays = (&self.indptr[..], &self.indices[..], &self.inner[..], &self.patterns[..]);
        BlockMask::new("test", arrays, self.maps, self.block, self.tokens)
    }

    fn keeps(&self, batch: usize, head: usize, query: usize, key: usize) -> bool {
        let of = |maps: usize, index: usize| if maps == 1 { 0 } else { index };
        let map = of(self.maps[0], batch) * self.maps[1] + of(self.maps[1], head);
        self.dense[(map * self.tokens[0] + query) * self.tokens[1] + key]
    }
}

struct Case<T> {
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    mask: Mask,
    scale: f64,
}

/// Batch, groups, heads in a group, queries, keys, width, width of values.
type Sizes = [usize; 7];

impl<T: Float> Case<T> {
    fn new([batch, groups, share, queries, keys, width, value_width]: Sizes, block: [usize; 2], seed: u64) -> Self {
        let apart = seed % 2 == 1;
        let maps = [if seed.is_multiple_of(3) { 1 } else { batch }, if seed % 5 < 2 { 1 } else { groups * share }];
        Self {
            q: Tensor::new([batch, groups * share, queries, width], seed, 2.0, apart),
            k: Tensor::new([batch, groups, keys, width], seed + 1, 2.0, apart),
            v: Tensor::new([batch, groups, keys, value_width], seed + 2, 2.0, apart),
            mask: Mask::new(maps, block, [queries, keys], seed + 3, [0.0, 0.4, 0.8][(seed % 3) as usize]),
            scale: 1.0 / (width.max(1) as f64).sqrt(),
        }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        let (q, k, v) = (self.q.tokens(), self.k.tokens(), self.v.tokens());
        Inputs { q, k, v, mask: self.mask.blocks().unwrap(), scale: self.scale }
    }

    fn rows(&self) -> usize {
        self.q.shape[..3].iter().product()
    }

    /// How far sums over the keys may be apart, relative to what they are sums of.
    fn slack(&self) -> f64 {
        let (width, [sums, stored]) = (self.q.shape[3], T::ROUNDOFF);
        // Scores of up to 4 * sqrt(width), each a sum of `width` terms; sums over keys and channels.
        let scores = 4.0 * (width as f64).sqrt() * (width + 8) as f64;
        4.0 * sums * (scores + (self.mask.tokens[1] + self.v.shape[3] + 32) as f64) + stored
    }

    fn forward(&self, reshape: Reshape<'_, T>, threads: usize) -> (Vec<T>, Vec<T::Acc>) {
        let mut out = vec![T::of(7.0); self.rows() * self.v.shape[3]];
        let mut lse = vec![T::Acc::from_f64(7.0); self.rows()];
        block_sparse_attention("test", &self.inputs(), reshape, &mut out, &mut lse, Par::threads(threads)).unwrap();
        (out, lse)
    }

    fn backward(&self, grad_out: &Tensor<T>, grad_lse: &[T::Acc], threads: usize) -> [Vec<T>; 3] {
        let (out, lse) = self.forward(Reshape::Plain, 1);
        let upstream = Upstream { grad_out: grad_out.tokens(), grad_lse: Some(grad_lse), out: &out, lse: &lse };
        let mut gradients = [&self.q, &self.k, &self.v].map(|t| vec![T::of(7.0); t.shape.iter().product()]);
        let [q, k, v] = &mut gradients;
        let targets = Gradients { q, k, v };
        block_sparse_attention_backward(&self.inputs(), &upstream, targets, Par::threads(threads)).unwrap();
        gradients
    }

    fn upstream(&self, seed: u64) -> (Tensor<T>, Vec<T::Acc>) {
        let [batch, heads, queries, _] = self.q.shape;
        let grad_out = Tensor::new([batch, heads, queries, self.v.shape[3]], seed + 4, 1.0, seed.is_multiple_of(2));
        (grad_out, noise(self.rows(), seed + 5).into_iter().map(T::Acc::from_f64).collect())
    }
}

/// What the loops below find; of the output and gradients also the magnitudes that they are sums of.
#[derive(Default)]
struct Naive {
    out: Vec<[f64; 2]>,
    lse: Vec<f64>,
    q: Vec<[f64; 2]>,
    k: Vec<[f64; 2]>,
    v: Vec<[f64; 2]>,
}

fn add(sum: &mut [f64; 2], term: f64, size: f64) {
    *sum = [sum[0] + term, sum[1] + size];
}

/// Attention over the pairs of which `keep` is true, and its gradients.
fn naive<T: Float>(
    case: &Case<T>,
    keep: impl Fn(usize, usize, usize, usize) -> bool,
    grad_out: &[f64],
    grad_lse: &[f64],
) -> Naive {
    let ([_, heads, queries, width], [_, groups, keys, value_width]) = (case.q.shape, case.v.shape);
    let (q, k, v) = (case.q.values(), case.k.values(), case.v.values());
    let zeros = |len: usize| vec![[0.0; 2]; len];
    let mut found = Naive {
        out: zeros(case.rows() * value_width),
        lse: vec![-INF; case.rows()],
        q: zeros(q.len()),
        k: zeros(k.len()),
        v: zeros(v.len()),
    };
    for row in 0..case.rows() {
        let (batch, head, query) = (row / queries / heads, row / queries % heads, row % queries);
        let own = &q[row * width..][..width];
        let at = |key: usize| (batch * groups + head * groups / heads) * keys + key;
        let kept: Vec<usize> = (0..keys).filter(|&key| keep(batch, head, query, key)).map(at).collect();
        if kept.is_empty() {
            continue;
        }
        let score = |key: usize| case.scale * (0..width).map(|d| own[d] * k[key * width + d]).sum::<f64>();
        let scores: Vec<f64> = kept.iter().map(|&key| score(key)).collect();
        let peak = scores.iter().copied().fold(-INF, f64::max);
        let lse = peak + scores.iter().map(|s| (s - peak).exp()).sum::<f64>().ln();
        found.lse[row] = lse;
        let out = &mut found.out[row * value_width..][..value_width];
        for (&key, score) in kept.iter().zip(&scores) {
            for (c, out) in out.iter_mut().enumerate() {
                let term = (score - lse).exp() * v[key * value_width + c];
                add(out, term, term.abs());
            }
        }
        if grad_lse.is_empty() {
            continue;
        }
        let up = &grad_out[row * value_width..][..value_width];
        let delta: f64 = up.iter().zip(&*out).map(|(g, o)| g * o[0]).sum::<f64>() - grad_lse[row];
        let delta_size: f64 = up.iter().zip(&*out).map(|(g, o)| (g * o[0]).abs()).sum::<f64>() + grad_lse[row].abs();
        for (&key, score) in kept.iter().zip(&scores) {
            let weight = (score - lse).exp();
            let values = &v[key * value_width..][..value_width];
            let slope = weight * (up.iter().zip(values).map(|(g, v)| g * v).sum::<f64>() - delta);
            let size = weight * (up.iter().zip(values).map(|(g, v)| (g * v).abs()).sum::<f64>() + delta_size);
            for d in 0..width {
                let (query, other) = (own[d], k[key * width + d]);
                add(&mut found.q[row * width + d], case.scale * slope * other, case.scale * size * other.abs());
                add(&mut found.k[key * width + d], case.scale * slope * query, case.scale * size * query.abs());
            }
            for (c, g) in up.iter().enumerate() {
                add(&mut found.v[key * value_width + c], weight * g, weight * g.abs());
            }
        }
    }
    found
}

fn close(got: &[f64], want: &[[f64; 2]], slack: f64) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.len(), want.len());
    for (i, (got, [want, size])) in got.iter().zip(want).enumerate() {
        prop_assert!((got - want).abs() <= slack * size + 1e-36, "{got} instead of {want} at {i}, of size {size}");
    }
    Ok(())
}

fn close_levels(got: &[f64], want: &[f64], slack: f64) -> Result<(), TestCaseError> {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        prop_assert!(
            got == want || (got - want).abs() <= slack * want.abs().max(1.0),
            "{got} instead of {want} at {i}"
        );
    }
    Ok(())
}

fn matches_loops<T: Float>(sizes: Sizes, block: [usize; 2], seed: u64) -> Result<(), TestCaseError> {
    let case = Case::<T>::new(sizes, block, seed);
    let (grad_out, grad_lse) = case.upstream(seed);
    let keep = |b, h, q, k| case.mask.keeps(b, h, q, k);
    let want = naive(&case, keep, &grad_out.values(), &wide(&grad_lse));
    let (out, lse) = case.forward(Reshape::Plain, 2);
    close(&values(&out), &want.out, case.slack())?;
    close_levels(&wide(&lse), &want.lse, case.slack())?;
    let [q, k, v] = case.backward(&grad_out, &grad_lse, 2);
    // Weights are taken from the rounded log-sum-exps.
    let slack = 3.0 * case.slack() + 20.0 * T::ROUNDOFF[0] * (case.q.shape[2] * case.q.shape[1]) as f64;
    close(&values(&q), &want.q, slack)?;
    close(&values(&k), &want.k, slack)?;
    close(&values(&v), &want.v, slack)
}

fn captures_what_loops_find<T: Float>(sizes: Sizes, block: [usize; 2], seed: u64) -> Result<(), TestCaseError> {
    let case = Case::<T>::new(sizes, block, seed);
    let (rows, len) = (case.rows(), case.rows() * case.v.shape[3]);
    let everything = naive(&case, |_, _, _, _| true, &[], &[]);
    let kept = naive(&case, |b, h, q, k| case.mask.keeps(b, h, q, k), &[], &[]);
    let others = naive(&case, |b, h, q, k| !case.mask.keeps(b, h, q, k), &[], &[]);
    let mut tensors = [(); 3].map(|()| vec![T::of(7.0); len]);
    let mut levels = [(); 4].map(|()| vec![T::Acc::from_f64(7.0); rows]);
    let ([out, rest, difference], [rho, share, lse_full, lse_rest]) = (&mut tensors, &mut levels);
    let captured = Captured { out, rho, share, lse_full, lse_rest, rest, difference };
    reattention_capture(&case.inputs(), captured, Par::threads(2)).unwrap();
    let ([out, rest, difference], [rho, share, lse_full, lse_rest]) = (&tensors, &levels);
    let slack = case.slack();
    close(&values(out), &everything.out, slack)?;
    close(&values(rest), &others.out, slack)?;
    close_levels(&wide(lse_full), &everything.lse, slack)?;
    close_levels(&wide(lse_rest), &others.lse, slack)?;
    let part = |of: &Naive| -> Vec<[f64; 2]> {
        let parts = of.lse.iter().zip(&everything.lse);
        parts.map(|(part, all)| if *part == -INF { 0.0 } else { (part - all).exp() }).map(|v| [v, v]).collect()
    };
    close(&wide(rho), &part(&kept), 2.0 * slack)?;
    close(&wide(share), &part(&others), 2.0 * slack)?;
    let apart = everything.out.iter().zip(&kept.out).map(|(a, b)| [a[0] - b[0], a[1] + b[1]]);
    close(&values(difference), &apart.collect::<Vec<_>>(), slack)?;

    // Steps with the same queries, keys and values.
    let scaled = Reshape::Scaled { carried: rest, factors: Some([rho, share]) };
    let again = case.forward(scaled, 1).0;
    if T::ROUNDOFF[1] == 0.0 {
        prop_assert!(values(&again) == values(out), "a step right after its capture returns other bits");
    }
    close(&values(&again), &everything.out, 2.0 * slack)?;
    let merged = case.forward(Reshape::Merged { carried: rest, lse: lse_rest }, 3).0;
    close(&values(&merged), &everything.out, 2.0 * slack)?;
    let added = case.forward(Reshape::Scaled { carried: difference, factors: None }, 3).0;
    let sizes = everything.out.iter().zip(&kept.out).map(|(a, b)| [a[0], a[1] + 2.0 * b[1]]);
    close(&values(&added), &sizes.collect::<Vec<_>>(), 2.0 * slack)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn output_and_gradients_match_loops(
        batch in 1_usize..3, groups in 1_usize..3, share in 1_usize..4, queries in 1_usize..150, keys in 1_usize..150,
        width in 1_usize..40, value_width in 1_usize..40, block in (1_usize..80, 1_usize..80), seed in 1_u64..1000,
    ) {
        let sizes = [batch, groups, share, queries, keys, width, value_width];
        matches_loops::<f64>(sizes, block.into(), seed)?;
        matches_loops::<f32>(sizes, block.into(), seed)?;
        matches_loops::<bf16>(sizes, block.into(), seed)?;
    }

    #[test]
    fn captures_match_loops(
        batch in 1_usize..3, groups in 1_usize..3, share in 1_usize..3, queries in 1_usize..150, keys in 1_usize..150,
        width in 1_usize..40, value_width in 1_usize..40, block in (1_usize..80, 1_usize..80), seed in 1_u64..1000,
    ) {
        let sizes = [batch, groups, share, queries, keys, width, value_width];
        captures_what_loops_find::<f64>(sizes, block.into(), seed)?;
        captures_what_loops_find::<f32>(sizes, block.into(), seed)?;
        captures_what_loops_find::<bf16>(sizes, block.into(), seed)?;
    }

    #[test]
    fn merged_parts_match_loops(parts in 1_usize..6, rows in 1_usize..200, width in 1_usize..30, seed in 1_u64..1000) {
        let outs: Vec<Vec<f64>> = (0..parts).map(|s| noise(rows * width, seed + s as u64)).collect();
        let level = |v: f64| if v < -0.6 { -INF } else { 20.0 * v };
        let lses: Vec<Vec<f64>> =
            (0..parts).map(|s| noise(rows, seed + 50 + s as u64).into_iter().map(level).collect()).collect();
        let states: Vec<State<'_, f64>> = outs.iter().zip(&lses).map(|(out, lse)| State { out, lse }).collect();
        let (mut out, mut lse) = (vec![7.0; rows * width], vec![7.0; rows]);
        merge_states(&states, &mut out, &mut lse, Par::threads(2)).unwrap();
        let (grad, grad_lse) = (noise(rows * width, seed + 99), noise(rows, seed + 98));
        let mut targets: Vec<_> = (0..parts).map(|_| (vec![7.0; rows * width], vec![7.0; rows])).collect();
        let gradients = targets.iter_mut().map(|(out, lse)| StateGradients { out, lse }).collect();
        let merged = State { out: &out, lse: &lse };
        merge_states_backward(&states, merged, &grad, Some(&grad_lse), gradients, Par::threads(2)).unwrap();
        let near = |got: f64, want: f64| (got - want).abs() <= 1e-12 * want.abs().max(1.0);
        for row in 0..rows {
            let peak = lses.iter().map(|lse| lse[row]).fold(-INF, f64::max);
            let total = peak + lses.iter().map(|lse| (lse[row] - peak).exp()).sum::<f64>().ln();
            let weight = |s: usize| if lses[s][row] == -INF { 0.0 } else { (lses[s][row] - total).exp() };
            prop_assert!(lse[row] == peak || near(lse[row], total), "{} instead of {total}", lse[row]);
            let mut slopes = vec![grad_lse[row]; parts];
            for at in row * width..(row + 1) * width {
                let want: f64 = (0..parts).map(|s| weight(s) * outs[s][at]).sum();
                prop_assert!(near(out[at], want), "{} instead of {want}", out[at]);
                for s in 0..parts {
                    slopes[s] += grad[at] * (outs[s][at] - want);
                    prop_assert!(near(targets[s].0[at], weight(s) * grad[at]));
                }
            }
            for (s, slope) in slopes.into_iter().enumerate() {
                prop_assert!(near(targets[s].1[row], weight(s) * slope));
            }
        }
    }

    #[test]
    fn broken_masks_are_refused_or_harmless(
        queries in 0_usize..40, keys in 0_usize..40, block in (0_usize..20, 0_usize..20), seed in 1_u64..10_000,
        changes in prop::collection::vec((0_usize..6, any::<prop::sample::Index>(), -3_i64..60), 1..4),
        far in prop::sample::select(vec![0_i64, i64::MAX, i64::MIN, 1 << 32, 1 << 40, -(1 << 32)]),
    ) {
        let sizes = [1, 1, 2, queries.max(1), keys.max(1), 3, 2];
        let mut case = Case::<f32>::new(sizes, [block.0.max(1), block.1.max(1)], seed);
        case.mask.tokens = [queries, keys];
        case.mask.block = block.into();
        for (which, at, value) in changes {
            let value = if value % 5 == 0 { far } else { value };
            let mask = &mut case.mask;
            match which {
                0 if !mask.indptr.is_empty() => *at.get_mut(&mut mask.indptr) = value,
                1 if !mask.indices.is_empty() => *at.get_mut(&mut mask.indices) = value,
                2 if !mask.inner.is_empty() => *at.get_mut(&mut mask.inner) = value,
                3 => drop(mask.patterns.pop()),
                4 => mask.maps[at.index(2)] = value.unsigned_abs() as usize,
                _ => mask.block[at.index(2)] = value.unsigned_abs() as usize,
            }
        }
        let shape = [1, 2, queries, 3];
        let (q, k) = (Tensor::<f32>::new(shape, 1, 1.0, false), Tensor::<f32>::new([1, 1, keys, 3], 2, 1.0, false));
        let v = Tensor::<f32>::new([1, 1, keys, 2], 3, 1.0, false);
        // What is accepted must run, in bounds and to an end, in every direction.
        if let Ok(mask) = case.mask.blocks() {
            let inputs = Inputs { q: q.tokens(), k: k.tokens(), v: v.tokens(), mask, scale: 1.0 };
            let (mut out, mut lse) = (vec![0.0; 4 * queries], vec![0.0; 2 * queries]);
            let ran =
                block_sparse_attention("test", &inputs, Reshape::Plain, &mut out, &mut lse, Par::threads(2)).is_ok();
            prop_assert_eq!(ran, mask.check_maps("test", 1, 2).is_ok());
            let grad = Tensor::<f32>::new([1, 2, queries, 2], 4, 1.0, false);
            let upstream = Upstream { grad_out: grad.tokens(), grad_lse: None, out: &out, lse: &lse };
            let (mut dq, mut dk, mut dv) = (vec![0.0; 6 * queries], vec![0.0; 3 * keys], vec![0.0; 2 * keys]);
            let targets = Gradients { q: &mut dq, k: &mut dk, v: &mut dv };
            prop_assert_eq!(
                block_sparse_attention_backward(&inputs, &upstream, targets, Par::threads(2)).is_ok(),
                ran
            );
            prop_assert!(out.iter().chain(&dq).chain(&dk).chain(&dv).all(|v| v.is_finite()));
        }
    }
}

#[test]
fn equal_at_any_number_of_threads() {
    fn check<T: Float>() {
        let case = Case::<T>::new([2, 2, 2, 300, 280, 24, 20], [16, 32], 4);
        let (grad_out, grad_lse) = case.upstream(4);
        let run = |threads: usize| {
            let (out, lse) = case.forward(Reshape::Plain, threads);
            let gradients = case.backward(&grad_out, &grad_lse, threads);
            let (rows, len) = (case.rows(), out.len());
            let mut tensors = [(); 3].map(|()| vec![T::of(7.0); len]);
            let mut levels = [(); 4].map(|()| vec![T::Acc::from_f64(7.0); rows]);
            let ([out_full, rest, difference], [rho, share, lse_full, lse_rest]) = (&mut tensors, &mut levels);
            let captured = Captured { out: out_full, rho, share, lse_full, lse_rest, rest, difference };
            reattention_capture(&case.inputs(), captured, Par::threads(threads)).unwrap();
            let states = [State { out: &out, lse: &lse }, State { out: &tensors[1], lse: &levels[3] }];
            let (mut merged, mut total) = (out.clone(), lse.clone());
            merge_states(&states, &mut merged, &mut total, Par::threads(threads)).unwrap();
            let all = gradients.iter().chain(&tensors).chain([&out, &merged]).flat_map(|x| values(x));
            let all = all.chain(levels.iter().chain([&lse, &total]).flat_map(|x| wide(x)));
            all.map(f64::to_bits).collect::<Vec<_>>()
        };
        let once = run(1);
        for threads in [2, 3, 5] {
            assert!(run(threads) == once, "{threads} threads");
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
}

#[test]
fn what_nobody_keeps_never_shows() {
    for broken in [f64::NAN, INF, -INF] {
        let mut case = Case::<f32>::new([1, 1, 2, 130, 140, 9, 10], [16, 24], 7);
        let (queries, keys) = ([0, 15, 64, 129], [3, 24, 64, 139]);
        // Everything else in its block stays as it was.
        let mask = &mut case.mask;
        let maps = mask.maps[0] * mask.maps[1];
        let [n, m] = mask.tokens;
        for (i, keep) in mask.dense.iter_mut().enumerate() {
            *keep &= !queries.contains(&(i / m % n)) && !keys.contains(&(i % m));
        }
        let dense = mask.dense.clone();
        let (rows, columns, bytes) = (n.div_ceil(16), m.div_ceil(24), 4);
        (mask.indptr, mask.indices, mask.inner, mask.patterns) = Default::default();
        for map in 0..maps {
            mask.indptr.push(mask.indices.len() as i64);
            for row in 0..rows {
                for column in 0..columns {
                    mask.indices.push(column as i64);
                    mask.inner.push((mask.patterns.len() / (16 * bytes)) as i64);
                    for i in 0..16 {
                        for j in 0..8 * bytes {
                            if j % 8 == 0 {
                                mask.patterns.push(0);
                            }
                            let (query, key) = (row * 16 + i, column * 24 + j);
                            if j < 24 && query < n && key < m && dense[(map * n + query) * m + key] {
                                *mask.patterns.last_mut().unwrap() |= 1 << (j % 8);
                            }
                        }
                    }
                }
                mask.indptr.push(mask.indices.len() as i64);
            }
        }
        let (mut grad_out, mut grad_lse) = case.upstream(7);
        let run = |case: &Case<f32>, grad_out: &Tensor<f32>, grad_lse: &[f32]| {
            let (out, lse) = case.forward(Reshape::Plain, 2);
            (out, lse, case.backward(grad_out, grad_lse, 2))
        };
        let clean = run(&case, &grad_out, &grad_lse);
        for query in queries {
            case.q.set(query, broken);
            grad_out.set(query, broken);
            grad_lse.iter_mut().skip(query).step_by(n).for_each(|g| *g = broken as f32);
        }
        for key in keys {
            case.k.set(key, broken);
            case.v.set(key, broken);
        }
        assert!(run(&case, &grad_out, &grad_lse) == clean, "{broken} shows");
        assert!(clean.2.iter().flatten().all(|g| g.is_finite()));
    }
}

#[test]
fn what_some_keep_shows_to_them_only() {
    for broken in [f64::NAN, INF] {
        let mut case = Case::<f32>::new([1, 1, 2, 130, 140, 9, 10], [16, 24], 8);
        let (grad_out, grad_lse) = case.upstream(8);
        let (out, lse) = case.forward(Reshape::Plain, 2);
        let [dq, ..] = case.backward(&grad_out, &grad_lse, 2);
        for key in [3, 24, 64, 139] {
            case.k.set(key, broken);
            case.v.set(key, broken);
            let (hit_out, hit_lse) = case.forward(Reshape::Plain, 2);
            let [hit_dq, ..] = case.backward(&grad_out, &grad_lse, 2);
            for row in 0..case.rows() {
                let touched = [3, 24, 64, 139].iter().any(|&k| k <= key && case.mask.keeps(0, row / 130, row % 130, k));
                let (at, wide) = (row * 10..(row + 1) * 10, row * 9..(row + 1) * 9);
                if touched {
                    assert!(hit_out[at].iter().all(|v| !v.is_finite()));
                } else {
                    assert_eq!((&hit_out[at.clone()], hit_lse[row]), (&out[at], lse[row]));
                    assert_eq!(&hit_dq[wide.clone()], &dq[wide]);
                }
            }
            assert!((0..case.rows()).any(|row| !case.mask.keeps(0, row / 130, row % 130, key)));
            assert!((0..case.rows()).any(|row| case.mask.keeps(0, row / 130, row % 130, key)));
        }
    }
}

#[test]
fn empty_axes() {
    for sizes in [
        [0, 1, 2, 5, 6, 3, 3],
        [1, 0, 0, 5, 6, 3, 3],
        [1, 1, 2, 0, 6, 3, 3],
        [1, 1, 2, 5, 0, 3, 3],
        [1, 1, 2, 5, 6, 0, 3],
        [1, 1, 2, 5, 6, 3, 0],
    ] {
        let mut case = Case::<f32>::new(sizes, [4, 4], 3);
        case.mask = Mask::new([1, 1], [4, 4], [sizes[3], sizes[4]], 3, 0.2);
        let (grad_out, grad_lse) = case.upstream(3);
        let want = naive(&case, |b, h, q, k| case.mask.keeps(b, h, q, k), &grad_out.values(), &wide(&grad_lse));
        let (out, lse) = case.forward(Reshape::Plain, 2);
        let [q, k, v] = case.backward(&grad_out, &grad_lse, 2);
        close(&values(&out), &want.out, 1e-5).unwrap();
        close_levels(&wide(&lse), &want.lse, 1e-5).unwrap();
        close(&values(&q), &want.q, 1e-5).unwrap();
        close(&values(&k), &want.k, 1e-5).unwrap();
        close(&values(&v), &want.v, 1e-5).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    fn named<T>(result: Result<T, KernelError>, wanted: &str) {
        match result {
            Err(KernelError::Argument { argument, .. }) => assert_eq!(argument, wanted),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{wanted} was accepted"),
        }
    }
    let case = Case::<f32>::new([2, 2, 2, 8, 9, 4, 3], [4, 4], 1);
    let inputs = case.inputs();
    let run = |inputs: &Inputs<'_, f32>, reshape: Reshape<'_, f32>, out: usize, lse: usize| {
        let (mut out, mut lse) = (vec![0.0; out], vec![0.0; lse]);
        block_sparse_attention("test", inputs, reshape, &mut out, &mut lse, Par::threads(1))
    };
    let (rows, len) = (case.rows(), case.rows() * 3);
    run(&inputs, Reshape::Plain, len, rows).unwrap();
    named(run(&inputs, Reshape::Plain, len - 1, rows), "out");
    named(run(&inputs, Reshape::Plain, len, rows + 1), "lse");
    let (short, carried, all) = (vec![0.0; rows - 1], vec![0.0; len], vec![0.0; rows]);
    named(run(&inputs, Reshape::Scaled { carried: &short, factors: None }, len, rows), "carried");
    named(run(&inputs, Reshape::Scaled { carried: &carried, factors: Some([&short, &all]) }, len, rows), "rho");
    named(run(&inputs, Reshape::Scaled { carried: &carried, factors: Some([&all, &short]) }, len, rows), "share");
    named(run(&inputs, Reshape::Merged { carried: &short, lse: &all }, len, rows), "carried");
    named(run(&inputs, Reshape::Merged { carried: &carried, lse: &short }, len, rows), "lse_rest");
    for (shape, wanted) in [
        ([1, 2, 9, 4], "k"),
        ([2, 2, 9, 5], "k"),
        ([2, 3, 9, 4], "k"),
        ([2, 0, 9, 4], "k"),
        ([2, 1, 9, 4], "v"),
        ([2, 2, 8, 4], "v"),
    ] {
        let other = Tensor::<f32>::new(shape, 1, 1.0, false);
        named(run(&Inputs { k: other.tokens(), ..inputs }, Reshape::Plain, len, rows), wanted);
    }
    let memory = vec![0.0_f32; 10];
    for (shape, strides) in [
        ([1, 1, 3, 4], [12, 12, 4]),
        ([2, 1, 1, 4], [7, 0, 0]),
        ([1, 1, 3, 4], [0, 0, usize::MAX]),
        ([usize::MAX, 2, 3, 4], [usize::MAX, 1, 1]),
        ([1, 1, 1, 11], [0, 0, 0]),
    ] {
        named(Tokens::new("test", "x", &memory, shape, strides), "x");
    }
    let arrays = ([0_i64, 1], [0_i64], [-1_i64], [0_u8; 0]);
    let mask = |maps, block, tokens| {
        BlockMask::new("test", (&arrays.0[..], &arrays.1[..], &arrays.2[..], &arrays.3[..]), maps, block, tokens)
    };
    mask([1, 1], [4, 4], [4, 4]).unwrap();
    for (maps, block, tokens, wanted) in [
        ([0, 1], [4, 4], [4, 4], "mask"),
        ([1, 1], [0, 4], [4, 4], "mask"),
        ([1, 1], [4, 1025], [4, 4], "mask"),
        ([1, 1], [usize::MAX, 4], [4, 4], "mask"),
        ([1, 1], [4, 4], [4, 1 << 32], "mask"),
        ([usize::MAX, usize::MAX], [4, 4], [4, 4], "indptr"),
        ([1 << 32, 1 << 32], [4, 4], [4, 4], "indptr"),
        ([1, 1], [4, 4], [5, 4], "indptr"),
        ([1, 1], [4, 4], [4, 0], "indices"),
    ] {
        named(mask(maps, block, tokens), wanted);
    }
    for columns in [[0, 0], [1, 0], [0, 2], [-1, 0]] {
        let arrays = (&[0, 2][..], &columns[..], &[-1, -1][..], &[0_u8; 0][..]);
        named(BlockMask::new("test", arrays, [1, 1], [4, 4], [4, 8]), "indices");
    }
    let state = State::<f32> { out: &carried, lse: &all };
    let merge = |states: &[State<'_, f32>], out: usize, lse: usize| {
        merge_states(states, &mut vec![0.0; out], &mut vec![0.0; lse], Par::threads(1))
    };
    merge(&[state, state], len, rows).unwrap();
    named(merge(&[state, State { lse: &short, ..state }], len, rows), "lse");
    named(merge(&[state, State { out: &short, ..state }], len, rows), "out");
    named(merge(&[state], len + 1, rows), "out");
}
