//! Which pairs of queries and keys are kept.

use super::panel::Chunk;
use crate::KernelError;
use std::ops::Range;

/// Keys, or queries, whose bits one word holds.
const WORD: usize = 64;
/// Longest side of a block.
const MOST_BLOCK: usize = 1024;
/// Numbers of blocks and tokens fit 32 bits.
const MOST_TOKENS: usize = i32::MAX as usize;

/// A mask over `tokens[0]` queries and `tokens[1]` keys in blocks, one map for each of `maps[0]` batches and `maps[1]`
/// heads (1: the same for all).
#[derive(Clone, Copy)]
pub struct BlockMask<'a> {
    indptr: &'a [i64],
    indices: &'a [i64],
    inner: &'a [i64],
    patterns: &'a [u8],
    maps: [usize; 2],
    block: [usize; 2],
    tokens: [usize; 2],
}

impl<'a> BlockMask<'a> {
    /// Checks everything that later code relies on.
    ///
    /// `indptr` is `maps x (rows + 1)`, offsets into `indices`, the kept blocks of each row in rising order. `inner` is
    /// -1 for a block all of whose pairs are kept, else it names one of the `patterns`: `block[0]` rows of
    /// `block[1]` bits, little end first, each row padded to whole 32 bits.
    pub fn new(
        op: &'static str,
        arrays: (&'a [i64], &'a [i64], &'a [i64], &'a [u8]),
        maps: [usize; 2],
        block: [usize; 2],
        tokens: [usize; 2],
    ) -> Result<Self, KernelError> {
        let (indptr, indices, inner, patterns) = arrays;
        let sizes = block.iter().all(|size| (1..=MOST_BLOCK).contains(size));
        if !sizes || maps.contains(&0) || tokens.iter().any(|&tokens| tokens > MOST_TOKENS) {
            let expected = format!("blocks of 1 to {MOST_BLOCK}, at least 1 map, at most {MOST_TOKENS} tokens");
            let got = format!("blocks {block:?}, maps {maps:?}, tokens {tokens:?}");
            return Err(KernelError::argument(op, "mask", expected, got));
        }
        let mask = Self { indptr, indices, inner, patterns, maps, block, tokens };
        let wanted = maps[0].saturating_mul(maps[1]).saturating_mul(mask.rows() + 1);
        KernelError::check_len(op, "indptr", wanted, indptr.len())?;
        KernelError::check_len(op, "inner", indices.len(), inner.len())?;
        let stored = patterns.len() / mask.pattern_bytes();
        KernelError::check_len(op, "patterns", stored * mask.pattern_bytes(), patterns.len())?;
        if stored > MOST_TOKENS {
            return Err(KernelError::argument(op, "patterns", format!("at most {MOST_TOKENS}"), stored.to_string()));
        }
        for map in indptr.chunks_exact(mask.rows() + 1) {
            let in_order = map.is_sorted() && map[0] >= 0 && map[mask.rows()] as usize <= indices.len();
            if !in_order {
                let expected = format!("rising offsets from 0 to {}", indices.len());
                return Err(KernelError::argument(op, "indptr", expected, "others"));
            }
            for row in map.windows(2) {
                let columns = &indices[row[0] as usize..row[1] as usize];
                let fits = columns.first().is_none_or(|&c| c >= 0)
                    && columns.last().is_none_or(|&c| (c as usize) < mask.columns())
                    && columns.windows(2).all(|pair| pair[0] < pair[1]);
                if !fits {
                    let expected = format!("rising block columns from 0 to {} in each row", mask.columns());
                    return Err(KernelError::argument(op, "indices", expected, format!("{columns:?}")));
                }
            }
        }
        if let Some(bad) = inner.iter().find(|&&i| i < -1 || i >= stored as i64) {
            return Err(KernelError::argument(op, "inner", format!("-1 to {}", stored as i64 - 1), bad.to_string()));
        }
        Ok(mask)
    }

    fn rows(&self) -> usize {
        self.tokens[0].div_ceil(self.block[0])
    }

    fn columns(&self) -> usize {
        self.tokens[1].div_ceil(self.block[1])
    }

    fn pattern_row(&self) -> usize {
        self.block[1].div_ceil(32) * 4
    }

    fn pattern_bytes(&self) -> usize {
        self.block[0] * self.pattern_row()
    }

    /// Whether there is one map for several batches and heads, for `batch` of them and `heads`.
    pub fn check_maps(&self, op: &'static str, batch: usize, heads: usize) -> Result<(), KernelError> {
        let fits = |maps: usize, wanted: usize| maps == 1 || maps == wanted;
        if fits(self.maps[0], batch) && fits(self.maps[1], heads) {
            return Ok(());
        }
        let expected = format!("1 or {batch} maps over the batch and 1 or {heads} over the heads");
        Err(KernelError::argument(op, "mask", expected, format!("{:?}", self.maps)))
    }

    /// Number of the map of a batch and head.
    pub fn map(&self, batch: usize, head: usize) -> usize {
        let of = |maps: usize, index: usize| if maps == 1 { 0 } else { index };
        of(self.maps[0], batch) * self.maps[1] + of(self.maps[1], head)
    }

    /// Blocks stored, averaged over the maps: what a kernel's work is estimated by.
    pub fn blocks_per_map(&self) -> f64 {
        self.indices.len() as f64 / (self.maps[0] * self.maps[1]) as f64
    }

    /// Pairs in a block.
    pub fn block_pairs(&self) -> f64 {
        (self.block[0] * self.block[1]) as f64
    }

    /// The mask with queries across the lanes.
    pub fn by_queries(&self) -> Lists<'a> {
        let offsets = self.indptr.iter().map(|&i| i as usize).collect();
        let entries = self.indices.iter().zip(self.inner).map(|(&c, &i)| Entry { across: c as u32, inner: i as i32 });
        Lists { mask: *self, queries_in_lanes: true, offsets, entries: entries.collect() }
    }

    /// The mask with keys across the lanes.
    pub fn by_keys(&self) -> Lists<'a> {
        let (rows, columns) = (self.rows(), self.columns());
        let mut offsets = Vec::with_capacity(self.maps[0] * self.maps[1] * (columns + 1));
        let mut entries = vec![Entry { across: 0, inner: 0 }; 0];
        for map in self.indptr.chunks_exact(rows + 1) {
            let stored = map[0] as usize..map[rows] as usize;
            let mut next = vec![0_usize; columns + 1];
            for &column in &self.indices[stored.clone()] {
                next[column as usize + 1] += 1;
            }
            next[0] = entries.len();
            for column in 0..columns {
                next[column + 1] += next[column];
            }
            offsets.extend_from_slice(&next);
            entries.resize(entries.len() + stored.len(), Entry { across: 0, inner: 0 });
            for (row, ends) in map.windows(2).enumerate() {
                for at in ends[0] as usize..ends[1] as usize {
                    let place = &mut next[self.indices[at] as usize];
                    entries[*place] = Entry { across: row as u32, inner: self.inner[at] as i32 };
                    *place += 1;
                }
            }
        }
        Lists { mask: *self, queries_in_lanes: false, offsets, entries }
    }

    /// Up to 64 bits of a pattern's row, from bit `first` on.
    fn bits(&self, pattern: usize, row: usize, first: usize, count: usize) -> u64 {
        let row = &self.patterns[pattern * self.pattern_bytes() + row * self.pattern_row()..][..self.pattern_row()];
        let bytes = &row[first / 8..row.len().min(first / 8 + 9)];
        let mut wide = [0_u8; 16];
        wide[..bytes.len()].copy_from_slice(bytes);
        (u128::from_le_bytes(wide) >> (first % 8)) as u64 & low_bits(count)
    }
}

/// The `count` lowest bits.
pub fn low_bits(count: usize) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

#[derive(Clone, Copy)]
struct Entry {
    /// Number of the block on the other axis.
    across: u32,
    inner: i32,
}

/// A mask sorted by one of its axes, whose tokens are the lanes.
pub struct Lists<'a> {
    mask: BlockMask<'a>,
    queries_in_lanes: bool,
    /// `maps x (blocks + 1)`.
    offsets: Vec<usize>,
    entries: Vec<Entry>,
}

impl Lists<'_> {
    /// Calls `found` with chunk after chunk of the tokens of the other axis, in order, that are kept for some of
    /// `lanes`, at most 64 of them; bit `i` of a token's word stands for lane `lanes.start + i`. With `complement` the
    /// pairs that are *not* kept are named.
    pub fn visit(&self, map: usize, lanes: Range<usize>, complement: bool, mut found: impl FnMut(&Chunk)) {
        let mut chunk = Chunk::new();
        let (own, other) = if self.queries_in_lanes { (0, 1) } else { (1, 0) };
        let (size, across, tokens) = (self.mask.block[own], self.mask.block[other], self.mask.tokens[other]);
        let blocks = self.mask.tokens[own].div_ceil(size);
        let all = low_bits(lanes.len());
        // Blocks that the lanes lie in, each with a cursor into its list.
        let touched = lanes.start / size..lanes.end.div_ceil(size);
        let offsets = &self.offsets[map * (blocks + 1)..][..=blocks];
        let mut cursors = [(0, 0); WORD];
        for (cursor, block) in cursors.iter_mut().zip(touched.clone()) {
            *cursor = (offsets[block], offsets[block + 1]);
        }
        let cursors = &mut cursors[..touched.len()];
        let mut next = 0;
        loop {
            let stored = cursors.iter().filter(|(at, end)| at < end).map(|&(at, _)| self.entries[at].across).min();
            let block = if complement { next } else { stored.unwrap_or(u32::MAX) };
            let begin = block as usize * across;
            if begin >= tokens {
                break;
            }
            next = block + 1;
            for start in (begin..(begin + across).min(tokens)).step_by(WORD) {
                let count = (begin + across).min(tokens).min(start + WORD) - start;
                let words = self.words(&lanes, touched.start, cursors, block, start - begin, count);
                for (i, word) in words[..count].iter().enumerate() {
                    let word = if complement { !word & all } else { *word };
                    if word != 0 && chunk.push(start + i, word) {
                        found(&chunk);
                        chunk.clear();
                    }
                }
            }
            for (at, end) in &mut *cursors {
                if at < end && self.entries[*at].across == block {
                    *at += 1;
                }
            }
        }
        if chunk.len > 0 {
            found(&chunk);
        }
    }

    /// For `count` tokens of `block` from its `start`-th on: the lanes that each is kept for.
    fn words(
        &self,
        lanes: &Range<usize>,
        touched: usize,
        cursors: &[(usize, usize)],
        block: u32,
        start: usize,
        count: usize,
    ) -> [u64; WORD] {
        let own = usize::from(!self.queries_in_lanes);
        let size = self.mask.block[own];
        let mut words = [0; WORD];
        // With queries in the lanes the patterns' rows are lanes: their bits are turned over at the end.
        let mut by_lane = [0; WORD];
        let mut turned = false;
        for (offset, &(at, end)) in cursors.iter().enumerate() {
            if at == end || self.entries[at].across != block {
                continue;
            }
            let first = (touched + offset) * size;
            let part = first.max(lanes.start)..(first + size).min(lanes.end);
            let shift = part.start - lanes.start;
            let entry = self.entries[at];
            if entry.inner < 0 {
                let word = low_bits(part.len()) << shift;
                words[..count].iter_mut().for_each(|w| *w |= word);
            } else if self.queries_in_lanes {
                turned = true;
                for (lane, query) in part.enumerate() {
                    by_lane[shift + lane] = self.mask.bits(entry.inner as usize, query - first, start, count);
                }
            } else {
                for (i, word) in words[..count].iter_mut().enumerate() {
                    let bits = self.mask.bits(entry.inner as usize, start + i, part.start - first, part.len());
                    *word |= bits << shift;
                }
            }
        }
        if turned {
            transpose(&mut by_lane);
            for (word, bits) in words.iter_mut().zip(by_lane) {
                *word |= bits;
            }
        }
        words
    }
}

/// Transposes a matrix of bits: swaps ever smaller blocks off the diagonal.
fn transpose(rows: &mut [u64; WORD]) {
    let (mut width, mut low) = (32, u64::from(u32::MAX));
    while width > 0 {
        for block in (0..WORD).step_by(2 * width) {
            for i in block..block + width {
                let swap = (rows[i] >> width ^ rows[i + width]) & low;
                rows[i] ^= swap << width;
                rows[i + width] ^= swap;
            }
        }
        width /= 2;
        low ^= low << width;
    }
}
