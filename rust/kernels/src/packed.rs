//! Rows packed for register tiles, and the inner products of all pairs of rows.

use crate::exec::for_each_chunk;
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

/// Rows per register tile.
const TILE_ROWS: usize = crate::simd::TILE_ROWS;

/// Rows, packed so that inner products read memory in order.
///
/// `rows` holds the rows as they are; `panels` holds panels of `R::PANEL` rows, transposed: element `k` of all rows
/// of a panel lies together. The last panel is padded with zeros.
pub struct PackedRows<R> {
    rows: Vec<R>,
    panels: Vec<R>,
    count: usize,
    width: usize,
}

/// Scales each row of `x` to unit length; rows shorter than 1e-12 are divided by that.
pub fn unit_rows<T: Element>(x: &[T], width: usize, par: Par<'_>) -> Result<Vec<T::Acc>, KernelError> {
    let mut rows = vec![T::Acc::default(); x.len()];
    for_each_chunk(par, &mut rows, (64 * width).max(1), x.len() as f64, |block, chunk| {
        let start = block * 64 * width;
        T::load(&x[start..start + chunk.len()], chunk);
        dispatch(Normalize { rows: chunk, width });
    })?;
    Ok(rows)
}

impl<R: Real> PackedRows<R> {
    /// Packs `count` rows.
    pub fn new(rows: Vec<R>, count: usize, par: Par<'_>) -> Result<Self, KernelError> {
        let width = rows.len() / count.max(1);
        let panel_len = R::PANEL * width;
        let mut panels = vec![R::default(); count.div_ceil(R::PANEL) * panel_len];
        for_each_chunk(par, &mut panels, panel_len.max(1), rows.len() as f64, |block, panel| {
            for lane in 0..R::PANEL.min(count - block * R::PANEL) {
                let row = &rows[(block * R::PANEL + lane) * width..][..width];
                for (k, &value) in row.iter().enumerate() {
                    panel[k * R::PANEL + lane] = value;
                }
            }
        })?;
        Ok(Self { rows, panels, count, width })
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The panel that holds the rows from `panel * R::PANEL` on.
    pub fn panel(&self, panel: usize) -> &[R] {
        &self.panels[panel * R::PANEL * self.width..][..R::PANEL * self.width]
    }

    /// Length of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The row `i`.
    pub fn row(&self, i: usize) -> &[R] {
        &self.rows[i * self.width..][..self.width]
    }

    /// Squared length of each row: 1, up to rounding, or 0; not finite where the features were not.
    pub fn squared_lengths(&self) -> Vec<R> {
        dispatch(Lengths(self))
    }

    /// Length of a row of products with padding: whole panels.
    pub fn padded(&self) -> usize {
        self.count.div_ceil(R::PANEL) * R::PANEL
    }

    /// Inner products of rows `first..first + out.len() / padded()` with all rows, into rows of `padded()` entries.
    ///
    /// Each product is one sum in order of `k`, in the accumulation type: error at most `width * u` for unit rows.
    pub fn products(&self, first: usize, out: &mut [R]) {
        dispatch(Products { of: self, first, out });
    }
}

/// Scales rows to unit length.
struct Normalize<'a, R> {
    rows: &'a mut [R],
    width: usize,
}

impl<R: Real> Vectorized for Normalize<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in self.rows.chunks_mut(self.width.max(1)) {
            let length = squared_length(row).sqrt().max(1e-12);
            for v in row {
                *v = R::from_f64(v.to_f64() / length);
            }
        }
    }
}

/// Sum of the squares; in `f64` where the squares leave the range of the type.
#[inline(always)]
fn squared_length<R: Real>(row: &[R]) -> f64 {
    let squares = R::sum_of_squares(row);
    if squares.is_finite() && squares > 1e-28 {
        return squares;
    }
    row.iter().map(|v| v.to_f64() * v.to_f64()).sum()
}

/// Squared lengths of all rows.
struct Lengths<'a, R>(&'a PackedRows<R>);

impl<R: Real> Vectorized for Lengths<'_, R> {
    type Output = Vec<R>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Vec<R> {
        (0..self.0.count).map(|i| R::from_f64(squared_length(self.0.row(i)))).collect()
    }
}

struct Products<'a, R> {
    of: &'a PackedRows<R>,
    first: usize,
    out: &'a mut [R],
}

impl<R: Real> Vectorized for Products<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let PackedRows { panels, width, .. } = self.of;
        let padded = self.of.padded();
        let panel_rows = R::PANEL;
        if *width == 0 {
            return self.out.fill(R::default());
        }
        for (tile, out) in self.out.chunks_mut(TILE_ROWS * padded).enumerate() {
            let first = self.first + tile * TILE_ROWS;
            let used = out.len() / padded;
            // A short last tile repeats its last row; the surplus results are not stored.
            let rows: [&[R]; TILE_ROWS] = std::array::from_fn(|r| self.of.row(first + r.min(used - 1)));
            for (j, panel) in panels.chunks_exact(panel_rows * width).enumerate() {
                let acc = R::tile_products::<FMA>(rows, panel);
                for (acc, out) in acc.iter().zip(out.chunks_exact_mut(padded)) {
                    out[j * panel_rows..][..panel_rows].copy_from_slice(acc.as_ref());
                }
            }
        }
    }
}
