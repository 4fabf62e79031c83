//! Exponential moving averages.

use crate::exec::for_each_chunk;
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

/// Elements per piece of a tensor, and per block of work.
const PIECE: usize = 1 << 15;

/// `tensor <- (1 - momentum) * tensor + momentum * value` for each pair, rounded once from the computing type.
///
/// One parallel loop over all pairs: many small tensors cost one start of the threads, not one each. Nothing is written
/// when the lengths of a pair differ.
pub fn ema_update<T: Element>(pairs: Vec<(&mut [T], &[T])>, momentum: f64, par: Par<'_>) -> Result<(), KernelError> {
    for (tensor, value) in &pairs {
        KernelError::check_len("ema_update_", "values", tensor.len(), value.len())?;
    }
    let total: usize = pairs.iter().map(|(tensor, _)| tensor.len()).sum();
    let mut pieces: Vec<(&mut [T], &[T])> =
        pairs.into_iter().flat_map(|(tensor, value)| tensor.chunks_mut(PIECE).zip(value.chunks(PIECE))).collect();
    // Small tensors share a block of work.
    let per_block = (pieces.len() * PIECE / total.max(1)).clamp(1, PIECE);
    for_each_chunk(par, &mut pieces, per_block, total as f64 * 0.3, |_, pieces| {
        for (target, value) in pieces {
            dispatch(Pass(target, value, momentum));
        }
    })
}

struct Pass<'a, T>(&'a mut [T], &'a [T], f64);

impl<T: Element> Vectorized for Pass<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        const CACHED: usize = 1024;
        let (keep, take) = (T::Acc::from_f64(1.0 - self.2), T::Acc::from_f64(self.2));
        let blend = |old: &mut [T::Acc], new: &[T::Acc]| {
            for (t, &v) in old.iter_mut().zip(new) {
                *t = keep * *t + take * v;
            }
        };
        if let (Some(old), Some(new)) = (T::as_acc_mut(self.0), T::as_acc(self.1)) {
            return blend(old, new);
        }
        let (mut old, mut new) = ([T::Acc::default(); CACHED], [T::Acc::default(); CACHED]);
        for (target, value) in self.0.chunks_mut(CACHED).zip(self.1.chunks(CACHED)) {
            let (old, new) = (&mut old[..target.len()], &mut new[..target.len()]);
            T::load(target, old);
            T::load(value, new);
            blend(old, new);
            T::store(old, target);
        }
    }
}
