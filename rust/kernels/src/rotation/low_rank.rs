//! Identity plus low rank on blocks of coordinates: all products of reflections.

use super::tile::count_rows;
use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, TILE_ROWS, Vectorized, dispatch};
use crate::{KernelError, Par};

const OP: &str = "low_rank_rotate";
/// Rows of a unit of parallel work that has no sums of its own.
const ROWS: usize = 16;

/// `blocks` updates of rank `rank` on `width / blocks` coordinates each.
#[derive(Clone, Copy, Debug)]
pub struct LowRankShape {
    /// Numbers per row.
    pub width: usize,
    /// Number of blocks of neighbouring coordinates.
    pub blocks: usize,
    /// Directions per block.
    pub rank: usize,
}

impl LowRankShape {
    fn check(&self, directions: usize, core: usize) -> Result<(), KernelError> {
        if self.blocks == 0 || !self.width.is_multiple_of(self.blocks) {
            let expected = format!("blocks that divide {} coordinates", self.width);
            return Err(KernelError::argument(OP, "directions", expected, self.blocks.to_string()));
        }
        KernelError::check_len(OP, "directions", self.width.saturating_mul(self.rank), directions)?;
        let square = self.rank.saturating_mul(self.rank);
        KernelError::check_len(OP, "core", self.blocks.saturating_mul(square), core)
    }

    /// Coordinates of a block.
    fn side(&self) -> usize {
        self.width / self.blocks
    }
}

/// The directions `U (blocks, padded rank, padded side)` with zeros as padding, and `T`.
struct Update<'a, R> {
    shape: LowRankShape,
    directions: Vec<R>,
    core: &'a [f64],
    /// Coordinates of a block, in whole panels.
    side: usize,
    /// Directions of a block, in whole groups of [`TILE_ROWS`].
    rank: usize,
}

impl<'a, R: Real> Update<'a, R> {
    fn new(directions: &[R], core: &'a [f64], shape: LowRankShape) -> Self {
        let (side, rank) = (shape.side().next_multiple_of(R::PANEL), shape.rank.next_multiple_of(TILE_ROWS));
        let mut padded = vec![R::default(); shape.blocks * rank * side];
        if shape.rank > 0 && shape.side() > 0 {
            for (i, row) in directions.chunks_exact(shape.side()).enumerate() {
                let (block, k) = (i / shape.rank, i % shape.rank);
                padded[(block * rank + k) * side..][..row.len()].copy_from_slice(row);
            }
        }
        Self { shape, directions: padded, core, side, rank }
    }

    fn direction(&self, block: usize, k: usize) -> &[R] {
        &self.directions[(block * self.rank + k) * self.side..][..self.side]
    }

    fn core(&self, block: usize) -> &[f64] {
        let square = self.shape.rank * self.shape.rank;
        &self.core[block * square..][..square]
    }

    /// Length of a group of rows of one block, padded.
    fn group(&self) -> usize {
        TILE_ROWS * self.side
    }
}

/// Brings one block of up to [`TILE_ROWS`] rows into padded memory; rows that are missing become zeros.
fn load_block<T: Element>(x: &[T], update: &Update<'_, T::Acc>, block: usize, group: &mut [T::Acc]) {
    let (width, side) = (update.shape.width, update.shape.side());
    group.fill(T::Acc::default());
    for (row, out) in x.chunks_exact(width).zip(group.chunks_exact_mut(update.side)) {
        T::load(&row[block * side..][..side], &mut out[..side]);
    }
}

fn store_block<T: Element>(group: &[T::Acc], update: &Update<'_, T::Acc>, block: usize, y: &mut [T]) {
    let (width, side) = (update.shape.width, update.shape.side());
    for (row, from) in y.chunks_exact_mut(width).zip(group.chunks_exact(update.side)) {
        T::store(&from[..side], &mut row[block * side..][..side]);
    }
}

#[inline(always)]
fn rows_of<R>(group: &[R], side: usize) -> [&[R]; TILE_ROWS] {
    std::array::from_fn(|r| &group[r * side..][..side])
}

/// `coordinates[k][r] = u_k . x_r` for the rows of a group.
#[inline(always)]
fn coordinates<R: Real, const FMA: bool>(
    update: &Update<'_, R>,
    block: usize,
    group: &[R],
    out: &mut [[f64; TILE_ROWS]],
) {
    for (k, out) in out.iter_mut().enumerate() {
        *out = R::row_products::<FMA>(rows_of(group, update.side), update.direction(block, k));
    }
}

/// `out[i] = sum_j core[i][j] in[j]`, or with the transpose.
#[inline(always)]
fn times_core(core: &[f64], transposed: bool, from: &[[f64; TILE_ROWS]], to: &mut [[f64; TILE_ROWS]]) {
    let rank = from.len();
    for (i, to) in to.iter_mut().enumerate() {
        *to = [0.0; TILE_ROWS];
        for (j, from) in from.iter().enumerate() {
            let entry = core[if transposed { j * rank + i } else { i * rank + j }];
            for r in 0..TILE_ROWS {
                to[r] += entry * from[r];
            }
        }
    }
}

/// `group_r += sum_k weights[k][r] u_k`.
#[inline(always)]
fn add_directions<R: Real, const FMA: bool>(
    update: &Update<'_, R>,
    block: usize,
    weights: &[[f64; TILE_ROWS]],
    group: &mut [R],
) {
    for first in (0..weights.len()).step_by(TILE_ROWS) {
        let rows = std::array::from_fn(|k| update.direction(block, first + k));
        for (r, row) in group.chunks_exact_mut(update.side).enumerate() {
            let factor = |k: usize| weights.get(first + k).map_or(R::default(), |weight| R::from_f64(weight[r]));
            R::add_rows::<FMA>(rows, std::array::from_fn(factor), row);
        }
    }
}

/// `group += U^T T U group`.
struct Forward<'a, R> {
    update: &'a Update<'a, R>,
    block: usize,
    group: &'a mut [R],
    small: &'a mut [[f64; TILE_ROWS]],
}

impl<R: Real> Vectorized for Forward<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { update, block, group, small } = self;
        let (p, q) = small.split_at_mut(update.shape.rank);
        coordinates::<R, FMA>(update, block, group, p);
        times_core(update.core(block), false, p, q);
        add_directions::<R, FMA>(update, block, q, group);
    }
}

/// Takes the gradient of one group of rows back, in place, and adds to the sums.
struct Backward<'a, R> {
    update: &'a Update<'a, R>,
    block: usize,
    grad: &'a mut [R],
    x: &'a [R],
    small: &'a mut [[f64; TILE_ROWS]],
    /// By the directions of the block, padded as they are.
    by_directions: &'a mut [R],
    by_core: &'a mut [f64],
}

impl<R: Real> Vectorized for Backward<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { update, block, grad, x, small, by_directions, by_core } = self;
        let rank = update.shape.rank;
        let mut parts = small.chunks_exact_mut(rank);
        let [Some(p), Some(q), Some(by_q), Some(by_p)] = std::array::from_fn(|_| parts.next()) else {
            return;
        };
        coordinates::<R, FMA>(update, block, x, p);
        coordinates::<R, FMA>(update, block, grad, by_q);
        times_core(update.core(block), false, p, q);
        times_core(update.core(block), true, by_q, by_p);
        for (i, by_q) in by_q.iter().enumerate() {
            for (j, p) in p.iter().enumerate() {
                by_core[i * rank + j] += (0..TILE_ROWS).map(|r| by_q[r] * p[r]).sum::<f64>();
            }
        }
        for (k, sums) in by_directions.chunks_exact_mut(update.side).take(rank).enumerate() {
            R::add_rows::<FMA>(rows_of(grad, update.side), q[k].map(R::from_f64), sums);
            R::add_rows::<FMA>(rows_of(x, update.side), by_p[k].map(R::from_f64), sums);
        }
        add_directions::<R, FMA>(update, block, by_p, grad);
    }
}

/// `y = x + U^T T U x` on each block of each row, with `directions (blocks, rank, width / blocks)` and
/// `core (blocks, rank, rank)`.
///
/// Inner products are summed in lanes, at most `width / (blocks * PANEL)` terms each, then in `f64`. Half types are
/// computed in `f32` and rounded once.
pub fn low_rank_rotate<T: Element>(
    x: &[T],
    directions: &[T::Acc],
    core: &[f64],
    shape: &LowRankShape,
    y: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    shape.check(directions.len(), core.len())?;
    let rows = count_rows(OP, x.len(), shape.width)?;
    KernelError::check_len(OP, "y", x.len(), y.len())?;
    let update = Update::new(directions, core, *shape);
    let len = ROWS * shape.width;
    let cost = (rows * shape.width * (1 + shape.rank)) as f64 * 0.15;
    let mut runs: Vec<_> = x.chunks(len).zip(y.chunks_mut(len)).collect();
    for_each_chunk(par, &mut runs, 1, cost, |_, runs| {
        let mut small = vec![[0.0; TILE_ROWS]; 2 * shape.rank];
        for (x, y) in runs {
            with_scratch(update.group(), |group| {
                let groups = x.chunks(TILE_ROWS * shape.width).zip(y.chunks_mut(TILE_ROWS * shape.width));
                for (x, y) in groups {
                    for block in 0..shape.blocks {
                        load_block(x, &update, block, group);
                        dispatch(Forward { update: &update, block, group, small: &mut small });
                        store_block(group, &update, block, y);
                    }
                }
            });
        }
    })
}

/// One unit of parallel work of the backward pass.
struct Run<'a, T: Element> {
    grad: &'a [T],
    x: &'a [T],
    by_x: &'a mut [T],
    by_directions: Vec<T::Acc>,
    by_core: Vec<f64>,
}

/// The gradients of [`low_rank_rotate`] by `x`, `directions` and `core`.
///
/// Sums over rows run in the accumulation type over runs of at most a few hundred rows, then in `f64`.
pub fn low_rank_rotate_backward<T: Element>(
    grad: &[T],
    x: &[T],
    directions: &[T::Acc],
    core: &[f64],
    shape: &LowRankShape,
    (by_x, by_directions, by_core): (&mut [T], &mut [f64], &mut [f64]),
    par: Par<'_>,
) -> Result<(), KernelError> {
    shape.check(directions.len(), core.len())?;
    let rows = count_rows(OP, x.len(), shape.width)?;
    KernelError::check_len(OP, "grad", x.len(), grad.len())?;
    KernelError::check_len(OP, "grad_x", x.len(), by_x.len())?;
    KernelError::check_len(OP, "grad_directions", directions.len(), by_directions.len())?;
    KernelError::check_len(OP, "grad_core", core.len(), by_core.len())?;
    by_directions.fill(0.0);
    by_core.fill(0.0);
    if shape.rank == 0 {
        by_x.copy_from_slice(grad);
        return Ok(());
    }
    let update = Update::new(directions, core, *shape);
    let len = super::tile::rows_per_run::<T::Acc>(rows, directions.len()) * shape.width;
    let inputs = grad.chunks(len).zip(x.chunks(len));
    let mut runs: Vec<Run<'_, T>> = inputs
        .zip(by_x.chunks_mut(len))
        .map(|((grad, x), by_x)| Run { grad, x, by_x, by_directions: Vec::new(), by_core: Vec::new() })
        .collect();
    let cost = (rows * shape.width * (1 + 3 * shape.rank)) as f64 * 0.15;
    for_each_chunk(par, &mut runs, 1, cost, |_, runs| {
        for run in runs {
            backward(&update, run);
        }
    })?;
    let (side, square) = (shape.side(), shape.rank * shape.rank);
    for run in &runs {
        for block in 0..shape.blocks {
            for k in 0..shape.rank {
                let sums = &run.by_directions[(block * update.rank + k) * update.side..][..side];
                let totals = &mut by_directions[(block * shape.rank + k) * side..][..side];
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total += sum.to_f64();
                }
            }
        }
        for (total, sum) in by_core[..shape.blocks * square].iter_mut().zip(&run.by_core) {
            *total += sum;
        }
    }
    Ok(())
}

fn backward<T: Element>(update: &Update<'_, T::Acc>, run: &mut Run<'_, T>) {
    let (shape, square) = (update.shape, update.shape.rank * update.shape.rank);
    let Run { grad, x, by_x, by_directions, by_core } = run;
    by_directions.resize(update.directions.len(), T::Acc::default());
    by_core.resize(shape.blocks * square, 0.0);
    let mut small = vec![[0.0; TILE_ROWS]; 4 * shape.rank];
    let len = TILE_ROWS * shape.width;
    let block_len = update.rank * update.side;
    with_scratch(2 * update.group(), |memory| {
        let (g, wide) = memory.split_at_mut(update.group());
        for ((grad, x), by_x) in grad.chunks(len).zip(x.chunks(len)).zip(by_x.chunks_mut(len)) {
            for block in 0..shape.blocks {
                load_block(grad, update, block, g);
                load_block(x, update, block, wide);
                dispatch(Backward {
                    update,
                    block,
                    grad: &mut *g,
                    x: wide,
                    small: &mut small,
                    by_directions: &mut by_directions[block * block_len..][..block_len],
                    by_core: &mut by_core[block * square..][..square],
                });
                store_block(g, update, block, by_x);
            }
        }
    });
}
