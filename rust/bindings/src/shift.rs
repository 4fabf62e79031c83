//! Bindings of the mixing of neighbouring tokens.

use crate::array::{View, with_float};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::attention::{self, ShiftShape};

const OP: &str = "token_shift";

fn shape((batch, heads, tokens, depth): (usize, usize, usize, usize)) -> ShiftShape {
    ShiftShape { batch, heads, tokens, depth }
}

#[pyfunction]
pub fn token_shift(
    py: Python<'_>,
    inputs: (View, Option<View>, View),
    sizes: (usize, usize, usize, usize),
    mut y: View,
    threads: usize,
) -> PyResult<()> {
    let (x, last, mix) = inputs;
    run(py, threads, |par| {
        let mix = mix.to_f64(OP, "mix")?;
        with_float!(x, OP, T => {
            let last = last.as_ref().map(|view| view.read::<T>(OP, "last")).transpose()?;
            let y = y.write::<T>(OP, "y")?;
            attention::token_shift(x.read::<T>(OP, "x")?, last, &mix, &shape(sizes), y, par)
        })
    })
}

#[pyfunction]
pub fn token_shift_backward(
    py: Python<'_>,
    grad: View,
    inputs: (View, Option<View>, View),
    sizes: (usize, usize, usize, usize),
    gradients: (View, Option<View>, View),
    threads: usize,
) -> PyResult<()> {
    let ((x, last, mix), (mut by_x, mut by_last, by_mix)) = (inputs, gradients);
    run(py, threads, |par| {
        let mix = mix.to_f64(OP, "mix")?;
        let mut sums = vec![0.0; mix.len()];
        with_float!(x, OP, T => {
            let (grad, x) = (grad.read::<T>(OP, "grad")?, x.read::<T>(OP, "x")?);
            let last = last.as_ref().map(|view| view.read::<T>(OP, "last")).transpose()?;
            let by_last = by_last.as_mut().map(|view| view.write::<T>(OP, "grad_last")).transpose()?;
            let grads = (by_x.write::<T>(OP, "grad_x")?, by_last, &mut sums[..]);
            attention::token_shift_backward(grad, x, last, &mix, &shape(sizes), grads, par)
        })?;
        by_mix.store_f64(OP, "grad_mix", &sums)
    })
}
