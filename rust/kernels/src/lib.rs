//! Adaptation kernels: pure Rust numerics that know neither Python nor torch.
//!
//! Layers inside this crate, lowest first: [`simd`] (one vectorised loop over a slice), [`exec`] (blocks over
//! threads), then one module per domain ([`norm`], [`ot`], [`sort`], [`tta`]). Every kernel writes into memory of its
//! caller, returns a [`KernelError`] instead of panicking, and gives the same bits for any number of threads.

pub mod attention;
pub mod error;
pub mod exec;
pub mod merge;
pub mod norm;
pub mod ot;
mod packed;
pub mod rotation;
pub mod simd;
pub mod sort;
pub mod tta;

pub use error::KernelError;
pub use exec::Par;
