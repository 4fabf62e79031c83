//! Exponential moving averages.

use crate::exec::{Block, Io};
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

/// `tensor <- (1 - momentum) * tensor + momentum * value`, rounded once from the computing type.
pub fn ema_update<T: Element>(tensor: &mut [T], value: &[T], momentum: f64, par: Par<'_>) -> Result<(), KernelError> {
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
    KernelError::check_len("ema_update_", "values", tensor.len(), value.len())?;
    let cost = tensor.len() as f64 * 0.5;
    Io::in_place(tensor).for_each(par, 1 << 15, cost, |start, block| {
        if let Block::InPlace(target) = block {
            let value = &value[start..start + target.len()];
            dispatch(Pass(target, value, momentum));
        }
    })
}
