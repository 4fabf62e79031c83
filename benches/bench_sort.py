"""Differentiable sorting: relaxed networks against the published matrix form, soft ranks against loops of SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from shiftkern.ot.diffsort import diffsort
from shiftkern.ot.soft_rank import soft_rank

from harness import Result, interleave

STEEPNESS = 10.0
Sorter = Callable[[Tensor], tuple[Tensor, Tensor]]


def stages(network: str, n: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of the smaller and of the larger outputs of each stage; n is a power of two."""
    if network == "odd_even":
        lows = [torch.arange(stage % 2, n - 1, 2) for stage in range(n)]
        return [(low, low + 1) for low in lows]
    out = []
    for block in range(1, n.bit_length()):
        for distance in (1 << bit for bit in reversed(range(block))):
            wire = torch.arange(n)
            first = wire[wire & distance == 0]
            falls = (first >> block) & 1 == 1
            out.append((torch.where(falls, first + distance, first), torch.where(falls, first, first + distance)))
    return out


def alpha_of(low: Tensor, high: Tensor) -> Tensor:
    return torch.atan(STEEPNESS * (high - low)) / math.pi + 0.5


def published(network: str, n: int) -> Sorter:
    """The published form: inputs of the comparators are taken out and put back by one-hot matrices."""
    matrices = [(torch.eye(n)[low], torch.eye(n)[high]) for low, high in stages(network, n)]
    if network == "odd_even":
        # Rows that a stage leaves alone run through it as a comparator with themselves.
        matrices = [_with_idle_rows(low, high) for low, high in matrices]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.eye(n).repeat(x.shape[0], 1, 1)
        for low, high in matrices:
            weight = 1.0 - 0.5 * (low * high).sum(1, keepdim=True)
            a, b = x @ low.T, x @ high.T
            alpha = alpha_of(a, b)
            x = (alpha * a + (1 - alpha) * b) @ (weight * low) + ((1 - alpha) * a + alpha * b) @ (weight * high)
            alpha, a, b = alpha.unsqueeze(2), low @ p, high @ p
            p = (weight * low).T @ (alpha * a + (1 - alpha) * b) + (weight * high).T @ ((1 - alpha) * a + alpha * b)
        return x, p

    return run


def _with_idle_rows(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    n = low.shape[1]
    idle = torch.eye(n)[(low + high[: len(low)]).sum(0) == 0] if len(low) else torch.eye(n)
    return torch.cat([low, idle]), torch.cat([high, idle])


def by_index(network: str, n: int) -> Sorter:
    """The best torch composition found: comparators by index, values as one more column of the matrix."""
    indices = stages(network, n)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat([x.unsqueeze(2), torch.eye(n).expand(x.shape[0], -1, -1)], 2)
        for low, high in indices:
            a, b = state[:, low], state[:, high]
            shift = (1.0 - alpha_of(a[..., :1], b[..., :1])) * (b - a)
            state = state.index_add(1, low, shift).index_add(1, high, -shift)
        return state[..., 0], state[..., 1:]

    return run


def by_slices(n: int) -> Sorter:
    """Odd-even stages as views of neighbours: no index at all."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat([x.unsqueeze(2), torch.eye(n).expand(x.shape[0], -1, -1)], 2)
        for stage in range(n):
            first, last = stage % 2, n - (n - stage) % 2
            a, b = state[:, first:last].unflatten(1, (-1, 2)).unbind(2)
            shift = (1.0 - alpha_of(a[..., :1], b[..., :1])) * (b - a)
            mixed = torch.stack([a + shift, b - shift], 2).flatten(1, 2)
            state = torch.cat([state[:, :first], mixed, state[:, last:]], 1)
        return state[..., 0], state[..., 1:]

    return run


def step(sort: Sorter, x: Tensor, weight: Tensor) -> Tensor:
    """Forward and backward, with a gradient for both outputs."""
    leaf = x.detach().requires_grad_()
    y, p = sort(leaf)
    return torch.autograd.grad((y * weight[:, 0]).sum() + (p * weight).sum(), leaf)[0]


def networks() -> Iterator[Result]:
    for network, batch, n in (("odd_even", 16, 32), ("odd_even", 16, 128), ("bitonic", 16, 128), ("bitonic", 4, 512)):
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(batch, n, generator=generator), torch.randn(batch, n, n, generator=generator)
        sorters: dict[str, Sorter] = {
            "shiftkern": lambda x, network=network: diffsort(x, network, STEEPNESS),
            "torch, published matrices": published(network, n),
            "torch, by index": by_index(network, n),
        }
        if network == "odd_even":
            sorters["torch, by slices"] = by_slices(n)
        ours = step(sorters["shiftkern"], x, weight)
        for name, sort in sorters.items():
            torch.testing.assert_close(
                step(sort, x, weight), ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()), msg=name
            )
        yield Result(
            f"diffsort, {network}, forward and backward",
            f"B={batch}, n={n}",
            interleave({name: lambda sort=sort, x=x, w=weight: step(sort, x, w) for name, sort in sorters.items()}),
            ["shiftkern"],
            [name for name in sorters if name != "shiftkern"],
            None,
            [("shiftkern", "torch, published matrices", 20.0)] if (network, n) == ("odd_even", 128) else [],
        )


def rank_by_scipy(x: Tensor, strength: float) -> Tensor:
    """One regression a row, by SciPy's compiled pooling of violators."""
    out = np.empty(x.shape)
    for row, ranks in zip(x.double().numpy(), out, strict=True):
        order = np.argsort(-row)
        z = row[order] / strength
        ranks[order] = z - isotonic_regression(z - np.arange(len(z), 0, -1.0), increasing=False).x
    return torch.from_numpy(out).to(x.dtype)


@torch.no_grad()
def ranks() -> Iterator[Result]:
    for batch, n in ((256, 100), (16, 10_000), (1, 1_000_000)):
        x = torch.randn(batch, n, generator=torch.Generator().manual_seed(0))
        # About ten neighbours share a pool.
        strength = 40.0 / n
        torch.testing.assert_close(soft_rank(x, regularization_strength=strength), rank_by_scipy(x, strength))
        yield Result(
            "soft_rank, l2",
            f"B={batch}, n={n}",
            interleave(
                {
                    "shiftkern": lambda x=x, e=strength: soft_rank(x, regularization_strength=e),
                    "SciPy, row by row": lambda x=x, e=strength: rank_by_scipy(x, e),
                    "torch.sort alone": lambda x=x: x.sort(1),
                }
            ),
            ["shiftkern"],
            ["SciPy, row by row"],
            "torch.sort alone",
        )


def results() -> Iterator[Result]:
    """Networks with gradients at several sizes, then soft ranks."""
    yield from networks()
    yield from ranks()
