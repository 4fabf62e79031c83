//! One pass over the rows: their potentials, and what the columns receive.

use super::cost::{Columns, Cost, Rows, largest, powers_in_place};
use super::solve::Marginal;
use crate::simd::{Real, TILE_ROWS, Transcendental, Vectorized, log_in_place};
use std::f64::consts::LOG2_E;

/// Fewest rows of a block.
const BLOCK_ROWS: usize = 64;
/// Most blocks: each has column sums of its own.
const MAX_BLOCKS: usize = 128;
/// Powers of two by which a row's powers may be multiplied on the way to the columns.
const FAR: f64 = 60.0;

/// Rows of a block of a problem with `n` rows.
pub fn block_rows(n: usize) -> usize {
    BLOCK_ROWS.max(n.div_ceil(MAX_BLOCKS)).next_multiple_of(TILE_ROWS)
}

/// Powers whose sum is within `WINDOW` of one either way are good to the type's precision.
pub fn window<T: Real>() -> f64 {
    if size_of::<T>() == 4 { 24.0_f64.exp2() } else { 200.0_f64.exp2() }
}

/// A block of rows: its potentials and its share of the column sums.
pub struct Part<T> {
    pub first: usize,
    /// Potentials less `log2` of the weights.
    pub f: Vec<f64>,
    /// The potentials that the kept powers were taken at.
    pub base: Vec<f64>,
    pub columns: Vec<T>,
    pub powers: Vec<T>,
    pub error: f64,
    /// The largest of the rows' sums and of their inverses.
    pub spread: f64,
    /// A row whose new potential is so far from its powers that they tell the columns nothing.
    pub far: bool,
    pub hopeless: Option<usize>,
}

/// A step from `old` towards `target`, and beyond it for `omega > 1`.
#[inline(always)]
pub fn relaxed(omega: f64, old: f64, target: f64) -> f64 {
    if omega == 1.0 { target } else { (1.0 - omega) * old + omega * target }
}

/// What all blocks of a pass read.
pub struct Shared<'s, T, C> {
    pub cost: &'s C,
    pub a: &'s [f64],
    /// Column potentials; with kept powers, the columns' factors.
    pub g: &'s [T],
    pub c: T,
    pub kappa: f64,
    pub mass: f64,
    pub omega: f64,
    pub marginal: Marginal,
    pub fresh: bool,
    pub keep: bool,
    pub kept: bool,
}

pub struct RowPass<'a, 's, T, C> {
    pub shared: &'a Shared<'s, T, C>,
    pub part: &'a mut Part<T>,
    pub cells: &'a mut [T],
}

impl<T: Transcendental, C: Cost<T>> Vectorized for RowPass<'_, '_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { shared, part, cells } = self;
        let (width, rows) = (shared.g.len(), part.f.len());
        part.columns.fill(T::default());
        (part.error, part.spread, part.far) = (0.0, 0.0, false);
        if shared.keep && !shared.kept {
            part.powers.resize(rows * width, T::default());
            part.base.resize(rows, 0.0);
        }
        let simple = shared.marginal == Marginal::Exact && shared.omega == 1.0;
        // The sums of the rows, in place of their potentials until the block is done.
        let mut bases = [0.0; BLOCK_ROWS];
        for start in (0..rows).step_by(BLOCK_ROWS) {
            let end = rows.min(start + BLOCK_ROWS);
            for first in (start..end).step_by(TILE_ROWS) {
                let count = TILE_ROWS.min(end - first);
                let weights = &shared.a[part.first + first..][..count];
                if weights.iter().all(|&w| w <= 0.0) {
                    part.f[first..][..count].fill(1.0);
                    bases[first - start..][..count].fill(0.0);
                    continue;
                }
                let mut base = [0.0; TILE_ROWS];
                let sums = if shared.kept {
                    base[..count].copy_from_slice(&part.base[first..][..count]);
                    T::row_products::<FMA>(tile(&part.powers[first * width..][..count * width], width), shared.g)
                } else {
                    base[..count].copy_from_slice(&part.f[first..][..count]);
                    let cells = &mut *if shared.keep {
                        &mut part.powers[first * width..][..count * width]
                    } else {
                        &mut cells[..count * width]
                    };
                    let sums = powers::<T, C, FMA>(shared, part.first + first, weights, &mut base, cells);
                    if let Some(r) = (0..count).find(|&r| weights[r] > 0.0 && sums[r] == 0.0) {
                        part.hopeless = Some(part.first + first + r);
                        return;
                    }
                    if shared.keep {
                        part.base[first..][..count].copy_from_slice(&base[..count]);
                    }
                    sums
                };
                let mut ratios = [T::default(); TILE_ROWS];
                for r in 0..count {
                    bases[first - start + r] = base[r];
                    if weights[r] <= 0.0 {
                        part.f[first + r] = 1.0;
                        continue;
                    }
                    let mut ratio = weights[r] / sums[r];
                    if simple {
                        part.f[first + r] = sums[r];
                    } else {
                        let balanced = base[r] - sums[r].log2();
                        let target = shared.marginal.update(balanced, shared.kappa);
                        let new = relaxed(shared.omega, part.f[first + r], target);
                        ratio = weights[r] * (new - base[r]).exp2();
                        part.far |= (new - base[r]).abs() > FAR;
                        part.error += (ratio * sums[r] - weights[r] * (target - balanced).exp2()).abs();
                        part.f[first + r] = new;
                    }
                    part.spread = part.spread.max(sums[r]).max(1.0 / sums[r]);
                    ratios[r] = if part.far { T::default() } else { T::from_f64(ratio / shared.mass) };
                }
                let source = if shared.keep { &part.powers[first * width..] } else { &*cells };
                T::add_rows::<FMA>(tile(&source[..count * width], width), ratios, &mut part.columns);
            }
            if simple {
                let f = &mut part.f[start..end];
                log_in_place::<f64, FMA>(f);
                for (f, base) in f.iter_mut().zip(bases) {
                    *f = base - *f * LOG2_E;
                }
            }
        }
    }
}

/// Powers and sums of a few rows at their potentials `base`, which move where the sums would leave the window. The sum
/// of a row that has no finite logit is zero.
#[inline(always)]
fn powers<T: Transcendental, C: Cost<T>, const FMA: bool>(
    shared: &Shared<'_, T, C>,
    first: usize,
    weights: &[f64],
    base: &mut [f64; TILE_ROWS],
    cells: &mut [T],
) -> [f64; TILE_ROWS] {
    let (count, width) = (weights.len(), shared.g.len());
    let mut shift = [T::default(); TILE_ROWS];
    for r in 0..count {
        shift[r] = T::from_f64(if weights[r] > 0.0 { base[r] } else { f64::NEG_INFINITY });
        base[r] = shift[r].to_f64();
    }
    let columns = Columns { g: shared.g, c: shared.c };
    let mut sums = [0.0; TILE_ROWS];
    if !shared.fresh {
        sums = shared.cost.powers::<FMA>(Rows { first, count, shift }, columns, cells);
    }
    let limit = window::<T>();
    let good = |sum: f64| sum >= 1.0 / limit && sum <= limit;
    if (0..count).any(|r| weights[r] > 0.0 && !good(sums[r])) {
        let shift = [T::default(); TILE_ROWS];
        shared.cost.logits::<FMA>(Rows { first, count, shift }, columns, cells);
        for (r, cells) in cells.chunks_exact_mut(width).enumerate() {
            let peak = largest(cells);
            if weights[r] <= 0.0 {
                cells.fill(T::default());
                continue;
            }
            base[r] = -peak.to_f64();
            // Nowhere to go: no shift would help.
            sums[r] = if peak.to_f64() > f64::NEG_INFINITY { powers_in_place::<T, FMA>(cells, peak) } else { 0.0 };
        }
    }
    sums
}

/// Some rows of cells as a tile; a short one repeats its last row, and what comes of the surplus is not used.
#[inline(always)]
pub fn tile<T>(cells: &[T], width: usize) -> [&[T]; TILE_ROWS] {
    let count = cells.len() / width;
    std::array::from_fn(|r| &cells[r.min(count - 1) * width..][..width])
}
