//! Bindings of the `sort` kernels.

use crate::array::{View, with_real};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::sort::{
    self, Distribution, Network, NetworkSortParams, Regularization, SoftOrder, SoftOrderParams,
};

/// (ranks, Kullback-Leibler, strength, descending).
type SoftOrderTuple = (bool, bool, f64, bool);
/// (network, distribution, steepness, `error_free`).
type NetworkTuple = (String, String, f64, bool);

fn soft_order_params((ranks, kl, strength, descending): SoftOrderTuple) -> SoftOrderParams {
    SoftOrderParams {
        order: if ranks { SoftOrder::Rank } else { SoftOrder::Sort },
        regularization: if kl { Regularization::Kl } else { Regularization::L2 },
        strength,
        descending,
    }
}

fn network(rows: usize, options: NetworkTuple) -> Result<(Network, NetworkSortParams), KernelError> {
    const OP: &str = "diffsort";
    let (network, distribution, steepness, error_free) = options;
    let network = match network.as_str() {
        "odd_even" => Network::odd_even(rows),
        "bitonic" => Network::bitonic(rows),
        other => return Err(KernelError::argument(OP, "network", "'bitonic' or 'odd_even'", other)),
    };
    let distribution = match distribution.as_str() {
        "cauchy" => Distribution::Cauchy,
        "reciprocal" => Distribution::Reciprocal,
        "optimal" => Distribution::Optimal,
        "logistic" => Distribution::Logistic,
        other => return Err(KernelError::argument(OP, "distribution", "the name of one", other)),
    };
    Ok((network, NetworkSortParams { distribution, steepness, error_free }))
}

#[pyfunction]
pub fn soft_order(
    py: Python<'_>,
    x: View,
    columns: usize,
    options: SoftOrderTuple,
    mut y: View,
    mut order: View,
    mut first: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "soft_order";
    run(py, threads, |par| {
        let (order, first) = (order.write(OP, "order")?, first.write(OP, "first")?);
        with_real!(x, OP, T => {
            let (x, y) = (x.read::<T>(OP, "x")?, y.write::<T>(OP, "y")?);
            sort::soft_order(x, columns, &soft_order_params(options), y, order, first, par)
        })
    })
}

#[pyfunction]
pub fn soft_order_backward(
    py: Python<'_>,
    grad_y: View,
    x: View,
    order: View,
    first: View,
    columns: usize,
    options: SoftOrderTuple,
    mut grad: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "soft_order_backward";
    run(py, threads, |par| {
        let (order, first) = (order.read(OP, "order")?, first.read(OP, "first")?);
        with_real!(x, OP, T => {
            let (g, x) = (grad_y.read::<T>(OP, "grad_y")?, x.read::<T>(OP, "x")?);
            let grad = grad.write::<T>(OP, "grad")?;
            sort::soft_order_backward(g, x, order, first, columns, &soft_order_params(options), grad, par)
        })
    })
}

#[pyfunction]
pub fn network_sort(
    py: Python<'_>,
    x: View,
    columns: usize,
    options: NetworkTuple,
    mut sorted: View,
    mut p: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "diffsort";
    run(py, threads, |par| {
        let (network, params) = network(columns, options)?;
        with_real!(x, OP, T => {
            let (sorted, p) = (sorted.write::<T>(OP, "sorted")?, p.write::<T>(OP, "p")?);
            sort::network_sort(x.read::<T>(OP, "x")?, &network, &params, sorted, p, par)
        })
    })
}

#[pyfunction]
pub fn network_sort_backward(
    py: Python<'_>,
    grad_sorted: View,
    grad_p: Option<View>,
    x: View,
    columns: usize,
    options: NetworkTuple,
    mut grad: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "diffsort";
    run(py, threads, |par| {
        let (network, params) = network(columns, options)?;
        with_real!(x, OP, T => {
            let (g, x) = (grad_sorted.read::<T>(OP, "grad_sorted")?, x.read::<T>(OP, "x")?);
            let grad_p = grad_p.as_ref().map(|view| view.read::<T>(OP, "grad_p")).transpose()?;
            sort::network_sort_backward(g, grad_p, x, &network, &params, grad.write::<T>(OP, "grad")?, par)
        })
    })
}
