"""Arguments that are large enough to be cut into blocks and spread over threads, for every registered operator.

``tests/operators/test_bits.py`` fails when one is missing, and when its arguments are not spread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from shiftkern._ops import attention, neighborhood, sort
from shiftkern.attention import BlockMask

from helpers.samples import Arguments, _solver, _spread, _weights
from helpers.strategies import affine, lay_out, make


@cache
def _noise(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(7))


def _large(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
    """Noise like that of ``make``, drawn once."""
    count = torch.Size(shape).numel()
    return (_noise(1 << 22)[shift * 997 :][:count] * 1.5 + 0.5).to(dtype).view(shape).clone()


def _images() -> list[Tensor]:
    """Around a million elements: more than one unit, block or row of a reduction, with and without remainders."""
    return [
        _large((8, 6, 1 << 15)),
        lay_out(_large((9, 64, 45, 45), torch.float32, 1), "channels_last"),
        _large((3, 6, 65537), torch.bfloat16, 2),
        _large((17, 8, 9001), torch.float64, 3),
        _large((4099, 257), torch.float32, 4),
    ]


def _moments() -> list[Arguments]:
    out: list[Arguments] = []
    for i, x in enumerate(_images()):
        mask = _large((x.shape[0], *x.shape[2:]), torch.float32, 5) > 0
        out += [(x, mask if i % 2 else None, 1, False), (x, mask if i % 2 == 0 else None, 1, x.dim() > 2)]
    return out


def _with_coefficients(number: int, gradient: bool) -> list[Arguments]:
    out: list[Arguments] = []
    for i, x in enumerate(_images()):
        shape = (x.shape[0], x.shape[1]) if i % 2 and x.dim() > 2 else (x.shape[1],)
        coefficients = [make(shape, torch.float64, seed) for seed in range(number)]
        g = [torch.empty_like(x).copy_(_large(tuple(x.shape), x.dtype, 6))] if gradient else []
        out.append((*g, x, *coefficients, 1))
    return out


def _mixed() -> list[Arguments]:
    return [(x, *affine(x.shape[1]), 0.3, 1e-5, bool(i % 2)) for i, x in enumerate(_images())]


def _unmix() -> list[Arguments]:
    out = []
    for i, x in enumerate(_images()[:4]):
        components = make((4, x.shape[1]), seed=7), make((4, x.shape[1]), seed=8).square() + 0.1
        out.append((x, *components, *affine(x.shape[1])[2:], 0.07, 1e-5, i % 2 == 0))
    return out


def _unmix_update() -> list[Arguments]:
    p, own = make((129, 17), torch.float64).softmax(1), make((129, 65), torch.float64)
    return [(make((17, 65), dtype), own, p, 0.1) for dtype in (torch.float32, torch.float64)]


def _style() -> list[Arguments]:
    return [
        (x, make((2, x.shape[1]), seed=3), make((2, x.shape[1]), seed=4).square() + 0.2, 1.0 if i % 2 else None, 1e-5)
        for i, x in enumerate(_images()[:4])
    ]


def _ema() -> list[Arguments]:
    sizes = [(1 << 15) + offset for offset in (-1, 0, 1)] + [1 << 18, 100003]
    return [
        (*([_large((s,), dtype, first + i) for i, s in enumerate(sizes)] for first in (0, 9)), 0.3)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]


def _lame() -> list[Arguments]:
    return [
        (make((n + i, 5), dtype).softmax(1), make((n + i, 9), dtype, 9), affinity, 3, 0.5, 4, 0.0)
        for i, dtype in enumerate((torch.float32, torch.float64))
        for n, affinity in ((448, "knn"), (448, "rbf"), (3200, "linear"))
    ]


#: Sizes of costs: rows in blocks of 64, columns in strips of 256.
_COSTS = [(768, 512), (769, 513), (1279, 257), (129, 4001), (2049, 300)]


def _sinkhorn() -> list[Arguments]:
    out: list[Arguments] = []
    solvers = [_solver(), _solver(("kl", 0.7), ("kl", 2.0)), _solver(order="gf", omega=1.4), _solver(("tv", 0.4))]
    solvers.append(_solver(("at_most", 0.0), ("at_most", 0.0), mass=0.6))
    for i, ((n, m), solver) in enumerate(zip(_COSTS, solvers, strict=True)):
        M = _large((1, n, m), torch.float64 if i % 2 else torch.float32, i).square() / 4
        reg = torch.tensor([0.8], dtype=torch.float64)
        out.append((M, _weights(1, n, 1), _weights(1, m, 2), reg, 0 * reg + 1e-3, None, None, *solver))
    # Many small problems: each one is a block.
    M, reg = _large((97, 33, 40)).square() / 4, torch.linspace(0.5, 1.5, 97, dtype=torch.float64)
    return [*out, (M, _weights(97, 33, 1), _weights(97, 40, 2), reg, 0 * reg, None, None, *_solver())]


_METRICS = ("sqeuclidean", "euclidean", "cosine")


def _points() -> list[tuple[Tensor, Tensor, str]]:
    sizes = [(512, 512, 8), (577, 513, 3), (449, 767, 17)]
    return [
        (_large((n, d), dtype, i), _large((m, d), dtype, i + 5), metric)
        for i, ((n, m, d), metric) in enumerate(zip(sizes, _METRICS, strict=True))
        for dtype in (torch.float32, torch.float64)
    ]


def _sinkhorn_samples() -> list[Arguments]:
    reg = torch.tensor([0.9], dtype=torch.float64)
    return [
        (X, Y, metric, _weights(1, len(X), 1), _weights(1, len(Y), 2), reg, 0 * reg, None, None, *_solver())
        for X, Y, metric in _points()
    ]


def _potentials(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    f, g = make((1, n), torch.float64, 3), make((1, m), torch.float64, 4)
    return f, g, torch.tensor([0.8], dtype=torch.float64)


def _transported() -> list[Arguments]:
    return [
        (_large((1, n, m), torch.float64 if i % 2 else torch.float32, i).square(), *_potentials(n, m))
        for i, (n, m) in enumerate(_COSTS)
    ]


def _applied() -> list[Arguments]:
    return [
        (M, *rest, make((1, M.shape[1] if transposed else M.shape[2], 5), M.dtype, 7), transposed)
        for M, *rest in _transported()
        for transposed in (False, True)
    ]


def _samples_transported() -> list[Arguments]:
    return [(X, Y, metric, *_potentials(len(X), len(Y))) for X, Y, metric in _points()]


def _samples_applied() -> list[Arguments]:
    return [
        (*arguments, make((len(arguments[1]), 5), arguments[0].dtype, 7), arguments[2] == "euclidean")
        for arguments in _samples_transported()
    ]


def _assign() -> list[Arguments]:
    return [
        (_large(shape, dtype), 0.3, 3)
        for shape in ((1024, 512), (1025, 513), (1983, 257))
        for dtype in (torch.float32, torch.float64)
    ]


def _half_steps() -> list[Arguments]:
    return [
        (M[0], _weights(1, M.shape[1], 1)[0], _weights(1, M.shape[2], 2)[0], f[0], g[0], 0.7)
        for M, f, g, _ in _transported()
    ]


def _orders() -> list[Tensor]:
    """Rows in groups of 4096 elements."""
    shapes = [(128, 256), (129, 255), (7, 4096), (6, 4097), (9001, 3)]
    return [_large(shape, (torch.float32, torch.float64)[i % 2], i) for i, shape in enumerate(shapes)]


def _soft_order() -> list[Arguments]:
    options = [(ranks, kl, 0.7, ranks == kl) for ranks in (False, True) for kl in (False, True)]
    return [(x, *options[i % 4]) for i, x in enumerate(_orders())]


def _soft_order_backward() -> list[Arguments]:
    out = []
    for x, *options in _soft_order():
        _, order, first = sort._order_torch(x, *options)
        out.append((_large(tuple(x.shape), x.dtype, 11), x, order, first, *options))
    return out


def _diffsort() -> list[Arguments]:
    options = [("cauchy", 2.0, False), ("reciprocal", 3.0, True), ("optimal", 0.5, False), ("logistic", 1.5, True)]
    sizes = [(65, 32), (129, 33), (130, 16), (7, 65)]
    return [
        (_large(shape, (torch.float32, torch.float64)[i % 2], i), ("bitonic", "odd_even")[i // 2], *option)
        for i, (shape, option) in enumerate(zip(sizes, options, strict=True))
    ]


def _diffsort_backward() -> list[Arguments]:
    return [
        (_large(tuple(x.shape), x.dtype, 5), _large((*x.shape, x.shape[1]), x.dtype, 6) if i % 2 else None, x, *rest)
        for i, (x, *rest) in enumerate(_diffsort())
    ]


@cache
def _attention() -> list[tuple[tuple[Tensor, Tensor, Tensor], Arguments]]:
    out = []
    sizes = [(256, 256, 16), (257, 320, 17), (191, 193, 8)]
    for i, (n, m, width) in enumerate(sizes):
        dtype = (torch.float32, torch.float64, torch.bfloat16)[i]
        q, k, v = (
            _large((2, heads, length, width), dtype, j) - 0.5
            for j, (heads, length) in enumerate([(4, n), (2, m), (2, m)])
        )
        kept = _large((1, 4, n, m), torch.float32, 8) > 0
        kept[:, :, 5:6] = False
        kept[:, :, 64:128, :64] = True
        out.append(((q, k, v), _spread(BlockMask.from_bool(kept, (64, 64) if i else (16, 32)), 0.3)))
    return out


def _attention_backward() -> list[Arguments]:
    out = []
    for i, (tensors, mask) in enumerate(_attention()):
        result, lse = attention._block_sparse_attention_torch(*tensors, *mask)
        grad_lse = make(tuple(lse.shape), lse.dtype, 5) if i % 2 else None
        out.append((make(tuple(result.shape), result.dtype, 4), grad_lse, *tensors, result, lse, *mask))
    return out


def _steps() -> list[Arguments]:
    out = []
    for i, (tensors, mask) in enumerate(_attention()):
        _, rho, share, _, lse_rest, rest, difference = attention._capture_torch(*tensors, True, True, *mask)
        carried = [(rest, rho, share, None), (rest, None, None, lse_rest), (difference, None, None, None)]
        out.append((*tensors, *carried[i], *mask))
    return out


def _states() -> list[tuple[Tensor, Tensor]]:
    """Outputs and log-sum-exps, in blocks of 64 rows."""
    out = []
    for i, (rows, width) in enumerate([(4096, 16), (4097, 33), (4095, 64)]):
        lse = _large((3, 1, 2, rows), torch.float64 if i % 2 else torch.float32, i)
        out.append((_large((3, 1, 2, rows, width), lse.dtype, i + 1), lse.masked_fill(lse < -0.5, -torch.inf)))
    return out


def _merge_backward() -> list[Arguments]:
    out = []
    for i, (o, lse) in enumerate(_states()):
        merged, total = attention._merge_torch(list(o), list(lse))
        grad_lse = _large(tuple(total.shape), total.dtype, 5) if i % 2 else None
        out.append((list(o), list(lse), merged, total, _large(tuple(merged.shape), merged.dtype, 4), grad_lse))
    return out


def _windows() -> list[Arguments]:
    out = []
    for i, (shape, kernel, dilation, clamp) in enumerate(
        [
            ((2, 2, 32, 32, 16), (7, 7), (1, 1), True),
            ((1, 4, 33, 31, 9), (5, 3), (2, 1), False),
            ((3, 1, 17, 65, 24), (3, 9), (1, 2), True),
            # All in one grid: sums over windows go into rows of other blocks.
            ((1, 1, 40, 150, 8), (5, 9), (1, 1), True),
        ]
    ):
        dtype = torch.float64 if i % 2 else torch.float32
        q, k, v = (_large(shape, dtype, i + j) / 2 for j in range(3))
        bias = make((shape[1], 2 * kernel[0] - 1, 2 * kernel[1] - 1), dtype, i) if i % 3 else None
        out.append((q, k, v, bias, *kernel, *dilation, clamp, 0.4))
    return out


def _windows_backward() -> list[Arguments]:
    out = []
    for i, arguments in enumerate(_windows()):
        inputs, options = arguments[:4], arguments[4:]
        results = neighborhood._torch(*inputs, *options)
        grad, grad_lse = (_large(tuple(t.shape), t.dtype, 9) / 4 for t in results)
        out.append((grad, grad_lse if i % 2 else None, *inputs, *results, *options))
    return out


def _token_shift() -> list[Arguments]:
    return [
        (x, _large((*x.shape[:2], x.shape[3]), x.dtype, 7) if i % 2 else None, make((x.shape[1], 2), torch.float64, 8))
        for i, x in enumerate(
            [
                _large((2, 4, 1024, 64)),
                _large((3, 5, 513, 65), torch.float64),
                _large((1, 1, 32769, 17), torch.bfloat16),
                _large((700, 3, 9, 32), torch.float32),
            ]
        )
    ]


def _token_shift_backward() -> list[Arguments]:
    return [(_large(tuple(x.shape), x.dtype, 5), x, *rest) for x, *rest in _token_shift()]


def _rows(width: int) -> list[Tensor]:
    """Rows in panels of 8, 16 or 32 by type and instruction set, and sums over a few hundred of them."""
    return [
        0.2 * _large((rows, width), dtype, i)
        for i, (rows, dtype) in enumerate([(4096, torch.float32), (4097, torch.float64), (4095, torch.bfloat16)])
    ]


def _givens() -> list[Arguments]:
    out: list[Arguments] = []
    for width, topology, pairs in ((128, "butterfly", 448), (131, "tree", 130), (129, "brick", 256)):
        for i, x in enumerate(_rows(width)):
            shape = (pairs, 2, 2) if i % 2 else (pairs,)
            out.append((x, make(shape, torch.float64 if i == 1 else torch.float32, 9), topology, i > 1))
    return out


def _backward_of(samples: list[Arguments]) -> list[Arguments]:
    return [(_large(tuple(x.shape), x.dtype, 5) / 8, x, *rest) for x, *rest in samples]


def _block_rotate() -> list[Arguments]:
    out: list[Arguments] = []
    for width, shape in ((128, (2, 16, 8, 8)), (96, (1, 3, 32, 32)), (330, (1, 55, 6, 6))):
        for i, x in enumerate(_rows(width)):
            out.append((x, 0.3 * make(shape, torch.float64 if i == 1 else torch.float32, 9), i > 1))
    return out


def _low_rank_rotate() -> list[Arguments]:
    out: list[Arguments] = []
    for width, blocks, rank in ((128, 1, 4), (96, 8, 1), (66, 2, 5)):
        for i, x in enumerate(_rows(width)):
            dtype = torch.float64 if i == 1 else torch.float32
            directions = make((blocks, rank, width // blocks), dtype, 9) / width**0.5
            out.append((x, directions, make((blocks, rank, rank), dtype, 10) / max(rank, 1)))
    return out


def _cayley() -> list[Arguments]:
    return [
        (make((count, block * (block - 1) // 2), dtype), block)
        for count, block, dtype in ((256, 8, torch.float32), (33, 32, torch.float64), (2001, 5, torch.bfloat16))
    ]


def _merge_cases() -> list[tuple[Tensor, list[Tensor]]]:
    """Blocks of 32768 elements."""
    sizes = [((8 << 15,), torch.float32), ((3, (3 << 15) + 1), torch.float64), ((513, 640), torch.bfloat16)]
    sizes.append((((12 << 15) - 1,), torch.float16))
    return [
        (_large(shape, dtype, i), [_large(shape, dtype, 20 + 3 * i + k) for k in range(3)])
        for i, (shape, dtype) in enumerate(sizes)
    ]


_KEEP = [0.1, 0.0, 0.4], [1e30, 2.0, 1e30], 0.25, [5, -7, 2**40], 3


def _masked() -> list[Arguments]:
    out: list[Arguments] = []
    for i, (base, models) in enumerate(_merge_cases()):
        how = ("none", "unweighted", "weighted", "weighted")[i], ("count", "none", "weight", "count")[i]
        out.append((base, models, *_KEEP, [0.3, -0.5, 1.0], [1.0, 2.0, 0.5], 0.7, *how, 1.0))
    return out


def _count_digits() -> list[Arguments]:
    """Chunks of 32 blocks."""
    shape = ((1 << 20) + 3,)
    out: list[Arguments] = []
    for dtype, high in ((torch.float32, 16), (torch.float64, 48), (torch.bfloat16, 16)):
        models = [_large(shape, dtype, k + 1) for k in range(2)]
        out.append((_large(shape, dtype), models, high, [0, 0], torch.zeros((2, 1 << 16), dtype=torch.int64)))
    return out


def _rank_drop() -> list[Arguments]:
    return [
        (base, models, base.shape[-1], [0.5, 0.7, 0.4], [0.3, 0.0, 0.8], [0.0, 1.5, 0.0], [5, -7, 2**40], i)
        for i, (base, models) in enumerate(_merge_cases())
    ]


def _matrices() -> list[tuple[Tensor, list[Tensor], bool]]:
    """Strips of 64 columns."""
    shapes = [((640, 448), torch.float32), ((513, 385), torch.float64), ((300, 1023), torch.bfloat16)]
    return [
        (_large(shape, dtype, i), [_large(shape, dtype, 9 + 3 * i + k) for k in range(3)], by_row)
        for i, (shape, dtype) in enumerate(shapes)
        for by_row in (False, True)
    ]


def _by_columns() -> list[Arguments]:
    out: list[Arguments] = []
    for base, models, by_row in _matrices():
        count = base.shape[0 if by_row else 1]
        out.append((base, models, make((3, count), torch.promote_types(base.dtype, torch.float32), 7), by_row, 0.7))
    return out


LARGE_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "channel_moments": _moments,
    "channel_affine": lambda: _with_coefficients(3, gradient=False),
    "channel_dot": lambda: _with_coefficients(1, gradient=True),
    "channel_combine": lambda: _with_coefficients(4, gradient=True),
    "mixed_batch_norm": _mixed,
    "mixed_batch_norm_": _mixed,
    "mixed_batch_norm_out": lambda: [(*arguments, torch.empty_like(arguments[0])) for arguments in _mixed()],
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
    "transport_plan": _transported,
    "transport_sums": _transported,
    "samples_sums": _samples_transported,
    "transport_apply": _applied,
    "samples_apply": _samples_applied,
    "sinkhorn_assign": _assign,
    "sinkhorn_half_step": _half_steps,
    "block_sparse_attention": lambda: [(*tensors, *mask) for tensors, mask in _attention()],
    "block_sparse_attention_backward": _attention_backward,
    "reattention_capture": lambda: [(*tensors, True, True, *mask) for tensors, mask in _attention()],
    "reattention_step": _steps,
    "merge_state": lambda: [(o[0], lse[0], o[-1], lse[-1]) for o, lse in _states()],
    "merge_states": lambda: list(_states()),
    "merge_states_backward": _merge_backward,
    "neighborhood": _windows,
    "neighborhood_backward": _windows_backward,
    "token_shift": _token_shift,
    "token_shift_backward": _token_shift_backward,
    "givens": _givens,
    "givens_backward": lambda: _backward_of(_givens()),
    "block_rotate": _block_rotate,
    "block_rotate_backward": lambda: _backward_of(_block_rotate()),
    "low_rank_rotate": _low_rank_rotate,
    "low_rank_rotate_backward": lambda: _backward_of(_low_rank_rotate()),
    "cayley": _cayley,
    "merge_linear": lambda: [(base, models, [0.3, -0.5, 1.0]) for base, models in _merge_cases()],
    "merge_thresholds": lambda: [
        ([base], models, [1, base.numel() // 3, base.numel()]) for base, models in _merge_cases()
    ],
    "merge_magnitude_sums": lambda: [(base, models, *_KEEP) for base, models in _merge_cases()],
    "merge_masked": _masked,
    "merge_dots": lambda: [
        (base, models, _large(tuple(base.shape), base.dtype, 15)) for base, models in _merge_cases()
    ],
    "merge_compete": lambda: [([base], models, base.numel() // 3, 0.7) for base, models in _merge_cases()],
    "merge_count_digits_": _count_digits,
    "merge_ranks": lambda: [(_large((40, 1024), torch.float64),), (_large((5, 30001)),), (_large((513, 257)),)],
    "merge_rank_drop": _rank_drop,
    "merge_column_changes": lambda: list(_matrices()),
    "merge_by_columns": _by_columns,
}
