"""Arguments for every registered operator; ``tests/operators`` fails when one is missing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shiftkern._ops import norm as ops
from shiftkern._ops import tta

from helpers.strategies import affine, lay_out, make

Arguments = tuple[Any, ...]

#: (shape, dtype, layout, dim)
_INPUTS = [
    ((4, 3, 5), torch.float32, "contiguous"),
    ((2, 5, 4, 3), torch.float64, "channels_last"),
    ((3, 2, 3, 3), torch.float32, "sliced"),
    ((6, 4), torch.bfloat16, "contiguous"),
    ((2, 3, 4), torch.float16, "transposed"),
    ((1, 3, 2), torch.float64, "expanded"),
    ((0, 3, 4), torch.float32, "contiguous"),
    ((2, 3, 0), torch.float32, "contiguous"),
]


def inputs() -> list[Tensor]:
    return [lay_out(make(shape, dtype, i), layout) for i, (shape, dtype, layout) in enumerate(_INPUTS)]


def _grads(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _coefficients(x: Tensor, rows: int | None, number: int) -> list[Tensor]:
    shape = (x.shape[1],) if rows is None else (rows, x.shape[1])
    return [make(shape, torch.float64, seed) for seed in range(number)]


def _with_coefficients(number: int, gradient: bool) -> list[Arguments]:
    out = []
    for i, x in enumerate(inputs()):
        coefficients = _coefficients(x, x.shape[0] if i % 2 else None, number)
        g = [torch.randn_like(x)] if gradient else []
        out.append((*g, x, *coefficients, 1))
    return out


def _moments() -> list[Arguments]:
    out: list[Arguments] = []
    for x in inputs():
        mask = make((x.shape[0], *x.shape[2:]), torch.float64, 5) > 0
        out += [(x, None, 1, False), (x, mask, 1, True)]
    out.append((_grads(make((3, 4, 5), torch.float64)), None, 2, True))
    out.append((_grads(make((3, 4), torch.float32)), torch.tensor([True, False, True]), 1, False))
    return out


def _mixed() -> list[Arguments]:
    out = []
    for i, x in enumerate(inputs()):
        mean, var, weight, bias = affine(x.shape[1])
        out.append((x, mean, var, weight if i % 2 else None, bias if i % 3 else None, 0.3, 1e-5, False))
    x = make((4, 3, 5), torch.float64)
    out.append((_grads(x), *map(_grads, affine(3, torch.float64)), 0.6, 1e-3, True))
    out.append((lay_out(make((2, 3, 4, 5)), "channels_last").requires_grad_(), *affine(3), 1.0, 1e-5, False))
    return out


def _mixed_in_place() -> list[Arguments]:
    expanded = 5  # writing to that input is refused
    return [arguments for i, arguments in enumerate(_mixed()[: len(_INPUTS)]) if i != expanded]


def _mixed_out() -> list[Arguments]:
    out = []
    for i, arguments in enumerate(_mixed()[: len(_INPUTS)]):
        x = arguments[0]
        out.append((*arguments, torch.empty_like(x) if i % 2 else x.new_empty(x.shape)))
    return out


def _unmix() -> list[Arguments]:
    out = []
    for i, x in enumerate(inputs()):
        components = [make((4, x.shape[1]), torch.float32, 7), make((4, x.shape[1]), torch.float32, 8).square() + 0.1]
        _, _, weight, bias = affine(x.shape[1])
        out.append((x, *components, weight if i % 2 else None, bias if i % 3 else None, 0.07, 1e-5, i % 2 == 0))
    x = _grads(make((4, 3, 5), torch.float64))
    weight, bias = map(_grads, affine(3, torch.float64)[2:])
    out.append((x, make((2, 3), seed=1), make((2, 3), seed=2).square() + 0.1, weight, bias, 0.5, 1e-5, True))
    return out


def _unmix_update() -> list[Arguments]:
    p = make((5, 3), torch.float64).softmax(1)
    own = make((5, 4), torch.float64)
    return [
        (make((3, 4), dtype), own, p, 0.1) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ] + [(make((4, 3)).T, own, p, 0.5), (make((3, 4)), own[:0], p[:0], 0.5)]


def _style() -> list[Arguments]:
    out = []
    for i, x in enumerate(inputs()):
        styles = make((2, x.shape[1]), seed=3), make((2, x.shape[1]), seed=4).square() + 0.2
        out.append((x, *styles, None if i % 2 else 1.0, 1e-5))
    x, mean, std = (_grads(make(s, torch.float64, i, mean=2)) for i, s in enumerate([(4, 3, 5), (2, 3), (2, 3)]))
    out.append((x, mean, std, 4.0, 1e-5))
    return out


def _ema() -> list[Arguments]:
    shapes = [(3,), (2, 5), (), (0,), (2, 3, 4)]
    return [
        ([make(s, d, 1) for s in shapes], [make(s, d, 2) for s in shapes], 0.3)
        for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ] + [([make((4, 3)).T, make((2, 2), torch.float64)], [make((3, 4)), make((2, 2), torch.float64)], 0.1)]


def _lame() -> list[Arguments]:
    features = make((12, 5), seed=9)
    # Without a tolerance the report holds no NaN, which opcheck cannot compare.
    return [
        (make((12, 3), dtype).softmax(1), features.to(dtype), affinity, 3, 0.5, 3, 0.0)
        for dtype in (torch.float32, torch.float64)
        for affinity in ("knn", "rbf", "linear")
    ]


SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "channel_moments": _moments,
    "channel_affine": lambda: _with_coefficients(3, gradient=False),
    "channel_dot": lambda: _with_coefficients(1, gradient=True),
    "channel_combine": lambda: _with_coefficients(4, gradient=True),
    "mixed_batch_norm": _mixed,
    "mixed_batch_norm_": _mixed_in_place,
    "mixed_batch_norm_out": _mixed_out,
    "unmix_norm": _unmix,
    "unmix_update_": _unmix_update,
    "style_shift": _style,
    "ema_update_": _ema,
    "lame": _lame,
}

#: The implementation in Rust and the one in torch operations.
PATHS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "channel_moments": (ops._moments_rust, ops._moments_torch),
    "channel_affine": (ops._affine_rust, ops._affine_torch),
    "channel_dot": (ops._dot_rust, ops._dot_torch),
    "channel_combine": (ops._combine_rust, ops._combine_torch),
    "mixed_batch_norm": (ops._mixed_rust, ops._mixed_torch),
    "mixed_batch_norm_": (ops._mixed_inplace_rust, ops._mixed_inplace_torch),
    "mixed_batch_norm_out": (ops._mixed_out_rust, ops._mixed_out_torch),
    "unmix_norm": (ops._unmix_rust, ops._unmix_torch),
    "unmix_update_": (ops._update_rust, ops._update_torch),
    "style_shift": (ops._style_rust, ops._style_torch),
    "ema_update_": (ops._ema_rust, ops._ema_torch),
    "lame": (tta._lame_rust, tta._lame_torch),
}


def detached(arguments: Arguments) -> Arguments:
    """Independent copies in the same memory layouts, without gradients."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        # An expanded tensor is repeated, not copied element by element.
        if any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)):
            return value.detach().clone()
        return fresh.copy_(value.detach())

    return tuple(copy(value) for value in arguments)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []
