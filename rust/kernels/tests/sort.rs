//! Soft ranks, soft sorted values and relaxed sorting networks against their definitions in `f64`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use shiftkern_kernels::sort::{
    Distribution, Network, NetworkSortParams, Regularization, SoftOrder, SoftOrderParams, network_sort,
    network_sort_backward, soft_order, soft_order_backward,
};
use shiftkern_kernels::{KernelError, Par};

fn numbers(len: usize, seed: u64, spread: f64) -> Vec<f64> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            spread * ((state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5)
        })
        .collect()
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let peak = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    peak + x.iter().map(|v| (v - peak).exp()).sum::<f64>().ln()
}

/// The decreasing regression of `y` against `w` by its minimax formula, each mean over its own range.
fn regression(y: &[f64], w: &[f64], regularization: Regularization) -> Vec<f64> {
    let n = y.len();
    let pooled = |j: usize, k: usize| match regularization {
        Regularization::L2 => (j..=k).map(|i| y[i] - w[i]).sum::<f64>() / (k - j + 1) as f64,
        Regularization::Kl => log_sum_exp(&y[j..=k]) - log_sum_exp(&w[j..=k]),
    };
    (0..n)
        .map(|i| (0..=i).map(|j| (i..n).map(|k| pooled(j, k)).fold(f64::MIN, f64::max)).fold(f64::MAX, f64::min))
        .collect()
}

fn naive_order(x: &[f64], params: &SoftOrderParams) -> Vec<f64> {
    let n = x.len();
    let ranks = params.order == SoftOrder::Rank;
    let kl = params.regularization == Regularization::Kl;
    let sign = if ranks == params.descending { -1.0 } else { 1.0 };
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| (sign * x[j]).total_cmp(&(sign * x[i])));
    let w: Vec<f64> = (0..n).map(|i| (n - i) as f64).collect();
    if ranks {
        let z: Vec<f64> = order.iter().map(|&i| sign * x[i] / params.strength).collect();
        let w: Vec<f64> = if kl { w.iter().map(|w| w.ln()).collect() } else { w };
        let v = regression(&z, &w, params.regularization);
        let mut out = vec![0.0; n];
        for (place, &i) in order.iter().enumerate() {
            let projected = z[place] - v[place];
            out[i] = if kl { projected.exp() } else { projected };
        }
        return out;
    }
    let s: Vec<f64> = order.iter().map(|&i| sign * x[i]).collect();
    let z: Vec<f64> = w.iter().map(|w| w / params.strength).collect();
    let v = regression(&z, &s, params.regularization);
    z.iter().zip(v).map(|(z, v)| sign * (z - v)).collect()
}

fn run_order(x: &[f64], n: usize, params: &SoftOrderParams, threads: usize) -> (Vec<f64>, Vec<i64>, Vec<i64>) {
    let (mut y, mut order, mut first) = (vec![9.0; x.len()], vec![0; x.len()], vec![0; x.len()]);
    soft_order(x, n, params, &mut y, &mut order, &mut first, Par::threads(threads)).unwrap();
    (y, order, first)
}

fn order_params() -> impl Strategy<Value = SoftOrderParams> {
    (any::<bool>(), any::<bool>(), -3.0_f64..3.0, any::<bool>()).prop_map(|(ranks, kl, power, descending)| {
        SoftOrderParams {
            order: if ranks { SoftOrder::Rank } else { SoftOrder::Sort },
            regularization: if kl { Regularization::Kl } else { Regularization::L2 },
            strength: 10.0_f64.powf(power),
            descending,
        }
    })
}

/// The network as published: pairs by wire, on a power of two of wires.
fn published(n: usize, bitonic: bool) -> Vec<Vec<(usize, usize)>> {
    if !bitonic {
        return (0..n).map(|stage| (stage % 2..n - 1).step_by(2).map(|i| (i, i + 1)).collect()).collect();
    }
    let (wires, mut stages, mut size) = (n.next_power_of_two(), Vec::new(), 2);
    while size <= wires {
        let mut distance = size / 2;
        while distance > 0 {
            let low = (0..wires).filter(|i| (i / distance).is_multiple_of(2));
            let directed = |i: usize| if (i / size).is_multiple_of(2) { (i, i + distance) } else { (i + distance, i) };
            stages.push(low.map(directed).collect());
            distance /= 2;
        }
        size *= 2;
    }
    stages
}

fn cumulative(v: f64, distribution: Distribution) -> f64 {
    match distribution {
        Distribution::Cauchy => v.atan() / std::f64::consts::PI + 0.5,
        Distribution::Reciprocal => 0.5 * (v / (2.0 + v.abs()) + 1.0),
        Distribution::Optimal if v.abs() <= 0.25 => v + 0.5,
        Distribution::Optimal => {
            let tail = 1.0 / (16.0 * v.abs());
            if v > 0.0 { 1.0 - tail } else { tail }
        }
        Distribution::Logistic => 1.0 / (1.0 + (-v).exp()),
    }
}

/// What fills up to a power of two.
const FILL: f64 = 1e40;

/// Values and matrix, comparator by comparator; those that meet a filling value are exact.
fn naive_network(x: &[f64], bitonic: bool, params: &NetworkSortParams) -> (Vec<f64>, Vec<f64>) {
    let n = x.len();
    let wires = if bitonic { n.next_power_of_two() } else { n };
    let mut values = x.to_vec();
    values.resize(wires, FILL);
    let mut p = vec![vec![0.0; wires]; wires];
    (0..wires).for_each(|i| p[i][i] = 1.0);
    for (a, b) in published(n, bitonic).concat() {
        let (low, high) = (values[a], values[b]);
        let mut alpha = cumulative(params.steepness * (high - low), params.distribution);
        if params.error_free || low.max(high) == FILL {
            alpha = if low <= high { 1.0 } else { 0.0 };
        }
        values[a] = alpha * low + (1.0 - alpha) * high;
        values[b] = (1.0 - alpha) * low + alpha * high;
        let mix = |alpha: f64| -> Vec<f64> {
            p[a].iter().zip(&p[b]).map(|(low, high)| alpha * low + (1.0 - alpha) * high).collect()
        };
        (p[a], p[b]) = (mix(alpha), mix(1.0 - alpha));
    }
    (values[..n].to_vec(), p[..n].iter().flat_map(|row| row[..n].to_vec()).collect())
}

fn network(n: usize, bitonic: bool) -> Network {
    if bitonic { Network::bitonic(n) } else { Network::odd_even(n) }
}

fn network_params() -> impl Strategy<Value = NetworkSortParams> {
    let distribution = prop_oneof![
        Just(Distribution::Cauchy),
        Just(Distribution::Reciprocal),
        Just(Distribution::Optimal),
        Just(Distribution::Logistic)
    ];
    (distribution, 0.1_f64..30.0, any::<bool>()).prop_map(|(distribution, steepness, error_free)| NetworkSortParams {
        distribution,
        steepness,
        error_free,
    })
}

fn run_network(x: &[f64], network: &Network, params: &NetworkSortParams, threads: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut sorted, mut p) = (vec![9.0; x.len()], vec![9.0; x.len() * network.rows()]);
    network_sort(x, network, params, &mut sorted, &mut p, Par::threads(threads)).unwrap();
    (sorted, p)
}

fn assert_close(got: &[f64], want: &[f64], bound: f64) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= bound * (1.0 + want.abs()), "{i}: {got} is not {want}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, rng_seed: RngSeed::Fixed(8), ..ProptestConfig::default() })]

    #[test]
    fn soft_order_is_the_projection(n in 1_usize..40, seed in any::<u64>(), params in order_params(), ties in any::<bool>()) {
        let mut x = numbers(2 * n, seed, 6.0);
        if ties {
            x = x.into_iter().map(f64::round).collect();
        }
        let (y, order, first) = run_order(&x, n, &params, 2);
        for (y, x) in y.chunks(n).zip(x.chunks(n)) {
            // The oracle subtracts numbers of the size of n / strength or x / strength.
            let size = 1.0 + (n as f64 + 6.0) / params.strength;
            assert_close(y, &naive_order(x, &params), 1e-13 * size);
        }
        let narrow: Vec<f32> = x.iter().map(|&v| v as f32).collect();
        let widened: Vec<f64> = narrow.iter().map(|&v| f64::from(v)).collect();
        let mut got = vec![0.0_f32; narrow.len()];
        soft_order(&narrow, n, &params, &mut got, &mut order.clone(), &mut first.clone(), Par::threads(1)).unwrap();
        let want: Vec<f32> = run_order(&widened, n, &params, 1).0.iter().map(|&v| v as f32).collect();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn soft_order_has_its_gradient(n in 1_usize..12, seed in any::<u64>(), mut params in order_params()) {
        params.strength = params.strength.clamp(0.1, 10.0);
        let (x, g) = (numbers(n, seed, 6.0), numbers(n, seed ^ 9, 2.0));
        let (_, order, first) = run_order(&x, n, &params, 1);
        let mut grad = vec![0.0; n];
        soft_order_backward(&g, &x, &order, &first, n, &params, &mut grad, Par::threads(1)).unwrap();
        let h = 1e-6;
        for i in 0..n {
            let value = |by: f64| {
                let mut moved = x.clone();
                moved[i] += by;
                let (y, moved_order, moved_first) = run_order(&moved, n, &params, 1);
                (y.iter().zip(&g).map(|(y, g)| y * g).sum::<f64>(), moved_order == order && moved_first == first)
            };
            let ((up, same_up), (down, same_down)) = (value(h), value(-h));
            // Where pools change within the step there is no difference quotient to compare with.
            if same_up && same_down {
                prop_assert!(((up - down) / (2.0 * h) - grad[i]).abs() < 1e-6 * (1.0 + grad[i].abs()));
            }
        }
    }

    #[test]
    fn a_network_is_the_published_one(n in 1_usize..40, bitonic in any::<bool>(), seed in any::<u64>(), params in network_params()) {
        let x = numbers(2 * n, seed, 3.0);
        let (sorted, p) = run_network(&x, &network(n, bitonic), &params, 2);
        for ((sorted, p), x) in sorted.chunks(n).zip(p.chunks(n * n)).zip(x.chunks(n)) {
            let (want, want_p) = naive_network(x, bitonic, &params);
            assert_close(sorted, &want, 1e-11);
            assert_close(p, &want_p, 1e-11);
            if params.error_free {
                prop_assert!(sorted.is_sorted());
            }
        }
    }

    #[test]
    fn a_network_has_its_gradient(n in 1_usize..20, bitonic in any::<bool>(), seed in any::<u64>(), mut params in network_params()) {
        params.error_free = false;
        params.steepness = params.steepness.min(5.0);
        let network = network(n, bitonic);
        let (x, g, g_p) = (numbers(n, seed, 3.0), numbers(n, seed ^ 5, 2.0), numbers(n * n, seed ^ 7, 2.0));
        let value = |x: &[f64]| {
            let (sorted, p) = run_network(x, &network, &params, 1);
            sorted.iter().zip(&g).chain(p.iter().zip(&g_p)).map(|(y, g)| y * g).sum::<f64>()
        };
        let mut grad = vec![0.0; n];
        network_sort_backward(&g, Some(&g_p), &x, &network, &params, &mut grad, Par::threads(1)).unwrap();
        let h = 1e-6;
        for i in 0..n {
            let (mut up, mut down) = (x.clone(), x.clone());
            up[i] += h;
            down[i] -= h;
            let quotient = (value(&up) - value(&down)) / (2.0 * h);
            // "optimal" has kinks in its derivative.
            prop_assert!((quotient - grad[i]).abs() < 1e-4 * (1.0 + grad[i].abs()), "{quotient} is not {}", grad[i]);
        }
    }

    #[test]
    fn without_a_gradient_of_the_matrix_it_counts_as_zero(n in 1_usize..20, seed in any::<u64>(), params in network_params()) {
        let network = Network::odd_even(n);
        let (x, g) = (numbers(n, seed, 3.0), numbers(n, seed ^ 5, 2.0));
        let (mut without, mut zero) = (vec![0.0; n], vec![0.0; n]);
        network_sort_backward(&g, None, &x, &network, &params, &mut without, Par::threads(1)).unwrap();
        network_sort_backward(&g, Some(&vec![0.0; n * n]), &x, &network, &params, &mut zero, Par::threads(1)).unwrap();
        prop_assert_eq!(without, zero);
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let x = numbers(60 * 50, 3, 4.0);
    let params = SoftOrderParams {
        order: SoftOrder::Rank,
        regularization: Regularization::Kl,
        strength: 0.3,
        descending: false,
    };
    let relaxed = NetworkSortParams { distribution: Distribution::Cauchy, steepness: 10.0, error_free: false };
    let network = Network::odd_even(50);
    for threads in [2, 3] {
        assert_eq!(run_order(&x, 50, &params, 1), run_order(&x, 50, &params, threads));
        assert_eq!(run_network(&x, &network, &relaxed, 1), run_network(&x, &network, &relaxed, threads));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let relaxed = NetworkSortParams { distribution: Distribution::Cauchy, steepness: 1.0, error_free: false };
    let network = Network::bitonic(3);
    let mut out = vec![0.0; 27];
    for (x, params) in [
        (vec![0.0; 4], relaxed),
        (vec![f64::NAN; 3], relaxed),
        (vec![0.0; 3], NetworkSortParams { steepness: 0.0, ..relaxed }),
    ] {
        let (sorted, p) = out.split_at_mut(x.len());
        let refused = network_sort(&x, &network, &params, sorted, &mut p[..9], Par::threads(1));
        assert!(matches!(refused, Err(KernelError::Argument { .. })));
    }
    let params = SoftOrderParams {
        order: SoftOrder::Sort,
        regularization: Regularization::L2,
        strength: 1.0,
        descending: false,
    };
    let (mut y, mut order, mut first) = (vec![0.0; 4], vec![0; 4], vec![0; 4]);
    for (x, n, params) in [
        (vec![0.0; 4], 3, params),
        (vec![0.0; 4], 0, params),
        (vec![f64::INFINITY; 4], 4, params),
        (vec![0.0; 4], 4, SoftOrderParams { strength: -1.0, ..params }),
    ] {
        let refused = soft_order(&x, n, &params, &mut y, &mut order, &mut first, Par::threads(1));
        assert!(matches!(refused, Err(KernelError::Argument { .. })));
    }
    let refused = soft_order_backward(&y, &y, &[0, 1, 2, 4], &first, 4, &params, &mut [0.0; 4], Par::threads(1));
    assert!(matches!(refused, Err(KernelError::Argument { .. })));
}
