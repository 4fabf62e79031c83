//! Soft ranks and soft sorted values by isotonic regression (Blondel et al., 2020).
//!
//! Both are projections onto a permutahedron, and both come down to pooling adjacent violators of a decreasing order.
//! With `s` the values in decreasing order (negated first where the direction asks for it), `w = (n, ..., 1)` and the
//! strength `e`, the regressions are those of `s / e` against `w` (ranks) and of `w / e` against `s` (values). A pooled
//! block is known by its largest value and one sum relative to it, so that nothing cancels and nothing overflows,
//! however small the strength: a block of one element gives its hard rank and its own value exactly.

use crate::exec::for_each_chunk;
use crate::simd::Real;
use crate::{KernelError, Par};

/// What is asked of the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftOrder {
    /// A rank for each value, where it stands.
    Rank,
    /// The values in order.
    Sort,
}

/// Distance of the projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regularization {
    /// Euclidean.
    L2,
    /// Kullback-Leibler of exponentials: means become logarithms of sums of exponentials.
    Kl,
}

/// Options of [`soft_order`].
#[derive(Clone, Copy, Debug)]
pub struct SoftOrderParams {
    /// Ranks or values.
    pub order: SoftOrder,
    /// Distance.
    pub regularization: Regularization,
    /// Weight of the regularization, greater than 0; the hard result is the limit at 0.
    pub strength: f64,
    /// Whether the largest value comes first.
    pub descending: bool,
}

use Regularization::{Kl, L2};
use SoftOrder::{Rank, Sort};

/// Neighbours in the decreasing order that share one value of the regression.
#[derive(Clone, Copy)]
struct Pool {
    first: usize,
    len: usize,
    /// The largest value, which is the first one.
    top: f64,
    /// Sum of `s - top` (L2) or of `exp((s - top) / scale)` (KL).
    mass: f64,
    /// What the value of the regression is made of besides `top`: the mean of `s - top`, or a log ratio of sums.
    level: f64,
}

impl SoftOrderParams {
    /// Divisor of the values inside exponentials.
    fn scale(&self) -> f64 {
        if self.order == Rank { self.strength } else { 1.0 }
    }

    /// The order in which ranks fall: those of ascending ranks are largest where the value is.
    fn sign(&self) -> f64 {
        if (self.order == Rank) == self.descending { -1.0 } else { 1.0 }
    }

    /// `sum_j exp(-j / strength)` over `len` terms.
    fn geometric(&self, len: usize) -> f64 {
        (-(len as f64) / self.strength).exp_m1() / (-1.0 / self.strength).exp_m1()
    }

    fn with_level(&self, pool: Pool, n: usize) -> Pool {
        let level = match (self.regularization, self.order) {
            (L2, _) => pool.mass / pool.len as f64,
            (Kl, Rank) => (pool.mass / weight(n, pool.first, pool.len)).ln(),
            (Kl, Sort) => (pool.mass / self.geometric(pool.len)).ln(),
        };
        Pool { level, ..pool }
    }

    fn single(&self, first: usize, value: f64, n: usize) -> Pool {
        let mass = if self.regularization == L2 { 0.0 } else { 1.0 };
        self.with_level(Pool { first, len: 1, top: value, mass, level: 0.0 }, n)
    }

    fn merge(&self, a: Pool, b: Pool, n: usize) -> Pool {
        let shift = b.top - a.top;
        let mass = match self.regularization {
            L2 => a.mass + b.mass + b.len as f64 * shift,
            Kl => a.mass + b.mass * (shift / self.scale()).exp(),
        };
        self.with_level(Pool { len: a.len + b.len, mass, ..a }, n)
    }

    /// Whether the regression does not fall from one pool to the next.
    fn violates(&self, a: Pool, b: Pool) -> bool {
        let values = (a.top - b.top, a.level - b.level);
        let steps = match self.regularization {
            L2 => 0.5 * (a.len + b.len) as f64,
            Kl => a.len as f64,
        };
        match (self.order, self.regularization) {
            (Rank, L2) => values.0 + values.1 <= self.strength * steps,
            (Rank, Kl) => values.0 / self.strength + values.1 <= 0.0,
            (Sort, _) => steps / self.strength <= values.0 + values.1,
        }
    }

    /// The share of each value in its pool: how the pool's level moves with it.
    fn shares(&self, s: &[f64], shares: &mut [f64]) {
        match self.regularization {
            L2 => shares.fill(1.0 / s.len() as f64),
            Kl => {
                for (share, s_i) in shares.iter_mut().zip(s) {
                    *share = ((s_i - s[0]) / self.scale()).exp();
                }
                let mass: f64 = shares.iter().sum();
                for share in shares {
                    *share /= mass;
                }
            }
        }
    }

    fn check(&self, op: &'static str) -> Result<(), KernelError> {
        if self.strength > 0.0 && self.strength.is_finite() {
            return Ok(());
        }
        Err(KernelError::argument(op, "regularization_strength", "a finite number > 0", self.strength.to_string()))
    }
}

/// Sum of the hard ranks `n - first, ...` of `len` neighbours.
fn weight(n: usize, first: usize, len: usize) -> f64 {
    0.5 * len as f64 * (2 * (n - first) + 1 - len) as f64
}

/// An integer with the order of the number; both zeros are one.
fn key(value: f64) -> i64 {
    let bits = (value + 0.0).to_bits() as i64;
    bits ^ ((bits >> 63) as u64 >> 1) as i64
}

/// Elements per block of work; a block is at least one row.
const BLOCK: usize = 4096;

struct OutRow<'a, T> {
    y: &'a mut [T],
    order: &'a mut [i64],
    first: &'a mut [i64],
}

#[derive(Default)]
struct Scratch {
    keys: Vec<(i64, usize)>,
    s: Vec<f64>,
    pools: Vec<Pool>,
}

/// Soft ranks or soft sorted values of every row of `x (rows, n)` into `y`.
///
/// `order` becomes the positions of a row's values in order (of falling `s`; equal values in order of position), and
/// `first`, for each place in that order, the first place of its pool: what [`soft_order_backward`] needs. Everything
/// is `f64` inside; the error is that of rounding the result, plus about `n u64` of the size of a row's values.
pub fn soft_order<T: Real>(
    x: &[T],
    n: usize,
    params: &SoftOrderParams,
    y: &mut [T],
    order: &mut [i64],
    first: &mut [i64],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "soft_order";
    params.check(OP)?;
    if n == 0 || !x.len().is_multiple_of(n) {
        return Err(KernelError::argument(OP, "x", "rows of at least one value", format!("{} in all", x.len())));
    }
    KernelError::check_len(OP, "y", x.len(), y.len())?;
    KernelError::check_len(OP, "order", x.len(), order.len())?;
    KernelError::check_len(OP, "first", x.len(), first.len())?;
    super::network::check_finite(op_name(params.order), x)?;
    let mut rows: Vec<OutRow<'_, T>> = y
        .chunks_exact_mut(n)
        .zip(order.chunks_exact_mut(n))
        .zip(first.chunks_exact_mut(n))
        .map(|((y, order), first)| OutRow { y, order, first })
        .collect();
    let group = (BLOCK / n).max(1);
    let cost = x.len() as f64 * (20.0 + 4.0 * (n as f64).log2());
    for_each_chunk(par, &mut rows, group, cost, |block, rows| {
        let mut scratch = Scratch::default();
        for (row, x) in rows.iter_mut().zip(x[block * group * n..].chunks_exact(n)) {
            one_row(x, params, row, &mut scratch);
        }
    })
}

/// The public name, for errors about data.
fn op_name(order: SoftOrder) -> &'static str {
    if order == Rank { "soft_rank" } else { "soft_sort" }
}

fn one_row<T: Real>(x: &[T], params: &SoftOrderParams, out: &mut OutRow<'_, T>, scratch: &mut Scratch) {
    let (n, sign, strength) = (x.len(), params.sign(), params.strength);
    let Scratch { keys, s, pools } = scratch;
    keys.clear();
    keys.extend(x.iter().enumerate().map(|(i, v)| (key(-sign * v.to_f64()), i)));
    keys.sort_unstable();
    s.clear();
    s.extend(keys.iter().map(|&(_, i)| sign * x[i].to_f64()));
    for (order, &(_, i)) in out.order.iter_mut().zip(&*keys) {
        *order = i as i64;
    }
    pools.clear();
    for (i, &value) in s.iter().enumerate() {
        let mut pool = params.single(i, value, n);
        while let Some(&previous) = pools.last()
            && params.violates(previous, pool)
        {
            pool = params.merge(previous, pool, n);
            pools.pop();
        }
        pools.push(pool);
    }
    for pool in pools {
        let places = pool.first..pool.first + pool.len;
        out.first[places.clone()].fill(pool.first as i64);
        let steps = 0.5 * (pool.len - 1) as f64;
        match (params.order, params.regularization) {
            (Rank, L2) => {
                let mean = (n - pool.first) as f64 - steps;
                for i in places {
                    out.y[keys[i].1] = T::from_f64((s[i] - pool.top - pool.level) / strength + mean);
                }
            }
            (Rank, Kl) => {
                let factor = weight(n, pool.first, pool.len) / pool.mass;
                for i in places {
                    out.y[keys[i].1] = T::from_f64(((s[i] - pool.top) / strength).exp() * factor);
                }
            }
            (Sort, regularization) => {
                let centre = if regularization == L2 { steps } else { 0.0 };
                for (j, y) in out.y[places].iter_mut().enumerate() {
                    *y = T::from_f64(sign * ((centre - j as f64) / strength + pool.level + pool.top));
                }
            }
        }
    }
}

/// The gradient by `x` of [`soft_order`], given the gradient `g` by `y` and what the forward pass found.
///
/// A row takes O(n): within a pool the Jacobian is the identity less a matrix of rank one (ranks), or that matrix
/// (values).
pub fn soft_order_backward<T: Real>(
    g: &[T],
    x: &[T],
    order: &[i64],
    first: &[i64],
    n: usize,
    params: &SoftOrderParams,
    grad: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "soft_order_backward";
    params.check(OP)?;
    if n == 0 || !x.len().is_multiple_of(n) {
        return Err(KernelError::argument(OP, "x", "rows of at least one value", format!("{} in all", x.len())));
    }
    KernelError::check_len(OP, "g", x.len(), g.len())?;
    KernelError::check_len(OP, "order", x.len(), order.len())?;
    KernelError::check_len(OP, "first", x.len(), first.len())?;
    KernelError::check_len(OP, "grad", x.len(), grad.len())?;
    if let Some(i) = order.iter().find(|i| !(0..n as i64).contains(i)) {
        return Err(KernelError::argument(OP, "order", format!("positions below {n}"), i.to_string()));
    }
    let group = (BLOCK / n).max(1);
    for_each_chunk(par, grad, group * n, x.len() as f64 * 5.0, |block, grad| {
        let (mut s, mut h, mut shares) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        for (r, grad) in grad.chunks_exact_mut(n).enumerate() {
            let row = (block * group + r) * n;
            let (g, x) = (&g[row..][..n], &x[row..][..n]);
            let (order, first) = (&order[row..][..n], &first[row..][..n]);
            for (s, &i) in s.iter_mut().zip(order) {
                *s = params.sign() * x[i as usize].to_f64();
            }
            let mut start = 0;
            for pool in first.chunk_by(|a, b| a == b) {
                let places = start..start + pool.len();
                start = places.end;
                let shares = &mut shares[places.clone()];
                params.shares(&s[places.clone()], shares);
                let (order, h) = (&order[places.clone()], &mut h[places.clone()]);
                match params.order {
                    Rank => {
                        let factor = weight(n, places.start, places.len());
                        for ((h, &i), share) in h.iter_mut().zip(order).zip(&*shares) {
                            let rank_by_z = if params.regularization == L2 { 1.0 } else { share * factor };
                            *h = g[i as usize].to_f64() * rank_by_z;
                        }
                        let total: f64 = h.iter().sum();
                        for ((h, &i), share) in h.iter().zip(order).zip(&*shares) {
                            grad[i as usize] = T::from_f64((h - share * total) * params.sign() / params.strength);
                        }
                    }
                    Sort => {
                        let total: f64 = g[places].iter().map(|g| g.to_f64()).sum();
                        for (&i, share) in order.iter().zip(&*shares) {
                            grad[i as usize] = T::from_f64(share * total);
                        }
                    }
                }
            }
        }
    })
}
