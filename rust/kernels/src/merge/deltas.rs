//! Task vectors, tile by tile.

use super::philox;
use crate::exec::{block_count, for_each_chunk};
use crate::simd::{Element, Real, Reductions, Vectorized, dispatch};
use crate::{KernelError, Par};

/// Elements of a tile: those of several models, and what is made of them, stay in the first-level cache, and each is less
/// than a page, as far apart as which loads seem to depend on stores.
pub const TILE: usize = 256;
/// Elements of a block of work.
pub const BLOCK: usize = 128 * TILE;

/// Models and the base that their task vectors are taken from; without one it is 0.
#[derive(Clone, Copy)]
pub struct Deltas<'a, T> {
    base: Option<&'a [T]>,
    models: &'a [&'a [T]],
    len: usize,
}

impl<'a, T: Element> Deltas<'a, T> {
    /// All of one length.
    pub fn new(op: &'static str, base: Option<&'a [T]>, models: &'a [&'a [T]]) -> Result<Self, KernelError> {
        let len = base.or(models.first().copied()).map_or(0, <[T]>::len);
        for model in models {
            KernelError::check_len(op, "models", len, model.len())?;
        }
        Ok(Self { base, models, len })
    }

    /// Elements of each model.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of models.
    pub fn models(&self) -> usize {
        self.models.len()
    }

    /// Estimated time of a pass over all models on one thread.
    pub fn cost_ns(&self) -> f64 {
        (self.len * (self.models.len() + 1)) as f64 * 0.3
    }

    /// The base, or the first model.
    pub(super) fn first(&self) -> &'a [T] {
        self.base.or(self.models.first().copied()).unwrap_or(&[])
    }

    /// The base of a tile as long as `wide`, zeros without one; it is widened there where it must be.
    #[inline(always)]
    pub fn base<'b>(&self, first: usize, wide: &'b mut [T::Acc]) -> &'b [T::Acc]
    where
        'a: 'b,
    {
        if let Some(base) = self.base {
            return widened(&base[first..][..wide.len()], wide);
        }
        wide.fill(T::Acc::default());
        wide
    }

    /// As [`Deltas::base`], a model.
    #[inline(always)]
    pub fn model<'b>(&self, model: usize, first: usize, wide: &'b mut [T::Acc]) -> &'b [T::Acc]
    where
        'a: 'b,
    {
        widened(&self.models[model][first..][..wide.len()], wide)
    }

    /// The task vector of a model on a tile; `false` if it holds NaN or an infinity.
    #[inline(always)]
    pub fn load(&self, model: usize, first: usize, base: &[T::Acc], delta: &mut [T::Acc]) -> bool {
        let mut wide = [T::Acc::default(); TILE];
        subtract(self.model(model, first, &mut wide[..base.len()]), base, delta)
    }
}

/// The slice itself where it is of its type already.
#[inline(always)]
fn widened<'b, T: Element>(source: &'b [T], wide: &'b mut [T::Acc]) -> &'b [T::Acc] {
    if let Some(same) = T::as_acc(source) {
        return same;
    }
    T::load(source, wide);
    wide
}

/// `delta = model - base`; `false` if it holds NaN or an infinity.
#[inline(always)]
pub(super) fn subtract<R: Real>(model: &[R], base: &[R], delta: &mut [R]) -> bool {
    let infinity = R::from_f64(f64::INFINITY);
    // Whole numbers, of which the compiler may make lanes.
    let mut finite = 1_u32;
    for ((&model, &base), delta) in model.iter().zip(base).zip(delta) {
        let difference = model - base;
        *delta = difference;
        finite &= u32::from(difference.magnitude() < infinity);
    }
    finite == 1
}

/// Zeroes the entries of a tile that a stream of draws drops, each with probability `rate`.
#[inline(always)]
pub fn drop_out<R: Real>(rate: f64, key: u64, first: u64, delta: &mut [R]) {
    // A rate of 1 would drop all but the largest draw; callers keep below it.
    let limit = (rate * 4_294_967_296.0).round() as u32;
    let mut draws = [0; TILE];
    let draws = &mut draws[..delta.len()];
    philox::fill(key, first, draws);
    for (value, &draw) in delta.iter_mut().zip(&*draws) {
        *value = if draw < limit { R::default() } else { *value };
    }
}

/// Which entries of the task vectors count.
#[derive(Clone, Copy)]
pub struct Keep<'a, R> {
    /// Least and largest magnitude, for each model.
    pub low: &'a [R],
    /// See `low`.
    pub high: &'a [R],
    /// Probability of an entry to be dropped, 0 to below 1.
    pub drop_rate: f64,
    /// A stream of draws for each model; element `i` of the tensors takes draw `offset + i`.
    pub keys: &'a [u64],
    /// See `keys`.
    pub offset: u64,
}

impl<R: Real> Keep<'_, R> {
    /// Checks that there is one of everything for each of `models`.
    pub fn check(&self, op: &'static str, models: usize) -> Result<(), KernelError> {
        KernelError::check_len(op, "low", models, self.low.len())?;
        KernelError::check_len(op, "high", models, self.high.len())?;
        KernelError::check_len(op, "keys", models, self.keys.len())?;
        if !(0.0..1.0).contains(&self.drop_rate) {
            return Err(KernelError::argument(op, "drop_rate", "a rate from 0 to below 1", self.drop_rate.to_string()));
        }
        Ok(())
    }

    /// Zeroes what does not count.
    #[inline(always)]
    pub fn apply(&self, model: usize, first: usize, delta: &mut [R]) {
        let (low, high) = (self.low[model], self.high[model]);
        for value in &mut *delta {
            let magnitude = value.magnitude();
            *value = if magnitude >= low && magnitude <= high { *value } else { R::default() };
        }
        if self.drop_rate > 0.0 {
            drop_out(self.drop_rate, self.keys[model], self.offset + first as u64, delta);
        }
    }
}

/// A sum for each model, over blocks in order; `Err` holds the first model with NaN or an infinity.
fn sums<T: Element>(
    deltas: &Deltas<'_, T>,
    per_model: usize,
    par: Par<'_>,
    block_sums: impl Fn(usize, &mut [f64]) -> Option<usize> + Sync,
) -> Result<(Vec<f64>, Option<usize>), KernelError> {
    let width = deltas.models() * per_model;
    let mut parts = vec![(vec![0.0; width], None); block_count(deltas.len(), BLOCK)];
    for_each_chunk(par, &mut parts, 1, deltas.cost_ns(), |block, part| {
        for (sums, bad) in part {
            *bad = block_sums(block * BLOCK, sums);
        }
    })?;
    let mut totals = vec![0.0; width];
    for (sums, _) in &parts {
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    Ok((totals, parts.iter().filter_map(|part| part.1).min()))
}

/// Inner products of the task vectors with `gradient`, and the first model with NaN or an infinity.
pub fn dots<T: Element>(
    deltas: &Deltas<'_, T>,
    gradient: &[T],
    par: Par<'_>,
) -> Result<(Vec<f64>, Option<usize>), KernelError> {
    KernelError::check_len("merge_dots", "gradient", deltas.len(), gradient.len())?;
    sums(deltas, 1, par, |first, sums| dispatch(Dots { deltas, gradient, first, sums }))
}

struct Dots<'a, T> {
    deltas: &'a Deltas<'a, T>,
    gradient: &'a [T],
    first: usize,
    sums: &'a mut [f64],
}

impl<T: Element> Vectorized for Dots<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, gradient, first, sums } = self;
        let mut bad = None;
        let mut tile = [[T::Acc::default(); TILE]; 3];
        for start in (first..(first + BLOCK).min(deltas.len())).step_by(TILE) {
            let count = TILE.min(deltas.len() - start);
            let [base, delta, slope] = &mut tile;
            let (delta, slope) = (&mut delta[..count], &mut slope[..count]);
            let base = deltas.base(start, &mut base[..count]);
            T::load(&gradient[start..][..count], slope);
            for (model, sum) in sums.iter_mut().enumerate() {
                if !deltas.load(model, start, base, delta) {
                    bad = bad.or(Some(model));
                }
                let mut lanes = [0.0; 16];
                for (delta, slope) in delta.chunks(16).zip(slope.chunks(16)) {
                    for ((lane, delta), slope) in lanes.iter_mut().zip(delta).zip(slope) {
                        *lane += delta.to_f64() * slope.to_f64();
                    }
                }
                *sum += f64::sum(&lanes);
            }
        }
        bad
    }
}

/// For each model the sum of magnitudes of its task vector and of what [`Keep`] leaves of it.
pub fn magnitude_sums<T: Element>(
    op: &'static str,
    deltas: &Deltas<'_, T>,
    keep: &Keep<'_, T::Acc>,
    par: Par<'_>,
) -> Result<(Vec<f64>, Option<usize>), KernelError> {
    keep.check(op, deltas.models())?;
    sums(deltas, 2, par, |first, sums| dispatch(Magnitudes { deltas, keep, first, sums }))
}

struct Magnitudes<'a, T: Element> {
    deltas: &'a Deltas<'a, T>,
    keep: &'a Keep<'a, T::Acc>,
    first: usize,
    sums: &'a mut [f64],
}

impl<T: Element> Vectorized for Magnitudes<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<usize> {
        let Self { deltas, keep, first, sums } = self;
        let mut bad = None;
        let (mut base, mut delta) = ([T::Acc::default(); TILE], [T::Acc::default(); TILE]);
        let total = |delta: &[T::Acc]| {
            let mut lanes = [0.0; 16];
            for delta in delta.chunks(16) {
                for (lane, delta) in lanes.iter_mut().zip(delta) {
                    *lane += delta.to_f64().abs();
                }
            }
            f64::sum(&lanes)
        };
        for start in (first..(first + BLOCK).min(deltas.len())).step_by(TILE) {
            let count = TILE.min(deltas.len() - start);
            let delta = &mut delta[..count];
            let base = deltas.base(start, &mut base[..count]);
            for (model, sums) in sums.chunks_exact_mut(2).enumerate() {
                if !deltas.load(model, start, base, delta) {
                    bad = bad.or(Some(model));
                }
                sums[0] += total(delta);
                keep.apply(model, start, delta);
                sums[1] += total(delta);
            }
        }
        bad
    }
}
