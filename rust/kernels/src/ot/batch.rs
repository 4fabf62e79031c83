//! Problems as tensors hold them: `(batch, n, m)`, with weights of zero beyond the end of the shorter ones.

use super::cost::{Cost, Dense, Metric, Samples};
use super::solve::{Problem, SinkhornParams, Status, in_batch, solve};
use crate::simd::Transcendental;
use crate::{KernelError, Par};
use std::f64::consts::LN_2;

/// Weights `(batch, n)` and `(batch, m)`, one regularisation and one tolerance a problem, and potentials to start from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Weights of the rows.
    pub a: &'a [f64],
    /// Weights of the columns.
    pub b: &'a [f64],
    /// Regularisation of each problem.
    pub reg: &'a [f64],
    /// Tolerated marginal error of each problem.
    pub tol: &'a [f64],
    /// Potentials in units of cost, shaped like the weights.
    pub start: Option<(&'a [f64], &'a [f64])>,
}

/// Where the answers go.
pub struct Outputs<'a> {
    /// `(batch, n)` potentials in units of cost; `-inf` where the weight is zero.
    pub f: &'a mut [f64],
    /// `(batch, m)` potentials.
    pub g: &'a mut [f64],
    /// Multiplier of the total mass, a problem.
    pub shift: &'a mut [f64],
    /// `(batch, max_iter)` marginal errors; entries after the last iteration are left alone.
    pub errors: &'a mut [f64],
    /// `(batch, 2)`: iterations, and how it ended ([`Status`] as a number).
    pub report: &'a mut [i64],
}

/// Solves problems with given cost matrices `(batch, n, m)`.
pub fn solve_dense<T: Transcendental>(
    cells: &[T],
    columns: usize,
    inputs: &Inputs<'_>,
    params: &SinkhornParams,
    out: &mut Outputs<'_>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    let problems = inputs.problems(cells.len() / columns.max(1), columns);
    let rows = inputs.a.len() / inputs.reg.len();
    let mut costs = Vec::with_capacity(problems.len());
    for (i, (problem, cells)) in problems.iter().zip(cells.chunks(rows * columns)).enumerate() {
        Dense::new(cells, rows, columns, columns)
            .check("sinkhorn", "M", 1.0 / (problem.reg * LN_2), par)
            .map_err(|error| in_batch(error, i, problems.len()))?;
        costs.push(Dense::new(cells, problem.a.len(), problem.b.len(), columns));
    }
    finish(&costs, &problems, inputs, params, out, par)
}

/// Solves one problem between points `x` `(n, width)` and `y` `(m, width)`.
pub fn solve_samples<T: Transcendental>(
    x: &[T],
    y: &[T],
    width: usize,
    metric: Metric,
    inputs: &Inputs<'_>,
    params: &SinkhornParams,
    out: &mut Outputs<'_>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    let cost = Samples::new(x, y, width, metric, par)?;
    let problem = Problem { a: inputs.a, b: inputs.b, reg: inputs.reg[0], tol: inputs.tol[0], start: inputs.start };
    finish(&[cost], &[problem], inputs, params, out, par)
}

impl<'a> Inputs<'a> {
    /// The problems, without what has no weight at their ends.
    fn problems(&self, rows: usize, columns: usize) -> Vec<Problem<'a>> {
        let batch = self.reg.len();
        let rows = rows / batch.max(1);
        (0..batch)
            .map(|p| {
                let a = &self.a[p * rows..][..rows];
                let b = &self.b[p * columns..][..columns];
                let used = |w: &[f64]| w.iter().rposition(|&w| w > 0.0).map_or(0, |last| last + 1);
                let start = self.start.map(|(f, g)| (&f[p * rows..][..rows], &g[p * columns..][..columns]));
                Problem { a: &a[..used(a)], b: &b[..used(b)], reg: self.reg[p], tol: self.tol[p], start }
            })
            .collect()
    }
}

fn finish<T: Transcendental, C: Cost<T>>(
    costs: &[C],
    problems: &[Problem<'_>],
    inputs: &Inputs<'_>,
    params: &SinkhornParams,
    out: &mut Outputs<'_>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    let batch = problems.len();
    let (rows, columns) = (inputs.a.len() / batch.max(1), inputs.b.len() / batch.max(1));
    out.f.fill(f64::NEG_INFINITY);
    out.g.fill(f64::NEG_INFINITY);
    for (p, report) in solve(costs, problems, params, par)?.into_iter().enumerate() {
        out.f[p * rows..][..report.f.len()].copy_from_slice(&report.f);
        out.g[p * columns..][..report.g.len()].copy_from_slice(&report.g);
        out.shift[p] = report.shift;
        out.errors[p * params.max_iter..][..report.errors.len()].copy_from_slice(&report.errors);
        out.report[2 * p] = report.errors.len() as i64;
        out.report[2 * p + 1] = match report.status {
            Status::Converged => 0,
            Status::MaxIter => 1,
            Status::Stalled => 2,
            Status::Invalid => 3,
        };
    }
    Ok(())
}
