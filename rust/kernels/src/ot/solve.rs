//! Sinkhorn's iteration: one pass over the cells, one power per cell, for an update of both potentials.
//!
//! A pass goes through the rows in groups of a few. The powers `e_ij = 2^(f'_i + g_j - c M_ij)` with the *old* potential
//! of the row sum to about one, because the potentials change little between passes; so no maximum is needed, and where
//! the sum has left a window around one the row is done again with its maximum. While the powers of the group are in
//! the first-level cache they are added, times `a_i / sum`, to the sums of the columns, from which the new `g` follows.
//! What a column receives under the new `f` and the old `g` also tells the marginal error, at no cost.
//!
//! With [`SinkhornParams::scaling`] the powers are kept, and later passes only multiply them, until the potentials have
//! moved too far from where the powers were taken; then they are taken anew. Both ways go through the same iterates.

use super::Plan;
use super::cost::{Cost, STRIP, padded};
use super::pass::{Part, RowPass, Shared, block_rows, relaxed, window};
use crate::exec::{block_count, for_each_chunk, with_scratch};
use crate::simd::{Real, TILE_ROWS, Transcendental, Vectorized, dispatch, exp_in_place, log_in_place};
use crate::{KernelError, Par};
use std::f64::consts::{LN_2, LOG2_E};
use std::iter::repeat;

/// The error must fall by this part ...
const STALL_PROGRESS: f64 = 1e-3;
/// ... within this many iterations.
const STALL_WINDOW: usize = 100;
/// Cells that are worth more than one thread.
const LARGE: usize = 1 << 16;
/// Time of one turn of a small problem in a batch, so that Ctrl-C is heard in between.
const TURN_NS: f64 = 5e6;

/// What the sums of the plan's rows (or columns) are held to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Marginal {
    /// Equal to the weights.
    Exact,
    /// A penalty `rho KL(sums | weights)`.
    Kl(f64),
    /// A penalty `rho |sums - weights|_1`.
    Tv(f64),
    /// At most the weights; the total is given.
    AtMost,
}

impl Marginal {
    /// The potential (less `log2` of the weight) that is optimal where the balanced one is `balanced`.
    #[inline(always)]
    pub(super) fn update(self, balanced: f64, kappa: f64) -> f64 {
        match self {
            Self::Exact => balanced,
            // The entropy's weight is reg = kappa / ln 2.
            Self::Kl(rho) => balanced * (rho / (rho + kappa / LN_2)),
            Self::Tv(rho) => balanced.clamp(-rho / kappa, rho / kappa),
            Self::AtMost => balanced.min(0.0),
        }
    }
}

/// Which potential an iteration updates first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `f`, then `g`: the columns' sums are met in the end.
    Fg,
    /// `g`, then `f`: the rows' sums are met in the end.
    Gf,
}

/// Options of [`solve`], common to all problems of a batch.
#[derive(Clone, Copy, Debug)]
pub struct SinkhornParams {
    /// Most iterations.
    pub max_iter: usize,
    /// Regularisation of the first iteration, and its factor from one iteration to the next.
    pub annealing: Option<(f64, f64)>,
    /// Over-relaxation.
    pub omega: f64,
    /// Rows' side.
    pub rows: Marginal,
    /// Columns' side.
    pub columns: Marginal,
    /// Total mass, for [`Marginal::AtMost`].
    pub mass: Option<f64>,
    /// Order of the updates.
    pub order: Order,
    /// Keep the powers between passes.
    pub scaling: bool,
}

impl Default for SinkhornParams {
    fn default() -> Self {
        Self {
            max_iter: 1000,
            annealing: None,
            omega: 1.0,
            rows: Marginal::Exact,
            columns: Marginal::Exact,
            mass: None,
            order: Order::Fg,
            scaling: false,
        }
    }
}

/// One problem: weights, regularisation, and potentials to start from.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Weights of the rows.
    pub a: &'a [f64],
    /// Weights of the columns.
    pub b: &'a [f64],
    /// Regularisation.
    pub reg: f64,
    /// Stop when the marginal error (L1) is at most this.
    pub tol: f64,
    /// Potentials in units of cost.
    pub start: Option<(&'a [f64], &'a [f64])>,
}

/// How a solve ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The error is at most the tolerance.
    Converged,
    /// The iterations were not enough.
    MaxIter,
    /// The error has stopped falling.
    Stalled,
    /// Numbers left the range of the type.
    Invalid,
}

/// What a solve returns.
#[derive(Clone, Debug)]
pub struct Report {
    /// Potentials of the rows, in units of cost.
    pub f: Vec<f64>,
    /// Potentials of the columns, in units of cost.
    pub g: Vec<f64>,
    /// The multiplier of the total mass, in units of cost; it is part of `g`.
    pub shift: f64,
    /// Marginal error of each iteration.
    pub errors: Vec<f64>,
    /// How it ended.
    pub status: Status,
}

/// Column sums above this, relative to the mass, have lost nothing to underflow.
fn tiny<T: Real>() -> f64 {
    if size_of::<T>() == 4 { (-80.0_f64).exp2() } else { (-760.0_f64).exp2() }
}

/// The state of one problem between iterations.
struct Solver<'a, T> {
    problem: Problem<'a>,
    params: SinkhornParams,
    /// Cost per power of two, now.
    kappa: f64,
    mass: f64,
    parts: Vec<Part<T>>,
    /// `log2 b`.
    log_b: Vec<f64>,
    g: Vec<f64>,
    /// The column potentials that the last pass used, where they are the ones to return.
    g_before: Vec<f64>,
    shift: f64,
    shift_before: f64,
    /// Column potentials as the pass sees them, padded.
    g_cells: Vec<T>,
    /// The potentials that the kept powers were taken at, and the columns' factors since.
    g_base: Vec<f64>,
    factors: Vec<T>,
    kept: bool,
    /// Column sums, then their logarithms.
    sums: Vec<f64>,
    logs: Vec<f64>,
    errors: Vec<f64>,
    best: f64,
    best_at: usize,
    /// From this error on the plan itself is looked at.
    check_below: f64,
    fresh: bool,
    status: Option<Status>,
    failure: Option<KernelError>,
}

const OP: &str = "sinkhorn";

impl<'a, T: Transcendental> Solver<'a, T> {
    fn new(problem: Problem<'a>, params: SinkhornParams) -> Self {
        let (n, m) = (problem.a.len(), problem.b.len());
        let reg = params.annealing.map_or(problem.reg, |(first, _)| first.max(problem.reg));
        let kappa = reg * LN_2;
        let rows = block_rows(n);
        let width = padded::<T>(m);
        let (f0, g0) = problem.start.unwrap_or((&[], &[]));
        // Where a weight is zero the potential is -inf, and says nothing.
        let start = |p: &[f64], i: usize, w: f64| {
            p.get(i).map_or(0.0, |&p| if p.is_finite() && w > 0.0 { p / kappa - w.log2() } else { 0.0 })
        };
        let parts = (0..block_count(n, rows))
            .map(|block| {
                let (first, last) = (block * rows, n.min((block + 1) * rows));
                Part {
                    first,
                    f: (first..last).map(|i| start(f0, i, problem.a[i])).collect(),
                    base: Vec::new(),
                    columns: vec![T::default(); width],
                    powers: Vec::new(),
                    error: 0.0,
                    spread: 0.0,
                    far: false,
                    hopeless: None,
                }
            })
            .collect();
        let log_b: Vec<f64> = problem.b.iter().map(|b| b.log2()).collect();
        let g: Vec<f64> = (0..m)
            .map(|j| {
                let begin = start(g0, j, problem.b[j]);
                if g0.is_empty() { if problem.b[j] > 0.0 { 0.0 } else { f64::NEG_INFINITY } } else { begin + log_b[j] }
            })
            .collect();
        Self {
            problem,
            params,
            kappa,
            mass: problem.a.iter().sum(),
            parts,
            log_b,
            g_before: g.clone(),
            g,
            shift: 0.0,
            shift_before: 0.0,
            g_cells: vec![T::from_f64(f64::NEG_INFINITY); width],
            g_base: Vec::new(),
            factors: Vec::new(),
            kept: false,
            sums: vec![0.0; m],
            logs: vec![0.0; m],
            errors: Vec::new(),
            best: f64::INFINITY,
            best_at: 0,
            check_below: problem.tol,
            fresh: problem.start.is_none(),
            status: None,
            failure: None,
        }
    }

    /// Makes at most `turns` iterations.
    fn advance(&mut self, cost: &impl Cost<T>, turns: usize, par: Par<'_>) -> Result<(), KernelError> {
        for _ in 0..turns {
            if self.status.is_some() {
                break;
            }
            self.iterate(cost, par)?;
        }
        Ok(())
    }

    fn c(&self) -> T {
        T::from_f64(1.0 / self.kappa)
    }

    fn iterate(&mut self, cost: &impl Cost<T>, par: Par<'_>) -> Result<(), KernelError> {
        let done = self.errors.len();
        let mut reg = self.problem.reg;
        if let Some((first, decay)) = self.params.annealing
            && done + 1 < self.params.max_iter
        {
            reg = reg.max(first * decay.powi(done as i32));
        }
        self.set_reg(reg);
        if done == 0 && (self.params.order == Order::Gf || self.params.mass.is_some()) {
            self.columns_first(cost, par)?;
        }
        // The first step from nowhere, and those of the annealing, are long; relaxing them would overshoot.
        let omega = if done == 0 || reg > self.problem.reg { 1.0 } else { self.params.omega };
        if !self.load_columns(cost) {
            self.errors.push(f64::NAN);
            self.status = Some(Status::Invalid);
            return Ok(());
        }
        self.pass(cost, omega, par)?;
        // As the pass saw them, rounding included.
        self.shift_before = self.shift;
        for ((before, &base), factor) in
            self.g_before.iter_mut().zip(&self.g_base).zip(self.factors.iter().map(Some).chain(repeat(None)))
        {
            let moved = if self.kept { factor.map_or(0.0, |f| f.to_f64().log2()) } else { 0.0 };
            *before = base + moved - self.shift;
        }
        let error = self.update_columns(cost, omega, par)? + self.parts.iter().map(|part| part.error).sum::<f64>();
        self.errors.push(error);
        self.fresh = false;
        self.kept = self.params.scaling;
        if reg <= self.problem.reg {
            self.judge(error, cost, par)?;
        }
        if self.status.is_none() && self.errors.len() >= self.params.max_iter {
            let good = self.problem.tol > 0.0 && self.explicit_error(error, cost, par)? <= self.problem.tol;
            self.status = Some(if good { Status::Converged } else { Status::MaxIter });
        }
        Ok(())
    }

    fn judge(&mut self, error: f64, cost: &impl Cost<T>, par: Par<'_>) -> Result<(), KernelError> {
        let done = self.errors.len();
        if error.is_nan() {
            self.status = Some(Status::Invalid);
        } else if error <= self.check_below {
            // The error is that of the powers in the pass. What counts is the plan that others will make of the
            // potentials, which are rounded once more.
            if self.explicit_error(error, cost, par)? <= self.problem.tol {
                self.status = Some(Status::Converged);
                return Ok(());
            }
            self.check_below = error * 0.9;
        }
        if error < self.best * (1.0 - STALL_PROGRESS) {
            (self.best, self.best_at) = (error, done);
        } else if done - self.best_at >= STALL_WINDOW && self.best <= self.rounding() {
            let good = self.explicit_error(error, cost, par)? <= self.problem.tol;
            self.status = Some(if good { Status::Converged } else { Status::Stalled });
        }
        Ok(())
    }

    /// The marginal error of the plan that the present potentials make; of an unbalanced one, the error of the pass.
    fn explicit_error(&self, error: f64, cost: &impl Cost<T>, par: Par<'_>) -> Result<f64, KernelError> {
        if (self.params.rows, self.params.columns) != (Marginal::Exact, Marginal::Exact) {
            return Ok(error);
        }
        let (f, g, _) = self.potentials(self.params.order == Order::Gf);
        let (mut rows, mut columns) = (vec![0.0; f.len()], vec![0.0; g.len()]);
        Plan::<T, _>::new(cost, &f, &g, self.problem.reg).sums(&mut rows, &mut columns, par)?;
        let missed = |sums: &[f64], weights: &[f64]| sums.iter().zip(weights).map(|(s, w)| (s - w).abs()).sum::<f64>();
        Ok(missed(&rows, self.problem.a) + missed(&columns, self.problem.b))
    }

    /// The marginal error that rounding alone can make, with room to spare.
    fn rounding(&self) -> f64 {
        let finite = |m: f64, v: &f64| if v.is_finite() { m.max(v.abs()) } else { m };
        let rows = self.parts.iter().flat_map(|part| &part.f).fold(1.0, finite);
        let largest = self.g.iter().fold(rows, finite);
        let u = if size_of::<T>() == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON };
        4.0 * u * largest * self.mass
    }

    /// Potentials keep their value in units of cost.
    fn set_reg(&mut self, reg: f64) {
        let kappa = reg * LN_2;
        if kappa == self.kappa {
            return;
        }
        let factor = self.kappa / kappa;
        for part in &mut self.parts {
            for (f, &a) in part.f.iter_mut().zip(&self.problem.a[part.first..]) {
                if a > 0.0 {
                    *f = (*f + a.log2()) * factor - a.log2();
                }
            }
        }
        self.g.iter_mut().for_each(|g| *g *= factor);
        self.shift *= factor;
        self.kappa = kappa;
        self.kept = false;
    }

    /// The first update of the columns, from the rows' potentials alone.
    fn columns_first(&mut self, cost: &impl Cost<T>, par: Par<'_>) -> Result<(), KernelError> {
        let n = self.problem.a.len();
        let mut f = vec![T::default(); n];
        for part in &self.parts {
            for ((f, &p), &a) in f[part.first..].iter_mut().zip(&part.f).zip(&self.problem.a[part.first..]) {
                // Without a start the rows' potentials are zero, as in the published loops, weights or not.
                let log_a = if self.problem.start.is_some() || a == 0.0 { a.log2() } else { 0.0 };
                *f = T::from_f64(p + log_a);
            }
        }
        column_log_sums(cost, &f, self.c(), &mut self.logs, par)?;
        if let Some(j) = (0..self.g.len()).find(|&j| self.problem.b[j] > 0.0 && self.logs[j] == f64::NEG_INFINITY) {
            return Err(hopeless("column", j));
        }
        if let Some(mass) = self.params.mass {
            // Costs far from zero would take the multiplier of the mass many steps to find.
            self.shift = mass.log2() - self.log_total();
        }
        if self.params.order == Order::Gf {
            for j in 0..self.g.len() {
                if self.problem.b[j] > 0.0 {
                    let balanced = -(self.logs[j] + self.shift);
                    self.g[j] = self.params.columns.update(balanced, self.kappa) + self.log_b[j];
                }
            }
        }
        Ok(())
    }

    /// `log2` of the plan's mass without the multiplier, from the logarithms of the columns.
    fn log_total(&self) -> f64 {
        let terms = || self.logs.iter().zip(&self.g).map(|(log, g)| log + g).filter(|v| *v > f64::NEG_INFINITY);
        let peak = terms().fold(f64::NEG_INFINITY, f64::max);
        peak + terms().map(|v| (v - peak).exp2()).sum::<f64>().log2()
    }

    /// Brings the column potentials into the form that the next pass reads, and decides how it runs. False where they
    /// have left the range of the type.
    fn load_columns(&mut self, cost: &impl Cost<T>) -> bool {
        if self.kept {
            // Kept powers are good while no factor leaves the window.
            let limit = window::<T>().log2();
            let mut moved = self.parts.iter().map(|part| part.spread).fold(1.0, f64::max).log2();
            for ((log, &g), &base) in self.logs.iter_mut().zip(&self.g).zip(&self.g_base) {
                *log = if base > f64::NEG_INFINITY { g + self.shift - base } else { f64::NEG_INFINITY };
                if base > f64::NEG_INFINITY {
                    moved = moved.max(log.abs());
                }
            }
            if moved < limit {
                dispatch(Powers(&mut self.logs));
                for (factor, &power) in self.factors.iter_mut().zip(&self.logs) {
                    *factor = T::from_f64(power);
                }
                return true;
            }
            self.kept = false;
        }
        for (cell, &g) in self.g_cells.iter_mut().zip(&self.g) {
            *cell = T::from_f64(g + self.shift);
        }
        // The pass works with rounded potentials, so these are the ones its sums belong to.
        self.g_base.clear();
        self.g_base.extend(self.g_cells[..self.g.len()].iter().map(|g| g.to_f64()));
        let c = self.c();
        cost.prepare(&mut self.g_cells, c);
        if self.params.scaling {
            self.factors.clear();
            self.factors.resize(self.g_cells.len(), T::default());
        }
        self.g_base.iter().zip(self.problem.b).all(|(g, &b)| g.is_finite() || b <= 0.0)
    }

    /// Updates the rows' potentials and leaves the column sums in `sums`.
    fn pass(&mut self, cost: &impl Cost<T>, omega: f64, par: Par<'_>) -> Result<(), KernelError> {
        let (n, m) = cost.shape();
        let cost_ns = (n * m) as f64 * if self.kept { 0.1 } else { cost.cost_ns() };
        let width = self.g_cells.len();
        let shared = Shared {
            cost,
            a: self.problem.a,
            g: if self.kept { &self.factors } else { &self.g_cells },
            c: self.c(),
            kappa: self.kappa,
            mass: self.mass,
            omega,
            marginal: self.params.rows,
            fresh: self.fresh,
            keep: self.params.scaling,
            kept: self.kept,
        };
        for_each_chunk(par, &mut self.parts, 1, cost_ns, |_, part| {
            // Rows of powers, then for each row its sum and the potential it was taken at.
            with_scratch::<T, _>(TILE_ROWS * width, |cells| {
                dispatch(RowPass { shared: &shared, part: &mut part[0], cells });
            });
        })?;
        if let Some(row) = self.parts.iter().find_map(|part| part.hopeless) {
            return Err(hopeless("row", row));
        }
        let (parts, mass) = (&self.parts, self.mass);
        let cost_ns = (parts.len() * m) as f64;
        for_each_chunk(par, &mut self.sums, 1024, cost_ns, |block, sums| {
            sums.fill(0.0);
            for part in parts {
                for (sum, value) in sums.iter_mut().zip(&part.columns[block * 1024..]) {
                    *sum += value.to_f64();
                }
            }
            for sum in sums {
                *sum *= mass;
            }
        })?;
        Ok(())
    }

    /// What the columns receive under the new `f`: `logs_j = log2 sum_i 2^(f_i - c M_ij)`, from the sums of the pass.
    fn take_column_logs(&mut self, cost: &impl Cost<T>, par: Par<'_>) -> Result<(), KernelError> {
        self.logs.copy_from_slice(&self.sums);
        dispatch(Logs(&mut self.logs));
        let far = self.parts.iter().any(|part| part.far);
        let limit = if far { f64::INFINITY } else { tiny::<T>() * self.mass };
        let mut lost = false;
        for ((log, base), (&sum, &b)) in
            self.logs.iter_mut().zip(&self.g_base).zip(self.sums.iter().zip(self.problem.b))
        {
            *log -= base;
            lost |= sum < limit && b > 0.0;
        }
        if lost {
            self.lost_columns(cost, limit, par)?;
        }
        if far {
            for ((sum, log), base) in self.sums.iter_mut().zip(&self.logs).zip(&self.g_base) {
                *sum = (log + base).exp2();
            }
        }
        Ok(())
    }

    /// Updates the columns' potentials; returns the columns' part of the marginal error.
    fn update_columns(&mut self, cost: &impl Cost<T>, omega: f64, par: Par<'_>) -> Result<f64, KernelError> {
        self.take_column_logs(cost, par)?;
        if self.kept {
            // Sums of powers become sums of the plan.
            for (sum, factor) in self.sums.iter_mut().zip(&self.factors) {
                *sum *= factor.to_f64();
            }
        }
        let mut error = 0.0;
        for j in 0..self.g.len() {
            let b = self.problem.b[j];
            if b <= 0.0 {
                continue;
            }
            if self.logs[j] == f64::NEG_INFINITY {
                return Err(hopeless("column", j));
            }
            let balanced = -(self.logs[j] + self.shift);
            let target = self.params.columns.update(balanced, self.kappa);
            let wanted = if self.params.columns == Marginal::Exact { b } else { b * (target - balanced).exp2() };
            error += (wanted - self.sums[j]).abs();
            self.g[j] = relaxed(omega, self.g[j] - self.log_b[j], target) + self.log_b[j];
        }
        if let Some(mass) = self.params.mass {
            let next = mass.log2() - self.log_total();
            error += mass * ((self.shift - next).exp2() - 1.0).abs();
            self.shift = next;
        }
        Ok(error)
    }

    /// Columns that receive next to nothing lose precision to underflow, or everything: their sums are taken anew,
    /// each from its own maximum.
    fn lost_columns(&mut self, cost: &impl Cost<T>, limit: f64, par: Par<'_>) -> Result<(), KernelError> {
        let n = self.problem.a.len();
        let mut f = vec![T::default(); n];
        for part in &self.parts {
            for ((f, &p), &a) in f[part.first..].iter_mut().zip(&part.f).zip(&self.problem.a[part.first..]) {
                *f = T::from_f64(p + a.log2());
            }
        }
        let (c, b, sums) = (self.c(), self.problem.b, &self.sums);
        let is_lost = |j: usize| sums[j] < limit && b[j] > 0.0;
        let m = self.logs.len();
        let strips: Vec<usize> =
            (0..block_count(m, STRIP)).filter(|s| (s * STRIP..m.min((s + 1) * STRIP)).any(is_lost)).collect();
        let mut exact = vec![0.0; strips.len() * STRIP];
        let cost_ns = (n * exact.len()) as f64 * 2.0 * cost.cost_ns();
        for_each_chunk(par, &mut exact, STRIP, cost_ns, |s, out| {
            let first = strips[s] * STRIP;
            let width = STRIP.min(m - first);
            dispatch(LogSums { cost, f: &f, c, first, out: &mut out[..width] });
        })?;
        for (&strip, exact) in strips.iter().zip(exact.chunks(STRIP)) {
            for (j, &log) in (strip * STRIP..m).zip(exact) {
                if is_lost(j) {
                    self.logs[j] = log;
                }
            }
        }
        Ok(())
    }

    /// The potentials in units of cost, with the columns' before or after the last update, and the multiplier in them.
    fn potentials(&self, before: bool) -> (Vec<f64>, Vec<f64>, f64) {
        let kappa = self.kappa;
        let mut f = Vec::with_capacity(self.problem.a.len());
        for part in &self.parts {
            f.extend(
                part.f
                    .iter()
                    .zip(&self.problem.a[part.first..])
                    .map(|(f, &a)| if a > 0.0 { (f + a.log2()) * kappa } else { f64::NEG_INFINITY }),
            );
        }
        let (g, shift) = if before { (&self.g_before, self.shift_before) } else { (&self.g, self.shift) };
        (f, g.iter().map(|g| (g + shift) * kappa).collect(), shift * kappa)
    }

    fn report(self) -> Report {
        // After "gf" the plan is the one whose error was measured.
        let (f, g, shift) = self.potentials(self.params.order == Order::Gf);
        let status = self.status.unwrap_or(Status::MaxIter);
        Report { f, g, shift, errors: self.errors, status }
    }
}

fn hopeless(what: &str, index: usize) -> KernelError {
    let expected = "a finite cost somewhere in each row and column of positive weight";
    KernelError::argument(OP, "M", expected, format!("none in {what} {index}"))
}

struct Logs<'a>(&'a mut [f64]);
impl Vectorized for Logs<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        log_in_place::<f64, FMA>(self.0);
        self.0.iter_mut().for_each(|v| *v *= LOG2_E);
    }
}

struct Powers<'a>(&'a mut [f64]);
impl Vectorized for Powers<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.0.iter_mut().for_each(|v| *v *= LN_2);
        exp_in_place::<f64, FMA>(self.0);
    }
}

struct LogSums<'a, T, C> {
    cost: &'a C,
    f: &'a [T],
    c: T,
    first: usize,
    out: &'a mut [f64],
}

impl<T: Transcendental, C: Cost<T>> Vectorized for LogSums<'_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.cost.column_log_sums::<FMA>(self.first, self.f, self.c, self.out);
    }
}

/// `out_j = log2 sum_i 2^(f_i - c M_ij)` for all columns.
pub fn column_log_sums<T: Transcendental, C: Cost<T>>(
    cost: &C,
    f: &[T],
    c: T,
    out: &mut [f64],
    par: Par<'_>,
) -> Result<(), KernelError> {
    let cost_ns = (f.len() * out.len()) as f64 * 2.0 * cost.cost_ns();
    for_each_chunk(par, out, STRIP, cost_ns, |strip, out| {
        dispatch(LogSums { cost, f, c, first: strip * STRIP, out });
    })
}

/// The row half of an iteration, and what the columns would receive: `f` becomes the potentials that give the rows their
/// weights under `g` (all in units of cost), and `logs_j = reg * log sum_i exp((f_i - M_ij) / reg)`.
///
/// Rows may be a shard of a larger problem.
pub fn half_step<T: Transcendental, C: Cost<T>>(
    cost: &C,
    problem: Problem<'_>,
    par: Par<'_>,
) -> Result<(Vec<f64>, Vec<f64>), KernelError> {
    let params = SinkhornParams { max_iter: 1, ..SinkhornParams::default() };
    let mut solver = Solver::<T>::new(problem, params);
    if !solver.load_columns(cost) {
        return Err(KernelError::argument(OP, "g", "potentials within the range of the costs' type", "larger ones"));
    }
    solver.pass(cost, 1.0, par)?;
    solver.take_column_logs(cost, par)?;
    let logs = solver.logs.iter().map(|log| log * solver.kappa).collect();
    Ok((solver.report().f, logs))
}

/// The column potentials after `n_iter` updates of the columns, and `n_iter - 1` of the rows in between, from zero: in
/// powers of two.
pub(super) fn columns_after<T: Transcendental, C: Cost<T>>(
    cost: &C,
    problem: Problem<'_>,
    n_iter: usize,
    par: Par<'_>,
) -> Result<Vec<f64>, KernelError> {
    let params = SinkhornParams { max_iter: usize::MAX, order: Order::Gf, ..SinkhornParams::default() };
    let mut solver = Solver::<T>::new(problem, params);
    if n_iter == 1 {
        solver.columns_first(cost, par)?;
    } else {
        solver.advance(cost, n_iter - 1, par)?;
    }
    Ok(solver.g)
}

/// Solves problems with the costs `costs`, each to its own end.
///
/// Large problems run one after the other on all threads, small ones side by side on one thread each; the bits are the
/// same.
pub fn solve<T: Transcendental, C: Cost<T>>(
    costs: &[C],
    problems: &[Problem<'_>],
    params: &SinkhornParams,
    par: Par<'_>,
) -> Result<Vec<Report>, KernelError> {
    let mut solvers: Vec<(usize, Solver<'_, T>)> =
        problems.iter().map(|problem| Solver::new(*problem, *params)).enumerate().collect();
    let cells = |i: usize| problems[i].a.len() * problems[i].b.len();
    for (i, solver) in &mut solvers {
        if problems.len() == 1 || cells(*i) >= LARGE {
            while solver.status.is_none() {
                solver.iterate(&costs[*i], par).map_err(|error| in_batch(error, *i, problems.len()))?;
            }
        }
    }
    let mut reports: Vec<Option<Report>> = problems.iter().map(|_| None).collect();
    loop {
        let (ended, running): (Vec<_>, Vec<_>) = solvers.into_iter().partition(|(_, solver)| solver.status.is_some());
        for (i, solver) in ended {
            if let Some(failure) = solver.failure {
                return Err(in_batch(failure, i, problems.len()));
            }
            reports[i] = Some(solver.report());
        }
        solvers = running;
        if solvers.is_empty() {
            return Ok(reports.into_iter().flatten().collect());
        }
        let total: f64 = solvers.iter().map(|(i, _)| cells(*i) as f64 * costs[*i].cost_ns()).sum();
        for_each_chunk(par, &mut solvers, 1, total * 10.0, |_, one| {
            let (i, solver) = &mut one[0];
            let turns = (TURN_NS / (1.0 + cells(*i) as f64 * costs[*i].cost_ns())).max(1.0) as usize;
            if let Err(error) = solver.advance(&costs[*i], turns, Par::threads(1)) {
                solver.status = Some(Status::Invalid);
                solver.failure = Some(error);
            }
        })?;
    }
}

/// Says which problem of a batch an error is about.
pub(super) fn in_batch(error: KernelError, index: usize, problems: usize) -> KernelError {
    match error {
        KernelError::Argument { op, argument, expected, got } if problems > 1 => {
            KernelError::Argument { op, argument, expected, got: format!("{got} of problem {index}") }
        }
        other => other,
    }
}
