"""A short bench on the machine at hand: some kernels of each family beside the same work in torch operations."""

from __future__ import annotations

import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import shiftkern

__all__ = ["Measured", "Work", "compare", "machine", "show", "work"]

Run = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """One piece of work, by the library and in torch, and how far the two may differ by rounding."""

    family: str
    name: str
    size: str
    ours: Run
    torch: Run
    rtol: float = 1e-3
    atol: float = 1e-4


@dataclass(frozen=True)
class Measured:
    """Medians in milliseconds; ``ratio`` is how many times faster the library is."""

    family: str
    work: str
    size: str
    shiftkern_ms: float
    torch_ms: float
    ratio: float


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _norm(quick: bool) -> Iterator[Work]:
    from shiftkern.norm import channel_moments, mixed_batch_norm

    shape = (16, 32, 28, 28) if quick else (64, 64, 56, 56)
    x = 1.0 + _numbers(*shape)
    mean, var, weight, bias = _numbers(4, shape[1], seed=1).unbind()
    var, size = var.square() + 0.5, "x".join(map(str, shape))

    def moments() -> tuple[Tensor, Tensor]:
        found = channel_moments(x)
        return found.mean.float(), found.var().float()

    def in_torch() -> tuple[Tensor, Tensor]:
        spread, middle = torch.var_mean(x, (0, 2, 3), correction=0)
        return middle, spread

    def mixed() -> Tensor:
        spread, middle = torch.var_mean(x, (0, 2, 3), correction=0)
        y: Tensor = F.batch_norm(x, torch.lerp(middle, mean, 0.3), torch.lerp(spread, var, 0.3), weight, bias)
        return y

    yield Work("norm", "statistics of channels", size, moments, in_torch)
    yield Work(
        "norm",
        "batch norm with mixed statistics",
        size,
        lambda: mixed_batch_norm(x, mean, var, weight, bias, source_weight=0.3),
        mixed,
    )


def _ot(quick: bool) -> Iterator[Work]:
    from shiftkern.ot import diffsort, sinkhorn

    n, steps, reg = (100 if quick else 1000), 20, 0.05
    costs = torch.cdist(_numbers(n, 2), _numbers(n, 2, seed=1))

    def ours() -> Tensor:
        with warnings.catch_warnings():
            # A fixed number of iterations is what is compared.
            warnings.simplefilter("ignore", shiftkern.ConvergenceWarning)
            plan: Tensor = sinkhorn(None, None, costs, reg, max_iter=steps, tol=0.0).plan()
            return plan

    def loop() -> Tensor:
        weight = reg * torch.log(torch.tensor(1.0 / n))
        f, g = torch.zeros(n), torch.zeros(n)
        for _ in range(steps):
            f = weight - reg * ((g - costs) / reg).logsumexp(1)
            g = weight - reg * ((f[:, None] - costs) / reg).logsumexp(0)
        return ((f[:, None] + g - costs) / reg).exp()

    yield Work("ot", f"sinkhorn, {steps} iterations", f"{n} x {n}", ours, loop, 1e-2, 1e-6)

    batch, width = 8, (16 if quick else 64)
    rows, steepness = _numbers(batch, width, seed=2), 10.0

    def stages() -> tuple[Tensor, Tensor]:
        x = torch.cat([rows.unsqueeze(2), torch.eye(width).expand(batch, -1, -1)], 2)
        for stage in range(width):
            first, last = stage % 2, width - (width - stage) % 2
            a, b = x[:, first:last].view(batch, -1, 2, width + 1).unbind(2)
            share = 0.5 - torch.atan(steepness * (b[..., :1] - a[..., :1])) / torch.pi
            swapped = torch.stack([a + share * (b - a), b - share * (b - a)], 2).flatten(1, 2)
            x = torch.cat([x[:, :first], swapped, x[:, last:]], 1)
        return x[..., 0], x[..., 1:]

    yield Work("sort", "sorting network", f"{batch} x {width}", lambda: diffsort(rows, "odd_even", steepness), stages)


def _tta(quick: bool) -> Iterator[Work]:
    from shiftkern.tta import lame

    n, width, classes = (128, 64, 10) if quick else (1000, 512, 10)
    label = torch.arange(n) % classes
    features = 3.0 * _numbers(classes, width)[label] + _numbers(n, width, seed=1)
    logits = _numbers(n, classes, seed=2) + 2.0 * F.one_hot(label, classes)
    probabilities = logits.softmax(1)

    def in_torch() -> Tensor:
        unit = F.normalize(features, dim=1)
        nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(5).indices
        matrix = torch.zeros(n, n).scatter_(1, nearest, 1.0)
        unary, last = (probabilities + 1e-10).log(), None
        y = unary.softmax(1)
        for _ in range(100):
            pairwise = matrix @ y
            y = (unary + pairwise).softmax(1)
            energy = float((y * (y.clamp(min=1e-20).log() - unary - pairwise)).sum())
            if last is not None and abs(energy - last) <= 1e-8 * abs(last):
                break
            last = energy
        return y

    yield Work("tta", "LAME", f"{n} x {width}", lambda: lame(probabilities, features), in_torch, 1e-2, 1e-3)


def _attention(quick: bool) -> Iterator[Work]:
    from shiftkern.attention import BlockMask, sliding_window_attention, sparse_attention

    n = 256 if quick else 2048
    q, k, v = _numbers(3, 1, 8, n, 64).unbind()
    left = n // 32
    offset = torch.arange(n) - torch.arange(n)[:, None]
    window = offset.abs() <= left
    kept = (torch.rand(n // 64, n // 64, generator=torch.Generator().manual_seed(1)) < 0.1).fill_diagonal_(True)
    blocks = kept.repeat_interleave(64, 0).repeat_interleave(64, 1)
    mask, size = BlockMask.from_bool(blocks, 64), f"8 heads, {n} tokens"
    yield Work(
        "attention",
        "sliding window",
        size,
        lambda: sliding_window_attention(q, k, v, (left, left)),
        lambda: F.scaled_dot_product_attention(q, k, v, window),
    )
    yield Work(
        "attention",
        f"blocks, {100 * mask.density:.0f} % kept",
        size,
        lambda: sparse_attention(q, k, v, mask),
        lambda: F.scaled_dot_product_attention(q, k, v, blocks),
    )


def _merge(quick: bool) -> Iterator[Work]:
    from shiftkern.merge import task_arithmetic, ties

    n, density = (20_000 if quick else 1_000_000), 0.2
    base = {f"w{i}": _numbers(n, seed=i) for i in range(4)}
    models = [
        {name: w + 0.01 * _numbers(n, seed=9 * k + i) for i, (name, w) in enumerate(base.items(), 5)} for k in (1, 2, 3)
    ]

    def total() -> dict[str, Tensor]:
        return {name: w + 0.4 * sum(model[name] - w for model in models) for name, w in base.items()}

    def trimmed() -> dict[str, Tensor]:
        merged = {}
        for name, w in base.items():
            deltas = torch.stack([model[name] - w for model in models])
            least = deltas.abs().kthvalue(n - round(density * n) + 1, dim=1, keepdim=True).values
            deltas.masked_fill_(deltas.abs() < least, 0.0)
            agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
            merged[name] = w + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
        return merged

    size = f"3 models of {4 * n:,}"
    yield Work("merge", "task arithmetic", size, lambda: task_arithmetic(base, models, weights=0.4), total)
    yield Work("merge", "TIES", size, lambda: ties(base, models, density=density), trimmed)


def _rotation(quick: bool) -> Iterator[Work]:
    from shiftkern.rotation import cayley_rotate, givens_rotate

    rows, d, side = (128, 256, 16) if quick else (2048, 1024, 16)
    x, theta = _numbers(rows, d), _numbers(d // 2 * (d.bit_length() - 1), seed=1)
    skew = 0.1 * _numbers(d // side, side * (side - 1) // 2, seed=2)
    upper = torch.triu_indices(side, side, 1)

    def butterfly() -> Tensor:
        cosine, sine = theta.cos(), theta.sin()
        y, stride, first = x, 1, 0
        while stride < d:
            low, high = y.view(rows, -1, 2, stride).unbind(2)
            c, s = (t[first : first + d // 2].view(-1, stride) for t in (cosine, sine))
            y = torch.stack((c * low - s * high, s * low + c * high), 2).view(rows, d)
            first, stride = first + d // 2, 2 * stride
        return y

    leaf, weights, gradient = x.clone().requires_grad_(), skew.clone().requires_grad_(), _numbers(rows, d, seed=3)

    def cayley() -> Tensor:
        square = torch.zeros(d // side, side, side).index_put((torch.arange(d // side)[:, None], *upper), weights)
        turn = torch.linalg.solve(torch.eye(side) - (square - square.mT), torch.eye(side) + (square - square.mT))
        return torch.einsum("nkc,krc->nkr", leaf.view(rows, -1, side), turn).reshape(rows, d)

    def both_ways(make: Callable[[], Tensor]) -> Run:
        return lambda: torch.autograd.grad(make(), [leaf, weights], gradient)

    size = f"{rows} x {d}"
    yield Work("rotation", "butterfly", size, lambda: givens_rotate(x, theta, topology="butterfly"), butterfly)
    yield Work(
        "rotation",
        "OFT, forward and backward",
        size,
        both_ways(lambda: cayley_rotate(leaf, weights, block_size=side)),
        both_ways(cayley),
        1e-3,
        1e-2,
    )


_FAMILIES = (_norm, _ot, _tta, _attention, _merge, _rotation)


def work(quick: bool = False) -> Iterator[Work]:
    """Make the pieces of work, one after the other; ``quick`` makes them small."""
    for family in _FAMILIES:
        yield from family(quick)


def compare(item: Work, rounds: int) -> Measured:
    """Check that both sides compute the same, then time them in turn; what is short is repeated within a round."""
    torch.testing.assert_close(item.ours(), item.torch(), rtol=item.rtol, atol=item.atol)
    sides = (item.ours, item.torch)
    samples: tuple[list[float], list[float]] = ([], [])
    repeats = []
    for run in sides:
        start = time.perf_counter()
        run()
        # At least 2 ms, so that the clock's own cost does not show.
        repeats.append(max(1, min(1000, int(0.002 / max(time.perf_counter() - start, 1e-7)))))
    for _ in range(rounds):
        for run, times, found in zip(sides, repeats, samples, strict=True):
            # Thread pools keep turning for a while after a call; let them come to rest.
            time.sleep(0.01)
            start = time.perf_counter()
            for _ in range(times):
                run()
            found.append((time.perf_counter() - start) / times * 1e3)
    ours, theirs = (statistics.median(found) for found in samples)
    return Measured(item.family, item.name, item.size, ours, theirs, theirs / ours)


def machine() -> dict[str, str]:
    """Say what the times depend on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    rows = {
        "CPU": f"{model}, {os.cpu_count()} cores",
        "threads": f"{shiftkern.get_num_threads()}, of torch {torch.get_num_threads()}",
        "SIMD": shiftkern.build_info()["simd"],
        "versions": f"shiftkern {shiftkern.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    if hasattr(os, "getloadavg"):
        # What else runs takes more from torch, whose threads wait for each other, than from one that works in blocks.
        rows["load"] = f"{os.getloadavg()[0]:.1f} in the last minute, before the bench"
    return rows


def show(quick: bool, rounds: int) -> int:
    """Print the machine, and a table that grows by one piece of work after the other.

    Returns
    -------
    int
        The exit code, 0.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console()
    for name, value in machine().items():
        console.print(f"{name.ljust(8)}  {value}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title=f"Medians of {rounds} rounds, taken in turn", title_justify="left", title_style="bold")
    for heading in ("Family", "Work", "Size"):
        table.add_column(heading)
    for heading in ("shiftkern ms", "torch ms", "Ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    ratios = []
    with Live(table, console=console, refresh_per_second=4):
        for item in work(quick):
            found = compare(item, rounds)
            ratios.append(found.ratio)
            times = f"{found.shiftkern_ms:.3g}", f"{found.torch_ms:.3g}"
            table.add_row(found.family, found.work, found.size, *times, f"{found.ratio:.1f}x")
    console.print(f"Ratio: how many times faster than plain torch; in the middle {statistics.median(ratios):.1f}x.")
    return 0
