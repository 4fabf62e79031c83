//! Entropic optimal transport.
//!
//! A plan is `P_ij = exp((f_i + g_j - M_ij) / reg)`. Inside the kernels everything is a power of two: `F = f / kappa`
//! and `G = g / kappa` with `kappa = reg * ln 2`, so that a cell is one fused multiply-add and one `2^x`.
//!
//! [`cost`] gives the cells of a block of rows, from a matrix or from two sets of points; `pass` updates the
//! rows and adds up the columns; [`solve`] finds the potentials; `plan` does everything with a plan that is never built.

mod batch;
pub mod cost;
mod pass;
mod plan;
mod solve;

pub use batch::{Inputs, Outputs, solve_dense, solve_samples};
pub use cost::{Cost, Dense, Metric, Samples};
pub use plan::{Plan, Weight, assign};
pub use solve::{Marginal, Order, Problem, Report, SinkhornParams, Status, half_step, solve};
