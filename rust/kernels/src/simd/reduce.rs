//! Sums over a slice, in fixed lanes.
//!
//! With `n` elements and `L` lanes each lane adds `n / L` terms, and the lanes are then added in `f64`, so the
//! relative error against `sum |x|` is at most about `(n / L) * u` with `u` the unit roundoff (worst case; `n` is a few
//! thousand in all callers). `f32` sums can overflow where their `f64` value would not: callers check and fall back.

use super::Real;

/// Adds the lanes in `f64`, in a fixed tree.
#[inline(always)]
fn fold<R: Real>(lanes: &R::Lanes) -> f64 {
    let mut wide = [0.0_f64; 64];
    for (w, &lane) in wide.iter_mut().zip(lanes.as_ref()) {
        *w = lane.to_f64();
    }
    let mut width = R::LANES / 2;
    while width > 0 {
        for i in 0..width {
            wide[i] += wide[i + width];
        }
        width /= 2;
    }
    wide[0]
}

/// Calls `body(lane accumulators, lane inputs)` on full rows of lanes, then on the tail.
macro_rules! lanes_loop {
    ($x:expr, $r:ident, |$chunk:ident| $body:block) => {
        let mut rows = $x.chunks_exact($r::LANES);
        for $chunk in &mut rows $body
        let $chunk = rows.remainder();
        $body
    };
}

/// Sum of the elements.
#[inline(always)]
pub fn sum<R: Real>(x: &[R]) -> f64 {
    let mut acc = R::ZERO_LANES;
    lanes_loop!(x, R, |row| {
        for (a, &v) in acc.as_mut().iter_mut().zip(row) {
            *a = *a + v;
        }
    });
    fold::<R>(&acc)
}

/// Sum of the squares.
#[inline(always)]
pub fn sum_of_squares<R: Real>(x: &[R]) -> f64 {
    deviations(x, R::default()).1
}

/// `(sum of (x - centre), sum of (x - centre)^2)`.
#[inline(always)]
pub fn deviations<R: Real>(x: &[R], centre: R) -> (f64, f64) {
    let mut first = R::ZERO_LANES;
    let mut second = R::ZERO_LANES;
    lanes_loop!(x, R, |row| {
        for ((a, b), &v) in first.as_mut().iter_mut().zip(second.as_mut()).zip(row) {
            let d = v - centre;
            *a = *a + d;
            *b = *b + d * d;
        }
    });
    (fold::<R>(&first), fold::<R>(&second))
}

/// `(sum of g, sum of g * (x - centre))`.
#[inline(always)]
pub fn dot_deviation<R: Real>(g: &[R], x: &[R], centre: R) -> (f64, f64) {
    let mut first = R::ZERO_LANES;
    let mut second = R::ZERO_LANES;
    let mut offset = 0;
    lanes_loop!(g, R, |row| {
        let xs = &x[offset..offset + row.len()];
        offset += row.len();
        for (((a, b), &v), &w) in first.as_mut().iter_mut().zip(second.as_mut()).zip(row).zip(xs) {
            *a = *a + v;
            *b = *b + v * (w - centre);
        }
    });
    let _ = offset;
    (fold::<R>(&first), fold::<R>(&second))
}

/// `(smallest, largest)` element; `(+inf, -inf)` of nothing; NaN elements are passed over.
#[inline(always)]
pub fn min_max<R: Real>(x: &[R]) -> (f64, f64) {
    let mut low = R::ZERO_LANES;
    let mut high = R::ZERO_LANES;
    low.as_mut().fill(R::from_f64(f64::INFINITY));
    high.as_mut().fill(R::from_f64(f64::NEG_INFINITY));
    lanes_loop!(x, R, |row| {
        for ((a, b), &v) in low.as_mut().iter_mut().zip(high.as_mut()).zip(row) {
            *a = if v < *a { v } else { *a };
            *b = if v > *b { v } else { *b };
        }
    });
    let smallest = low.as_ref().iter().fold(f64::INFINITY, |m, v| m.min(v.to_f64()));
    let largest = high.as_ref().iter().fold(f64::NEG_INFINITY, |m, v| m.max(v.to_f64()));
    (smallest, largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn sums_match_their_twins(x in prop::collection::vec(-100.0_f32..100.0, 0..700), centre in -50.0_f32..50.0) {
            let wide: Vec<f64> = x.iter().map(|&v| v.to_f64()).collect();
            let terms = (x.len() as f64 / 64.0).ceil() + 2.0;
            let bound = |magnitude: f64| terms * f64::from(f32::EPSILON) * magnitude;
            let magnitude: f64 = wide.iter().map(|v| v.abs()).sum();
            prop_assert!((sum(&x) - wide.iter().sum::<f64>()).abs() <= bound(magnitude));
            let squares: f64 = wide.iter().map(|v| v * v).sum();
            prop_assert!((sum_of_squares(&x) - squares).abs() <= bound(squares));
            let shifted: Vec<f64> = x.iter().map(|&v| (v - centre).to_f64()).collect();
            let (first, second) = deviations(&x, centre);
            let squares: f64 = shifted.iter().map(|v| v * v).sum();
            prop_assert!((first - shifted.iter().sum::<f64>()).abs() <= bound(shifted.iter().map(|v| v.abs()).sum()));
            prop_assert!((second - squares).abs() <= bound(squares));
            let (total, dot) = dot_deviation(&x, &x, centre);
            let products: Vec<f64> = wide.iter().zip(&shifted).map(|(a, b)| a * b).collect();
            prop_assert_eq!(total.to_bits(), sum(&x).to_bits());
            prop_assert!((dot - products.iter().sum::<f64>()).abs() <= bound(products.iter().map(|v| v.abs()).sum()));
            let (low, high) = min_max(&x);
            prop_assert_eq!(low, wide.iter().copied().fold(f64::INFINITY, f64::min));
            prop_assert_eq!(high, wide.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }

        #[test]
        fn f64_sums_match(x in prop::collection::vec(-1e3_f64..1e3, 0..200)) {
            let magnitude: f64 = x.iter().map(|v| v.abs()).sum();
            prop_assert!((sum(&x) - x.iter().sum::<f64>()).abs() <= 200.0 * f64::EPSILON * magnitude);
        }
    }
}
