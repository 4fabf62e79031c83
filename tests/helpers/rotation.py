"""Rotations written out coordinate by coordinate in float64, and bounds of their rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shiftkern.testing import assert_same_bits

from helpers.strategies import computing, make, roundoff

WIDTHS = (1, 2, 3, 5, 8, 31, 32, 33, 127, 128, 129, 256, 300)
ROWS = (0, 1, 31, 32, 33, 100)
TOPOLOGIES = ("tree", "butterfly", "brick")

#: All widths at one number of rows, and the other way round.
SIZES = tuple((33, d) for d in WIDTHS) + tuple((rows, 33) for rows in ROWS if rows != 33)


def stages(topology: str, d: int, layers: int = 3) -> list[list[tuple[int, int]]]:
    """The pairs of each stage."""
    if topology == "brick":
        return [[(i, i + 1) for i in range(layer % 2, d - 1, 2)] for layer in range(layers)]
    found, stride = [], 1
    while stride < d:
        if topology == "tree":
            found.append([(j - stride, j) for j in range(stride, d, 2 * stride)])
        else:
            found.append([(i, i + stride) for i in range(d - stride) if not i & stride])
        stride *= 2
    return found


def count(topology: str, d: int) -> int:
    return sum(len(stage) for stage in stages(topology, d))


def turns(theta: Tensor) -> Tensor:
    """The 2 x 2 rotation of each angle."""
    cosine, sine = theta.double().cos(), theta.double().sin()
    return torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)


def mixed(x: Tensor, blocks: Tensor, topology: str, transpose: bool = False) -> Tensor:
    """One pair after the other, in float64 and differentiable."""
    columns, blocks = list(x.double().unbind(-1)), blocks.double()
    pairs = [pair for stage in stages(topology, x.shape[-1]) for pair in stage]
    numbers = range(len(pairs))
    for n in reversed(numbers) if transpose else numbers:
        (i, j), (a, b, c, d) = pairs[n], blocks[n].flatten().unbind()
        if transpose:
            b, c = c, b
        columns[i], columns[j] = a * columns[i] + b * columns[j], c * columns[i] + d * columns[j]
    return torch.stack(columns, -1)


def skew_matrix(entries: Tensor, block: int) -> Tensor:
    """``upper - upper^T`` in float64, entry by entry."""
    zero = torch.zeros((), dtype=torch.float64)
    rows = [[zero] * block for _ in range(block)]
    given = iter(entries.double().unbind()) if entries.numel() else iter(())
    for i in range(block):
        for j in range(i + 1, block):
            rows[i][j] = next(given)
            rows[j][i] = -rows[i][j]
    return torch.stack([torch.stack(row) for row in rows])


def cayley_matrix(entries: Tensor, block: int) -> Tensor:
    skew, eye = skew_matrix(entries, block), torch.eye(block, dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def members(factor: int, number: int, block: int) -> list[int]:
    """The coordinates that a block of a factor of the butterfly joins."""
    if factor == 0:
        return list(range(number * block, (number + 1) * block))
    half, units = block // 2, [w for w in range(1 << 12) if not w >> factor & 1]
    lower, upper = units[number] * half, (units[number] + (1 << factor)) * half
    return [*range(lower, lower + half), *range(upper, upper + half)]


def joined(d: int, blocks: Tensor) -> Tensor:
    """The dense product of factors given by ``blocks (factors, d / b, b, b)``, the first of them acting first."""
    result = torch.eye(d, dtype=torch.float64)
    for i, factor in enumerate(blocks):
        dense = torch.zeros(d, d, dtype=torch.float64)
        for n, block in enumerate(factor):
            at = torch.tensor(members(i, n, len(block)))
            dense = dense.index_put((at[:, None], at[None, :]), block.double())
        result = dense @ result
    return result


def cayley_blocks(skew: Tensor, block: int) -> Tensor:
    flat = [cayley_matrix(entries, block) for entries in skew.flatten(0, -2)]
    return torch.stack(flat).view(*skew.shape[:-1], block, block)


def reflection(u: Tensor) -> Tensor:
    """``I - 2 u u^T`` of a direction of any length."""
    unit = u.double() / u.double().norm()
    return torch.eye(len(u), dtype=torch.float64) - 2.0 * torch.outer(unit, unit)


def assert_within(got: Tensor, want: Tensor, size: Tensor | float, terms: float) -> None:
    """One rounding to the type of ``got``, after ``terms`` roundings of ``size`` in the type that is computed in."""
    assert got.shape == want.shape
    info = torch.finfo(got.dtype)
    slack = roundoff(got.dtype) * want.abs() + info.smallest_normal * info.eps
    slack = slack + terms * roundoff(computing(got.dtype)) * size
    excess = (got.double() - want).abs() - slack
    assert not excess.isnan().any()
    assert got.numel() == 0 or excess.max() <= 0, float(excess.max())


def lengths(x: Tensor) -> Tensor:
    """The length of each row, beside which rotations round."""
    return x.double().norm(dim=-1, keepdim=True)


def angles(n: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    return make((n,), dtype, seed, mean=0.0)


def assert_same_bits_at_any_number_of_threads(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], counts: Sequence[int] = (1, 2, 3)
) -> None:
    """Compare results and gradients of calls on 1, 2 and 3 threads."""
    leaves = [t.detach().requires_grad_() for t in leaves]

    def call() -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, y.detach().flip(0))]

    assert_same_bits(call, threads=counts)


def assert_rows_do_not_meet(function: Callable[[Tensor], Tensor], d: int, dtype: torch.dtype) -> None:
    """NaN and infinities of a row stay in it, forward and backward, and change no bit of another row."""
    x = make((70, d), dtype, 3)
    bad = x.clone()
    bad[5, 0], bad[33, d - 1], bad[69, d // 2] = float("nan"), float("inf"), -float("inf")
    clean = torch.ones(70, dtype=torch.bool)
    clean[[5, 33, 69]] = False
    plain, spoilt = function(x), function(bad)
    assert torch.equal(plain[clean], spoilt[clean])
    assert not spoilt[~clean].isfinite().all(1).any()
    leaf = x.clone().requires_grad_()
    grads = [torch.autograd.grad(function(leaf), leaf, g)[0] for g in (x, bad)]
    assert torch.equal(grads[0][clean], grads[1][clean])
    assert not grads[1][~clean].isfinite().all(1).any()
