//! Exponential and logarithm over a slice.
//!
//! Each is a branch-free polynomial after range reduction, so that a loop over it becomes vector instructions.
//! Error bounds, tested against the `f64` library function over the whole range: `f32` exp, exp2 and log 2 ulp,
//! `f64` exp, exp2 and log 3 ulp, tanh 3 ulp in both. `exp` and `exp2` flush results below the smallest normal number to zero.

use super::{Real, Reductions, Vectorized, dispatch};

/// The two types' constants and bit tricks.
pub trait Transcendental: Real {
    /// `e^x`; 0 below the normal range, `inf` above, NaN of NaN.
    fn exp_lane<const FMA: bool>(self) -> Self;
    /// `2^x` for loops that do little else: 0 below the normal range, finite above it, NaN of NaN.
    fn exp2_lane<const FMA: bool>(self) -> Self;
    /// Natural logarithm; `-inf` of 0, NaN of negative numbers and NaN.
    fn log_lane<const FMA: bool>(self) -> Self;
    /// Hyperbolic tangent, as exact relative to its size near 0 as elsewhere; NaN of NaN.
    fn tanh_lane<const FMA: bool>(self) -> Self;
}

macro_rules! horner {
    ($fma:ident, $x:expr, $first:expr $(, $rest:expr)*) => {{
        let mut p = $first;
        $(p = p.mul_add_if::<$fma>($x, $rest);)*
        p
    }};
}

/// Below this size tanh is a polynomial: the other formula would cancel. It interpolates `(tanh(x) / x - 1) / x^2` at
/// Chebyshev nodes in `x^2`, to 2e-8 in `f32` and 2e-18 in `f64`.
const TANH_BY_POLYNOMIAL: f64 = 0.625;

macro_rules! tanh_lane {
    ($type:ident, $($coefficient:expr),*) => {
        #[inline(always)]
        fn tanh_lane<const FMA: bool>(self) -> $type {
            let square = self * self;
            let p = horner!(FMA, square, $($coefficient),*);
            let near = (p * square).mul_add_if::<FMA>(self, self);
            let size = self.abs();
            let far = 1.0 - 2.0 / ((size + size).exp_lane::<FMA>() + 1.0);
            let result = if size < TANH_BY_POLYNOMIAL as $type { near } else { far };
            result.copysign(self)
        }
    };
}

impl Transcendental for f32 {
    #[inline(always)]
    fn exp_lane<const FMA: bool>(self) -> f32 {
        // x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds n to an integer in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        let x = self.clamp(-104.0, 89.0);
        let shifted = (x * std::f32::consts::LOG2_E) + MAGIC;
        let n = shifted - MAGIC;
        let r = n.mul_add_if::<FMA>(-0.693_359_375, x);
        let r = n.mul_add_if::<FMA>(2.121_944_4e-4, r);
        let p = horner!(FMA, r, 1.987_569_2e-4_f32, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5);
        let y = (p * r).mul_add_if::<FMA>(r, r) + 1.0;
        // Two factors, because n itself may lie outside the exponent's range.
        let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
        let half = n >> 1;
        let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
        let y = y * scale(half) * scale(n - half);
        let y = if self < -87.336_54 { 0.0 } else { y };
        if self.is_nan() { self } else { y }
    }

    #[inline(always)]
    fn exp2_lane<const FMA: bool>(self) -> f32 {
        // x = n + r with |r| <= 1/2. The low bits of `shifted` hold n, and shifting them into the exponent's place
        // drops the rest. The polynomial interpolates (2^r - 1) / r at Chebyshev nodes, to 5e-9.
        const MAGIC: f32 = 12_582_912.0;
        let x = if self > 127.4 { 127.4 } else { self };
        let shifted = x + MAGIC;
        let r = x - (shifted - MAGIC);
        let p = horner!(
            FMA,
            r,
            1.545_316_3e-4_f32,
            1.339_086_3e-3,
            9.618_082_6e-3,
            5.550_357e-2,
            0.240_226_51,
            std::f32::consts::LN_2,
            1.0
        );
        let y = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
        if x < -126.0 { 0.0 } else { y }
    }

    #[inline(always)]
    fn log_lane<const FMA: bool>(self) -> f32 {
        // x = 2^e m with m in [sqrt(1/2), sqrt(2)); subnormals are scaled up first.
        let tiny = self < f32::MIN_POSITIVE;
        let x = if tiny { self * 8_388_608.0 } else { self };
        let bits = x.to_bits().wrapping_sub(0x3f35_04f3);
        let e = (bits as i32 >> 23) as f32 - if tiny { 23.0 } else { 0.0 };
        let m = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3));
        let f = m - 1.0;
        let z = f * f;
        let p = horner!(
            FMA,
            f,
            7.037_683_6e-2_f32,
            -0.115_146_1,
            0.116_769_984,
            -0.124_201_41,
            0.142_493_23,
            -0.166_680_57,
            0.200_007_14,
            -0.249_999_94,
            0.333_333_3
        );
        let mut y = f * z * p;
        y = e.mul_add_if::<FMA>(-2.121_944_4e-4, y);
        y = z.mul_add_if::<FMA>(-0.5, y);
        y = e.mul_add_if::<FMA>(0.693_359_375, f + y);
        let y = if self == f32::INFINITY { f32::INFINITY } else { y };
        let y = if self == 0.0 { f32::NEG_INFINITY } else { y };
        if self < 0.0 || self.is_nan() { f32::NAN } else { y }
    }

    tanh_lane!(f32, -6.096_714_2e-3_f32, 2.099_717_9e-2, -5.385_090_9e-2, 0.133_327_7, -0.333_333_29);
}

impl Transcendental for f64 {
    #[inline(always)]
    fn exp_lane<const FMA: bool>(self) -> f64 {
        const MAGIC: f64 = 6_755_399_441_055_744.0;
        let x = self.clamp(-746.0, 710.0);
        let shifted = (x * std::f64::consts::LOG2_E) + MAGIC;
        let n = shifted - MAGIC;
        let r = n.mul_add_if::<FMA>(-6.931_471_803_691_238_2e-1, x);
        let r = n.mul_add_if::<FMA>(-1.908_214_929_270_587_7e-10, r);
        // Taylor to the 13th power: the remainder is below 5e-18 for |r| <= ln2 / 2.
        let p = horner!(
            FMA,
            r,
            1.0 / 6_227_020_800.0_f64,
            1.0 / 479_001_600.0,
            1.0 / 39_916_800.0,
            1.0 / 3_628_800.0,
            1.0 / 362_880.0,
            1.0 / 40_320.0,
            1.0 / 5_040.0,
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5
        );
        let y = (p * r).mul_add_if::<FMA>(r, r) + 1.0;
        let n = (shifted.to_bits() as i64).wrapping_sub(MAGIC.to_bits() as i64);
        let half = n >> 1;
        let scale = |e: i64| f64::from_bits(((e + 1023) << 52) as u64);
        let y = y * scale(half) * scale(n - half);
        let y = if self < -708.396_418_532_264_1 { 0.0 } else { y };
        if self.is_nan() { self } else { y }
    }

    #[inline(always)]
    fn exp2_lane<const FMA: bool>(self) -> f64 {
        // As in f32; here the polynomial is good to 1e-17.
        const MAGIC: f64 = 6_755_399_441_055_744.0;
        let x = if self > 1023.4 { 1023.4 } else { self };
        let shifted = x + MAGIC;
        let r = x - (shifted - MAGIC);
        let p = horner!(
            FMA,
            r,
            4.454_960_598_186_518_4e-10_f64,
            7.072_585_949_269_223_7e-9,
            1.017_806_244_584_577_35e-7,
            1.321_544_258_792_168_97e-6,
            1.525_273_382_983_611_84e-5,
            1.540_353_044_173_605_02e-4,
            1.333_355_814_641_693_53e-3,
            9.618_129_107_606_888_53e-3,
            5.550_410_866_482_159_43e-2,
            0.240_226_506_959_100_982,
            std::f64::consts::LN_2,
            1.0
        );
        let y = f64::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 52));
        if x < -1022.0 { 0.0 } else { y }
    }

    #[inline(always)]
    fn log_lane<const FMA: bool>(self) -> f64 {
        let tiny = self < f64::MIN_POSITIVE;
        let x = if tiny { self * 18_014_398_509_481_984.0 } else { self };
        let bits = x.to_bits().wrapping_sub(0x3fe6_a09e_667f_3bcd);
        let e = (bits as i64 >> 52) as f64 - if tiny { 54.0 } else { 0.0 };
        let m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff).wrapping_add(0x3fe6_a09e_667f_3bcd));
        // log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172: the odd series to s^23.
        let f = m - 1.0;
        let s = f / (m + 1.0);
        let z = s * s;
        let p = horner!(
            FMA,
            z,
            2.0 / 23.0_f64,
            2.0 / 21.0,
            2.0 / 19.0,
            2.0 / 17.0,
            2.0 / 15.0,
            2.0 / 13.0,
            2.0 / 11.0,
            2.0 / 9.0,
            2.0 / 7.0,
            2.0 / 5.0,
            2.0 / 3.0
        );
        // 2 s = f - s f keeps the leading term exact.
        let tail = (p * z).mul_add_if::<FMA>(s, -(s * f));
        let low = e.mul_add_if::<FMA>(1.908_214_929_270_587_7e-10, tail);
        let y = e.mul_add_if::<FMA>(6.931_471_803_691_238_2e-1, f + low);
        let y = if self == f64::INFINITY { f64::INFINITY } else { y };
        let y = if self == 0.0 { f64::NEG_INFINITY } else { y };
        if self < 0.0 || self.is_nan() { f64::NAN } else { y }
    }

    tanh_lane!(
        f64,
        6.485_163_482_793_113_15e-6_f64,
        -3.120_110_142_579_740_00e-5,
        9.257_116_129_556_768_27e-5,
        -2.375_906_496_056_195_52e-4,
        5.896_606_577_757_043_35e-4,
        -1.455_775_412_047_805_51e-3,
        3.592_121_751_154_962_27e-3,
        -8.863_235_103_240_877_93e-3,
        2.186_948_851_900_830_58e-2,
        -5.396_825_396_789_699_17e-2,
        0.133_333_333_333_330_416,
        -0.333_333_333_333_333_329
    );
}

/// `x <- e^x`.
#[inline(always)]
pub fn exp_in_place<T: Transcendental, const FMA: bool>(x: &mut [T]) {
    for v in x {
        *v = v.exp_lane::<FMA>();
    }
}

/// `x <- ln x`.
#[inline(always)]
pub fn log_in_place<T: Transcendental, const FMA: bool>(x: &mut [T]) {
    for v in x {
        *v = v.log_lane::<FMA>();
    }
}

/// `x <- softmax(x)`; returns `ln sum e^x`. A NaN or an infinity anywhere makes all of `x` NaN.
#[inline(always)]
pub fn softmax_in_place<const FMA: bool>(x: &mut [f64]) -> f64 {
    let peak = x.iter().fold(f64::NEG_INFINITY, |m, &v| if v > m || v.is_nan() { v } else { m });
    for v in &mut *x {
        *v = (*v - peak).exp_lane::<FMA>();
    }
    let total = f64::sum(x);
    for v in &mut *x {
        *v /= total;
    }
    peak + total.ln()
}

struct Exp<'a, T>(&'a mut [T]);
impl<T: Transcendental> Vectorized for Exp<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        exp_in_place::<T, FMA>(self.0);
    }
}

struct Log<'a, T>(&'a mut [T]);
impl<T: Transcendental> Vectorized for Log<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        log_in_place::<T, FMA>(self.0);
    }
}

/// `x <- e^x`, dispatched; for callers that have no vectorised block of their own.
pub fn exp<T: Transcendental>(x: &mut [T]) {
    dispatch(Exp(x));
}

/// `x <- ln x`, dispatched; for callers that have no vectorised block of their own.
pub fn log<T: Transcendental>(x: &mut [T]) {
    dispatch(Log(x));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::dispatch_scalar;

    fn ulps_f32(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        let spacing = f64::from(f32::from_bits(nearest.abs().to_bits() + 1)) - f64::from(nearest.abs());
        (f64::from(got) - want).abs() / spacing
    }

    fn ulps_f64(got: f64, want: f64) -> f64 {
        (got - want).abs() / (f64::from_bits(want.abs().to_bits() + 1) - want.abs())
    }

    #[test]
    fn exp_f32_stays_within_its_bound() {
        let x: Vec<f32> = (0..400_000).map(|i| -87.3 + 176.0 * i as f32 / 400_000.0).collect();
        let (mut fused, mut plain) = (x.clone(), x.clone());
        exp(&mut fused);
        dispatch_scalar(Exp(&mut plain));
        for ((&x, &a), &b) in x.iter().zip(&fused).zip(&plain) {
            let want = f64::from(x).exp();
            assert!(ulps_f32(a, want) <= 2.0 && ulps_f32(b, want) <= 2.0, "exp({x}) = {a} or {b}, not {want}");
        }
    }

    #[test]
    fn exp_f64_stays_within_its_bound() {
        let x: Vec<f64> = (0..400_000).map(|i| -708.0 + 1417.0 * f64::from(i) / 400_000.0).collect();
        let (mut fused, mut plain) = (x.clone(), x.clone());
        exp(&mut fused);
        dispatch_scalar(Exp(&mut plain));
        for ((&x, &a), &b) in x.iter().zip(&fused).zip(&plain) {
            assert!(ulps_f64(a, x.exp()) <= 3.0 && ulps_f64(b, x.exp()) <= 3.0, "exp({x}) = {a} or {b}");
        }
    }

    struct Exp2<'a, T>(&'a mut [T]);
    impl<T: Transcendental> Vectorized for Exp2<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for v in self.0 {
                *v = v.exp2_lane::<FMA>();
            }
        }
    }

    #[test]
    fn exp2_stays_within_its_bound() {
        let x: Vec<f32> = (0..400_000).map(|i| -126.0 + 253.0 * i as f32 / 400_000.0).collect();
        let (mut fused, mut plain) = (x.clone(), x.clone());
        dispatch(Exp2(&mut fused));
        dispatch_scalar(Exp2(&mut plain));
        for ((&x, &a), &b) in x.iter().zip(&fused).zip(&plain) {
            let want = f64::from(x).exp2();
            assert!(ulps_f32(a, want) <= 2.0 && ulps_f32(b, want) <= 2.0, "exp2({x}) = {a} or {b}, not {want}");
        }
        let x: Vec<f64> = (0..400_000).map(|i| -1022.0 + 2045.0 * f64::from(i) / 400_000.0).collect();
        let (mut fused, mut plain) = (x.clone(), x.clone());
        dispatch(Exp2(&mut fused));
        dispatch_scalar(Exp2(&mut plain));
        for ((&x, &a), &b) in x.iter().zip(&fused).zip(&plain) {
            assert!(ulps_f64(a, x.exp2()) <= 3.0 && ulps_f64(b, x.exp2()) <= 3.0, "exp2({x}) = {a} or {b}");
        }
        let mut x = [f32::NEG_INFINITY, -126.5, -1e30, 0.0, 1e30, f32::INFINITY];
        dispatch(Exp2(&mut x));
        assert_eq!(x[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(x[4] > 2e38 && x[4].is_finite() && x[5] == x[4]);
        let mut x = [f32::NAN, -f32::NAN];
        dispatch(Exp2(&mut x));
        assert!(x[0].is_nan() && x[1].is_nan());
        let mut x = [f64::NEG_INFINITY, -1022.5, 0.0, 1e300, f64::NAN];
        dispatch(Exp2(&mut x));
        assert!(x[4].is_nan());
        assert_eq!(x[..3], [0.0, 0.0, 1.0]);
        assert!(x[3] > 1e308 && x[3].is_finite());
    }

    struct Tanh<'a, T>(&'a mut [T]);
    impl<T: Transcendental> Vectorized for Tanh<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for v in self.0 {
                *v = v.tanh_lane::<FMA>();
            }
        }
    }

    #[test]
    fn tanh_stays_within_its_bound() {
        // Evenly over the bend, and over all sizes.
        let even = (0..200_000).map(|i| 20.0 * f64::from(i) / 200_000.0);
        let x: Vec<f64> = even.chain((0..200_000).map(|i| (-80.0 + 84.0 * f64::from(i) / 200_000.0).exp())).collect();
        let x: Vec<f64> = x.iter().flat_map(|&v| [v, -v]).collect();
        let narrow: Vec<f32> = x.iter().map(|&v| v as f32).collect();
        let (mut fused, mut plain) = (narrow.clone(), narrow.clone());
        dispatch(Tanh(&mut fused));
        dispatch_scalar(Tanh(&mut plain));
        for ((&x, &a), &b) in narrow.iter().zip(&fused).zip(&plain) {
            let want = f64::from(x).tanh();
            assert!(ulps_f32(a, want) <= 3.0 && ulps_f32(b, want) <= 3.0, "tanh({x}) = {a} or {b}, not {want}");
        }
        let (mut fused, mut plain) = (x.clone(), x.clone());
        dispatch(Tanh(&mut fused));
        dispatch_scalar(Tanh(&mut plain));
        for ((&x, &a), &b) in x.iter().zip(&fused).zip(&plain) {
            assert!(ulps_f64(a, x.tanh()) <= 3.0 && ulps_f64(b, x.tanh()) <= 3.0, "tanh({x}) = {a} or {b}");
        }
        let mut x = [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e30, f32::NAN];
        dispatch(Tanh(&mut x));
        assert_eq!(x[..5], [1.0, -1.0, 0.0, 0.0, 1.0]);
        assert!(x[3].is_sign_negative() && x[5].is_nan());
        let mut x = [f64::INFINITY, f64::NEG_INFINITY, -0.0, 1e300, f64::NAN];
        dispatch(Tanh(&mut x));
        assert_eq!(x[..4], [1.0, -1.0, 0.0, 1.0]);
        assert!(x[4].is_nan());
    }

    #[test]
    fn log_stays_within_its_bound() {
        let x: Vec<f64> = (0..400_000).map(|i| (-87.0 + 175.0 * f64::from(i) / 400_000.0).exp()).collect();
        let narrow: Vec<f32> = x.iter().map(|&v| v as f32).filter(|v| v.is_finite()).collect();
        let (mut fused, mut plain) = (narrow.clone(), narrow.clone());
        log(&mut fused);
        dispatch_scalar(Log(&mut plain));
        for ((&x, &a), &b) in narrow.iter().zip(&fused).zip(&plain) {
            let want = f64::from(x).ln();
            assert!(ulps_f32(a, want) <= 2.0 && ulps_f32(b, want) <= 2.0, "log({x}) = {a} or {b}, not {want}");
        }
        let (mut fused, mut plain) = (x.clone(), x.clone());
        log(&mut fused);
        dispatch_scalar(Log(&mut plain));
        for ((&x, &a), &b) in x.iter().zip(&fused).zip(&plain) {
            assert!(ulps_f64(a, x.ln()) <= 3.0 && ulps_f64(b, x.ln()) <= 3.0, "log({x}) = {a} or {b}");
        }
    }

    #[test]
    fn special_values() {
        let mut x = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -200.0, 200.0, -87.4];
        exp(&mut x);
        assert_eq!((x[0], x[1], x[3], x[4], x[5], x[6]), (0.0, f32::INFINITY, 1.0, 0.0, f32::INFINITY, 0.0));
        assert!(x[2].is_nan());
        let mut x = [f64::NEG_INFINITY, f64::INFINITY, f64::NAN, 0.0, -800.0, 800.0];
        exp(&mut x);
        assert_eq!((x[0], x[1], x[3], x[4], x[5]), (0.0, f64::INFINITY, 1.0, 0.0, f64::INFINITY));
        assert!(x[2].is_nan());
        let mut x = [0.0_f32, f32::INFINITY, -1.0, f32::NAN, 1.0, 1e-40];
        log(&mut x);
        assert_eq!((x[0], x[1], x[4]), (f32::NEG_INFINITY, f32::INFINITY, 0.0));
        assert!(x[2].is_nan() && x[3].is_nan() && (x[5] + 92.103_41).abs() < 1e-4);
        let mut x = [0.0_f64, f64::INFINITY, -1.0, 1.0, 1e-310];
        log(&mut x);
        assert_eq!((x[0], x[1], x[3]), (f64::NEG_INFINITY, f64::INFINITY, 0.0));
        assert!(x[2].is_nan() && (x[4] - 1e-310_f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn softmax_sums_to_one_and_reports_its_normaliser() {
        let mut x = [1000.0, 999.0, -1000.0];
        let lse = softmax_in_place::<true>(&mut x);
        assert!((x.iter().sum::<f64>() - 1.0).abs() < 1e-15 && x[2] == 0.0);
        assert!((lse - (1000.0 + (1.0 + (-1.0_f64).exp()).ln())).abs() < 1e-12);
    }
}
