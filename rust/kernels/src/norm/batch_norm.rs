//! Batch normalization with statistics mixed from a source and the batch.

use super::{Affine, Layout, Moments, channel_affine, channel_moments};
use crate::exec::Io;
use crate::simd::Element;
use crate::{KernelError, Par};

/// Options of [`mixed_batch_norm`].
#[derive(Clone, Copy, Debug)]
pub struct MixedParams {
    /// Weight of the source statistics; the batch has the rest.
    pub source_weight: f64,
    /// Added to the variance.
    pub eps: f64,
    /// Whether the batch variance divides by `n - 1`.
    pub unbiased: bool,
}

/// Per-channel inputs of [`mixed_batch_norm`], each of length `channels`.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Source mean.
    pub mean: &'a [f64],
    /// Source variance.
    pub var: &'a [f64],
    /// Scale after normalization, 1 when absent.
    pub weight: Option<&'a [f64]>,
    /// Offset after normalization, 0 when absent.
    pub bias: Option<&'a [f64]>,
}

/// `y = (x - m) / sqrt(v + eps) * weight + bias` with `m`, `v` the mix of source and batch statistics.
///
/// Writes the batch's own mean and variance to `batch_mean` and `batch_var`. Two trips to memory: statistics, then
/// the element-wise pass. The batch statistics of an empty batch are left at zero.
pub fn mixed_batch_norm<T: Element>(
    io: &mut Io<'_, T>,
    layout: Layout,
    source: Source<'_>,
    params: &MixedParams,
    batch_mean: &mut [f64],
    batch_var: &mut [f64],
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "mixed_batch_norm";
    let channels = layout.channels;
    KernelError::check_len(OP, "running_mean", channels, source.mean.len())?;
    KernelError::check_len(OP, "running_var", channels, source.var.len())?;
    KernelError::check_len(OP, "weight", channels, source.weight.map_or(channels, <[f64]>::len))?;
    KernelError::check_len(OP, "bias", channels, source.bias.map_or(channels, <[f64]>::len))?;
    KernelError::check_len(OP, "batch_mean", channels, batch_mean.len())?;
    KernelError::check_len(OP, "batch_var", channels, batch_var.len())?;
    let mut moments = vec![Moments::default(); channels];
    channel_moments(io.source(), layout, None, &mut moments, par)?;
    for (c, m) in moments.iter().enumerate() {
        batch_mean[c] = m.mean;
        batch_var[c] = if params.unbiased { m.m2 / (m.count - 1.0).max(1.0) } else { m.variance() };
    }
    let w = params.source_weight;
    let mix = |source: f64, batch: f64| {
        // The ends of the range ignore the other side even where it is not finite.
        if w >= 1.0 {
            source
        } else if w <= 0.0 {
            batch
        } else {
            w * source + (1.0 - w) * batch
        }
    };
    let affine = Affine::new((0..channels).map(|c| {
        let var = mix(source.var[c], batch_var[c]);
        let scale = source.weight.map_or(1.0, |w| w[c]) / (var + params.eps).sqrt();
        (mix(source.mean[c], batch_mean[c]), scale, source.bias.map_or(0.0, |b| b[c]))
    }));
    channel_affine(io, layout, &affine, par)
}
