//! The extension module `shiftkern._native`: checks, releases the interpreter, calls one kernel, returns.
//!
//! Tensors arrive as [`array::View`]s and outputs are written into memory that Python allocated. The functions are
//! private to the package; `_native.pyi` beside the module lists them.
#![allow(clippy::needless_pass_by_value, reason = "extracted arguments arrive by value")]

mod array;
mod attention;
mod merge;
mod neighborhood;
mod norm;
mod ot;
mod rotation;
mod run;
mod shift;
mod sort;
mod tta;

use pyo3::prelude::*;

/// How this extension was built and what it found at run time.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
    let info = pyo3::types::PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    info.set_item("simd", shiftkern_kernels::simd::level())?;
    Ok(info)
}

/// Kernels of shiftkern; use the package's public functions instead.
#[pymodule(gil_used = true)]
mod _native {
    #[pymodule_export]
    use super::build_info;
    #[pymodule_export]
    use crate::attention::{
        block_sparse_attention, block_sparse_attention_backward, merge_states, merge_states_backward,
        reattention_capture, reattention_step,
    };
    #[pymodule_export]
    use crate::merge::{
        merge_by_columns, merge_column_changes, merge_compete, merge_count_digits, merge_dots, merge_linear,
        merge_magnitude_sums, merge_masked, merge_rank_drop, merge_ranks, merge_thresholds,
    };
    #[pymodule_export]
    use crate::neighborhood::{neighborhood, neighborhood_backward};
    #[pymodule_export]
    use crate::norm::{
        channel_affine, channel_combine, channel_dot, channel_moments, ema_update, mixed_batch_norm, style_shift,
        unmix_norm, unmix_update,
    };
    #[pymodule_export]
    use crate::ot::{
        plan, plan_apply, plan_apply_transposed, plan_count, plan_sums, plan_values, sinkhorn, sinkhorn_assign,
        sinkhorn_half_step,
    };
    #[pymodule_export]
    use crate::rotation::{
        block_rotate, block_rotate_backward, cayley, givens, givens_backward, low_rank_rotate, low_rank_rotate_backward,
    };
    #[pymodule_export]
    use crate::shift::{token_shift, token_shift_backward};
    #[pymodule_export]
    use crate::sort::{network_sort, network_sort_backward, soft_order, soft_order_backward};
    #[pymodule_export]
    use crate::tta::lame;
}
