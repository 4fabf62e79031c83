//! Transport against naive loops in `f64`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use shiftkern_kernels::ot::{
    Dense, Inputs, Marginal, Metric, Order, Outputs, Plan, Problem, Report, Samples, SinkhornParams, Status, Weight,
    assign, half_step, solve, solve_dense,
};
use shiftkern_kernels::{KernelError, Par};

/// Numbers that look random, in [0, 1).
fn noise(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        })
        .collect()
}

fn weights(count: usize, seed: u64) -> Vec<f64> {
    let raw: Vec<f64> = noise(count, seed).iter().map(|v| v + 0.1).collect();
    let total: f64 = raw.iter().sum();
    raw.iter().map(|v| v / total).collect()
}

fn log_sum(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let peak = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if peak == f64::NEG_INFINITY { peak } else { peak + values.map(|v| (v - peak).exp()).sum::<f64>().ln() }
}

/// The iteration as it is defined, for `steps` steps.
fn naive(m: &[f64], problem: &Problem<'_>, params: &SinkhornParams, steps: usize) -> (Vec<f64>, Vec<f64>) {
    let (a, b, reg) = (problem.a, problem.b, problem.reg);
    let prox = |side: Marginal, free: f64| match side {
        Marginal::Exact => free,
        Marginal::Kl(rho) => free * rho / (rho + reg),
        Marginal::Tv(rho) => free.clamp(-rho, rho),
        Marginal::AtMost => free.min(0.0),
    };
    // Rows without weight are not there at all.
    let mut f: Vec<f64> = a.iter().map(|&a| if a > 0.0 { 0.0 } else { f64::NEG_INFINITY }).collect();
    let mut g = vec![0.0; b.len()];
    let columns = |f: &[f64], g: &mut [f64]| {
        for (j, g) in g.iter_mut().enumerate() {
            let free = -reg * log_sum(f.iter().enumerate().map(|(i, f)| (f - m[i * b.len() + j]) / reg));
            *g = prox(params.columns, free) + reg * b[j].ln();
        }
    };
    let rows = |g: &[f64], f: &mut [f64]| {
        for (i, f) in f.iter_mut().enumerate() {
            let free = -reg * log_sum(g.iter().enumerate().map(|(j, g)| (g - m[i * b.len() + j]) / reg));
            *f = prox(params.rows, free) + reg * a[i].ln();
        }
    };
    for _ in 0..steps {
        if params.order == Order::Gf {
            columns(&f, &mut g);
            rows(&g, &mut f);
        } else {
            rows(&g, &mut f);
            columns(&f, &mut g);
        }
    }
    (f, g)
}

fn plan(m: &[f64], f: &[f64], g: &[f64], reg: f64) -> Vec<f64> {
    (0..m.len()).map(|k| ((f[k / g.len()] + g[k % g.len()] - m[k]) / reg).exp()).collect()
}

fn one<T: shiftkern_kernels::simd::Transcendental>(
    m: &[T],
    problem: Problem<'_>,
    params: &SinkhornParams,
    threads: usize,
) -> Report {
    let cost = Dense::new(m, problem.a.len(), problem.b.len(), problem.b.len());
    solve(&[cost], &[problem], params, Par::threads(threads)).unwrap().remove(0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn iterates_match_their_definition(
        n in 1_usize..70, m in 1_usize..70, seed in 1_u64..1000, log_reg in -2.5_f64..1.0, steps in 1_usize..6,
        sides in 0_usize..4, gf in any::<bool>(), scaling in any::<bool>(),
    ) {
        let costs = noise(n * m, seed);
        let (mut a, b) = (weights(n, seed + 1), weights(m, seed + 2));
        if n > 2 {
            a[1] = 0.0;
        }
        let reg = 10_f64.powf(log_reg);
        let (rows, columns) = [
            (Marginal::Exact, Marginal::Exact),
            (Marginal::Kl(0.7), Marginal::Kl(0.2)),
            (Marginal::Tv(0.3), Marginal::Exact),
            (Marginal::Kl(1.0), Marginal::Tv(0.1)),
        ][sides];
        let order = if gf { Order::Gf } else { Order::Fg };
        let params = SinkhornParams { max_iter: steps, rows, columns, order, scaling, ..SinkhornParams::default() };
        let problem = Problem { a: &a, b: &b, reg, tol: 0.0, start: None };
        let (f, g) = naive(&costs, &problem, &params, steps);
        let want = plan(&costs, &f, &g, reg);
        let report = one(&costs, problem, &params, 2);
        let narrow: Vec<f32> = costs.iter().map(|&v| v as f32).collect();
        let single = one(&narrow, problem, &params, 1);
        prop_assert_eq!(report.errors.len(), steps);
        for (p, q) in plan(&costs, &report.f, &report.g, reg).iter().zip(&want) {
            prop_assert!((p - q).abs() <= 1e-11 * (1.0 / reg).max(1.0) * q.max(1e-3), "{p} instead of {q}");
        }
        for (p, q) in plan(&costs, &single.f, &single.g, reg).iter().zip(&want) {
            // Rounding of the costs and potentials, which are of order one, to u = 6e-8, over reg.
            prop_assert!((p - q).abs() <= 2e-6 * (1.0 / reg).max(1.0) * q.max(1e-3), "{p} instead of {q}");
        }
    }

    #[test]
    fn products_and_sums_match_the_plan(
        n in 1_usize..90, m in 1_usize..90, width in 1_usize..6, seed in 1_u64..1000, metric in 0_usize..3,
    ) {
        let d = 3;
        let (x, y) = (noise(n * d, seed), noise(m * d, seed + 1));
        let (f, g, v) = (noise(n, seed + 2), noise(m, seed + 3), noise(m * width, seed + 4));
        let metric = [Metric::SqEuclidean, Metric::Euclidean, Metric::Cosine][metric];
        let row = |p: &[f64], i: usize| p[i * d..][..d].to_vec();
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
        let costs: Vec<f64> = (0..n * m)
            .map(|k| {
                let (x, y) = (row(&x, k / m), row(&y, k % m));
                let square: f64 = x.iter().zip(&y).map(|(a, b)| (a - b) * (a - b)).sum();
                match metric {
                    Metric::SqEuclidean => square,
                    Metric::Euclidean => square.sqrt(),
                    Metric::Cosine => 1.0 - dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt(),
                }
            })
            .collect();
        let reg = 0.5;
        let want = plan(&costs, &f, &g, reg);
        let close = |got: f64, want: f64| (got - want).abs() <= 1e-10 * want.abs().max(1.0);
        let samples = Samples::new(&x, &y, d, metric, Par::threads(1)).unwrap();
        let dense = Dense::new(&costs, n, m, m);
        let (by_points, by_matrix) = (Plan::new(&samples, &f, &g, reg), Plan::new(&dense, &f, &g, reg));
        let (mut rows, mut columns) = (vec![0.0; n], vec![0.0; m]);
        let mut totals = vec![by_points.sums(&mut rows, &mut columns, Par::threads(2)).unwrap()];
        for (i, row) in rows.iter().enumerate() {
            prop_assert!(close(*row, want[i * m..][..m].iter().sum()));
        }
        totals.push(by_matrix.sums(&mut rows, &mut columns, Par::threads(2)).unwrap());
        for (j, column) in columns.iter().enumerate() {
            prop_assert!(close(*column, (0..n).map(|i| want[i * m + j]).sum()));
        }
        for total in totals {
            prop_assert!(close(total, want.iter().zip(&costs).map(|(p, c)| p * c).sum()));
        }
        let mut out = vec![0.0; n * width];
        by_points.apply(Weight::Plan, &v, width, &mut out, Par::threads(2)).unwrap();
        for (k, got) in out.iter().enumerate() {
            prop_assert!(close(*got, (0..m).map(|j| want[k / width * m + j] * v[j * width + k % width]).sum()));
        }
        by_points.apply(Weight::PlanPerCost, &v, width, &mut out, Par::threads(1)).unwrap();
        for (k, got) in out.iter().enumerate() {
            let exact: f64 =
                (0..m).map(|j| want[k / width * m + j] / costs[k / width * m + j] * v[j * width + k % width]).sum();
            prop_assert!((got - exact).abs() <= 1e-6 * exact.abs().max(1.0), "{got} instead of {exact}");
        }
        let (v, mut out) = (noise(n * width, seed + 5), vec![0.0; m * width]);
        by_matrix.apply_transposed(&v, width, &mut out, Par::threads(2)).unwrap();
        for (k, got) in out.iter().enumerate() {
            prop_assert!(close(*got, (0..n).map(|i| want[i * m + k / width] * v[i * width + k % width]).sum()));
        }
        let mut whole = vec![0.0; n * m];
        by_matrix.dense(&costs, &mut whole, Par::threads(2)).unwrap();
        prop_assert!(whole.iter().zip(&want).all(|(p, q)| close(*p, *q)));
        let threshold = whole[whole.len() / 2];
        let mut counts = vec![0; n];
        by_matrix.count_above(threshold, &mut counts, Par::threads(2)).unwrap();
        let mut starts = vec![0];
        for count in &counts {
            starts.push(starts[starts.len() - 1] + count);
        }
        let entries = starts[n] as usize;
        let (mut places, mut values) = (vec![0; entries], vec![0.0; entries]);
        by_matrix.collect_above(threshold, &starts, &mut places, &mut values, Par::threads(2)).unwrap();
        let above: Vec<(i64, f64)> =
            (0..n * m).filter(|&k| whole[k] > threshold).map(|k| ((k % m) as i64, whole[k])).collect();
        prop_assert_eq!(places.into_iter().zip(values).collect::<Vec<_>>(), above);
    }
}

#[test]
fn tiny_regularisation_and_lost_columns_are_right() {
    // Clusters so far apart that the first pass gives the columns of the second nothing at all.
    let (n, m) = (40, 300);
    let x: Vec<f64> = (0..n).map(|i| if i < 20 { 0.0 } else { 50.0 } + 0.01 * i as f64).collect();
    let y: Vec<f64> = (0..m).map(|j| if j < 290 { 0.0 } else { 50.0 } + 0.001 * j as f64).collect();
    let costs: Vec<f64> = (0..n * m).map(|k| (x[k / m] - y[k % m]).powi(2)).collect();
    let (a, b) = (weights(n, 1), weights(m, 2));
    for scaling in [false, true] {
        let params = SinkhornParams { max_iter: 4, scaling, ..SinkhornParams::default() };
        let problem = Problem { a: &a, b: &b, reg: 0.05, tol: 0.0, start: None };
        let (f, g) = naive(&costs, &problem, &params, 4);
        let report = one(&costs, problem, &params, 2);
        for (got, want) in report.f.iter().zip(&f).chain(report.g.iter().zip(&g)) {
            assert!((got - want).abs() <= 1e-9 * want.abs().max(1.0), "{got} instead of {want}");
        }
    }
}

#[test]
fn partial_transport_moves_what_it_should() {
    let (n, m, mass) = (12, 9, 0.6);
    let costs = noise(n * m, 3);
    let (a, b) = (weights(n, 4), weights(m, 5));
    let side = Marginal::AtMost;
    let params =
        SinkhornParams { rows: side, columns: side, mass: Some(mass), max_iter: 5000, ..SinkhornParams::default() };
    let report = one(&costs, Problem { a: &a, b: &b, reg: 0.02, tol: 1e-12, start: None }, &params, 1);
    assert_eq!(report.status, Status::Converged);
    let p = plan(&costs, &report.f, &report.g, 0.02);
    assert!((p.iter().sum::<f64>() - mass).abs() < 1e-11);
    assert!((0..n).all(|i| p[i * m..][..m].iter().sum::<f64>() <= a[i] + 1e-11));
    assert!((0..m).all(|j| (0..n).map(|i| p[i * m + j]).sum::<f64>() <= b[j] + 1e-11));
}

#[test]
fn batches_and_threads_do_not_change_a_bit() {
    let (batch, n, m) = (7, 33, 130);
    let costs = noise(batch * n * m, 6);
    let a: Vec<f64> = (0..batch).flat_map(|p| weights(n, p as u64)).collect();
    let b: Vec<f64> = (0..batch).flat_map(|p| weights(m, p as u64 + 50)).collect();
    let reg: Vec<f64> = (0..batch).map(|p| 0.02 * (p + 1) as f64).collect();
    let tol = vec![1e-6; batch];
    let params = SinkhornParams { max_iter: 300, ..SinkhornParams::default() };
    let run = |threads: usize| {
        let (mut f, mut g, mut shift) = (vec![0.0; batch * n], vec![0.0; batch * m], vec![0.0; batch]);
        let (mut errors, mut report) = (vec![0.0; batch * 300], vec![0; 2 * batch]);
        let inputs = Inputs { a: &a, b: &b, reg: &reg, tol: &tol, start: None };
        let mut out = Outputs { f: &mut f, g: &mut g, shift: &mut shift, errors: &mut errors, report: &mut report };
        solve_dense(&costs, m, &inputs, &params, &mut out, Par::threads(threads)).unwrap();
        (f, g, report)
    };
    let (f, g, report) = run(1);
    assert!((0..batch).all(|p| report[2 * p + 1] == 0));
    for threads in [2, 3, 5] {
        assert_eq!(run(threads), (f.clone(), g.clone(), report.clone()));
    }
    for p in 0..batch {
        let problem = Problem { a: &a[p * n..][..n], b: &b[p * m..][..m], reg: reg[p], tol: 1e-6, start: None };
        let alone = one(&costs[p * n * m..][..n * m], problem, &params, 2);
        assert_eq!((&alone.f[..], &alone.g[..]), (&f[p * n..][..n], &g[p * m..][..m]));
    }
}

#[test]
fn half_steps_make_a_whole_one() {
    let (n, m, reg) = (30, 20, 0.1);
    let costs = noise(n * m, 8);
    let (a, b) = (weights(n, 9), weights(m, 10));
    let params = SinkhornParams { max_iter: 1, ..SinkhornParams::default() };
    let problem = Problem { a: &a, b: &b, reg, tol: 0.0, start: None };
    let whole = one(&costs, problem, &params, 1);
    let zero = (vec![0.0; n], vec![0.0; m]);
    let cost = Dense::new(&costs, n, m, m);
    let start = Problem { start: Some((&zero.0, &zero.1)), ..problem };
    let (f, logs) = half_step::<f64, _>(&cost, start, Par::threads(1)).unwrap();
    assert!(f.iter().zip(&whole.f).all(|(x, y)| (x - y).abs() < 1e-12));
    assert!(logs.iter().zip(&whole.g).zip(&b).all(|((log, g), b)| (reg * b.ln() - log - g).abs() < 1e-12));
}

#[test]
fn assignments_match_the_published_loop_for_scores_of_any_size() {
    for scale in [1.0, 500.0] {
        let (n, k, reg, rounds) = (37, 21, 0.05, 3);
        let scores: Vec<f64> = noise(n * k, 11).iter().map(|v| (2.0 * v - 1.0) * scale).collect();
        let mut z: Vec<f64> = scores.iter().map(|v| v / reg).collect();
        for _ in 0..rounds {
            for j in 0..k {
                let log = log_sum((0..n).map(|i| z[i * k + j]));
                (0..n).for_each(|i| z[i * k + j] -= log);
            }
            for i in 0..n {
                let log = log_sum(z[i * k..][..k].iter().copied());
                (0..k).for_each(|j| z[i * k + j] -= log);
            }
        }
        let mut out = vec![0.0; n * k];
        assign(&scores, n, reg, rounds, &mut out, Par::threads(2)).unwrap();
        assert!(out.iter().zip(&z).all(|(p, z)| (p - z.exp()).abs() < 1e-9), "at scale {scale}");
    }
}

#[test]
fn what_cannot_be_solved_is_refused() {
    let half = [0.5, 0.5];
    let problem = Problem { a: &half, b: &half, reg: 0.1, tol: 1e-6, start: None };
    let params = SinkhornParams::default();
    let attempt = |m: [f64; 4]| {
        let cost = Dense::new(&m, 2, 2, 2);
        cost.check("sinkhorn", "M", 10.0, Par::threads(1))?;
        solve(&[cost], &[problem], &params, Par::threads(1)).map(|reports| reports[0].status)
    };
    let infinity = f64::INFINITY;
    for m in [
        [f64::NAN, 1.0, 1.0, 1.0],
        [-infinity, 1.0, 1.0, 1.0],
        [infinity, infinity, 1.0, 1.0],
        [infinity, 1.0, infinity, 1.0],
    ] {
        assert!(matches!(attempt(m), Err(KernelError::Argument { argument: "M", .. })), "{m:?}");
    }
    assert_eq!(attempt([0.0, infinity, infinity, 0.0]), Ok(Status::Converged));
    let narrow = [1e38_f32; 4];
    assert!(Dense::new(&narrow, 2, 2, 2).check("sinkhorn", "M", 1e3, Par::threads(1)).is_err());
}
