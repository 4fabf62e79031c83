//! Small matrix products in registers, with panels of columns across the lanes.
//!
//! A panel is a matrix of a few registers a row. Both products read the other matrix one number at a time, as it lies in
//! memory: nothing has to be packed or transposed but the panel itself. Every lane's sum runs over its terms in order,
//! so a product does not depend on the panel's width.

use super::Transcendental;
use pulp::{Arch, Simd, WithSimd};

/// Rows of a tile of products.
const ROWS: usize = 4;

/// Rows of one matrix by their places in memory.
#[derive(Clone, Copy)]
pub struct Gathered<'a, R> {
    /// The memory.
    pub data: &'a [R],
    /// Where each row begins in it.
    pub offsets: &'a [usize],
    /// Elements of a row.
    pub width: usize,
}

impl<R> Gathered<'_, R> {
    /// One row.
    #[inline(always)]
    pub fn row(&self, index: usize) -> &[R] {
        &self.data[self.offsets[index]..][..self.width]
    }
}

/// Real numbers whose vector registers tiles are made of.
pub trait Tiled: Transcendental {
    /// Lanes of a panel.
    fn panel<S: Simd>() -> usize;
    /// `out[r][lane] = sum_d rows[r][d] panel[d][lane]`. `out` has room for a whole number of tiles.
    fn products<S: Simd>(simd: S, rows: Gathered<'_, Self>, panel: &[Self], out: &mut [Self]);
    /// `acc[c][lane] = factor[lane] acc[c][lane] + sum_r rows[r][c] weights[r][lane]`.
    fn accumulate<S: Simd>(
        simd: S,
        rows: Gathered<'_, Self>,
        weights: &[Self],
        factor: Option<&[Self]>,
        acc: &mut [Self],
    );
    /// One step of a softmax in powers of two, lane by lane: raises `peak` to the largest of its scores, replaces each
    /// score by `2^(score - peak)` and adds them to `total`; `factor` is what earlier sums shrink by.
    fn soften<S: Simd>(scores: &mut [Self], peak: &mut [Self], total: &mut [Self], factor: &mut [Self]);
    /// `slopes <- 2^(scores - level) (slopes - delta)`, lane by lane.
    fn slopes<S: Simd>(scores: &[Self], level: &[Self], delta: &[Self], slopes: &mut [Self]);
    /// `scores <- 2^(scores - level)`, `slopes <- scores (slopes - delta)`, with one level and delta for all lanes.
    fn weights_and_slopes<S: Simd>(scores: &mut [Self], level: Self, delta: Self, slopes: &mut [Self]);
}

macro_rules! tiled {
    ($type:ident, $module:ident, $vector:ident, $lanes:ident, $splat:ident, $mul:ident, $fma:ident,
     $view:ident, $view_mut:ident) => {
        mod $module {
            use super::{Gathered, ROWS};
            use crate::simd::Transcendental;
            use pulp::Simd;

            #[inline(always)]
            pub fn products<S: Simd, const V: usize>(
                simd: S,
                rows: Gathered<'_, $type>,
                panel: &[$type],
                out: &mut [$type],
            ) {
                let panel = &S::$view(panel).0.as_chunks::<V>().0[..rows.width];
                let last = rows.offsets.len() - 1;
                for (tile, out) in S::$view_mut(out).0.as_chunks_mut::<V>().0.chunks_exact_mut(ROWS).enumerate() {
                    if tile * ROWS > last {
                        break;
                    }
                    // A short last tile repeats its last row.
                    let row = |r: usize| rows.row((tile * ROWS + r).min(last));
                    let row = [row(0), row(1), row(2), row(3)].map(|row| &row[..panel.len()]);
                    let mut acc = [[simd.$splat(0.0); V]; ROWS];
                    for (d, lanes) in panel.iter().enumerate() {
                        for r in 0..ROWS {
                            let a = simd.$splat(row[r][d]);
                            for v in 0..V {
                                acc[r][v] = simd.$fma(a, lanes[v], acc[r][v]);
                            }
                        }
                    }
                    out.copy_from_slice(&acc);
                }
            }

            #[inline(always)]
            pub fn accumulate<S: Simd, const V: usize>(
                simd: S,
                rows: Gathered<'_, $type>,
                weights: &[$type],
                factor: Option<&[$type]>,
                acc: &mut [$type],
            ) {
                let weights = &S::$view(weights).0.as_chunks::<V>().0[..rows.offsets.len()];
                let factor = factor.map(|factor| S::$view(factor).0.as_chunks::<V>().0[0]);
                let acc = &mut S::$view_mut(acc).0.as_chunks_mut::<V>().0[..rows.width];
                let (whole, rest) = acc.as_chunks_mut::<ROWS>();
                let done = whole.len() * ROWS;
                for (tile, acc) in whole.iter_mut().enumerate() {
                    add_tile::<S, V, ROWS>(simd, rows, tile * ROWS, weights, factor, acc);
                }
                for (c, acc) in rest.as_chunks_mut::<1>().0.iter_mut().enumerate() {
                    add_tile::<S, V, 1>(simd, rows, done + c, weights, factor, acc);
                }
            }

            #[inline(always)]
            fn add_tile<S: Simd, const V: usize, const M: usize>(
                simd: S,
                rows: Gathered<'_, $type>,
                first: usize,
                weights: &[[S::$vector; V]],
                factor: Option<[S::$vector; V]>,
                target: &mut [[S::$vector; V]; M],
            ) {
                let mut acc = *target;
                if let Some(factor) = factor {
                    for c in 0..M {
                        for v in 0..V {
                            acc[c][v] = simd.$mul(acc[c][v], factor[v]);
                        }
                    }
                }
                for (&offset, lanes) in rows.offsets.iter().zip(weights) {
                    let row = &rows.data[offset + first..][..M];
                    for c in 0..M {
                        let a = simd.$splat(row[c]);
                        for v in 0..V {
                            acc[c][v] = simd.$fma(a, lanes[v], acc[c][v]);
                        }
                    }
                }
                *target = acc;
            }

            #[inline(always)]
            pub fn soften<const STRIP: usize, const FMA: bool>(
                scores: &mut [$type],
                peak: &mut [$type],
                total: &mut [$type],
                factor: &mut [$type],
            ) {
                let strips = peak.len() / STRIP;
                let scores = scores.as_chunks_mut::<STRIP>().0;
                for strip in 0..strips {
                    let at = strip * STRIP..(strip + 1) * STRIP;
                    let old: &mut [$type; STRIP] = (&mut peak[at.clone()]).try_into().expect("one strip");
                    let mut top = *old;
                    for row in scores[strip..].iter().step_by(strips) {
                        for lane in 0..STRIP {
                            top[lane] = if row[lane] > top[lane] { row[lane] } else { top[lane] };
                        }
                    }
                    // Without a kept key so far the peak is -inf; weights are 0 by any other.
                    let mut level = [0.0; STRIP];
                    for lane in 0..STRIP {
                        level[lane] = if top[lane] == <$type>::NEG_INFINITY { 0.0 } else { top[lane] };
                    }
                    let mut shrink = [0.0; STRIP];
                    for lane in 0..STRIP {
                        shrink[lane] = (old[lane] - level[lane]).exp2_lane::<FMA>();
                    }
                    let mut sum = [0.0; STRIP];
                    for row in scores[strip..].iter_mut().step_by(strips) {
                        for lane in 0..STRIP {
                            row[lane] = (row[lane] - level[lane]).exp2_lane::<FMA>();
                        }
                        for lane in 0..STRIP {
                            sum[lane] += row[lane];
                        }
                    }
                    *old = top;
                    for lane in 0..STRIP {
                        total[at.start + lane] = total[at.start + lane] * shrink[lane] + sum[lane];
                        factor[at.start + lane] = shrink[lane];
                    }
                }
            }
        }

        impl Tiled for $type {
            #[inline(always)]
            fn panel<S: Simd>() -> usize {
                // Four vectors by four rows of sums and what they are made of fill 32 registers to two thirds.
                S::$lanes * if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
            }
            #[inline(always)]
            fn products<S: Simd>(simd: S, rows: Gathered<'_, Self>, panel: &[Self], out: &mut [Self]) {
                if S::REGISTER_COUNT >= 32 {
                    $module::products::<S, 4>(simd, rows, panel, out);
                } else {
                    $module::products::<S, 2>(simd, rows, panel, out);
                }
            }
            #[inline(always)]
            fn accumulate<S: Simd>(
                simd: S,
                rows: Gathered<'_, Self>,
                weights: &[Self],
                factor: Option<&[Self]>,
                acc: &mut [Self],
            ) {
                if S::REGISTER_COUNT >= 32 {
                    $module::accumulate::<S, 4>(simd, rows, weights, factor, acc);
                } else {
                    $module::accumulate::<S, 2>(simd, rows, weights, factor, acc);
                }
            }
            #[inline(always)]
            fn soften<S: Simd>(scores: &mut [Self], peak: &mut [Self], total: &mut [Self], factor: &mut [Self]) {
                // Strips of one 512-bit register, or of the two lanes of a processor without vectors.
                const STRIP: usize = 64 / size_of::<$type>();
                if S::IS_SCALAR {
                    $module::soften::<2, false>(scores, peak, total, factor);
                } else {
                    $module::soften::<STRIP, true>(scores, peak, total, factor);
                }
            }
            #[inline(always)]
            fn slopes<S: Simd>(scores: &[Self], level: &[Self], delta: &[Self], slopes: &mut [Self]) {
                for (((slope, &score), &level), &delta) in slopes.iter_mut().zip(scores).zip(level).zip(delta) {
                    let shifted = score - level;
                    let weight = if S::IS_SCALAR { shifted.exp2_lane::<false>() } else { shifted.exp2_lane::<true>() };
                    *slope = weight * (*slope - delta);
                }
            }
            #[inline(always)]
            fn weights_and_slopes<S: Simd>(scores: &mut [Self], level: Self, delta: Self, slopes: &mut [Self]) {
                for (slope, score) in slopes.iter_mut().zip(scores) {
                    let shifted = *score - level;
                    *score = if S::IS_SCALAR { shifted.exp2_lane::<false>() } else { shifted.exp2_lane::<true>() };
                    *slope = *score * (*slope - delta);
                }
            }
        }
    };
}

tiled!(f32, tiles_f32, f32s, F32_LANES, splat_f32s, mul_f32s, mul_add_e_f32s, as_simd_f32s, as_mut_simd_f32s);
tiled!(f64, tiles_f64, f64s, F64_LANES, splat_f64s, mul_f64s, mul_add_e_f64s, as_simd_f64s, as_mut_simd_f64s);

struct Lanes<R>(std::marker::PhantomData<R>);

impl<R: Tiled> WithSimd for Lanes<R> {
    type Output = usize;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        R::panel::<S>()
    }
}

/// Lanes of a panel on this machine.
pub fn panel<R: Tiled>() -> usize {
    dispatch_simd(Lanes::<R>(std::marker::PhantomData))
}

/// Runs `work`, which uses registers by name, with the widest instruction set of this machine.
pub fn dispatch_simd<W: WithSimd>(work: W) -> W::Output {
    let arch: Arch = super::arch();
    arch.dispatch(work)
}
