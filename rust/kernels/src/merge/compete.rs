//! Merging by competition of parameters, within each model and between them.

use super::combine::tiles;
use super::deltas::{BLOCK, Deltas, TILE};
use super::threshold::{Found, Ranked, kth_largest};
use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Reductions, Transcendental, Vectorized, dispatch};
use crate::{KernelError, Par};

/// `out = base + scale * sum_k w_k d_k / sum_k w_k` for the task vectors `d_k`, over all `pieces` together; returns the
/// first model with NaN or an infinity, if any.
///
/// Scores are `exp(K minmax(|d_k|)^2 - K) tanh(d_k sum d)`, and weights `w_k = minmax(max(score, t))` with `t` the
/// `rank`-th largest score of the model: 1 or 0 by the sign of the score where all that count are equal. Entries without
/// weights are those of the base, and so is everything for rank 0. Each score is good to 16 roundings of the type it is
/// computed in, relative to it.
pub fn compete<T: Element<Acc: Transcendental>>(
    pieces: &[Deltas<'_, T>],
    rank: usize,
    scale: T::Acc,
    outs: &mut [&mut [T]],
    par: Par<'_>,
) -> Result<Option<usize>, KernelError> {
    const OP: &str = "merge_compete";
    let models = pieces.first().map_or(0, Deltas::models);
    KernelError::check_len(OP, "out", pieces.len(), outs.len())?;
    for piece in pieces {
        KernelError::check_len(OP, "models", models, piece.models())?;
    }
    let cost = 4.0 * pieces.iter().map(Deltas::cost_ns).sum::<f64>();
    let (limits, bad) = limits(pieces, models, 0.25 * cost, par)?;
    if bad.is_some() {
        return Ok(bad);
    }
    let scores: Vec<_> = pieces.iter().map(|deltas| Scores { deltas, limits: &limits }).collect();
    let found = kth_largest(&scores, &vec![rank; models], cost, par)?.0;
    for (scores, out) in scores.iter().zip(outs) {
        tiles(scores.deltas, out, par, |start, out| {
            with_scratch((2 * models + 4) * TILE, |memory| {
                dispatch(CompeteTile { scores, found: &found, scale, start, out, memory });
            });
            None
        })?;
    }
    Ok(None)
}

/// What scores of a model depend on.
#[derive(Clone, Copy)]
struct Limits<R> {
    /// The least magnitude of its task vector.
    least: R,
    /// How far the largest is from it; `inf` where all are equal.
    spread: R,
    models: R,
}

impl<R: Transcendental> Limits<R> {
    #[inline(always)]
    fn score<const FMA: bool>(self, delta: R, total: R) -> R {
        let size = (delta.magnitude() - self.least) / self.spread;
        // Divided by the largest exponential, so that nothing overflows: the weights are the same.
        let within = ((size * size - R::from_f64(1.0)) * self.models).exp_lane::<FMA>();
        within * (delta * total).tanh_lane::<FMA>()
    }
}

/// Of each model, and the first one with NaN or an infinity.
type Limited<R> = (Vec<Limits<R>>, Option<usize>);

fn limits<T: Element>(
    pieces: &[Deltas<'_, T>],
    models: usize,
    cost_ns: f64,
    par: Par<'_>,
) -> Result<Limited<T::Acc>, KernelError> {
    let blocks = pieces.iter().flat_map(|piece| (0..piece.len()).step_by(BLOCK).map(move |first| (piece, first)));
    let empty = vec![(f64::INFINITY, 0.0); models];
    let mut work: Vec<_> = blocks.map(|(piece, first)| (piece, first, empty.clone(), None)).collect();
    for_each_chunk(par, &mut work, 1, cost_ns, |_, work| {
        for (deltas, first, found, bad) in work {
            *bad = dispatch(Extremes { deltas, first: *first, found });
        }
    })?;
    let mut all = empty;
    for (_, _, found, _) in &work {
        for (all, found) in all.iter_mut().zip(found) {
            *all = (all.0.min(found.0), all.1.max(found.1));
        }
    }
    let limits = all.iter().map(|&(least, most)| Limits {
        least: T::Acc::from_f64(least),
        spread: T::Acc::from_f64(if most > least { most - least } else { f64::INFINITY }),
        models: T::Acc::from_f64(models as f64),
    });
    Ok((limits.collect(), work.iter().filter_map(|(.., bad)| *bad).min()))
}

struct Extremes<'a, T> {
    deltas: &'a Deltas<'a, T>,
    first: usize,
    found: &'a mut [(f64, f64)],
}

impl<T: Element> Vectorized for Extremes<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, first, found } = self;
        let mut bad: Option<usize> = None;
        let (mut wide, mut delta) = ([T::Acc::default(); TILE], [T::Acc::default(); TILE]);
        for start in (first..(first + BLOCK).min(deltas.len())).step_by(TILE) {
            let count = TILE.min(deltas.len() - start);
            let base = deltas.base(start, &mut wide[..count]);
            for (model, found) in found.iter_mut().enumerate() {
                if !deltas.load(model, start, base, &mut delta) {
                    bad = Some(bad.map_or(model, |bad| bad.min(model)));
                }
                for v in &mut delta[..count] {
                    *v = v.magnitude();
                }
                let (least, most) = T::Acc::min_max(&delta[..count]);
                *found = (found.0.min(least), found.1.max(most));
            }
        }
        bad
    }
}

struct Scores<'a, T: Element> {
    deltas: &'a Deltas<'a, T>,
    limits: &'a [Limits<T::Acc>],
}

impl<T: Element<Acc: Transcendental>> Scores<'_, T> {
    /// The task vectors of a tile, and their sum.
    #[inline(always)]
    fn load(&self, first: usize, base: &[T::Acc], total: &mut [T::Acc], values: &mut [T::Acc]) {
        total.fill(T::Acc::default());
        for (model, values) in values.chunks_exact_mut(TILE).enumerate() {
            self.deltas.load(model, first, base, values);
            for (total, &value) in total.iter_mut().zip(&*values) {
                *total = *total + value;
            }
        }
    }
}

impl<T: Element<Acc: Transcendental>> Ranked<T::Acc> for Scores<'_, T> {
    const LARGEST: bool = true;
    fn len(&self) -> usize {
        self.deltas.len()
    }
    #[inline(always)]
    fn fill<const FMA: bool>(
        &self,
        first: usize,
        count: usize,
        base: &mut [T::Acc],
        values: &mut [T::Acc],
    ) -> Option<usize> {
        let mut total = [T::Acc::default(); TILE];
        let total = &mut total[..count];
        self.load(first, self.deltas.base(first, &mut base[..count]), total, values);
        for (values, &limits) in values.chunks_exact_mut(TILE).zip(self.limits) {
            for (value, &total) in values.iter_mut().zip(&*total) {
                *value = limits.score::<FMA>(*value, total);
            }
        }
        // Whatever is not finite has been met before.
        None
    }
}

struct CompeteTile<'a, T: Element> {
    scores: &'a Scores<'a, T>,
    found: &'a [Found<T::Acc>],
    scale: T::Acc,
    start: usize,
    out: &'a mut [T],
    memory: &'a mut [T::Acc],
}

impl<T: Element<Acc: Transcendental>> Vectorized for CompeteTile<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { scores, found, scale, start, out, memory } = self;
        let (zero, one) = (T::Acc::default(), T::Acc::from_f64(1.0));
        let count = out.len();
        let (wide, memory) = memory.split_at_mut(TILE);
        let (total, memory) = memory.split_at_mut(TILE);
        let (above, memory) = memory.split_at_mut(TILE);
        let (below, values) = memory.split_at_mut(TILE);
        let values = &mut values[..found.len() * TILE];
        let (total, above, below) = (&mut total[..count], &mut above[..count], &mut below[..count]);
        let base = scores.deltas.base(start, &mut wide[..count]);
        scores.load(start, base, total, values);
        above.fill(zero);
        below.fill(zero);
        for ((values, found), &limits) in values.chunks_exact(TILE).zip(found).zip(scores.limits) {
            let (least, spread) = (found.value, found.largest - found.value);
            let uneven = found.largest > found.value;
            let cells = values.iter().zip(&*total).zip(&mut *above).zip(&mut *below);
            for (((&delta, &total), above), below) in cells {
                let score = limits.score::<FMA>(delta, total);
                let ahead = if score > least { score - least } else { zero };
                let equal = if score >= least && score > zero { one } else { zero };
                let weight = if uneven { ahead / spread } else { equal };
                *below = *below + weight;
                *above = *above + weight * delta;
            }
        }
        for ((above, &below), &base) in above.iter_mut().zip(&*below).zip(base) {
            let delta = if below > zero { *above / below } else { zero };
            *above = base + scale * delta;
        }
        T::store(above, out);
    }
}
