//! Bindings of the `norm` kernels.

use crate::array::{View, optional, with_float};
use crate::run::run;
use half::{bf16, f16};
use pyo3::prelude::*;
use shiftkern_kernels::norm::{
    self, Affine, Components, Layout, MixedParams, Moments, Source, StyleOutput, StyleParams, UnmixOutput, UnmixParams,
};
use shiftkern_kernels::{KernelError, simd::Element};

/// `(outer, channels, inner, groups)`.
type LayoutTuple = (usize, usize, usize, usize);

fn layout((outer, channels, inner, groups): LayoutTuple) -> Layout {
    Layout { outer, channels, inner, groups }
}

/// Rounds `(shift, scale, bias)` arrays for an element-wise pass over tensors of type `T`.
fn affine<T: Element>(op: &'static str, shift: View, scale: View, bias: View) -> Result<Affine<T::Acc>, KernelError> {
    let (shift, scale, bias) = (shift.to_f64(op, "shift")?, scale.to_f64(op, "scale")?, bias.to_f64(op, "bias")?);
    KernelError::check_len(op, "scale", shift.len(), scale.len())?;
    KernelError::check_len(op, "bias", shift.len(), bias.len())?;
    Ok(Affine::new(shift.into_iter().zip(scale).zip(bias).map(|((a, b), c)| (a, b, c))))
}

#[pyfunction]
pub fn channel_moments(
    py: Python<'_>,
    x: View,
    shape: LayoutTuple,
    mask: Option<View>,
    mut mean: View,
    mut m2: View,
    mut count: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "channel_moments";
    run(py, threads, |par| {
        let layout = layout(shape);
        let mask = mask.as_ref().map(|m| m.read::<u8>(OP, "mask")).transpose()?;
        let mut moments = vec![Moments::default(); layout.statistics()];
        with_float!(x, OP, T => norm::channel_moments(x.read::<T>(OP, "x")?, layout, mask, &mut moments, par))?;
        let (mean, m2) = (mean.write::<f64>(OP, "mean")?, m2.write::<f64>(OP, "m2")?);
        KernelError::check_len(OP, "mean", moments.len(), mean.len())?;
        KernelError::check_len(OP, "m2", moments.len(), m2.len())?;
        for ((m, mean), m2) in moments.iter().zip(mean).zip(m2) {
            (*mean, *m2) = (m.mean, m.m2);
        }
        // Every channel of a group has seen the same positions.
        let channels = layout.channels.max(1);
        for (count, group) in count.write::<f64>(OP, "count")?.iter_mut().zip(moments.chunks(channels)) {
            *count = group[0].count;
        }
        Ok(())
    })
}

#[pyfunction]
pub fn channel_affine(
    py: Python<'_>,
    x: View,
    shape: LayoutTuple,
    shift: View,
    scale: View,
    bias: View,
    mut out: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "channel_affine";
    run(py, threads, |par| {
        with_float!(x, OP, T => {
            let affine = affine::<T>(OP, shift, scale, bias)?;
            norm::channel_affine(&mut x.io::<T>(&mut out, OP)?, layout(shape), &affine, par)
        })
    })
}

#[pyfunction]
pub fn channel_dot(
    py: Python<'_>,
    g: View,
    x: View,
    shape: LayoutTuple,
    shift: View,
    mut sum: View,
    mut dot: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "channel_dot";
    run(py, threads, |par| {
        let layout = layout(shape);
        let shift = shift.to_f64(OP, "shift")?;
        let mut out = vec![(0.0, 0.0); layout.statistics()];
        with_float!(x, OP, T => {
            norm::channel_dot(g.read::<T>(OP, "g")?, x.read::<T>(OP, "x")?, layout, &shift, &mut out, par)
        })?;
        let (sum, dot) = (sum.write::<f64>(OP, "sum")?, dot.write::<f64>(OP, "dot")?);
        KernelError::check_len(OP, "sum", out.len(), sum.len())?;
        KernelError::check_len(OP, "dot", out.len(), dot.len())?;
        for (((a, b), sum), dot) in out.into_iter().zip(sum).zip(dot) {
            (*sum, *dot) = (a, b);
        }
        Ok(())
    })
}

#[pyfunction]
pub fn channel_combine(
    py: Python<'_>,
    g: View,
    x: View,
    shape: LayoutTuple,
    factor: View,
    shift: View,
    scale: View,
    bias: View,
    mut out: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "channel_combine";
    run(py, threads, |par| {
        let factor = factor.to_f64(OP, "factor")?;
        with_float!(x, OP, T => {
            let affine = affine::<T>(OP, shift, scale, bias)?;
            let (g, x, out) = (g.read::<T>(OP, "g")?, x.read::<T>(OP, "x")?, out.write::<T>(OP, "out")?);
            norm::channel_combine(g, x, layout(shape), &factor, &affine, out, par)
        })
    })
}

#[pyfunction]
pub fn mixed_batch_norm(
    py: Python<'_>,
    x: View,
    shape: LayoutTuple,
    running_mean: View,
    running_var: View,
    weight: Option<View>,
    bias: Option<View>,
    source_weight: f64,
    eps: f64,
    unbiased: bool,
    mut out: View,
    mut batch_mean: View,
    mut batch_var: View,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "mixed_batch_norm";
    run(py, threads, |par| {
        let (mean, var) = (running_mean.to_f64(OP, "running_mean")?, running_var.to_f64(OP, "running_var")?);
        let (weight, bias) = (optional(weight, OP, "weight")?, optional(bias, OP, "bias")?);
        let source = Source { mean: &mean, var: &var, weight: weight.as_deref(), bias: bias.as_deref() };
        let params = MixedParams { source_weight, eps, unbiased };
        let batch_mean = batch_mean.write::<f64>(OP, "batch_mean")?;
        let batch_var = batch_var.write::<f64>(OP, "batch_var")?;
        with_float!(x, OP, T => {
            let mut io = x.io::<T>(&mut out, OP)?;
            norm::mixed_batch_norm(&mut io, layout(shape), source, &params, batch_mean, batch_var, par)
        })
    })
}

#[pyfunction]
pub fn unmix_norm(
    py: Python<'_>,
    x: View,
    shape: LayoutTuple,
    component_mean: View,
    component_var: View,
    weight: Option<View>,
    bias: Option<View>,
    temperature: f64,
    eps: f64,
    cross_term: bool,
    mut out: View,
    mut statistics: (View, View, View, View, View, View),
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "unmix_norm";
    run(py, threads, |par| {
        let mean = component_mean.to_f64(OP, "component_mean")?;
        let var = component_var.to_f64(OP, "component_var")?;
        let (weight, bias) = (optional(weight, OP, "weight")?, optional(bias, OP, "bias")?);
        let components = Components { mean: &mean, var: &var, weight: weight.as_deref(), bias: bias.as_deref() };
        let params = UnmixParams { temperature, eps, cross_term };
        let mut output = UnmixOutput {
            p: statistics.0.write(OP, "p")?,
            instance_mean: statistics.1.write(OP, "instance_mean")?,
            instance_var: statistics.2.write(OP, "instance_var")?,
            mean: statistics.3.write(OP, "mean")?,
            var: statistics.4.write(OP, "var")?,
            var_slope: statistics.5.write(OP, "var_slope")?,
        };
        with_float!(x, OP, T => {
            norm::unmix_norm(&mut x.io::<T>(&mut out, OP)?, layout(shape), components, &params, &mut output, par)
        })
    })
}

#[pyfunction]
pub fn unmix_update(
    py: Python<'_>,
    component: View,
    instance: View,
    p: View,
    components: usize,
    eta: f64,
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "unmix_update_";
    run(py, threads, |par| {
        let mut values = component.to_f64(OP, "component")?;
        let instance = instance.to_f64(OP, "instance")?;
        norm::unmix_update(&mut values, &instance, p.read(OP, "p")?, components, eta, par)?;
        component.store_f64(OP, "component", &values)
    })
}

#[pyfunction]
pub fn style_shift(
    py: Python<'_>,
    x: View,
    shape: LayoutTuple,
    style_mean: View,
    style_std: View,
    threshold: Option<f64>,
    eps: f64,
    mut out: View,
    mut statistics: (View, View, View),
    threads: usize,
) -> PyResult<()> {
    const OP: &str = "style_shift";
    run(py, threads, |par| {
        let (mean, std) = (style_mean.to_f64(OP, "style_mean")?, style_std.to_f64(OP, "style_std")?);
        let params = StyleParams { threshold, eps };
        let mut output = StyleOutput {
            style: statistics.0.write(OP, "style")?,
            mean: statistics.1.write(OP, "mean")?,
            std: statistics.2.write(OP, "std")?,
        };
        with_float!(x, OP, T => {
            norm::style_shift(&mut x.io::<T>(&mut out, OP)?, layout(shape), &mean, &std, &params, &mut output, par)
        })
    })
}

/// Returns whether it could: tensors that share memory are left alone. All is checked before the first is written.
#[pyfunction]
pub fn ema_update(
    py: Python<'_>,
    mut tensors: Vec<View>,
    values: Vec<View>,
    momentum: f64,
    threads: usize,
) -> PyResult<bool> {
    const OP: &str = "ema_update_";
    run(py, threads, |par| {
        KernelError::check_len(OP, "values", tensors.len(), values.len())?;
        for (tensor, value) in tensors.iter().zip(&values) {
            KernelError::check_len(OP, "values", tensor.len(), value.len())?;
        }
        if !View::apart(&tensors, &values) {
            return Ok(false);
        }
        let (mut singles, mut doubles, mut halves, mut brains) = (vec![], vec![], vec![], vec![]);
        for (tensor, value) in tensors.iter_mut().zip(&values) {
            match tensor.code() {
                0 => singles.push((tensor.write::<f32>(OP, "tensors")?, value.read::<f32>(OP, "values")?)),
                1 => doubles.push((tensor.write::<f64>(OP, "tensors")?, value.read::<f64>(OP, "values")?)),
                2 => halves.push((tensor.write::<f16>(OP, "tensors")?, value.read::<f16>(OP, "values")?)),
                _ => brains.push((tensor.write::<bf16>(OP, "tensors")?, value.read::<bf16>(OP, "values")?)),
            }
        }
        norm::ema_update(singles, momentum, par)?;
        norm::ema_update(doubles, momentum, par)?;
        norm::ema_update(halves, momentum, par)?;
        norm::ema_update(brains, momentum, par)?;
        Ok(true)
    })
}
