"""Operators of the ``norm`` domain.

The building blocks are four passes over a tensor: `channel_moments` and `channel_dot` reduce it to per-channel sums,
`channel_affine` and `channel_combine` write it anew from per-channel coefficients. Every normalization here and every
gradient of one is made of them. Coefficients are float64 of shape (C,), or (N, C) for statistics per instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._crossing import optional_view, threads, view
from shiftkern._library import define

_STAT = torch.float64


# --- memory layouts ------------------------------------------------------------------------------------------------


def channels_innermost(x: Tensor, dim: int) -> bool:
    """Whether the channel is the fastest dimension in memory, as in channels-last tensors."""
    return x.movedim(dim, -1).is_contiguous()


def is_dense(x: Tensor, dim: int) -> bool:
    """Whether the kernels can walk ``x`` as it lies in memory."""
    return x.is_contiguous() or channels_innermost(x, dim)


def _dense(x: Tensor, dim: int) -> Tensor:
    return x if is_dense(x, dim) else x.contiguous()


def _layout(x: Tensor, dim: int, per_instance: bool) -> tuple[int, int, int, int]:
    """(outer, channels, inner, groups) of a dense tensor."""
    channels = x.shape[dim]
    groups = x.shape[0] if per_instance else 1
    if x.numel() == 0:
        return 0, channels, 1, max(groups, 1)
    inner = x.shape[dim + 1 :].numel() if x.is_contiguous() else 1
    return x.numel() // (channels * inner), channels, inner, groups


def _broadcast(coefficient: Tensor, x: Tensor, dim: int) -> Tensor:
    """Reshape (C,) or (N, C) to multiply ``x``, in the type that ``x`` is computed in."""
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    if coefficient.dim() == 2:
        shape[0] = x.shape[0]
    return coefficient.to(_compute_dtype(x)).view(shape)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reduced(x: Tensor, dim: int, per_instance: bool) -> list[int]:
    kept = {dim, 0} if per_instance else {dim}
    return [d for d in range(x.dim()) if d not in kept]


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    # An empty list would mean "all dimensions" to torch.
    return x.sum(dims, dtype=_STAT) if dims else x.to(_STAT)


def _statistics_shape(x: Tensor, dim: int, per_instance: bool) -> tuple[int, ...]:
    return (x.shape[0], x.shape[dim]) if per_instance else (x.shape[dim],)


def _split_affine(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int) -> Tensor:
    """(x - shift) * scale + bias; the part of the shift that rounding drops moves to the bias."""
    rounded = shift.to(_compute_dtype(x)).to(_STAT)
    rest = torch.where(rounded.isfinite(), shift - rounded, 0.0)
    wide = x.to(_compute_dtype(x))
    offset = _broadcast(bias - rest * scale, x, dim)
    return (wide - _broadcast(rounded, x, dim)) * _broadcast(scale, x, dim) + offset


# --- channel_moments -----------------------------------------------------------------------------------------------


def _moments_rust(x: Tensor, mask: Tensor | None, dim: int, per_instance: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _moments_torch(x, mask, dim, per_instance)
    count, mean, m2 = _moments_fake(x, mask, dim, per_instance)
    x = _dense(x, dim)
    mask = None if mask is None else mask.contiguous()
    shape = _layout(x, dim, per_instance)
    _native.channel_moments(view(x), shape, optional_view(mask), view(mean), view(m2), view(count), threads())
    return count, mean, m2


def _moments_torch(x: Tensor, mask: Tensor | None, dim: int, per_instance: bool) -> tuple[Tensor, Tensor, Tensor]:
    dims = _reduced(x, dim, per_instance)
    wide = x.to(_compute_dtype(x))
    if mask is None:
        size = x.shape[1 if per_instance else 0 : dim].numel() * x.shape[dim + 1 :].numel()
        count = torch.full((x.shape[0], 1) if per_instance else (), float(size), dtype=_STAT, device=x.device)
    else:
        kept = mask.unsqueeze(dim)
        wide = torch.where(kept, wide, 0.0)
        rows = x.shape[0] if per_instance else 1
        positions = mask.reshape(rows, mask.numel() // max(rows, 1))
        count = positions.sum(1, keepdim=True, dtype=_STAT)
        count = count if per_instance else count.reshape(())
    divisor = count.clamp(min=1.0)
    centre = (_sum(wide, dims) / divisor).to(wide.dtype)
    deviation = wide - _broadcast(centre, x, dim)
    if mask is not None:
        deviation = torch.where(kept, deviation, 0.0)
    first = _sum(deviation, dims)
    m2 = (_sum(deviation * deviation, dims) - first * first / divisor).clamp(min=0.0)
    return count, centre.to(_STAT) + first / divisor, m2


def _moments_fake(x: Tensor, mask: Tensor | None, dim: int, per_instance: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = _statistics_shape(x, dim, per_instance)
    count = x.new_empty((x.shape[0], 1) if per_instance else (), dtype=_STAT)
    return count, x.new_empty(shape, dtype=_STAT), x.new_empty(shape, dtype=_STAT)


def _moments_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, ctx.dim, _ = inputs
    count, mean, _ = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(x, mask, count, mean)


def _moments_backward(ctx: Any, _: Any, grad_mean: Tensor | None, grad_m2: Tensor | None) -> tuple[Any, ...]:
    x, mask, count, mean = ctx.saved_tensors
    zero = torch.zeros_like(mean)
    scale = zero if grad_m2 is None else 2.0 * grad_m2
    bias = zero if grad_mean is None else grad_mean / count.clamp(min=1.0)
    grad = channel_affine(x, mean, scale, bias, ctx.dim)
    if mask is not None:
        grad = torch.where(mask.unsqueeze(ctx.dim), grad, 0.0)
    return grad, None, None, None


# --- channel_affine: y = (x - shift) * scale + bias ------------------------------------------------------------------


def _affine_rust(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int) -> Tensor:
    x = _dense(x, dim)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    shift, scale, bias = shift.contiguous(), scale.contiguous(), bias.contiguous()
    shape = _layout(x, dim, shift.dim() == 2)
    _native.channel_affine(view(x), shape, view(shift), view(scale), view(bias), view(out), threads())
    return out


def _affine_torch(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int) -> Tensor:
    return _split_affine(_dense(x, dim), shift, scale, bias, dim).to(x.dtype)


def _affine_fake(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int) -> Tensor:
    return _like(x, dim)


def _like(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x) if is_dense(x, dim) else x.new_empty(x.shape)


# --- channel_dot: (sum g, sum g * (x - shift)) ------------------------------------------------------------------------


def _same_memory(g: Tensor, x: Tensor, dim: int) -> Tensor:
    """Lay ``g`` out as the dense tensor ``x``."""
    if g.stride() == x.stride():
        return g
    return torch.empty_like(x, dtype=g.dtype).copy_(g)


def _dot_rust(g: Tensor, x: Tensor, shift: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros_like(shift), torch.zeros_like(shift)
    x = _dense(x, dim)
    g = _same_memory(g, x, dim)
    shift = shift.contiguous()
    total, dot = torch.empty_like(shift), torch.empty_like(shift)
    shape = _layout(x, dim, shift.dim() == 2)
    _native.channel_dot(view(g), view(x), shape, view(shift), view(total), view(dot), threads())
    return total, dot


def _dot_torch(g: Tensor, x: Tensor, shift: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    dims = _reduced(x, dim, shift.dim() == 2)
    g = g.to(_compute_dtype(x))
    one = torch.ones_like(shift)
    centred = _split_affine(x, shift, one, torch.zeros_like(shift), dim)
    return _sum(g, dims), _sum(g * centred, dims)


def _dot_fake(g: Tensor, x: Tensor, shift: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(shift), torch.empty_like(shift)


# --- channel_combine: g * factor + (x - shift) * scale + bias ---------------------------------------------------------


def _combine_rust(g: Tensor, x: Tensor, factor: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int) -> Tensor:
    x = _dense(x, dim)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    g = _same_memory(g, x, dim)
    factor, shift, scale, bias = (c.contiguous() for c in (factor, shift, scale, bias))
    shape = _layout(x, dim, shift.dim() == 2)
    coefficients = view(factor), view(shift), view(scale), view(bias)
    _native.channel_combine(view(g), view(x), shape, *coefficients, view(out), threads())
    return out


def _combine_torch(
    g: Tensor, x: Tensor, factor: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int
) -> Tensor:
    x = _dense(x, dim)
    scaled = g.to(_compute_dtype(x)) * _broadcast(factor, x, dim)
    out = (scaled + _split_affine(x, shift, scale, bias, dim)).to(x.dtype)
    return _same_memory(out, x, dim)


def _combine_fake(g: Tensor, x: Tensor, factor: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, dim: int) -> Tensor:
    return _like(x, dim)


channel_moments = define(
    "channel_moments(Tensor x, Tensor? mask, int dim, bool per_instance) -> (Tensor count, Tensor mean, Tensor m2)",
    rust=_moments_rust,
    torch_ops=_moments_torch,
    fake=_moments_fake,
    setup_context=_moments_context,
    backward=_moments_backward,
)
channel_affine = define(
    "channel_affine(Tensor x, Tensor shift, Tensor scale, Tensor bias, int dim) -> Tensor",
    rust=_affine_rust,
    torch_ops=_affine_torch,
    fake=_affine_fake,
)
channel_dot = define(
    "channel_dot(Tensor g, Tensor x, Tensor shift, int dim) -> (Tensor sum, Tensor dot)",
    rust=_dot_rust,
    torch_ops=_dot_torch,
    fake=_dot_fake,
)
channel_combine = define(
    "channel_combine(Tensor g, Tensor x, Tensor factor, Tensor shift, Tensor scale, Tensor bias, int dim) -> Tensor",
    rust=_combine_rust,
    torch_ops=_combine_torch,
    fake=_combine_fake,
)


# --- mixed_batch_norm -------------------------------------------------------------------------------------------------

_MIXED_ARGUMENTS = (
    "Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
    "float source_weight, float eps, bool unbiased"
)


def _mix(source: Tensor, batch: Tensor, source_weight: float) -> Tensor:
    """Weighted mean; the ends of the range ignore the other side even where it is not finite."""
    if source_weight == 0.0:
        return batch
    # A copy in any case: the buffer may change before the backward pass.
    source = source.to(_STAT, copy=True)
    return source if source_weight == 1.0 else source_weight * source + (1.0 - source_weight) * batch


def _mixed_into(
    x: Tensor,
    out: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_weight: float,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise dense ``x`` into ``out`` of the same memory layout, possibly itself."""
    batch_mean = running_mean.new_empty(running_mean.shape, dtype=_STAT)
    batch_var = torch.empty_like(batch_mean)
    # The names keep copies of non-contiguous arrays alive during the call.
    running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _native.mixed_batch_norm(
        view(x),
        _layout(x, 1, False),
        view(running_mean),
        view(running_var),
        optional_view(weight),
        optional_view(bias),
        source_weight,
        eps,
        unbiased,
        view(out),
        view(batch_mean),
        view(batch_var),
        threads(),
    )
    return batch_mean, batch_var


def _mixed_rust(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x, 1)
    out = torch.empty_like(x)
    return out, *_mixed_into(x, out, *arguments)


def _mixed_inplace_rust(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dense = _dense(x, 1)
    statistics = _mixed_into(dense, dense, *arguments)
    if dense is not x:
        x.copy_(dense)
    return statistics


def _mixed_out_rust(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, out = arguments
    dense = _dense(x, 1)
    if out.stride() == dense.stride():
        return _mixed_into(dense, out, *rest)
    y = torch.empty_like(dense)
    statistics = _mixed_into(dense, y, *rest)
    out.copy_(y)
    return statistics


def _mixed_torch(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_weight: float,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, batch_mean, m2 = _moments_torch(x, None, 1, False)
    batch_var = m2 / (count - 1.0 if unbiased else count).clamp(min=1.0)
    inverse = (_mix(running_var, batch_var, source_weight) + eps).rsqrt()
    scale = inverse if weight is None else weight.to(_STAT) * inverse
    offset = torch.zeros_like(scale) if bias is None else bias.to(_STAT)
    y = _affine_torch(x, _mix(running_mean, batch_mean, source_weight), scale, offset, 1)
    return y, batch_mean.clone(), batch_var


def _mixed_inplace_torch(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    y, batch_mean, batch_var = _mixed_torch(x, *arguments)
    x.copy_(y)
    return batch_mean, batch_var


def _mixed_out_torch(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, out = arguments
    y, batch_mean, batch_var = _mixed_torch(x, *rest)
    out.copy_(y)
    return batch_mean, batch_var


def _mixed_fake(x: Tensor, running_mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, 1), *_mixed_inplace_fake(x, running_mean)


def _mixed_inplace_fake(x: Tensor, running_mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    statistics = running_mean.new_empty(running_mean.shape, dtype=_STAT)
    return statistics, torch.empty_like(statistics)


def _mixed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, running_mean, running_var, weight, bias, source_weight, eps, unbiased = inputs
    _, batch_mean, batch_var = output
    ctx.mark_non_differentiable(batch_mean, batch_var)
    # Per-channel values, not the buffers: callers update those in place between forward and backward.
    used_mean = _mix(running_mean, batch_mean, source_weight)
    inverse = (_mix(running_var, batch_var, source_weight) + eps).rsqrt()
    ctx.save_for_backward(x, weight, batch_mean, used_mean.detach(), inverse.detach())
    ctx.source_weight, ctx.unbiased = source_weight, unbiased
    ctx.dtypes = tuple(t.dtype if t is not None else None for t in (running_mean, running_var, weight, bias))


def _mixed_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, batch_mean, used_mean, inverse = ctx.saved_tensors
    count = max(x.numel() // max(x.shape[1], 1), 1)
    total, dot = channel_dot(grad, x, batch_mean, 1)
    dot = dot + (batch_mean - used_mean) * total
    scale = inverse if weight is None else weight.to(_STAT) * inverse
    by_mean = -scale * total
    by_var = -0.5 * scale * inverse.square() * dot
    grad_x = None
    share = 1.0 - ctx.source_weight
    if ctx.needs_input_grad[0] and share == 0.0:
        # Evaluation mode: the batch statistics have no part, not even where they are not finite.
        zero = torch.zeros_like(scale)
        grad_x = channel_affine(grad, zero, scale, zero, 1)
    elif ctx.needs_input_grad[0]:
        divisor = max(count - 1, 1) if ctx.unbiased else count
        grad_x = channel_combine(grad, x, scale, batch_mean, 2.0 * share / divisor * by_var, share / count * by_mean, 1)
    source = torch.zeros_like(by_mean) if share == 1.0 else None
    small = (
        ctx.source_weight * by_mean if source is None else source,
        ctx.source_weight * by_var if source is None else source,
        dot * inverse,
        total,
    )
    wanted = zip(small, ctx.dtypes, ctx.needs_input_grad[1:5], strict=True)
    return grad_x, *(g.to(dtype) if needed else None for g, dtype, needed in wanted), None, None, None


mixed_batch_norm = define(
    f"mixed_batch_norm(Tensor x, {_MIXED_ARGUMENTS}) -> (Tensor y, Tensor batch_mean, Tensor batch_var)",
    rust=_mixed_rust,
    torch_ops=_mixed_torch,
    fake=_mixed_fake,
    setup_context=_mixed_context,
    backward=_mixed_backward,
)
mixed_batch_norm_ = define(
    f"mixed_batch_norm_(Tensor(a!) x, {_MIXED_ARGUMENTS}) -> (Tensor batch_mean, Tensor batch_var)",
    rust=_mixed_inplace_rust,
    torch_ops=_mixed_inplace_torch,
    fake=_mixed_inplace_fake,
    mutates=(0,),
)
mixed_batch_norm_out = define(
    f"mixed_batch_norm_out(Tensor x, {_MIXED_ARGUMENTS}, Tensor(a!) out) -> (Tensor batch_mean, Tensor batch_var)",
    rust=_mixed_out_rust,
    torch_ops=_mixed_out_torch,
    fake=_mixed_inplace_fake,
    mutates=(8,),
)


# --- unmix_norm -------------------------------------------------------------------------------------------------------


def _unmix_fake(
    x: Tensor, component_mean: Tensor, component_var: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    p = x.new_empty((x.shape[0], component_mean.shape[0]), dtype=_STAT)
    return _like(x, 1), p, *(x.new_empty(x.shape[:2], dtype=_STAT) for _ in range(5))


def _unmix_rust(
    x: Tensor,
    component_mean: Tensor,
    component_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    eps: float,
    cross_term: bool,
) -> tuple[Tensor, ...]:
    x = _dense(x, 1)
    out, *statistics = _unmix_fake(x, component_mean, component_var, weight, bias)
    if x.numel() == 0:
        return out, *(s.zero_() for s in statistics)
    component_mean, component_var = component_mean.contiguous(), component_var.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    p, instance_mean, instance_var, mean, var, slope = map(view, statistics)
    _native.unmix_norm(
        view(x),
        _layout(x, 1, True),
        view(component_mean),
        view(component_var),
        optional_view(weight),
        optional_view(bias),
        temperature,
        eps,
        cross_term,
        view(out),
        (p, instance_mean, instance_var, mean, var, slope),
        threads(),
    )
    return out, *statistics


def _unmix_torch(
    x: Tensor,
    component_mean: Tensor,
    component_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    eps: float,
    cross_term: bool,
) -> tuple[Tensor, ...]:
    component_mean, component_var = component_mean.to(_STAT), component_var.to(_STAT)
    components = component_mean.shape[0]
    count, own_mean, m2 = _moments_torch(x, None, 1, True)
    own_var = m2 / count.clamp(min=1.0)
    cosine = torch.nn.functional.normalize(own_mean, dim=1) @ torch.nn.functional.normalize(component_mean, dim=1).T
    p = (cosine / temperature).softmax(1)
    # The rows of p sum to 1, so every sum over components is a matrix product and no (B, K, C) array is made.
    rest = 1.0 - p
    mean = (rest @ component_mean + own_mean) / components
    var = (rest @ component_var + own_var) / components
    centred = component_mean.mean(0)
    spread, own = component_mean - centred, own_mean - centred
    p2 = p.square()
    # E_k[a_k^2] - E[a]^2 of a_k = (1 - p) mean_k + p own, shifted by the components' centre so that it cancels well.
    squares = rest.square() @ spread.square() + 2.0 * own * ((p - p2) @ spread) + own.square() * p2.sum(1, keepdim=True)
    var = var + squares / components - (mean - centred).square()
    slope = 2.0 * ((p - p2) @ spread + own * p2.sum(1, keepdim=True) - (mean - centred)) / components
    if cross_term:
        cross = p - p2
        total = cross.sum(1, keepdim=True)
        var = var + (cross @ spread.square() - 2.0 * own * (cross @ spread) + own.square() * total) / components
        slope = slope + 2.0 * (own * total - cross @ spread) / components
    inverse = (var + eps).rsqrt()
    scale = inverse if weight is None else weight.to(_STAT) * inverse
    offset = torch.zeros_like(scale) if bias is None else bias.to(_STAT).expand_as(scale)
    y = _affine_torch(x, mean, scale, offset, 1)
    return y, p, own_mean, own_var, mean, var, slope


def _unmix_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, weight, bias, _, eps, _ = inputs
    _, p, own_mean, own_var, mean, var, slope = output
    ctx.mark_non_differentiable(p, own_mean, own_var, mean, var, slope)
    ctx.save_for_backward(x, weight, own_mean, mean, var, slope)
    ctx.components, ctx.eps = p.shape[1], eps
    ctx.dtypes = tuple(t.dtype if t is not None else None for t in (weight, bias))


def _unmix_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, own_mean, mean, var, slope = ctx.saved_tensors
    count = max(x.shape[2:].numel(), 1)
    total, dot = channel_dot(grad, x, own_mean, 1)
    dot = dot + (own_mean - mean) * total
    inverse = (var + ctx.eps).rsqrt()
    scale = inverse if weight is None else weight.to(_STAT) * inverse
    by_var = -0.5 * scale * inverse.square() * dot
    by_own_mean = -scale * total / ctx.components + by_var * slope
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = channel_combine(
            grad, x, scale, own_mean, 2.0 / (count * ctx.components) * by_var, by_own_mean / count, 1
        )
    small = ((dot * inverse).sum(0), total.sum(0))
    wanted = zip(small, ctx.dtypes, ctx.needs_input_grad[3:5], strict=True)
    affine = (g.to(dtype) if needed else None for g, dtype, needed in wanted)
    return grad_x, None, None, *affine, None, None, None


unmix_norm = define(
    "unmix_norm(Tensor x, Tensor component_mean, Tensor component_var, Tensor? weight, Tensor? bias, "
    "float temperature, float eps, bool cross_term) -> (Tensor y, Tensor p, Tensor instance_mean, "
    "Tensor instance_var, Tensor mean, Tensor var, Tensor var_slope)",
    rust=_unmix_rust,
    torch_ops=_unmix_torch,
    fake=_unmix_fake,
    setup_context=_unmix_context,
    backward=_unmix_backward,
)


# --- unmix_update_: component <- component + eta * mean_b p (instance - component) ------------------------------------


def _update_rust(component: Tensor, instance: Tensor, p: Tensor, eta: float) -> None:
    dense = component.contiguous()
    instance, p = instance.contiguous(), p.to(_STAT).contiguous()
    _native.unmix_update(view(dense), view(instance), view(p), component.shape[0], eta, threads())
    if dense is not component:
        component.copy_(dense)


def _update_torch(component: Tensor, instance: Tensor, p: Tensor, eta: float) -> None:
    if p.shape[0] == 0:
        return
    p, instance, current = p.to(_STAT), instance.to(_STAT), component.to(_STAT)
    pull = (p.T @ instance - p.sum(0).unsqueeze(1) * current) / p.shape[0]
    component.copy_(current + eta * pull)


def _nothing_fake(*_: Any) -> None:
    return None


unmix_update_ = define(
    "unmix_update_(Tensor(a!) component, Tensor instance, Tensor p, float eta) -> ()",
    rust=_update_rust,
    torch_ops=_update_torch,
    fake=_nothing_fake,
    mutates=(0,),
)


# --- style_shift ------------------------------------------------------------------------------------------------------


def _style_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    style = x.new_empty(x.shape[:1], dtype=torch.int64)
    return _like(x, 1), style, x.new_empty(x.shape[:2], dtype=_STAT), x.new_empty(x.shape[:2], dtype=_STAT)


def _style_rust(
    x: Tensor, style_mean: Tensor, style_std: Tensor, threshold: float | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _dense(x, 1)
    out, style, mean, std = _style_fake(x)
    if x.numel() == 0:
        return out, style.fill_(-1), mean.zero_(), std.zero_()
    style_mean, style_std = style_mean.contiguous(), style_std.contiguous()
    _native.style_shift(
        view(x),
        _layout(x, 1, True),
        view(style_mean),
        view(style_std),
        threshold,
        eps,
        view(out),
        (view(style), view(mean), view(std)),
        threads(),
    )
    return out, style, mean, std


def _style_torch(
    x: Tensor, style_mean: Tensor, style_std: Tensor, threshold: float | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    style_mean, style_std = style_mean.to(_STAT), style_std.to(_STAT)
    count, mean, m2 = _moments_torch(x, None, 1, True)
    std = (m2 / count.clamp(min=1.0) + eps).sqrt()
    if x.numel() == 0:
        return x.clone(), x.new_full(x.shape[:1], -1, dtype=torch.int64), mean, torch.zeros_like(std)
    squares = (mean.unsqueeze(1) - style_mean).square().sum(-1) + (std.unsqueeze(1) - style_std).square().sum(-1)
    distance, nearest = squares.sqrt().min(1)
    if threshold is None:
        shifted = torch.ones_like(nearest, dtype=torch.bool)
    else:
        shifted = (distance > threshold) | distance.isnan()
    keep = ~shifted.unsqueeze(1)
    y = _affine_torch(
        x,
        mean.masked_fill(keep, 0.0),
        (style_std[nearest] / std).masked_fill(keep, 1.0),
        style_mean[nearest].masked_fill(keep, -0.0),  # x + 0.0 would lose the sign of a negative zero
        1,
    )
    return y, torch.where(shifted, nearest, -1), mean, std


def _style_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, style_std, _, _ = inputs
    _, style, mean, std = output
    ctx.mark_non_differentiable(style, mean, std)
    ctx.save_for_backward(x, style_std, style, mean, std)


def _style_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, style_std, style, mean, std = ctx.saved_tensors
    count = max(x.shape[2:].numel(), 1)
    total, dot = channel_dot(grad, x, mean, 1)
    keep = (style < 0).unsqueeze(1)
    scale = (style_std.to(_STAT)[style.clamp(min=0)] / std).masked_fill(keep, 1.0)
    grad_x = grad_mean = grad_std = None
    if ctx.needs_input_grad[0]:
        by_var = (-0.5 * scale * dot / std.square()).masked_fill(keep, 0.0)
        by_mean = (-scale * total).masked_fill(keep, 0.0)
        grad_x = channel_combine(grad, x, scale, mean, 2.0 / count * by_var, by_mean / count, 1)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        taken = style.clamp(min=0)
        zero = torch.zeros(style_std.shape, dtype=_STAT, device=x.device)
        grad_mean = zero.index_add(0, taken, total.masked_fill(keep, 0.0)).to(style_std.dtype)
        grad_std = zero.index_add(0, taken, (dot / std).masked_fill(keep, 0.0)).to(style_std.dtype)
    return grad_x, grad_mean, grad_std, None, None


style_shift = define(
    "style_shift(Tensor x, Tensor style_mean, Tensor style_std, float? threshold, float eps) "
    "-> (Tensor y, Tensor style, Tensor mean, Tensor std)",
    rust=_style_rust,
    torch_ops=_style_torch,
    fake=_style_fake,
    setup_context=_style_context,
    backward=_style_backward,
)


# --- ema_update_ ------------------------------------------------------------------------------------------------------


def _ema_rust(tensors: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    dense = all(t.is_contiguous() for t in tensors) and all(v.is_contiguous() for v in values)
    if dense and _native.ema_update([view(t) for t in tensors], [view(v) for v in values], momentum, threads()):
        return
    # Tensors that share memory, or are listed twice, are updated one after the other, as the loop in torch does.
    for tensor, value in zip(tensors, values, strict=True):
        target = tensor.contiguous()
        source = value.clone(memory_format=torch.contiguous_format)
        _native.ema_update([view(target)], [view(source)], momentum, threads())
        if target is not tensor:
            tensor.copy_(target)


def _ema_torch(tensors: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        wide = _compute_dtype(tensor)
        tensor.copy_((1.0 - momentum) * tensor.to(wide) + momentum * value.to(wide))


ema_update_ = define(
    "ema_update_(Tensor(a!)[] tensors, Tensor[] values, float momentum) -> ()",
    rust=_ema_rust,
    torch_ops=_ema_torch,
    fake=_nothing_fake,
    mutates=(0,),
)
