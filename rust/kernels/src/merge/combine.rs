//! One model out of many.

use super::deltas::{BLOCK, Deltas, Keep, TILE};
use crate::exec::{Block, Io, with_scratch};
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Whether signs are elected, and by which sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elect {
    /// Every entry counts.
    None,
    /// Entries with the sign of the sum of all count.
    Unweighted,
    /// Entries that, times their weight, have the sign of the weighted sum count.
    Weighted,
}

/// What the sum of those that count is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divide {
    /// Nothing.
    None,
    /// Their number.
    Count,
    /// The sum of their weights; by 1 where it is below 1e-8.
    Weight,
}

/// How [`masked`] combines task vectors.
pub struct Masked<'a, R> {
    /// Which entries count.
    pub keep: Keep<'a, R>,
    /// Factor of each model's entries, before signs are elected.
    pub rescale: &'a [R],
    /// Weight of each model.
    pub weights: &'a [R],
    /// Factor of the combined task vector.
    pub scale: R,
    /// How signs are elected.
    pub elect: Elect,
    /// What sums are divided by.
    pub divide: Divide,
    /// The sign elected where the sum is 0.
    pub tie: R,
}

/// Runs `tile(start, base, out)` over all tiles; returns the least number that one of them found bad.
pub(super) fn tiles<T: Element>(
    deltas: &Deltas<'_, T>,
    out: &mut [T],
    par: Par<'_>,
    tile: impl Fn(usize, &mut [T]) -> Option<usize> + Sync,
) -> Result<Option<usize>, KernelError> {
    let first_bad = AtomicUsize::new(usize::MAX);
    let source = deltas.first();
    let Some(mut io) = Io::split(source, out) else {
        return Err(KernelError::argument("merge", "out", format!("{} elements", source.len()), "another number"));
    };
    io.for_each(par, BLOCK, deltas.cost_ns(), |start, block| {
        let (Block::Split(_, out) | Block::InPlace(out)) = block;
        for (i, out) in out.chunks_mut(TILE).enumerate() {
            if let Some(model) = tile(start + i * TILE, out) {
                first_bad.fetch_min(model, Ordering::Relaxed);
            }
        }
    })?;
    let found = first_bad.into_inner();
    Ok((found != usize::MAX).then_some(found))
}

/// `out = base + sum_k weights_k (model_k - base)`; returns the first model with NaN or an infinity, if any.
pub fn linear<T: Element>(
    deltas: &Deltas<'_, T>,
    weights: &[T::Acc],
    out: &mut [T],
    par: Par<'_>,
) -> Result<Option<usize>, KernelError> {
    KernelError::check_len("merge_linear", "weights", deltas.models(), weights.len())?;
    tiles(deltas, out, par, |start, out| dispatch(LinearTile { deltas, weights, start, out }))
}

struct LinearTile<'a, T: Element> {
    deltas: &'a Deltas<'a, T>,
    weights: &'a [T::Acc],
    start: usize,
    out: &'a mut [T],
}

impl<T: Element> Vectorized for LinearTile<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, weights, start, out } = self;
        let mut bad = None;
        let [mut base, mut sum, mut delta] = [[T::Acc::default(); TILE]; 3];
        let (sum, delta) = (&mut sum[..out.len()], &mut delta[..out.len()]);
        let base = deltas.base(start, &mut base[..out.len()]);
        for (model, &weight) in weights.iter().enumerate() {
            if !deltas.load(model, start, base, delta) {
                bad = bad.or(Some(model));
            }
            for (sum, &delta) in sum.iter_mut().zip(&*delta) {
                *sum = *sum + weight * delta;
            }
        }
        for (sum, &base) in sum.iter_mut().zip(base) {
            *sum = base + *sum;
        }
        T::store(sum, out);
        bad
    }
}

/// `out = base + scale * combination of the task vectors`; returns the first model with NaN or an infinity, if any.
///
/// Entries outside their model's range of magnitudes, or dropped, are 0; each is multiplied by its model's `rescale`. The
/// sum over those that agree with the elected sign, by their weights, is divided as told.
pub fn masked<T: Element>(
    deltas: &Deltas<'_, T>,
    how: &Masked<'_, T::Acc>,
    out: &mut [T],
    par: Par<'_>,
) -> Result<Option<usize>, KernelError> {
    const OP: &str = "merge_masked";
    how.keep.check(OP, deltas.models())?;
    KernelError::check_len(OP, "weights", deltas.models(), how.weights.len())?;
    KernelError::check_len(OP, "rescale", deltas.models(), how.rescale.len())?;
    tiles(deltas, out, par, |start, out| {
        with_scratch((deltas.models() + 4) * TILE, |memory| dispatch(MaskedTile { deltas, how, start, out, memory }))
    })
}

struct MaskedTile<'a, T: Element> {
    deltas: &'a Deltas<'a, T>,
    how: &'a Masked<'a, T::Acc>,
    start: usize,
    out: &'a mut [T],
    memory: &'a mut [T::Acc],
}

impl<T: Element> Vectorized for MaskedTile<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, how, start, out, memory } = self;
        let (zero, one) = (T::Acc::default(), T::Acc::from_f64(1.0));
        let (base, memory) = memory.split_at_mut(TILE);
        let (elected, memory) = memory.split_at_mut(TILE);
        let (sum, memory) = memory.split_at_mut(TILE);
        let (divisor, all) = memory.split_at_mut(TILE);
        let count = out.len();
        let (elected, sum, divisor) = (&mut elected[..count], &mut sum[..count], &mut divisor[..count]);
        let mut bad = None;
        let base = deltas.base(start, &mut base[..count]);
        elected.fill(zero);
        for (model, delta) in all.chunks_exact_mut(TILE).enumerate() {
            let delta = &mut delta[..count];
            if !deltas.load(model, start, base, delta) {
                bad = bad.or(Some(model));
            }
            how.keep.apply(model, start, delta);
            let (rescale, weight) = (how.rescale[model], how.weights[model]);
            let vote = if how.elect == Elect::Weighted { weight } else { one };
            for (delta, elected) in delta.iter_mut().zip(&mut *elected) {
                *delta = *delta * rescale;
                *elected = *elected + vote * *delta;
            }
        }
        let (tie, scale) = (how.tie, how.scale);
        for sign in &mut *elected {
            let total = if *sign == zero { tie } else { *sign };
            let [positive, negative] = [total > zero, total < zero].map(|holds| if holds { one } else { zero });
            *sign = positive - negative;
        }
        sum.fill(zero);
        divisor.fill(zero);
        for (model, delta) in all.chunks_exact(TILE).enumerate() {
            let weight = how.weights[model];
            let share = if how.divide == Divide::Weight { weight } else { one };
            let vote = match how.elect {
                Elect::Weighted if weight < zero => zero - one,
                // No weight, no vote.
                Elect::Weighted if weight == zero => zero,
                _ => one,
            };
            let cells = delta[..count].iter().zip(&*elected).zip(&mut *sum).zip(&mut *divisor);
            if how.elect == Elect::None {
                for (((&delta, _), sum), divisor) in cells {
                    *sum = *sum + weight * delta;
                    *divisor = *divisor + share;
                }
            } else {
                for (((&delta, &sign), sum), divisor) in cells {
                    // Signs are 1, -1 or 0, so nothing rounds here.
                    let agrees = vote * delta * sign > zero;
                    *sum = *sum + if agrees { weight * delta } else { zero };
                    *divisor = *divisor + if agrees { share } else { zero };
                }
            }
        }
        let small = T::Acc::from_f64(1e-8);
        let divides = how.divide != Divide::None;
        for ((sum, &divisor), &base) in sum.iter_mut().zip(&*divisor).zip(base) {
            let divisor = if divides & (divisor.magnitude() >= small) { divisor } else { one };
            *sum = base + scale * (*sum / divisor);
        }
        T::store(sum, out);
        bad
    }
}
