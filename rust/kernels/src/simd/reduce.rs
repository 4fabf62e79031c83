//! Sums over a slice, in fixed lanes.
//!
//! With `n` elements and `L` lanes each lane adds `n / L` terms, and the lanes are then added in `f64`, so the
//! relative error against `sum |x|` is at most about `(n / L) * u` with `u` the unit roundoff (worst case; `n` is a few
//! thousand in all callers). `f32` sums can overflow where their `f64` value would not: callers check and fall back.

/// The sums of one type. Loops run over arrays of constant length, so that the lanes stay in registers.
pub trait Reductions: Copy {
    /// Sum of the elements.
    fn sum(x: &[Self]) -> f64;
    /// Sum of the squares.
    fn sum_of_squares(x: &[Self]) -> f64;
    /// `(sum of (x - centre), sum of (x - centre)^2)`.
    fn deviations(x: &[Self], centre: Self) -> (f64, f64);
    /// `(sum of g, sum of g * (x - centre))`, over as many elements as both have.
    fn dot_deviation(g: &[Self], x: &[Self], centre: Self) -> (f64, f64);
    /// `(smallest, largest)` element; `(+inf, -inf)` of nothing; NaN elements are passed over.
    fn min_max(x: &[Self]) -> (f64, f64);
}

macro_rules! reductions {
    ($type:ident, $lanes:literal) => {
        impl Reductions for $type {
            #[inline(always)]
            fn sum(x: &[$type]) -> f64 {
                let mut acc = [0.0; $lanes];
                let (rows, tail) = x.as_chunks::<$lanes>();
                for row in rows {
                    for lane in 0..$lanes {
                        acc[lane] += row[lane];
                    }
                }
                for (acc, &v) in acc.iter_mut().zip(tail) {
                    *acc += v;
                }
                fold(acc.map(f64::from))
            }

            #[inline(always)]
            fn sum_of_squares(x: &[$type]) -> f64 {
                Self::deviations(x, 0.0).1
            }

            #[inline(always)]
            fn deviations(x: &[$type], centre: $type) -> (f64, f64) {
                let (mut first, mut second) = ([0.0; $lanes], [0.0; $lanes]);
                let (rows, tail) = x.as_chunks::<$lanes>();
                for row in rows {
                    for lane in 0..$lanes {
                        let d = row[lane] - centre;
                        first[lane] += d;
                        second[lane] += d * d;
                    }
                }
                for (lane, &v) in tail.iter().enumerate() {
                    let d = v - centre;
                    first[lane] += d;
                    second[lane] += d * d;
                }
                (fold(first.map(f64::from)), fold(second.map(f64::from)))
            }

            #[inline(always)]
            fn dot_deviation(g: &[$type], x: &[$type], centre: $type) -> (f64, f64) {
                let (mut first, mut second) = ([0.0; $lanes], [0.0; $lanes]);
                let ((g_rows, g_tail), (x_rows, x_tail)) = (g.as_chunks::<$lanes>(), x.as_chunks::<$lanes>());
                for (g, x) in g_rows.iter().zip(x_rows) {
                    for lane in 0..$lanes {
                        first[lane] += g[lane];
                        second[lane] += g[lane] * (x[lane] - centre);
                    }
                }
                for (lane, (&g, &x)) in g_tail.iter().zip(x_tail).enumerate() {
                    first[lane] += g;
                    second[lane] += g * (x - centre);
                }
                (fold(first.map(f64::from)), fold(second.map(f64::from)))
            }

            #[inline(always)]
            fn min_max(x: &[$type]) -> (f64, f64) {
                let (mut low, mut high) = ([$type::INFINITY; $lanes], [$type::NEG_INFINITY; $lanes]);
                let (rows, tail) = x.as_chunks::<$lanes>();
                for row in rows {
                    for lane in 0..$lanes {
                        low[lane] = if row[lane] < low[lane] { row[lane] } else { low[lane] };
                        high[lane] = if row[lane] > high[lane] { row[lane] } else { high[lane] };
                    }
                }
                for (lane, &v) in tail.iter().enumerate() {
                    low[lane] = if v < low[lane] { v } else { low[lane] };
                    high[lane] = if v > high[lane] { v } else { high[lane] };
                }
                let smallest = low.iter().fold(f64::INFINITY, |m, &v| m.min(f64::from(v)));
                let largest = high.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
                (smallest, largest)
            }
        }
    };
}

// Four 512-bit registers per accumulator.
reductions!(f32, 64);
reductions!(f64, 32);

/// Adds the lanes in `f64`, in a fixed order: column by column of an eight-lane register, then in a tree.
#[inline(always)]
pub(super) fn fold<const N: usize>(lanes: [f64; N]) -> f64 {
    let mut eight = [0.0; 8];
    for row in lanes.as_chunks::<8>().0 {
        for lane in 0..8 {
            eight[lane] += row[lane];
        }
    }
    let [a, b, c, d, e, f, g, h] = eight;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
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
            let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
            let terms = (x.len() as f64 / 64.0).ceil() + 2.0;
            let bound = |magnitude: f64| terms * f64::from(f32::EPSILON) * magnitude;
            let magnitude: f64 = wide.iter().map(|v| v.abs()).sum();
            prop_assert!((f32::sum(&x) - wide.iter().sum::<f64>()).abs() <= bound(magnitude));
            let squares: f64 = wide.iter().map(|v| v * v).sum();
            prop_assert!((f32::sum_of_squares(&x) - squares).abs() <= bound(squares));
            let shifted: Vec<f64> = x.iter().map(|&v| f64::from(v - centre)).collect();
            let (first, second) = f32::deviations(&x, centre);
            let squares: f64 = shifted.iter().map(|v| v * v).sum();
            prop_assert!((first - shifted.iter().sum::<f64>()).abs() <= bound(shifted.iter().map(|v| v.abs()).sum()));
            prop_assert!((second - squares).abs() <= bound(squares));
            let (total, dot) = f32::dot_deviation(&x, &x, centre);
            let products: Vec<f64> = wide.iter().zip(&shifted).map(|(a, b)| a * b).collect();
            prop_assert_eq!(total.to_bits(), f32::sum(&x).to_bits());
            prop_assert!((dot - products.iter().sum::<f64>()).abs() <= bound(products.iter().map(|v| v.abs()).sum()));
            let (low, high) = f32::min_max(&x);
            prop_assert_eq!(low, wide.iter().copied().fold(f64::INFINITY, f64::min));
            prop_assert_eq!(high, wide.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }

        #[test]
        fn f64_sums_match(x in prop::collection::vec(-1e3_f64..1e3, 0..200)) {
            let magnitude: f64 = x.iter().map(|v| v.abs()).sum();
            prop_assert!((f64::sum(&x) - x.iter().sum::<f64>()).abs() <= 200.0 * f64::EPSILON * magnitude);
        }
    }
}
