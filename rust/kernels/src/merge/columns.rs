//! How much magnitudes and directions of the columns of a matrix have changed, and task vectors weighted by column.

use super::combine::tiles;
use super::deltas::{BLOCK, Deltas, TILE, subtract};
use crate::exec::for_each_chunk;
use crate::simd::{Element, Real, Reductions, Vectorized, dispatch};
use crate::{KernelError, Par};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Columns that are looked at together: rows are read in pieces of so many.
const STRIP: usize = 64;

/// A matrix in memory, row by row, and which of its vectors are meant.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Whether the vectors are the rows, not the columns.
    pub by_row: bool,
}

impl Matrix {
    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        if self.by_row { self.rows } else { self.columns }
    }

    fn check(&self, op: &'static str, len: usize) -> Result<(), KernelError> {
        KernelError::check_len(op, "shape", len, self.rows * self.columns)
    }
}

/// For each model and vector, model by model, in `sizes` how much its length differs from that in the base, and in
/// `turns` the squared distance of the directions, both of length 1: twice one less the cosine, without cancellation.
/// Vectors of zeros have the direction zero. Returns the first model with NaN or an infinity, if any.
///
/// In `f64` throughout: for vectors of `n` entries `sizes` to `n` roundings relative to the lengths, and `turns` to `n`
/// roundings relative to itself, plus `1e-15` times its root. Equal vectors give exactly 0.
pub fn column_changes<T: Element>(
    deltas: &Deltas<'_, T>,
    matrix: Matrix,
    sizes: &mut [f64],
    turns: &mut [f64],
    par: Par<'_>,
) -> Result<Option<usize>, KernelError> {
    const OP: &str = "merge_column_changes";
    matrix.check(OP, deltas.len())?;
    let (vectors, models) = (matrix.vectors(), deltas.models());
    KernelError::check_len(OP, "sizes", models * vectors, sizes.len())?;
    KernelError::check_len(OP, "turns", models * vectors, turns.len())?;
    let first_bad = AtomicUsize::new(usize::MAX);
    let at_once = if matrix.by_row { (BLOCK / matrix.columns.max(1)).max(1) } else { STRIP };
    // Of each vector the changes of all models, two by two.
    let mut found = vec![0.0; vectors * models * 2];
    for_each_chunk(par, &mut found, at_once * models * 2, 4.0 * deltas.cost_ns(), |block, found| {
        let strip = Strip { deltas, matrix, first: block * at_once, found };
        if let Some(model) = dispatch(strip) {
            first_bad.fetch_min(model, Ordering::Relaxed);
        }
    })?;
    for (vector, found) in found.chunks(models * 2).enumerate() {
        for (model, pair) in found.chunks(2).enumerate() {
            (sizes[model * vectors + vector], turns[model * vectors + vector]) = (pair[0], pair[1]);
        }
    }
    let found = first_bad.into_inner();
    Ok((found != usize::MAX).then_some(found))
}

struct Strip<'a, T> {
    deltas: &'a Deltas<'a, T>,
    matrix: Matrix,
    first: usize,
    found: &'a mut [f64],
}

impl<T: Element> Vectorized for Strip<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, matrix, first, found } = self;
        let models = deltas.models();
        let Matrix { rows, columns, by_row } = matrix;
        if by_row {
            let mut bad = None;
            for (i, found) in found.chunks_exact_mut(2 * models).enumerate() {
                let row = first + i;
                let pieces = (0..columns).step_by(STRIP).map(|from| (row * columns + from, STRIP.min(columns - from)));
                bad = least(bad, changes::<T, true>(deltas, pieces, found));
            }
            return bad;
        }
        let width = found.len() / (2 * models);
        changes::<T, false>(deltas, (0..rows).map(|row| (row * columns + first, width)), found)
    }
}

fn least(a: Option<usize>, b: Option<usize>) -> Option<usize> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        _ => a.or(b),
    }
}

/// The changes of vectors whose entries lie in `pieces`: one vector along all of them if `ALONG`, otherwise one for each
/// lane.
#[inline(always)]
fn changes<T: Element, const ALONG: bool>(
    deltas: &Deltas<'_, T>,
    pieces: impl Iterator<Item = (usize, usize)> + Clone,
    found: &mut [f64],
) -> Option<usize> {
    let models = deltas.models();
    let mut bad = None;
    let mut sizes = vec![[0.0_f64; STRIP]; models + 1];
    let (mut wide, mut own, mut delta) =
        ([T::Acc::default(); STRIP], [T::Acc::default(); STRIP], [T::Acc::default(); STRIP]);
    for (start, count) in pieces.clone() {
        let base = deltas.base(start, &mut wide[..count]);
        for (model, sizes) in sizes.iter_mut().enumerate() {
            let values = if model == 0 { base } else { deltas.model(model - 1, start, &mut own[..count]) };
            if model > 0 && !subtract(values, base, &mut delta[..count]) {
                bad = least(bad, Some(model - 1));
            }
            for (square, &v) in sizes.iter_mut().zip(values) {
                *square += v.to_f64() * v.to_f64();
            }
        }
    }
    for sizes in &mut sizes {
        if ALONG {
            *sizes = [f64::sum(sizes); STRIP];
        }
        for size in sizes {
            *size = size.sqrt();
        }
    }
    let shrink: Vec<_> = sizes.iter().map(|sizes| sizes.map(|size| 1.0 / size.max(f64::MIN_POSITIVE))).collect();
    let mut turns = vec![[0.0_f64; STRIP]; models];
    for (start, count) in pieces {
        let base = deltas.base(start, &mut wide[..count]);
        for (model, turns) in turns.iter_mut().enumerate() {
            let values = deltas.model(model, start, &mut own[..count]);
            let cells = turns.iter_mut().zip(values).zip(base).zip(&shrink[model + 1]).zip(&shrink[0]);
            for ((((turn, &v), &base), &own), &origin) in cells {
                let difference = v.to_f64() * own - base.to_f64() * origin;
                *turn += difference * difference;
            }
        }
    }
    for (vector, found) in found.chunks_exact_mut(2 * models).enumerate() {
        for (model, pair) in found.chunks_exact_mut(2).enumerate() {
            pair[0] = (sizes[model + 1][vector] - sizes[0][vector]).abs();
            pair[1] = if ALONG { f64::sum(&turns[model]) } else { turns[model][vector] };
        }
    }
    bad
}

/// `out = base + scale * sum_k weights_kj (model_k - base)` with a weight for each model and vector `j`, model by model;
/// returns the first model with NaN or an infinity, if any.
pub fn by_columns<T: Element>(
    deltas: &Deltas<'_, T>,
    matrix: Matrix,
    weights: &[T::Acc],
    scale: T::Acc,
    out: &mut [T],
    par: Par<'_>,
) -> Result<Option<usize>, KernelError> {
    const OP: &str = "merge_by_columns";
    matrix.check(OP, deltas.len())?;
    KernelError::check_len(OP, "weights", deltas.models() * matrix.vectors(), weights.len())?;
    tiles(deltas, out, par, |start, out| dispatch(ColumnsTile { deltas, matrix, weights, scale, start, out }))
}

struct ColumnsTile<'a, T: Element> {
    deltas: &'a Deltas<'a, T>,
    matrix: Matrix,
    weights: &'a [T::Acc],
    scale: T::Acc,
    start: usize,
    out: &'a mut [T],
}

impl<T: Element> Vectorized for ColumnsTile<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, matrix, weights, scale, start, out } = self;
        let mut bad = None;
        let [mut wide, mut sum, mut delta, mut factor] = [[T::Acc::default(); TILE]; 4];
        let (sum, delta, factor) = (&mut sum[..out.len()], &mut delta[..out.len()], &mut factor[..out.len()]);
        let base = deltas.base(start, &mut wide[..out.len()]);
        for (model, weights) in weights.chunks_exact(matrix.vectors()).enumerate() {
            if !deltas.load(model, start, base, delta) {
                bad = least(bad, Some(model));
            }
            let (mut place, mut row, mut column) = (0, start / matrix.columns, start % matrix.columns);
            while place < factor.len() {
                let count = (matrix.columns - column).min(factor.len() - place);
                let target = &mut factor[place..place + count];
                if matrix.by_row {
                    target.fill(weights[row]);
                } else {
                    target.copy_from_slice(&weights[column..column + count]);
                }
                (place, row, column) = (place + count, row + 1, 0);
            }
            for ((sum, &delta), &factor) in sum.iter_mut().zip(&*delta).zip(&*factor) {
                *sum = *sum + factor * delta;
            }
        }
        for (sum, &base) in sum.iter_mut().zip(base) {
            *sum = base + scale * *sum;
        }
        T::store(sum, out);
        bad
    }
}
