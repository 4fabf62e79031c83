//! One element-wise pass with coefficients per (group, channel).

use super::Layout;
use crate::exec::{Block, Io};
use crate::simd::{Element, Real, Vectorized, dispatch};
use crate::{KernelError, Par};

/// Elements that are widened at a time.
const CACHED: usize = 1024;

/// Coefficients of `y = (x - shift) * scale + bias`, one of each per (group, channel), rounded for the pass.
///
/// The shift is split into a rounded part, subtracted from `x` without error when both are close, and a rest that
/// goes into the bias: a mean of 1e6 times the spread costs no accuracy.
pub struct Affine<R> {
    shift: Vec<R>,
    scale: Vec<R>,
    bias: Vec<R>,
}

impl<R: Real> Affine<R> {
    /// From coefficients in `f64`, as `(shift, scale, bias)`.
    pub fn new(coefficients: impl Iterator<Item = (f64, f64, f64)>) -> Self {
        let (mut shift, mut scale, mut bias) = (Vec::new(), Vec::new(), Vec::new());
        for (centre, factor, offset) in coefficients {
            let rounded = R::from_f64(centre);
            // An infinite centre has no rest to carry over.
            let rest = if rounded.to_f64().is_finite() { centre - rounded.to_f64() } else { 0.0 };
            shift.push(rounded);
            scale.push(R::from_f64(factor));
            bias.push(R::from_f64(offset - rest * factor));
        }
        Self { shift, scale, bias }
    }
}

/// `y = (x - shift) * scale + bias` with the coefficients of each element's (group, channel).
///
/// Error: at most two roundings of the computing type on each of the product and the sum, plus one to the storage type.
pub fn channel_affine<T: Element>(
    io: &mut Io<'_, T>,
    layout: Layout,
    affine: &Affine<T::Acc>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    struct Pass<'a, 'b, T: Element> {
        layout: Layout,
        affine: &'a Affine<T::Acc>,
        start: usize,
        block: Block<'b, T>,
    }
    impl<T: Element> Vectorized for Pass<'_, '_, T> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(mut self) {
            let len = match &self.block {
                Block::Split(_, target) | Block::InPlace(target) => target.len(),
            };
            let mut wide = [T::Acc::default(); CACHED];
            for span in self.layout.spans(self.start..self.start + len, if T::SAME { usize::MAX } else { CACHED }) {
                let range = span.range.start - self.start..span.range.end - self.start;
                let one = |i: usize| (self.affine.shift[i], self.affine.scale[i], self.affine.bias[i]);
                let coefficients = span.coefficient..span.coefficient + if span.per_element { range.len() } else { 1 };
                let many = (
                    &self.affine.shift[coefficients.clone()],
                    &self.affine.scale[coefficients.clone()],
                    &self.affine.bias[coefficients],
                );
                let (source, target) = match &mut self.block {
                    Block::Split(source, target) => (Some(&source[range.clone()]), &mut target[range]),
                    Block::InPlace(target) => (None, &mut target[range]),
                };
                match (source.map(|s| T::as_acc(s)), T::as_acc_mut(target)) {
                    (Some(Some(source)), Some(target)) if span.per_element => {
                        for ((((y, &x), &a), &b), &c) in
                            target.iter_mut().zip(source).zip(many.0).zip(many.1).zip(many.2)
                        {
                            *y = (x - a) * b + c;
                        }
                    }
                    (Some(Some(source)), Some(target)) => {
                        let (a, b, c) = one(span.coefficient);
                        for (y, &x) in target.iter_mut().zip(source) {
                            *y = (x - a) * b + c;
                        }
                    }
                    (None, Some(values)) => affine_in_place(values, span.per_element, one(span.coefficient), many),
                    _ => {
                        let wide = &mut wide[..target.len()];
                        T::load(source.unwrap_or(target), wide);
                        affine_in_place(wide, span.per_element, one(span.coefficient), many);
                        T::store(wide, target);
                    }
                }
            }
        }
    }
    layout.check("channel_affine", io.len())?;
    KernelError::check_len("channel_affine", "shift", layout.statistics(), affine.shift.len())?;
    if layout.is_empty() {
        return Ok(());
    }
    let cost = layout.len() as f64 * 0.3;
    io.for_each(par, layout.block_len(), cost, |start, block| dispatch(Pass { layout, affine, start, block }))
}

#[inline(always)]
fn affine_in_place<R: Real>(values: &mut [R], per_element: bool, one: (R, R, R), many: (&[R], &[R], &[R])) {
    if per_element {
        for (((y, &a), &b), &c) in values.iter_mut().zip(many.0).zip(many.1).zip(many.2) {
            *y = (*y - a) * b + c;
        }
    } else {
        let (a, b, c) = one;
        for y in values {
            *y = (*y - a) * b + c;
        }
    }
}

/// `out = g * factor + (x - shift) * scale + bias`: a normalization's gradient, from its coefficients.
pub fn channel_combine<T: Element>(
    g: &[T],
    x: &[T],
    layout: Layout,
    factor: &[f64],
    affine: &Affine<T::Acc>,
    out: &mut [T],
    par: Par<'_>,
) -> Result<(), KernelError> {
    struct Pass<'a, T: Element> {
        g: &'a [T],
        layout: Layout,
        factor: &'a [T::Acc],
        affine: &'a Affine<T::Acc>,
        start: usize,
        source: &'a [T],
        target: &'a mut [T],
    }
    impl<T: Element> Vectorized for Pass<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let Affine { shift, scale, bias } = self.affine;
            let (mut wide_g, mut wide_x) = ([T::Acc::default(); CACHED], [T::Acc::default(); CACHED]);
            for span in self.layout.spans(self.start..self.start + self.target.len(), CACHED) {
                let range = span.range.start - self.start..span.range.end - self.start;
                let (wide_g, wide_x) = (&mut wide_g[..range.len()], &mut wide_x[..range.len()]);
                T::load(&self.g[span.range.clone()], wide_g);
                T::load(&self.source[range.clone()], wide_x);
                let k = span.coefficient;
                if span.per_element {
                    let k = k..k + wide_x.len();
                    let coefficients = self.factor[k.clone()].iter().zip(&shift[k.clone()]).zip(&scale[k.clone()]);
                    for (((x, &g), ((&f, &a), &b)), &c) in
                        wide_x.iter_mut().zip(&*wide_g).zip(coefficients).zip(&bias[k])
                    {
                        *x = g * f + ((*x - a) * b + c);
                    }
                } else {
                    let (f, a, b, c) = (self.factor[k], shift[k], scale[k], bias[k]);
                    for (x, &g) in wide_x.iter_mut().zip(&*wide_g) {
                        *x = g * f + ((*x - a) * b + c);
                    }
                }
                T::store(wide_x, &mut self.target[range]);
            }
        }
    }
    const OP: &str = "channel_combine";
    layout.check(OP, x.len())?;
    KernelError::check_len(OP, "g", x.len(), g.len())?;
    KernelError::check_len(OP, "factor", layout.statistics(), factor.len())?;
    KernelError::check_len(OP, "shift", layout.statistics(), affine.shift.len())?;
    let found = out.len();
    let Some(mut io) = Io::split(x, out) else {
        return KernelError::check_len(OP, "out", x.len(), found);
    };
    if layout.is_empty() {
        return Ok(());
    }
    let factor: Vec<T::Acc> = factor.iter().map(|&f| T::Acc::from_f64(f)).collect();
    let cost = layout.len() as f64 * 0.5;
    io.for_each(par, layout.block_len(), cost, |start, block| {
        if let Block::Split(source, target) = block {
            dispatch(Pass { g, layout, factor: &factor, affine, start, source, target });
        }
    })
}
