//! Each token mixed with the one before it, by two numbers per head.

use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

const OP: &str = "token_shift";
/// Numbers per block, about: a few times what a first-level cache holds.
const BLOCK: usize = 1 << 15;
/// Numbers that are widened at a time.
const PIECE: usize = 2048;
const LANES: usize = 32;

/// `batch * heads` sequences of `tokens` rows of `depth` numbers.
#[derive(Clone, Copy, Debug)]
pub struct ShiftShape {
    /// Number of instances.
    pub batch: usize,
    /// Heads per instance.
    pub heads: usize,
    /// Length of a sequence.
    pub tokens: usize,
    /// Numbers per token.
    pub depth: usize,
}

impl ShiftShape {
    fn check(&self, x: usize, last: Option<usize>, mix: &[f64]) -> Result<(), KernelError> {
        let sizes = [self.batch, self.heads, self.depth, self.tokens];
        if sizes.contains(&0) {
            return Err(KernelError::argument(OP, "x", "sizes of at least one number", format!("{sizes:?}")));
        }
        let product = |sizes: &[usize]| sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        KernelError::check_len(OP, "x", product(&sizes).unwrap_or(usize::MAX), x)?;
        if let Some(last) = last {
            KernelError::check_len(OP, "last", product(&sizes[..3]).unwrap_or(usize::MAX), last)?;
        }
        KernelError::check_len(OP, "mix", self.heads.saturating_mul(2), mix.len())
    }

    /// Length of a sequence in memory.
    fn sequence(&self) -> usize {
        self.tokens * self.depth
    }

    /// Numbers per block: whole tokens.
    fn block(&self) -> usize {
        (BLOCK / self.depth).max(1) * self.depth
    }
}

/// A run of one sequence's numbers, and where what is computed of it goes.
struct Run<'a, T> {
    sequence: usize,
    start: usize,
    out: &'a mut [T],
    /// Sums of the products of the gradient with the token and with the one before it.
    sums: [f64; 2],
}

fn runs<'a, T>(out: &'a mut [T], shape: &ShiftShape) -> Vec<Run<'a, T>> {
    let sequences = out.chunks_exact_mut(shape.sequence()).enumerate();
    let runs = sequences.flat_map(|(sequence, out)| {
        let runs = out.chunks_mut(shape.block()).enumerate();
        runs.map(move |(i, out)| Run { sequence, start: i * shape.block(), out, sums: [0.0; 2] })
    });
    runs.collect()
}

/// `sequence[start..]` into `out`; before the sequence lies the token `before`, or zeros, and behind it lie zeros.
#[inline(always)]
fn load_from<T: Element>(sequence: &[T], before: Option<&[T]>, start: isize, out: &mut [T::Acc]) {
    let early = (-start).clamp(0, out.len() as isize) as usize;
    let (head, rest) = out.split_at_mut(early);
    match before {
        Some(before) => {
            let from = before.len() - (-start).max(0) as usize;
            T::load(&before[from..from + early], head);
        }
        None => head.fill(T::Acc::default()),
    }
    let from = sequence.len().min(start.max(0) as usize);
    let inside = rest.len().min(sequence.len() - from);
    T::load(&sequence[from..from + inside], &mut rest[..inside]);
    rest[inside..].fill(T::Acc::default());
}

/// `y_t = a x_t + b x_{t - 1}` with `(a, b)` the head's row of `mix (heads, 2)`; before the first token comes
/// `last (batch, heads, depth)`, or zeros.
///
/// Every number of `y` is computed alike, so that a sequence in parts has the bits of the whole. Half types are
/// computed in `f32` and rounded once; the error is at most `2 * u * (|a x_t| + |b x_{t - 1}|)` and that rounding.
pub fn token_shift<T: Element>(
    x: &[T],
    last: Option<&[T]>,
    mix: &[f64],
    shape: &ShiftShape,
    y: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    shape.check(x.len(), last.map(<[T]>::len), mix)?;
    KernelError::check_len(OP, "y", x.len(), y.len())?;
    for_each_chunk(par, &mut runs(y, shape), 1, x.len() as f64 * 0.3, |_, runs| {
        for run in runs {
            forward(x, last, mix, shape, run);
        }
    })
}

fn forward<T: Element>(x: &[T], last: Option<&[T]>, mix: &[f64], shape: &ShiftShape, run: &mut Run<'_, T>) {
    let depth = shape.depth;
    let x = &x[run.sequence * shape.sequence()..][..shape.sequence()];
    let last = last.map(|last| &last[run.sequence * depth..][..depth]);
    let [a, b] = coefficients::<T>(mix, run.sequence % shape.heads);
    // Behind the first token both operands lie in memory as they are.
    let direct = if run.start >= depth { T::as_acc(x).zip(T::as_acc_mut(run.out)) } else { None };
    if let Some((x, out)) = direct {
        let len = out.len();
        return dispatch(Mix { x: &x[run.start..][..len], z: &x[run.start - depth..][..len], a, b, out });
    }
    with_scratch(3 * PIECE, |memory| {
        let (now, rest) = memory.split_at_mut(PIECE);
        let (before, sum) = rest.split_at_mut(PIECE);
        for (i, out) in run.out.chunks_mut(PIECE).enumerate() {
            let (len, at) = (out.len(), (run.start + i * PIECE) as isize);
            load_from(x, None, at, &mut now[..len]);
            load_from(x, last, at - depth as isize, &mut before[..len]);
            dispatch(Mix { x: &now[..len], z: &before[..len], a, b, out: &mut sum[..len] });
            T::store(&sum[..len], out);
        }
    });
}

/// A head's numbers.
#[inline(always)]
fn coefficients<T: Element>(mix: &[f64], head: usize) -> [T::Acc; 2] {
    [T::Acc::from_f64(mix[2 * head]), T::Acc::from_f64(mix[2 * head + 1])]
}

/// `out = a x + b z`.
struct Mix<'a, R> {
    x: &'a [R],
    z: &'a [R],
    a: R,
    b: R,
    out: &'a mut [R],
}

impl<R: Real> Vectorized for Mix<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { x, z, a, b, out } = self;
        for ((&x, &z), out) in x.iter().zip(z).zip(out) {
            *out = x.mul_add_if::<FMA>(a, z * b);
        }
    }
}

/// The gradients of [`token_shift`]: by `x`, by `last` where there is one, and by `mix`, whose sums over all tokens run
/// in `f64` over pieces of a few thousand.
pub fn token_shift_backward<T: Element>(
    grad: &[T],
    x: &[T],
    last: Option<&[T]>,
    mix: &[f64],
    shape: &ShiftShape,
    (by_x, by_last, by_mix): (&mut [T], Option<&mut [T]>, &mut [f64]),
    par: Par<'_>,
) -> Result<(), KernelError> {
    shape.check(x.len(), last.map(<[T]>::len), mix)?;
    KernelError::check_len(OP, "grad", x.len(), grad.len())?;
    KernelError::check_len(OP, "grad_x", x.len(), by_x.len())?;
    KernelError::check_len(OP, "grad_last", last.map_or(0, <[T]>::len), by_last.as_ref().map_or(0, |grad| grad.len()))?;
    KernelError::check_len(OP, "grad_mix", mix.len(), by_mix.len())?;
    let mut runs = runs(by_x, shape);
    for_each_chunk(par, &mut runs, 1, x.len() as f64 * 0.6, |_, runs| {
        for run in runs {
            backward(grad, x, last, mix, shape, run);
        }
    })?;
    by_mix.fill(0.0);
    for run in &runs {
        for (sum, part) in by_mix[run.sequence % shape.heads * 2..].iter_mut().zip(run.sums) {
            *sum += part;
        }
    }
    if let Some(by_last) = by_last {
        let mut wide = vec![T::Acc::default(); shape.depth];
        let first = grad.chunks_exact(shape.sequence());
        for (i, (out, grad)) in by_last.chunks_exact_mut(shape.depth).zip(first).enumerate() {
            T::load(&grad[..shape.depth], &mut wide);
            let [_, b] = coefficients::<T>(mix, i % shape.heads);
            for value in &mut wide {
                *value = *value * b;
            }
            T::store(&wide, out);
        }
    }
    Ok(())
}

fn backward<T: Element>(
    grad: &[T],
    x: &[T],
    last: Option<&[T]>,
    mix: &[f64],
    shape: &ShiftShape,
    run: &mut Run<'_, T>,
) {
    let depth = shape.depth;
    let [grad, x] = [grad, x].map(|data| &data[run.sequence * shape.sequence()..][..shape.sequence()]);
    let last = last.map(|last| &last[run.sequence * depth..][..depth]);
    let [a, b] = coefficients::<T>(mix, run.sequence % shape.heads);
    with_scratch(5 * PIECE, |memory| {
        let mut pieces = memory.chunks_exact_mut(PIECE);
        let [Some(now), Some(before), Some(g), Some(after), Some(sum)] = std::array::from_fn(|_| pieces.next()) else {
            return;
        };
        for (i, out) in run.out.chunks_mut(PIECE).enumerate() {
            let (len, at) = (out.len(), (run.start + i * PIECE) as isize);
            let [now, before, g, after, sum] =
                [&mut *now, &mut *before, &mut *g, &mut *after, &mut *sum].map(|piece| &mut piece[..len]);
            load_from(x, None, at, now);
            load_from(x, last, at - depth as isize, before);
            load_from(grad, None, at, g);
            load_from(grad, None, at + depth as isize, after);
            dispatch(Mix { x: g, z: after, a, b, out: sum });
            T::store(sum, out);
            for (sum, x) in run.sums.iter_mut().zip([now, before]) {
                *sum += dispatch(Dot { a: g, b: x });
            }
        }
    });
}

/// Sum of products, in lanes that are added in `f64`.
struct Dot<'a, R> {
    a: &'a [R],
    b: &'a [R],
}

impl<R: Real> Vectorized for Dot<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let mut acc = [R::default(); LANES];
        let ((a, a_tail), (b, b_tail)) = (self.a.as_chunks::<LANES>(), self.b.as_chunks::<LANES>());
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                acc[lane] = a[lane].mul_add_if::<FMA>(b[lane], acc[lane]);
            }
        }
        for (lane, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
            acc[lane] = a.mul_add_if::<FMA>(b, acc[lane]);
        }
        acc.iter().map(|v| v.to_f64()).sum()
    }
}
