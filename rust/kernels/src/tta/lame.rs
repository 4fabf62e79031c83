//! LAME: Laplacian-adjusted maximum-likelihood estimation of a batch's class probabilities.

use super::products::UnitRows;
use crate::exec::for_each_chunk;
use crate::simd::{Element, Real, Transcendental, Vectorized, dispatch};
use crate::{KernelError, Par};

/// How instances attract each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// 1 for each of the `k` nearest other instances; not symmetric.
    Knn,
    /// `exp(-d^2 / (2 sigma^2))`, `sigma` the mean distance to the k-th nearest instance, itself counted.
    Rbf,
    /// The inner product of the unit features.
    Linear,
}

/// Options of [`lame`].
#[derive(Clone, Copy, Debug)]
pub struct LameParams {
    /// The affinity.
    pub affinity: Affinity,
    /// Neighbours.
    pub k: usize,
    /// Weight of the pairwise term.
    pub weight: f64,
    /// Most updates of the probabilities.
    pub max_iter: usize,
    /// Stop when the energy changes by less than this, relatively.
    pub tol: f64,
}

/// How a solve went.
#[derive(Clone, Debug, PartialEq)]
pub struct LameReport {
    /// Energy of the starting point and after each update.
    pub energy: Vec<f64>,
    /// Whether the energy settled.
    pub converged: bool,
}

/// Instances per block of work.
const ROWS: usize = 32;

/// The affinity matrix, in the form that multiplies fastest.
enum Matrix<R> {
    /// Neighbours of each instance, `k` apiece.
    Neighbours(Vec<u32>, usize),
    /// All entries, row by row.
    Dense(Vec<R>),
    /// `X X^T`, by its factor.
    Factor(UnitRows<R>),
}

/// Solves `Y <- softmax(log(P + 1e-10) + weight * W Y)` from `Y = P` until the energy settles.
///
/// `probs` and `out` are `(n, classes)`, `features` is `(n, width)`. The energy
/// `-<Y, log P> - weight / 2 <Y, W Y> + <Y, log Y>` falls monotonically for positive semi-definite `W`. Probabilities
/// are `f64` throughout; inner products of features have the accumulation type's precision.
pub fn lame<T: Element>(
    probs: &[f64],
    features: &[T],
    n: usize,
    params: &LameParams,
    out: &mut [f64],
    par: Par<'_>,
) -> Result<LameReport, KernelError> {
    const OP: &str = "lame";
    let (classes, width) = (probs.len() / n.max(1), features.len() / n.max(1));
    KernelError::check_len(OP, "probs", n * classes, probs.len())?;
    KernelError::check_len(OP, "features", n * width, features.len())?;
    KernelError::check_len(OP, "out", probs.len(), out.len())?;
    if probs.is_empty() {
        return Ok(LameReport { energy: vec![0.0], converged: true });
    }
    if let Some(p) = probs.iter().find(|p| !(p.is_finite() && **p >= 0.0)) {
        return Err(KernelError::argument(OP, "probs", "finite probabilities >= 0", p.to_string()));
    }
    let rows = UnitRows::new(features, n, width, par)?;
    let lengths = squared_lengths(&rows, n);
    if let Some(i) = lengths.iter().position(|length| !length.to_f64().is_finite()) {
        return Err(KernelError::argument(OP, "features", "finite values", format!("others in row {i}")));
    }
    let matrix = match params.affinity {
        Affinity::Knn => {
            let k = params.k.min(n - 1);
            Matrix::Neighbours(nearest(&rows, &lengths, k, par)?, k)
        }
        Affinity::Rbf => Matrix::Dense(rbf(&rows, &lengths, params.k.min(n), par)?),
        Affinity::Linear => Matrix::Factor(rows),
    };
    solve(probs, &matrix, n, classes, params, out, par)
}

/// The `k` nearest other rows of each row, nearest first; equal distances go to the smaller index.
fn nearest<R: Real>(rows: &UnitRows<R>, lengths: &[R], k: usize, par: Par<'_>) -> Result<Vec<u32>, KernelError> {
    let n = lengths.len();
    let mut index = vec![0_u32; n * k];
    if k == 0 {
        return Ok(index);
    }
    let cost = (n * n) as f64 * (rows.width() as f64 / 60.0 + 1.0);
    for_each_chunk(par, &mut index, ROWS * k, cost, |block, index| {
        let first = block * ROWS;
        let mut products = vec![R::default(); index.len() / k * rows.padded()];
        rows.products(first, &mut products);
        for ((i, index), products) in (first..).zip(index.chunks_mut(k)).zip(products.chunks_mut(rows.padded())) {
            dispatch(Select { products: &mut products[..n], lengths, own: i, index });
        }
    })?;
    Ok(index)
}

fn squared_lengths<R: Real>(rows: &UnitRows<R>, n: usize) -> Vec<R> {
    (0..n).map(|i| R::from_f64(rows.row(i).iter().map(|v| v.to_f64() * v.to_f64()).sum())).collect()
}

/// Picks the nearest rows from one row of inner products.
struct Select<'a, R> {
    products: &'a mut [R],
    lengths: &'a [R],
    own: usize,
    index: &'a mut [u32],
}

impl<R: Real> Vectorized for Select<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        const GROUP: usize = 32;
        let Self { products, lengths, own, index } = self;
        // Squared distances but for the row's own length, which does not change the order.
        let two = R::from_f64(2.0);
        for (p, &length) in products.iter_mut().zip(lengths) {
            *p = length - two * *p;
        }
        products[own] = R::from_f64(f64::INFINITY);
        let mut best: Vec<(R, u32)> = Vec::with_capacity(index.len() + 1);
        let mut limit = R::from_f64(f64::INFINITY);
        for (group, distances) in products.chunks(GROUP).enumerate() {
            // Most groups hold no candidate once a few rows have been seen; finding that out is a vector loop.
            let mut any = best.len() < index.len();
            for &d in distances {
                any |= d < limit;
            }
            if !any {
                continue;
            }
            for (offset, &d) in distances.iter().enumerate() {
                let j = group * GROUP + offset;
                if j == own || !(d < limit || best.len() < index.len()) {
                    continue;
                }
                let position = best.partition_point(|&(other, _)| other <= d);
                best.insert(position, (d, j as u32));
                best.truncate(index.len());
                if best.len() == index.len() {
                    limit = best[best.len() - 1].0;
                }
            }
        }
        for (index, (_, j)) in index.iter_mut().zip(best) {
            *index = j;
        }
    }
}

fn rbf<R: Real>(rows: &UnitRows<R>, lengths: &[R], k: usize, par: Par<'_>) -> Result<Vec<R>, KernelError> {
    let n = lengths.len();
    let mut squares = vec![R::default(); n * n];
    let cost = (n * n) as f64 * (rows.width() as f64 / 60.0 + 1.0);
    for_each_chunk(par, &mut squares, ROWS * n, cost, |block, squares| {
        let first = block * ROWS;
        let mut products = vec![R::default(); squares.len() / n * rows.padded()];
        rows.products(first, &mut products);
        for ((i, squares), products) in (first..).zip(squares.chunks_mut(n)).zip(products.chunks(rows.padded())) {
            for ((j, square), &p) in squares.iter_mut().enumerate().zip(products) {
                let exact = lengths[i] + lengths[j] - (p + p);
                // Rounding may leave a little on either side of zero.
                *square = if i == j || exact < R::default() { R::default() } else { exact };
            }
        }
    })?;
    let mut kth = vec![0.0_f64; n];
    for_each_chunk(par, &mut kth, ROWS, (n * n) as f64 * 3.0, |block, kth| {
        for (i, kth) in kth.iter_mut().enumerate() {
            let mut row = squares[(block * ROWS + i) * n..][..n].to_vec();
            let (_, value, _) = row.select_nth_unstable_by(k.max(1) - 1, |a, b| a.to_f64().total_cmp(&b.to_f64()));
            *kth = value.to_f64().sqrt();
        }
    })?;
    let sigma = kth.iter().sum::<f64>() / n as f64;
    // All points in one place: every distance is 0 and every affinity 1.
    let factor = if sigma > 0.0 { -0.5 / (sigma * sigma) } else { 0.0 };
    let cost = (n * n) as f64 * 3.0;
    for_each_chunk(par, &mut squares, ROWS * n, cost, |_, squares| {
        let mut wide = [0.0_f64; 1024];
        for part in squares.chunks_mut(wide.len()) {
            let wide = &mut wide[..part.len()];
            for (w, s) in wide.iter_mut().zip(&*part) {
                *w = s.to_f64() * factor;
            }
            crate::simd::exp(wide);
            for (s, w) in part.iter_mut().zip(&*wide) {
                *s = R::from_f64(*w);
            }
        }
    })?;
    Ok(squares)
}

/// Rows of `Y` per block of a matrix product.
const CACHED_ROWS: usize = 32;

/// `pull += sum_j w_j y_j`, in order of `j`.
#[inline(always)]
fn add_products<'y, R: Real, const FMA: bool>(pull: &mut [f64], w: &[R], y: impl Iterator<Item = &'y [f64]>) {
    for (&w, y) in w.iter().zip(y) {
        let w = w.to_f64();
        for (pull, &y) in pull.iter_mut().zip(y) {
            *pull = w.mul_add_if::<FMA>(y, *pull);
        }
    }
}

/// One block's share of an update.
struct Update<'a, R> {
    first: usize,
    matrix: &'a Matrix<R>,
    /// `X^T Y` for the factored matrix.
    projected: &'a [f64],
    log_p: &'a [f64],
    y: &'a [f64],
    entropy: &'a [f64],
    classes: usize,
    weight: f64,
    next: &'a mut [Row],
}

/// One instance's next probabilities.
#[derive(Clone, Default)]
struct Row {
    y: Vec<f64>,
    /// `sum y log y` of the new row.
    entropy: f64,
    /// The energy of the old row.
    energy: f64,
}

impl<R: Real> Vectorized for Update<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { first, matrix, projected, log_p, y, entropy, classes, weight, next } = self;
        for row in &mut *next {
            row.y.clear();
            row.y.resize(classes, 0.0);
        }
        match matrix {
            Matrix::Neighbours(index, k) => {
                for (i, row) in (first..).zip(&mut *next) {
                    for &j in &index[i * k..][..*k] {
                        for (pull, &y) in row.y.iter_mut().zip(&y[j as usize * classes..][..classes]) {
                            *pull += y;
                        }
                    }
                }
            }
            Matrix::Dense(w) => {
                let n = y.len() / classes;
                // Some rows of Y at a time, small enough to stay in the first-level cache for all rows of the block.
                for start in (0..n).step_by(CACHED_ROWS) {
                    let end = (start + CACHED_ROWS).min(n);
                    for (i, row) in (first..).zip(&mut *next) {
                        let y = y[start * classes..end * classes].chunks_exact(classes);
                        add_products::<R, FMA>(&mut row.y, &w[i * n + start..i * n + end], y);
                    }
                }
            }
            Matrix::Factor(rows) => {
                for (i, row) in (first..).zip(&mut *next) {
                    add_products::<R, FMA>(&mut row.y, rows.row(i), projected.chunks_exact(classes));
                }
            }
        }
        for (i, row) in (first..).zip(next) {
            let pull = &mut row.y;
            let (y, log_p) = (&y[i * classes..][..classes], &log_p[i * classes..][..classes]);
            let mut energy = entropy[i];
            for ((pull, &y), &log_p) in pull.iter_mut().zip(y).zip(log_p) {
                let pairwise = weight * *pull;
                energy -= y * (log_p + 0.5 * pairwise);
                *pull = log_p + pairwise;
            }
            row.energy = energy;
            row.entropy = softmax_with_entropy::<FMA>(pull);
        }
    }
}

/// `x <- softmax(x)`; returns `sum y log y`, exact also where `y` underflows.
#[inline(always)]
fn softmax_with_entropy<const FMA: bool>(x: &mut [f64]) -> f64 {
    let peak = x.iter().fold(f64::NEG_INFINITY, |m, &v| if v > m || v.is_nan() { v } else { m });
    let (mut total, mut weighted) = (0.0, 0.0);
    for v in &mut *x {
        let shifted = *v - peak;
        *v = shifted.exp_lane::<FMA>();
        total += *v;
        // exp underflows to 0 long before its argument overflows, so this product is 0 there.
        weighted += *v * shifted.max(-1e300);
    }
    for v in x {
        *v /= total;
    }
    weighted / total - total.ln()
}

fn solve<R: Real>(
    probs: &[f64],
    matrix: &Matrix<R>,
    n: usize,
    classes: usize,
    params: &LameParams,
    y: &mut [f64],
    par: Par<'_>,
) -> Result<LameReport, KernelError> {
    let mut log_p: Vec<f64> = probs.iter().map(|p| p + 1e-10).collect();
    crate::simd::log(&mut log_p);
    y.copy_from_slice(&log_p);
    let mut entropy: Vec<f64> = y.chunks_mut(classes).map(softmax_with_entropy::<false>).collect();
    let mut rows = vec![Row::default(); n];
    let mut report = LameReport { energy: Vec::new(), converged: false };
    let per_row = match matrix {
        Matrix::Neighbours(_, k) => *k,
        Matrix::Dense(_) => n,
        Matrix::Factor(rows) => rows.width(),
    };
    let cost = (n * classes) as f64 * (per_row as f64 * 0.5 + 8.0);
    loop {
        let projected = match matrix {
            Matrix::Factor(rows) => project(rows, y, classes, par)?,
            _ => Vec::new(),
        };
        for_each_chunk(par, &mut rows, ROWS, cost, |block, next| {
            let first = block * ROWS;
            let (y, entropy, weight) = (&*y, &entropy[..], params.weight);
            dispatch(Update { first, matrix, projected: &projected, log_p: &log_p, y, entropy, classes, weight, next });
        })?;
        let energy: f64 = rows.iter().map(|row| row.energy).sum();
        let settled = report.energy.last().is_some_and(|&last: &f64| (energy - last).abs() <= params.tol * last.abs());
        report.energy.push(energy);
        if settled || report.energy.len() > params.max_iter {
            report.converged = settled;
            return Ok(report);
        }
        for ((y, entropy), row) in y.chunks_mut(classes).zip(&mut entropy).zip(&rows) {
            y.copy_from_slice(&row.y);
            *entropy = row.entropy;
        }
    }
}

/// `X^T Y`, `(width, classes)`: partial sums over fixed blocks of rows, added in order.
fn project<R: Real>(rows: &UnitRows<R>, y: &[f64], classes: usize, par: Par<'_>) -> Result<Vec<f64>, KernelError> {
    struct Part<'a, R> {
        rows: &'a UnitRows<R>,
        first: usize,
        y: &'a [f64],
        classes: usize,
        out: &'a mut [f64],
    }
    impl<R: Real> Vectorized for Part<'_, R> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for (i, y) in (self.first..).zip(self.y.chunks_exact(self.classes)) {
                for (&x, out) in self.rows.row(i).iter().zip(self.out.chunks_exact_mut(self.classes)) {
                    let x = x.to_f64();
                    for (out, &y) in out.iter_mut().zip(y) {
                        *out = x.mul_add_if::<FMA>(y, *out);
                    }
                }
            }
        }
    }
    const BLOCK: usize = 256;
    let size = rows.width() * classes;
    let blocks = (y.len() / classes).div_ceil(BLOCK);
    let mut parts = vec![0.0; blocks * size];
    for_each_chunk(par, &mut parts, size.max(1), (y.len() * rows.width()) as f64 * 0.5, |block, out| {
        let first = block * BLOCK;
        let y = &y[first * classes..y.len().min((first + BLOCK) * classes)];
        dispatch(Part { rows, first, y, classes, out });
    })?;
    let mut total = vec![0.0; size];
    for part in parts.chunks(size.max(1)) {
        for (total, &part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
    Ok(total)
}
