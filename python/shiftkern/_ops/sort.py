"""Operators of the ``sort`` domain: all take matrices, one problem per row."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._checks import refuse
from shiftkern._crossing import optional_view, threads, view
from shiftkern._library import define

_WIDE = torch.float64


def _check_finite(op: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        refuse(op, "x", "finite values", "others")


# --- soft_order -------------------------------------------------------------------------------------------------------
#
# Ranks and values by isotonic regression: y, the order of the values, and for each place in it the first of its pool.
# The torch path pools all violators at once and starts over; the Rust path goes from left to right.


def _order_fake(x: Tensor, ranks: bool, kl: bool, strength: float, descending: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, x.new_empty(x.shape, dtype=torch.int64), x.new_empty(x.shape, dtype=torch.int64)


def _order_rust(x: Tensor, ranks: bool, kl: bool, strength: float, descending: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, order, first = _order_fake(x, ranks, kl, strength, descending)
    if x.numel() > 0:
        x = x.contiguous()
        options = ranks, kl, strength, descending
        _native.soft_order(view(x), x.shape[1], options, view(y), view(order), view(first), threads())
    return y, order, first


def _sign(ranks: bool, descending: bool) -> float:
    return -1.0 if ranks == descending else 1.0


def _per_pool(values: Tensor, first: Tensor) -> Tensor:
    """Sum over each pool, at each of its places."""
    return torch.zeros_like(values).scatter_add_(1, first, values).gather(1, first)


def _weights(first: Tensor, size: Tensor) -> Tensor:
    """Sum of the hard ranks of each pool."""
    return 0.5 * size * (2 * (first.shape[1] - first) + 1 - size)


def _order_torch(x: Tensor, ranks: bool, kl: bool, strength: float, descending: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _order_fake(x, ranks, kl, strength, descending)
    _check_finite("soft_rank" if ranks else "soft_sort", x)
    n, sign, scale = x.shape[1], _sign(ranks, descending), strength if ranks else 1.0
    s, order = (sign * x.to(_WIDE)).sort(dim=1, descending=True, stable=True)
    place = torch.arange(n, device=x.device).expand_as(order)
    starts = torch.ones_like(order, dtype=torch.bool)
    while True:
        first = torch.where(starts, place, 0).cummax(1).values
        top, size = s.gather(1, first), _per_pool(torch.ones_like(s), first)
        mass = _per_pool(((s - top) / scale).exp() if kl else s - top, first)
        if not kl:
            level = mass / size
        elif ranks:
            level = (mass / _weights(first, size)).log()
        else:
            level = (mass * math.expm1(-1.0 / strength) / (-size / strength).expm1()).log()
        fall = top[:, :-1] - top[:, 1:], level[:, :-1] - level[:, 1:]
        steps = size[:, :-1] if kl else 0.5 * (size[:, :-1] + size[:, 1:])
        if not ranks:
            violates = steps / strength <= fall[0] + fall[1]
        elif kl:
            violates = fall[0] / strength + fall[1] <= 0
        else:
            violates = fall[0] + fall[1] <= strength * steps
        violates &= starts[:, 1:]
        if not bool(violates.any()):
            break
        starts[:, 1:] &= ~violates
    if ranks and kl:
        y = ((s - top) / strength).exp() * _weights(first, size) / mass
    elif ranks:
        y = (s - top - level) / strength + (n - first) - 0.5 * (size - 1)
    else:
        centre = 0.0 if kl else 0.5 * (size - 1)
        y = sign * ((centre - (place - first).to(_WIDE)) / strength + level + top)
    if ranks:
        y = torch.empty_like(y).scatter_(1, order, y)
    return y.to(x.dtype), order, first


def _order_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = inputs[1:]


def _order_gradient(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad = None if g is None else soft_order_backward(g, *ctx.saved_tensors, *ctx.options)
    return (grad, None, None, None, None)


soft_order = define(
    "soft_order(Tensor x, bool ranks, bool kl, float strength, bool descending) "
    "-> (Tensor y, Tensor order, Tensor first)",
    rust=_order_rust,
    torch_ops=_order_torch,
    fake=_order_fake,
    setup_context=_order_context,
    backward=_order_gradient,
)


def _order_backward_fake(grad_y: Tensor, x: Tensor, order: Tensor, first: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _order_backward_rust(
    grad_y: Tensor,
    x: Tensor,
    order: Tensor,
    first: Tensor,
    ranks: bool,
    kl: bool,
    strength: float,
    descending: bool,
) -> Tensor:
    grad = _order_backward_fake(grad_y, x, order, first)
    if x.numel() > 0:
        grad_y, x, order, first = (t.contiguous() for t in (grad_y, x, order, first))
        options = ranks, kl, strength, descending
        _native.soft_order_backward(
            view(grad_y), view(x), view(order), view(first), x.shape[1], options, view(grad), threads()
        )
    return grad


def _order_backward_torch(
    grad_y: Tensor,
    x: Tensor,
    order: Tensor,
    first: Tensor,
    ranks: bool,
    kl: bool,
    strength: float,
    descending: bool,
) -> Tensor:
    if x.numel() == 0:
        return _order_backward_fake(grad_y, x, order, first)
    sign, g = _sign(ranks, descending), grad_y.to(_WIDE)
    s = sign * x.to(_WIDE).gather(1, order)
    size = _per_pool(torch.ones_like(s), first)
    share = 1.0 / size
    if kl:
        share = ((s - s.gather(1, first)) / (strength if ranks else 1.0)).exp()
        share = share / _per_pool(share, first)
    if ranks:
        g = g.gather(1, order) * (share * _weights(first, size) if kl else 1.0)
        g = (g - share * _per_pool(g, first)) * sign / strength
    else:
        g = share * _per_pool(g, first)
    return torch.empty_like(g).scatter_(1, order, g).to(x.dtype)


soft_order_backward = define(
    "soft_order_backward(Tensor grad_y, Tensor x, Tensor order, Tensor first, bool ranks, bool kl, float strength, "
    "bool descending) -> Tensor",
    rust=_order_backward_rust,
    torch_ops=_order_backward_torch,
    fake=_order_backward_fake,
)


# --- diffsort ---------------------------------------------------------------------------------------------------------


def _diffsort_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape, x.shape[1]))


def _diffsort_rust(
    x: Tensor, network: str, distribution: str, steepness: float, error_free: bool
) -> tuple[Tensor, Tensor]:
    y, p = _diffsort_fake(x)
    if x.numel() > 0:
        x = x.contiguous()
        options = network, distribution, steepness, error_free
        _native.network_sort(view(x), x.shape[1], options, view(y), view(p), threads())
    return y, p


@functools.lru_cache(maxsize=32)
def _network(network: str, n: int) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Stages of (row of the smaller output, row of the larger one), and the row where each place ends up."""
    if network == "odd_even":
        return [[(i, i + 1) for i in range(stage % 2, n - 1, 2)] for stage in range(n)], list(range(n))
    blocks = (n - 1).bit_length()
    # Rows from n on hold infinities, which move for certain and take nothing with them.
    row: list[int] = list(range(1 << blocks))
    stages = []
    for block in range(1, blocks + 1):
        for bit in reversed(range(block)):
            stage = []
            for i in range(len(row)):
                if i >> bit & 1 == 0:
                    ends = i, i + (1 << bit)
                    low, high = ends if i >> block & 1 == 0 else ends[::-1]
                    if row[low] < n and row[high] < n:
                        stage.append((row[low], row[high]))
                    elif row[low] >= n:
                        row[low], row[high] = row[high], row[low]
            stages.append(stage)
    return stages, row[:n]


def _cumulative(v: Tensor, distribution: str) -> Tensor:
    if distribution == "cauchy":
        return v.atan() / math.pi + 0.5
    if distribution == "reciprocal":
        return 0.5 * (v / (2.0 + v.abs()) + 1.0)
    if distribution == "logistic":
        return v.sigmoid()
    tail = 0.0625 / v
    return torch.where(v > 0.25, 1.0 - tail, torch.where(v < -0.25, -tail, v + 0.5))


def _density(v: Tensor, distribution: str) -> Tensor:
    if distribution == "cauchy":
        return 1.0 / (math.pi * (1.0 + v.square()))
    if distribution == "reciprocal":
        return (2.0 + v.abs()).square().reciprocal()
    if distribution == "logistic":
        return v.sigmoid() * (-v).sigmoid()
    return torch.where(v.abs() > 0.25, 0.0625 / v.square(), 1.0)


def _argument(difference: Tensor, steepness: float) -> Tensor:
    """What a comparator's function is taken of; finite, as a quotient of infinities would be NaN."""
    most = torch.finfo(_WIDE).max
    return (steepness * difference).clamp(-most, most)


def _mixed(state: Tensor, low: Tensor, high: Tensor, alpha: Tensor) -> Tensor:
    """The rows of ``state (B, n, m)`` after one stage's comparators."""
    a, b, rest = state[:, low], state[:, high], (1.0 - alpha).to(state.dtype).unsqueeze(2)
    alpha = alpha.to(state.dtype).unsqueeze(2)
    state = state.index_copy(1, low, alpha * a + rest * b)
    return state.index_copy_(1, high, rest * a + alpha * b)


def _run_network(
    x: Tensor, network: str, distribution: str, steepness: float, error_free: bool
) -> tuple[Tensor, Tensor, list[tuple[Any, ...]], Tensor]:
    """Values and matrix by row, what each stage saw, and the row of each place."""
    stages, places = _network(network, x.shape[1])
    values = x.to(_WIDE).unsqueeze(2)
    p = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    trace: list[tuple[Any, ...]] = []
    for stage in stages:
        if stage:
            low, high = torch.tensor(stage, device=x.device).T
            difference = (values[:, high] - values[:, low]).squeeze(2)
            alpha = _cumulative(_argument(difference, steepness), distribution)
            trace.append((low, high, difference, alpha, p))
            applied = (difference >= 0).to(_WIDE) if error_free else alpha
            values, p = _mixed(values, low, high, applied), _mixed(p, low, high, applied)
    return values, p, trace, torch.tensor(places, device=x.device)


def _diffsort_torch(
    x: Tensor, network: str, distribution: str, steepness: float, error_free: bool
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return _diffsort_fake(x)
    _check_finite("diffsort", x)
    values, p, _, places = _run_network(x, network, distribution, steepness, error_free)
    return values[:, places].squeeze(2).to(x.dtype), p[:, places].contiguous()


def _diffsort_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _diffsort_gradient(ctx: Any, grad_y: Tensor | None, grad_p: Tensor | None) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    grad = None
    if grad_y is not None or grad_p is not None:
        grad = diffsort_backward(torch.zeros_like(x) if grad_y is None else grad_y, grad_p, x, *ctx.options)
    return (grad, None, None, None, None)


diffsort = define(
    "diffsort(Tensor x, str network, str distribution, float steepness, bool error_free) -> (Tensor y, Tensor p)",
    rust=_diffsort_rust,
    torch_ops=_diffsort_torch,
    fake=_diffsort_fake,
    setup_context=_diffsort_context,
    backward=_diffsort_gradient,
)


def _diffsort_backward_fake(grad_y: Tensor, grad_p: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _diffsort_backward_rust(
    grad_y: Tensor,
    grad_p: Tensor | None,
    x: Tensor,
    network: str,
    distribution: str,
    steepness: float,
    error_free: bool,
) -> Tensor:
    grad = _diffsort_backward_fake(grad_y, grad_p, x)
    if x.numel() > 0:
        grad_y, x = grad_y.contiguous(), x.contiguous()
        grad_p = None if grad_p is None else grad_p.contiguous()
        options = network, distribution, steepness, error_free
        _native.network_sort_backward(
            view(grad_y), optional_view(grad_p), view(x), x.shape[1], options, view(grad), threads()
        )
    return grad


def _diffsort_backward_torch(
    grad_y: Tensor,
    grad_p: Tensor | None,
    x: Tensor,
    network: str,
    distribution: str,
    steepness: float,
    error_free: bool,
) -> Tensor:
    if x.numel() == 0:
        return _diffsort_backward_fake(grad_y, grad_p, x)
    _, _, trace, places = _run_network(x, network, distribution, steepness, error_free)
    g = torch.empty_like(x, dtype=_WIDE).index_copy_(1, places, grad_y.to(_WIDE)).unsqueeze(2)
    by_matrix = None if grad_p is None else torch.empty_like(grad_p).index_copy_(1, places, grad_p)
    for low, high, difference, alpha, p in reversed(trace):
        by_alpha = (g[:, high] - g[:, low]).squeeze(2) * difference
        if by_matrix is not None:
            by_alpha += ((by_matrix[:, low] - by_matrix[:, high]) * (p[:, low] - p[:, high])).sum(2)
            by_matrix = _mixed(by_matrix, low, high, alpha)
        through = (by_alpha * _density(_argument(difference, steepness), distribution) * steepness).unsqueeze(2)
        g = _mixed(g, low, high, alpha).index_add_(1, low, -through).index_add_(1, high, through)
    return g.squeeze(2).to(x.dtype)


diffsort_backward = define(
    "diffsort_backward(Tensor grad_y, Tensor? grad_p, Tensor x, str network, str distribution, float steepness, "
    "bool error_free) -> Tensor",
    rust=_diffsort_backward_rust,
    torch_ops=_diffsort_backward_torch,
    fake=_diffsort_backward_fake,
)
