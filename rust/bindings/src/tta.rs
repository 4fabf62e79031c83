//! Bindings of the `tta` kernels.

use crate::array::{View, with_float};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::tta::{self, Affinity, LameParams};

/// Returns the energies and whether the solver converged.
#[pyfunction]
pub fn lame(
    py: Python<'_>,
    probs: View,
    features: View,
    instances: usize,
    affinity: &str,
    k: usize,
    weight: f64,
    max_iter: usize,
    tol: f64,
    mut out: View,
    threads: usize,
) -> PyResult<(Vec<f64>, bool)> {
    const OP: &str = "lame";
    let report = run(py, threads, |par| {
        let affinity = match affinity {
            "knn" => Affinity::Knn,
            "rbf" => Affinity::Rbf,
            "linear" => Affinity::Linear,
            other => return Err(KernelError::argument(OP, "affinity", "'knn', 'rbf' or 'linear'", other)),
        };
        let params = LameParams { affinity, k, weight, max_iter, tol };
        let (probs, out) = (probs.read::<f64>(OP, "probs")?, out.write::<f64>(OP, "out")?);
        with_float!(features, OP, T => {
            tta::lame(probs, features.read::<T>(OP, "features")?, instances, &params, out, par)
        })
    })?;
    Ok((report.energy, report.converged))
}
