//! Products of block matrices whose blocks join near or far coordinates.

use super::tile::{STRIP, count_rows, load, rows_per_run, store, strips};
use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, TILE_ROWS, Vectorized, dispatch, transpose};
use crate::{KernelError, Par};

const OP: &str = "block_rotate";

/// `factors` products with `width / block` matrices of `block x block`.
///
/// Factor 0 has the coordinates of a block side by side. Factor `i` sees units of `block / 2` coordinates and joins the
/// units `w` and `w + 2^i` inside groups of `2^(i + 1)`; blocks are numbered by their lower units.
#[derive(Clone, Copy, Debug)]
pub struct BlockShape {
    /// Numbers per row.
    pub width: usize,
    /// Side of a block.
    pub block: usize,
    /// Number of factors.
    pub factors: usize,
}

impl BlockShape {
    fn check(&self, blocks: usize) -> Result<(), KernelError> {
        let Self { width, block, factors } = *self;
        let whole = match factors {
            0 | 1 => Some(block),
            _ if !block.is_multiple_of(2) || factors >= usize::BITS as usize => None,
            _ => block.checked_mul(1 << (factors - 1)),
        };
        if block == 0 || factors == 0 || !whole.is_some_and(|whole| whole > 0 && width.is_multiple_of(whole)) {
            let expected = "blocks that divide the width, in every factor";
            return Err(KernelError::argument(OP, "blocks", expected, format!("{self:?}")));
        }
        KernelError::check_len(OP, "blocks", factors.saturating_mul(width).saturating_mul(block), blocks)
    }

    /// Where the two halves of a block begin, and how long the first one is.
    fn places(&self, factor: usize, number: usize) -> ([usize; 2], usize) {
        if factor == 0 {
            let first = number * self.block;
            return ([first, first], self.block);
        }
        let (half, near) = (self.block / 2, 1 << factor);
        let lower = number / near * 2 * near + number % near;
        ([lower * half, (lower + near) * half], half)
    }

    /// Numbers in the blocks of one factor.
    fn factor_len(&self) -> usize {
        self.width * self.block
    }
}

/// The matrices in the type they are applied in, and their transposes.
struct Matrices<R> {
    plain: Vec<R>,
    turned: Vec<R>,
}

impl<R: Real> Matrices<R> {
    fn new(blocks: &[R], shape: &BlockShape) -> Self {
        let side = shape.block;
        let mut turned = vec![R::default(); blocks.len()];
        for (from, to) in blocks.chunks_exact(side * side).zip(turned.chunks_exact_mut(side * side)) {
            for r in 0..side {
                for c in 0..side {
                    to[c * side + r] = from[r * side + c];
                }
            }
        }
        Self { plain: blocks.to_vec(), turned }
    }

    fn of(&self, turned: bool) -> &[R] {
        if turned { &self.turned } else { &self.plain }
    }
}

/// Copies the lanes of a block's coordinates out of a tile.
#[inline(always)]
fn gather<R: Real>(tile: &[R], (places, half): ([usize; 2], usize), block: &mut [R]) {
    let (panel, len) = (R::PANEL, half * R::PANEL);
    block[..len].copy_from_slice(&tile[places[0] * panel..][..len]);
    let rest = block.len() - len;
    block[len..].copy_from_slice(&tile[places[1] * panel..][..rest]);
}

/// Where the lanes of coordinate `k` of a block begin in a tile.
#[inline(always)]
fn place<R: Real>((places, half): ([usize; 2], usize), k: usize) -> usize {
    R::PANEL * if k < half { places[0] + k } else { places[1] + k - half }
}

/// `TILE_ROWS` rows of a matrix from `first` on; a short last group repeats the last row.
#[inline(always)]
fn rows_of<R>(matrix: &[R], side: usize, first: usize) -> [&[R]; TILE_ROWS] {
    std::array::from_fn(|r| &matrix[(first + r).min(side - 1) * side..][..side])
}

/// Multiplies every block of one factor by its matrix, in place; what is multiplied is copied to `tape` first, or, one
/// block at a time, to `block`.
struct Multiply<'a, R> {
    shape: &'a BlockShape,
    factor: usize,
    matrices: &'a [R],
    tile: &'a mut [R],
    block: &'a mut [R],
    tape: Option<&'a mut [R]>,
}

impl<R: Real> Vectorized for Multiply<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { shape, factor, matrices, tile, block, mut tape } = self;
        let (side, panel) = (shape.block, R::PANEL);
        for (number, matrix) in matrices.chunks_exact(side * side).enumerate() {
            let at = shape.places(factor, number);
            let copy = match &mut tape {
                Some(tape) => &mut tape[number * side * panel..][..side * panel],
                None => &mut *block,
            };
            gather(tile, at, copy);
            for first in (0..side).step_by(TILE_ROWS) {
                let products = R::tile_products::<FMA>(rows_of(matrix, side, first), copy);
                for (r, product) in products.iter().take(side - first).enumerate() {
                    tile[place::<R>(at, first + r)..][..panel].copy_from_slice(product.as_ref());
                }
            }
        }
    }
}

/// Adds `g x^T` of every block of one factor to `sums`, summed over the lanes; `tape` has the blocks of `x`.
struct Outer<'a, R> {
    shape: &'a BlockShape,
    factor: usize,
    tile: &'a [R],
    tape: &'a [R],
    sums: &'a mut [R],
    /// Room for a block of `tile`, then for one of `x` turned: whole panels of its coordinates, by lanes.
    room: &'a mut [R],
}

impl<R: Real> Vectorized for Outer<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { shape, factor, tile, tape, sums, room } = self;
        let (side, panel) = (shape.block, R::PANEL);
        let (block, turned) = room.split_at_mut(side * panel);
        for (number, sums) in sums.chunks_exact_mut(side * side).enumerate() {
            gather(tile, shape.places(factor, number), block);
            let x = &tape[number * side * panel..][..side * panel];
            for (i, x) in x.chunks(panel * panel).enumerate() {
                let width = x.len() / panel;
                transpose((x, panel), (&mut turned[i * panel * panel..], panel), (width, panel), |value| value);
            }
            for first in (0..side).step_by(TILE_ROWS) {
                let rows = std::array::from_fn(|r| &block[(first + r).min(side - 1) * panel..][..panel]);
                for (i, columns) in turned.chunks_exact(panel * panel).enumerate() {
                    let products = R::tile_products::<FMA>(rows, columns);
                    let left = i * panel;
                    for (r, product) in products.iter().take(side - first).enumerate() {
                        let sums = &mut sums[(first + r) * side + left..][..panel.min(side - left)];
                        for (sum, &value) in sums.iter_mut().zip(product.as_ref()) {
                            *sum = *sum + value;
                        }
                    }
                }
            }
        }
    }
}

/// `y = B_(m-1) .. B_0 x` for each row of `x`, with `blocks (factors, width / block, block, block)`; or the transpose.
///
/// Every number is one sum of `block` products per factor: error at most `block * u * sum |b x|` for each. Half types
/// are computed in `f32` and rounded once.
pub fn block_rotate<T: Element>(
    x: &[T],
    blocks: &[T::Acc],
    shape: &BlockShape,
    transposed: bool,
    y: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    shape.check(blocks.len())?;
    let rows = count_rows(OP, x.len(), shape.width)?;
    KernelError::check_len(OP, "y", x.len(), y.len())?;
    let (width, panel) = (shape.width, T::Acc::PANEL);
    let matrices = Matrices::new(blocks, shape);
    let cost = (rows * width * (2 + shape.factors * shape.block)) as f64 * 0.03;
    let mut runs: Vec<_> = x.chunks(panel * width).zip(y.chunks_mut(panel * width)).collect();
    for_each_chunk(par, &mut runs, 1, cost, |_, runs| {
        for (x, y) in runs {
            with_scratch((width + STRIP + shape.block) * panel, |memory| {
                let (tile, rest) = memory.split_at_mut(width * panel);
                let (wide, block) = rest.split_at_mut(STRIP * panel);
                for strip in strips(width) {
                    load::<T, 1>(x, width, &strip, 0, &mut tile[strip.start * panel..strip.end * panel], wide);
                }
                for step in 0..shape.factors {
                    let factor = if transposed { shape.factors - 1 - step } else { step };
                    let matrices = &matrices.of(transposed)[factor * shape.factor_len()..][..shape.factor_len()];
                    dispatch(Multiply { shape, factor, matrices, tile, block, tape: None });
                }
                for strip in strips(width) {
                    store::<T, 1>(&tile[strip.start * panel..], 0, &strip, y, width, wide);
                }
            });
        }
    })
}

/// One unit of parallel work of the backward pass.
struct Run<'a, T: Element> {
    grad: &'a [T],
    x: &'a [T],
    by_x: &'a mut [T],
    sums: Vec<T::Acc>,
}

/// The gradients of [`block_rotate`] by `x` and by `blocks`; the factors' inputs are computed again, in cache.
///
/// Sums over rows run in the accumulation type over runs of at most a few hundred rows, then in `f64`.
pub fn block_rotate_backward<T: Element>(
    grad: &[T],
    x: &[T],
    blocks: &[T::Acc],
    shape: &BlockShape,
    transposed: bool,
    (by_x, by_blocks): (&mut [T], &mut [f64]),
    par: Par<'_>,
) -> Result<(), KernelError> {
    shape.check(blocks.len())?;
    let rows = count_rows(OP, x.len(), shape.width)?;
    KernelError::check_len(OP, "grad", x.len(), grad.len())?;
    KernelError::check_len(OP, "grad_x", x.len(), by_x.len())?;
    KernelError::check_len(OP, "grad_blocks", blocks.len(), by_blocks.len())?;
    let matrices = Matrices::new(blocks, shape);
    let len = rows_per_run::<T::Acc>(rows, blocks.len()) * shape.width;
    let inputs = grad.chunks(len).zip(x.chunks(len));
    let mut runs: Vec<Run<'_, T>> =
        inputs.zip(by_x.chunks_mut(len)).map(|((grad, x), by_x)| Run { grad, x, by_x, sums: Vec::new() }).collect();
    let cost = (rows * shape.width * (4 + 3 * shape.factors * shape.block)) as f64 * 0.03;
    for_each_chunk(par, &mut runs, 1, cost, |_, runs| {
        for run in runs {
            run.sums.resize(blocks.len(), T::Acc::default());
            backward(shape, &matrices, transposed, run);
        }
    })?;
    by_blocks.fill(0.0);
    for run in &runs {
        for (total, sum) in by_blocks.iter_mut().zip(&run.sums) {
            *total += sum.to_f64();
        }
    }
    if transposed {
        // What was applied is the transpose of the parameter.
        for matrix in by_blocks.chunks_exact_mut(shape.block * shape.block) {
            for r in 0..shape.block {
                for c in 0..r {
                    matrix.swap(r * shape.block + c, c * shape.block + r);
                }
            }
        }
    }
    Ok(())
}

fn backward<T: Element>(shape: &BlockShape, matrices: &Matrices<T::Acc>, transposed: bool, run: &mut Run<'_, T>) {
    let (width, panel, side) = (shape.width, T::Acc::PANEL, shape.block);
    let Run { grad, x, by_x, sums } = run;
    let tiles = grad.chunks(panel * width).zip(x.chunks(panel * width)).zip(by_x.chunks_mut(panel * width));
    let room = (side + side.next_multiple_of(panel)) * panel;
    with_scratch((width * (1 + shape.factors) + STRIP) * panel + room, |memory| {
        let (tile, rest) = memory.split_at_mut(width * panel);
        let (tape, rest) = rest.split_at_mut(shape.factors * width * panel);
        let (wide, room) = rest.split_at_mut(STRIP * panel);
        // The scratch memory may hold NaN from before, and a panel that a block does not fill is multiplied as a whole.
        room.fill(T::Acc::default());
        for ((grad, x), by_x) in tiles {
            for strip in strips(width) {
                load::<T, 1>(x, width, &strip, 0, &mut tile[strip.start * panel..strip.end * panel], wide);
            }
            let order = |step: usize| if transposed { shape.factors - 1 - step } else { step };
            let span = |factor: usize| factor * shape.factor_len()..(factor + 1) * shape.factor_len();
            for step in 0..shape.factors {
                let factor = order(step);
                let tape = Some(&mut tape[step * width * panel..][..width * panel]);
                let matrices = &matrices.of(transposed)[span(factor)];
                dispatch(Multiply { shape, factor, matrices, tile, block: room, tape });
            }
            for strip in strips(width) {
                load::<T, 1>(grad, width, &strip, 0, &mut tile[strip.start * panel..strip.end * panel], wide);
            }
            for step in (0..shape.factors).rev() {
                let factor = order(step);
                let tape = &tape[step * width * panel..][..width * panel];
                dispatch(Outer { shape, factor, tile, tape, sums: &mut sums[span(factor)], room });
                let matrices = &matrices.of(!transposed)[span(factor)];
                let block = &mut room[..side * panel];
                dispatch(Multiply { shape, factor, matrices, tile, block, tape: None });
            }
            for strip in strips(width) {
                store::<T, 1>(&tile[strip.start * panel..], 0, &strip, by_x, width, wide);
            }
        }
    });
}
