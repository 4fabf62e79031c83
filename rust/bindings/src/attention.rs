//! Bindings of the `attention` kernels.

use crate::array::{Coded, View, with_float};
use crate::run::run;
use pyo3::prelude::*;
use shiftkern_kernels::attention::{
    self, BlockMask, Captured, Gradients, Inputs, Reshape, State, StateGradients, Tokens, Upstream,
};
use shiftkern_kernels::simd::Element;
use shiftkern_kernels::{KernelError, Par};

/// A tensor `(batch, heads, tokens, channels)`: its memory from the first to the last element, its shape, and its
/// strides but for that of the channels, which is 1.
type TokensView = (View, [usize; 4], [usize; 3]);

fn tokens<'a, T: Coded>(
    (view, shape, strides): &'a TokensView,
    op: &'static str,
    argument: &'static str,
) -> Result<Tokens<'a, T>, KernelError> {
    Tokens::new(op, argument, view.read::<T>(op, argument)?, *shape, *strides)
}

/// A mask as `_ops/attention.py` spreads it, and the factor of the scores.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Mask {
    indptr: View,
    indices: View,
    inner: View,
    patterns: View,
    maps: [usize; 2],
    block: [usize; 2],
    scale: f64,
}

impl Mask {
    fn inputs<'a, T: Coded>(
        &'a self,
        op: &'static str,
        q: &'a TokensView,
        k: &'a TokensView,
        v: &'a TokensView,
    ) -> Result<Inputs<'a, T>, KernelError> {
        let arrays = (
            self.indptr.read(op, "indptr")?,
            self.indices.read(op, "indices")?,
            self.inner.read(op, "inner")?,
            self.patterns.read(op, "patterns")?,
        );
        Ok(Inputs {
            q: tokens(q, op, "q")?,
            k: tokens(k, op, "k")?,
            v: tokens(v, op, "v")?,
            mask: BlockMask::new(op, arrays, self.maps, self.block, [q.1[2], k.1[2]])?,
            scale: self.scale,
        })
    }
}

fn optional<'a, A: Coded>(
    view: Option<&'a View>,
    op: &'static str,
    argument: &'static str,
) -> Result<Option<&'a [A]>, KernelError> {
    view.map(|view| view.read::<A>(op, argument)).transpose()
}

/// Attention over the kept pairs.
#[pyfunction]
pub fn block_sparse_attention(
    py: Python<'_>,
    q: TokensView,
    k: TokensView,
    v: TokensView,
    mask: Mask,
    mut out: View,
    mut lse: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "block_sparse_attention";
    run(py, threads, |par| {
        with_float!(q.0, OP, T => {
            let inputs = mask.inputs::<T>(OP, &q, &k, &v)?;
            let (out, lse) = (out.write::<T>(OP, "out")?, lse.write(OP, "lse")?);
            attention::block_sparse_attention(OP, &inputs, Reshape::Plain, out, lse, par)
        })
    })
}

/// Gradients of attention over the kept pairs.
#[pyfunction]
pub fn block_sparse_attention_backward(
    py: Python<'_>,
    grad_out: TokensView,
    grad_lse: Option<View>,
    q: TokensView,
    k: TokensView,
    v: TokensView,
    out: View,
    lse: View,
    mask: Mask,
    gradients: [View; 3],
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "block_sparse_attention_backward";
    run(py, threads, |par| {
        with_float!(q.0, OP, T => {
            let inputs = mask.inputs::<T>(OP, &q, &k, &v)?;
            let upstream = Upstream {
                grad_out: tokens::<T>(&grad_out, OP, "grad_out")?,
                grad_lse: optional(grad_lse.as_ref(), OP, "grad_lse")?,
                out: out.read::<T>(OP, "out")?,
                lse: lse.read(OP, "lse")?,
            };
            let [mut dq, mut dk, mut dv] = gradients;
            let gradients = Gradients {
                q: dq.write::<T>(OP, "dq")?,
                k: dk.write::<T>(OP, "dk")?,
                v: dv.write::<T>(OP, "dv")?,
            };
            attention::block_sparse_attention_backward(&inputs, &upstream, gradients, par)
        })
    })
}

/// Attention over all pairs, and what is left over for later steps.
#[pyfunction]
pub fn reattention_capture(
    py: Python<'_>,
    q: TokensView,
    k: TokensView,
    v: TokensView,
    mask: Mask,
    tensors: [View; 3],
    statistics: [View; 4],
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "reattention_capture";
    run(py, threads, |par| {
        with_float!(q.0, OP, T => {
            let inputs = mask.inputs::<T>(OP, &q, &k, &v)?;
            let [mut out, mut rest, mut difference] = tensors;
            let [mut rho, mut share, mut lse_full, mut lse_rest] = statistics;
            let captured = Captured {
                out: out.write::<T>(OP, "out")?,
                rho: rho.write(OP, "rho")?,
                share: share.write(OP, "share")?,
                lse_full: lse_full.write(OP, "lse_full")?,
                lse_rest: lse_rest.write(OP, "lse_rest")?,
                rest: rest.write::<T>(OP, "rest")?,
                difference: difference.write::<T>(OP, "difference")?,
            };
            attention::reattention_capture(&inputs, captured, par)
        })
    })
}

/// Attention over the kept pairs, put together with what an earlier pass over all pairs left over.
#[pyfunction]
pub fn reattention_step(
    py: Python<'_>,
    q: TokensView,
    k: TokensView,
    v: TokensView,
    carried: View,
    factors: Option<[View; 2]>,
    lse_rest: Option<View>,
    mask: Mask,
    mut out: View,
    mut lse: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "reattention_step";
    run(py, threads, |par| {
        with_float!(q.0, OP, T => {
            let inputs = mask.inputs::<T>(OP, &q, &k, &v)?;
            let carried = carried.read::<T>(OP, "carried")?;
            let reshape = match (&lse_rest, &factors) {
                (Some(lse), _) => Reshape::Merged { carried, lse: lse.read(OP, "lse_rest")? },
                (None, Some([rho, share])) => {
                    Reshape::Scaled { carried, factors: Some([rho.read(OP, "rho")?, share.read(OP, "share")?]) }
                }
                (None, None) => Reshape::Scaled { carried, factors: None },
            };
            let (out, lse) = (out.write::<T>(OP, "out")?, lse.write(OP, "lse")?);
            attention::block_sparse_attention(OP, &inputs, reshape, out, lse, par)
        })
    })
}

fn states<'a, T: Coded + Element<Acc: Coded>>(
    views: &'a [(View, View)],
    op: &'static str,
) -> Result<Vec<State<'a, T>>, KernelError> {
    views.iter().map(|(out, lse)| Ok(State { out: out.read(op, "out")?, lse: lse.read(op, "lse")? })).collect()
}

/// States of attention over several sets of keys, merged.
#[pyfunction]
pub fn merge_states(
    py: Python<'_>,
    parts: Vec<(View, View)>,
    mut out: View,
    mut lse: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "merge_states";
    run(py, threads, |par| {
        with_float!(out, OP, T => {
            let parts = states::<T>(&parts, OP)?;
            attention::merge_states(&parts, out.write::<T>(OP, "out")?, lse.write(OP, "lse")?, par)
        })
    })
}

/// Gradients of [`merge_states`].
#[pyfunction]
pub fn merge_states_backward(
    py: Python<'_>,
    parts: Vec<(View, View)>,
    merged: (View, View),
    grad_out: View,
    grad_lse: Option<View>,
    mut gradients: Vec<(View, View)>,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "merge_states_backward";
    run(py, threads, |par: Par<'_>| {
        with_float!(grad_out, OP, T => {
            let parts = states::<T>(&parts, OP)?;
            let merged = State { out: merged.0.read::<T>(OP, "out")?, lse: merged.1.read(OP, "lse")? };
            let gradients = gradients.iter_mut().map(|(out, lse)| {
                Ok(StateGradients { out: out.write::<T>(OP, "gradients")?, lse: lse.write(OP, "gradients")? })
            });
            let gradients = gradients.collect::<Result<_, KernelError>>()?;
            let grad_lse = optional(grad_lse.as_ref(), OP, "grad_lse")?;
            attention::merge_states_backward(&parts, merged, grad_out.read(OP, "grad_out")?, grad_lse, gradients, par)
        })
    })
}
