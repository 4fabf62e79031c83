//! Merging of models: all of them go by in one trip to memory.
//!
//! A task vector is the difference of a model and its base, in the type tensors are computed in. Sums run over the models
//! in order, one rounding at the end; work is cut into tiles of elements, so results do not depend on the number of
//! threads.

mod columns;
mod combine;
mod compete;
mod deltas;
mod philox;
mod rank;
mod threshold;

pub use columns::{Matrix, by_columns, column_changes};
pub use combine::{Divide, Elect, Masked, linear, masked};
pub use compete::compete;
pub use deltas::{Deltas, Keep, dots, magnitude_sums};
pub use rank::{RankDrop, rank_drop, ranks};
pub use threshold::{count_digits, thresholds};
