//! Bindings of the `ot` kernels.
//!
//! Costs arrive as `(matrix, None, columns, "dense")` or `(x, y, width, metric)`.

use crate::array::{View, with_real};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::ot::{
    self, Cost, Dense, Inputs, Marginal, Metric, Order, Outputs, Plan, Problem, Samples, SinkhornParams, Weight,
};
use shiftkern_kernels::simd::Transcendental;

const OP: &str = "sinkhorn";

/// Options of a solve, by name.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Options {
    max_iter: usize,
    reg_init: Option<f64>,
    reg_decay: f64,
    omega: f64,
    rows: (String, f64),
    columns: (String, f64),
    mass: Option<f64>,
    order: String,
    scaling: bool,
}

impl Options {
    fn params(&self) -> Result<SinkhornParams, KernelError> {
        Ok(SinkhornParams {
            max_iter: self.max_iter,
            annealing: self.reg_init.map(|reg| (reg, self.reg_decay)),
            omega: self.omega,
            rows: marginal(&self.rows)?,
            columns: marginal(&self.columns)?,
            mass: self.mass,
            order: if self.order == "gf" { Order::Gf } else { Order::Fg },
            scaling: self.scaling,
        })
    }
}

fn marginal((kind, rho): &(String, f64)) -> Result<Marginal, KernelError> {
    match kind.as_str() {
        "exact" => Ok(Marginal::Exact),
        "kl" => Ok(Marginal::Kl(*rho)),
        "tv" => Ok(Marginal::Tv(*rho)),
        "at_most" => Ok(Marginal::AtMost),
        other => Err(KernelError::argument(OP, "reg_m_type", "'kl' or 'tv'", other)),
    }
}

fn metric(name: &str) -> Result<Metric, KernelError> {
    match name {
        "sqeuclidean" => Ok(Metric::SqEuclidean),
        "euclidean" => Ok(Metric::Euclidean),
        "cosine" => Ok(Metric::Cosine),
        other => Err(KernelError::argument(OP, "cost", "'sqeuclidean', 'euclidean' or 'cosine'", other)),
    }
}

/// A cost matrix, or points and their metric.
type Source = (View, Option<View>, usize, String);

/// Solves a batch of problems; answers go to `f`, `g`, `shift`, `errors` and `report`.
#[pyfunction]
pub fn sinkhorn(
    py: Python<'_>,
    source: Source,
    weights: (View, View),
    reg: View,
    tol: View,
    start: Option<(View, View)>,
    options: Options,
    mut out: (View, View, View, View, View),
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        let (params, (first, second, width, kind)) = (options.params()?, source);
        let start = match &start {
            Some((f, g)) => Some((f.read::<f64>(OP, "warmstart")?, g.read::<f64>(OP, "warmstart")?)),
            None => None,
        };
        let (a, b) = (weights.0.read(OP, "a")?, weights.1.read(OP, "b")?);
        let inputs = Inputs { a, b, reg: reg.read(OP, "reg")?, tol: tol.read(OP, "tol")?, start };
        let mut out = Outputs {
            f: out.0.write(OP, "f")?,
            g: out.1.write(OP, "g")?,
            shift: out.2.write(OP, "shift")?,
            errors: out.3.write(OP, "errors")?,
            report: out.4.write(OP, "report")?,
        };
        with_real!(first, OP, T => match second {
            None => ot::solve_dense(first.read::<T>(OP, "M")?, width, &inputs, &params, &mut out, par),
            Some(y) => {
                let (x, y) = (first.read::<T>(OP, "X")?, y.read::<T>(OP, "Y")?);
                ot::solve_samples(x, y, width, metric(&kind)?, &inputs, &params, &mut out, par)
            }
        })
    })
}

/// Calls `$body` with `$T` bound to the float type and `$cost` to the costs of `$source`.
macro_rules! with_cost {
    ($source:expr, $par:expr, $T:ident, $cost:ident => $body:expr) => {{
        let (first, second, width, kind) = &$source;
        with_real!(first, OP, $T => match second {
            None => {
                let cells = first.read::<$T>(OP, "M")?;
                let $cost = &Dense::new(cells, cells.len() / width, *width, *width);
                $body
            }
            Some(y) => {
                let (x, y) = (first.read::<$T>(OP, "X")?, y.read::<$T>(OP, "Y")?);
                let $cost = &Samples::new(x, y, *width, metric(kind)?, $par)?;
                $body
            }
        })
    }};
}

/// Potentials in units of cost and the regularisation that make a plan.
type Potentials = (View, View, f64);

fn plan_of<'a, T: Transcendental, C: Cost<T>>(cost: &'a C, by: &Potentials) -> Result<Plan<'a, T, C>, KernelError> {
    Ok(Plan::new(cost, by.0.read(OP, "f")?, by.1.read(OP, "g")?, by.2))
}

/// Writes the row sums and column sums; returns `<P, M>`.
#[pyfunction]
pub fn plan_sums(
    py: Python<'_>,
    source: Source,
    by: Potentials,
    mut rows: View,
    mut columns: View,
    threads: usize,
) -> PyResult<f64> {
    run(py, threads, |par| {
        let (rows, columns) = (rows.write(OP, "rows")?, columns.write(OP, "columns")?);
        with_cost!(source, par, T, cost => plan_of::<T, _>(cost, &by)?.sums(rows, columns, par))
    })
}

/// Writes the plan of a cost matrix.
#[pyfunction]
pub fn plan(py: Python<'_>, m: View, columns: usize, by: Potentials, mut out: View, threads: usize) -> PyResult<()> {
    run(py, threads, |par| {
        with_real!(m, OP, T => {
            let cells = m.read::<T>(OP, "M")?;
            let cost = Dense::new(cells, cells.len() / columns, columns, columns);
            plan_of::<T, _>(&cost, &by)?.dense(cells, out.write(OP, "out")?, par)
        })
    })
}

/// `out = P V`; with `per_cost` every cell is divided by its cost.
#[pyfunction]
pub fn plan_apply(
    py: Python<'_>,
    source: Source,
    by: Potentials,
    v: View,
    width: usize,
    per_cost: bool,
    mut out: View,
    threads: usize,
) -> PyResult<()> {
    let weight = if per_cost { Weight::PlanPerCost } else { Weight::Plan };
    run(py, threads, |par| {
        with_cost!(source, par, T, cost => {
            plan_of::<T, _>(cost, &by)?.apply(weight, v.read(OP, "V")?, width, out.write(OP, "out")?, par)
        })
    })
}

/// `out = P^T V` of a cost matrix.
#[pyfunction]
pub fn plan_apply_transposed(
    py: Python<'_>,
    m: View,
    columns: usize,
    by: Potentials,
    v: View,
    width: usize,
    mut out: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        with_real!(m, OP, T => {
            let cells = m.read::<T>(OP, "M")?;
            let cost = Dense::new(cells, cells.len() / columns, columns, columns);
            plan_of::<T, _>(&cost, &by)?.apply_transposed(v.read(OP, "V")?, width, out.write(OP, "out")?, par)
        })
    })
}

/// Writes how many cells of each row are above the threshold.
#[pyfunction]
pub fn plan_count(
    py: Python<'_>,
    source: Source,
    by: Potentials,
    threshold: f64,
    mut out: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        let out = out.write(OP, "counts")?;
        with_cost!(source, par, T, cost => plan_of::<T, _>(cost, &by)?.count_above(threshold, out, par))
    })
}

/// Writes columns and values of the cells above the threshold, row after row.
#[pyfunction]
pub fn plan_values(
    py: Python<'_>,
    source: Source,
    by: Potentials,
    threshold: f64,
    starts: View,
    mut columns: View,
    mut values: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        let (starts, columns) = (starts.read(OP, "starts")?, columns.write(OP, "columns")?);
        with_cost!(source, par, T, cost => {
            let values = values.write(OP, "values")?;
            plan_of::<T, _>(cost, &by)?.collect_above(threshold, starts, columns, values, par)
        })
    })
}

/// Writes the assignment of each row of `scores`.
#[pyfunction]
pub fn sinkhorn_assign(
    py: Python<'_>,
    scores: View,
    rows: usize,
    reg: f64,
    n_iter: usize,
    mut out: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "sinkhorn_assign";
    run(py, threads, |par| {
        with_real!(scores, OP, T => {
            ot::assign(scores.read::<T>(OP, "scores")?, rows, reg, n_iter, out.write(OP, "out")?, par)
        })
    })
}

/// Replaces `f` by what the rows' weights ask for under `g`, and writes the columns' log-sums under it.
#[pyfunction]
pub fn sinkhorn_half_step(
    py: Python<'_>,
    m: View,
    weights: (View, View),
    reg: f64,
    start: (View, View),
    mut f: View,
    mut logs: View,
    threads: usize,
) -> PyResult<()> {
    run(py, threads, |par| {
        let (a, b) = (weights.0.read::<f64>(OP, "a")?, weights.1.read::<f64>(OP, "b")?);
        let start = Some((start.0.read::<f64>(OP, "f")?, start.1.read::<f64>(OP, "g")?));
        let (f, logs) = (f.write::<f64>(OP, "f")?, logs.write::<f64>(OP, "logs")?);
        with_real!(m, OP, T => {
            let cost = Dense::new(m.read::<T>(OP, "M")?, a.len(), b.len(), b.len());
            let (rows, columns) = ot::half_step::<T, _>(&cost, Problem { a, b, reg, tol: 0.0, start }, par)?;
            f.copy_from_slice(&rows);
            logs.copy_from_slice(&columns);
            Ok(())
        })
    })
}
