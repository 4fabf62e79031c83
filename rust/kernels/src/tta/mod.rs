//! Test-time adaptation on a model's outputs.

mod lame;
mod products;

pub use lame::{Affinity, LameParams, LameReport, lame};
