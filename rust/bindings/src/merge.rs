//! Bindings of the `merge` kernels.

use crate::array::{Coded, View, with_float};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::merge::{self, Deltas, Divide, Elect, Keep, Masked};
use shiftkern_kernels::simd::{Element, Real};

fn reals<R: Real>(values: &[f64]) -> Vec<R> {
    values.iter().map(|&v| R::from_f64(v)).collect()
}

/// Slices of the models; they must outlive the task vectors made of them.
fn slices<'a, T: Coded>(op: &'static str, models: &'a [View]) -> Result<Vec<&'a [T]>, KernelError> {
    models.iter().map(|model| model.read::<T>(op, "models")).collect()
}

fn base<'a, T: Coded>(op: &'static str, base: Option<&'a View>) -> Result<Option<&'a [T]>, KernelError> {
    base.map(|base| base.read::<T>(op, "base")).transpose()
}

/// Which entries of the task vectors count; see `_ops/merge.py`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct KeepOptions {
    low: Vec<f64>,
    high: Vec<f64>,
    drop_rate: f64,
    keys: Vec<u64>,
    offset: u64,
}

impl KeepOptions {
    fn with<R: Real, O>(&self, body: impl FnOnce(Keep<'_, R>) -> O) -> O {
        let (low, high) = (reals(&self.low), reals(&self.high));
        let Self { drop_rate, keys, offset, .. } = self;
        body(Keep { low: &low, high: &high, drop_rate: *drop_rate, keys, offset: *offset })
    }
}

/// How task vectors are combined; see `_ops/merge.py`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct CombineOptions {
    weights: Vec<f64>,
    rescale: Vec<f64>,
    scale: f64,
    elect: String,
    divide: String,
    tie: f64,
}

impl CombineOptions {
    fn with<T: Element, O>(
        &self,
        op: &'static str,
        keep: Keep<'_, T::Acc>,
        body: impl FnOnce(&Masked<'_, T::Acc>) -> Result<O, KernelError>,
    ) -> Result<O, KernelError> {
        let elect = match self.elect.as_str() {
            "none" => Elect::None,
            "unweighted" => Elect::Unweighted,
            "weighted" => Elect::Weighted,
            other => return Err(KernelError::argument(op, "elect", "'none', 'unweighted' or 'weighted'", other)),
        };
        let divide = match self.divide.as_str() {
            "none" => Divide::None,
            "count" => Divide::Count,
            "weight" => Divide::Weight,
            other => return Err(KernelError::argument(op, "divide", "'none', 'count' or 'weight'", other)),
        };
        let (rescale, weights) = (reals(&self.rescale), reals(&self.weights));
        let (scale, tie) = (Real::from_f64(self.scale), Real::from_f64(self.tie));
        body(&Masked { keep, rescale: &rescale, weights: &weights, scale, elect, divide, tie })
    }
}

/// Returns the first model that holds NaN or an infinity, as all functions here do.
#[pyfunction]
pub fn merge_linear(
    py: Python<'_>,
    base_view: Option<View>,
    models: Vec<View>,
    weights: Vec<f64>,
    mut out: View,
    threads: usize,
) -> PyResult<Option<usize>> {
    const OP: &str = "merge_linear";
    run(py, threads, |par| {
        with_float!(out, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, base_view.as_ref())?, &models)?;
            merge::linear(&deltas, &reals(&weights), out.write::<T>(OP, "out")?, par)
        })
    })
}

#[pyfunction]
pub fn merge_masked(
    py: Python<'_>,
    base_view: Option<View>,
    models: Vec<View>,
    keep: KeepOptions,
    combine: CombineOptions,
    mut out: View,
    threads: usize,
) -> PyResult<Option<usize>> {
    const OP: &str = "merge_masked";
    run(py, threads, |par| {
        with_float!(out, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, base_view.as_ref())?, &models)?;
            let out = out.write::<T>(OP, "out")?;
            keep.with(|keep| combine.with::<T, _>(OP, keep, |how| merge::masked(&deltas, how, out, par)))
        })
    })
}

/// Thresholds of each model over all tensors; `models` holds the first model's tensors, then the second's, ...
#[pyfunction]
pub fn merge_thresholds(
    py: Python<'_>,
    bases: Option<Vec<View>>,
    models: Vec<View>,
    ranks: Vec<usize>,
    dtype: u8,
    threads: usize,
) -> PyResult<(Vec<f64>, Option<usize>)> {
    const OP: &str = "merge_thresholds";
    run(py, threads, |par| {
        let dtype = View::typed(dtype);
        with_float!(dtype, OP, T => {
            let tensors = models.len() / ranks.len().max(1);
            KernelError::check_len(OP, "models", tensors * ranks.len(), models.len())?;
            if let Some(bases) = &bases {
                KernelError::check_len(OP, "bases", tensors, bases.len())?;
            }
            let all = slices::<T>(OP, &models)?;
            let by_tensor: Vec<Vec<_>> =
                (0..tensors).map(|t| all.iter().skip(t).step_by(tensors).copied().collect()).collect();
            let pieces = by_tensor.iter().enumerate().map(|(t, models)| {
                Deltas::new(OP, base(OP, bases.as_ref().map(|bases| &bases[t]))?, models)
            });
            let pieces = pieces.collect::<Result<Vec<_>, KernelError>>()?;
            let (found, bad) = merge::thresholds(&pieces, &ranks, par)?;
            Ok((found.into_iter().map(Real::to_f64).collect(), bad))
        })
    })
}

#[pyfunction]
pub fn merge_magnitude_sums(
    py: Python<'_>,
    base_view: Option<View>,
    models: Vec<View>,
    keep: KeepOptions,
    dtype: u8,
    threads: usize,
) -> PyResult<(Vec<f64>, Option<usize>)> {
    const OP: &str = "merge_magnitude_sums";
    run(py, threads, |par| {
        let dtype = View::typed(dtype);
        with_float!(dtype, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, base_view.as_ref())?, &models)?;
            keep.with(|keep| merge::magnitude_sums(OP, &deltas, &keep, par))
        })
    })
}

#[pyfunction]
pub fn merge_dots(
    py: Python<'_>,
    base_view: Option<View>,
    models: Vec<View>,
    gradient: View,
    threads: usize,
) -> PyResult<(Vec<f64>, Option<usize>)> {
    const OP: &str = "merge_dots";
    run(py, threads, |par| {
        with_float!(gradient, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, base_view.as_ref())?, &models)?;
            merge::dots(&deltas, gradient.read::<T>(OP, "gradient")?, par)
        })
    })
}
