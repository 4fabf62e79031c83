//! Bindings of the `merge` kernels.

use crate::array::{Coded, View, with_float, with_real};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::merge::{self, Deltas, Divide, Elect, Keep, Masked, Matrix, RankDrop};
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

/// Tensors of which all models have one each.
struct Pieces<'a, T> {
    bases: Vec<Option<&'a [T]>>,
    models: Vec<Vec<&'a [T]>>,
}

impl<'a, T: Coded + Element> Pieces<'a, T> {
    /// `models` holds the first model's tensors, then the second's, ...
    fn new(
        op: &'static str,
        bases: Option<&'a [View]>,
        models: &'a [View],
        tensors: usize,
    ) -> Result<Self, KernelError> {
        KernelError::check_len(op, "models", models.len().next_multiple_of(tensors.max(1)), models.len())?;
        if let Some(bases) = bases {
            KernelError::check_len(op, "bases", tensors, bases.len())?;
        }
        let all = slices::<T>(op, models)?;
        let models = (0..tensors).map(|t| all.iter().skip(t).step_by(tensors).copied().collect()).collect();
        let bases = (0..tensors).map(|t| base(op, bases.map(|bases| &bases[t]))).collect::<Result<_, _>>()?;
        Ok(Self { bases, models })
    }

    fn deltas(&self, op: &'static str) -> Result<Vec<Deltas<'_, T>>, KernelError> {
        self.bases.iter().zip(&self.models).map(|(base, models)| Deltas::new(op, *base, models)).collect()
    }
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
            let pieces = Pieces::<T>::new(OP, bases.as_deref(), &models, models.len() / ranks.len().max(1))?;
            let (found, bad) = merge::thresholds(&pieces.deltas(OP)?, &ranks, par)?;
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

/// As for [`merge_thresholds`], the tensors of all models; `outs` is one model's.
#[pyfunction]
pub fn merge_compete(
    py: Python<'_>,
    bases: Option<Vec<View>>,
    models: Vec<View>,
    rank: usize,
    scale: f64,
    mut outs: Vec<View>,
    threads: usize,
) -> PyResult<Option<usize>> {
    const OP: &str = "merge_compete";
    run(py, threads, |par| {
        let Some(first) = outs.first().copied() else { return Ok(None) };
        with_float!(first, OP, T => {
            let pieces = Pieces::<T>::new(OP, bases.as_deref(), &models, outs.len())?;
            let outs: Result<Vec<_>, _> = outs.iter_mut().map(|out| out.write::<T>(OP, "out")).collect();
            merge::compete(&pieces.deltas(OP)?, rank, Real::from_f64(scale), &mut outs?, par)
        })
    })
}

/// Adds to `counts`, a row of `1 << 16` for each model.
#[pyfunction]
pub fn merge_count_digits(
    py: Python<'_>,
    base_view: View,
    models: Vec<View>,
    shift: u32,
    prefixes: Vec<u64>,
    mut counts: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "merge_count_digits";
    run(py, threads, |par| {
        with_float!(base_view, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, Some(&base_view))?, &models)?;
            merge::count_digits(&deltas, shift, &prefixes, counts.write::<i64>(OP, "counts")?, par)
        })
    })
}

#[pyfunction]
pub fn merge_ranks(py: Python<'_>, x: View, row: usize, mut out: View, threads: usize) -> PyResult<()> {
    const OP: &str = "merge_ranks";
    run(
        py,
        threads,
        |par| with_real!(x, OP, T => merge::ranks(x.read::<T>(OP, "x")?, row, out.write::<i64>(OP, "out")?, par)),
    )
}

/// Chances by rank; see `_ops/merge.py`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct DropOptions {
    density: Vec<f64>,
    epsilon: Vec<f64>,
    rescale: Vec<f64>,
    keys: Vec<u64>,
    offset: u64,
}

#[pyfunction]
pub fn merge_rank_drop(
    py: Python<'_>,
    base_view: Option<View>,
    models: Vec<View>,
    row: usize,
    drop: DropOptions,
    mut out: View,
    threads: usize,
) -> PyResult<Option<usize>> {
    const OP: &str = "merge_rank_drop";
    run(py, threads, |par| {
        let Some(first) = models.first().copied() else { return Ok(None) };
        with_float!(first, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, base_view.as_ref())?, &models)?;
            let DropOptions { density, epsilon, rescale, keys, offset } = drop;
            for (name, len) in [("epsilon", epsilon.len()), ("rescale", rescale.len()), ("keys", keys.len())] {
                KernelError::check_len(OP, name, density.len(), len)?;
            }
            let how: Vec<_> = (0..density.len())
                .map(|k| RankDrop {
                    density: density[k],
                    epsilon: epsilon[k],
                    rescale: (rescale[k] != 0.0).then(|| Real::from_f64(rescale[k])),
                    key: keys[k],
                })
                .collect();
            merge::rank_drop(&deltas, row, &how, offset, out.write::<<T as Element>::Acc>(OP, "out")?, par)
        })
    })
}

#[pyfunction]
pub fn merge_column_changes(
    py: Python<'_>,
    base_view: View,
    models: Vec<View>,
    shape: (usize, usize, bool),
    mut sizes: View,
    mut turns: View,
    threads: usize,
) -> PyResult<Option<usize>> {
    const OP: &str = "merge_column_changes";
    run(py, threads, |par| {
        with_float!(base_view, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, Some(&base_view))?, &models)?;
            let (sizes, turns) = (sizes.write::<f64>(OP, "sizes")?, turns.write::<f64>(OP, "turns")?);
            merge::column_changes(&deltas, matrix(shape), sizes, turns, par)
        })
    })
}

#[pyfunction]
pub fn merge_by_columns(
    py: Python<'_>,
    base_view: View,
    models: Vec<View>,
    shape: (usize, usize, bool),
    weights: View,
    scale: f64,
    mut out: View,
    threads: usize,
) -> PyResult<Option<usize>> {
    const OP: &str = "merge_by_columns";
    run(py, threads, |par| {
        with_float!(base_view, OP, T => {
            let models = slices::<T>(OP, &models)?;
            let deltas = Deltas::new(OP, base(OP, Some(&base_view))?, &models)?;
            let weights = weights.read::<<T as Element>::Acc>(OP, "weights")?;
            merge::by_columns(&deltas, matrix(shape), weights, Real::from_f64(scale), out.write::<T>(OP, "out")?, par)
        })
    })
}

fn matrix((rows, columns, by_row): (usize, usize, bool)) -> Matrix {
    Matrix { rows, columns, by_row }
}
