//! What the passes over a mask share: a panel of tokens across the lanes, and the tokens of the other axis in chunks.

use super::mask::low_bits;
use super::tokens::Tokens;
use crate::simd::{Element, Gathered, Real, Tiled, Vectorized, dispatch, transpose};
use pulp::Simd;
use std::ops::Range;

/// Tokens of a chunk: a tile of their products with a panel stays in the first-level cache.
pub const CHUNK: usize = 64;

/// Tokens of the other axis that are worked on together, each with the lanes it is kept for.
pub struct Chunk {
    pub tokens: [usize; CHUNK],
    pub words: [u64; CHUNK],
    pub len: usize,
}

impl Chunk {
    pub fn new() -> Self {
        Self { tokens: [0; CHUNK], words: [0; CHUNK], len: 0 }
    }

    /// Adds a token; `true` when the chunk is full.
    #[inline(always)]
    pub fn push(&mut self, token: usize, word: u64) -> bool {
        self.tokens[self.len] = token;
        self.words[self.len] = word;
        self.len += 1;
        self.len == CHUNK
    }

    pub fn clear(&mut self) {
        self.len = 0;
    }
}

/// The tokens of a chunk as rows in the type they are computed in.
///
/// `offsets` is room for their places, `wide` for converted copies where `T` is not that type.
#[inline(always)]
pub fn gather<'s, T: Element>(
    tokens: &Tokens<'s, T>,
    batch: usize,
    head: usize,
    chunk: &Chunk,
    offsets: &'s mut [usize; CHUNK],
    wide: &'s mut [T::Acc],
) -> Gathered<'s, T::Acc> {
    let (width, offsets) = (tokens.width(), &mut offsets[..chunk.len]);
    if let Some(data) = T::as_acc(tokens.data()) {
        for (offset, &token) in offsets.iter_mut().zip(&chunk.tokens) {
            *offset = tokens.offset(batch, head, token);
        }
        return Gathered { data, offsets, width };
    }
    for (i, (offset, &token)) in offsets.iter_mut().zip(&chunk.tokens).enumerate() {
        *offset = i * width;
        T::load(tokens.token(batch, head, token), &mut wide[i * width..][..width]);
    }
    Gathered { data: wide, offsets, width }
}

/// Puts `factor * token` into the lanes of a panel; lanes beyond the tokens become 0.
///
/// `rows` is room for the tokens, side by side.
pub fn fill<T: Element<Acc: Tiled>>(
    tokens: &Tokens<'_, T>,
    (batch, head): (usize, usize),
    lanes: Range<usize>,
    factor: T::Acc,
    panel: &mut [T::Acc],
    rows: &mut [T::Acc],
) {
    let width = tokens.width();
    if width == 0 {
        return;
    }
    let across = panel.len() / width;
    let rows = &mut rows[..across * width];
    rows[lanes.len() * width..].fill(T::Acc::default());
    for (token, row) in lanes.zip(rows.chunks_exact_mut(width)) {
        T::load(tokens.token(batch, head, token), row);
    }
    dispatch(Turn { from: rows, to: panel, width, factor });
}

/// Writes the lanes of a panel, each times its factor, to rows side by side.
pub fn spread<R: Tiled>(panel: &mut [R], factors: &[R], rows: &mut [R]) {
    let lanes = factors.len();
    dispatch(Scale { panel, factors });
    dispatch(Turn { from: panel, to: rows, width: lanes, factor: R::from_f64(1.0) });
}

/// Writes `rows`, side by side, to the tokens of `out`.
pub fn store<T: Element>(rows: &[T::Acc], out: &mut [T]) {
    T::store(&rows[..out.len()], out);
}

/// `to <- factor * from^T`, for `from` in rows of `width`.
struct Turn<'a, R> {
    from: &'a [R],
    to: &'a mut [R],
    width: usize,
    factor: R,
}

impl<R: Real> Vectorized for Turn<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, to, width, factor } = self;
        let height = from.len() / width.max(1);
        transpose((from, width), (to, height), (height, width), |value| value * factor);
    }
}

/// Multiplies each lane of a panel by its factor.
struct Scale<'a, R> {
    panel: &'a mut [R],
    factors: &'a [R],
}

impl<R: Real> Vectorized for Scale<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in self.panel.chunks_exact_mut(self.factors.len()) {
            for (value, &factor) in row.iter_mut().zip(self.factors) {
                *value = *value * factor;
            }
        }
    }
}

/// `acc += rows^T weights`, where a row weighs only in the lanes of its word: what is masked out adds nothing to the
/// other lanes, not even NaN.
#[inline(always)]
pub fn accumulate<S: Simd, R: Tiled>(
    simd: S,
    rows: Gathered<'_, R>,
    words: &[u64],
    all: u64,
    weights: &mut [R],
    factor: Option<&[R]>,
    acc: &mut [R],
) {
    let lanes = R::panel::<S>();
    let finite = |index: usize| {
        let mut sum = R::default();
        for &v in rows.row(index) {
            sum = sum + v.unless_finite();
        }
        sum == R::default()
    };
    let leaks = |index: usize| words[index] != all && !finite(index);
    if (0..rows.offsets.len()).any(leaks) {
        // Rare: such rows are taken out and added lane by lane.
        let (mut offsets, mut kept, mut later) = (Vec::new(), Vec::new(), Vec::new());
        for (i, weights) in weights.chunks_exact(lanes).take(rows.offsets.len()).enumerate() {
            if leaks(i) {
                later.push(i);
            } else {
                offsets.push(rows.offsets[i]);
                kept.extend_from_slice(weights);
            }
        }
        R::accumulate(simd, Gathered { offsets: &offsets, ..rows }, &kept, factor, acc);
        for i in later {
            for (acc, &value) in acc.chunks_exact_mut(lanes).zip(rows.row(i)) {
                for (lane, acc) in acc.iter_mut().enumerate().filter(|(lane, _)| words[i] >> lane & 1 == 1) {
                    *acc = *acc + value * weights[i * lanes + lane];
                }
            }
        }
        return;
    }
    R::accumulate(simd, rows, weights, factor, acc);
}

/// Replaces the lanes outside `word`, of those in `all`, by `value`.
#[inline(always)]
pub fn mask_lanes<R: Real>(row: &mut [R], word: u64, value: R) {
    for (group, row) in row.chunks_mut(16).enumerate() {
        let word = (word >> (16 * group)) as u32;
        for (lane, v) in row.iter_mut().enumerate() {
            *v = if word >> lane & 1 == 1 { *v } else { value };
        }
    }
}

/// The bits of the lanes that hold tokens.
pub fn all_lanes(lanes: &Range<usize>) -> u64 {
    low_bits(lanes.len())
}

/// `x`, tokens of `width` elements in runs of `tokens`, cut into panels of at most `lanes`; a panel never crosses a run.
pub fn by_panel<T>(x: &mut [T], runs: usize, tokens: usize, lanes: usize, width: usize) -> Vec<&mut [T]> {
    if width == 0 {
        return (0..runs * tokens.div_ceil(lanes)).map(|_| -> &mut [T] { &mut [] }).collect();
    }
    x.chunks_mut((tokens * width).max(1)).flat_map(|run| run.chunks_mut(lanes * width)).collect()
}

/// The factor that makes scores powers of two.
pub fn scores_scale<R: Real>(scale: f64) -> R {
    R::from_f64(scale * std::f64::consts::LOG2_E)
}

/// Memory that is handed out piece by piece.
pub struct Memory<'m, R>(pub &'m mut [R]);

impl<'m, R> Memory<'m, R> {
    pub fn take(&mut self, len: usize) -> &'m mut [R] {
        let (taken, left) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = left;
        taken
    }
}
