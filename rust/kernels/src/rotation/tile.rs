//! A tile of rows, transposed: the coordinates one after the other, each with one number per row.

use crate::KernelError;
use crate::simd::{Element, Real, Vectorized, dispatch, transpose};
use std::ops::Range;

/// Coordinates that are brought in together: their part of a tile leaves room in a first-level cache.
pub const STRIP: usize = 128;

/// The strips of `width` coordinates.
pub fn strips(width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..width).step_by(STRIP).map(move |start| start..(start + STRIP).min(width))
}

/// Number of rows of `x`; refuses lengths that are not whole rows.
pub fn count_rows(op: &'static str, len: usize, width: usize) -> Result<usize, KernelError> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(KernelError::argument(op, "x", format!("rows of {width} numbers"), format!("{len} numbers")));
    }
    Ok(len / width)
}

/// How many rows go into one unit of parallel work. It depends on the problem alone: few enough units that their
/// partial sums of `parameters` numbers stay small, enough of them for many threads.
pub fn rows_per_run<R: Real>(rows: usize, parameters: usize) -> usize {
    /// Numbers in all partial sums together, beyond which runs become longer.
    const SUMS: usize = 1 << 22;
    let runs = (SUMS / parameters.max(1)).clamp(8, 64);
    rows.div_ceil(runs).next_multiple_of(R::PANEL)
}

/// Brings the coordinates `strip` of the rows of `x` into a tile with `SLOTS` numbers per coordinate and row.
///
/// `tile` is the strip's part; `wide` is room for a strip in the type it is computed in. Rows that are missing to fill
/// the lanes become zeros.
pub fn load<T: Element, const SLOTS: usize>(
    x: &[T],
    width: usize,
    strip: &Range<usize>,
    slot: usize,
    tile: &mut [T::Acc],
    wide: &mut [T::Acc],
) {
    let panel = T::Acc::PANEL;
    let (rows, len) = (x.len() / width, strip.len());
    let tile = &mut tile[slot * panel..];
    if rows < panel {
        for lanes in tile.chunks_mut(SLOTS * panel) {
            lanes[rows..panel].fill(T::Acc::default());
        }
    }
    if let Some(x) = T::as_acc(x) {
        dispatch(Turn { from: (&x[strip.start..], width), to: (tile, SLOTS * panel), sizes: (rows, len) });
    } else {
        for (row, wide) in x.chunks_exact(width).zip(wide.chunks_exact_mut(STRIP)) {
            T::load(&row[strip.clone()], &mut wide[..len]);
        }
        dispatch(Turn { from: (wide, STRIP), to: (tile, SLOTS * panel), sizes: (rows, len) });
    }
}

/// Writes the coordinates `strip` of a tile to the rows of `y`; the opposite of [`load`].
pub fn store<T: Element, const SLOTS: usize>(
    tile: &[T::Acc],
    slot: usize,
    strip: &Range<usize>,
    y: &mut [T],
    width: usize,
    wide: &mut [T::Acc],
) {
    let panel = T::Acc::PANEL;
    let (rows, len) = (y.len() / width, strip.len());
    let tile = &tile[slot * panel..];
    if let Some(y) = T::as_acc_mut(y) {
        dispatch(Turn { from: (tile, SLOTS * panel), to: (&mut y[strip.start..], width), sizes: (len, rows) });
    } else {
        dispatch(Turn { from: (tile, SLOTS * panel), to: (&mut *wide, STRIP), sizes: (len, rows) });
        for (row, wide) in y.chunks_exact_mut(width).zip(wide.chunks_exact(STRIP)) {
            T::store(&wide[..len], &mut row[strip.clone()]);
        }
    }
}

struct Turn<'a, R> {
    from: (&'a [R], usize),
    to: (&'a mut [R], usize),
    sizes: (usize, usize),
}

impl<R: Real> Vectorized for Turn<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        transpose(self.from, self.to, self.sizes, |value| value);
    }
}
