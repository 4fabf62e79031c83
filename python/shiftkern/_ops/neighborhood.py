"""Operators of attention over windows of a grid: queries, keys and values are ``(B, H, Y, X, D)``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._crossing import optional_view, threads, view
from shiftkern._library import define


def _wide(x: Tensor) -> torch.dtype:
    """The type that is computed in, which log-sum-exps have."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=64)
def _axis(size: int, kernel: int, dilation: int, clamp: bool) -> list[tuple[list[int], list[bool], list[int]]]:
    """For each place in a window: the key of every point, whether there is one, and its relative position's index."""
    radius = kernel // 2
    places = []
    # Places that are outside the grid for every point are left out.
    for place in range(max(radius - size, 0), min(radius + size + 1, kernel)):
        keys, exist, relative = [], [], []
        for point in range(size):
            offset = place - radius
            if clamp:
                # Steps that the window lacks on one side are taken on the other.
                before, after = point // dilation, (size - 1 - point) // dilation
                offset += max(radius - before, 0) - max(radius - after, 0)
            key = point + offset * dilation
            exist.append(0 <= key < size)
            keys.append(min(max(key, 0), size - 1))
            relative.append(offset + kernel - 1)
        places.append((keys, exist, relative))
    return places


class _Windows:
    """Keys of all windows, place by place."""

    def __init__(self, q: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], clamp: bool) -> None:
        self.device = q.device
        self.shape = q.shape
        self.axes = [
            _axis(size, *options, clamp) for size, *options in zip(q.shape[2:4], kernel, dilation, strict=True)
        ]

    def _table(self, y: list[Any], x: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.tensor(y, device=self.device).unsqueeze(1), torch.tensor(x, device=self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
        """Flat index of the keys, whether they exist, and the index of their relative positions."""
        for (y, y_exists, y_relative), (x, x_exists, x_relative) in (
            (row, column) for row in self.axes[0] for column in self.axes[1]
        ):
            rows, columns = self._table(y, x)
            exist = torch.logical_and(*self._table(y_exists, x_exists))
            yield (rows * self.shape[3] + columns).flatten(), exist, self._table(y_relative, x_relative)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """One key per point, from a tensor of grids."""
        return x.flatten(2, 3).index_select(2, index).view(self.shape)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, windows: _Windows, scale: float) -> Tensor:
    """``(B, H, Y, X, keys)``; minus infinity where there is no key."""
    scores = []
    for index, exist, (row, column) in windows:
        score = (q * windows.take(k, index)).sum(-1) * scale
        if bias is not None:
            score = score + bias[:, row, column]
        scores.append(score.masked_fill(~exist, -torch.inf))
    return torch.stack(scores, -1)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=_wide(q))


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    step_y: int,
    step_x: int,
    clamp: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if q.shape[:-1].numel() == 0:
        return _fake(q)
    windows = _Windows(q, (rows, columns), (step_y, step_x), clamp)
    q_wide, k_wide, v_wide = (t.to(_wide(q)) for t in (q, k, v))
    bias_wide = None if bias is None else bias.to(_wide(q))
    scores = _scores(q_wide, k_wide, bias_wide, windows, scale)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = torch.zeros_like(q_wide, memory_format=torch.contiguous_format)
    for place, (index, exist, _) in enumerate(windows):
        value = windows.take(v_wide, index).masked_fill(~exist.unsqueeze(-1), 0.0)
        out += p[..., place, None] * value
    return out.to(q.dtype), lse


def _options(
    q: Tensor, rows: int, columns: int, step_y: int, step_x: int, clamp: bool, scale: float
) -> tuple[tuple[int, int, tuple[int, int], int], tuple[tuple[int, int], tuple[int, int], bool, float]]:
    batch, heads, y, x, depth = q.shape
    return (batch, heads, (y, x), depth), ((rows, columns), (step_y, step_x), clamp, scale)


def _rust(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    step_y: int,
    step_x: int,
    clamp: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0:
        return _torch(q, k, v, bias, rows, columns, step_y, step_x, clamp, scale)
    out, lse = _fake(q)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    bias = None if bias is None else bias.contiguous()
    inputs = view(q), view(k), view(v), optional_view(bias)
    _native.neighborhood(
        inputs, _options(q, rows, columns, step_y, step_x, clamp, scale), view(out), view(lse), threads()
    )
    return out, lse


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    none: tuple[Tensor | None, ...] = (None,) * 10
    if grad_out is None and grad_lse is None:
        return none
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = neighborhood_backward(grad_out, grad_lse, *inputs, out, lse, *ctx.options)
    return (*grads[:3], None if inputs[3] is None else grads[3], *none[4:])


_OPTIONS = "int rows, int columns, int step_y, int step_x, bool clamp, float scale"

neighborhood = define(
    f"neighborhood(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    rust=_rust,
    torch_ops=_torch,
    fake=_fake,
    setup_context=_context,
    backward=_gradient,
)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (t.new_empty(t.shape) for t in (q, k, v))
    return q_grad, k_grad, v_grad, q.new_empty((0,) if bias is None else bias.shape)


def _backward_rust(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rows: int,
    columns: int,
    step_y: int,
    step_x: int,
    clamp: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _backward_fake(grad_out, grad_lse, q, k, v, bias)
    if q.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_out, q, k, v, out, lse = (t.contiguous() for t in (grad_out, q, k, v, out, lse))
    grad_lse, bias = (None if t is None else t.contiguous() for t in (grad_lse, bias))
    q_grad, k_grad, v_grad, bias_grad = grads
    _native.neighborhood_backward(
        (view(q), view(k), view(v), optional_view(bias)),
        _options(q, rows, columns, step_y, step_x, clamp, scale),
        (view(out), view(lse)),
        (view(grad_out), optional_view(grad_lse)),
        (view(q_grad), view(k_grad), view(v_grad), None if bias is None else view(bias_grad)),
        threads(),
    )
    return grads


def _backward_torch(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rows: int,
    columns: int,
    step_y: int,
    step_x: int,
    clamp: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        q_grad, k_grad, v_grad, bias_grad = _backward_fake(grad_out, grad_lse, q, k, v, bias)
        return q_grad, k_grad, v_grad, bias_grad.zero_()
    windows = _Windows(q, (rows, columns), (step_y, step_x), clamp)
    g, q_wide, k_wide, v_wide, o = (t.to(_wide(q)) for t in (grad_out, q, k, v, out))
    bias_wide = None if bias is None else bias.to(_wide(q))
    delta = (g * o).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    shift = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
    p = (_scores(q_wide, k_wide, bias_wide, windows, scale) - shift).exp()
    by_q, by_k, by_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q_wide, k_wide, v_wide))
    by_bias = q_wide.new_zeros((0,) if bias is None else bias.shape)
    for place, (index, exist, (row, column)) in enumerate(windows):
        weight = p[..., place]
        ds = weight * ((g * windows.take(v_wide, index)).sum(-1) - delta)
        # Where there is no key, a number that is not finite must not come back as 0 * NaN.
        ds = ds.masked_fill(~exist, 0.0)
        key = windows.take(k_wide, index).masked_fill(~exist.unsqueeze(-1), 0.0)
        by_q += ds.unsqueeze(-1) * key * scale
        to_key = (ds.unsqueeze(-1) * q_wide * scale).masked_fill(~exist.unsqueeze(-1), 0.0)
        to_value = (weight.unsqueeze(-1) * g).masked_fill(~exist.unsqueeze(-1), 0.0)
        by_k.flatten(2, 3).index_add_(2, index, to_key.flatten(2, 3))
        by_v.flatten(2, 3).index_add_(2, index, to_value.flatten(2, 3))
        if bias is not None:
            at = (row * bias.shape[2] + column).flatten()
            by_bias.view(bias.shape[0], -1).index_add_(1, at, ds.sum(0).flatten(1))
    by_q, by_k, by_v, by_bias = (t.to(q.dtype) for t in (by_q, by_k, by_v, by_bias))
    return by_q, by_k, by_v, by_bias


neighborhood_backward = define(
    "neighborhood_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    rust=_backward_rust,
    torch_ops=_backward_torch,
    fake=_backward_fake,
)
