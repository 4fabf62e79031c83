"""Arguments for every registered operator; ``tests/operators`` fails when one is missing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shiftkern._ops import attention, merge, neighborhood, ot, rotation, shift, sort, tta
from shiftkern._ops import norm as ops
from shiftkern.attention import BlockMask

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


def _spread(mask: BlockMask, scale: float) -> Arguments:
    """A mask as the operators take it."""
    return mask.indptr, mask.indices, mask.inner, mask.patterns, *mask.block, scale


#: (B, H, groups, N, M, D, Dv), layout of the queries and keys, dtype
_HEADS = [
    ((2, 3, 3, 9, 11, 4, 4), "contiguous", torch.float32),
    ((2, 4, 2, 9, 11, 5, 3), "contiguous", torch.float64),
    ((1, 2, 1, 20, 18, 8, 8), "transposed", torch.float32),
    ((2, 2, 2, 9, 11, 3, 2), "sliced", torch.float64),
    ((2, 2, 2, 9, 11, 4, 4), "channels_last", torch.float16),
    ((2, 2, 2, 9, 11, 4, 4), "offset", torch.bfloat16),
    ((2, 2, 2, 0, 11, 4, 4), "contiguous", torch.float32),
    ((2, 2, 2, 9, 0, 4, 4), "contiguous", torch.float64),
    ((2, 2, 2, 9, 11, 4, 0), "contiguous", torch.float32),
]


def _attention() -> list[tuple[tuple[Tensor, Tensor, Tensor], Arguments]]:
    """Queries, keys and values, and masks with empty rows, full and partial blocks, and maps for batches and heads."""
    out = []
    for i, ((batch, heads, groups, n_q, n_k, width, value_width), layout, dtype) in enumerate(_HEADS):
        q = lay_out(make((batch, heads, n_q, width), dtype, i, mean=0), layout)
        k = lay_out(make((batch, groups, n_k, width), dtype, i + 1, mean=0), layout)
        v = make((batch, groups, n_k, value_width), dtype, i + 2, mean=0)
        kept = make((batch if i % 2 else 1, heads if i % 3 else 1, n_q, n_k), torch.float64, i + 3) > 0
        kept[..., 4:8] = True
        kept[..., :4, 4:8] = False
        kept[:, :, 5:6] = False
        out.append(((q, k, v), _spread(BlockMask.from_bool(kept, (4, 4)), 0.6)))
    return out


def _sparse_attention() -> list[Arguments]:
    samples = [(*tensors, *mask) for tensors, mask in _attention()]
    tensors, mask = _attention()[1]
    return [*samples, (*map(_grads, tensors), *mask)]


def _sparse_attention_backward() -> list[Arguments]:
    out = []
    for i, (tensors, mask) in enumerate(_attention()):
        result, lse = attention._block_sparse_attention_torch(*tensors, *mask)
        grad_lse = make(tuple(lse.shape), lse.dtype, 5) if i % 2 else None
        out.append((make(tuple(result.shape), result.dtype, 4), grad_lse, *tensors, result, lse, *mask))
    return out


def _captures() -> list[Arguments]:
    return [(*tensors, i % 3 != 0, i % 3 != 1, *mask) for i, (tensors, mask) in enumerate(_attention())]


def _steps() -> list[Arguments]:
    out = []
    for i, (tensors, mask) in enumerate(_attention()):
        _, rho, share, _, lse_rest, rest, difference = attention._capture_torch(*tensors, True, True, *mask)
        carried = [(rest, rho + 0.1, share, None), (rest, None, None, lse_rest), (difference, None, None, None)]
        out.append((*tensors, *carried[i % 3], *mask))
    return out


def _states() -> list[tuple[Tensor, Tensor]]:
    """Outputs and log-sum-exps of three parts, some of them without keys."""
    out = []
    for i, (_, _, dtype) in enumerate(_HEADS[:6]):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        lse = make((3, 2, 5, 7), wide, i)
        out.append((make((3, 2, 5, 7, 1 + i), dtype, i + 1), lse.masked_fill(lse < -0.5, -torch.inf)))
    return [*out, (make((1, 0, 4)), make((1, 0))), (make((2, 3, 0)), make((2, 3)))]


def _merge() -> list[Arguments]:
    pairs = [(o[0], lse[0], o[-1], lse[-1]) for o, lse in _states()]
    return [*pairs, tuple(map(_grads, pairs[1])), (lay_out(pairs[0][0], "transposed"), *pairs[0][1:])]


def _merge_many() -> list[Arguments]:
    o, lse = _states()[1]
    return [*_states(), (_grads(o), _grads(lse)), (lay_out(o, "transposed"), lay_out(lse, "transposed"))]


def _merge_backward() -> list[Arguments]:
    out = []
    for i, (o, lse) in enumerate(_states()):
        merged, total = attention._merge_torch(list(o), list(lse))
        grad_lse = make(tuple(total.shape), total.dtype, 5) if i % 2 else None
        out.append((list(o), list(lse), merged, total, make(tuple(merged.shape), merged.dtype, 4), grad_lse))
    return out


#: (shape, kernel, dilation, clamp, dtype, layout)
_WINDOWS = [
    ((2, 2, 4, 5, 3), [3, 3], [1, 1], True, torch.float64, "contiguous"),
    ((1, 2, 7, 6, 8), [5, 3], [1, 2], True, torch.float32, "transposed"),
    ((1, 1, 4, 9, 5), [3, 7], [2, 1], False, torch.float32, "sliced"),
    ((1, 2, 3, 10, 24), [3, 9], [1, 1], True, torch.float64, "contiguous"),
    ((2, 1, 5, 5, 4), [3, 3], [1, 1], False, torch.bfloat16, "contiguous"),
    ((1, 1, 5, 5, 33), [5, 5], [1, 1], True, torch.float16, "contiguous"),
    ((0, 2, 3, 3, 4), [3, 3], [1, 1], True, torch.float32, "contiguous"),
    ((1, 2, 3, 3, 0), [3, 3], [1, 1], True, torch.float32, "contiguous"),
]


def _windows() -> list[Arguments]:
    out = []
    for i, (shape, kernel, dilation, clamp, dtype, layout) in enumerate(_WINDOWS):
        q, k, v = (lay_out(make(shape, dtype, seed, mean=0.0) / 2, layout) for seed in (i, i + 1, i + 2))
        bias = make((shape[1], 2 * kernel[0] - 1, 2 * kernel[1] - 1), dtype, i) if i % 3 else None
        out.append((q, k, v, bias, *kernel, *dilation, clamp, 0.4))
    q, k, v, _, *options = out[3]
    bias = make((2, 5, 17), torch.float64)
    return [*out, (*map(_grads, (q, k, v, bias)), *options)]


def _windows_backward() -> list[Arguments]:
    out = []
    for i, arguments in enumerate(_windows()):
        inputs = [None if t is None else t.detach() for t in arguments[:4]]
        options = arguments[4:]
        results = neighborhood._torch(*inputs, *options)
        grad, grad_lse = (make(tuple(t.shape), t.dtype, 9, mean=0.0) / 4 for t in results)
        out.append((grad, grad_lse if i % 2 else None, *inputs, *results, *options))
    return out


def _token_shift() -> list[Arguments]:
    out: list[Arguments] = []
    for i, (dtype, layout) in enumerate(
        [
            (torch.float32, "contiguous"),
            (torch.float64, "sliced"),
            (torch.bfloat16, "transposed"),
            (torch.float16, "contiguous"),
        ]
    ):
        x = lay_out(make((2, 3, 5, 4), dtype, i), layout)
        out.append((x, make((2, 3, 4), dtype, 7) if i % 2 else None, make((3, 2), torch.float64, 8)))
    x, last, mix = out[1]
    empty = make((2, 3, 0, 4)), make((2, 3, 4)), make((3, 2))
    return [*out, empty, (_grads(x.clone()), _grads(last), _grads(mix))]


def _token_shift_backward() -> list[Arguments]:
    plain = [tuple(None if t is None else t.detach() for t in arguments) for arguments in _token_shift()]
    return [(make(tuple(x.shape), x.dtype, 5), x, *rest) for x, *rest in plain]


def _rows(width: int) -> list[Tensor]:
    shapes = [(5, width), (33, width), (3, width), (40, width)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    layouts = ["contiguous", "sliced", "transposed", "contiguous"]
    found = [
        # Small numbers: sums over the rows are compared to a bound for numbers of about 1.
        lay_out(0.2 * make(shape, dtype, i), layout)
        for i, (shape, dtype, layout) in enumerate(zip(shapes, dtypes, layouts, strict=True))
    ]
    return [*found, make((0, width))]


def _givens() -> list[Arguments]:
    out: list[Arguments] = []
    # 5 and 12 coordinates: pairs of 5, for the brick in 3 layers.
    for width, topology, pairs in ((5, "tree", 4), (12, "butterfly", 20), (5, "brick", 6)):
        for i, x in enumerate(_rows(width)):
            shape = (pairs, 2, 2) if i % 2 else (pairs,)
            out.append((x, make(shape, torch.float64 if i == 1 else torch.float32, 9), topology, i > 1))
    x, angles, matrices = make((3, 5), torch.float64), make((4,), torch.float64, 9), make((4, 2, 2), torch.float64, 9)
    return [*out, *((_grads(x), _grads(parameters), "tree", False) for parameters in (angles, matrices))]


def _givens_backward() -> list[Arguments]:
    plain = [(x.detach(), p.detach(), *rest) for x, p, *rest in _givens()]
    return [(make(tuple(x.shape), x.dtype, 5), x, *rest) for x, *rest in plain]


def _block_rotate() -> list[Arguments]:
    out: list[Arguments] = []
    for width, shape in ((15, (1, 5, 3, 3)), (16, (3, 4, 4, 4)), (40, (1, 1, 40, 40))):
        for i, x in enumerate(_rows(width)):
            out.append((x, 0.4 * make(shape, torch.float64 if i == 1 else torch.float32, 9), i > 1))
    x, blocks = make((3, 8), torch.float64), make((2, 2, 4, 4), torch.float64, 9)
    return [*out, (_grads(x), _grads(blocks), True)]


def _block_rotate_backward() -> list[Arguments]:
    plain = [(x.detach(), b.detach(), transpose) for x, b, transpose in _block_rotate()]
    return [(make(tuple(x.shape), x.dtype, 5), x, *rest) for x, *rest in plain]


def _low_rank_rotate() -> list[Arguments]:
    out: list[Arguments] = []
    for width, blocks, rank in ((7, 1, 3), (40, 4, 1), (6, 2, 5), (4, 1, 0)):
        for i, x in enumerate(_rows(width)):
            dtype = torch.float64 if i == 1 else torch.float32
            directions = make((blocks, rank, width // blocks), dtype, 9) / width**0.5
            out.append((x, directions, make((blocks, rank, rank), dtype, 10) / max(rank, 1)))
    x, u, t = out[1]
    return [*out, (_grads(x.clone()), _grads(u), _grads(t))]


def _low_rank_rotate_backward() -> list[Arguments]:
    plain = [tuple(t.detach() for t in arguments) for arguments in _low_rank_rotate()]
    return [(make(tuple(x.shape), x.dtype, 5), x, *rest) for x, *rest in plain]


def _cayley() -> list[Arguments]:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    out: list[Arguments] = [(make((4, 6), dtype, i), 4) for i, dtype in enumerate(dtypes)]
    out += [(make((2, 0)), 1), (make((0, 3)), 3), (make((3, 10), torch.float64)[:, ::1].T.contiguous().T, 5)]
    return [*out, (_grads(make((2, 3), torch.float64)), 3)]


def _models(dtype: torch.dtype, shape: tuple[int, ...], count: int = 3) -> tuple[Tensor, list[Tensor]]:
    base = make(shape, dtype)
    return base, [lay_out(make(shape, dtype, 1 + k), "contiguous") for k in range(count)]


def _merge_cases() -> list[tuple[Tensor | None, list[Tensor]]]:
    cases: list[tuple[Tensor | None, list[Tensor]]] = [
        _models(dtype, (37, 41)) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ]
    base, models = _models(torch.float32, (6, 5))
    cases += [
        (None, models),
        (base.T, [m.T for m in models]),
        _models(torch.float64, (0, 3)),
        _models(torch.float32, ()),
    ]
    cases.append((base, [models[0], torch.full_like(base, torch.inf)]))
    return cases


def _linear() -> list[Arguments]:
    return [(base, models, [0.3, -0.5, 1.0][: len(models)]) for base, models in _merge_cases()]


def _thresholds() -> list[Arguments]:
    out: list[Arguments] = []
    for base, models in _merge_cases():
        n = models[0].numel()
        out.append(([] if base is None else [base], models, [0, n // 3 + 1, n][: len(models)]))
    base, models = _models(torch.float32, (7,), 4)
    out.append(([base, base], models, [3, 14]))
    return out


def _keep(models: list[Tensor]) -> Arguments:
    count = len(models)
    return [0.1, 0.0, 0.4][:count], [1e30, 2.0, 1e30][:count], 0.25, [5, -7, 2**40][:count], 3


def _magnitude_sums() -> list[Arguments]:
    return [(base, models, *_keep(models)) for base, models in _merge_cases()]


def _masked() -> list[Arguments]:
    out: list[Arguments] = []
    for i, (base, models) in enumerate(_merge_cases()):
        how = ("none", "unweighted", "weighted")[i % 3], ("none", "count", "weight")[i // 3 % 3]
        numbers = [0.3, -0.5, 0.0 if i % 2 else 1.0][: len(models)], [1.0, 2.0, 0.5][: len(models)]
        out.append((base, models, *_keep(models), *numbers, 0.7, *how, 1.0))
    return out


def _dots() -> list[Arguments]:
    # opcheck cannot compare the NaN that the last case gives.
    return [(base, models, make(tuple(models[0].shape), models[0].dtype, 9)) for base, models in _merge_cases()[:-1]]


def _compete() -> list[Arguments]:
    # Without the case of an infinity, of which nothing is made, and more than one tensor.
    out: list[Arguments] = []
    for base, models in _merge_cases()[:-1]:
        if base is not None:
            out.append(([base], models, (base.numel() + 2) // 3, 0.7))
    base, models = _models(torch.float32, (6, 5))
    other, others = _models(torch.float32, (3,))
    flat = [t for pair in zip(models, others, strict=True) for t in pair]
    out += [([base, other], flat, rank, 1.0) for rank in (0, 1, 33)]
    return [*out, ([base], [base, base + 1.0], 3, 1.0)]


def _count_digits() -> list[Arguments]:
    out: list[Arguments] = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        base, models = _models(dtype, (300,), 2)
        high = 48 if dtype == torch.float64 else 16
        counts = torch.arange(2 << 16).view(2, 1 << 16) % 5
        out += [(base, models, high, [0, 0], counts), (base, models, high - 16, [0x3F00, 0x3F80], counts.clone())]
    return out


def _ranks() -> list[Arguments]:
    x = make((5, 300), torch.float64)
    return [(x,), (x.float().T,), (x.round(),), (x[:, :0],), (x[:0],)]


def _rank_drop() -> list[Arguments]:
    out: list[Arguments] = []
    for i, (base, models) in enumerate(_merge_cases()[:-1]):
        count, shape = len(models), models[0].shape
        row = shape[-1] if len(shape) and models[0].numel() else models[0].numel()
        numbers = [0.5, 0.7, 0.4][:count], [0.3, 0.0, 0.8][:count], [0.0, 1.5, 0.0][:count]
        out.append((base, models, row, *numbers, [5, -7, 2**40][:count], i))
    return out


def _columns() -> list[tuple[Tensor, list[Tensor]]]:
    return [(base, models) for base, models in _merge_cases()[:-1] if base is not None and base.dim() == 2]


def _column_changes() -> list[Arguments]:
    return [(base, models, by_row) for base, models in _columns() for by_row in (False, True)]


def _by_columns() -> list[Arguments]:
    out: list[Arguments] = []
    for base, models in _columns():
        wide = torch.promote_types(base.dtype, torch.float32)
        for by_row, count in enumerate(base.T.shape):
            out.append((base, models, make((len(models), count), wide, 7), bool(by_row), 0.7))
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
    "block_sparse_attention": _sparse_attention,
    "block_sparse_attention_backward": _sparse_attention_backward,
    "reattention_capture": _captures,
    "reattention_step": _steps,
    "merge_state": _merge,
    "merge_states": _merge_many,
    "merge_states_backward": _merge_backward,
    "neighborhood": _windows,
    "neighborhood_backward": _windows_backward,
    "token_shift": _token_shift,
    "token_shift_backward": _token_shift_backward,
    "givens": _givens,
    "givens_backward": _givens_backward,
    "block_rotate": _block_rotate,
    "block_rotate_backward": _block_rotate_backward,
    "low_rank_rotate": _low_rank_rotate,
    "low_rank_rotate_backward": _low_rank_rotate_backward,
    "cayley": _cayley,
    "merge_linear": _linear,
    "merge_thresholds": _thresholds,
    "merge_magnitude_sums": _magnitude_sums,
    "merge_masked": _masked,
    "merge_dots": _dots,
    "merge_compete": _compete,
    "merge_count_digits_": _count_digits,
    "merge_ranks": _ranks,
    "merge_rank_drop": _rank_drop,
    "merge_column_changes": _column_changes,
    "merge_by_columns": _by_columns,
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
    "block_sparse_attention": (attention._block_sparse_attention_rust, attention._block_sparse_attention_torch),
    "block_sparse_attention_backward": (attention._backward_rust, attention._backward_torch),
    "reattention_capture": (attention._capture_rust, attention._capture_torch),
    "reattention_step": (attention._step_rust, attention._step_torch),
    "merge_state": (
        lambda o_a, lse_a, o_b, lse_b: attention._merge_rust([o_a, o_b], [lse_a, lse_b]),
        lambda o_a, lse_a, o_b, lse_b: attention._merge_torch([o_a, o_b], [lse_a, lse_b]),
    ),
    "merge_states": (
        lambda o, lse: attention._merge_rust(list(o), list(lse)),
        lambda o, lse: attention._merge_torch(list(o), list(lse)),
    ),
    "merge_states_backward": (attention._merge_backward_rust, attention._merge_backward_torch),
    "neighborhood": (neighborhood._rust, neighborhood._torch),
    "neighborhood_backward": (neighborhood._backward_rust, neighborhood._backward_torch),
    "token_shift": (shift._rust, shift._torch),
    "token_shift_backward": (shift._backward_rust, shift._backward_torch),
    "givens": (rotation._givens_rust, rotation._givens_torch),
    "givens_backward": (rotation._givens_backward_rust, rotation._givens_backward_torch),
    "block_rotate": (rotation._block_rust, rotation._block_torch),
    "block_rotate_backward": (rotation._block_backward_rust, rotation._block_backward_torch),
    "low_rank_rotate": (rotation._low_rank_rust, rotation._low_rank_torch),
    "low_rank_rotate_backward": (rotation._low_rank_backward_rust, rotation._low_rank_backward_torch),
    "cayley": (rotation._cayley_rust, rotation._cayley_torch),
    "merge_linear": (merge._linear_rust, merge._linear_torch),
    "merge_thresholds": (merge._thresholds_rust, merge._thresholds_torch),
    "merge_magnitude_sums": (merge._magnitude_sums_rust, merge._magnitude_sums_torch),
    "merge_masked": (merge._masked_rust, merge._masked_torch),
    "merge_dots": (merge._dots_rust, merge._dots_torch),
    "merge_compete": (merge._compete_rust, merge._compete_torch),
    "merge_count_digits_": (merge._count_digits_rust, merge._count_digits_torch),
    "merge_ranks": (merge._ranks_rust, merge._ranks_torch),
    "merge_rank_drop": (merge._rank_drop_rust, merge._rank_drop_torch),
    "merge_column_changes": (merge._column_changes_rust, merge._column_changes_torch),
    "merge_by_columns": (merge._by_columns_rust, merge._by_columns_torch),
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
