//! Merging of models: all of them go by in one trip to memory.
//!
//! A task vector is the difference of a model and its base, in the type tensors are computed in. Sums run over the models
//! in order, one rounding at the end; work is cut into tiles of elements, so results do not depend on the number of
//! threads.

mod combine;
mod deltas;
mod philox;
mod threshold;

pub use combine::{Divide, Elect, Masked, linear, masked};
pub use deltas::{Deltas, Keep, dots, magnitude_sums};
pub use threshold::thresholds;
