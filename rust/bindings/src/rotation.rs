//! Bindings of the rotations.

use crate::array::{View, with_float};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::rotation::{self, BlockShape, Givens, LowRankShape, Topology};
use shiftkern_kernels::simd::{Element, Real};

const GIVENS: &str = "givens";
const BLOCKS: &str = "block_rotate";
const LOW_RANK: &str = "low_rank_rotate";
const CAYLEY: &str = "cayley";

fn topology(name: &str) -> Result<Topology, KernelError> {
    match name {
        "tree" => Ok(Topology::Tree),
        "butterfly" => Ok(Topology::Butterfly),
        "brick" => Ok(Topology::Brick),
        _ => Err(KernelError::argument(GIVENS, "topology", "'tree', 'butterfly' or 'brick'", format!("'{name}'"))),
    }
}

/// Parameters of any float type in the type that rows of `T` are computed in.
fn narrow<T: Element>(view: View, op: &'static str, name: &'static str) -> Result<Vec<T::Acc>, KernelError> {
    Ok(view.to_f64(op, name)?.into_iter().map(T::Acc::from_f64).collect())
}

#[pyfunction]
pub fn givens(
    py: Python<'_>,
    x: View,
    parameters: View,
    width: usize,
    options: (String, bool, bool),
    mut y: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        let parameters = &parameters.to_f64(GIVENS, "parameters")?;
        let (name, matrices, transpose) = options;
        let plan = Givens { width, topology: topology(&name)?, parameters, matrices, transpose };
        with_float!(x, GIVENS, T => {
            rotation::givens(x.read::<T>(GIVENS, "x")?, &plan, y.write::<T>(GIVENS, "y")?, par)
        })
    })
}

#[pyfunction]
pub fn givens_backward(
    py: Python<'_>,
    inputs: (View, View, View),
    width: usize,
    options: (String, bool, bool),
    gradients: (View, View),
    threads: usize,
) -> PyResult<()> {
    let ((grad, kept, parameters), (mut by_x, by_parameters)) = (inputs, gradients);
    run(py, threads, |par| {
        let parameters = &parameters.to_f64(GIVENS, "parameters")?;
        let (name, matrices, transpose) = options;
        let plan = Givens { width, topology: topology(&name)?, parameters, matrices, transpose };
        let mut sums = vec![0.0; parameters.len()];
        with_float!(kept, GIVENS, T => {
            let (grad, kept) = (grad.read::<T>(GIVENS, "grad")?, kept.read::<T>(GIVENS, "kept")?);
            let gradients = (by_x.write::<T>(GIVENS, "grad_x")?, &mut sums[..]);
            rotation::givens_backward(grad, kept, &plan, gradients, par)
        })?;
        by_parameters.store_f64(GIVENS, "grad_parameters", &sums)
    })
}

fn block_shape((width, block, factors): (usize, usize, usize)) -> BlockShape {
    BlockShape { width, block, factors }
}

#[pyfunction]
pub fn block_rotate(
    py: Python<'_>,
    x: View,
    blocks: View,
    sizes: (usize, usize, usize),
    transpose: bool,
    mut y: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        with_float!(x, BLOCKS, T => {
            let blocks = narrow::<T>(blocks, BLOCKS, "blocks")?;
            let (x, y) = (x.read::<T>(BLOCKS, "x")?, y.write::<T>(BLOCKS, "y")?);
            rotation::block_rotate(x, &blocks, &block_shape(sizes), transpose, y, par)
        })
    })
}

#[pyfunction]
pub fn block_rotate_backward(
    py: Python<'_>,
    inputs: (View, View, View),
    sizes: (usize, usize, usize),
    transpose: bool,
    gradients: (View, View),
    threads: usize,
) -> PyResult<()> {
    let ((grad, x, blocks), (mut by_x, by_blocks)) = (inputs, gradients);
    run(py, threads, |par| {
        let mut sums = vec![0.0; blocks.len()];
        with_float!(x, BLOCKS, T => {
            let blocks = narrow::<T>(blocks, BLOCKS, "blocks")?;
            let (grad, x) = (grad.read::<T>(BLOCKS, "grad")?, x.read::<T>(BLOCKS, "x")?);
            let gradients = (by_x.write::<T>(BLOCKS, "grad_x")?, &mut sums[..]);
            rotation::block_rotate_backward(grad, x, &blocks, &block_shape(sizes), transpose, gradients, par)
        })?;
        by_blocks.store_f64(BLOCKS, "grad_blocks", &sums)
    })
}

fn low_rank_shape((width, blocks, rank): (usize, usize, usize)) -> LowRankShape {
    LowRankShape { width, blocks, rank }
}

#[pyfunction]
pub fn low_rank_rotate(
    py: Python<'_>,
    x: View,
    directions: View,
    core: View,
    sizes: (usize, usize, usize),
    mut y: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        let core = core.to_f64(LOW_RANK, "core")?;
        with_float!(x, LOW_RANK, T => {
            let directions = narrow::<T>(directions, LOW_RANK, "directions")?;
            let (x, y) = (x.read::<T>(LOW_RANK, "x")?, y.write::<T>(LOW_RANK, "y")?);
            rotation::low_rank_rotate(x, &directions, &core, &low_rank_shape(sizes), y, par)
        })
    })
}

#[pyfunction]
pub fn low_rank_rotate_backward(
    py: Python<'_>,
    inputs: (View, View, View, View),
    sizes: (usize, usize, usize),
    gradients: (View, View, View),
    threads: usize,
) -> PyResult<()> {
    let ((grad, x, directions, core), (mut by_x, by_directions, by_core)) = (inputs, gradients);
    run(py, threads, |par| {
        let core = core.to_f64(LOW_RANK, "core")?;
        let (mut direction_sums, mut core_sums) = (vec![0.0; directions.len()], vec![0.0; core.len()]);
        with_float!(x, LOW_RANK, T => {
            let directions = narrow::<T>(directions, LOW_RANK, "directions")?;
            let (grad, x) = (grad.read::<T>(LOW_RANK, "grad")?, x.read::<T>(LOW_RANK, "x")?);
            let gradients = (by_x.write::<T>(LOW_RANK, "grad_x")?, &mut direction_sums[..], &mut core_sums[..]);
            rotation::low_rank_rotate_backward(grad, x, &directions, &core, &low_rank_shape(sizes), gradients, par)
        })?;
        by_directions.store_f64(LOW_RANK, "grad_directions", &direction_sums)?;
        by_core.store_f64(LOW_RANK, "grad_core", &core_sums)
    })
}

#[pyfunction]
pub fn cayley(py: Python<'_>, skew: View, block: usize, rotations: View, threads: usize) -> PyResult<()> {
    run(py, threads, |par| {
        let mut solved = vec![0.0; rotations.len()];
        shiftkern_kernels::rotation::cayley(&skew.to_f64(CAYLEY, "skew")?, block, &mut solved, par)?;
        rotations.store_f64(CAYLEY, "rotations", &solved)
    })
}
