//! The kernels of `merge` against plain loops in `f64`.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that fails may panic")]

use proptest::prelude::*;
use shiftkern_kernels::Par;
use shiftkern_kernels::merge::{
    Deltas, Divide, Elect, Keep, Masked, Matrix, RankDrop, by_columns, column_changes, compete, count_digits, dots,
    linear, magnitude_sums, masked, rank_drop, ranks, thresholds,
};

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

/// Weights of one model's entries, as the documentation of [`compete`] states them.
fn weights(scores: &[f64], rank: usize) -> Vec<f64> {
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (most, least) = (sorted[0], sorted[rank - 1]);
    let weight = |&s: &f64| {
        if most > least { (s.max(least) - least) / (most - least) } else { f64::from(s >= least && s > 0.0) }
    };
    scores.iter().map(weight).collect()
}

fn competed(cases: &[Case], rank: usize, scale: f64) -> Vec<Vec<f64>> {
    let places: Vec<_> =
        cases.iter().enumerate().flat_map(|(c, case)| (0..case.base.len()).map(move |i| (c, i))).collect();
    let taus: Vec<Vec<f64>> =
        (0..MODELS).map(|k| places.iter().map(|&(c, i)| cases[c].delta(k, i)).collect()).collect();
    let all: Vec<Vec<f64>> = taus
        .iter()
        .map(|tau| {
            let sizes = tau.iter().map(|d| d.abs());
            let (least, most) = (sizes.clone().fold(f64::MAX, f64::min), sizes.clone().fold(0.0, f64::max));
            let score = |(i, size): (usize, f64)| {
                let share = if most > least { (size - least) / (most - least) } else { 0.0 };
                let total: f64 = taus.iter().map(|tau| tau[i]).sum();
                (MODELS as f64 * (share * share - 1.0)).exp() * (tau[i] * total).tanh()
            };
            weights(&sizes.enumerate().map(score).collect::<Vec<_>>(), rank)
        })
        .collect();
    let mut out: Vec<Vec<f64>> = cases.iter().map(|case| case.base.clone()).collect();
    for (i, &(c, place)) in places.iter().enumerate() {
        let below: f64 = all.iter().map(|w| w[i]).sum();
        let above: f64 = all.iter().zip(&taus).map(|(w, tau)| w[i] * tau[i]).sum();
        out[c][place] += if below > 0.0 { scale * above / below } else { 0.0 };
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn competition_equals_its_definition(a in 0_usize..1500, b in 1_usize..1500, seed in any::<u64>(), at in 0.0..1.0_f64) {
        let cases = [Case::new(a, seed), Case::new(b, seed ^ 1)];
        let slices = [cases[0].slices(), cases[1].slices()];
        let pieces = [0, 1].map(|i| Deltas::new("test", Some(&cases[i].base), &slices[i]).unwrap());
        let rank = 1 + ((a + b - 1) as f64 * at) as usize;
        let (mut first, mut second) = (vec![f64::NAN; a], vec![f64::NAN; b]);
        let bad = compete(&pieces, rank, 0.75, &mut [&mut first, &mut second], Par::threads(2)).unwrap();
        prop_assert_eq!(bad, None);
        for (out, want) in [first, second].iter().zip(competed(&cases, rank, 0.75)) {
            for (out, want) in out.iter().zip(want) {
                // Weights next to 0 beside each other magnify the roundings of scores.
                prop_assert!((out - want).abs() <= 1e-9, "{} is not {}", out, want);
            }
        }
    }

    #[test]
    fn ranks_and_drops_equal_their_definition(row in 1_usize..900, rows in 1_usize..5, seed in any::<u64>(), rescale in any::<bool>()) {
        let case = Case::new(row * rows, seed);
        let slices = case.slices();
        let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
        let how = [(0.5, 0.3), (1.0, 0.0), (0.6, 0.7)].map(|(density, epsilon)| RankDrop {
            density, epsilon, rescale: rescale.then_some(1.5), key: seed,
        });
        let mut kept = vec![f64::NAN; MODELS * row * rows];
        prop_assert_eq!(rank_drop(&deltas, row, &how, 3, &mut kept, Par::threads(2)).unwrap(), None);
        // Draws come from the other kernel that drops: what it leaves of ones at growing rates tells each draw.
        for (model, how) in how.iter().enumerate() {
            let tau: Vec<f64> = (0..row * rows).map(|i| case.delta(model, i)).collect();
            let mut found = vec![-1; tau.len()];
            ranks(&tau, row, &mut found, Par::threads(2)).unwrap();
            for (r, tau) in tau.chunks(row).enumerate() {
                let mut order: Vec<usize> = (0..row).collect();
                order.sort_by(|&a, &b| tau[a].abs().total_cmp(&tau[b].abs()));
                for (rank, &place) in order.iter().enumerate() {
                    let at = r * row + place;
                    prop_assert_eq!(found[at], rank as i64);
                    let share = if row > 1 { rank as f64 / (row - 1) as f64 - 0.5 } else { 0.0 };
                    let rate: f64 = 1.0 - how.density - how.epsilon * share;
                    let one = [1.0_f64];
                    let ones = [one.as_slice()];
                    let keep = Keep {
                        low: &[0.0], high: &[2.0], drop_rate: rate.clamp(0.0, 0.999), keys: &[seed], offset: 3 + at as u64,
                    };
                    let single = Deltas::new("test", None, &ones).unwrap();
                    let (sums, _) = magnitude_sums("test", &single, &keep, Par::threads(1)).unwrap();
                    let want = if sums[1] > 0.0 { tau[place] * how.rescale.unwrap_or(1.0 / (1.0 - rate)) } else { 0.0 };
                    let got = kept[model * row * rows + at];
                    prop_assert!((got - want).abs() <= 1e-13 * want.abs(), "{} is not {}", got, want);
                }
            }
        }
    }

    #[test]
    fn changes_of_columns_equal_their_definition(rows in 1_usize..40, columns in 1_usize..150, seed in any::<u64>(), by_row in any::<bool>()) {
        let case = Case::new(rows * columns, seed);
        let slices = case.slices();
        let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
        let matrix = Matrix { rows, columns, by_row };
        let vectors = matrix.vectors();
        let (mut sizes, mut turns) = (vec![f64::NAN; MODELS * vectors], vec![f64::NAN; MODELS * vectors]);
        prop_assert_eq!(column_changes(&deltas, matrix, &mut sizes, &mut turns, Par::threads(2)).unwrap(), None);
        let vector = |x: &[f64], v: usize| -> Vec<f64> {
            if by_row { x[v * columns..][..columns].to_vec() } else { (0..rows).map(|r| x[r * columns + v]).collect() }
        };
        let size = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
        for model in 0..MODELS {
            for v in 0..vectors {
                let (a, b) = (vector(&case.base, v), vector(&case.models[model], v));
                let (m, n) = (size(&a), size(&b));
                prop_assert!((sizes[model * vectors + v] - (m - n).abs()).abs() <= 1e-12);
                let turn: f64 = a.iter().zip(&b).map(|(a, b)| a / m.max(1e-300) - b / n.max(1e-300)).map(|d| d * d).sum();
                prop_assert!((turns[model * vectors + v] - turn).abs() <= 1e-12);
            }
        }
        let shares = numbers(MODELS * vectors, seed ^ 7);
        let mut out = vec![f64::NAN; rows * columns];
        prop_assert_eq!(by_columns(&deltas, matrix, &shares, 0.75, &mut out, Par::threads(2)).unwrap(), None);
        for (i, out) in out.iter().enumerate() {
            let v = if by_row { i / columns } else { i % columns };
            let sum: f64 = (0..MODELS).map(|k| shares[k * vectors + v] * case.delta(k, i)).sum();
            prop_assert!((out - case.base[i] - 0.75 * sum).abs() <= 1e-14);
        }
    }
}

#[test]
fn digits_are_counted_once_each_at_any_number_of_threads() {
    let case = Case::new(3_000_001, 11);
    let slices = case.slices();
    let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
    for (shift, prefixes) in [(48, [0; 3]), (32, [0x3ff0, 0x3fe8, 0x7ff0])] {
        let mut want = vec![1_i64; MODELS << 16];
        for model in 0..MODELS {
            for i in 0..case.base.len() {
                let bits = case.delta(model, i).abs().to_bits();
                if bits >> shift >> 16 == prefixes[model] {
                    want[(model << 16) + (bits >> shift & 0xffff) as usize] += 1;
                }
            }
        }
        for threads in [1, 3] {
            let mut counts = vec![1; MODELS << 16];
            count_digits(&deltas, shift, &prefixes, &mut counts, Par::threads(threads)).unwrap();
            assert!(counts == want, "shift {shift}, {threads} threads");
        }
    }
    assert!(count_digits(&deltas, 49, &[0; 3], &mut vec![0; MODELS << 16], Par::threads(1)).is_err());
}

#[test]
fn long_rows_are_ranked_as_short_ones() {
    let mut x: Vec<f32> = numbers(20_000, 5).iter().map(|&v| v as f32).collect();
    x.extend((0..20_000_u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9) & 0x7f7f_ffff)));
    let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let (mut narrow_ranks, mut wide_ranks) = (vec![-1; x.len()], vec![-1; x.len()]);
    ranks(&x, 20_000, &mut narrow_ranks, Par::threads(2)).unwrap();
    ranks(&wide, 20_000, &mut wide_ranks, Par::threads(2)).unwrap();
    for (row, found) in wide.chunks(20_000).zip(wide_ranks.chunks(20_000)) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[a].abs().total_cmp(&row[b].abs()));
        assert!(order.iter().enumerate().all(|(rank, &place)| found[place] == rank as i64));
    }
    assert_eq!(narrow_ranks, wide_ranks);
    assert!(ranks(&x, 7, &mut narrow_ranks, Par::threads(1)).is_err());
}

#[test]
fn thresholds_of_values_that_come_in_clusters() {
    // Runs of neighbours are alike, which a sample of runs must notice, and large values lie in one place.
    let n = 1_000_000;
    let model: Vec<f32> =
        (0..n).map(|i: usize| (i / 4096).wrapping_mul(2_654_435_761) as u32 as f32 + i as f32).collect();
    let slices = [model.as_slice(); 5];
    let deltas = Deltas::new("test", None, &slices).unwrap();
    let ranks = [1, n / 5, n / 2, n - 1, n];
    let (found, _) = thresholds(&[deltas], &ranks, Par::threads(2)).unwrap();
    let mut all = model.clone();
    all.sort_by(|x, y| y.total_cmp(x));
    assert_eq!(found, ranks.map(|rank| all[rank - 1]));
}

#[test]
fn the_new_kernels_have_the_same_bits_at_any_number_of_threads_and_tell_what_is_not_finite() {
    let mut case = Case::new(120_000, 2);
    let matrix = Matrix { rows: 400, columns: 300, by_row: false };
    let how = [RankDrop { density: 0.5, epsilon: 0.4, rescale: None, key: 9 }; MODELS];
    let shares = vec![0.5; MODELS * 300];
    let mut seen: Vec<Vec<f64>> = vec![];
    for threads in [1, 2, 3] {
        let slices = case.slices();
        let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
        let (mut a, mut b, mut c) = (vec![0.0; 120_000], vec![0.0; 3 * 120_000], vec![0.0; 3 * 300]);
        let (mut d, mut e) = (c.clone(), a.clone());
        let par = Par::threads(threads);
        compete(&[deltas], 30_000, 1.0, &mut [&mut a], par).unwrap();
        rank_drop(&deltas, 300, &how, 0, &mut b, par).unwrap();
        column_changes(&deltas, matrix, &mut c, &mut d, par).unwrap();
        by_columns(&deltas, matrix, &shares, 1.0, &mut e, par).unwrap();
        let all: Vec<f64> = [a, b, c, d, e].concat();
        seen.push(all);
    }
    assert!(seen[0] == seen[1] && seen[0] == seen[2]);
    case.models[1][70_000] = f64::NAN;
    let slices = case.slices();
    let deltas = Deltas::new("test", Some(&case.base), &slices).unwrap();
    let (mut a, mut b, mut c) = (vec![0.0; 120_000], vec![0.0; 3 * 120_000], vec![0.0; 3 * 300]);
    let mut d = c.clone();
    let par = Par::threads(2);
    assert_eq!(compete(&[deltas], 9, 1.0, &mut [&mut a], par).unwrap(), Some(1));
    assert_eq!(rank_drop(&deltas, 300, &how, 0, &mut b, par).unwrap(), Some(1));
    assert_eq!(column_changes(&deltas, matrix, &mut c, &mut d, par).unwrap(), Some(1));
    assert_eq!(by_columns(&deltas, matrix, &shares, 1.0, &mut a, par).unwrap(), Some(1));
}
