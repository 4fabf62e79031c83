"""Operators that mix neighbouring tokens: sequences are ``(B, H, N, D)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._crossing import optional_view, threads, view
from shiftkern._library import define


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x: Tensor, last: Tensor | None, mix: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    batch, heads, tokens, depth = x.shape
    return batch, heads, tokens, depth


def _rust(x: Tensor, last: Tensor | None, mix: Tensor) -> Tensor:
    y = _fake(x, last, mix)
    if x.numel() > 0:
        x, mix = x.contiguous(), mix.contiguous()
        last = None if last is None else last.contiguous()
        _native.token_shift((view(x), optional_view(last), view(mix)), _sizes(x), view(y), threads())
    return y


def _before(x: Tensor, last: Tensor | None) -> Tensor:
    """The token before each, ``last`` or zeros before the first."""
    first = torch.zeros_like(x[:, :, :1]) if last is None else last.unsqueeze(2)
    return torch.cat([first, x], 2)[:, :, :-1]


def _coefficients(mix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = mix.to(dtype).view(-1, 2, 1, 1).unbind(1)
    return a, b


def _torch(x: Tensor, last: Tensor | None, mix: Tensor) -> Tensor:
    wide = x.to(_wide(x))
    a, b = _coefficients(mix, wide.dtype)
    y = a * wide + b * _before(wide, None if last is None else last.to(wide.dtype))
    return y.to(x.dtype).contiguous()


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, last, mix = ctx.saved_tensors
    by_x, by_last, by_mix = token_shift_backward(grad, x, last, mix)
    return by_x, None if last is None else by_last, by_mix


token_shift = define(
    "token_shift(Tensor x, Tensor? last, Tensor mix) -> Tensor",
    rust=_rust,
    torch_ops=_torch,
    fake=_fake,
    setup_context=_context,
    backward=_gradient,
)


def _backward_fake(grad: Tensor, x: Tensor, last: Tensor | None, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if last is None else last.shape), mix.new_empty(mix.shape)


def _backward_rust(grad: Tensor, x: Tensor, last: Tensor | None, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_last, by_mix = _backward_fake(grad, x, last, mix)
    if x.numel() == 0:
        return by_x, by_last.zero_(), by_mix.zero_()
    grad, x, mix = grad.contiguous(), x.contiguous(), mix.contiguous()
    last = None if last is None else last.contiguous()
    _native.token_shift_backward(
        view(grad),
        (view(x), optional_view(last), view(mix)),
        _sizes(x),
        (view(by_x), None if last is None else view(by_last), view(by_mix)),
        threads(),
    )
    return by_x, by_last, by_mix


def _backward_torch(grad: Tensor, x: Tensor, last: Tensor | None, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_last, by_mix = _backward_fake(grad, x, last, mix)
    if x.numel() == 0:
        return by_x, by_last.zero_(), by_mix.zero_()
    g, wide = grad.to(_wide(x)), x.to(_wide(x))
    a, b = _coefficients(mix, wide.dtype)
    after = torch.cat([g[:, :, 1:], torch.zeros_like(g[:, :, :1])], 2)
    by_x = (a * g + b * after).to(x.dtype).contiguous()
    if last is not None:
        by_last = (b * g[:, :, :1]).squeeze(2).to(x.dtype).contiguous()
        last = last.to(wide.dtype)
    sums = [(g * t).sum((0, 2, 3), dtype=torch.float64) for t in (wide, _before(wide, last))]
    return by_x, by_last, torch.stack(sums, 1).to(mix.dtype)


token_shift_backward = define(
    "token_shift_backward(Tensor grad, Tensor x, Tensor? last, Tensor mix) "
    "-> (Tensor grad_x, Tensor grad_last, Tensor grad_mix)",
    rust=_backward_rust,
    torch_ops=_backward_torch,
    fake=_backward_fake,
)
