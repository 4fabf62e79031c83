//! Sorting networks whose comparators mix their inputs instead of swapping them (Petersen et al., 2022).
//!
//! A comparator with `alpha = f(steepness (b - a))` outputs `alpha a + (1 - alpha) b` and `(1 - alpha) a + alpha b`. It
//! is a 2 x 2 matrix, so the rows of the relaxed permutation matrix are mixed like the values, two at a time. Columns
//! of that matrix never meet: a block of them runs through the whole network inside the first-level cache.

use crate::exec::for_each_chunk;
use crate::simd::{Real, Transcendental, Vectorized, dispatch};
use crate::{KernelError, Par};

/// The monotone function of a comparator, from 0 to 1, by the distribution it is the cumulative function of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// `atan(v) / pi + 1/2`.
    Cauchy,
    /// `(v / (2 + |v|) + 1) / 2`.
    Reciprocal,
    /// `v + 1/2` up to `|v| = 1/4`, then `1 - 1 / (16 v)` and `-1 / (16 v)`.
    Optimal,
    /// `1 / (1 + exp(-v))`.
    Logistic,
}

/// A sorting network as a list of comparators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Rows that a comparator takes its smaller and its larger output to.
    pairs: Vec<(u32, u32)>,
    /// Where each stage ends in `pairs`; within a stage no row appears twice.
    ends: Vec<usize>,
    /// The row in which each place of the order ends up.
    places: Vec<u32>,
}

impl Network {
    /// `n` stages of neighbours, in turn from the first and from the second row on.
    pub fn odd_even(n: usize) -> Self {
        let (mut pairs, mut ends) = (Vec::new(), Vec::new());
        for stage in 0..n {
            pairs.extend((stage % 2..n.saturating_sub(1)).step_by(2).map(|i| (i as u32, i as u32 + 1)));
            ends.push(pairs.len());
        }
        Self { pairs, ends, places: (0..n as u32).collect() }
    }

    /// Batcher's bitonic network.
    ///
    /// Where `n` is no power of two it is the network of the next one with infinities behind the values: a comparator
    /// that meets one moves the other value, for certain, which comes to renaming rows.
    pub fn bitonic(n: usize) -> Self {
        let wires = n.next_power_of_two();
        let mut row: Vec<Option<u32>> = (0..wires).map(|i| (i < n).then_some(i as u32)).collect();
        let (mut pairs, mut ends) = (Vec::new(), Vec::new());
        for block in 1..=wires.ilog2() {
            for distance in (0..block).rev().map(|bit| 1 << bit) {
                for i in (0..wires).filter(|i| i & distance == 0) {
                    let rising = i >> block & 1 == 0;
                    let (low, high) = if rising { (i, i + distance) } else { (i + distance, i) };
                    match (row[low], row[high]) {
                        (Some(a), Some(b)) => pairs.push((a, b)),
                        (None, Some(_)) => row.swap(low, high),
                        _ => {}
                    }
                }
                ends.push(pairs.len());
            }
        }
        Self { pairs, ends, places: row.into_iter().flatten().collect() }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.places.len()
    }

    fn stages(&self) -> impl DoubleEndedIterator<Item = std::ops::Range<usize>> {
        self.ends.iter().enumerate().map(|(i, &end)| (if i == 0 { 0 } else { self.ends[i - 1] })..end)
    }
}

/// Options of [`network_sort`].
#[derive(Clone, Copy, Debug)]
pub struct NetworkSortParams {
    /// Shape of the comparators.
    pub distribution: Distribution,
    /// Factor of the difference inside the comparators.
    pub steepness: f64,
    /// Whether the outputs are those of exact comparators; gradients are those of the relaxed ones either way.
    pub error_free: bool,
}

impl NetworkSortParams {
    /// What a comparator's function is taken of; finite, as a quotient of infinities would be NaN.
    #[inline(always)]
    fn argument(&self, difference: f64) -> f64 {
        (difference * self.steepness).clamp(f64::MIN, f64::MAX)
    }
}

const OP: &str = "diffsort";

/// Refuses what is not finite.
pub(super) fn check_finite<T: Real>(op: &'static str, x: &[T]) -> Result<(), KernelError> {
    match x.iter().find(|v| !v.to_f64().is_finite()) {
        Some(v) => Err(KernelError::argument(op, "x", "finite values", v.to_f64().to_string())),
        None => Ok(()),
    }
}

/// `atan(v)` to 4 ulp, branch-free.
#[inline(always)]
fn atan<const FMA: bool>(v: f64) -> f64 {
    const TAN_PI_8: f64 = 0.414_213_562_373_095_03;
    let size = v.abs();
    let inverted = if size > 1.0 { 1.0 / size } else { size };
    let turned = inverted > TAN_PI_8;
    // atan(t) = pi / 4 + atan((t - 1) / (t + 1)): what is left lies within tan(pi / 8).
    let t = if turned { (inverted - 1.0) / (inverted + 1.0) } else { inverted };
    let z = -(t * t);
    // The series to t^43: what is left out is below 1e-18 of it.
    let mut series = 1.0 / 43.0;
    for k in (1..21).rev() {
        series = series.mul_add_if::<FMA>(z, 1.0 / f64::from(2 * k + 1));
    }
    let small = (series * z).mul_add_if::<FMA>(t, t);
    let angle = if turned { std::f64::consts::FRAC_PI_4 + small } else { small };
    let angle = if size > 1.0 { std::f64::consts::FRAC_PI_2 - angle } else { angle };
    angle.copysign(v)
}

impl Distribution {
    /// The function's values into `alpha`.
    #[inline(always)]
    fn cumulative<const FMA: bool>(self, v: &[f64], alpha: &mut [f64]) {
        let pairs = alpha.iter_mut().zip(v);
        match self {
            Self::Cauchy => pairs.for_each(|(a, &v)| *a = atan::<FMA>(v) * std::f64::consts::FRAC_1_PI + 0.5),
            Self::Reciprocal => pairs.for_each(|(a, &v)| *a = 0.5 * (v / (2.0 + v.abs()) + 1.0)),
            Self::Optimal => pairs.for_each(|(a, &v)| {
                let tail = 0.0625 / v;
                *a = if v > 0.25 {
                    1.0 - tail
                } else if v < -0.25 {
                    -tail
                } else {
                    v + 0.5
                };
            }),
            Self::Logistic => pairs.for_each(|(a, &v)| *a = 1.0 / (1.0 + (-v).exp_lane::<FMA>())),
        }
    }

    /// Its derivative at `v`, where its value is `alpha`.
    #[inline(always)]
    fn density(self, v: f64, alpha: f64) -> f64 {
        match self {
            Self::Cauchy => std::f64::consts::FRAC_1_PI / (1.0 + v * v),
            Self::Reciprocal => 1.0 / ((2.0 + v.abs()) * (2.0 + v.abs())),
            Self::Optimal => {
                if v.abs() > 0.25 {
                    0.0625 / (v * v)
                } else {
                    1.0
                }
            }
            Self::Logistic => alpha * (1.0 - alpha),
        }
    }
}

/// What the values of one problem do in the network.
#[derive(Default)]
struct Trace<R> {
    /// `b - a` of each comparator.
    difference: Vec<f64>,
    /// Its `alpha`.
    alpha: Vec<f64>,
    /// `(alpha, 1 - alpha)` of the outputs, which error-free comparators have exact.
    applied: Vec<[R; 2]>,
    /// The values, by row.
    values: Vec<f64>,
    /// Arguments of a stage's comparators.
    scaled: Vec<f64>,
}

impl<R: Real> Trace<R> {
    #[inline(always)]
    fn run<const FMA: bool>(&mut self, x: &[R], network: &Network, params: &NetworkSortParams) {
        let comparators = network.pairs.len();
        self.difference.resize(comparators, 0.0);
        self.alpha.resize(comparators, 0.0);
        self.applied.resize(comparators, [R::default(); 2]);
        self.values.clear();
        self.values.extend(x.iter().map(|v| v.to_f64()));
        for stage in network.stages() {
            let pairs = &network.pairs[stage.clone()];
            let difference = &mut self.difference[stage.clone()];
            for (difference, &(a, b)) in difference.iter_mut().zip(pairs) {
                *difference = self.values[b as usize] - self.values[a as usize];
            }
            self.scaled.clear();
            self.scaled.extend(difference.iter().map(|&d| params.argument(d)));
            let alpha = &mut self.alpha[stage.clone()];
            params.distribution.cumulative::<FMA>(&self.scaled, alpha);
            let applied = self.applied[stage].iter_mut();
            for (((applied, alpha), difference), &(a, b)) in applied.zip(alpha).zip(difference).zip(pairs) {
                let exact = if *difference >= 0.0 { 1.0 } else { 0.0 };
                let first = if params.error_free { exact } else { *alpha };
                *applied = [R::from_f64(first), R::from_f64(1.0 - first)];
                let (low, high) = (self.values[a as usize], self.values[b as usize]);
                self.values[a as usize] = first * low + (1.0 - first) * high;
                self.values[b as usize] = (1.0 - first) * low + first * high;
            }
        }
    }
}

/// Columns of the matrix that run through the network together.
const LANES: usize = 16;
/// One row of such a block.
type Lane<R> = [R; LANES];

/// The comparators' rows: `(alpha a + (1 - alpha) b, (1 - alpha) a + alpha b)`.
#[inline(always)]
fn mix<R: Real, const FMA: bool>(a: &Lane<R>, b: &Lane<R>, [alpha, rest]: [R; 2]) -> (Lane<R>, Lane<R>) {
    let (mut low, mut high) = ([R::default(); LANES], [R::default(); LANES]);
    for lane in 0..LANES {
        low[lane] = alpha.mul_add_if::<FMA>(a[lane], rest * b[lane]);
        high[lane] = rest.mul_add_if::<FMA>(a[lane], alpha * b[lane]);
    }
    (low, high)
}

/// The columns of the identity that begin at `column`.
#[inline(always)]
fn identity<R: Real>(state: &mut [Lane<R>], column: usize) {
    state.fill([R::default(); LANES]);
    for (lane, row) in state[column..].iter_mut().take(LANES).enumerate() {
        row[lane] = R::from_f64(1.0);
    }
}

/// Sorts every row of `x (batch, n)`, ascending, into `sorted`, with the matrix that does so in `p (batch, n, n)`:
/// `sorted = p x`, and the rows and columns of `p` sum to 1.
///
/// Values are `f64` inside and rounded once; an entry of `p` carries at most two roundings per stage, relative to its
/// own size, because nothing is ever subtracted. Takes O(comparators * n) per problem.
pub fn network_sort<T: Real>(
    x: &[T],
    network: &Network,
    params: &NetworkSortParams,
    sorted: &mut [T],
    p: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    let n = check(x, network, params)?;
    KernelError::check_len(OP, "sorted", x.len(), sorted.len())?;
    KernelError::check_len(OP, "p", x.len() * n, p.len())?;
    let mut problems: Vec<(&mut [T], &mut [T])> = sorted.chunks_exact_mut(n).zip(p.chunks_exact_mut(n * n)).collect();
    let cost = cost(x, network);
    for_each_chunk(par, &mut problems, 1, cost, |block, problem| {
        for (sorted, p) in problem {
            dispatch(Forward { x: &x[block * n..][..n], network, params, sorted, p });
        }
    })
}

fn check<T: Real>(x: &[T], network: &Network, params: &NetworkSortParams) -> Result<usize, KernelError> {
    let n = network.rows();
    if n == 0 || !x.len().is_multiple_of(n) {
        return Err(KernelError::argument(OP, "x", format!("rows of {n} values, at least one"), x.len().to_string()));
    }
    if !(params.steepness > 0.0 && params.steepness.is_finite()) {
        return Err(KernelError::argument(OP, "steepness", "a finite number > 0", params.steepness.to_string()));
    }
    check_finite(OP, x)?;
    Ok(n)
}

/// Estimated nanoseconds of the forward pass.
fn cost<T>(x: &[T], network: &Network) -> f64 {
    let (n, comparators) = (network.rows() as f64, network.pairs.len() as f64);
    x.len() as f64 / n * comparators * (5.0 + 0.1 * n)
}

struct Forward<'a, T> {
    x: &'a [T],
    network: &'a Network,
    params: &'a NetworkSortParams,
    sorted: &'a mut [T],
    p: &'a mut [T],
}

impl<T: Real> Vectorized for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { x, network, params, sorted, p } = self;
        let n = x.len();
        let mut trace = Trace::default();
        trace.run::<FMA>(x, network, params);
        for (sorted, &row) in sorted.iter_mut().zip(&network.places) {
            *sorted = T::from_f64(trace.values[row as usize]);
        }
        let mut state = vec![[T::default(); LANES]; n];
        for column in (0..n).step_by(LANES) {
            identity(&mut state, column);
            advance::<T, FMA>(&mut state, &network.pairs, &trace.applied);
            let width = LANES.min(n - column);
            for (p, &row) in p.chunks_exact_mut(n).zip(&network.places) {
                p[column..column + width].copy_from_slice(&state[row as usize][..width]);
            }
        }
    }
}

/// Runs a block of columns through some comparators.
#[inline(always)]
fn advance<R: Real, const FMA: bool>(state: &mut [Lane<R>], pairs: &[(u32, u32)], applied: &[[R; 2]]) {
    for (&(a, b), &alpha) in pairs.iter().zip(applied) {
        let (a, b) = (a as usize, b as usize);
        (state[a], state[b]) = mix::<R, FMA>(&state[a], &state[b], alpha);
    }
}

/// The gradient by `x` of [`network_sort`], from those by its outputs; without `grad_p` the matrix is left out of it.
///
/// The matrix runs through the network once more, and its gradient runs back, both by blocks of columns.
pub fn network_sort_backward<T: Real>(
    grad_sorted: &[T],
    grad_p: Option<&[T]>,
    x: &[T],
    network: &Network,
    params: &NetworkSortParams,
    grad: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    let n = check(x, network, params)?;
    KernelError::check_len(OP, "grad_sorted", x.len(), grad_sorted.len())?;
    if let Some(grad_p) = grad_p {
        KernelError::check_len(OP, "grad_p", x.len() * n, grad_p.len())?;
    }
    KernelError::check_len(OP, "grad", x.len(), grad.len())?;
    for_each_chunk(par, grad, n, 3.0 * cost(x, network), |block, grad| {
        dispatch(Backward {
            grad_sorted: &grad_sorted[block * n..][..n],
            grad_p: grad_p.map(|g| &g[block * n * n..][..n * n]),
            x: &x[block * n..][..n],
            network,
            params,
            grad,
        });
    })
}

struct Backward<'a, T> {
    grad_sorted: &'a [T],
    grad_p: Option<&'a [T]>,
    x: &'a [T],
    network: &'a Network,
    params: &'a NetworkSortParams,
    grad: &'a mut [T],
}

impl<T: Real> Vectorized for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { grad_sorted, grad_p, x, network, params, grad } = self;
        let mut trace = Trace::default();
        trace.run::<FMA>(x, network, params);
        let mut by_alpha = vec![0.0; network.pairs.len()];
        if let Some(grad_p) = grad_p {
            matrix_gradient::<T, FMA>(grad_p, network, &trace, &mut by_alpha);
        }
        let mut g = vec![0.0; x.len()];
        for (&row, grad) in network.places.iter().zip(grad_sorted) {
            g[row as usize] = grad.to_f64();
        }
        for (k, &(a, b)) in network.pairs.iter().enumerate().rev() {
            let (a, b) = (a as usize, b as usize);
            let (alpha, difference) = (trace.alpha[k], trace.difference[k]);
            let density = params.distribution.density(params.argument(difference), alpha);
            let through = (by_alpha[k] - (g[a] - g[b]) * difference) * density * params.steepness;
            (g[a], g[b]) =
                (alpha * g[a] + (1.0 - alpha) * g[b] - through, (1.0 - alpha) * g[a] + alpha * g[b] + through);
        }
        for (grad, g) in grad.iter_mut().zip(g) {
            *grad = T::from_f64(g);
        }
    }
}

/// Writes to `by_alpha`, for each comparator, the inner product of the differences of its two rows in the matrix before
/// it and in the gradient after it.
///
/// The gradient runs backwards and the matrix forwards, so the matrix is kept at the start of each segment of
/// comparators and runs through a segment again when the gradient has come to its end.
#[inline(always)]
fn matrix_gradient<R: Real, const FMA: bool>(grad_p: &[R], network: &Network, trace: &Trace<R>, by_alpha: &mut [f64]) {
    let n = network.rows();
    // What is kept within a segment then takes as much memory as the starts of all of them.
    let segment = ((network.pairs.len() * n) as f64).sqrt().ceil().max(1.0) as usize;
    let segments = network.pairs.len().div_ceil(segment);
    let mut starts = vec![[R::default(); LANES]; segments * n];
    let mut kept = vec![[R::default(); LANES]; segment.min(network.pairs.len())];
    let mut state = vec![[R::default(); LANES]; n];
    let mut products = vec![[R::default(); LANES]; network.pairs.len()];
    let relaxed: Vec<[R; 2]> = trace.alpha.iter().map(|&a| [R::from_f64(a), R::from_f64(1.0 - a)]).collect();
    let span = |s: usize| s * segment..((s + 1) * segment).min(network.pairs.len());
    for column in (0..n).step_by(LANES) {
        identity(&mut state, column);
        for (s, start) in starts.chunks_exact_mut(n).enumerate() {
            start.copy_from_slice(&state);
            if s + 1 < segments {
                advance::<R, FMA>(&mut state, &network.pairs[span(s)], &trace.applied[span(s)]);
            }
        }
        let mut g = vec![[R::default(); LANES]; n];
        let width = LANES.min(n - column);
        for (grad, &row) in grad_p.chunks_exact(n).zip(&network.places) {
            g[row as usize][..width].copy_from_slice(&grad[column..column + width]);
        }
        for (s, start) in starts.chunks_exact_mut(n).enumerate().rev() {
            let pairs = &network.pairs[span(s)];
            for ((&(a, b), &alpha), kept) in pairs.iter().zip(&trace.applied[span(s)]).zip(&mut kept) {
                let (a, b) = (a as usize, b as usize);
                let (low, high) = (start[a], start[b]);
                *kept = minus(&low, &high);
                (start[a], start[b]) = mix::<R, FMA>(&low, &high, alpha);
            }
            let back = pairs.iter().zip(&relaxed[span(s)]).zip(&kept).zip(&mut products[span(s)]).rev();
            for (((&(a, b), &alpha), kept), product) in back {
                let (a, b) = (a as usize, b as usize);
                let (low, high) = (g[a], g[b]);
                add_product::<R, FMA>(product, &minus(&low, &high), kept);
                (g[a], g[b]) = mix::<R, FMA>(&low, &high, alpha);
            }
        }
    }
    for (by_alpha, parts) in by_alpha.iter_mut().zip(products) {
        *by_alpha = parts.iter().map(|part| part.to_f64()).sum();
    }
}

#[inline(always)]
fn minus<R: Real>(a: &Lane<R>, b: &Lane<R>) -> Lane<R> {
    let mut out = [R::default(); LANES];
    for lane in 0..LANES {
        out[lane] = a[lane] - b[lane];
    }
    out
}

/// Adds the products of the lanes.
#[inline(always)]
fn add_product<R: Real, const FMA: bool>(sums: &mut Lane<R>, a: &Lane<R>, b: &Lane<R>) {
    for lane in 0..LANES {
        sums[lane] = a[lane].mul_add_if::<FMA>(b[lane], sums[lane]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn atan_stays_within_its_bound() {
        let numbers = (-4000..4000).map(|i| 1.005_f64.powi(i)).chain([0.0, f64::INFINITY, 1e308]);
        for v in numbers.flat_map(|v| [v, -v]) {
            let (got, want) = (atan::<true>(v), v.atan());
            assert!((got - want).abs() <= 4.0 * f64::EPSILON * want.abs(), "atan({v}) = {got}, not {want}");
            let plain = atan::<false>(v);
            assert!((plain - want).abs() <= 4.0 * f64::EPSILON * want.abs(), "atan({v}) = {plain}, not {want}");
        }
    }

    #[test]
    fn networks_sort_every_sequence_of_zeros_and_ones() {
        for n in 0..15_usize {
            for network in [Network::odd_even(n), Network::bitonic(n)] {
                assert_eq!(network.rows(), n);
                for pattern in 0..1_u32 << n {
                    let mut values: Vec<u32> = (0..n).map(|i| pattern >> i & 1).collect();
                    for &(a, b) in &network.pairs {
                        let (a, b) = (a as usize, b as usize);
                        (values[a], values[b]) = (values[a].min(values[b]), values[a].max(values[b]));
                    }
                    let sorted: Vec<u32> = network.places.iter().map(|&row| values[row as usize]).collect();
                    assert!(sorted.is_sorted(), "{n}: {pattern:b}");
                }
            }
        }
    }
}
