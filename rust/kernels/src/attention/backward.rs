//! Gradients of attention over the kept pairs.
//!
//! With weights `P = exp(S - lse)` and `dS = P (dO V^T - delta)`, where `delta` is the inner product of a row's output
//! with its gradient less the gradient of its log-sum-exp: `dQ = scale dS K`, `dK = scale dS^T Q`, `dV = P^T dO`. Scores
//! are computed anew, once with queries across the lanes for `dQ` and once with keys for `dK` and `dV`: two products
//! more than need be, for which every row of every gradient is summed in one order by one thread.

use super::forward::Inputs;
use super::mask::Lists;
use super::panel::{
    CHUNK, Chunk, Memory, accumulate, all_lanes, by_panel, fill, gather, mask_lanes, scores_scale, spread, store,
};
use super::tokens::Tokens;
use crate::exec::{block_count, for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Tiled, dispatch_simd, panel};
use crate::{KernelError, Par};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// What the forward pass returned, and the gradients of it.
#[derive(Clone, Copy)]
pub struct Upstream<'a, T: Element> {
    /// Gradient of the output.
    pub grad_out: Tokens<'a, T>,
    /// Gradient of the log-sum-exps, if any.
    pub grad_lse: Option<&'a [T::Acc]>,
    /// The output.
    pub out: &'a [T],
    /// The log-sum-exps.
    pub lse: &'a [T::Acc],
}

/// Gradients with respect to queries, keys and values, each without gaps.
pub struct Gradients<'a, T> {
    /// Of the queries.
    pub q: &'a mut [T],
    /// Of the keys.
    pub k: &'a mut [T],
    /// Of the values.
    pub v: &'a mut [T],
}

/// Gradients of [`block_sparse_attention`](super::block_sparse_attention); rows without a kept key have none.
pub fn block_sparse_attention_backward<T: Element<Acc: Tiled>>(
    inputs: &Inputs<'_, T>,
    upstream: &Upstream<'_, T>,
    gradients: Gradients<'_, T>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "block_sparse_attention_backward";
    inputs.check(OP)?;
    let ([batch, heads, queries, width], [_, groups, keys, _]) = (inputs.q.shape(), inputs.k.shape());
    let (rows, value_width) = (batch * heads * queries, inputs.v.width());
    let wanted = [batch, heads, queries, value_width];
    if upstream.grad_out.shape() != wanted {
        let got = format!("{:?}", upstream.grad_out.shape());
        return Err(KernelError::argument(OP, "grad_out", format!("shape {wanted:?}"), got));
    }
    KernelError::check_len(OP, "out", rows * value_width, upstream.out.len())?;
    KernelError::check_len(OP, "lse", rows, upstream.lse.len())?;
    KernelError::check_len(OP, "grad_lse", rows, upstream.grad_lse.map_or(rows, <[_]>::len))?;
    KernelError::check_len(OP, "dq", rows * width, gradients.q.len())?;
    KernelError::check_len(OP, "dk", batch * groups * keys * width, gradients.k.len())?;
    KernelError::check_len(OP, "dv", batch * groups * keys * value_width, gradients.v.len())?;
    let Gradients { q: dq, k: dk, v: dv } = gradients;

    let rows = Rows::new(inputs, upstream, par)?;
    let lanes = panel::<T::Acc>();
    let pairs = inputs.mask.blocks_per_map() * inputs.mask.block_pairs();

    let lists = inputs.mask.by_queries();
    let mut outputs = by_panel(dq, batch * heads, queries, lanes, width);
    let panels = block_count(queries, lanes);
    for_each_chunk(par, &mut outputs, 1, inputs.cost_ns(pairs, 3.0), |block, out| {
        let (head, first) = (block / panels, block % panels * lanes);
        let work = Pass { inputs, grad_out: &upstream.grad_out, rows: &rows, lists: &lists, lanes };
        for out in out {
            work.queries(head, first..(first + lanes).min(queries), out);
        }
    })?;

    let lists = inputs.mask.by_keys();
    let outputs = by_panel(dk, batch * groups, keys, lanes, width);
    let mut outputs: Vec<_> = outputs.into_iter().zip(by_panel(dv, batch * groups, keys, lanes, value_width)).collect();
    let panels = block_count(keys, lanes);
    for_each_chunk(par, &mut outputs, 1, inputs.cost_ns(pairs, 4.0), |block, out| {
        let (group, first) = (block / panels, block % panels * lanes);
        let work = Pass { inputs, grad_out: &upstream.grad_out, rows: &rows, lists: &lists, lanes };
        for (dk, dv) in out {
            work.keys(group, first..(first + lanes).min(keys), dk, dv);
        }
    })
}

/// Two numbers for each row of queries.
struct Rows<R> {
    /// Log-sum-exp in powers of two, `inf` for rows that nothing is kept for: their weights are 0.
    level: Vec<R>,
    /// Inner product of output and gradient, less the gradient of the log-sum-exp.
    delta: Vec<R>,
}

impl<R: Tiled> Rows<R> {
    fn new<T: Element<Acc = R>>(
        inputs: &Inputs<'_, T>,
        upstream: &Upstream<'_, T>,
        par: Par<'_>,
    ) -> Result<Self, KernelError> {
        const BLOCK: usize = 64;
        let ([_, heads, queries, _], width) = (inputs.q.shape(), inputs.v.width());
        let level = upstream.lse.iter().map(|&lse| {
            let lse = lse.to_f64();
            R::from_f64(if lse == f64::NEG_INFINITY { f64::INFINITY } else { lse * std::f64::consts::LOG2_E })
        });
        let level: Vec<R> = level.collect();
        let mut delta = vec![R::default(); level.len()];
        for_each_chunk(par, &mut delta, BLOCK, (upstream.out.len() / 4) as f64, |block, delta| {
            with_scratch(2 * width, |memory: &mut [R]| {
                let (out, grad) = memory.split_at_mut(width);
                for (row, delta) in (block * BLOCK..).zip(delta) {
                    let (head, query) = (row / queries, row % queries);
                    T::load(&upstream.out[row * width..][..width], out);
                    T::load(upstream.grad_out.token(head / heads, head % heads, query), grad);
                    let product: f64 = dot(out, grad);
                    *delta = R::from_f64(product - upstream.grad_lse.map_or(0.0, |g| g[row].to_f64()));
                }
            });
        })?;
        Ok(Self { level, delta })
    }
}

/// In eight interleaved sums, which fit any processor's registers.
fn dot<R: Real>(a: &[R], b: &[R]) -> f64 {
    let mut sums = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane].to_f64() * b[lane].to_f64();
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
    sums.iter().sum::<f64>() + rest
}

struct Pass<'a, T: Element> {
    inputs: &'a Inputs<'a, T>,
    grad_out: &'a Tokens<'a, T>,
    rows: &'a Rows<T::Acc>,
    lists: &'a Lists<'a>,
    lanes: usize,
}

impl<T: Element<Acc: Tiled>> Pass<'_, T> {
    /// `dQ` of a panel of queries.
    fn queries(&self, head: usize, queries: Range<usize>, dq: &mut [T]) {
        let Self { inputs, grad_out, lanes, .. } = *self;
        let (width, value_width) = (inputs.k.width(), inputs.v.width());
        let [_, heads, count, _] = inputs.q.shape();
        let (batch, h) = (head / heads, head % heads);
        let len =
            (2 * width + value_width + width.max(value_width) + 2 * CHUNK + 2) * lanes + CHUNK * (width + value_width);
        with_scratch(len, |memory| {
            let mut memory = Memory(memory);
            let mut space = QuerySpace {
                queries: memory.take(width * lanes),
                upstream: memory.take(value_width * lanes),
                sums: memory.take(width * lanes),
                scores: memory.take(CHUNK * lanes),
                slopes: memory.take(CHUNK * lanes),
                level: memory.take(lanes),
                delta: memory.take(lanes),
                keys: memory.take(CHUNK * width),
                values: memory.take(CHUNK * value_width),
            };
            let rows = memory.take(width.max(value_width) * lanes);
            fill(&inputs.q, (batch, h), queries.clone(), scores_scale(inputs.scale), space.queries, rows);
            fill(grad_out, (batch, h), queries.clone(), T::Acc::from_f64(1.0), space.upstream, rows);
            space.sums.fill(T::Acc::default());
            // Lanes without a query weigh nothing.
            space.level.fill(T::Acc::from_f64(f64::INFINITY));
            space.delta.fill(T::Acc::default());
            let at = head * count + queries.start;
            space.level[..queries.len()].copy_from_slice(&self.rows.level[at..][..queries.len()]);
            space.delta[..queries.len()].copy_from_slice(&self.rows.delta[at..][..queries.len()]);
            let (group, all) = (inputs.group(h), all_lanes(&queries));
            self.lists.visit(inputs.mask.map(batch, h), queries.clone(), false, |chunk| {
                dispatch_simd(QueryChunk { space: &mut space, inputs, batch, group, chunk, all });
            });
            // The scores are spent.
            let factors = &mut space.scores[..lanes];
            factors.fill(T::Acc::from_f64(inputs.scale));
            spread(space.sums, factors, &mut rows[..width * lanes]);
            store(rows, dq);
        });
    }

    /// `dK` and `dV` of a panel of keys, from all heads of its group.
    fn keys(&self, group: usize, keys: Range<usize>, dk: &mut [T], dv: &mut [T]) {
        let Self { inputs, grad_out, lanes, .. } = *self;
        let (width, value_width) = (inputs.k.width(), inputs.v.width());
        let ([_, heads, count, _], groups) = (inputs.q.shape(), inputs.k.shape()[1]);
        let (batch, group) = (group / groups, group % groups);
        let len = (2 * (width + value_width + CHUNK) + width.max(value_width)) * lanes + CHUNK * (width + value_width);
        with_scratch(len, |memory| {
            let mut memory = Memory(memory);
            let mut space = KeySpace {
                keys: memory.take(width * lanes),
                values: memory.take(value_width * lanes),
                key_sums: memory.take(width * lanes),
                value_sums: memory.take(value_width * lanes),
                scores: memory.take(CHUNK * lanes),
                slopes: memory.take(CHUNK * lanes),
                queries: memory.take(CHUNK * width),
                upstream: memory.take(CHUNK * value_width),
            };
            let rows = memory.take(width.max(value_width) * lanes);
            fill(&inputs.k, (batch, group), keys.clone(), scores_scale(inputs.scale), space.keys, rows);
            fill(&inputs.v, (batch, group), keys.clone(), T::Acc::from_f64(1.0), space.values, rows);
            space.key_sums.fill(T::Acc::default());
            space.value_sums.fill(T::Acc::default());
            let (share, all) = (heads / groups, all_lanes(&keys));
            for head in group * share..(group + 1) * share {
                let at = (batch * heads + head) * count;
                let rows = (&self.rows.level[at..][..count], &self.rows.delta[at..][..count]);
                self.lists.visit(inputs.mask.map(batch, head), keys.clone(), false, |chunk| {
                    dispatch_simd(KeyChunk { space: &mut space, inputs, grad_out, batch, head, rows, chunk, all });
                });
            }
            // The scores are spent.
            let factors = &mut space.scores[..lanes];
            for (sums, scale, out) in [(space.key_sums, inputs.scale, dk), (space.value_sums, 1.0, dv)] {
                factors.fill(T::Acc::from_f64(scale));
                spread(sums, factors, rows);
                store(rows, out);
            }
        });
    }
}

struct QuerySpace<'m, R> {
    queries: &'m mut [R],
    upstream: &'m mut [R],
    sums: &'m mut [R],
    scores: &'m mut [R],
    slopes: &'m mut [R],
    level: &'m mut [R],
    delta: &'m mut [R],
    keys: &'m mut [R],
    values: &'m mut [R],
}

struct QueryChunk<'w, 'm, 'i, T: Element> {
    space: &'w mut QuerySpace<'m, T::Acc>,
    inputs: &'w Inputs<'i, T>,
    batch: usize,
    group: usize,
    chunk: &'w Chunk,
    all: u64,
}

impl<T: Element<Acc: Tiled>> WithSimd for QueryChunk<'_, '_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { space, inputs, batch, group, chunk, all } = self;
        let lanes = space.level.len();
        let (mut key_offsets, mut value_offsets) = ([0; CHUNK], [0; CHUNK]);
        let keys = gather(&inputs.k, batch, group, chunk, &mut key_offsets, space.keys);
        let values = gather(&inputs.v, batch, group, chunk, &mut value_offsets, space.values);
        T::Acc::products(simd, keys, space.queries, space.scores);
        T::Acc::products(simd, values, space.upstream, space.slopes);
        let rows = space.slopes.chunks_exact_mut(lanes).zip(space.scores.chunks_exact(lanes)).zip(&chunk.words);
        for ((slopes, scores), &word) in rows.take(chunk.len) {
            T::Acc::slopes::<S>(scores, space.level, space.delta, slopes);
            if word != all {
                mask_lanes(slopes, word, T::Acc::default());
            }
        }
        accumulate(simd, keys, &chunk.words[..chunk.len], all, space.slopes, None, space.sums);
    }
}

struct KeySpace<'m, R> {
    keys: &'m mut [R],
    values: &'m mut [R],
    key_sums: &'m mut [R],
    value_sums: &'m mut [R],
    scores: &'m mut [R],
    slopes: &'m mut [R],
    queries: &'m mut [R],
    upstream: &'m mut [R],
}

struct KeyChunk<'w, 'm, 'i, T: Element> {
    space: &'w mut KeySpace<'m, T::Acc>,
    inputs: &'w Inputs<'i, T>,
    grad_out: &'w Tokens<'i, T>,
    batch: usize,
    head: usize,
    /// Level and delta of the head's queries.
    rows: (&'w [T::Acc], &'w [T::Acc]),
    chunk: &'w Chunk,
    all: u64,
}

impl<T: Element<Acc: Tiled>> WithSimd for KeyChunk<'_, '_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { space, inputs, grad_out, batch, head, rows: (level, delta), chunk, all } = self;
        let lanes = T::Acc::panel::<S>();
        let (mut query_offsets, mut upstream_offsets) = ([0; CHUNK], [0; CHUNK]);
        let queries = gather(&inputs.q, batch, head, chunk, &mut query_offsets, space.queries);
        let upstream = gather(grad_out, batch, head, chunk, &mut upstream_offsets, space.upstream);
        T::Acc::products(simd, queries, space.keys, space.scores);
        T::Acc::products(simd, upstream, space.values, space.slopes);
        let rows = space.slopes.chunks_exact_mut(lanes).zip(space.scores.chunks_exact_mut(lanes));
        for (((slopes, scores), &word), &query) in rows.zip(&chunk.words).zip(&chunk.tokens).take(chunk.len) {
            T::Acc::weights_and_slopes::<S>(scores, level[query], delta[query], slopes);
            if word != all {
                mask_lanes(scores, word, T::Acc::default());
                mask_lanes(slopes, word, T::Acc::default());
            }
        }
        let words = &chunk.words[..chunk.len];
        accumulate(simd, upstream, words, all, space.scores, None, space.value_sums);
        accumulate(simd, queries, words, all, space.slopes, None, space.key_sums);
    }
}
