//! Linear maps on the rows of a matrix that are products of small ones: nothing of size `d x d` is ever formed.
//!
//! Pairs and blocks work on tiles of as many rows as a panel has lanes, transposed so that a coordinate of all rows is
//! one vector: every topology is then plain loops over coordinates, and a tile stays in cache for all stages.

mod blocks;
mod cayley;
mod givens;
mod low_rank;
mod tile;

pub use blocks::{BlockShape, block_rotate, block_rotate_backward};
pub use cayley::cayley;
pub use givens::{Givens, Topology, givens, givens_backward};
pub use low_rank::{LowRankShape, low_rank_rotate, low_rank_rotate_backward};
