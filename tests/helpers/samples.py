"""Arguments for every registered operator; ``tests/operators`` fails when one is missing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shiftkern._ops import norm as ops
from shiftkern._ops import ot, sort, tta

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


_EXACT = ("exact", 0.0)
_METRICS = ("sqeuclidean", "euclidean", "cosine")


def _weights(rows: int, size: int, seed: int, empty: bool = False) -> Tensor:
    weights = make((rows, size), torch.float64, seed).softmax(1)
    if empty:
        weights[0, 1] = 0.0
    return weights / weights.sum(1, keepdim=True)


def _solver(
    rows: tuple[str, float] = _EXACT,
    columns: tuple[str, float] = _EXACT,
    max_iter: int = 5,
    reg_init: float | None = None,
    omega: float = 1.0,
    mass: float | None = None,
    order: str = "fg",
    scaling: bool = False,
) -> Arguments:
    return max_iter, reg_init, 0.5, omega, *rows, *columns, mass, order, scaling


def _solvers() -> list[Arguments]:
    return [
        _solver(),
        _solver(("kl", 0.7), ("kl", 2.0)),
        _solver(("tv", 0.4), _EXACT),
        _solver(("at_most", 0.0), ("at_most", 0.0), mass=0.6),
        _solver(order="gf", reg_init=4.0),
        _solver(omega=1.4, scaling=True),
    ]


def _sinkhorn() -> list[Arguments]:
    out: list[Arguments] = []
    layouts = ("contiguous", "sliced", "transposed")
    reg = torch.tensor([0.5, 0.8, 1.3], dtype=torch.float64)
    for i, solver in enumerate(_solvers()):
        for dtype in (torch.float32, torch.float64):
            # Costs of a few reg: the dtype of the costs bounds what the potentials are good for.
            M = lay_out(make((3, 5, 4), dtype, i).square() / 4, layouts[i % 3])
            a, b = _weights(3, 5, 1, empty=i % 2 == 0), _weights(3, 4, 2)
            start = (make((3, 5), torch.float64, 3), make((3, 4), torch.float64, 4)) if i % 2 else (None, None)
            out.append((M, a, b, reg, torch.full_like(reg, 1e-3 if i == 0 else 0.0), *start, *solver))
    M, tol = make((2, 4, 3), torch.float64).square(), torch.zeros(2, dtype=torch.float64)
    M[0, 1, 2] = torch.inf
    for solver in (_solver(), _solver(("kl", 0.7), _EXACT)):
        a, b = _weights(2, 4, 5), _weights(2, 3, 6)
        out.append((_grads(M), _grads(a), _grads(b), reg[:2], tol, None, None, *solver))
    return out


def _points(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    return make((6, 3), dtype, seed), lay_out(make((5, 3), dtype, seed + 1), "sliced")


def _sinkhorn_samples() -> list[Arguments]:
    reg = torch.tensor([0.9], dtype=torch.float64)
    return [
        (*_points(dtype), metric, _weights(1, 6, 1, empty=True), _weights(1, 5, 2), reg, 0 * reg, None, None, *solver)
        for dtype in (torch.float32, torch.float64)
        for metric, solver in zip(_METRICS, _solvers(), strict=False)
    ]


def _potentials(batch: int, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    f, g = make((batch, n), dtype, 3), make((batch, m), dtype, 4)
    f[0, 1] = -torch.inf
    return f, g, torch.linspace(0.6, 1.1, batch, dtype=torch.float64)


def _transported() -> list[Arguments]:
    out = []
    for i, layout in enumerate(("contiguous", "sliced", "transposed")):
        for dtype in (torch.float32, torch.float64):
            M = make((2, 5, 4), dtype, i).square()
            M[1, 2, 3] = torch.inf
            M = lay_out(M, layout)
            out.append((M, *_potentials(2, 5, 4, dtype)))
    return out


def _plans() -> list[Arguments]:
    M, f, g, reg = _transported()[1]
    return [*_transported(), (_grads(M), _grads(f), _grads(g), reg)]


def _applied() -> list[Arguments]:
    out: list[Arguments] = []
    for i, (M, *rest) in enumerate(_transported()):
        transposed = i % 2 == 1
        V = make((2, 5 if transposed else 4, 3), M.dtype, 7)
        out += [(M, *rest, V, transposed), (M, *rest, lay_out(V, "transposed").requires_grad_(), transposed)]
    return out


def _samples_transported() -> list[Arguments]:
    return [
        (*_points(dtype), metric, *_potentials(1, 6, 5, dtype))
        for dtype in (torch.float32, torch.float64)
        for metric in _METRICS
    ]


def _samples_applied() -> list[Arguments]:
    out = []
    for i, arguments in enumerate(_samples_transported()):
        V = make((5, 4), arguments[0].dtype, 7)
        out.append((*arguments, V.requires_grad_(i % 2 == 0), arguments[2] == "euclidean"))
    return out


def _assign() -> list[Arguments]:
    return [
        (lay_out(make((7, 4), dtype, i), layout), 0.3, 1 + 2 * i)
        for i, layout in enumerate(("contiguous", "sliced", "transposed"))
        for dtype in (torch.float32, torch.float64)
    ]


def _half_steps() -> list[Arguments]:
    return [
        (M[0], _weights(1, 5, 1)[0], _weights(1, 4, 2)[0], f[1].double(), g[1].double(), 0.7)
        for M, f, g, _ in _transported()
    ]


def _matrices() -> list[Tensor]:
    return [
        make((3, 8), torch.float64, 1),
        lay_out(make((2, 5), torch.float32, 2), "transposed"),
        lay_out(make((4, 6), torch.float64, 3), "sliced"),
        make((2, 1)),
        make((0, 3)),
        make((3, 0)),
        _grads(make((2, 7), torch.float64, 4)),
    ]


def _soft_order() -> list[Arguments]:
    options = [(ranks, kl, 0.7, ranks == kl) for ranks in (False, True) for kl in (False, True)]
    return [(x, *option) for x in _matrices() for option in options]


def _soft_order_backward() -> list[Arguments]:
    out = []
    for x, *options in _soft_order():
        x = x.detach()
        _, order, first = sort._order_torch(x, *options)
        out.append((make(tuple(x.shape), x.dtype, 5), x, order, first, *options))
    return out


def _diffsort() -> list[Arguments]:
    distributions = [
        ("cauchy", 2.0, False),
        ("reciprocal", 3.0, True),
        ("optimal", 0.5, False),
        ("logistic", 1.5, True),
    ]
    networks = ("bitonic", "odd_even")
    return [
        (x, networks[(i + j) % 2], *options)
        for i, x in enumerate(_matrices())
        for j, options in enumerate(distributions)
    ]


def _diffsort_backward() -> list[Arguments]:
    out = []
    for i, (x, *options) in enumerate(_diffsort()):
        x = x.detach()
        grad_p = make((*x.shape, x.shape[1]), x.dtype, 6) if i % 3 else None
        out.append((make(tuple(x.shape), x.dtype, 5), grad_p, x, *options))
    return out


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
    "soft_order": _soft_order,
    "soft_order_backward": _soft_order_backward,
    "diffsort": _diffsort,
    "diffsort_backward": _diffsort_backward,
    "sinkhorn": _sinkhorn,
    "sinkhorn_samples": _sinkhorn_samples,
    "transport_plan": _plans,
    "transport_sums": _transported,
    "samples_sums": _samples_transported,
    "transport_apply": _applied,
    "samples_apply": _samples_applied,
    "sinkhorn_assign": _assign,
    "sinkhorn_half_step": _half_steps,
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
    "soft_order": (sort._order_rust, sort._order_torch),
    "soft_order_backward": (sort._order_backward_rust, sort._order_backward_torch),
    "diffsort": (sort._diffsort_rust, sort._diffsort_torch),
    "diffsort_backward": (sort._diffsort_backward_rust, sort._diffsort_backward_torch),
    "sinkhorn": (ot._sinkhorn_rust, ot._sinkhorn_torch),
    "sinkhorn_samples": (ot._samples_rust, ot._samples_torch),
    "transport_plan": (ot._plan_rust, ot._plan_torch),
    "transport_sums": (ot._sums_rust, ot._sums_torch),
    "samples_sums": (ot._samples_sums_rust, ot._samples_sums_torch),
    "transport_apply": (ot._apply_rust, ot._apply_torch),
    "samples_apply": (ot._samples_apply_rust, ot._samples_apply_torch),
    "sinkhorn_assign": (ot._assign_rust, ot._assign_torch),
    "sinkhorn_half_step": (ot._half_step_rust, ot._half_step_torch),
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
