//! The exact r-th largest magnitude of a task vector.
//!
//! A sample brackets it; one pass counts what lies above the bracket and collects what lies inside, from which it is
//! selected. Where the sample misled (the pass notices), magnitudes are counted by their bits, sixteen at a time.

use super::deltas::{BLOCK, Deltas, TILE};
use crate::exec::for_each_chunk;
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

/// Magnitudes that the bracket is taken from.
const SAMPLE: usize = 1 << 16;
/// Lanes that are counted side by side.
const LANES: usize = 32;

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
    let total: usize = pieces.iter().map(Deltas::len).sum();
    if total == 0 {
        return Ok((vec![T::Acc::from_f64(f64::INFINITY); ranks.len()], None));
    }
    let mut searches: Vec<_> =
        ranks.iter().enumerate().map(|(model, &rank)| Search::start(pieces, total, model, rank.min(total))).collect();
    let (counts, bad) = count(pieces, &searches, par)?;
    for (search, counts) in searches.iter_mut().zip(counts) {
        search.finish(counts);
    }
    let found = searches.iter().enumerate().map(|(model, search)| match search.found {
        Some(found) => Ok(found),
        None => by_bits(pieces, model, search.rank, par),
    });
    Ok((found.collect::<Result<_, _>>()?, bad))
}

struct Search<R> {
    /// From 1; 0 asks for nothing.
    rank: usize,
    low: R,
    high: R,
    found: Option<R>,
}

/// What a pass found of one model.
#[derive(Clone, Default)]
struct Counts<R> {
    above: usize,
    at_high: usize,
    at_low: usize,
    inside: Vec<R>,
}

impl<R: Real> Search<R> {
    fn start<T: Element<Acc = R>>(pieces: &[Deltas<'_, T>], total: usize, model: usize, rank: usize) -> Self {
        let infinity = R::from_f64(f64::INFINITY);
        if rank == 0 {
            return Self { rank, low: infinity, high: infinity, found: Some(infinity) };
        }
        let mut sample = sample(pieces, total, model);
        let n = sample.len() as f64;
        let share = rank as f64 / total as f64;
        // Five standard deviations to either side, and a little for small samples.
        let slack = 5.0 * (n * share * (1.0 - share)).sqrt() + 5.0;
        let (from, to) = (share * n - slack, share * n + slack);
        let low = if to as usize >= sample.len() { R::default() } else { select(&mut sample, to as usize) };
        let high = if from < 0.0 { infinity } else { select(&mut sample, from as usize) };
        Self { rank, low, high, found: None }
    }

    fn finish(&mut self, mut counts: Counts<R>) {
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

/// The value that has `index` larger ones, or equal ones, before it.
fn select<R: Real>(values: &mut [R], index: usize) -> R {
    // The bits of numbers that are not negative are in their order, NaN above all.
    *values.select_nth_unstable_by_key(index, |v| std::cmp::Reverse(v.bits())).1
}

/// A few neighbours from each of equal stretches, at places that jump about so as not to follow a pattern in the data.
///
/// Most of the time goes into fetching a place; its neighbours come with it.
fn sample<T: Element>(pieces: &[Deltas<'_, T>], total: usize, model: usize) -> Vec<T::Acc> {
    const RUN: usize = 16;
    let number = (SAMPLE / RUN).min(total);
    let (mut piece, mut start) = (0, 0);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut magnitudes = Vec::with_capacity(number * RUN);
    for i in 0..number {
        let (from, to) = (i * total / number, (i + 1) * total / number);
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let place = from + (state >> 33) as usize % (to - from);
        while place - start >= pieces[piece].len() {
            start += pieces[piece].len();
            piece += 1;
        }
        let count = RUN.min(to - place).min(pieces[piece].len() - (place - start));
        let (mut base, mut delta) = ([T::Acc::default(); RUN], [T::Acc::default(); RUN]);
        pieces[piece].load_base(place - start, &mut base[..count]);
        pieces[piece].load(model, place - start, &base[..count], &mut delta);
        magnitudes.extend(delta[..count].iter().map(|v| v.magnitude()));
    }
    magnitudes
}

/// Of each model, and the first one with NaN or an infinity.
type Counted<R> = (Vec<Counts<R>>, Option<usize>);

fn count<T: Element>(
    pieces: &[Deltas<'_, T>],
    searches: &[Search<T::Acc>],
    par: Par<'_>,
) -> Result<Counted<T::Acc>, KernelError> {
    let blocks = pieces.iter().flat_map(|piece| (0..piece.len()).step_by(BLOCK).map(move |first| (piece, first)));
    let empty = || vec![Counts::default(); searches.len()];
    let mut work: Vec<_> = blocks.map(|(piece, first)| (piece, first, empty(), None)).collect();
    let cost: f64 = pieces.iter().map(Deltas::cost_ns).sum();
    for_each_chunk(par, &mut work, 1, cost, |_, work| {
        for (piece, first, counts, bad) in work {
            *bad = dispatch(Count { piece, first: *first, searches, counts });
        }
    })?;
    let mut totals = empty();
    for (_, _, counts, _) in &mut work {
        for (total, counts) in totals.iter_mut().zip(counts) {
            total.above += counts.above;
            total.at_high += counts.at_high;
            total.at_low += counts.at_low;
            total.inside.append(&mut counts.inside);
        }
    }
    Ok((totals, work.iter().filter_map(|(.., bad)| *bad).min()))
}

struct Count<'a, T: Element> {
    piece: &'a Deltas<'a, T>,
    first: usize,
    searches: &'a [Search<T::Acc>],
    counts: &'a mut [Counts<T::Acc>],
}

impl<T: Element> Vectorized for Count<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { piece, first, searches, counts } = self;
        let mut bad = None;
        let (mut base, mut delta) = ([T::Acc::default(); TILE], [T::Acc::default(); TILE]);
        for start in (first..(first + BLOCK).min(piece.len())).step_by(TILE) {
            let count = TILE.min(piece.len() - start);
            let (base, delta) = (&mut base[..count], &mut delta[..count]);
            piece.load_base(start, base);
            for (model, (search, counts)) in searches.iter().zip(&mut *counts).enumerate() {
                if !piece.load(model, start, base, delta) {
                    bad = bad.or(Some(model));
                }
                let (low, high) = (search.low, search.high);
                let (mut above, mut at_high, mut at_low) = ([0_u32; LANES], [0_u32; LANES], [0_u32; LANES]);
                let (strips, rest) = delta.as_chunks::<LANES>();
                for strip in strips {
                    let mut inside = false;
                    for lane in 0..LANES {
                        let v = strip[lane].magnitude();
                        above[lane] += u32::from(v > high);
                        at_high[lane] += u32::from(v == high);
                        at_low[lane] += u32::from(v == low);
                        inside |= v > low && v < high;
                    }
                    if inside {
                        // Without branches, which would be guessed wrongly half of the time.
                        let (mut kept, mut number) = ([T::Acc::default(); LANES], 0);
                        for value in strip {
                            let v = value.magnitude();
                            kept[number % LANES] = v;
                            number += usize::from(v > low && v < high);
                        }
                        counts.inside.extend_from_slice(&kept[..number]);
                    }
                }
                for v in rest.iter().map(|v| v.magnitude()) {
                    above[0] += u32::from(v > high);
                    at_high[0] += u32::from(v == high);
                    at_low[0] += u32::from(v == low);
                    if v > low && v < high {
                        counts.inside.push(v);
                    }
                }
                counts.above += above.iter().sum::<u32>() as usize;
                // A bracket of one value is counted once.
                counts.at_high += at_high.iter().sum::<u32>() as usize;
                counts.at_low += if low == high { 0 } else { at_low.iter().sum::<u32>() as usize };
            }
        }
        bad
    }
}

/// The search by bits: each round fixes sixteen more of the magnitude's.
fn by_bits<T: Element>(
    pieces: &[Deltas<'_, T>],
    model: usize,
    rank: usize,
    par: Par<'_>,
) -> Result<T::Acc, KernelError> {
    const DIGITS: usize = 1 << 16;
    let (mut prefix, mut rank) = (0_u64, rank);
    for shift in (0..T::Acc::BITS).step_by(16).rev() {
        let blocks =
            pieces.iter().flat_map(|piece| (0..piece.len()).step_by(64 * BLOCK).map(move |first| (piece, first)));
        let mut work: Vec<_> = blocks.map(|(piece, first)| (piece, first, Vec::new())).collect();
        let cost: f64 = pieces.iter().map(Deltas::cost_ns).sum();
        for_each_chunk(par, &mut work, 1, cost, |_, work| {
            for (piece, first, histogram) in work {
                *histogram = vec![0_u32; DIGITS];
                let (mut base, mut delta) = ([T::Acc::default(); TILE], [T::Acc::default(); TILE]);
                for start in (*first..(*first + 64 * BLOCK).min(piece.len())).step_by(TILE) {
                    let count = TILE.min(piece.len() - start);
                    piece.load_base(start, &mut base[..count]);
                    piece.load(model, start, &base[..count], &mut delta);
                    for v in &delta[..count] {
                        let bits = v.magnitude().bits();
                        // Shifting by all bits would be undefined in the first round.
                        if bits >> shift >> 16 == prefix {
                            histogram[(bits >> shift) as usize & (DIGITS - 1)] += 1;
                        }
                    }
                }
            }
        })?;
        let mut digit = DIGITS;
        while digit > 0 {
            digit -= 1;
            let number: usize = work.iter().map(|(.., histogram)| histogram[digit] as usize).sum();
            if rank <= number {
                break;
            }
            rank -= number;
        }
        prefix = prefix << 16 | digit as u64;
    }
    Ok(T::Acc::of_bits(prefix))
}
