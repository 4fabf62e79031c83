//! UnMix-TNS: each instance is normalised by a mixture of its own and the components' statistics.

use super::{Affine, Layout, Moments, channel_affine, channel_moments};
use crate::exec::{Io, for_each_chunk};
use crate::simd::Element;
use crate::{KernelError, Par};

/// Options of [`unmix_norm`].
#[derive(Clone, Copy, Debug)]
pub struct UnmixParams {
    /// Softmax temperature of the assignment.
    pub temperature: f64,
    /// Added to the variance.
    pub eps: f64,
    /// Whether the variance of each two-point mixture includes `p (1 - p) (mean_b - mean_k)^2`.
    pub cross_term: bool,
}

/// The components, `K * C` each, and the affine parameters, `C` each.
#[derive(Clone, Copy, Debug)]
pub struct Components<'a> {
    /// Component means.
    pub mean: &'a [f64],
    /// Component variances.
    pub var: &'a [f64],
    /// Scale after normalization, 1 when absent.
    pub weight: Option<&'a [f64]>,
    /// Offset after normalization, 0 when absent.
    pub bias: Option<&'a [f64]>,
}

/// What [`unmix_norm`] computes beside the normalised tensor; all `(B, C)` but `p`, which is `(B, K)`.
pub struct UnmixOutput<'a> {
    /// Assignment of instances to components.
    pub p: &'a mut [f64],
    /// Instance means.
    pub instance_mean: &'a mut [f64],
    /// Instance variances.
    pub instance_var: &'a mut [f64],
    /// Means that were used.
    pub mean: &'a mut [f64],
    /// Variances that were used.
    pub var: &'a mut [f64],
    /// Derivative of the used variance by the instance mean, for the gradient.
    pub var_slope: &'a mut [f64],
}

/// Normalises each instance (`layout.groups` of them) by its mixture statistics.
///
/// All small arithmetic is in `f64` and there is no `B x K x C` temporary.
pub fn unmix_norm<T: Element>(
    io: &mut Io<'_, T>,
    layout: Layout,
    components: Components<'_>,
    params: &UnmixParams,
    out: &mut UnmixOutput<'_>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "unmix_norm";
    let channels = layout.channels;
    let k = components.mean.len() / channels.max(1);
    KernelError::check_len(OP, "component_mean", k * channels, components.mean.len())?;
    KernelError::check_len(OP, "component_var", components.mean.len(), components.var.len())?;
    KernelError::check_len(OP, "weight", channels, components.weight.map_or(channels, <[f64]>::len))?;
    KernelError::check_len(OP, "bias", channels, components.bias.map_or(channels, <[f64]>::len))?;
    KernelError::check_len(OP, "p", layout.groups * k, out.p.len())?;
    for (name, length) in [
        ("instance_mean", out.instance_mean.len()),
        ("instance_var", out.instance_var.len()),
        ("mean", out.mean.len()),
        ("var", out.var.len()),
        ("var_slope", out.var_slope.len()),
    ] {
        KernelError::check_len(OP, name, layout.statistics(), length)?;
    }
    let mut moments = vec![Moments::default(); layout.statistics()];
    channel_moments(io.source(), layout, None, &mut moments, par)?;
    for (i, m) in moments.iter().enumerate() {
        out.instance_mean[i] = m.mean;
        out.instance_var[i] = m.variance();
    }
    if channels == 0 {
        return Ok(());
    }
    let norms: Vec<f64> = components.mean.chunks(channels).map(norm).collect();
    // One chunk per instance: its rows of every output travel together.
    let mut rows: Vec<_> = out
        .p
        .chunks_mut(k.max(1))
        .zip(out.mean.chunks_mut(channels))
        .zip(out.var.chunks_mut(channels))
        .zip(out.var_slope.chunks_mut(channels))
        .collect();
    let cost = (layout.statistics() * k) as f64 * 4.0;
    for_each_chunk(par, &mut rows, 1, cost, |b, row| {
        let own_mean = &out.instance_mean[b * channels..][..channels];
        let own_var = &out.instance_var[b * channels..][..channels];
        for (((p, mean), var), slope) in row {
            assign(own_mean, components.mean, &norms, params.temperature, p);
            mix(own_mean, own_var, components, p, params.cross_term, mean, var, slope);
        }
    })?;
    let affine = Affine::new((0..layout.statistics()).map(|i| {
        let c = i % channels;
        let scale = components.weight.map_or(1.0, |w| w[c]) / (out.var[i] + params.eps).sqrt();
        (out.mean[i], scale, components.bias.map_or(0.0, |b| b[c]))
    }));
    channel_affine(io, layout, &affine, par)
}

/// Euclidean norm, at least the 1e-12 that keeps a zero vector's cosine at zero.
fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12)
}

/// `p <- softmax_k(cos(own, component_k) / temperature)`.
fn assign(own: &[f64], components: &[f64], norms: &[f64], temperature: f64, p: &mut [f64]) {
    let own_norm = norm(own);
    for ((p, component), norm) in p.iter_mut().zip(components.chunks(own.len())).zip(norms) {
        let dot: f64 = own.iter().zip(component).map(|(a, b)| a * b).sum();
        *p = dot / (own_norm * norm) / temperature;
    }
    let peak = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut total = 0.0;
    for p in &mut *p {
        *p = (*p - peak).exp();
        total += *p;
    }
    for p in p {
        *p /= total;
    }
}

/// Mean and variance of the equal-weight mixture over components of `(1 - p) component + p own`.
fn mix(
    own_mean: &[f64],
    own_var: &[f64],
    components: Components<'_>,
    p: &[f64],
    cross_term: bool,
    mean: &mut [f64],
    var: &mut [f64],
    slope: &mut [f64],
) {
    let channels = own_mean.len();
    let share = 1.0 / p.len() as f64;
    mean.fill(0.0);
    var.fill(0.0);
    slope.fill(0.0);
    for (&p, component) in p.iter().zip(components.mean.chunks(channels)) {
        for ((mean, &component), &own) in mean.iter_mut().zip(component).zip(own_mean) {
            *mean += share * ((1.0 - p) * component + p * own);
        }
    }
    let parts = components.mean.chunks(channels).zip(components.var.chunks(channels));
    for (&p, (component_mean, component_var)) in p.iter().zip(parts) {
        for c in 0..channels {
            // Deviations from the mixture's mean, so that large means cancel before they are squared.
            let deviation = (1.0 - p) * component_mean[c] + p * own_mean[c] - mean[c];
            let gap = own_mean[c] - component_mean[c];
            let crossed = if cross_term { p * (1.0 - p) } else { 0.0 };
            let within = (1.0 - p) * component_var[c] + p * own_var[c] + crossed * gap * gap;
            var[c] += share * (within + deviation * deviation);
            slope[c] += 2.0 * share * (p * deviation + crossed * gap);
        }
    }
}

/// `component <- component + eta * mean_b p_bk (instance_b - component)` for means and variances alike.
///
/// `p` is `(B, K)`, `instance` is `(B, C)`, `component` is `(K, C)`.
pub fn unmix_update(
    component: &mut [f64],
    instance: &[f64],
    p: &[f64],
    components: usize,
    eta: f64,
    par: Par<'_>,
) -> Result<(), KernelError> {
    const OP: &str = "unmix_update_";
    let k = components.max(1);
    let (batch, channels) = (p.len() / k, component.len() / k);
    KernelError::check_len(OP, "component", k * channels, component.len())?;
    KernelError::check_len(OP, "p", batch * k, p.len())?;
    KernelError::check_len(OP, "instance", batch * channels, instance.len())?;
    if batch == 0 || channels == 0 {
        return Ok(());
    }
    let step = eta / batch as f64;
    for_each_chunk(par, component, channels, (batch * k * channels) as f64, |j, component| {
        let mut pull = vec![0.0; channels];
        for (own, p) in instance.chunks(channels).zip(p.chunks(k)) {
            for ((pull, &own), &current) in pull.iter_mut().zip(own).zip(&*component) {
                *pull += p[j] * (own - current);
            }
        }
        for (current, pull) in component.iter_mut().zip(pull) {
            *current += step * pull;
        }
    })
}
