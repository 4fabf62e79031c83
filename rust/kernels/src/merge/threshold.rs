//! The exact r-th largest of many values that are computed on the way, such as the magnitudes of a task vector.
//!
//! A sample brackets it; one pass counts what lies above the bracket and collects what lies inside, from which it is
//! selected. Where the sample misled (the pass notices), values are counted by their bits, sixteen at a time.

use super::deltas::{BLOCK, Deltas, TILE};
use crate::exec::{for_each_block, for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};
use std::sync::Mutex;

/// Neighbours in a sample. Most of the time goes into fetching a place; its neighbours come with it.
const RUN: usize = 16;
/// Values of a digit.
const DIGITS: usize = 1 << 16;

/// Values to rank, those of several models side by side.
pub(super) trait Ranked<R: Real>: Sync {
    /// Whether the largest of all is asked for, too.
    const LARGEST: bool;
    /// Values of each model.
    fn len(&self) -> usize;
    /// Fills one `TILE` of `values` for each model from `first` on, `count` of each; returns the first model with NaN or
    /// an infinity. `base` is for its use.
    fn fill<const FMA: bool>(&self, first: usize, count: usize, base: &mut [R], values: &mut [R]) -> Option<usize>;
}

/// The magnitudes of task vectors.
struct Magnitudes<'a, T>(Deltas<'a, T>);

impl<T: Element> Ranked<T::Acc> for Magnitudes<'_, T> {
    const LARGEST: bool = false;
    fn len(&self) -> usize {
        self.0.len()
    }
    #[inline(always)]
    fn fill<const FMA: bool>(
        &self,
        first: usize,
        count: usize,
        base: &mut [T::Acc],
        values: &mut [T::Acc],
    ) -> Option<usize> {
        let base = self.0.base(first, &mut base[..count]);
        let mut bad = None;
        for (model, values) in values.chunks_exact_mut(TILE).enumerate() {
            let values = &mut values[..count];
            if !self.0.load(model, first, base, values) {
                bad = bad.or(Some(model));
            }
            for value in values {
                *value = value.magnitude();
            }
        }
        bad
    }
}

/// For each model the `ranks`-th largest magnitude over all `pieces` together, and the first model with NaN or an
/// infinity, if any. Rank 0 gives `inf`, and a rank of all elements or more the smallest magnitude.
///
/// Every piece has the same number of models.
pub fn thresholds<T: Element>(
    pieces: &[Deltas<'_, T>],
    ranks: &[usize],
    par: Par<'_>,
) -> Result<(Vec<T::Acc>, Option<usize>), KernelError> {
    const OP: &str = "merge_thresholds";
    for piece in pieces {
        KernelError::check_len(OP, "models", ranks.len(), piece.models())?;
    }
    let magnitudes: Vec<_> = pieces.iter().map(|piece| Magnitudes(*piece)).collect();
    let cost = pieces.iter().map(Deltas::cost_ns).sum();
    let (found, bad) = kth_largest(&magnitudes, ranks, cost, par)?;
    Ok((found.into_iter().map(|found| found.value).collect(), bad))
}

/// What [`kth_largest`] finds of one model.
#[derive(Clone, Copy)]
pub(super) struct Found<R> {
    /// The value of the rank: `inf` for rank 0.
    pub value: R,
    /// The largest of all, if [`Ranked::LARGEST`].
    pub largest: R,
}

/// For each model the value of its rank, from 1, over all `pieces` together, and the first one with NaN or an infinity.
pub(super) fn kth_largest<R: Real>(
    pieces: &[impl Ranked<R>],
    ranks: &[usize],
    cost_ns: f64,
    par: Par<'_>,
) -> Result<(Vec<Found<R>>, Option<usize>), KernelError> {
    let infinity = R::from_f64(f64::INFINITY);
    let total: usize = pieces.iter().map(Ranked::len).sum();
    if total == 0 {
        return Ok((vec![Found { value: infinity, largest: infinity }; ranks.len()], None));
    }
    let samples = sample(pieces, total, ranks.len());
    let mut searches: Vec<_> = ranks.iter().map(|rank| Search::new((*rank).min(total), infinity)).collect();
    let sampled: usize = samples.iter().map(Vec::len).sum();
    let mut work: Vec<_> = searches.iter_mut().zip(samples).collect();
    for_each_chunk(par, &mut work, 1, sampled as f64 * 10.0, |_, work| {
        for (search, sample) in work {
            search.bracket(sample, total);
        }
    })?;
    drop(work);
    let (mut counts, bad) = count(pieces, &searches, cost_ns, par)?;
    let inside: usize = counts.iter().map(|counts| counts.inside.len()).sum();
    let mut work: Vec<_> = searches.iter_mut().zip(&mut counts).collect();
    for_each_chunk(par, &mut work, 1, inside as f64 * 10.0, |_, work| {
        for (search, counts) in work {
            search.finish(counts);
        }
    })?;
    drop(work);
    let mut found = Vec::with_capacity(ranks.len());
    for (model, (search, counts)) in searches.iter().zip(&counts).enumerate() {
        let value = match search.found {
            Some(value) => value,
            None => by_bits(pieces, model, ranks.len(), search.rank, cost_ns, par)?,
        };
        found.push(Found { value, largest: counts.largest });
    }
    Ok((found, bad))
}

struct Search<R> {
    /// From 1; 0 asks for nothing.
    rank: usize,
    low: R,
    high: R,
    found: Option<R>,
}

/// What a pass found of one model.
#[derive(Clone)]
struct Counts<R> {
    above: usize,
    at_high: usize,
    at_low: usize,
    inside: Vec<R>,
    largest: R,
}

impl<R: Real> Search<R> {
    fn new(rank: usize, infinity: R) -> Self {
        Self { rank, low: infinity, high: infinity, found: (rank == 0).then_some(infinity) }
    }

    /// Chooses the bracket from a sample that is made of runs.
    fn bracket(&mut self, sample: &mut [R], total: usize) {
        if self.rank == 0 {
            return;
        }
        let n = sample.len() as f64;
        let place = n * self.rank as f64 / total as f64;
        let runs = sample.to_vec();
        let middle = select(sample, (place as usize).min(runs.len() - 1));
        // Neighbours are alike, so that a run tells less than as many values from everywhere.
        let hits = runs.chunks(RUN).map(|run| run.iter().filter(|&&v| v >= middle).count() as f64);
        let mean = RUN as f64 * place / n;
        let variance: f64 = hits.map(|hits| (hits - mean) * (hits - mean)).sum();
        // Five standard deviations to either side, and a little for small samples.
        let slack = 5.0 * variance.sqrt() + 5.0;
        let (from, to) = (place - slack, place + slack);
        // Everything before the place is at least as large as what is there.
        let (larger, smaller) = sample.split_at_mut((place as usize).min(runs.len() - 1));
        if from >= 0.0 && !larger.is_empty() {
            self.high = select(larger, from as usize);
        }
        let beyond = to as usize - larger.len();
        self.low = if beyond < smaller.len() { select(smaller, beyond) } else { R::from_f64(f64::NEG_INFINITY) };
    }

    fn finish(&mut self, counts: &mut Counts<R>) {
        if self.found.is_some() || self.rank <= counts.above {
            return;
        }
        let at = self.rank - counts.above;
        self.found = if at <= counts.at_high {
            Some(self.high)
        } else if at <= counts.at_high + counts.inside.len() {
            let index = at - counts.at_high - 1;
            Some(select(&mut counts.inside, index))
        } else if at <= counts.at_high + counts.inside.len() + counts.at_low {
            Some(self.low)
        } else {
            None
        };
    }
}

/// The value that has `index` larger ones, or equal ones, before it; they are moved there.
fn select<R: Real>(values: &mut [R], index: usize) -> R {
    *values.select_nth_unstable_by_key(index, |v| !order(*v)).1
}

/// Whole numbers in the order of the values; NaN at either end, by its sign.
#[inline(always)]
fn order<R: Real>(value: R) -> u64 {
    let (bits, sign) = (value.bits(), 1 << (R::BITS - 1));
    if bits & sign == 0 { bits | sign } else { !bits & (sign | (sign - 1)) }
}

fn of_order<R: Real>(order: u64) -> R {
    let sign = 1 << (R::BITS - 1);
    R::of_bits(if order & sign == 0 { !order & (sign | (sign - 1)) } else { order ^ sign })
}

/// Values of each model: a few neighbours from each of equal stretches, at places that jump about so as not to follow a
/// pattern in the data.
fn sample<R: Real>(pieces: &[impl Ranked<R>], total: usize, models: usize) -> Vec<Vec<R>> {
    // The bracket holds about n / sqrt(sample) values, so that choosing it takes as long as choosing from it.
    let size = (total as f64).powf(2.0 / 3.0).mul_add(2.0, 4096.0).min(262_144.0) as usize;
    let number = (size / RUN).min(total);
    let (mut piece, mut start) = (0, 0);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut samples = vec![Vec::with_capacity(number * RUN); models];
    for i in 0..number {
        let (from, to) = (i * total / number, (i + 1) * total / number);
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let place = from + (state >> 33) as usize % (to - from);
        while place - start >= pieces[piece].len() {
            start += pieces[piece].len();
            piece += 1;
        }
        let count = RUN.min(to - place).min(pieces[piece].len() - (place - start));
        with_tile(models, |base, values| {
            dispatch(Fill { ranked: &pieces[piece], first: place - start, count, base, values: &mut *values });
            for (sample, values) in samples.iter_mut().zip(values.chunks_exact(TILE)) {
                sample.extend_from_slice(&values[..count]);
            }
        });
    }
    samples
}

/// Calls `body` with the memory that [`Ranked::fill`] needs.
fn with_tile<R: Real, O>(models: usize, body: impl FnOnce(&mut [R], &mut [R]) -> O) -> O {
    with_scratch((models + 1) * TILE, |memory| {
        let (base, values) = memory.split_at_mut(TILE);
        body(base, values)
    })
}

struct Fill<'a, R, S> {
    ranked: &'a S,
    first: usize,
    count: usize,
    base: &'a mut [R],
    values: &'a mut [R],
}

impl<R: Real, S: Ranked<R>> Vectorized for Fill<'_, R, S> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        self.ranked.fill::<FMA>(self.first, self.count, self.base, self.values)
    }
}

/// Of each model, and the first one with NaN or an infinity.
type Counted<R> = (Vec<Counts<R>>, Option<usize>);

fn count<R: Real>(
    pieces: &[impl Ranked<R>],
    searches: &[Search<R>],
    cost_ns: f64,
    par: Par<'_>,
) -> Result<Counted<R>, KernelError> {
    let blocks = pieces.iter().flat_map(|piece| (0..piece.len()).step_by(BLOCK).map(move |first| (piece, first)));
    let empty = || {
        let none = Counts { above: 0, at_high: 0, at_low: 0, inside: vec![], largest: R::from_f64(f64::NEG_INFINITY) };
        vec![none; searches.len()]
    };
    let mut work: Vec<_> = blocks.map(|(piece, first)| (piece, first, empty(), None)).collect();
    for_each_chunk(par, &mut work, 1, cost_ns, |_, work| {
        for (piece, first, counts, bad) in work {
            *bad = with_tile(searches.len(), |base, values| {
                dispatch(Count { piece: *piece, first: *first, searches, counts, base, values })
            });
        }
    })?;
    let mut totals = empty();
    for (_, _, counts, _) in &mut work {
        for (total, counts) in totals.iter_mut().zip(counts) {
            total.above += counts.above;
            total.at_high += counts.at_high;
            total.at_low += counts.at_low;
            total.inside.append(&mut counts.inside);
            total.largest = if counts.largest > total.largest { counts.largest } else { total.largest };
        }
    }
    Ok((totals, work.iter().filter_map(|(.., bad)| *bad).min()))
}

struct Count<'a, R, S> {
    piece: &'a S,
    first: usize,
    searches: &'a [Search<R>],
    counts: &'a mut [Counts<R>],
    base: &'a mut [R],
    values: &'a mut [R],
}

impl<R: Real, S: Ranked<R>> Vectorized for Count<'_, R, S> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { piece, first, searches, counts, base, values } = self;
        let mut bad = None;
        for start in (first..(first + BLOCK).min(piece.len())).step_by(TILE) {
            let number = TILE.min(piece.len() - start);
            if let Some(model) = piece.fill::<FMA>(start, number, base, values) {
                bad = bad.or(Some(model)).min(Some(model));
            }
            for ((search, counts), values) in searches.iter().zip(&mut *counts).zip(values.chunks_exact(TILE)) {
                counts.take::<S>(search, &values[..number]);
            }
        }
        bad
    }
}

impl<R: Real> Counts<R> {
    #[inline(always)]
    fn take<S: Ranked<R>>(&mut self, search: &Search<R>, values: &[R]) {
        let (low, high) = (search.low, search.high);
        let (mut above, mut at_high, mut at_low) = (0_u32, 0_u32, 0_u32);
        // Marks first and what is marked afterwards: the loop over all has no branches.
        let mut marks = [0_u8; TILE];
        for (&v, mark) in values.iter().zip(&mut marks) {
            above += u32::from(v > high);
            at_high += u32::from(v == high);
            at_low += u32::from(v == low);
            *mark = u8::from(v > low && v < high);
        }
        for (eight, marks) in values.chunks(8).zip(marks.as_chunks::<8>().0) {
            let mut marked = u64::from_le_bytes(*marks);
            while marked != 0 {
                self.inside.push(eight[marked.trailing_zeros() as usize / 8]);
                marked &= marked - 1;
            }
        }
        self.above += above as usize;
        self.at_high += at_high as usize;
        // A bracket of one value is counted once.
        self.at_low += if low == high { 0 } else { at_low as usize };
        if S::LARGEST {
            let largest = R::from_f64(R::min_max(values).1);
            self.largest = if largest > self.largest { largest } else { self.largest };
        }
    }
}

/// The search by bits: each round fixes sixteen more of a value's place in the order.
fn by_bits<R: Real>(
    pieces: &[impl Ranked<R>],
    model: usize,
    models: usize,
    rank: usize,
    cost_ns: f64,
    par: Par<'_>,
) -> Result<R, KernelError> {
    let (mut prefix, mut rank) = (0_u64, rank);
    for shift in (0..R::BITS).step_by(16).rev() {
        let blocks: Vec<_> = pieces
            .iter()
            .flat_map(|piece| (0..piece.len()).step_by(64 * BLOCK).map(move |first| (piece, first)))
            .collect();
        let totals = Mutex::new(vec![0_i64; DIGITS]);
        for_each_block(par, blocks.len(), cost_ns, |block| {
            let (piece, first) = blocks[block];
            let mut histogram = vec![0_u32; DIGITS];
            with_tile(models, |base, values| {
                for start in (first..(first + 64 * BLOCK).min(piece.len())).step_by(TILE) {
                    let count = TILE.min(piece.len() - start);
                    dispatch(Fill { ranked: piece, first: start, count, base: &mut *base, values: &mut *values });
                    digits(values[model * TILE..][..count].iter().map(|&v| order(v)), shift, prefix, &mut histogram);
                }
            });
            add_up(&histogram, &totals, |totals| totals);
        })?;
        let totals = totals.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut digit = DIGITS;
        while digit > 0 {
            digit -= 1;
            let number = totals[digit] as usize;
            if rank <= number {
                break;
            }
            rank -= number;
        }
        prefix = prefix << 16 | digit as u64;
    }
    Ok(of_order(prefix))
}

/// Counts the sixteen bits from `shift` on of those numbers whose bits above these are `prefix`.
#[inline(always)]
fn digits(numbers: impl Iterator<Item = u64>, shift: u32, prefix: u64, histogram: &mut [u32]) {
    for bits in numbers {
        // Shifting by all bits would be undefined in the first round.
        if bits >> shift >> 16 == prefix {
            histogram[(bits >> shift) as usize & (DIGITS - 1)] += 1;
        }
    }
}

/// Whole numbers: the order in which threads add theirs does not show.
fn add_up<C>(histogram: &[u32], shared: &Mutex<C>, totals: impl Fn(&mut C) -> &mut [i64]) {
    let mut held = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (total, &number) in totals(&mut held).iter_mut().zip(histogram) {
        *total += i64::from(number);
    }
}

/// Adds to each model's row of `counts`, `1 << 16` long, how often which sixteen bits, from bit `shift` on, are in the
/// magnitudes of its task vector whose bits above these are its `prefixes`. As magnitudes are not negative, the order of
/// their bits is that of their values.
pub fn count_digits<T: Element>(
    deltas: &Deltas<'_, T>,
    shift: u32,
    prefixes: &[u64],
    counts: &mut [i64],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "merge_count_digits";
    const CHUNK: usize = 32 * BLOCK;
    let models = deltas.models();
    KernelError::check_len(OP, "prefixes", models, prefixes.len())?;
    KernelError::check_len(OP, "counts", models * DIGITS, counts.len())?;
    if shift > T::Acc::BITS - 16 {
        return Err(KernelError::argument(OP, "shift", format!("at most {}", T::Acc::BITS - 16), shift.to_string()));
    }
    let rows: Vec<_> = counts.chunks_exact_mut(DIGITS).map(Mutex::new).collect();
    let blocks = deltas.len().div_ceil(CHUNK) * models;
    for_each_block(par, blocks, 4.0 * deltas.cost_ns(), |block| {
        // All models of a piece before the next one: its base stays in the cache.
        let (first, model) = (block / models * CHUNK, block % models);
        let mut histogram = vec![0_u32; DIGITS];
        dispatch(Digits {
            deltas,
            model,
            first,
            last: deltas.len().min(first + CHUNK),
            shift,
            prefix: prefixes[model],
            histogram: &mut histogram,
        });
        add_up(&histogram, &rows[model], |row| row);
    })
}

struct Digits<'a, T> {
    deltas: &'a Deltas<'a, T>,
    model: usize,
    first: usize,
    last: usize,
    shift: u32,
    prefix: u64,
    histogram: &'a mut [u32],
}

impl<T: Element> Vectorized for Digits<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { deltas, model, first, last, shift, prefix, histogram } = self;
        let (mut base, mut delta) = ([T::Acc::default(); TILE], [T::Acc::default(); TILE]);
        for start in (first..last).step_by(TILE) {
            let count = TILE.min(last - start);
            deltas.load(model, start, deltas.base(start, &mut base[..count]), &mut delta);
            digits(delta[..count].iter().map(|v| v.magnitude().bits()), shift, prefix, histogram);
        }
    }
}
