//! Bindings of attention over windows of a grid.

use crate::array::{View, with_float};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::attention::{self, Neighborhood, NeighborhoodGradients, NeighborhoodInputs};
use shiftkern_kernels::simd::Element;

/// Queries, keys, values and biases, or where their gradients go.
type Attended = (View, View, View, Option<View>);
/// (batch, heads, grid, depth), (kernel, dilation, clamp, scale).
type NeighborhoodTuple = ((usize, usize, [usize; 2], usize), ([usize; 2], [usize; 2], bool, f64));

fn problem(((batch, heads, grid, depth), (kernel, dilation, clamp, scale)): NeighborhoodTuple) -> Neighborhood {
    Neighborhood { batch, heads, grid, depth, kernel, dilation, clamp, scale }
}

const OP: &str = "neighborhood";

#[pyfunction]
pub fn neighborhood(
    py: Python<'_>,
    inputs: Attended,
    options: NeighborhoodTuple,
    mut out: View,
    mut lse: View,
    threads: usize,
) -> PyResult<()> {
    let (q, k, v, bias) = inputs;
    run(py, threads, |par| {
        with_float!(q, OP, T => {
            let bias = bias.as_ref().map(|view| view.read::<T>(OP, "bias")).transpose()?;
            let (q, k, v) = (q.read::<T>(OP, "q")?, k.read::<T>(OP, "k")?, v.read::<T>(OP, "v")?);
            let lse = lse.write::<<T as Element>::Acc>(OP, "lse")?;
            let inputs = NeighborhoodInputs { q, k, v, bias };
            attention::neighborhood(inputs, &problem(options), out.write::<T>(OP, "out")?, lse, par)
        })
    })
}

#[pyfunction]
pub fn neighborhood_backward(
    py: Python<'_>,
    inputs: Attended,
    options: NeighborhoodTuple,
    results: (View, View),
    grads: (View, Option<View>),
    gradients: Attended,
    threads: usize,
) -> PyResult<()> {
    let ((q, k, v, bias), (out, lse), (grad_out, grad_lse)) = (inputs, results, grads);
    let (mut by_q, mut by_k, mut by_v, mut by_bias) = gradients;
    run(py, threads, |par| {
        with_float!(q, OP, T => {
            let bias = bias.as_ref().map(|view| view.read::<T>(OP, "bias")).transpose()?;
            let (q, k, v) = (q.read::<T>(OP, "q")?, k.read::<T>(OP, "k")?, v.read::<T>(OP, "v")?);
            let results = (out.read::<T>(OP, "out")?, lse.read::<<T as Element>::Acc>(OP, "lse")?);
            let grad_lse = grad_lse.as_ref().map(|view| view.read(OP, "grad_lse")).transpose()?;
            let gradients = NeighborhoodGradients {
                q: by_q.write::<T>(OP, "grad_q")?,
                k: by_k.write::<T>(OP, "grad_k")?,
                v: by_v.write::<T>(OP, "grad_v")?,
                bias: by_bias.as_mut().map(|view| view.write::<T>(OP, "grad_bias")).transpose()?,
            };
            let grads = (grad_out.read::<T>(OP, "grad_out")?, grad_lse);
            let inputs = NeighborhoodInputs { q, k, v, bias };
            attention::neighborhood_backward(inputs, &problem(options), results, grads, gradients, par)
        })
    })
}
