//! Attention over the kept pairs, and what is left over them.

use super::mask::{BlockMask, Lists};
use super::panel::{
    CHUNK, Chunk, Memory, accumulate, all_lanes, by_panel, fill, gather, mask_lanes, scores_scale, spread, store,
};
use super::tokens::Tokens;
use crate::exec::{block_count, for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Tiled, dispatch_simd, panel};
use crate::{KernelError, Par};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Queries, keys and values that belong together.
#[derive(Clone, Copy)]
pub struct Inputs<'a, T> {
    /// `(batch, heads, queries, width)`.
    pub q: Tokens<'a, T>,
    /// `(batch, groups, keys, width)`; `groups` divides `heads`.
    pub k: Tokens<'a, T>,
    /// `(batch, groups, keys, any width)`.
    pub v: Tokens<'a, T>,
    /// Which pairs are kept.
    pub mask: BlockMask<'a>,
    /// Factor of the inner products.
    pub scale: f64,
}

impl<T: Element> Inputs<'_, T> {
    pub(super) fn check(&self, op: &'static str) -> Result<(), KernelError> {
        let ([batch, heads, _, width], [b, groups, keys, w]) = (self.q.shape(), self.k.shape());
        if (b, w) != (batch, width) || groups == 0 && heads > 0 || groups > 0 && !heads.is_multiple_of(groups) {
            let expected = format!("batch {batch}, width {width} and a divisor of {heads} heads");
            return Err(KernelError::argument(op, "k", expected, format!("{:?}", self.k.shape())));
        }
        if self.v.shape()[..3] != [b, groups, keys] {
            let got = format!("{:?}", self.v.shape());
            return Err(KernelError::argument(op, "v", format!("shape [{b}, {groups}, {keys}, ..]"), got));
        }
        self.mask.check_maps(op, batch, heads)
    }

    /// Estimated time on one thread of `products` multiplications of all kept pairs with a head's width.
    pub(super) fn cost_ns(&self, pairs_per_map: f64, products: f64) -> f64 {
        let [batch, heads, ..] = self.q.shape();
        let width = (self.k.width() + self.v.width()) as f64 / 2.0;
        (batch * heads) as f64 * pairs_per_map * products * (width + 8.0) / 30.0
    }

    pub(super) fn group(&self, head: usize) -> usize {
        head * self.k.shape()[1] / self.q.shape()[1]
    }
}

/// What becomes of the output of a row: `kept` and `carried` are its factors and those of the tensor `carried`.
#[derive(Clone, Copy)]
pub enum Reshape<'a, T: Element> {
    /// The output itself.
    Plain,
    /// `out` and `carried` by the factors given for each row, or by 1.
    Scaled {
        /// What the dense pass left over, `(batch, heads, queries, width)`.
        carried: &'a [T],
        /// Of the output and of what is carried, `(batch, heads, queries)` each.
        factors: Option<[&'a [T::Acc]; 2]>,
    },
    /// The states of the kept pairs, now, and of the others, then, merged by their log-sum-exps.
    Merged {
        /// The others' output.
        carried: &'a [T],
        /// The others' log-sum-exp.
        lse: &'a [T::Acc],
    },
}

impl<T: Element> Reshape<'_, T> {
    fn check(&self, op: &'static str, rows: usize, width: usize) -> Result<(), KernelError> {
        match *self {
            Self::Plain => Ok(()),
            Self::Scaled { carried, factors } => {
                KernelError::check_len(op, "carried", rows * width, carried.len())?;
                KernelError::check_len(op, "rho", rows, factors.map_or(rows, |factors| factors[0].len()))?;
                KernelError::check_len(op, "share", rows, factors.map_or(rows, |factors| factors[1].len()))
            }
            Self::Merged { carried, lse } => {
                KernelError::check_len(op, "carried", rows * width, carried.len())?;
                KernelError::check_len(op, "lse_rest", rows, lse.len())
            }
        }
    }
}

/// Output and natural log-sum-exp of attention over the kept pairs.
///
/// A row without a kept key is 0 with log-sum-exp `-inf`. Errors of a sum are those of adding in order, in the
/// accumulation type; exponentials have 2 ulp (3 for `f64`).
pub fn block_sparse_attention<T: Element<Acc: Tiled>>(
    op: &'static str,
    inputs: &Inputs<'_, T>,
    reshape: Reshape<'_, T>,
    out: &mut [T],
    lse: &mut [T::Acc],
    par: Par<'_>,
) -> Result<(), KernelError> {
    inputs.check(op)?;
    let [batch, heads, queries, _] = inputs.q.shape();
    let rows = batch * heads * queries;
    KernelError::check_len(op, "out", rows * inputs.v.width(), out.len())?;
    KernelError::check_len(op, "lse", rows, lse.len())?;
    reshape.check(op, rows, inputs.v.width())?;
    let lanes = panel::<T::Acc>();
    let panels = block_count(queries, lanes);
    let lists = inputs.mask.by_queries();
    let outputs = by_panel(out, batch * heads, queries, lanes, inputs.v.width());
    let mut outputs: Vec<_> = outputs.into_iter().zip(by_panel(lse, batch * heads, queries, lanes, 1)).collect();
    let pairs = inputs.mask.blocks_per_map() * inputs.mask.block_pairs();
    for_each_chunk(par, &mut outputs, 1, inputs.cost_ns(pairs, 2.0), |block, outputs| {
        let (head, first) = (block / panels, block % panels * lanes);
        let queries = first..(first + lanes).min(queries);
        for (out, lse) in outputs {
            Block { inputs, lists: &lists, reshape, head, queries: queries.clone(), out, lse }.run(lanes);
        }
    })
}

struct Block<'a, T: Element> {
    inputs: &'a Inputs<'a, T>,
    lists: &'a Lists<'a>,
    reshape: Reshape<'a, T>,
    /// Batch and head in one.
    head: usize,
    queries: Range<usize>,
    out: &'a mut [T],
    lse: &'a mut [T::Acc],
}

impl<T: Element<Acc: Tiled>> Block<'_, T> {
    fn run(self, lanes: usize) {
        let Self { inputs, lists, reshape, head, queries, out, lse } = self;
        // The first query, counted over all heads.
        let start = head * inputs.q.shape()[2] + queries.start;
        let width = inputs.v.width();
        with_scratch(Workspace::<T::Acc>::len(lanes, inputs.k.width(), width), |memory| {
            let mut space = Workspace::new(memory, lanes, inputs.k.width(), width);
            space.load(inputs, head, queries.clone());
            space.attend(inputs, lists, head, queries.clone(), false);
            space.finish(lse);
            for (lane, row) in space.rows.chunks_exact_mut(width.max(1)).take(queries.len()).enumerate() {
                let (kept, carried) = factors(&reshape, start + lane, lse[lane]);
                if let Some((carried, factor)) = carried {
                    let other = &mut space.other[..width];
                    T::load(&carried[(start + lane) * width..][..width], other);
                    for (value, &carried) in row.iter_mut().zip(&*other) {
                        *value = *value * kept + carried * factor;
                    }
                }
            }
            store(space.rows, out);
        });
    }
}

type Carried<'a, T> = Option<(&'a [T], <T as Element>::Acc)>;

/// Factors of the output and of what is carried, for one row.
#[inline(always)]
fn factors<'a, T: Element>(reshape: &Reshape<'a, T>, row: usize, lse: T::Acc) -> (T::Acc, Carried<'a, T>) {
    let one = T::Acc::from_f64(1.0);
    match *reshape {
        Reshape::Plain => (one, None),
        Reshape::Scaled { carried, factors } => {
            let [kept, rest] = factors.map_or([one; 2], |factors| factors.map(|factor| factor[row]));
            (kept, Some((carried, rest)))
        }
        Reshape::Merged { carried, lse: rest } => {
            let (now, rest) = (lse.to_f64(), rest[row].to_f64());
            let total = log_add(now, rest);
            if total == f64::NEG_INFINITY {
                return (T::Acc::default(), None);
            }
            let share = |part: f64| T::Acc::from_f64((part - total).exp());
            (share(now), Some((carried, share(rest))))
        }
    }
}

/// What [`reattention_capture`] returns; an empty slice for a tensor that is not wanted.
pub struct Captured<'a, T: Element> {
    /// Attention over all pairs.
    pub out: &'a mut [T],
    /// Share of the kept pairs in the sum of all.
    pub rho: &'a mut [T::Acc],
    /// Share of the others.
    pub share: &'a mut [T::Acc],
    /// Log-sum-exp of all pairs.
    pub lse_full: &'a mut [T::Acc],
    /// Log-sum-exp of the pairs that are not kept.
    pub lse_rest: &'a mut [T::Acc],
    /// Attention over the pairs that are not kept.
    pub rest: &'a mut [T],
    /// `out` less attention over the kept pairs.
    pub difference: &'a mut [T],
}

/// Attention over all pairs, and what it takes to stand in for the pairs that are not kept later on.
///
/// Two sums: every pair's score is computed once, but for keys that part of a panel keeps, which are seen twice.
pub fn reattention_capture<T: Element<Acc: Tiled>>(
    inputs: &Inputs<'_, T>,
    captured: Captured<'_, T>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "reattention_capture";
    inputs.check(OP)?;
    let ([batch, heads, queries, _], keys) = (inputs.q.shape(), inputs.k.shape()[2]);
    let (rows, runs, width) = (batch * heads * queries, batch * heads, inputs.v.width());
    let Captured { out, rho, share, lse_full, lse_rest, rest, difference } = captured;
    for (name, values) in [("rho", &*rho), ("share", &*share), ("lse_full", &*lse_full), ("lse_rest", &*lse_rest)] {
        KernelError::check_len(OP, name, rows, values.len())?;
    }
    KernelError::check_len(OP, "out", rows * width, out.len())?;
    let wide = |name, values: &mut [T]| {
        if values.is_empty() {
            Ok(0)
        } else {
            KernelError::check_len(OP, name, rows * width, values.len()).map(|()| width)
        }
    };
    let (rest_width, difference_width) = (wide("rest", rest)?, wide("difference", difference)?);
    let lanes = panel::<T::Acc>();
    let panels = block_count(queries, lanes);
    let cut = |x, width| by_panel(x, runs, queries, lanes, width);
    let statistics = by_panel(rho, runs, queries, lanes, 1).into_iter();
    let statistics = statistics.zip(by_panel(share, runs, queries, lanes, 1));
    let statistics = statistics.zip(by_panel(lse_full, runs, queries, lanes, 1));
    let statistics = statistics.zip(by_panel(lse_rest, runs, queries, lanes, 1));
    let tensors = cut(out, width).into_iter().zip(cut(rest, rest_width)).zip(cut(difference, difference_width));
    let outputs = tensors.zip(statistics).map(|(((out, rest), difference), (((rho, share), lse_full), lse_rest))| {
        Captured { out, rho, share, lse_full, lse_rest, rest, difference }
    });
    let mut outputs: Vec<_> = outputs.collect();
    let lists = inputs.mask.by_queries();
    let cost = inputs.cost_ns((queries * keys) as f64, 2.0);
    for_each_chunk(par, &mut outputs, 1, cost, |block, outputs| {
        let (head, first) = (block / panels, block % panels * lanes);
        for out in outputs {
            capture_panel(inputs, &lists, head, first..(first + lanes).min(queries), lanes, out);
        }
    })
}

fn capture_panel<T: Element<Acc: Tiled>>(
    inputs: &Inputs<'_, T>,
    lists: &Lists<'_>,
    head: usize,
    queries: Range<usize>,
    lanes: usize,
    captured: &mut Captured<'_, T>,
) {
    let (count, width) = (queries.len(), inputs.v.width());
    let workspace = Workspace::<T::Acc>::len(lanes, inputs.k.width(), width);
    with_scratch(workspace + count * (width + 1), |memory| {
        let (kept, memory) = memory.split_at_mut(count * width);
        let (kept_lse, memory) = memory.split_at_mut(count);
        let mut space = Workspace::new(memory, lanes, inputs.k.width(), width);
        space.load(inputs, head, queries.clone());
        space.attend(inputs, lists, head, queries.clone(), false);
        space.finish(kept_lse);
        kept.copy_from_slice(&space.rows[..count * width]);
        space.attend(inputs, lists, head, queries.clone(), true);
        space.finish(captured.lse_rest);
        for lane in 0..count {
            let (rest, full) = (&space.rows[lane * width..][..width], &mut space.other[..width]);
            let kept = &kept[lane * width..][..width];
            let (now, other) = (kept_lse[lane].to_f64(), captured.lse_rest[lane].to_f64());
            let total = log_add(now, other);
            // Without any key there is nothing to share.
            let part = |lse: f64| T::Acc::from_f64(if lse == f64::NEG_INFINITY { 0.0 } else { (lse - total).exp() });
            let (rho, share) = (part(now), part(other));
            captured.rho[lane] = rho;
            captured.share[lane] = share;
            captured.lse_full[lane] = T::Acc::from_f64(total);
            let at = lane * width..(lane + 1) * width;
            // The same operations as in a later step, so that a step right away returns the same bits.
            for ((full, &rest), &kept) in full.iter_mut().zip(rest).zip(kept) {
                *full = kept * rho + rest * share;
            }
            T::store(full, &mut captured.out[at.clone()]);
            if let Some(target) = captured.rest.get_mut(at.clone()) {
                T::store(rest, target);
            }
            if let Some(target) = captured.difference.get_mut(at) {
                for (full, &kept) in full.iter_mut().zip(kept) {
                    *full = *full - kept;
                }
                T::store(full, target);
            }
        }
    });
}

/// `ln(e^a + e^b)`.
fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a > b { (b, a) } else { (a, b) };
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// One panel of queries on its way through the keys.
struct Workspace<'m, R> {
    lanes: usize,
    /// Queries, `width x lanes`, and sums of weighted values, `width of v x lanes`.
    queries: &'m mut [R],
    sums: &'m mut [R],
    /// Scores of a chunk, then its weights.
    scores: &'m mut [R],
    /// Per lane: largest score so far in powers of two, sum of weights, and the factor that a new peak brings.
    peak: &'m mut [R],
    total: &'m mut [R],
    factor: &'m mut [R],
    keys: &'m mut [R],
    values: &'m mut [R],
    /// Queries on their way in and outputs on their way out, side by side; and one more row.
    rows: &'m mut [R],
    other: &'m mut [R],
}

impl<'m, R: Tiled> Workspace<'m, R> {
    fn len(lanes: usize, width: usize, value_width: usize) -> usize {
        let widest = width.max(value_width);
        (width + value_width + widest + CHUNK + 3) * lanes + CHUNK * (width + value_width) + value_width
    }

    fn new(memory: &'m mut [R], lanes: usize, width: usize, value_width: usize) -> Self {
        let mut memory = Memory(memory);
        let mut take = |len: usize| memory.take(len);
        let widest = width.max(value_width);
        Self {
            lanes,
            queries: take(width * lanes),
            sums: take(value_width * lanes),
            scores: take(CHUNK * lanes),
            peak: take(lanes),
            total: take(lanes),
            factor: take(lanes),
            keys: take(CHUNK * width),
            values: take(CHUNK * value_width),
            rows: take(widest * lanes),
            other: take(value_width),
        }
    }

    fn load<T: Element<Acc = R>>(&mut self, inputs: &Inputs<'_, T>, head: usize, queries: Range<usize>) {
        let heads = inputs.q.shape()[1];
        let scale = scores_scale(inputs.scale);
        fill(&inputs.q, (head / heads, head % heads), queries, scale, self.queries, self.rows);
    }

    /// Takes in all keys of the panel, or all that are not kept.
    fn attend<T: Element<Acc = R>>(
        &mut self,
        inputs: &Inputs<'_, T>,
        lists: &Lists<'_>,
        head: usize,
        queries: Range<usize>,
        complement: bool,
    ) {
        self.sums.fill(R::default());
        self.total.fill(R::default());
        self.peak.fill(R::from_f64(f64::NEG_INFINITY));
        let heads = inputs.q.shape()[1];
        let (batch, head) = (head / heads, head % heads);
        let (group, all) = (inputs.group(head), all_lanes(&queries));
        lists.visit(inputs.mask.map(batch, head), queries, complement, |chunk| {
            dispatch_simd(Absorb { space: self, inputs, batch, group, chunk, all });
        });
    }

    /// Writes outputs to `rows` and natural log-sum-exps to `lse`: 0 and `-inf` without a kept key.
    fn finish(&mut self, lse: &mut [R]) {
        for ((lse, &peak), &total) in lse.iter_mut().zip(&*self.peak).zip(&*self.total) {
            let value = std::f64::consts::LN_2 * (peak.to_f64() + total.to_f64().log2());
            *lse = R::from_f64(if total == R::default() { f64::NEG_INFINITY } else { value });
        }
        for (factor, &total) in self.factor.iter_mut().zip(&*self.total) {
            *factor = if total == R::default() { total } else { R::from_f64(1.0) / total };
        }
        spread(self.sums, self.factor, self.rows);
    }
}

/// One chunk of keys for one panel of queries.
struct Absorb<'w, 'm, 'i, T: Element> {
    space: &'w mut Workspace<'m, T::Acc>,
    inputs: &'w Inputs<'i, T>,
    batch: usize,
    group: usize,
    chunk: &'w Chunk,
    all: u64,
}

impl<T: Element<Acc: Tiled>> WithSimd for Absorb<'_, '_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { space, inputs, batch, group, chunk, all } = self;
        let lanes = space.lanes;
        let mut offsets = [0; CHUNK];
        let keys = gather(&inputs.k, batch, group, chunk, &mut offsets, space.keys);
        T::Acc::products(simd, keys, space.queries, space.scores);
        let scores = &mut space.scores[..chunk.len * lanes];
        for (row, &word) in scores.chunks_exact_mut(lanes).zip(&chunk.words) {
            if word != all {
                mask_lanes(row, word, T::Acc::from_f64(f64::NEG_INFINITY));
            }
        }
        T::Acc::soften::<S>(scores, space.peak, space.total, space.factor);
        let values = gather(&inputs.v, batch, group, chunk, &mut offsets, space.values);
        let words = &chunk.words[..chunk.len];
        accumulate(simd, values, words, all, scores, Some(space.factor), space.sums);
    }
}
