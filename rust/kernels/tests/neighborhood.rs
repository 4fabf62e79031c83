//! Attention over windows of a grid, and the mixing of neighbouring tokens, against their definitions in `f64`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use half::{bf16, f16};
use proptest::prelude::*;
use shiftkern_kernels::attention::{
    Neighborhood, NeighborhoodGradients, NeighborhoodInputs, ShiftShape, neighborhood, neighborhood_backward,
    token_shift, token_shift_backward,
};
use shiftkern_kernels::simd::{Element, Real, Transcendental};
use shiftkern_kernels::{KernelError, Par};

fn numbers<T: Element>(len: usize, seed: u64, zero: T) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let wide: Vec<T::Acc> = (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            T::Acc::from_f64(3.0 * ((state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5))
        })
        .collect();
    let mut out = vec![zero; len];
    T::store(&wide, &mut out);
    out
}

fn widen<T: Element>(x: &[T]) -> Vec<f64> {
    let mut wide = vec![T::Acc::default(); x.len()];
    T::load(x, &mut wide);
    wide.into_iter().map(Real::to_f64).collect()
}

/// Roundoff of what is computed in, and of what is stored.
fn roundoff<T: Element>(zero: T) -> (f64, f64) {
    let compute = if size_of::<T>() == 8 { f64::EPSILON } else { f64::from(f32::EPSILON) };
    // The distance of 1 and the next number, found by rounding.
    let mut stored = compute;
    loop {
        let mut out = [zero];
        T::store(&[T::Acc::from_f64(1.0 + stored)], &mut out);
        if widen(&out)[0] > 1.0 {
            return (compute, stored);
        }
        stored *= 2.0;
    }
}

/// Keys along one axis, by definition: the nearest at multiples of the dilation.
fn keys(point: usize, size: usize, kernel: usize, dilation: usize, clamp: bool) -> Vec<usize> {
    let mut keys: Vec<usize> = (0..size).filter(|key| key.abs_diff(point).is_multiple_of(dilation)).collect();
    if clamp {
        keys.sort_by_key(|key| key.abs_diff(point));
        keys.truncate(kernel);
        keys.sort_unstable();
    } else {
        keys.retain(|key| key.abs_diff(point) <= kernel / 2 * dilation);
    }
    keys
}

/// Everything in `f64`, pair by pair.
struct Naive {
    out: Vec<f64>,
    lse: Vec<f64>,
    grads: [Vec<f64>; 4],
}

fn naive(of: &Neighborhood, [q, k, v, bias]: [&[f64]; 4], grad: &[f64], grad_lse: &[f64]) -> Naive {
    let [rows, columns] = of.grid;
    let (depth, table) = (of.depth, of.kernel.map(|k| 2 * k - 1));
    let mut all = Naive {
        out: vec![0.0; q.len()],
        lse: vec![0.0; q.len() / depth],
        grads: [q.len(), q.len(), q.len(), of.heads * table[0] * table[1]].map(|len| vec![0.0; len]),
    };
    let dot = |a: &[f64], i: usize, b: &[f64], j: usize| -> f64 {
        (0..depth).map(|d| a[i * depth + d] * b[j * depth + d]).sum()
    };
    for (grid, y, x) in
        (0..of.batch * of.heads).flat_map(|g| (0..rows).flat_map(move |y| (0..columns).map(move |x| (g, y, x))))
    {
        let i = (grid * rows + y) * columns + x;
        let mut pairs = Vec::new();
        for key_y in keys(y, rows, of.kernel[0], of.dilation[0], of.clamp) {
            for key_x in keys(x, columns, of.kernel[1], of.dilation[1], of.clamp) {
                let place = |key: usize, own: usize, axis: usize| {
                    ((key as isize - own as isize) / of.dilation[axis] as isize + of.kernel[axis] as isize - 1) as usize
                };
                let at = (grid % of.heads * table[0] + place(key_y, y, 0)) * table[1] + place(key_x, x, 1);
                let j = (grid * rows + key_y) * columns + key_x;
                let score = of.scale * dot(q, i, k, j) + bias.get(at).copied().unwrap_or(0.0);
                pairs.push((j, at, score));
            }
        }
        let peak = pairs.iter().fold(f64::NEG_INFINITY, |m, p| m.max(p.2));
        all.lse[i] = peak + pairs.iter().map(|p| (p.2 - peak).exp()).sum::<f64>().ln();
        for (j, _, score) in &pairs {
            let p = (score - all.lse[i]).exp();
            for d in 0..depth {
                all.out[i * depth + d] += p * v[j * depth + d];
                all.grads[2][j * depth + d] += p * grad[i * depth + d];
            }
        }
        let delta = dot(grad, i, &all.out, i) - grad_lse[i];
        for (j, at, score) in pairs {
            let ds = (score - all.lse[i]).exp() * (dot(grad, i, v, j) - delta);
            all.grads[3][at] += ds;
            for d in 0..depth {
                all.grads[0][i * depth + d] += of.scale * ds * k[j * depth + d];
                all.grads[1][j * depth + d] += of.scale * ds * q[i * depth + d];
            }
        }
    }
    all
}

fn close(got: &[f64], want: &[f64], terms: usize, (compute, stored): (f64, f64)) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(1.0_f64, |m, v| m.max(v.abs()));
    for (got, want) in got.iter().zip(want) {
        let bound = 8.0 * (terms + 8) as f64 * compute * size + stored * want.abs();
        assert!((got - want).abs() <= bound, "{got} is not {want} to {bound:e}");
    }
}

fn check<T: Element<Acc: Transcendental>>(of: &Neighborhood, biased: bool, seed: u64, zero: T) {
    let points = of.batch * of.heads * of.grid[0] * of.grid[1];
    let len = points * of.depth;
    let [q, k, v, grad] = [1, 2, 3, 4].map(|i| numbers(len, seed.wrapping_add(i), zero));
    let table = if biased { of.heads * (2 * of.kernel[0] - 1) * (2 * of.kernel[1] - 1) } else { 0 };
    let bias = numbers(table, seed.wrapping_add(5), zero);
    let grad_lse: Vec<T::Acc> = numbers(points, seed.wrapping_add(6), T::Acc::default());
    let inputs = NeighborhoodInputs { q: &q, k: &k, v: &v, bias: biased.then_some(&bias[..]) };
    let want = naive(
        of,
        [&widen(&q), &widen(&k), &widen(&v), &widen(&bias)],
        &widen(&grad),
        &grad_lse.iter().map(|v| v.to_f64()).collect::<Vec<_>>(),
    );
    let mut seen: Option<Vec<Vec<f64>>> = None;
    for threads in 1..=3 {
        let (mut out, mut lse) = (vec![zero; len], vec![T::Acc::default(); points]);
        neighborhood(inputs, of, &mut out, &mut lse, Par::threads(threads)).unwrap();
        let [mut by_q, mut by_k, mut by_v] = [(); 3].map(|()| vec![zero; len]);
        let mut by_bias = vec![zero; table];
        let grads = NeighborhoodGradients {
            q: &mut by_q,
            k: &mut by_k,
            v: &mut by_v,
            bias: biased.then_some(&mut by_bias[..]),
        };
        let given = (&grad[..], Some(&grad_lse[..]));
        neighborhood_backward(inputs, of, (&out, &lse), given, grads, Par::threads(threads)).unwrap();
        let lse = lse.iter().map(|v| v.to_f64()).collect();
        let results = vec![widen(&out), lse, widen(&by_q), widen(&by_k), widen(&by_v), widen(&by_bias)];
        if let Some(seen) = &seen {
            assert!(seen == &results, "other bits on {threads} threads");
        }
        seen = Some(results);
    }
    let unit = roundoff(zero);
    // The rounded outputs enter the gradients.
    let through = (unit.0 + if unit.1 > unit.0 { unit.1 / 16.0 } else { 0.0 }, unit.1);
    let keys = of.kernel[0] * of.kernel[1];
    let [out, lse, by_q, by_k, by_v, by_bias] = <[_; 6]>::try_from(seen.unwrap()).unwrap();
    close(&out, &want.out, of.depth, unit);
    close(&lse, &want.lse, of.depth, (unit.0, unit.0));
    close(&by_q, &want.grads[0], of.depth + keys, through);
    close(&by_k, &want.grads[1], of.depth + keys, through);
    close(&by_v, &want.grads[2], of.depth + keys, unit);
    if biased {
        close(&by_bias, &want.grads[3], of.depth + keys, through);
    }
}

fn problems() -> impl Strategy<Value = Neighborhood> {
    let axis = (0_usize..4, 1_usize..4, 0_usize..7);
    (1_usize..3, 1_usize..3, (axis.clone(), axis), 1_usize..40, any::<bool>(), 0.05_f64..1.0).prop_map(
        |(batch, heads, (y, x), depth, clamp, scale)| {
            let kernel = [2 * y.0 + 1, 2 * x.0 + 1];
            let dilation = [y.1, x.1];
            let least = |axis: usize| if clamp { kernel[axis] * dilation[axis] } else { 1 };
            let grid = [least(0) + y.2, least(1) + x.2];
            Neighborhood { batch, heads, grid, depth, kernel, dilation, clamp, scale }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn windows_match_their_definition(of in problems(), biased in any::<bool>(), seed in any::<u64>()) {
        check(&of, biased, seed, 0.0_f64);
        check(&of, biased, seed, 0.0_f32);
        check(&of, biased, seed, bf16::ZERO);
        check(&of, biased, seed, f16::ZERO);
    }

    #[test]
    fn shifts_match_their_definition(
        sizes in (1_usize..3, 1_usize..4, 1_usize..30, 1_usize..70), with_last in any::<bool>(), seed in any::<u64>(),
    ) {
        let (batch, heads, tokens, depth) = sizes;
        let shape = ShiftShape { batch, heads, tokens, depth };
        check_shift(&shape, with_last, seed, 0.0_f64);
        check_shift(&shape, with_last, seed, 0.0_f32);
        check_shift(&shape, with_last, seed, bf16::ZERO);
    }
}

/// Wide kernels, long rows of scores, and several bands per grid.
#[test]
fn large_windows_match_their_definition() {
    let of = Neighborhood {
        batch: 1,
        heads: 2,
        grid: [23, 41],
        depth: 48,
        kernel: [9, 19],
        dilation: [1, 2],
        clamp: true,
        scale: 0.2,
    };
    check(&of, true, 1, 0.0_f32);
    check(&Neighborhood { clamp: false, kernel: [99, 7], ..of }, true, 2, 0.0_f64);
    check(&Neighborhood { grid: [70, 5], kernel: [3, 5], dilation: [1, 1], ..of }, true, 3, 0.0_f32);
}

#[test]
fn windows_refuse_what_does_not_fit() {
    let of = Neighborhood {
        batch: 1,
        heads: 1,
        grid: [4, 4],
        depth: 2,
        kernel: [3, 3],
        dilation: [1, 1],
        clamp: true,
        scale: 1.0,
    };
    let data = [0.0_f32; 32];
    let attempt = |of: Neighborhood, bias: Option<&[f32]>, keys: usize| {
        let inputs = NeighborhoodInputs { q: &data, k: &data[..keys], v: &data, bias };
        neighborhood(inputs, &of, &mut [0.0; 32], &mut [0.0; 16], Par::threads(1))
    };
    assert!(attempt(of, None, 32).is_ok());
    for wrong in [
        Neighborhood { kernel: [2, 3], ..of },
        Neighborhood { kernel: [0, 3], ..of },
        Neighborhood { kernel: [5, 3], ..of },
        Neighborhood { kernel: [usize::MAX, 3], ..of },
        Neighborhood { dilation: [2, 1], ..of },
        Neighborhood { dilation: [usize::MAX, 1], ..of },
        Neighborhood { dilation: [0, 1], ..of },
        Neighborhood { scale: f64::NAN, ..of },
        Neighborhood { depth: 0, ..of },
        Neighborhood { batch: usize::MAX, ..of },
        Neighborhood { grid: [usize::MAX, usize::MAX], ..of },
    ] {
        assert!(matches!(attempt(wrong, None, 32), Err(KernelError::Argument { .. })), "{wrong:?}");
    }
    assert!(attempt(of, Some(&[0.0; 24]), 32).is_err());
    assert!(attempt(of, None, 31).is_err());
    assert!(attempt(Neighborhood { clamp: false, dilation: [usize::MAX, 1], ..of }, None, 32).is_ok());
    assert!(attempt(Neighborhood { clamp: false, kernel: [(1 << 30) - 1, 3], ..of }, None, 32).is_ok());
}

fn check_shift<T: Element>(shape: &ShiftShape, with_last: bool, seed: u64, zero: T) {
    let ShiftShape { batch, heads, tokens, depth } = *shape;
    let len = batch * heads * tokens * depth;
    let (x, grad) = (numbers(len, seed, zero), numbers(len, seed.wrapping_add(77), zero));
    let last = numbers(batch * heads * depth, seed ^ 5, zero);
    let last = with_last.then_some(&last[..]);
    let mix: Vec<f64> = widen(&numbers(2 * heads, seed.wrapping_add(9), 0.0_f32));
    let (wide, wide_grad) = (widen(&x), widen(&grad));
    let before = last.map_or(vec![0.0; batch * heads * depth], widen);
    let at = |data: &[f64], s: usize, t: usize, d: usize| data[(s * tokens + t) * depth + d];
    let (mut y, mut by_x, mut by_last) = (vec![0.0; len], vec![0.0; len], vec![0.0; before.len()]);
    let mut by_mix = vec![0.0; mix.len()];
    for (s, t, d) in (0..batch * heads).flat_map(|s| (0..tokens).flat_map(move |t| (0..depth).map(move |d| (s, t, d))))
    {
        let (a, b) = (mix[s % heads * 2], mix[s % heads * 2 + 1]);
        let previous = if t == 0 { before[s * depth + d] } else { at(&wide, s, t - 1, d) };
        let g = at(&wide_grad, s, t, d);
        y[(s * tokens + t) * depth + d] = a * at(&wide, s, t, d) + b * previous;
        by_x[(s * tokens + t) * depth + d] += a * g;
        if t == 0 {
            by_last[s * depth + d] += b * g;
        } else {
            by_x[(s * tokens + t - 1) * depth + d] += b * g;
        }
        by_mix[s % heads * 2] += g * at(&wide, s, t, d);
        by_mix[s % heads * 2 + 1] += g * previous;
    }
    let unit = roundoff(zero);
    for threads in 1..=3 {
        let mut got = vec![zero; len];
        token_shift(&x, last, &mix, shape, &mut got, Par::threads(threads)).unwrap();
        close(&widen(&got), &y, 1, unit);
        let (mut got_x, mut got_last, mut got_mix) = (vec![zero; len], vec![zero; before.len()], vec![9.0; mix.len()]);
        let grads = (&mut got_x[..], with_last.then_some(&mut got_last[..]), &mut got_mix[..]);
        token_shift_backward(&grad, &x, last, &mix, shape, grads, Par::threads(threads)).unwrap();
        close(&widen(&got_x), &by_x, 1, unit);
        if with_last {
            close(&widen(&got_last), &by_last, 1, unit);
        }
        close(&got_mix, &by_mix, batch * tokens * depth, (unit.0, unit.0));
    }
}

/// Tokens longer than a piece that is widened, and than a block.
#[test]
fn shifts_of_long_tokens_match_their_definition() {
    for (tokens, depth) in [(1, 5000), (3, 5003), (2, 40_000), (2000, 7)] {
        let shape = ShiftShape { batch: 1, heads: 2, tokens, depth };
        for with_last in [false, true] {
            check_shift(&shape, with_last, 3, 0.0_f32);
            check_shift(&shape, with_last, 4, f16::ZERO);
        }
    }
}

#[test]
fn shifts_refuse_what_does_not_fit() {
    let shape = ShiftShape { batch: 1, heads: 2, tokens: 3, depth: 4 };
    let attempt = |shape: ShiftShape, last: Option<&[f32]>, mix: &[f64]| {
        token_shift(&[0.0_f32; 24], last, mix, &shape, &mut [0.0; 24], Par::threads(1))
    };
    assert!(attempt(shape, Some(&[0.0; 8]), &[1.0; 4]).is_ok());
    assert!(attempt(shape, Some(&[0.0; 7]), &[1.0; 4]).is_err());
    assert!(attempt(shape, None, &[1.0; 3]).is_err());
    assert!(attempt(ShiftShape { tokens: 0, ..shape }, None, &[1.0; 4]).is_err());
    assert!(attempt(ShiftShape { tokens: usize::MAX, ..shape }, None, &[1.0; 4]).is_err());
}
