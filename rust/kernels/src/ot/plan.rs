//! Everything one does with a plan, a few rows of it at a time.

use super::cost::{Columns, Cost, Dense, Rows, STRIP, largest, padded, powers_in_place};
use super::pass::{block_rows, tile};
use super::solve::{Problem, columns_after};
use crate::exec::{Block, Io, block_count, for_each_chunk, with_scratch};
use crate::simd::{Real, TILE_ROWS, Transcendental, Vectorized, dispatch};
use crate::{KernelError, Par};
use std::f64::consts::LN_2;

/// Rows of a block whose output is its own.
const BLOCK_ROWS: usize = 64;
/// Lanes of a product's accumulator, and columns of a tile of products.
const LANES: usize = 8;
const TILE_COLUMNS: usize = 4;
/// Terms that are added in the type itself before they are added in `f64`.
const RUN: usize = 256;

/// What a cell weighs in a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// `P_ij`
    Plan,
    /// `P_ij / M_ij`, 0 where the cost is 0: what the gradient of a Euclidean distance needs.
    PlanPerCost,
}

/// The plan `P_ij = exp((f_i + g_j - M_ij) / reg)`, cell by cell.
pub struct Plan<'a, T, C> {
    cost: &'a C,
    f: Vec<T>,
    g: Vec<T>,
    c: T,
}

impl<'a, T: Transcendental, C: Cost<T>> Plan<'a, T, C> {
    /// From potentials in units of cost; `-inf` makes a row or a column of zeros.
    pub fn new(cost: &'a C, f: &[f64], g: &[f64], reg: f64) -> Self {
        let kappa = reg * LN_2;
        let c = T::from_f64(1.0 / kappa);
        let mut columns = vec![T::from_f64(f64::NEG_INFINITY); padded::<T>(g.len())];
        for (column, g) in columns.iter_mut().zip(g) {
            *column = T::from_f64(g / kappa);
        }
        cost.prepare(&mut columns, c);
        Self { cost, f: f.iter().map(|f| T::from_f64(f / kappa)).collect(), g: columns, c }
    }

    #[inline(always)]
    fn powers<const FMA: bool>(&self, first: usize, count: usize, cells: &mut [T]) -> [f64; TILE_ROWS] {
        let shift = std::array::from_fn(|r| self.f[first + r.min(count - 1)]);
        self.cost.powers::<FMA>(Rows { first, count, shift }, Columns { g: &self.g, c: self.c }, cells)
    }

    fn cost_ns(&self) -> f64 {
        (self.f.len() * self.g.len()) as f64 * self.cost.cost_ns()
    }

    /// Row sums and column sums, and `<P, M>` as the result.
    pub fn sums(&self, rows: &mut [f64], columns: &mut [f64], par: Par<'_>) -> Result<f64, KernelError> {
        let n = self.f.len();
        let block = block_rows(n);
        let mut parts: Vec<Sums<T>> = (0..block_count(n, block))
            .map(|b| Sums {
                first: b * block,
                rows: vec![0.0; block.min(n - b * block)],
                columns: Vec::new(),
                cost: 0.0,
            })
            .collect();
        let width = self.g.len();
        for_each_chunk(par, &mut parts, 1, 2.0 * self.cost_ns(), |_, part| {
            part[0].columns.resize(width, T::default());
            with_scratch::<T, _>(2 * TILE_ROWS * width, |cells| {
                dispatch(SumPass { plan: self, part: &mut part[0], cells });
            });
        })?;
        columns.fill(0.0);
        let mut cost = 0.0;
        for part in &parts {
            rows[part.first..][..part.rows.len()].copy_from_slice(&part.rows);
            for (sum, value) in columns.iter_mut().zip(&part.columns) {
                *sum += value.to_f64();
            }
            cost += part.cost;
        }
        Ok(cost)
    }

    /// `out = P V` (or with another weight), `V` of shape `(m, width)` and `out` of shape `(n, width)`.
    pub fn apply(&self, weight: Weight, v: &[T], width: usize, out: &mut [T], par: Par<'_>) -> Result<(), KernelError> {
        if width == 0 {
            return Ok(());
        }
        let columns = self.g.len();
        // Transposed and padded, so that a product runs along memory.
        let mut turned = vec![T::default(); columns * width.next_multiple_of(TILE_COLUMNS)];
        for (j, row) in v.chunks_exact(width).enumerate() {
            for (q, &value) in row.iter().enumerate() {
                turned[q * columns + j] = value;
            }
        }
        let cost_ns = self.cost_ns() * (1.0 + width as f64 / 8.0);
        for_each_chunk(par, out, BLOCK_ROWS * width, cost_ns, |block, out| {
            with_scratch::<T, _>(2 * TILE_ROWS * columns, |cells| {
                let first = block * BLOCK_ROWS;
                dispatch(ApplyPass { plan: self, weight, turned: &turned, width, first, out, cells });
            });
        })
    }

    /// The number of cells above `threshold` in each row.
    pub fn count_above(&self, threshold: f64, out: &mut [i64], par: Par<'_>) -> Result<(), KernelError> {
        let width = self.g.len();
        for_each_chunk(par, out, BLOCK_ROWS, self.cost_ns(), |block, out| {
            self.rows(block * BLOCK_ROWS, out.len(), width, |i, cells| {
                out[i] = cells.iter().filter(|cell| cell.to_f64() > threshold).count() as i64;
            });
        })
    }

    /// Columns and values of the cells above `threshold`, row by row; `starts` tells where each row's begin.
    pub fn collect_above(
        &self,
        threshold: f64,
        starts: &[i64],
        columns: &mut [i64],
        values: &mut [T],
        par: Par<'_>,
    ) -> Result<(), KernelError> {
        let (n, width) = (self.f.len(), self.g.len());
        let mut parts = Vec::new();
        let (mut columns, mut values) = (columns, values);
        for first in (0..n).step_by(BLOCK_ROWS) {
            let count = BLOCK_ROWS.min(n - first);
            let len = (starts[first + count] - starts[first]) as usize;
            let (own_columns, own_values);
            (own_columns, columns) = columns.split_at_mut(len);
            (own_values, values) = values.split_at_mut(len);
            parts.push((first, count, own_columns, own_values));
        }
        for_each_chunk(par, &mut parts, 1, self.cost_ns(), |_, part| {
            let (first, count, columns, values) = &mut part[0];
            let mut at = 0;
            self.rows(*first, *count, width, |_, cells| {
                for (j, &cell) in cells.iter().enumerate() {
                    if cell.to_f64() > threshold {
                        (columns[at], values[at]) = (j as i64, cell);
                        at += 1;
                    }
                }
            });
        })
    }

    /// Calls `body(row within the block, its cells)`.
    fn rows(&self, first: usize, count: usize, width: usize, mut body: impl FnMut(usize, &[T])) {
        with_scratch::<T, _>(TILE_ROWS * width, |cells| {
            for start in (0..count).step_by(TILE_ROWS) {
                let rows = TILE_ROWS.min(count - start);
                dispatch(PlanRows { plan: self, first: first + start, count: rows, cells: &mut *cells });
                for (r, cells) in cells.chunks_exact(width).take(rows).enumerate() {
                    body(start + r, &cells[..self.cost.shape().1]);
                }
            }
        });
    }
}

impl<T: Transcendental> Plan<'_, T, Dense<'_, T>> {
    /// The plan itself, into `out` of shape `(n, m)`.
    pub fn dense(&self, m: &[T], out: &mut [T], par: Par<'_>) -> Result<(), KernelError> {
        let (columns, width) = (self.cost.shape().1, self.g.len());
        let cost_ns = self.cost_ns();
        let Some(mut io) = Io::split(m, out) else {
            return Err(KernelError::argument("transport_plan", "out", "the shape of M", "another"));
        };
        io.for_each(par, BLOCK_ROWS * columns, cost_ns, |start, block| {
            let (Block::Split(_, out) | Block::InPlace(out)) = block;
            self.rows(start / columns, out.len() / columns, width, |i, cells| {
                out[i * columns..][..columns].copy_from_slice(cells);
            });
        })
    }

    /// `out = P^T V`, `V` of shape `(n, width)` and `out` of shape `(m, width)`.
    pub fn apply_transposed(&self, v: &[T], width: usize, out: &mut [T], par: Par<'_>) -> Result<(), KernelError> {
        if width == 0 {
            return Ok(());
        }
        let cost_ns = self.cost_ns() * (1.0 + width as f64 / 8.0);
        for_each_chunk(par, out, STRIP * width, cost_ns, |strip, out| {
            let first = strip * STRIP;
            let columns = self.cost.columns(first, out.len() / width);
            let mut g = self.g[first..][..out.len() / width].to_vec();
            g.resize(padded::<T>(g.len()), T::from_f64(f64::NEG_INFINITY));
            let plan = Plan { cost: &columns, f: self.f.clone(), g, c: self.c };
            with_scratch::<T, _>((TILE_ROWS + width) * plan.g.len(), |cells| {
                dispatch(TransposedPass { plan: &plan, v, width, out, cells });
            });
        })
    }
}

struct Sums<T> {
    first: usize,
    rows: Vec<f64>,
    columns: Vec<T>,
    cost: f64,
}

struct SumPass<'a, 'p, T, C> {
    plan: &'a Plan<'p, T, C>,
    part: &'a mut Sums<T>,
    cells: &'a mut [T],
}

impl<T: Transcendental, C: Cost<T>> Vectorized for SumPass<'_, '_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { plan, part, cells } = self;
        let width = plan.g.len();
        let (cells, costs) = cells.split_at_mut(TILE_ROWS * width);
        for first in (0..part.rows.len()).step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(part.rows.len() - first);
            let sums = plan.powers::<FMA>(part.first + first, count, cells);
            part.rows[first..][..count].copy_from_slice(&sums[..count]);
            let ones = std::array::from_fn(|r| T::from_f64(f64::from(r < count)));
            T::add_rows::<FMA>(tile(&cells[..count * width], width), ones, &mut part.columns);
            plan.cost.costs::<FMA>(part.first + first, count, costs);
            for (cells, costs) in cells.chunks_exact(width).zip(costs.chunks_exact(width)).take(count) {
                part.cost += weighted(cells, costs);
            }
        }
    }
}

/// `sum cells * costs`; a forbidden cell (infinite cost) holds nothing and counts nothing.
#[inline(always)]
fn weighted<T: Real>(cells: &[T], costs: &[T]) -> f64 {
    let mut sum = T::ZERO_PANEL;
    let infinity = T::from_f64(f64::INFINITY);
    for (cells, costs) in cells.chunks_exact(T::PANEL).zip(costs.chunks_exact(T::PANEL)) {
        let sum = sum.as_mut();
        for lane in 0..T::PANEL {
            sum[lane] = sum[lane] + if costs[lane] < infinity { cells[lane] * costs[lane] } else { T::default() };
        }
    }
    T::sum_panel(&sum)
}

struct PlanRows<'a, 'p, T, C> {
    plan: &'a Plan<'p, T, C>,
    first: usize,
    count: usize,
    cells: &'a mut [T],
}

impl<T: Transcendental, C: Cost<T>> Vectorized for PlanRows<'_, '_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.plan.powers::<FMA>(self.first, self.count, self.cells);
    }
}

struct ApplyPass<'a, 'p, T, C> {
    plan: &'a Plan<'p, T, C>,
    weight: Weight,
    turned: &'a [T],
    width: usize,
    first: usize,
    out: &'a mut [T],
    cells: &'a mut [T],
}

impl<T: Transcendental, C: Cost<T>> Vectorized for ApplyPass<'_, '_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { plan, weight, turned, width, first, out, cells } = self;
        let columns = plan.g.len();
        let (cells, costs) = cells.split_at_mut(TILE_ROWS * columns);
        for (group, out) in out.chunks_mut(TILE_ROWS * width).enumerate() {
            let (first, count) = (first + group * TILE_ROWS, out.len() / width);
            plan.powers::<FMA>(first, count, cells);
            if weight == Weight::PlanPerCost {
                plan.cost.costs::<FMA>(first, count, costs);
                for (cell, &cost) in cells.iter_mut().zip(costs.iter()).take(count * columns) {
                    *cell = if cost > T::default() { *cell / cost } else { T::default() };
                }
            }
            let rows = tile(&cells[..count * columns], columns);
            for q in (0..width).step_by(TILE_COLUMNS) {
                let values: [&[T]; TILE_COLUMNS] = std::array::from_fn(|k| &turned[(q + k) * columns..][..columns]);
                let sums = products::<T, FMA>(rows, values);
                for (r, out) in out.chunks_exact_mut(width).enumerate() {
                    for (out, product) in out[q..].iter_mut().zip(sums[r]) {
                        *out = T::from_f64(product);
                    }
                }
            }
        }
    }
}

/// Inner products of some rows with some others, all of one length.
#[inline(always)]
fn products<T: Real, const FMA: bool>(
    rows: [&[T]; TILE_ROWS],
    values: [&[T]; TILE_COLUMNS],
) -> [[f64; TILE_COLUMNS]; TILE_ROWS] {
    let mut totals = [[0.0; TILE_COLUMNS]; TILE_ROWS];
    let length = rows[0].len();
    for start in (0..length).step_by(RUN * LANES) {
        let end = length.min(start + RUN * LANES);
        let rows = rows.map(|row| row[start..end].as_chunks::<LANES>().0);
        let values = values.map(|value| value[start..end].as_chunks::<LANES>().0);
        let mut sums = [[[T::default(); LANES]; TILE_COLUMNS]; TILE_ROWS];
        for k in 0..rows[0].len() {
            for r in 0..TILE_ROWS {
                for q in 0..TILE_COLUMNS {
                    for lane in 0..LANES {
                        sums[r][q][lane] = rows[r][k][lane].mul_add_if::<FMA>(values[q][k][lane], sums[r][q][lane]);
                    }
                }
            }
        }
        for r in 0..TILE_ROWS {
            for q in 0..TILE_COLUMNS {
                totals[r][q] += sums[r][q].iter().map(|v| v.to_f64()).sum::<f64>();
            }
        }
    }
    totals
}

struct TransposedPass<'a, 'p, T, C> {
    plan: &'a Plan<'p, T, C>,
    v: &'a [T],
    width: usize,
    out: &'a mut [T],
    cells: &'a mut [T],
}

impl<T: Transcendental, C: Cost<T>> Vectorized for TransposedPass<'_, '_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { plan, v, width, out, cells } = self;
        let (n, columns) = (plan.f.len(), plan.g.len());
        let (cells, sums) = cells.split_at_mut(TILE_ROWS * columns);
        let mut totals = vec![0.0; width * columns];
        for start in (0..n).step_by(RUN) {
            sums.fill(T::default());
            for first in (start..n.min(start + RUN)).step_by(TILE_ROWS) {
                let count = TILE_ROWS.min(n - first);
                plan.powers::<FMA>(first, count, cells);
                for (q, sums) in sums.chunks_exact_mut(columns).enumerate() {
                    let ratios =
                        std::array::from_fn(|r| if r < count { v[(first + r) * width + q] } else { T::default() });
                    T::add_rows::<FMA>(tile(&cells[..count * columns], columns), ratios, sums);
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums.iter()) {
                *total += sum.to_f64();
            }
        }
        for (j, out) in out.chunks_exact_mut(width).enumerate() {
            for (q, out) in out.iter_mut().enumerate() {
                *out = T::from_f64(totals[q * columns + j]);
            }
        }
    }
}

/// Rows of `scores` as assignments: Sinkhorn's plan of uniform weights in the order of the published loops (columns
/// first), after `n_iter` updates of both, its rows scaled to sum to one. `scores` and `out` are `(n, m)`.
pub fn assign<T: Transcendental>(
    scores: &[T],
    rows: usize,
    reg: f64,
    n_iter: usize,
    out: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    let columns = scores.len() / rows;
    let cost = Dense::scores(scores, rows, columns);
    let c = 1.0 / (reg * LN_2);
    cost.check("sinkhorn_assign", "scores", c, par)?;
    let (a, b) = (vec![1.0 / rows as f64; rows], vec![1.0 / columns as f64; columns]);
    let g = columns_after::<T, _>(&cost, Problem { a: &a, b: &b, reg, tol: -1.0, start: None }, n_iter, par)?;
    let mut padding = vec![T::from_f64(f64::NEG_INFINITY); padded::<T>(columns)];
    for (cell, g) in padding.iter_mut().zip(g) {
        *cell = T::from_f64(g);
    }
    let Some(mut io) = Io::split(scores, out) else {
        return Err(KernelError::argument("sinkhorn_assign", "out", "the shape of scores", "another"));
    };
    io.for_each(par, BLOCK_ROWS * columns, scores.len() as f64 * cost.cost_ns(), |start, block| {
        let (Block::Split(_, out) | Block::InPlace(out)) = block;
        with_scratch::<T, _>(TILE_ROWS * padding.len(), |cells| {
            dispatch(Softmax { cost: &cost, first: start / columns, g: &padding, c: T::from_f64(c), out, cells });
        });
    })
}

struct Softmax<'a, 'd, T> {
    cost: &'a Dense<'d, T>,
    first: usize,
    g: &'a [T],
    c: T,
    out: &'a mut [T],
    cells: &'a mut [T],
}

impl<T: Transcendental> Vectorized for Softmax<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { cost, first, g, c, out, cells } = self;
        let columns = cost.shape().1;
        for (tile, out) in out.chunks_mut(TILE_ROWS * columns).enumerate() {
            let count = out.len() / columns;
            let rows = Rows { first: first + tile * TILE_ROWS, count, shift: [T::default(); TILE_ROWS] };
            cost.logits::<FMA>(rows, Columns { g, c }, cells);
            for (cells, out) in cells.chunks_exact_mut(g.len()).zip(out.chunks_exact_mut(columns)) {
                let sum = powers_in_place::<T, FMA>(cells, largest(cells));
                let scale = T::from_f64(1.0 / sum);
                for (out, &cell) in out.iter_mut().zip(cells.iter()) {
                    *out = cell * scale;
                }
            }
        }
    }
}
