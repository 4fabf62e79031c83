//! Attention over several sets of keys, merged by their log-sum-exps.

use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Reductions, Vectorized, dispatch, exp, log};
use crate::{KernelError, Par};

/// Rows of a block of work.
const ROWS: usize = 64;
/// Elements of a row that are worked on together.
const STRIP: usize = 64;

/// Outputs `(rows, width)` and log-sum-exps `(rows)` of attention over one set of keys.
#[derive(Clone, Copy)]
pub struct State<'a, T: Element> {
    /// Outputs.
    pub out: &'a [T],
    /// Natural log-sum-exps.
    pub lse: &'a [T::Acc],
}

fn check<T: Element>(op: &'static str, states: &[State<'_, T>], rows: usize, width: usize) -> Result<(), KernelError> {
    for state in states {
        KernelError::check_len(op, "lse", rows, state.lse.len())?;
        KernelError::check_len(op, "out", rows * width, state.out.len())?;
    }
    Ok(())
}

/// Log-sum-exp of each row and, in `weights`, the share of each state, state by state.
fn shares<T: Element>(states: &[State<'_, T>], first: usize, weights: &mut [f64], lse: &mut [f64]) {
    let rows = lse.len();
    lse.fill(f64::NEG_INFINITY);
    for state in states {
        for (peak, value) in lse.iter_mut().zip(&state.lse[first..]) {
            let value = value.to_f64();
            *peak = if value > *peak || value.is_nan() { value } else { *peak };
        }
    }
    for (weights, state) in weights.chunks_exact_mut(rows).zip(states) {
        for ((weight, value), &peak) in weights.iter_mut().zip(&state.lse[first..]).zip(&*lse) {
            let value = value.to_f64();
            *weight = if value == f64::NEG_INFINITY { value } else { value - peak };
        }
    }
    exp(weights);
    let mut totals = [0.0; ROWS];
    let totals = &mut totals[..rows];
    for weights in weights.chunks_exact(rows) {
        totals.iter_mut().zip(weights).for_each(|(total, weight)| *total += weight);
    }
    // Without a part the log-sum-exp stays as it is, -inf.
    for total in totals.iter_mut() {
        *total = if *total == 0.0 { 1.0 } else { *total };
    }
    for weights in weights.chunks_exact_mut(rows) {
        weights.iter_mut().zip(&*totals).for_each(|(weight, total)| *weight /= total);
    }
    log(totals);
    lse.iter_mut().zip(&*totals).for_each(|(lse, total)| *lse += total);
}

/// `lse = ln sum_s e^(lse_s)` and `out = sum_s e^(lse_s - lse) out_s`; what has log-sum-exp `-inf` adds nothing, not
/// even NaN, and a row of nothing else is 0. Weights are computed in `f64`.
pub fn merge_states<T: Element>(
    states: &[State<'_, T>],
    out: &mut [T],
    lse: &mut [T::Acc],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "merge_states";
    let rows = lse.len();
    let width = out.len() / rows.max(1);
    check(OP, states, rows, width)?;
    KernelError::check_len(OP, "out", rows * width, out.len())?;
    let blocks = out.chunks_mut((ROWS * width).max(1)).map(Some).chain(std::iter::repeat_with(|| None));
    let mut blocks: Vec<_> = lse.chunks_mut(ROWS).zip(blocks).collect();
    let cost = rows as f64 * (states.len() as f64 * (20.0 + width as f64 / 4.0));
    for_each_chunk(par, &mut blocks, 1, cost, |block, blocks| {
        for (lse, out) in blocks {
            let (first, rows) = (block * ROWS, lse.len());
            with_scratch((states.len() + 1) * rows, |memory: &mut [f64]| {
                let (weights, wide_lse) = memory.split_at_mut(states.len() * rows);
                shares(states, first, weights, wide_lse);
                for (lse, &wide) in lse.iter_mut().zip(&*wide_lse) {
                    *lse = T::Acc::from_f64(wide);
                }
                if let Some(out) = out {
                    dispatch(Combine { states, first, weights, rows, out, width });
                }
            });
        }
    })
}

/// The weighted sums of a block of rows.
struct Combine<'a, T: Element> {
    states: &'a [State<'a, T>],
    first: usize,
    weights: &'a [f64],
    rows: usize,
    out: &'a mut [T],
    width: usize,
}

impl<T: Element> Vectorized for Combine<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { states, first, weights, rows, out, width } = self;
        for (r, out) in out.chunks_exact_mut(width).enumerate() {
            let at = (first + r) * width;
            for (strip, out) in out.chunks_mut(STRIP).enumerate() {
                let (mut sum, mut row) = ([T::Acc::default(); STRIP], [T::Acc::default(); STRIP]);
                for (state, weights) in states.iter().zip(weights.chunks_exact(rows)) {
                    // Not the weight, which may have underflown where the output counts.
                    if state.lse[first + r].to_f64() == f64::NEG_INFINITY {
                        continue;
                    }
                    let weight = T::Acc::from_f64(weights[r]);
                    T::load(&state.out[at + strip * STRIP..][..out.len()], &mut row[..out.len()]);
                    for lane in 0..STRIP {
                        sum[lane] = sum[lane] + row[lane] * weight;
                    }
                }
                T::store(&sum[..out.len()], out);
            }
        }
    }
}

/// Gradients of one state.
pub struct StateGradients<'a, T: Element> {
    /// Of its outputs.
    pub out: &'a mut [T],
    /// Of its log-sum-exps.
    pub lse: &'a mut [T::Acc],
}

/// `dout_s = w_s dout` and `dlse_s = w_s (<dout, out_s - out> + dlse)`, with `w_s = e^(lse_s - lse)`.
pub fn merge_states_backward<T: Element>(
    states: &[State<'_, T>],
    merged: State<'_, T>,
    grad_out: &[T],
    grad_lse: Option<&[T::Acc]>,
    gradients: Vec<StateGradients<'_, T>>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "merge_states_backward";
    let rows = merged.lse.len();
    let width = merged.out.len() / rows.max(1);
    check(OP, states, rows, width)?;
    check(OP, &[merged, State { out: grad_out, lse: grad_lse.unwrap_or(merged.lse) }], rows, width)?;
    for (gradients, state) in gradients.into_iter().zip(states) {
        KernelError::check_len(OP, "gradients", rows, gradients.lse.len())?;
        KernelError::check_len(OP, "gradients", rows * width, gradients.out.len())?;
        let StateGradients { out, lse } = gradients;
        let outs = out.chunks_mut((ROWS * width).max(1)).map(Some).chain(std::iter::repeat_with(|| None));
        let mut blocks: Vec<_> = lse.chunks_mut(ROWS).zip(outs).collect();
        let cost = rows as f64 * (20.0 + width as f64);
        for_each_chunk(par, &mut blocks, 1, cost, |block, blocks| {
            for (lse, out) in blocks {
                let first = block * ROWS;
                let mut weights = [0.0; ROWS];
                let weights = &mut weights[..lse.len()];
                for (r, weight) in weights.iter_mut().enumerate() {
                    let (own, all) = (state.lse[first + r].to_f64(), merged.lse[first + r].to_f64());
                    *weight = if own == f64::NEG_INFINITY { own } else { own - all };
                }
                exp(weights);
                let gradients = StateGradients { out: out.as_deref_mut().unwrap_or(&mut []), lse };
                dispatch(CombineBackward {
                    state,
                    merged: &merged,
                    grad_out,
                    grad_lse,
                    first,
                    weights,
                    gradients,
                    width,
                });
            }
        })?;
    }
    Ok(())
}

/// The gradients of a block of rows of one state.
struct CombineBackward<'a, 'b, T: Element> {
    state: &'a State<'a, T>,
    merged: &'a State<'a, T>,
    grad_out: &'a [T],
    grad_lse: Option<&'a [T::Acc]>,
    first: usize,
    weights: &'a [f64],
    gradients: StateGradients<'b, T>,
    width: usize,
}

impl<T: Element> Vectorized for CombineBackward<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { state, merged, grad_out, grad_lse, first, weights, gradients, width } = self;
        for (r, (lse, &weight)) in gradients.lse.iter_mut().zip(weights).enumerate() {
            let at = (first + r) * width;
            let empty = state.lse[first + r].to_f64() == f64::NEG_INFINITY;
            let factor = T::Acc::from_f64(weight);
            let mut sums = [0.0; STRIP];
            for start in (0..width).step_by(STRIP) {
                let place = at + start..at + (start + STRIP).min(width);
                let count = place.len();
                let [mut grad, mut own, mut all] = [[T::Acc::default(); STRIP]; 3];
                T::load(&grad_out[place.clone()], &mut grad[..count]);
                T::load(&state.out[place.clone()], &mut own[..count]);
                T::load(&merged.out[place], &mut all[..count]);
                for lane in 0..STRIP {
                    sums[lane] += grad[lane].to_f64() * (own[lane].to_f64() - all[lane].to_f64());
                }
                for lane in &mut grad {
                    *lane = if empty { T::Acc::default() } else { *lane * factor };
                }
                T::store(&grad[..count], &mut gradients.out[r * width + start..][..count]);
            }
            let slope = f64::sum(&sums) + grad_lse.map_or(0.0, |g| g[first + r].to_f64());
            *lse = T::Acc::from_f64(if empty { 0.0 } else { weight * slope });
        }
    }
}
