//! The `norm` kernels against naive loops in `f64`, to the bounds their comments state.
#![allow(clippy::unwrap_used, clippy::needless_range_loop, reason = "naive loops; a failed unwrap is a failed test")]

use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use shiftkern_kernels::exec::Io;
use shiftkern_kernels::norm::{
    Affine, Components, Layout, MixedParams, Moments, Source, StyleOutput, StyleParams, UnmixOutput, UnmixParams,
    channel_affine, channel_combine, channel_dot, channel_moments, ema_update, mixed_batch_norm, style_shift,
    unmix_norm, unmix_update,
};
use shiftkern_kernels::simd::{Element, Real};
use shiftkern_kernels::{KernelError, Par};

/// A stream of numbers that depends on the seed alone.
fn numbers(len: usize, seed: u64, centre: f64, spread: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            centre + spread * ((state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0)
        })
        .collect()
}

fn widen<T: Element>(x: &[T]) -> Vec<f64> {
    let mut wide = vec![T::Acc::default(); x.len()];
    T::load(x, &mut wide);
    wide.into_iter().map(Real::to_f64).collect()
}

/// The elements of each (group, channel), in order.
fn channels(x: &[f64], layout: Layout, mask: Option<&[u8]>) -> Vec<Vec<f64>> {
    let mut out = vec![Vec::new(); layout.statistics()];
    for (i, &v) in x.iter().enumerate() {
        let (o, c, s) = (i / layout.inner / layout.channels, i / layout.inner % layout.channels, i % layout.inner);
        if mask.is_none_or(|m| m[o * layout.inner + s] != 0) {
            out[o / layout.outer_per_group() * layout.channels + c].push(v);
        }
    }
    out
}

fn naive_moments(x: &[f64]) -> Moments {
    let n = x.len() as f64;
    let rough = if x.is_empty() { 0.0 } else { x.iter().sum::<f64>() / n };
    // A second pass removes the first one's rounding: the twin must be better than what it judges.
    let mean = if x.is_empty() { 0.0 } else { rough + x.iter().map(|v| v - rough).sum::<f64>() / n };
    Moments { count: n, mean, m2: x.iter().map(|v| (v - mean) * (v - mean)).sum() }
}

fn check_moments<T: Element>(x: &[T], layout: Layout, mask: Option<&[u8]>, u: f64) {
    let mut got = vec![Moments::default(); layout.statistics()];
    channel_moments(x, layout, mask, &mut got, Par::threads(2)).unwrap();
    for (got, values) in got.iter().zip(channels(&widen(x), layout, mask)) {
        let want = naive_moments(&values);
        let reach = values.iter().fold(0.0_f64, |m, v| m.max((v - want.mean).abs()));
        assert_eq!(got.count, want.count, "{layout:?}");
        let merged = (1.0 + want.count / 32.0).ceil() * f64::EPSILON * want.mean.abs();
        assert!((got.mean - want.mean).abs() <= 64.0 * u * reach + merged, "{got:?} {want:?} {layout:?}");
        let offset = f64::EPSILON * want.mean.abs() / want.variance().sqrt().max(f64::MIN_POSITIVE);
        assert!((got.m2 - want.m2).abs() <= (100.0 * u + 4.0 * offset) * want.m2, "{got:?} {want:?} {layout:?}");
    }
}

fn layouts() -> impl Strategy<Value = Layout> {
    let slices = (1_usize..9, 1_usize..7, 2_usize..70);
    let rows = (1_usize..300, 1_usize..90, Just(1_usize));
    (prop_oneof![slices, rows], 1_usize..4).prop_map(|((per_group, channels, inner), groups)| Layout {
        outer: per_group * groups,
        channels,
        inner,
        groups,
    })
}

/// The same cases on every run; `PROPTEST_CASES` and `PROPTEST_RNG_SEED` explore others.
fn config(cases: u32) -> ProptestConfig {
    let explore = std::env::var_os("PROPTEST_RNG_SEED").is_some();
    let default = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if explore { default } else { ProptestConfig { cases, rng_seed: RngSeed::Fixed(0), ..default } }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn moments_match(layout in layouts(), seed in any::<u64>(), centre in -1e3_f64..1e3, masked in any::<bool>()) {
        let x = numbers(layout.len(), seed, centre, 1.0);
        let keep: Vec<u8> = numbers(layout.outer * layout.inner, seed ^ 1, 0.0, 1.0).iter().map(|&v| u8::from(v > 0.0)).collect();
        let mask = masked.then_some(&keep[..]);
        check_moments(&x, layout, mask, f64::EPSILON);
        check_moments(&x.iter().map(|&v| v as f32).collect::<Vec<_>>(), layout, mask, f32::EPSILON.into());
        check_moments(&x.iter().map(|&v| f16::from_f64(v)).collect::<Vec<_>>(), layout, mask, f32::EPSILON.into());
        check_moments(&x.iter().map(|&v| bf16::from_f64(v)).collect::<Vec<_>>(), layout, mask, f32::EPSILON.into());
    }

    #[test]
    fn moments_survive_scale_and_offset(layout in layouts(), seed in any::<u64>(), power in -18_i32..19) {
        let scale = 10.0_f64.powi(power);
        let x: Vec<f32> = numbers(layout.len(), seed, 0.0, scale).iter().map(|&v| v as f32).collect();
        check_moments(&x, layout, None, f32::EPSILON.into());
        let x: Vec<f32> = numbers(layout.len(), seed, 1e6, 1.0).iter().map(|&v| v as f32).collect();
        check_moments(&x, layout, None, f32::EPSILON.into());
    }

    #[test]
    fn masked_values_never_leak(layout in layouts(), seed in any::<u64>()) {
        let x: Vec<f32> = numbers(layout.len(), seed, 0.0, 1.0).iter().map(|&v| v as f32).collect();
        let mask: Vec<u8> = numbers(layout.outer * layout.inner, seed ^ 1, 0.0, 1.0).iter().map(|&v| u8::from(v > 0.0)).collect();
        let poisoned: Vec<f32> = x.iter().enumerate().map(|(i, &v)| {
            let (o, s) = (i / layout.inner / layout.channels, i % layout.inner);
            if mask[o * layout.inner + s] == 0 { f32::NAN } else { v }
        }).collect();
        let (mut a, mut b) = (vec![Moments::default(); layout.statistics()], vec![Moments::default(); layout.statistics()]);
        channel_moments(&x, layout, Some(&mask), &mut a, Par::threads(1)).unwrap();
        channel_moments(&poisoned, layout, Some(&mask), &mut b, Par::threads(1)).unwrap();
        prop_assert_eq!(a, b);
    }

    #[test]
    fn merging_any_split_gives_the_whole(x in prop::collection::vec(-1e3_f64..1e3, 0..200), cut in 0.0_f64..1.0) {
        let cut = (x.len() as f64 * cut) as usize;
        let whole = naive_moments(&x);
        let merged = naive_moments(&x[..cut]).merge(naive_moments(&x[cut..]));
        prop_assert_eq!(merged.count, whole.count);
        prop_assert!((merged.mean - whole.mean).abs() <= 1e-12 * (1.0 + whole.mean.abs()));
        prop_assert!((merged.m2 - whole.m2).abs() <= 1e-10 * (1.0 + whole.m2));
        prop_assert_eq!(whole.merge(Moments::default()), whole);
        prop_assert_eq!(Moments::default().merge(whole), whole);
    }

    #[test]
    fn element_wise_passes_match(layout in layouts(), seed in any::<u64>(), centre in -1e3_f64..1e3) {
        let k = layout.statistics();
        let (x, g) = (numbers(layout.len(), seed, centre, 1.0), numbers(layout.len(), seed ^ 2, 0.0, 1.0));
        let x: Vec<f32> = x.iter().map(|&v| v as f32).collect();
        let g: Vec<f32> = g.iter().map(|&v| v as f32).collect();
        let (shift, scale) = (numbers(k, seed ^ 3, centre, 1.0), numbers(k, seed ^ 4, 0.0, 2.0));
        let (bias, factor) = (numbers(k, seed ^ 5, 0.0, 2.0), numbers(k, seed ^ 6, 0.0, 2.0));
        let affine = Affine::new((0..k).map(|i| (shift[i], scale[i], bias[i])));
        let mut y = vec![0.0_f32; x.len()];
        channel_affine(&mut Io::split(&x, &mut y).unwrap(), layout, &affine, Par::threads(2)).unwrap();
        let mut in_place = x.clone();
        channel_affine(&mut Io::in_place(&mut in_place), layout, &affine, Par::threads(2)).unwrap();
        prop_assert_eq!(&y, &in_place);
        let mut combined = vec![0.0_f32; x.len()];
        channel_combine(&g, &x, layout, &factor, &affine, &mut combined, Par::threads(2)).unwrap();
        let mut sums = vec![(0.0, 0.0); k];
        channel_dot(&g, &x, layout, &shift, &mut sums, Par::threads(2)).unwrap();
        let mut want = vec![(0.0, 0.0, 0.0, 0.0); k];
        for i in 0..x.len() {
            let (o, c) = (i / layout.inner / layout.channels, i / layout.inner % layout.channels);
            let j = o / layout.outer_per_group() * layout.channels + c;
            let (x, g) = (f64::from(x[i]), f64::from(g[i]));
            let affine = (x - shift[j]) * scale[j] + bias[j];
            let bound = 6.0 * f64::from(f32::EPSILON) * (((x - shift[j]) * scale[j]).abs() + bias[j].abs() + (g * factor[j]).abs() + 1e-3);
            prop_assert!((f64::from(y[i]) - affine).abs() <= bound);
            prop_assert!((f64::from(combined[i]) - (g * factor[j] + affine)).abs() <= bound);
            let product = g * (x - shift[j]);
            let w = &mut want[j];
            *w = (w.0 + g, w.1 + product, w.2 + g.abs(), w.3 + product.abs() + g.abs());
        }
        for (got, want) in sums.iter().zip(want) {
            prop_assert!((got.0 - want.0).abs() <= 100.0 * f64::from(f32::EPSILON) * want.2);
            prop_assert!((got.1 - want.1).abs() <= 100.0 * f64::from(f32::EPSILON) * want.3);
        }
    }

    #[test]
    fn mixed_batch_norm_matches(layout in layouts(), seed in any::<u64>(), source_weight in 0.0_f64..=1.0, unbiased in any::<bool>()) {
        let layout = Layout { groups: 1, ..layout };
        let c = layout.channels;
        let x = numbers(layout.len(), seed, 3.0, 2.0);
        let (mean, var) = (numbers(c, seed ^ 1, 0.0, 1.0), numbers(c, seed ^ 2, 1.0, 0.9));
        let (weight, bias) = (numbers(c, seed ^ 3, 0.0, 2.0), numbers(c, seed ^ 4, 0.0, 2.0));
        let source = Source { mean: &mean, var: &var, weight: Some(&weight), bias: Some(&bias) };
        let params = MixedParams { source_weight, eps: 1e-5, unbiased };
        let mut y = vec![0.0; x.len()];
        let (mut batch_mean, mut batch_var) = (vec![0.0; c], vec![0.0; c]);
        let mut io = Io::split(&x, &mut y).unwrap();
        mixed_batch_norm(&mut io, layout, source, &params, &mut batch_mean, &mut batch_var, Par::threads(2)).unwrap();
        for (j, values) in channels(&x, layout, None).iter().enumerate() {
            let m = naive_moments(values);
            let v = m.m2 / if unbiased { (m.count - 1.0).max(1.0) } else { m.count };
            let used_mean = source_weight * mean[j] + (1.0 - source_weight) * m.mean;
            let used_var = source_weight * var[j] + (1.0 - source_weight) * v;
            let got = &channels(&y, layout, None)[j];
            for (x, y) in values.iter().zip(got) {
                let want = (x - used_mean) / (used_var + 1e-5).sqrt() * weight[j] + bias[j];
                prop_assert!((y - want).abs() <= 1e-10 * (1.0 + want.abs()), "{} {}", y, want);
            }
        }
    }

    #[test]
    fn unmix_matches_its_definition(b in 1_usize..5, c in 1_usize..6, s in 1_usize..20, k in 1_usize..5, seed in any::<u64>(), cross_term in any::<bool>()) {
        let layout = Layout { outer: b, channels: c, inner: s, groups: b };
        let x = numbers(layout.len(), seed, 0.5, 2.0);
        let (mean, var) = (numbers(k * c, seed ^ 1, 0.0, 1.0), numbers(k * c, seed ^ 2, 1.0, 0.9));
        let components = Components { mean: &mean, var: &var, weight: None, bias: None };
        let params = UnmixParams { temperature: 0.07, eps: 1e-5, cross_term };
        let mut y = vec![0.0; x.len()];
        let (mut p, mut st) = (vec![0.0; b * k], vec![vec![0.0; b * c]; 5]);
        let [im, iv, m, v, slope] = &mut st[..] else { unreachable!() };
        let mut out = UnmixOutput { p: &mut p, instance_mean: im, instance_var: iv, mean: m, var: v, var_slope: slope };
        unmix_norm(&mut Io::split(&x, &mut y).unwrap(), layout, components, &params, &mut out, Par::threads(2)).unwrap();
        let own: Vec<Moments> = channels(&x, layout, None).iter().map(|v| naive_moments(v)).collect();
        for i in 0..b {
            let row: Vec<f64> = own[i * c..][..c].iter().map(|m| m.mean).collect();
            let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
            let logits: Vec<f64> = mean.chunks(c).map(|m| {
                m.iter().zip(&row).map(|(a, b)| a * b).sum::<f64>() / (length(m) * length(&row)) / 0.07
            }).collect();
            let total: f64 = logits.iter().map(|l| l.exp()).sum();
            for j in 0..k {
                prop_assert!((p[i * k + j] - logits[j].exp() / total).abs() <= 1e-12);
            }
            for ch in 0..c {
                let parts: Vec<(f64, f64)> = (0..k).map(|j| {
                    let (q, mk, vk) = (p[i * k + j], mean[j * c + ch], var[j * c + ch]);
                    let own = own[i * c + ch];
                    let cross = if cross_term { q * (1.0 - q) * (own.mean - mk).powi(2) } else { 0.0 };
                    ((1.0 - q) * mk + q * own.mean, (1.0 - q) * vk + q * own.m2 / own.count + cross)
                }).collect();
                let mu = parts.iter().map(|p| p.0).sum::<f64>() / k as f64;
                let sigma = parts.iter().map(|p| p.1 + p.0 * p.0).sum::<f64>() / k as f64 - mu * mu;
                for t in 0..s {
                    let at = (i * c + ch) * s + t;
                    let want = (x[at] - mu) / (sigma + 1e-5).sqrt();
                    prop_assert!((y[at] - want).abs() <= 1e-9 * (1.0 + want.abs()));
                }
            }
        }
        let mut moved = mean.clone();
        let instance: Vec<f64> = own.iter().map(|m| m.mean).collect();
        unmix_update(&mut moved, &instance, &p, k, 0.3, Par::threads(2)).unwrap();
        for j in 0..k {
            for ch in 0..c {
                let pull: f64 = (0..b).map(|i| p[i * k + j] * (instance[i * c + ch] - mean[j * c + ch])).sum::<f64>() / b as f64;
                prop_assert!((moved[j * c + ch] - (mean[j * c + ch] + 0.3 * pull)).abs() <= 1e-12);
            }
        }
    }

    #[test]
    fn style_shift_matches_its_definition(b in 1_usize..5, c in 1_usize..6, s in 2_usize..20, d in 1_usize..4, seed in any::<u64>(), threshold in 0.0_f64..6.0) {
        let layout = Layout { outer: b, channels: c, inner: s, groups: b };
        let x = numbers(layout.len(), seed, 0.5, 2.0);
        let (sm, ss) = (numbers(d * c, seed ^ 1, 0.0, 2.0), numbers(d * c, seed ^ 2, 1.0, 0.9));
        let mut y = vec![0.0; x.len()];
        let (mut style, mut mean, mut std) = (vec![0; b], vec![0.0; b * c], vec![0.0; b * c]);
        let params = StyleParams { threshold: Some(threshold), eps: 1e-5 };
        let mut out = StyleOutput { style: &mut style, mean: &mut mean, std: &mut std };
        style_shift(&mut Io::split(&x, &mut y).unwrap(), layout, &sm, &ss, &params, &mut out, Par::threads(2)).unwrap();
        for i in 0..b {
            let own: Vec<Moments> = channels(&x, layout, None)[i * c..][..c].iter().map(|v| naive_moments(v)).collect();
            let stds: Vec<f64> = own.iter().map(|m| (m.variance() + 1e-5).sqrt()).collect();
            let distances: Vec<f64> = (0..d).map(|j| (0..c).map(|ch| {
                (own[ch].mean - sm[j * c + ch]).powi(2) + (stds[ch] - ss[j * c + ch]).powi(2)
            }).sum::<f64>().sqrt()).collect();
            let best = (0..d).min_by(|&a, &b| distances[a].total_cmp(&distances[b])).unwrap();
            let shifted = distances[best] > threshold;
            prop_assert_eq!(style[i], if shifted { best as i64 } else { -1 });
            for at in i * c * s..(i + 1) * c * s {
                let ch = at / s % c;
                let want = (x[at] - own[ch].mean) / stds[ch] * ss[best * c + ch] + sm[best * c + ch];
                if shifted {
                    prop_assert!((y[at] - want).abs() <= 1e-10 * (1.0 + want.abs()));
                } else {
                    prop_assert_eq!(y[at].to_bits(), x[at].to_bits());
                }
            }
        }
    }

    #[test]
    fn ema_matches(t in prop::collection::vec(-10.0_f32..10.0, 0..3000), momentum in 0.0_f64..=1.0) {
        let v: Vec<f32> = t.iter().rev().copied().collect();
        let mut got = t.clone();
        let (first, rest) = got.split_at_mut(t.len() / 3);
        let pairs = vec![(first, &v[..t.len() / 3]), (rest, &v[t.len() / 3..])];
        ema_update(pairs, momentum, Par::threads(2)).unwrap();
        for ((got, t), v) in got.iter().zip(&t).zip(&v) {
            let want = (1.0 - momentum) * f64::from(*t) + momentum * f64::from(*v);
            prop_assert!((f64::from(*got) - want).abs() <= 3.0 * f64::from(f32::EPSILON) * 10.0);
        }
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    for (outer, channels, inner, groups) in
        [(16, 8, 6000, 1), (300_001, 3, 1, 1), (5000, 70, 1, 5), (4, 3, 200_001, 4), (64, 96, 49, 1)]
    {
        let layout = Layout { outer, channels, inner, groups };
        let x: Vec<f32> = numbers(layout.len(), 7, 1.0, 3.0).iter().map(|&v| v as f32).collect();
        let run = |threads| {
            let mut moments = vec![Moments::default(); layout.statistics()];
            channel_moments(&x, layout, None, &mut moments, Par::threads(threads)).unwrap();
            let shift: Vec<f64> = moments.iter().map(|m| m.mean).collect();
            let mut sums = vec![(0.0, 0.0); layout.statistics()];
            channel_dot(&x, &x, layout, &shift, &mut sums, Par::threads(threads)).unwrap();
            (moments, sums)
        };
        let one = run(1);
        for threads in [2, 3, 5] {
            assert_eq!(run(threads), one, "{layout:?}");
        }
    }
}

#[test]
fn wrong_sizes_are_errors_not_panics() {
    let layout = Layout { outer: 2, channels: 3, inner: 4, groups: 1 };
    let par = Par::threads(1);
    let is_argument = |r: Result<(), KernelError>| matches!(r, Err(KernelError::Argument { .. }));
    let mut out = vec![Moments::default(); 3];
    assert!(is_argument(channel_moments(&[0.0_f32; 23], layout, None, &mut out, par)));
    assert!(is_argument(channel_moments(&[0.0_f32; 24], layout, Some(&[1; 7]), &mut out, par)));
    assert!(is_argument(channel_moments(&[0.0_f32; 24], layout, None, &mut out[..2], par)));
    assert!(is_argument(channel_dot(&[0.0_f32; 23], &[0.0; 24], layout, &[0.0; 3], &mut [(0.0, 0.0); 3], par)));
    let affine = Affine::new([(0.0, 1.0, 0.0)].into_iter());
    assert!(is_argument(channel_affine(&mut Io::in_place(&mut [0.0_f32; 24]), layout, &affine, par)));
    assert!(is_argument(ema_update(vec![(&mut [0.0_f32; 3], &[0.0; 2])], 0.5, par)));
}

#[test]
fn nothing_is_a_valid_amount_of_data() {
    for (outer, channels, inner) in [(0, 3, 4), (2, 0, 4), (2, 3, 0)] {
        let layout = Layout { outer, channels, inner, groups: 1 };
        let mut out = vec![Moments { count: 9.0, mean: 9.0, m2: 9.0 }; channels];
        channel_moments::<f32>(&[], layout, None, &mut out, Par::threads(1)).unwrap();
        assert!(out.iter().all(|m| *m == Moments::default()));
    }
}
