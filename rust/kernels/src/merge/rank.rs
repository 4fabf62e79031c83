//! Ranks by magnitude, and task vectors of which entries are dropped with chances that follow their ranks.

use super::deltas::{BLOCK, Deltas, TILE};
use super::philox;
use crate::exec::for_each_chunk;
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bits of a digit to sort by, and values of it.
const DIGIT: u32 = 11;
const DIGITS: usize = 1 << DIGIT;
/// Rows that are shorter are sorted by comparisons: counting digits would take longer.
const SHORT: usize = 1 << 8;

/// Entries and their places.
type Order<R> = Vec<(R, u32)>;

/// Sorts by magnitude, equal ones by their place; `spare` is for its use.
fn sort<R: Real>(entries: &mut Order<R>, spare: &mut Order<R>) {
    let key = |v: R| v.magnitude().bits();
    if entries.len() < SHORT {
        entries.sort_unstable_by_key(|&(v, place)| (key(v), place));
        return;
    }
    let shifts: Vec<u32> = (0..R::BITS - 1).step_by(DIGIT as usize).collect();
    let mut counts = vec![[0_u32; DIGITS]; shifts.len()];
    for &(v, _) in &*entries {
        for (counts, shift) in counts.iter_mut().zip(&shifts) {
            counts[(key(v) >> shift) as usize % DIGITS] += 1;
        }
    }
    spare.resize(entries.len(), (R::default(), 0));
    for (counts, shift) in counts.iter_mut().zip(shifts) {
        if counts.iter().any(|&count| count as usize == entries.len()) {
            continue;
        }
        let mut next = 0;
        for count in counts.iter_mut() {
            (*count, next) = (next, next + *count);
        }
        for &(v, place) in &*entries {
            let next = &mut counts[(key(v) >> shift) as usize % DIGITS];
            spare[*next as usize] = (v, place);
            *next += 1;
        }
        std::mem::swap(entries, spare);
    }
}

fn check_row(op: &'static str, row: usize, len: usize) -> Result<(), KernelError> {
    if len > 0 && (row == 0 || !len.is_multiple_of(row) || row > u32::MAX as usize) {
        return Err(KernelError::argument(op, "row", format!("a part of {len} elements"), row.to_string()));
    }
    Ok(())
}

/// `out[i]`: how many entries of its row have a smaller magnitude, or the same and an earlier place.
pub fn ranks<R: Real>(x: &[R], row: usize, out: &mut [i64], par: Par<'_>) -> Result<(), KernelError> {
    const OP: &str = "merge_ranks";
    check_row(OP, row, x.len())?;
    KernelError::check_len(OP, "out", x.len(), out.len())?;
    let rows = (BLOCK / row.max(1)).max(1);
    for_each_chunk(par, out, rows * row, x.len() as f64 * 20.0, |block, out| {
        let (mut entries, mut spare) = (Order::new(), Order::new());
        for (x, out) in x[block * rows * row..].chunks(row).zip(out.chunks_mut(row)) {
            entries.clear();
            entries.extend(x.iter().copied().zip(0..));
            sort(&mut entries, &mut spare);
            for (rank, &(_, place)) in (0..).zip(&entries) {
                out[place as usize] = rank;
            }
        }
    })
}

/// Chances by rank, for [`rank_drop`].
#[derive(Clone, Copy)]
pub struct RankDrop<R> {
    /// Share of the entries to be kept, on the average of a row.
    pub density: f64,
    /// How much likelier the smallest of a row is dropped than the largest.
    pub epsilon: f64,
    /// Factor of what is kept; by default one by the chance to be kept.
    pub rescale: Option<R>,
    /// The stream of draws; element `i` takes draw `offset + i`.
    pub key: u64,
}

/// What is kept of task vectors, model by model in `out`: within each row the entry of rank `i` from the smallest is
/// dropped with chance `1 - density - epsilon * (i - (n - 1) / 2) / (n - 1)`. Returns the first model with NaN or an
/// infinity, if any.
pub fn rank_drop<T: Element>(
    deltas: &Deltas<'_, T>,
    row: usize,
    how: &[RankDrop<T::Acc>],
    offset: u64,
    out: &mut [T::Acc],
    par: Par<'_>,
) -> Result<Option<usize>, KernelError> {
    const OP: &str = "merge_rank_drop";
    let (len, models) = (deltas.len(), deltas.models());
    check_row(OP, row, len)?;
    KernelError::check_len(OP, "density", models, how.len())?;
    KernelError::check_len(OP, "out", models * len, out.len())?;
    if out.is_empty() {
        return Ok(None);
    }
    let chances: Vec<_> = how.iter().map(|how| chances(row, how)).collect();
    let span = (BLOCK / row).max(1) * row;
    let first_bad = AtomicUsize::new(usize::MAX);
    let mut work: Vec<_> = out
        .chunks_mut(len)
        .enumerate()
        .flat_map(|(model, out)| out.chunks_mut(span).enumerate().map(move |(i, out)| (model, i * span, out)))
        .collect();
    for_each_chunk(par, &mut work, 1, (len * models) as f64 * 20.0, |_, work| {
        let (mut entries, mut spare) = (Order::new(), Order::new());
        for (model, first, out) in work {
            let mut draws = vec![0; out.len()];
            let key = how[*model].key;
            if !dispatch(Load { deltas, model: *model, first: *first, out, key, offset, draws: &mut draws }) {
                first_bad.fetch_min(*model, Ordering::Relaxed);
            }
            for (out, draws) in out.chunks_mut(row).zip(draws.chunks(row)) {
                entries.clear();
                entries.extend(out.iter().copied().zip(0..));
                sort(&mut entries, &mut spare);
                for (&(value, place), &(limit, factor)) in entries.iter().zip(&chances[*model]) {
                    let kept = u64::from(draws[place as usize]) >= limit;
                    out[place as usize] = if kept { value * factor } else { T::Acc::default() };
                }
            }
        }
    })?;
    let found = first_bad.into_inner();
    Ok((found != usize::MAX).then_some(found))
}

/// For each rank of a row the least draw that keeps an entry, and the factor of what is kept.
fn chances<R: Real>(row: usize, how: &RankDrop<R>) -> Vec<(u64, R)> {
    let chance = |rank: usize| {
        // The way from the smallest to the largest, -1/2 to 1/2; a single entry is in the middle.
        let step = (rank as f64 - (row as f64 - 1.0) / 2.0) / (row as f64 - 1.0).max(1.0);
        let rate = 1.0 - how.density - how.epsilon * step;
        let factor = how.rescale.unwrap_or_else(|| R::from_f64(1.0 / (1.0 - rate)));
        ((rate * 4_294_967_296.0).round_ties_even() as u64, factor)
    };
    (0..row).map(chance).collect()
}

/// A stretch of a task vector, and its draws.
struct Load<'a, T: Element> {
    deltas: &'a Deltas<'a, T>,
    model: usize,
    first: usize,
    out: &'a mut [T::Acc],
    key: u64,
    offset: u64,
    draws: &'a mut [u32],
}

impl<T: Element> Vectorized for Load<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> bool {
        let Self { deltas, model, first, out, key, offset, draws } = self;
        let mut finite = true;
        let mut wide = [T::Acc::default(); TILE];
        for (i, out) in out.chunks_mut(TILE).enumerate() {
            let start = first + i * TILE;
            let base = deltas.base(start, &mut wide[..out.len()]);
            finite &= deltas.load(model, start, base, out);
        }
        philox::fill(key, offset + first as u64, draws);
        finite
    }
}
