//! Transposes of matrices in memory.

use super::Real;

/// Side of a tile: one cache line of `f32`, so that every line is fetched once.
const TILE: usize = 16;

/// `to[c * to_stride + r] = map(from[r * from_stride + c])` for `r < height` and `c < width`.
#[inline(always)]
pub fn transpose<R: Real>(
    (from, from_stride): (&[R], usize),
    (to, to_stride): (&mut [R], usize),
    (height, width): (usize, usize),
    map: impl Fn(R) -> R,
) {
    for top in (0..height).step_by(TILE) {
        for left in (0..width).step_by(TILE) {
            if top + TILE <= height && left + TILE <= width {
                let mut tile = [[R::default(); TILE]; TILE];
                for (r, tile) in tile.iter_mut().enumerate() {
                    tile.copy_from_slice(&from[(top + r) * from_stride + left..][..TILE]);
                }
                for c in 0..TILE {
                    let to = &mut to[(left + c) * to_stride + top..][..TILE].as_chunks_mut::<TILE>().0[0];
                    for r in 0..TILE {
                        to[r] = map(tile[r][c]);
                    }
                }
            } else {
                for c in left..(left + TILE).min(width) {
                    for r in top..(top + TILE).min(height) {
                        to[c * to_stride + r] = map(from[r * from_stride + c]);
                    }
                }
            }
        }
    }
}
