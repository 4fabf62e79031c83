//! One vectorised pass over a slice.
//!
//! A loop body is written once, over fixed-width lanes, and compiled for several instruction sets; [`dispatch`] picks
//! the widest one the processor has, once per block of work. The order of every sum is fixed by the lanes, not by the
//! instruction set, so sums have the same bits everywhere but in attention, whose panels are as wide as registers allow;
//! `exp`, `log` and inner products use fused multiply-add where there is one and may differ in the last bit between
//! instruction sets (never between thread counts).

mod element;
mod math;
mod reduce;
mod tile;
mod transpose;

pub use element::{Element, Real, TILE_ROWS};
pub use math::{Transcendental, exp, exp_in_place, log, log_in_place, softmax_in_place};
pub use reduce::Reductions;
pub use tile::{Gathered, Tiled, dispatch_simd, panel};
pub use transpose::transpose;

use pulp::{Arch, Simd, WithSimd};
use std::sync::OnceLock;

/// Work that [`dispatch`] compiles for each instruction set. Implementations mark `run` as `#[inline(always)]`.
pub trait Vectorized {
    /// What the work returns.
    type Output;
    /// `FMA` tells whether a fused multiply-add is one instruction here.
    fn run<const FMA: bool>(self) -> Self::Output;
}

struct Adapter<V>(V);

impl<V: Vectorized> WithSimd for Adapter<V> {
    type Output = V::Output;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> V::Output {
        if S::IS_SCALAR { self.0.run::<false>() } else { self.0.run::<true>() }
    }
}

/// Runs `work` with the widest instruction set of this machine.
#[inline]
pub fn dispatch<V: Vectorized>(work: V) -> V::Output {
    arch().dispatch(Adapter(work))
}

/// Runs `work` as compiled for any processor of this architecture; the twin that tests compare with.
pub fn dispatch_scalar<V: Vectorized>(work: V) -> V::Output {
    Arch::Scalar.dispatch(Adapter(work))
}

/// Name of the instruction set in use.
pub fn level() -> &'static str {
    match arch() {
        Arch::Scalar => "scalar",
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => "x86-64-v3 (AVX2, FMA)",
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => "x86-64-v4 (AVX-512)",
        #[allow(unreachable_patterns, reason = "other architectures have other variants")]
        _ => "vector",
    }
}

/// `SHIFTKERN_SIMD` may name a narrower instruction set ("scalar", "v3") than the machine has, to compare results.
fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| match std::env::var("SHIFTKERN_SIMD").as_deref() {
        Ok("scalar") => Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Ok("v3") => pulp::x86::V3::try_new().map_or_else(Arch::new, Arch::V3),
        _ => Arch::new(),
    })
}
