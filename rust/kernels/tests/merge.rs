//! The kernels of `merge` against plain loops in `f64`.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that fails may panic")]

use proptest::prelude::*;
use shiftkern_kernels::Par;
use shiftkern_kernels::merge::{Deltas, Divide, Elect, Keep, Masked, dots, linear, magnitude_sums, masked, thresholds};

const MODELS: usize = 3;

fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // A few distinct values, so that magnitudes and sums tie.
        ((state >> 33) % 41) as f64 / 16.0 - 1.25
    };
    (0..n).map(|_| draw()).collect()
}

struct Case {
    base: Vec<f64>,
    models: Vec<Vec<f64>>,
}

impl Case {
    fn new(n: usize, seed: u64) -> Self {
        Self { base: numbers(n, seed), models: (1..=MODELS as u64).map(|k| numbers(n, seed + k)).collect() }
    }

    fn slices(&self) -> Vec<&[f64]> {
        self.models.iter().map(Vec::as_slice).collect()
    }

    fn delta(&self, model: usize, i: usize) -> f64 {
        self.models[model][i] - self.base[i]
    }
}

/// The combination of one entry, as the documentation of [`masked`] states it.
fn combined(deltas: &[f64], how: &Masked<'_, f64>) -> f64 {
    let kept = deltas.iter().enumerate().map(|(k, &d)| {
        let counts = d.abs() >= how.keep.low[k] && d.abs() <= how.keep.high[k];
        if counts { d * how.rescale[k] } else { 0.0 }
    });
    let kept: Vec<f64> = kept.collect();
    let votes: Vec<f64> =
        kept.iter().zip(how.weights).map(|(d, w)| if how.elect == Elect::Weighted { d * w } else { *d }).collect();
    let total: f64 = votes.iter().sum();
    let sign = if total == 0.0 { how.tie } else { total };
    let agrees = |k: usize| how.elect == Elect::None || votes[k] * sign > 0.0;
    let chosen: Vec<usize> = (0..deltas.len()).filter(|&k| agrees(k)).collect();
    let sum: f64 = chosen.iter().map(|&k| how.weights[k] * kept[k]).sum();
    let divisor = match how.divide {
        Divide::None => 1.0,
        Divide::Count => chosen.len() as f64,
        Divide::Weight => chosen.iter().map(|&k| how.weights[k]).sum(),
    };
    how.scale * sum / if divisor.abs() < 1e-8 { 1.0 } else { divisor }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn combinations_equal_their_definition(n in 0_usize..3000, seed in any::<u64>(), which in 0_usize..9, tie in -1_i8..=1) {
        let case = Case::new(n, seed);
        let slices = case.slices();
        let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
        let how = Masked {
            keep: Keep { low: &[0.5, 0.0, 0.75], high: &[9.0, 1.5, 9.0], drop_rate: 0.0, keys: &[0; 3], offset: 0 },
            rescale: &[1.0, 2.0, 0.5],
            weights: &[0.5, 1.0, -0.25],
            scale: 0.75,
            elect: [Elect::None, Elect::Unweighted, Elect::Weighted][which % 3],
            divide: [Divide::None, Divide::Count, Divide::Weight][which / 3],
            tie: f64::from(tie),
        };
        let mut out = vec![f64::NAN; n];
        prop_assert_eq!(masked(&deltas, &how, &mut out, Par::threads(2)).unwrap(), None);
        for (i, out) in out.iter().enumerate() {
            let want = case.base[i] + combined(&[0, 1, 2].map(|k| case.delta(k, i)), &how);
            prop_assert!((out - want).abs() <= 1e-14, "{} is not {} at {}", out, want, i);
        }
        prop_assert_eq!(linear(&deltas, how.weights, &mut out, Par::threads(2)).unwrap(), None);
        for (i, out) in out.iter().enumerate() {
            let want = case.base[i] + (0..MODELS).map(|k| how.weights[k] * case.delta(k, i)).sum::<f64>();
            prop_assert!((out - want).abs() <= 1e-14);
        }
    }

    #[test]
    fn thresholds_are_ranks_of_all_pieces_together(a in 0_usize..2500, b in 1_usize..2500, seed in any::<u64>(), at in 0.0..1.0_f64) {
        let cases = [Case::new(a, seed), Case::new(b, seed ^ 1)];
        let slices = [cases[0].slices(), cases[1].slices()];
        let pieces = [0, 1].map(|i| Deltas::new("test", Some(&cases[i].base), &slices[i]).unwrap());
        let rank = ((a + b) as f64 * at) as usize;
        let ranks = [rank, 0, a + b];
        let (found, bad) = thresholds(&pieces, &ranks, Par::threads(2)).unwrap();
        prop_assert_eq!(bad, None);
        for (model, &rank) in ranks.iter().enumerate() {
            let all = cases.iter().flat_map(|case| (0..case.base.len()).map(move |i| case.delta(model, i).abs()));
            let mut all: Vec<f64> = all.collect();
            all.sort_by(|x, y| y.total_cmp(x));
            prop_assert_eq!(found[model], if rank == 0 { f64::INFINITY } else { all[rank - 1] });
        }
    }
}

#[test]
fn a_long_task_vector_is_bracketed_right_whatever_its_values() {
    let n = 300_000;
    let shapes: [Box<dyn Fn(usize) -> f32>; 5] = [
        Box::new(|i| (i as f32 * 0.618).fract()),
        // Mostly zero: the bracket is one value.
        Box::new(|i| if i % 20 == 0 { i as f32 } else { 0.0 }),
        Box::new(|_| -2.5),
        // All large values in one place.
        Box::new(|i| if i < 1000 { 1e30 } else { 1e-30 * i as f32 }),
        Box::new(|i| f32::from_bits(i as u32)),
    ];
    for shape in shapes {
        let model: Vec<f32> = (0..n).map(shape).collect();
        let slices = [model.as_slice(); 4];
        let deltas = Deltas::new("test", None, &slices).unwrap();
        let ranks = [1, n / 10, n / 2, n - 1];
        let (found, _) = thresholds(&[deltas], &ranks, Par::threads(2)).unwrap();
        let mut all: Vec<f32> = model.iter().map(|v| v.abs()).collect();
        all.sort_by(|x, y| y.total_cmp(x));
        assert_eq!(found, ranks.map(|rank| all[rank - 1]));
    }
}

#[test]
fn sums_of_products_and_magnitudes() {
    let case = Case::new(70_001, 3);
    let slices = case.slices();
    let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
    let gradient = numbers(70_001, 9);
    let (found, _) = dots(&deltas, &gradient, Par::threads(2)).unwrap();
    let keep = Keep { low: &[0.5; 3], high: &[2.0; 3], drop_rate: 0.0, keys: &[0; 3], offset: 0 };
    let (sums, _) = magnitude_sums("test", &deltas, &keep, Par::threads(2)).unwrap();
    for model in 0..MODELS {
        let want: f64 = gradient.iter().enumerate().map(|(i, g)| g * case.delta(model, i)).sum();
        assert!((found[model] - want).abs() < 1e-9);
        let all = (0..gradient.len()).map(|i| case.delta(model, i).abs());
        let kept: f64 = all.clone().filter(|d| (0.5..=2.0).contains(d)).sum();
        assert!((sums[2 * model] - all.sum::<f64>()).abs() < 1e-8 && (sums[2 * model + 1] - kept).abs() < 1e-8);
    }
}

#[test]
fn draws_do_not_depend_on_threads_or_tiles() {
    let case = Case::new(200_003, 5);
    let slices = case.slices();
    let whole = Deltas::new("test", Some(&case.base), &slices).unwrap();
    let how = |offset| Masked {
        keep: Keep { low: &[0.0; 3], high: &[9.0; 3], drop_rate: 0.4, keys: &[1, 2, u64::MAX], offset },
        rescale: &[1.0 / 0.6; 3],
        weights: &[1.0; 3],
        scale: 1.0,
        elect: Elect::Unweighted,
        divide: Divide::Count,
        tie: 1.0,
    };
    let mut want = vec![0.0; case.base.len()];
    masked(&whole, &how(0), &mut want, Par::threads(1)).unwrap();
    for threads in [2, 3] {
        let mut out = vec![0.0; want.len()];
        masked(&whole, &how(0), &mut out, Par::threads(threads)).unwrap();
        assert_eq!(out, want);
    }
    let cut = 77_777;
    let tail: Vec<&[f64]> = slices.iter().map(|s| &s[cut..]).collect();
    let part = Deltas::new("test", Some(&case.base[cut..]), &tail).unwrap();
    let mut out = vec![0.0; tail[0].len()];
    masked(&part, &how(cut as u64), &mut out, Par::threads(2)).unwrap();
    assert_eq!(out, want[cut..]);
    // Of three quarters of a million draws a share of 0.4 is dropped, give or take five standard deviations.
    let keep = Keep { low: &[0.0; 3], high: &[9.0; 3], drop_rate: 0.4, keys: &[1, 2, 3], offset: 0 };
    let ones = vec![1.0; 250_000];
    let ones = [ones.as_slice(); 3];
    let (sums, _) = magnitude_sums("test", &Deltas::new("test", None, &ones).unwrap(), &keep, Par::threads(2)).unwrap();
    for model in 0..MODELS {
        assert!((sums[2 * model + 1] / 250_000.0 - 0.6).abs() < 5.0 * (0.24_f64 / 250_000.0).sqrt());
    }
}

#[test]
fn nan_and_infinities_are_told_with_their_model() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for place in [0, 1023, 1024, 40_000] {
            let mut case = Case::new(50_000, 1);
            case.models[2][place] = bad;
            let slices = case.slices();
            let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
            let mut out = vec![0.0; 50_000];
            assert_eq!(linear(&deltas, &[1.0; 3], &mut out, Par::threads(2)).unwrap(), Some(2));
            assert_eq!(thresholds(&[deltas], &[5; 3], Par::threads(2)).unwrap().1, Some(2));
            assert_eq!(dots(&deltas, &case.base, Par::threads(2)).unwrap().1, Some(2));
            case.base[7] = bad;
            let slices = case.slices();
            let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
            assert_eq!(linear(&deltas, &[1.0; 3], &mut out, Par::threads(2)).unwrap(), Some(0));
        }
    }
}
