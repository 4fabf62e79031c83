//! Differentiable sorting: projections onto the permutahedron, and sorting networks with relaxed comparators.

mod isotonic;
mod network;

pub use isotonic::{Regularization, SoftOrder, SoftOrderParams, soft_order, soft_order_backward};
pub use network::{Distribution, Network, NetworkSortParams, network_sort, network_sort_backward};
