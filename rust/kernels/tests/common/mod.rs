//! What the tests of several kernels share.

use half::{bf16, f16};
use shiftkern_kernels::simd::{Element, Tiled};

/// Numbers that look random, in [-1, 1).
pub fn noise(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        })
        .collect()
}

/// Element types, and what tests know about them.
pub trait Float: Element<Acc: Tiled> {
    /// Roundoff of the type that sums have, and of the one that results are stored in.
    const ROUNDOFF: [f64; 2];
    fn of(v: f64) -> Self;
    fn value(self) -> f64;
}

macro_rules! float {
    ($type:ty, $sums:expr, $stored:expr, $of:expr, $value:expr) => {
        impl Float for $type {
            const ROUNDOFF: [f64; 2] = [$sums, $stored];
            fn of(v: f64) -> Self {
                $of(v)
            }
            fn value(self) -> f64 {
                $value(self)
            }
        }
    };
}

float!(f32, 6e-8, 0.0, |v| v as f32, f64::from);
float!(f64, 1.2e-16, 0.0, |v| v, |v| v);
float!(f16, 6e-8, 5e-4, f16::from_f64, f16::to_f64);
float!(bf16, 6e-8, 4e-3, bf16::from_f64, bf16::to_f64);
