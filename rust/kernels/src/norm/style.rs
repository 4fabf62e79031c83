//! Test-time style shifting: an instance whose channel style is far from every source style takes the nearest one.

use super::{Affine, Layout, Moments, channel_affine, channel_moments};
use crate::exec::Io;
use crate::simd::Element;
use crate::{KernelError, Par};

/// Options of [`style_shift`].
#[derive(Clone, Copy, Debug)]
pub struct StyleParams {
    /// Instances whose distance to the nearest style is not above this stay as they are; `None` shifts all.
    pub threshold: Option<f64>,
    /// Added to the variance before the square root.
    pub eps: f64,
}

/// What [`style_shift`] computes beside the shifted tensor.
pub struct StyleOutput<'a> {
    /// The style each instance took, -1 where it kept its own.
    pub style: &'a mut [i64],
    /// Instance means, `(B, C)`.
    pub mean: &'a mut [f64],
    /// Instance standard deviations `sqrt(var + eps)`, `(B, C)`.
    pub std: &'a mut [f64],
}

/// `y = (x - mean) / std * style_std + style_mean` for instances beyond the threshold, `y = x` for the others.
///
/// The distance is the Euclidean one of the stacked `[mean, std]` vectors; ties go to the first style.
pub fn style_shift<T: Element>(
    io: &mut Io<'_, T>,
    layout: Layout,
    style_mean: &[f64],
    style_std: &[f64],
    params: &StyleParams,
    out: &mut StyleOutput<'_>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "style_shift";
    let channels = layout.channels;
    let styles = style_mean.len() / channels.max(1);
    KernelError::check_len(OP, "style_mean", styles * channels, style_mean.len())?;
    KernelError::check_len(OP, "style_std", style_mean.len(), style_std.len())?;
    KernelError::check_len(OP, "style", layout.groups, out.style.len())?;
    KernelError::check_len(OP, "mean", layout.statistics(), out.mean.len())?;
    KernelError::check_len(OP, "std", layout.statistics(), out.std.len())?;
    let mut moments = vec![Moments::default(); layout.statistics()];
    channel_moments(io.source(), layout, None, &mut moments, par)?;
    for (i, m) in moments.iter().enumerate() {
        out.mean[i] = m.mean;
        out.std[i] = (m.variance() + params.eps).sqrt();
    }
    out.style.fill(-1);
    if layout.is_empty() {
        return Ok(());
    }
    for (b, style) in out.style.iter_mut().enumerate() {
        let mean = &out.mean[b * channels..][..channels];
        let std = &out.std[b * channels..][..channels];
        let mut nearest = (0_usize, f64::INFINITY);
        for (j, (m, s)) in style_mean.chunks(channels).zip(style_std.chunks(channels)).enumerate() {
            let squares = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
            let distance = (squares(mean, m) + squares(std, s)).sqrt();
            // The first NaN distance is taken: what is not finite must show in the output.
            if distance < nearest.1 || (distance.is_nan() && !nearest.1.is_nan()) {
                nearest = (j, distance);
            }
        }
        if params.threshold.is_none_or(|threshold| nearest.1 > threshold || nearest.1.is_nan()) {
            *style = i64::try_from(nearest.0).unwrap_or(i64::MAX);
        }
    }
    let affine = Affine::new((0..layout.statistics()).map(|i| {
        let (b, c) = (i / channels, i % channels);
        match usize::try_from(out.style[b]) {
            Ok(j) => (out.mean[i], style_std[j * channels + c] / out.std[i], style_mean[j * channels + c]),
            // x + 0.0 would lose the sign of a negative zero.
            Err(_) => (0.0, 1.0, -0.0),
        }
    }));
    channel_affine(io, layout, &affine, par)
}
