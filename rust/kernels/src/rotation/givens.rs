//! Products of 2 x 2 matrices on pairs of coordinates, stage by stage.

use super::tile::{STRIP, count_rows, load, rows_per_run, store, strips};
use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

const OP: &str = "givens";

/// Which pairs each stage has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// Stage `r` pairs `(j - s, j)` for the odd multiples `j` of `s = 2^r`: one of the two goes on.
    Tree,
    /// Stage `r` pairs `(i, i + 2^r)` for every `i` whose bit `r` is clear.
    Butterfly,
    /// Layer `l` pairs `(i, i + 1)` from `i = l mod 2` on.
    Brick,
}

/// The pairs, their matrices, and the way they are applied.
pub struct Givens<'a> {
    /// Numbers per row.
    pub width: usize,
    /// Which pairs.
    pub topology: Topology,
    /// One angle, or the four entries of a matrix by rows, for each pair.
    pub parameters: &'a [f64],
    /// Whether the parameters are matrices.
    pub matrices: bool,
    /// Whether the transpose is applied.
    pub transpose: bool,
}

/// The pairs `stride` apart of the coordinates from `start` on.
#[derive(Clone, Copy)]
struct Stage {
    start: usize,
    stride: usize,
    /// Only the first of `stride` coordinates has a partner.
    heads: bool,
    /// Number of its first pair.
    first: usize,
}

impl Stage {
    /// Pairs in each `2 * stride` coordinates.
    fn pairs(&self) -> usize {
        if self.heads { 1 } else { self.stride }
    }

    fn count(&self, width: usize) -> usize {
        let (left, chunk) = (width.saturating_sub(self.start), 2 * self.stride);
        let (whole, rest) = (left / chunk, left % chunk);
        whole * self.pairs() + rest.saturating_sub(self.stride).min(self.pairs())
    }
}

impl Givens<'_> {
    fn count(&self) -> usize {
        if self.matrices { self.parameters.len() / 4 } else { self.parameters.len() }
    }

    /// The stages in the order of their parameters.
    fn stages(&self) -> Result<Vec<Stage>, KernelError> {
        let (mut stages, mut first, count) = (Vec::new(), 0, self.count());
        let empty = |stages: usize| match self.topology {
            // Layers go on for ever, unless there is no pair at all.
            Topology::Brick => self.width < 2,
            _ => stages >= usize::BITS as usize || (1 << stages) >= self.width,
        };
        while first < count && !empty(stages.len()) {
            let level = stages.len();
            let stage = match self.topology {
                Topology::Brick => Stage { start: level % 2, stride: 1, heads: false, first },
                _ => Stage { start: 0, stride: 1 << level, heads: self.topology == Topology::Tree, first },
            };
            first += stage.count(self.width);
            stages.push(stage);
        }
        let complete = self.topology == Topology::Brick || empty(stages.len());
        if first != count || !complete || (self.matrices && !self.parameters.len().is_multiple_of(4)) {
            let expected =
                format!("the parameters of whole stages of {:?} for {} coordinates", self.topology, self.width);
            return Err(KernelError::argument(OP, "parameters", expected, format!("{}", self.parameters.len())));
        }
        Ok(stages)
    }

    /// The matrix of each pair as it is applied, by rows.
    fn applied<R: Real>(&self) -> Vec<[R; 4]> {
        let turn = |[a, b, c, d]: [f64; 4]| if self.transpose { [a, c, b, d] } else { [a, b, c, d] };
        let narrow = |matrix: [f64; 4]| turn(matrix).map(R::from_f64);
        if self.matrices {
            return self.parameters.as_chunks::<4>().0.iter().map(|&matrix| narrow(matrix)).collect();
        }
        let rotation = |&angle: &f64| {
            let (sine, cosine) = angle.sin_cos();
            narrow([cosine, -sine, sine, cosine])
        };
        self.parameters.iter().map(rotation).collect()
    }
}

/// What is done to each pair.
///
/// A trait and not a closure: a closure that is called from several places may be compiled as a function of its own,
/// without the instruction set of its callers.
trait Visit<R: Real> {
    /// What a tile has for each coordinate.
    type Slots;
    /// The tile by coordinates.
    fn coordinates(tile: &mut [R]) -> &mut [Self::Slots];
    /// Works on one pair.
    fn pair<const FMA: bool>(&mut self, pair: usize, lower: &mut Self::Slots, upper: &mut Self::Slots);
}

/// Visits the pairs of some stages among the coordinates of a part of a tile, stage by stage.
struct Sweep<'a, R, V> {
    stages: &'a [Stage],
    /// Whether the stages come in order or in the opposite order.
    ascending: bool,
    /// The first coordinate of the part: a multiple of `2 * stride` of every stage.
    from: usize,
    tile: &'a mut [R],
    visit: V,
}

impl<R: Real, V: Visit<R>> Vectorized for Sweep<'_, R, V> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { stages, ascending, from, tile, mut visit } = self;
        let tile = V::coordinates(tile);
        for i in 0..stages.len() {
            let stage = stages[if ascending { i } else { stages.len() - 1 - i }];
            let stride = stage.stride;
            let mut pair = stage.first + from / (2 * stride) * stage.pairs();
            let start = stage.start.min(tile.len());
            if stride == 1 {
                // Neighbours: by far the most chunks, each of known length.
                for [lower, upper] in tile[start..].as_chunks_mut::<2>().0 {
                    visit.pair::<FMA>(pair, lower, upper);
                    pair += 1;
                }
                continue;
            }
            for chunk in tile[start..].chunks_mut(2 * stride) {
                let (lower, upper) = chunk.split_at_mut(stride.min(chunk.len()));
                for (lower, upper) in lower.iter_mut().zip(upper).take(stage.pairs()) {
                    visit.pair::<FMA>(pair, lower, upper);
                    pair += 1;
                }
            }
        }
    }
}

/// `(M x, M y)` for the lanes of two coordinates.
#[inline(always)]
fn product<R: Real, const FMA: bool>([a, b, c, d]: [R; 4], u: R::Panel, v: R::Panel) -> (R::Panel, R::Panel) {
    let (mut p, mut q) = (R::ZERO_PANEL, R::ZERO_PANEL);
    let (u, v) = (u.as_ref(), v.as_ref());
    let (p_lanes, q_lanes) = (p.as_mut(), q.as_mut());
    for lane in 0..R::PANEL {
        p_lanes[lane] = u[lane].mul_add_if::<FMA>(a, v[lane] * b);
        q_lanes[lane] = u[lane].mul_add_if::<FMA>(c, v[lane] * d);
    }
    (p, q)
}

/// Sum over the lanes of `a * b - c * d`.
#[inline(always)]
fn cross<R: Real>(a: R::Panel, b: R::Panel, c: R::Panel, d: R::Panel) -> R {
    let mut sums = R::ZERO_PANEL;
    let ([a, b, c, d], lanes) = ([a.as_ref(), b.as_ref(), c.as_ref(), d.as_ref()], sums.as_mut());
    for lane in 0..R::PANEL {
        lanes[lane] = a[lane] * b[lane] - c[lane] * d[lane];
    }
    R::add_lanes(sums)
}

/// Sum over the lanes of `a * b`.
#[inline(always)]
fn inner<R: Real>(a: R::Panel, b: R::Panel) -> R {
    let mut sums = R::ZERO_PANEL;
    let ([a, b], lanes) = ([a.as_ref(), b.as_ref()], sums.as_mut());
    for lane in 0..R::PANEL {
        lanes[lane] = a[lane] * b[lane];
    }
    R::add_lanes(sums)
}

/// Applies the matrices.
struct Apply<'a, R> {
    applied: &'a [[R; 4]],
}

impl<R: Real> Visit<R> for Apply<'_, R> {
    type Slots = R::Panel;
    #[inline(always)]
    fn coordinates(tile: &mut [R]) -> &mut [R::Panel] {
        R::panels_mut(tile)
    }
    #[inline(always)]
    fn pair<const FMA: bool>(&mut self, pair: usize, lower: &mut R::Panel, upper: &mut R::Panel) {
        (*lower, *upper) = product::<R, FMA>(self.applied[pair], *lower, *upper);
    }
}

/// Applies the matrices, and keeps what they were applied to.
struct Record<'a, R: Real> {
    applied: &'a [[R; 4]],
    tape: &'a mut [[R::Panel; 2]],
}

impl<R: Real> Visit<R> for Record<'_, R> {
    type Slots = R::Panel;
    #[inline(always)]
    fn coordinates(tile: &mut [R]) -> &mut [R::Panel] {
        R::panels_mut(tile)
    }
    #[inline(always)]
    fn pair<const FMA: bool>(&mut self, pair: usize, lower: &mut R::Panel, upper: &mut R::Panel) {
        self.tape[pair] = [*lower, *upper];
        (*lower, *upper) = product::<R, FMA>(self.applied[pair], *lower, *upper);
    }
}

/// Takes gradients back through rotations, whose inputs it recovers: a coordinate has the gradient, then the output.
struct Unrotate<'a, R> {
    applied: &'a [[R; 4]],
    sums: &'a mut [R],
}

impl<R: Real> Visit<R> for Unrotate<'_, R> {
    type Slots = [R::Panel; 2];
    #[inline(always)]
    fn coordinates(tile: &mut [R]) -> &mut [Self::Slots] {
        R::panels_mut(tile).as_chunks_mut().0
    }
    #[inline(always)]
    fn pair<const FMA: bool>(&mut self, pair: usize, lower: &mut Self::Slots, upper: &mut Self::Slots) {
        let ([g, x], [h, y]) = (*lower, *upper);
        self.sums[pair] = self.sums[pair] + cross::<R>(h, x, g, y);
        let [a, b, c, d] = self.applied[pair];
        let ((g, h), (x, y)) = (product::<R, FMA>([a, c, b, d], g, h), product::<R, FMA>([a, c, b, d], x, y));
        (*lower, *upper) = ([g, x], [h, y]);
    }
}

/// Takes gradients back through any matrices, whose inputs are on the tape.
struct Unmix<'a, R: Real> {
    applied: &'a [[R; 4]],
    tape: &'a [[R::Panel; 2]],
    sums: &'a mut [[R; 4]],
}

impl<R: Real> Visit<R> for Unmix<'_, R> {
    type Slots = R::Panel;
    #[inline(always)]
    fn coordinates(tile: &mut [R]) -> &mut [R::Panel] {
        R::panels_mut(tile)
    }
    #[inline(always)]
    fn pair<const FMA: bool>(&mut self, pair: usize, lower: &mut R::Panel, upper: &mut R::Panel) {
        let ([u, v], g, h) = (self.tape[pair], *lower, *upper);
        let products = [inner::<R>(g, u), inner::<R>(g, v), inner::<R>(h, u), inner::<R>(h, v)];
        for (sum, product) in self.sums[pair].iter_mut().zip(products) {
            *sum = *sum + product;
        }
        let [a, b, c, d] = self.applied[pair];
        (*lower, *upper) = product::<R, FMA>([a, c, b, d], g, h);
    }
}

/// The stages whose chunks fit into a strip, and the others.
fn split(givens: &Givens<'_>, stages: &[Stage]) -> usize {
    match givens.topology {
        // Layers cross every border.
        Topology::Brick => 0,
        _ => stages.iter().take_while(|stage| 2 * stage.stride <= STRIP).count(),
    }
}

/// Rough time of one pair on one row, in nanoseconds.
fn cost(givens: &Givens<'_>, rows: usize, per_pair: f64) -> f64 {
    rows as f64 * (givens.width as f64 * 0.3 + givens.count() as f64 * per_pair)
}

/// `y = P_L .. P_1 x` for each row of `x`, or the transpose.
///
/// Every number is a chain of at most as many 2 x 2 products as there are stages, each with an error of `2 u` relative
/// to its operands. Half types are computed in `f32` and rounded once.
pub fn givens<T: Element>(x: &[T], givens: &Givens<'_>, y: &mut [T], par: Par<'_>) -> Result<(), KernelError> {
    let width = givens.width;
    let rows = count_rows(OP, x.len(), width)?;
    KernelError::check_len(OP, "y", x.len(), y.len())?;
    let stages = givens.stages()?;
    let applied = givens.applied::<T::Acc>();
    let (near, far) = stages.split_at(split(givens, &stages));
    let panel = T::Acc::PANEL;
    let mut runs: Vec<_> = x.chunks(panel * width).zip(y.chunks_mut(panel * width)).collect();
    for_each_chunk(par, &mut runs, 1, cost(givens, rows, 0.1), |_, runs| {
        for (x, y) in runs {
            with_scratch((width + STRIP) * panel, |memory| {
                let (tile, wide) = memory.split_at_mut(width * panel);
                let ascending = !givens.transpose;
                for strip in strips(width) {
                    let part = &mut tile[strip.start * panel..strip.end * panel];
                    load::<T, 1>(x, width, &strip, 0, part, wide);
                    if ascending {
                        let (from, visit) = (strip.start, Apply { applied: &applied });
                        dispatch(Sweep { stages: near, ascending, from, tile: part, visit });
                    }
                }
                dispatch(Sweep { stages: far, ascending, from: 0, tile, visit: Apply { applied: &applied } });
                for strip in strips(width) {
                    let part = &mut tile[strip.start * panel..strip.end * panel];
                    if !ascending {
                        let (from, visit) = (strip.start, Apply { applied: &applied });
                        dispatch(Sweep { stages: near, ascending, from, tile: part, visit });
                    }
                    store::<T, 1>(part, 0, &strip, y, width, wide);
                }
            });
        }
    })
}

/// One unit of parallel work of the backward pass.
struct Run<'a, T: Element> {
    grad: &'a [T],
    kept: &'a [T],
    by_x: &'a mut [T],
    sums: Vec<T::Acc>,
}

/// The gradients of [`givens`] by `x` and by the parameters, from `kept`: what came out where the parameters are angles,
/// what went in where they are matrices.
///
/// Sums over rows run in the accumulation type over runs of at most a few hundred rows, then in `f64`.
pub fn givens_backward<T: Element>(
    grad: &[T],
    kept: &[T],
    givens: &Givens<'_>,
    (by_x, by_parameters): (&mut [T], &mut [f64]),
    par: Par<'_>,
) -> Result<(), KernelError> {
    let width = givens.width;
    let rows = count_rows(OP, kept.len(), width)?;
    KernelError::check_len(OP, "grad", kept.len(), grad.len())?;
    KernelError::check_len(OP, "grad_x", kept.len(), by_x.len())?;
    KernelError::check_len(OP, "grad_parameters", givens.parameters.len(), by_parameters.len())?;
    let stages = givens.stages()?;
    let applied = givens.applied::<T::Acc>();
    let len = rows_per_run::<T::Acc>(rows, givens.parameters.len()) * width;
    let inputs = grad.chunks(len).zip(kept.chunks(len));
    let mut runs: Vec<Run<'_, T>> = inputs
        .zip(by_x.chunks_mut(len))
        .map(|((grad, kept), by_x)| Run { grad, kept, by_x, sums: Vec::new() })
        .collect();
    for_each_chunk(par, &mut runs, 1, cost(givens, rows, 0.4), |_, runs| {
        for run in runs {
            run.sums.resize(givens.parameters.len(), T::Acc::default());
            if givens.matrices {
                unmix(givens, &stages, &applied, run);
            } else {
                unrotate(givens, &stages, &applied, run);
            }
        }
    })?;
    by_parameters.fill(0.0);
    for run in &runs {
        for (total, sum) in by_parameters.iter_mut().zip(&run.sums) {
            *total += sum.to_f64();
        }
    }
    if givens.transpose {
        if givens.matrices {
            for matrix in by_parameters.as_chunks_mut::<4>().0 {
                matrix.swap(1, 2);
            }
        } else {
            // The angle applied is the parameter's negative.
            for value in by_parameters {
                *value = -*value;
            }
        }
    }
    Ok(())
}

fn unrotate<T: Element>(givens: &Givens<'_>, stages: &[Stage], applied: &[[T::Acc; 4]], run: &mut Run<'_, T>) {
    let (width, panel) = (givens.width, T::Acc::PANEL);
    let (near, far) = stages.split_at(split(givens, stages));
    // Back from the last stage applied to the first.
    let ascending = givens.transpose;
    let Run { grad, kept, by_x, sums } = run;
    let tiles = grad.chunks(panel * width).zip(kept.chunks(panel * width)).zip(by_x.chunks_mut(panel * width));
    with_scratch((2 * width + STRIP) * panel, |memory| {
        let (tile, wide) = memory.split_at_mut(2 * width * panel);
        for ((grad, kept), by_x) in tiles {
            for strip in strips(width) {
                let part = &mut tile[2 * strip.start * panel..2 * strip.end * panel];
                load::<T, 2>(grad, width, &strip, 0, part, wide);
                load::<T, 2>(kept, width, &strip, 1, part, wide);
                if ascending {
                    let (from, visit) = (strip.start, Unrotate { applied, sums });
                    dispatch(Sweep { stages: near, ascending, from, tile: part, visit });
                }
            }
            dispatch(Sweep { stages: far, ascending, from: 0, tile, visit: Unrotate { applied, sums } });
            for strip in strips(width) {
                let part = &mut tile[2 * strip.start * panel..2 * strip.end * panel];
                if !ascending {
                    let (from, visit) = (strip.start, Unrotate { applied, sums });
                    dispatch(Sweep { stages: near, ascending, from, tile: part, visit });
                }
                store::<T, 2>(part, 0, &strip, by_x, width, wide);
            }
        }
    });
}

fn unmix<T: Element>(givens: &Givens<'_>, stages: &[Stage], applied: &[[T::Acc; 4]], run: &mut Run<'_, T>) {
    let (width, panel) = (givens.width, T::Acc::PANEL);
    let forward = !givens.transpose;
    let Run { grad, kept, by_x, sums } = run;
    let tiles = grad.chunks(panel * width).zip(kept.chunks(panel * width)).zip(by_x.chunks_mut(panel * width));
    with_scratch((width + 2 * applied.len() + STRIP) * panel, |memory| {
        let (tile, rest) = memory.split_at_mut(width * panel);
        let (tape, wide) = rest.split_at_mut(2 * applied.len() * panel);
        for ((grad, kept), by_x) in tiles {
            for strip in strips(width) {
                load::<T, 1>(kept, width, &strip, 0, &mut tile[strip.start * panel..strip.end * panel], wide);
            }
            let tape = T::Acc::panels_mut(tape).as_chunks_mut().0;
            dispatch(Sweep { stages, ascending: forward, from: 0, tile, visit: Record { applied, tape } });
            for strip in strips(width) {
                load::<T, 1>(grad, width, &strip, 0, &mut tile[strip.start * panel..strip.end * panel], wide);
            }
            let visit = Unmix { applied, tape, sums: sums.as_chunks_mut().0 };
            dispatch(Sweep { stages, ascending: !forward, from: 0, tile, visit });
            for strip in strips(width) {
                store::<T, 1>(&tile[strip.start * panel..], 0, &strip, by_x, width, wide);
            }
        }
    });
}
