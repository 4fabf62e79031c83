//! LAME: Laplacian-adjusted maximum-likelihood estimation of a batch's class probabilities.

use crate::exec::for_each_chunk;
use crate::packed::{PackedRows, unit_rows};
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
/// Candidates that are compared with the worst of the best at once.
const GROUP: usize = 32;
/// Classes are padded with zeros to a multiple of one vector register.
const LANES: usize = 8;

/// The affinity matrix, in the form that multiplies fastest.
enum Matrix<R> {
    /// Neighbours of each instance, `k` apiece.
    Neighbours(Vec<u32>, usize),
    /// All entries, row by row.
    Dense(Vec<R>),
    /// `X X^T`, by its factor.
    Factor(PackedRows<R>),
}

/// Solves `Y <- softmax(log(P + 1e-10) + weight * W Y)` from `Y = P` until the energy settles.
///
/// `probs` and `out` are `(n, classes)`, `features` is `(n, width)`. The energy
/// `-<Y, log P> - weight / 2 <Y, W Y> + <Y, log Y>` falls monotonically for positive semi-definite `W`. Probabilities
/// are `f64` throughout; inner products of features have the accumulation type's precision.
pub fn lame<T: Element<Acc: Transcendental>>(
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
    let rows = PackedRows::new(unit_rows(features, width, par)?, n, par)?;
    let lengths = rows.squared_lengths();
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
fn nearest<R: Real>(rows: &PackedRows<R>, lengths: &[R], k: usize, par: Par<'_>) -> Result<Vec<u32>, KernelError> {
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

fn rbf<R: Transcendental>(rows: &PackedRows<R>, lengths: &[R], k: usize, par: Par<'_>) -> Result<Vec<R>, KernelError> {
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
    for_each_chunk(par, &mut kth, ROWS, (n * n) as f64, |block, kth| {
        for (i, kth) in kth.iter_mut().enumerate() {
            let row = &squares[(block * ROWS + i) * n..][..n];
            *kth = dispatch(Smallest { row, k }).to_f64().sqrt();
        }
    })?;
    let sigma = kth.iter().sum::<f64>() / n as f64;
    // All points in one place: every distance is 0 and every affinity 1.
    let factor = R::from_f64(if sigma > 0.0 { -0.5 / (sigma * sigma) } else { 0.0 });
    let cost = (n * n) as f64;
    for_each_chunk(par, &mut squares, ROWS * n, cost, |_, squares| {
        for s in &mut *squares {
            *s = *s * factor;
        }
        crate::simd::exp(squares);
    })?;
    Ok(squares)
}

/// The `k`-th smallest element of a row; `k` is at least 1 and at most the row's length.
struct Smallest<'a, R> {
    row: &'a [R],
    k: usize,
}

impl<R: Real> Vectorized for Smallest<'_, R> {
    type Output = R;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> R {
        let Self { row, k } = self;
        let (first, rest) = row.split_at(k);
        let mut best = first.to_vec();
        best.sort_unstable_by(|a, b| a.to_f64().total_cmp(&b.to_f64()));
        for group in rest.chunks(GROUP) {
            let limit = best[k - 1];
            let mut any = false;
            for &v in group {
                any |= v < limit;
            }
            if !any {
                continue;
            }
            for &v in group {
                if v < best[k - 1] {
                    let position = best.partition_point(|&other| other <= v);
                    best.insert(position, v);
                    best.pop();
                }
            }
        }
        best[k - 1]
    }
}

/// Rows of `Y` per block of a matrix product: they stay in the first-level cache.
const CACHED_ROWS: usize = 32;

/// `rows += W Y` with `weights(i)` the i-th row of `W`; each sum is in order of the rows of `Y`.
#[inline(always)]
fn add_products<'w, R: Real, const FMA: bool>(
    rows: &mut [Row],
    weights: impl Fn(usize) -> &'w [R],
    y: &[f64],
    padded: usize,
) {
    const TILE: usize = 4;
    let (n, groups) = (y.len() / padded, padded / LANES);
    let y = y.as_chunks::<LANES>().0;
    for start in (0..n).step_by(CACHED_ROWS) {
        let end = (start + CACHED_ROWS).min(n);
        for (t, tile) in rows.chunks_mut(TILE).enumerate() {
            let used = tile.len();
            // Widened once for all classes. A short last tile repeats its last row; the surplus is not stored.
            let mut wide = [[0.0; TILE]; CACHED_ROWS];
            for r in 0..TILE {
                let row = &weights(t * TILE + r.min(used - 1))[start..end];
                for (wide, w) in wide.iter_mut().zip(row) {
                    wide[r] = w.to_f64();
                }
            }
            for c in 0..groups {
                let mut acc = [[0.0; LANES]; TILE];
                for (acc, row) in acc.iter_mut().zip(&*tile) {
                    *acc = row.y.as_chunks().0[c];
                }
                for (w, y) in wide.iter().zip(y[start * groups..end * groups].chunks_exact(groups)) {
                    let y = y[c];
                    for (acc, w) in acc.iter_mut().zip(w) {
                        for (acc, y) in acc.iter_mut().zip(y) {
                            *acc = w.mul_add_if::<FMA>(y, *acc);
                        }
                    }
                }
                for (acc, row) in acc.iter().zip(&mut *tile) {
                    row.y.as_chunks_mut().0[c] = *acc;
                }
            }
        }
    }
}

/// `target += factor * source`, both padded.
#[inline(always)]
fn add_scaled<const FMA: bool>(target: &mut [f64], factor: f64, source: &[f64]) {
    for (target, source) in target.as_chunks_mut::<LANES>().0.iter_mut().zip(source.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            target[lane] = factor.mul_add_if::<FMA>(source[lane], target[lane]);
        }
    }
}

/// One block's share of an update.
struct Update<'a, R> {
    first: usize,
    matrix: &'a Matrix<R>,
    /// `X^T Y` for the factored matrix, padded as `y`.
    projected: &'a [f64],
    log_p: &'a [f64],
    /// All rows of `Y`, padded.
    y: &'a [f64],
    entropy: &'a [f64],
    classes: usize,
    weight: f64,
    next: &'a mut [Row],
}

/// One instance's next probabilities.
#[derive(Clone, Default)]
struct Row {
    /// Padded with zeros.
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
        let padded = classes.next_multiple_of(LANES);
        for row in &mut *next {
            row.y.clear();
            row.y.resize(padded, 0.0);
        }
        match matrix {
            Matrix::Neighbours(index, k) => {
                for (i, row) in (first..).zip(&mut *next) {
                    for &j in &index[i * k..][..*k] {
                        add_scaled::<FMA>(&mut row.y, 1.0, &y[j as usize * padded..][..padded]);
                    }
                }
            }
            Matrix::Dense(w) => {
                let n = y.len() / padded;
                add_products::<R, FMA>(next, |i| &w[(first + i) * n..][..n], y, padded);
            }
            Matrix::Factor(rows) => add_products::<R, FMA>(next, |i| rows.row(first + i), projected, padded),
        }
        for (i, row) in (first..).zip(next) {
            let pull = &mut row.y[..classes];
            let (y, log_p) = (&y[i * padded..][..classes], &log_p[i * classes..][..classes]);
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
    out: &mut [f64],
    par: Par<'_>,
) -> Result<LameReport, KernelError> {
    let padded = classes.next_multiple_of(LANES);
    let mut log_p: Vec<f64> = probs.iter().map(|p| p + 1e-10).collect();
    crate::simd::log(&mut log_p);
    let mut y = vec![0.0; n * padded];
    let mut entropy = vec![0.0; n];
    for ((y, entropy), log_p) in y.chunks_mut(padded).zip(&mut entropy).zip(log_p.chunks(classes)) {
        y[..classes].copy_from_slice(log_p);
        *entropy = softmax_with_entropy::<false>(&mut y[..classes]);
    }
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
            Matrix::Factor(rows) => project(rows, &y, padded, par)?,
            _ => Vec::new(),
        };
        for_each_chunk(par, &mut rows, ROWS, cost, |block, next| {
            let first = block * ROWS;
            let (y, entropy, weight) = (&y[..], &entropy[..], params.weight);
            dispatch(Update { first, matrix, projected: &projected, log_p: &log_p, y, entropy, classes, weight, next });
        })?;
        let energy: f64 = rows.iter().map(|row| row.energy).sum();
        let settled = report.energy.last().is_some_and(|&last: &f64| (energy - last).abs() <= params.tol * last.abs());
        report.energy.push(energy);
        if settled || report.energy.len() > params.max_iter {
            report.converged = settled;
            for (out, y) in out.chunks_mut(classes).zip(y.chunks(padded)) {
                out.copy_from_slice(&y[..classes]);
            }
            return Ok(report);
        }
        for ((y, entropy), row) in y.chunks_mut(padded).zip(&mut entropy).zip(&rows) {
            y.copy_from_slice(&row.y);
            *entropy = row.entropy;
        }
    }
}

/// `X^T Y`, `(width, padded)`: partial sums over fixed blocks of rows, added in order.
fn project<R: Real>(rows: &PackedRows<R>, y: &[f64], padded: usize, par: Par<'_>) -> Result<Vec<f64>, KernelError> {
    struct Part<'a, R> {
        rows: &'a PackedRows<R>,
        first: usize,
        y: &'a [f64],
        padded: usize,
        out: &'a mut [f64],
    }
    impl<R: Real> Vectorized for Part<'_, R> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for (i, y) in (self.first..).zip(self.y.chunks_exact(self.padded)) {
                for (&x, out) in self.rows.row(i).iter().zip(self.out.chunks_exact_mut(self.padded)) {
                    add_scaled::<FMA>(out, x.to_f64(), y);
                }
            }
        }
    }
    const BLOCK: usize = 256;
    let size = rows.width() * padded;
    let blocks = (y.len() / padded).div_ceil(BLOCK);
    let mut parts = vec![0.0; blocks * size];
    for_each_chunk(par, &mut parts, size.max(1), (y.len() * rows.width()) as f64 * 0.5, |block, out| {
        let first = block * BLOCK;
        let y = &y[first * padded..y.len().min((first + BLOCK) * padded)];
        dispatch(Part { rows, first, y, padded, out });
    })?;
    let mut total = vec![0.0; size];
    for part in parts.chunks(size.max(1)) {
        for (total, &part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
    Ok(total)
}
