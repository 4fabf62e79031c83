//! Test-time adaptation on a model's outputs.

mod lame;

pub use lame::{Affinity, LameParams, LameReport, lame};
