//! Attention over the kept pairs of a block mask.

mod backward;
mod forward;
mod mask;
mod merge;
mod neighborhood;
mod panel;
mod shift;
mod tokens;

pub use backward::{Gradients, Upstream, block_sparse_attention_backward};
pub use forward::{Captured, Inputs, Reshape, block_sparse_attention, reattention_capture};
pub use mask::BlockMask;
pub use merge::{State, StateGradients, merge_states, merge_states_backward};
pub use neighborhood::{Neighborhood, NeighborhoodGradients, NeighborhoodInputs, neighborhood, neighborhood_backward};
pub use shift::{ShiftShape, token_shift, token_shift_backward};
pub use tokens::Tokens;
