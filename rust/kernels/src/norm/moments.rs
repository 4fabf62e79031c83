//! Count, mean and sum of squared deviations per channel, in one pass over memory.

use super::Layout;
use super::reduce::{Reducer, reduce_channels};
use crate::simd::{Element, Real, deviations, sum};
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
    let mean = sum(x) / n;
    let centre = R::from_f64(mean);
    let (first, second) = deviations(x, centre);
    let moments = Moments { count: n, mean: centre.to_f64() + first / n, m2: (second - first * first / n).max(0.0) };
    let narrow = size_of::<R>() < size_of::<f64>();
    if narrow && !(moments.mean.is_finite() && second.is_finite() && second > TRUST_ABOVE) {
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
    const COST_NS: f64 = 0.15;

    #[inline(always)]
    fn slices(&self, outer: std::ops::Range<usize>, channel: usize, inner: std::ops::Range<usize>) -> Moments {
        let mut gather = Gather { buffer: [T::Acc::default(); CACHED], held: 0, total: Moments::default() };
        for o in outer {
            let start = (o * self.layout.channels + channel) * self.layout.inner + inner.start;
            self.run(start, inner.len(), o * self.layout.inner + inner.start, &mut gather);
        }
        gather.flush();
        gather.total
    }

    #[inline(always)]
    fn rows(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, width: usize, out: &mut [Moments]) {
        const ROWS: usize = 32;
        const COLUMNS: usize = 256;
        let mut wide = [T::Acc::default(); ROWS * COLUMNS];
        let mut centre = [T::Acc::default(); COLUMNS];
        let mut sums = [T::Acc::default(); COLUMNS];
        let mut squares = [T::Acc::default(); COLUMNS];
        for first_column in columns.clone().step_by(COLUMNS) {
            let span = COLUMNS.min(columns.end - first_column);
            let out = &mut out[first_column - columns.start..][..span];
            let mut row = rows.start;
            while row < rows.end {
                let mut held = 0;
                while row < rows.end && held < ROWS {
                    // A masked tensor comes row by row, so a row is all in or all out.
                    if self.mask.is_none_or(|mask| mask[row] != 0) {
                        let start = row * width + first_column;
                        T::load(&self.x[start..start + span], &mut wide[held * COLUMNS..][..span]);
                        held += 1;
                    }
                    row += 1;
                }
                if held == 0 {
                    continue;
                }
                let n = held as f64;
                let scale = T::Acc::from_f64(1.0 / n);
                let (centre, sums, squares) = (&mut centre[..span], &mut sums[..span], &mut squares[..span]);
                centre.fill(T::Acc::default());
                sums.fill(T::Acc::default());
                squares.fill(T::Acc::default());
                for values in wide.chunks_exact(COLUMNS).take(held) {
                    for (c, &v) in centre.iter_mut().zip(values) {
                        *c = *c + v;
                    }
                }
                for c in &mut *centre {
                    *c = *c * scale;
                }
                for values in wide.chunks_exact(COLUMNS).take(held) {
                    for (((s, q), &c), &v) in sums.iter_mut().zip(&mut *squares).zip(&*centre).zip(values) {
                        let d = v - c;
                        *s = *s + d;
                        *q = *q + d * d;
                    }
                }
                for (i, total) in out.iter_mut().enumerate() {
                    let (s, q) = (sums[i].to_f64(), squares[i].to_f64());
                    let trusted = T::Acc::LANES == f64::LANES || q > TRUST_ABOVE;
                    let part = if trusted && q.is_finite() {
                        Moments { count: n, mean: centre[i].to_f64() + s / n, m2: (q - s * s / n).max(0.0) }
                    } else {
                        let mut column = [T::Acc::default(); ROWS];
                        for (value, values) in column.iter_mut().zip(wide.chunks_exact(COLUMNS)) {
                            *value = values[i];
                        }
                        wide_moments(&column[..held])
                    };
                    *total = total.merge(part);
                }
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
