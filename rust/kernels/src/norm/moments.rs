//! Count, mean and sum of squared deviations per channel, in one pass over memory.

use super::Layout;
use super::reduce::{Reducer, reduce_channels};
use crate::simd::{Element, Real};
use crate::{KernelError, Par};

/// Streaming statistics of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Number of elements seen.
    pub count: f64,
    /// Their mean; 0 when there are none.
    pub mean: f64,
    /// Sum of their squared deviations from the mean.
    pub m2: f64,
}

impl Moments {
    /// Chan's parallel update: the moments of the union.
    #[inline(always)]
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if other.count == 0.0 {
            return self;
        }
        if self.count == 0.0 {
            return other;
        }
        let delta = other.mean - self.mean;
        let part = other.count / count;
        Self { count, mean: self.mean + delta * part, m2: self.m2 + other.m2 + delta * delta * self.count * part }
    }

    /// Biased variance; 0 when nothing was seen.
    pub fn variance(&self) -> f64 {
        self.m2 / self.count.max(1.0)
    }
}

/// `f32` squares below this sum may have lost bits to underflow.
const TRUST_ABOVE: f64 = 1e-28;

/// Elements per `f32` accumulation: they stay in the first-level cache between the two passes.
const CACHED: usize = 4096;

/// Exact two-pass moments of a slice that fits the first-level cache.
///
/// In `f32` the squares of numbers beyond 1e19 overflow and those below 1e-19 vanish; such blocks are redone in `f64`.
#[inline(always)]
fn cached_moments<R: Real>(x: &[R]) -> Moments {
    let n = x.len() as f64;
    let mean = R::sum(x) / n;
    let centre = R::from_f64(mean);
    let (first, second) = R::deviations(x, centre);
    let moments = Moments { count: n, mean: centre.to_f64() + first / n, m2: (second - first * first / n).max(0.0) };
    if !trusted::<R>(moments.mean, second) {
        return wide_moments(x);
    }
    if second.is_finite() { moments } else { Moments { mean, m2: second, ..moments } }
}

/// The same in `f64`, out of line: rarely needed.
#[inline(never)]
fn wide_moments<R: Real>(x: &[R]) -> Moments {
    let n = x.len() as f64;
    let mean = x.iter().map(|v| v.to_f64()).sum::<f64>() / n;
    let m2 = x.iter().map(|v| (v.to_f64() - mean).powi(2)).sum();
    Moments { count: n, mean, m2 }
}

/// Columns of a [`Tile`], and rows that it holds: as many as stay in the first-level cache.
const COLUMNS: usize = 64;
const ROWS: usize = 128;

/// Running moments of `COLUMNS` columns side by side. All loops have constant length; columns beyond those in use hold
/// zeros.
struct Tile<R> {
    held: usize,
    rows: [[R; COLUMNS]; ROWS],
    count: f64,
    mean: [f64; COLUMNS],
    m2: [f64; COLUMNS],
}

impl<R: Real> Default for Tile<R> {
    fn default() -> Self {
        let zero = R::default();
        Self { held: 0, rows: [[zero; COLUMNS]; ROWS], count: 0.0, mean: [0.0; COLUMNS], m2: [0.0; COLUMNS] }
    }
}

impl<R: Real> Tile<R> {
    #[inline(always)]
    fn clear(&mut self) {
        (self.held, self.count, self.mean, self.m2) = (0, 0.0, [0.0; COLUMNS], [0.0; COLUMNS]);
    }

    #[inline(always)]
    fn push<T: Element<Acc = R>>(&mut self, row: &[T]) {
        let target = &mut self.rows[self.held];
        T::load(row, &mut target[..row.len()]);
        target[row.len()..].fill(R::default());
        self.held += 1;
        if self.held == ROWS {
            self.flush();
        }
    }

    /// Merges the held rows, measured in two passes, into the running moments.
    #[inline(always)]
    fn flush(&mut self) {
        if self.held == 0 {
            return;
        }
        let rows = &self.rows[..self.held];
        let n = self.held as f64;
        let zero = [R::default(); COLUMNS];
        let (mut centre, mut sums, mut squares) = (zero, zero, zero);
        for row in rows {
            for c in 0..COLUMNS {
                centre[c] = centre[c] + row[c];
            }
        }
        let scale = R::from_f64(1.0 / n);
        for c in &mut centre {
            *c = *c * scale;
        }
        for row in rows {
            for c in 0..COLUMNS {
                let d = row[c] - centre[c];
                sums[c] = sums[c] + d;
                squares[c] = squares[c] + d * d;
            }
        }
        let (mut mean, mut m2) = ([0.0; COLUMNS], [0.0; COLUMNS]);
        for c in 0..COLUMNS {
            let (s, q) = (sums[c].to_f64(), squares[c].to_f64());
            mean[c] = centre[c].to_f64() + s / n;
            m2[c] = (q - s * s / n).max(0.0);
            // `max` would turn NaN into 0.
            m2[c] = if q.is_finite() { m2[c] } else { q };
        }
        for c in 0..COLUMNS {
            if !trusted::<R>(mean[c], squares[c].to_f64()) {
                let mut column = [R::default(); ROWS];
                for (value, row) in column.iter_mut().zip(rows) {
                    *value = row[c];
                }
                let exact = wide_moments(&column[..self.held]);
                (mean[c], m2[c]) = (exact.mean, exact.m2);
            }
        }
        // Chan's update, as in `Moments::merge`; the count is common to all columns.
        let part = n / (self.count + n);
        for c in 0..COLUMNS {
            let delta = mean[c] - self.mean[c];
            self.mean[c] += delta * part;
            self.m2[c] += m2[c] + delta * delta * (self.count * part);
        }
        self.count += n;
        self.held = 0;
    }
}

/// Whether `f32` squares with this sum are good: finite, and either clearly above underflow or of nothing but zeros.
#[inline(always)]
fn trusted<R: Real>(mean: f64, squares: f64) -> bool {
    size_of::<R>() == size_of::<f64>()
        || (mean.is_finite() && squares.is_finite() && (squares > TRUST_ABOVE || (mean == 0.0 && squares == 0.0)))
}

struct MomentsReducer<'a, T> {
    x: &'a [T],
    layout: Layout,
    mask: Option<&'a [u8]>,
}

impl<T: Element> MomentsReducer<'_, T> {
    /// Moments of the elements of `self.x[start..start + len]` that the mask keeps.
    ///
    /// `kept` is the mask position of the first element.
    #[inline(always)]
    fn run(&self, start: usize, len: usize, kept: usize, scratch: &mut Gather<T::Acc>) {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CACHED);
            let x = &self.x[start + done..start + done + part];
            match self.mask {
                Some(mask) => {
                    let mask = &mask[kept + done..kept + done + part];
                    let mut wide = [T::Acc::default(); CACHED];
                    T::load(x, &mut wide[..part]);
                    for (&value, &keep) in wide[..part].iter().zip(mask) {
                        scratch.push(value, keep != 0);
                    }
                }
                None => match T::as_acc(x) {
                    Some(x) if part * 4 > CACHED => scratch.total = scratch.total.merge(cached_moments(x)),
                    _ => scratch.extend::<T>(x),
                },
            }
            done += part;
        }
    }
}

/// Collects short runs until there are enough of them to be worth a vector loop.
struct Gather<R: Real> {
    buffer: [R; CACHED],
    held: usize,
    total: Moments,
}

impl<R: Real> Default for Gather<R> {
    fn default() -> Self {
        Self { buffer: [R::default(); CACHED], held: 0, total: Moments::default() }
    }
}

impl<R: Real> Gather<R> {
    #[inline(always)]
    fn flush(&mut self) {
        if self.held > 0 {
            self.total = self.total.merge(cached_moments(&self.buffer[..self.held]));
            self.held = 0;
        }
    }

    #[inline(always)]
    fn extend<T: Element<Acc = R>>(&mut self, x: &[T]) {
        if self.held + x.len() > CACHED {
            self.flush();
        }
        T::load(x, &mut self.buffer[self.held..self.held + x.len()]);
        self.held += x.len();
    }

    #[inline(always)]
    fn push(&mut self, value: R, keep: bool) {
        if self.held == CACHED {
            self.flush();
        }
        // Writing always and advancing only when kept avoids a branch the processor cannot foresee.
        self.buffer[self.held] = value;
        self.held += usize::from(keep);
    }
}

impl<T: Element> Reducer for MomentsReducer<'_, T> {
    type Partial = Moments;
    type Scratch = Gather<T::Acc>;
    const COST_NS: f64 = 0.1;

    #[inline(always)]
    fn slices(
        &self,
        outer: std::ops::Range<usize>,
        channel: usize,
        inner: std::ops::Range<usize>,
        gather: &mut Gather<T::Acc>,
    ) -> Moments {
        for o in outer {
            let start = (o * self.layout.channels + channel) * self.layout.inner + inner.start;
            self.run(start, inner.len(), o * self.layout.inner + inner.start, gather);
        }
        gather.flush();
        std::mem::take(&mut gather.total)
    }

    #[inline(always)]
    fn rows(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, width: usize, out: &mut [Moments]) {
        let mut tile = Tile::default();
        for first_column in columns.clone().step_by(COLUMNS) {
            let span = COLUMNS.min(columns.end - first_column);
            tile.clear();
            for row in rows.clone() {
                // A masked tensor comes row by row, so a row is all in or all out.
                if self.mask.is_none_or(|mask| mask[row] != 0) {
                    let start = row * width + first_column;
                    tile.push::<T>(&self.x[start..start + span]);
                }
            }
            tile.flush();
            for (c, total) in out[first_column - columns.start..][..span].iter_mut().enumerate() {
                *total = total.merge(Moments { count: tile.count, mean: tile.mean[c], m2: tile.m2[c] });
            }
        }
    }

    #[inline(always)]
    fn merge(a: Moments, b: Moments) -> Moments {
        a.merge(b)
    }
}

/// Moments of every channel of `x`, one per (group, channel), into `out`.
///
/// `mask` has one byte per (outer, inner) position, shared by all channels; zero leaves the position out, whatever
/// value it holds.
///
/// Error, with `u` the roundoff of the accumulation type and `u64` that of `f64`: the mean is within
/// `64 u max|x - mean|` plus `u64 |mean|` for each merged block of at least 32 elements; `m2` is within a relative
/// `100 u + 4 u64 |mean| / std`. In `f32` a mean of 1e6 times the spread therefore costs nothing.
pub fn channel_moments<T: Element>(
    x: &[T],
    layout: Layout,
    mask: Option<&[u8]>,
    out: &mut [Moments],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "channel_moments";
    layout.check(OP, x.len())?;
    KernelError::check_len(OP, "out", layout.statistics(), out.len())?;
    if let Some(mask) = mask {
        KernelError::check_len(OP, "mask", layout.outer * layout.inner, mask.len())?;
    }
    reduce_channels(&MomentsReducer { x, layout, mask }, layout, mask.is_none(), out, par)
}
