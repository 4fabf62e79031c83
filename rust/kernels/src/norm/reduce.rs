//! Walks a tensor once, in memory order, and reduces it to one value per (group, channel).

use super::Layout;
use crate::exec::{block_count, for_each_chunk};
use crate::simd::{Element, Real, Reductions, Vectorized, dispatch};
use crate::{KernelError, Par};
use std::ops::Range;

/// What is computed from a channel's elements.
pub(super) trait Reducer: Sync {
    /// The value of a part of a channel; its default is the value of nothing.
    type Partial: Copy + Default + Send + Sync;
    /// Buffers that a thread uses again for each part.
    type Scratch: Default;
    /// Nanoseconds per element on one thread, roughly.
    const COST_NS: f64;
    /// Reduces elements `[o][channel][inner]` for all `o` in `outer`.
    fn slices(
        &self,
        outer: Range<usize>,
        channel: usize,
        inner: Range<usize>,
        scratch: &mut Self::Scratch,
    ) -> Self::Partial;
    /// Adds `rows` of a matrix `width` wide to `out`, one entry per column of `columns`.
    fn rows(&self, rows: Range<usize>, columns: Range<usize>, width: usize, out: &mut [Self::Partial]);
    /// The value of two parts together.
    fn merge(a: Self::Partial, b: Self::Partial) -> Self::Partial;
}

/// Elements per unit of work, the smallest part that a thread takes.
const UNIT: usize = 1 << 16;
/// Runs of a channel shorter than this are taken together.
const SHORT: usize = 4096;
/// Narrow rows are put side by side up to this width, which makes good vector loops.
const WIDE: usize = 64;

/// Reduces the whole tensor; `may_widen` allows several narrow rows to be treated as one.
///
/// The cut into units depends on the layout alone and units are merged in memory order: the same bits for any number
/// of threads.
pub(super) fn reduce_channels<R: Reducer>(
    reducer: &R,
    layout: Layout,
    may_widen: bool,
    out: &mut [R::Partial],
    par: Par<'_>,
) -> Result<(), KernelError> {
    out.fill(R::Partial::default());
    if layout.is_empty() {
        return Ok(());
    }
    if layout.inner == 1 {
        reduce_rows(reducer, layout, may_widen, out, par)
    } else {
        reduce_slices(reducer, layout, out, par)
    }
}

fn reduce_slices<R: Reducer>(
    reducer: &R,
    layout: Layout,
    out: &mut [R::Partial],
    par: Par<'_>,
) -> Result<(), KernelError> {
    /// Consecutive units, the first of which has number `first`.
    struct Units<'a, R: Reducer> {
        reducer: &'a R,
        first: usize,
        partials: &'a mut [R::Partial],
        /// The part of the tensor that a unit covers: outer indices, channel, inner range.
        part: &'a (dyn Fn(usize) -> (Range<usize>, usize, Range<usize>) + Sync),
    }
    impl<R: Reducer> Vectorized for Units<'_, R> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let mut scratch = R::Scratch::default();
            for (unit, partial) in (self.first..).zip(self.partials) {
                let (outer, channel, inner) = (self.part)(unit);
                *partial = self.reducer.slices(outer, channel, inner, &mut scratch);
            }
        }
    }
    let Layout { channels, inner, groups, .. } = layout;
    let per_group = layout.outer_per_group();
    let together = (SHORT / inner).clamp(1, per_group);
    let stacks = block_count(per_group, together);
    let pieces = block_count(inner, UNIT);
    // Units in memory order: group, stack of outer indices, channel, piece of the inner range.
    let mut partials = vec![R::Partial::default(); groups * stacks * channels * pieces];
    let part = |unit: usize| {
        let (piece, channel) = (unit % pieces, unit / pieces % channels);
        let (group, stack) = (unit / pieces / channels / stacks, unit / pieces / channels % stacks);
        let start = group * per_group + stack * together;
        let outer = start..(start + together).min((group + 1) * per_group);
        (outer, channel, piece * UNIT..((piece + 1) * UNIT).min(inner))
    };
    let units_per_block = block_count(UNIT, (together * inner).min(UNIT));
    let cost = layout.len() as f64 * R::COST_NS;
    for_each_chunk(par, &mut partials, units_per_block, cost, |block, partials| {
        dispatch(Units { reducer, first: block * units_per_block, partials, part: &part });
    })?;
    for (unit, partial) in partials.into_iter().enumerate() {
        let channel = unit / pieces % channels;
        let group = unit / pieces / channels / stacks;
        let total = &mut out[group * channels + channel];
        *total = R::merge(*total, partial);
    }
    Ok(())
}

fn reduce_rows<R: Reducer>(
    reducer: &R,
    layout: Layout,
    may_widen: bool,
    out: &mut [R::Partial],
    par: Par<'_>,
) -> Result<(), KernelError> {
    struct Unit<'a, R: Reducer> {
        reducer: &'a R,
        rows: Range<usize>,
        channels: usize,
        fold: usize,
        out: &'a mut [R::Partial],
    }
    impl<R: Reducer> Vectorized for Unit<'_, R> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let Self { reducer, rows, channels, fold, out } = self;
            if fold == 1 {
                return reducer.rows(rows, 0..channels, channels, out);
            }
            // `fold` narrow rows side by side make one wide row, because rows follow each other in memory.
            let width = channels * fold;
            let mut wide = vec![R::Partial::default(); width];
            let first = rows.start.next_multiple_of(fold).min(rows.end);
            let last = (rows.end / fold * fold).max(first);
            reducer.rows(rows.start..first, 0..channels, channels, out);
            reducer.rows(first / fold..last / fold, 0..width, width, &mut wide);
            for (i, partial) in wide.into_iter().enumerate() {
                out[i % channels] = R::merge(out[i % channels], partial);
            }
            reducer.rows(last..rows.end, 0..channels, channels, out);
        }
    }
    let Layout { channels, groups, .. } = layout;
    let per_group = layout.outer_per_group();
    let fold = if may_widen { (WIDE / channels).max(1) } else { 1 };
    let rows_per_unit = (UNIT / channels).max(128).min(per_group);
    let units = block_count(per_group, rows_per_unit);
    let mut partials = vec![R::Partial::default(); groups * units * channels];
    // Short groups share a block of work.
    let units_per_block = block_count(UNIT, rows_per_unit * channels);
    let cost = layout.len() as f64 * R::COST_NS;
    for_each_chunk(par, &mut partials, units_per_block * channels, cost, |block, chunk| {
        for (i, out) in chunk.chunks_mut(channels).enumerate() {
            let unit = block * units_per_block + i;
            let group = unit / units;
            let start = group * per_group + unit % units * rows_per_unit;
            let rows = start..(start + rows_per_unit).min((group + 1) * per_group);
            dispatch(Unit { reducer, rows, channels, fold, out });
        }
    })?;
    for (unit, partial) in partials.chunks(channels).enumerate() {
        let group = unit / units;
        for (total, &part) in out[group * channels..][..channels].iter_mut().zip(partial) {
            *total = R::merge(*total, part);
        }
    }
    Ok(())
}

/// `(sum of g, sum of g * (x - shift))` of every (group, channel): the two reductions of a normalization's gradient.
///
/// Error within a relative `100 u` of the sums of magnitudes.
pub fn channel_dot<T: Element>(
    g: &[T],
    x: &[T],
    layout: Layout,
    shift: &[f64],
    out: &mut [(f64, f64)],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "channel_dot";
    layout.check(OP, x.len())?;
    KernelError::check_len(OP, "g", x.len(), g.len())?;
    KernelError::check_len(OP, "shift", layout.statistics(), shift.len())?;
    KernelError::check_len(OP, "out", layout.statistics(), out.len())?;
    let centre: Vec<T::Acc> = shift.iter().map(|&s| T::Acc::from_f64(s)).collect();
    reduce_channels(&DotReducer { g, x, layout, centre: &centre }, layout, false, out, par)?;
    // The kernels subtract the rounded shift; what rounding left out is linear in the first sum.
    for ((sums, &shift), centre) in out.iter_mut().zip(shift).zip(&centre) {
        sums.1 -= (shift - centre.to_f64()) * sums.0;
    }
    Ok(())
}

struct DotReducer<'a, T: Element> {
    g: &'a [T],
    x: &'a [T],
    layout: Layout,
    centre: &'a [T::Acc],
}

/// Elements that are widened at a time.
const CACHED: usize = 2048;

/// Room to widen both tensors.
struct Widened<R>([R; CACHED], [R; CACHED]);

impl<R: Real> Default for Widened<R> {
    fn default() -> Self {
        Self([R::default(); CACHED], [R::default(); CACHED])
    }
}

impl<T: Element> Reducer for DotReducer<'_, T> {
    type Partial = (f64, f64);
    type Scratch = Widened<T::Acc>;
    const COST_NS: f64 = 0.2;

    #[inline(always)]
    fn slices(
        &self,
        outer: Range<usize>,
        channel: usize,
        inner: Range<usize>,
        scratch: &mut Widened<T::Acc>,
    ) -> (f64, f64) {
        let mut total = (0.0, 0.0);
        let Widened(wide_g, wide_x) = scratch;
        for o in outer {
            let centre = self.centre[o / self.layout.outer_per_group() * self.layout.channels + channel];
            let first = (o * self.layout.channels + channel) * self.layout.inner;
            let mut start = first + inner.start;
            while start < first + inner.end {
                let end = (start + CACHED).min(first + inner.end);
                let (g, x) = (&self.g[start..end], &self.x[start..end]);
                let part = if let (Some(g), Some(x)) = (T::as_acc(g), T::as_acc(x)) {
                    T::Acc::dot_deviation(g, x, centre)
                } else {
                    T::load(g, &mut wide_g[..end - start]);
                    T::load(x, &mut wide_x[..end - start]);
                    T::Acc::dot_deviation(&wide_g[..end - start], &wide_x[..end - start], centre)
                };
                total = Self::merge(total, part);
                start = end;
            }
        }
        total
    }

    #[inline(always)]
    fn rows(&self, rows: Range<usize>, columns: Range<usize>, width: usize, out: &mut [(f64, f64)]) {
        const COLUMNS: usize = 256;
        let zero = T::Acc::default();
        let (mut wide_g, mut wide_x) = ([zero; COLUMNS], [zero; COLUMNS]);
        for first_column in columns.clone().step_by(COLUMNS) {
            let span = COLUMNS.min(columns.end - first_column);
            let out = &mut out[first_column - columns.start..][..span];
            for block in rows.clone().step_by(64) {
                let (mut first, mut second) = ([zero; COLUMNS], [zero; COLUMNS]);
                for row in block..(block + 64).min(rows.end) {
                    let group = row / self.layout.outer_per_group();
                    let centre = &self.centre[group * self.layout.channels + first_column..][..span];
                    let start = row * width + first_column;
                    T::load(&self.g[start..start + span], &mut wide_g[..span]);
                    T::load(&self.x[start..start + span], &mut wide_x[..span]);
                    for ((((a, b), &g), &x), &c) in
                        first.iter_mut().zip(&mut second).zip(&wide_g[..span]).zip(&wide_x).zip(centre)
                    {
                        *a = *a + g;
                        *b = *b + g * (x - c);
                    }
                }
                for (i, total) in out.iter_mut().enumerate() {
                    *total = Self::merge(*total, (first[i].to_f64(), second[i].to_f64()));
                }
            }
        }
    }

    #[inline(always)]
    fn merge(a: (f64, f64), b: (f64, f64)) -> (f64, f64) {
        (a.0 + b.0, a.1 + b.1)
    }
}
