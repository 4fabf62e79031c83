"""Sparse attention against dense attention with and without a mask, a window unfolded by hand, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from shiftkern.attention import (
    BlockMask,
    merge_state,
    reattention_capture,
    reattention_step,
    sliding_window_attention,
    sparse_attention,
)

from harness import Result, interleave

HEADS, WIDTH, BLOCK = 8, 64, 64
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0)


def tokens(n: int, seed: int = 0, heads: int = HEADS, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, width, generator=generator) for _ in range(3)]


def random_blocks(n: int, density: float) -> Tensor:
    """A boolean mask of whole 64 x 64 blocks, each row of blocks with the same number of kept ones."""
    rows = n // BLOCK
    kept = torch.rand(rows, rows, generator=torch.Generator().manual_seed(1)).argsort(1) < round(density * rows)
    return kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def unfolded_window(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """The window in torch: blocks of queries against the stretch of keys that their windows cover."""
    n, width = q.shape[2:]
    stretch = BLOCK + left + right
    k, v = (F.pad(t, (0, 0, left, right)).unfold(2, stretch, BLOCK).mT for t in (k, v))
    q = q.unflatten(2, (-1, BLOCK))
    query, key = torch.arange(BLOCK)[:, None], torch.arange(stretch)
    place = torch.arange(n // BLOCK)[:, None, None] * BLOCK + key - left
    seen = (key >= query) & (key <= query + left + right) & (place >= 0) & (place < n)
    scores = (q @ k.mT).mul_(width**-0.5).masked_fill_(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).flatten(2, 3)


def check(cases: dict[str, Callable[[], Any]], names: list[str]) -> None:
    """The cases must compute the same thing."""
    want = cases[names[0]]()
    for name in names[1:]:
        torch.testing.assert_close(cases[name](), want, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def window(n: int) -> Result:
    q, k, v = tokens(n)
    left, right = n // 64, n // 64 - 1
    offset = torch.arange(n) - torch.arange(n)[:, None]
    dense_mask = (offset >= -left) & (offset <= right)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    flex_mask = flex.create_block_mask(
        lambda b, h, i, j: (j - i >= -left) & (j - i <= right), None, None, n, n, device="cpu", BLOCK_SIZE=BLOCK
    )
    peers: dict[str, Callable[[], Any]] = {
        "SDPA with a mask": lambda: F.scaled_dot_product_attention(q, k, v, dense_mask),
        "window unfolded by hand": lambda: unfolded_window(q, k, v, left, right),
        "FlexAttention, compiled": lambda: compiled(q, k, v, block_mask=flex_mask),
    }
    cases: dict[str, Callable[[], Any]] = {
        "shiftkern": lambda: sliding_window_attention(q, k, v, (left, right)),
        **peers,
        "SDPA, dense": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    with torch.no_grad():
        check(cases, ["SDPA with a mask", "shiftkern", "window unfolded by hand", "FlexAttention, compiled"])
        timings = interleave(cases)
    asked = [("shiftkern", "SDPA, dense", 10.0), ("shiftkern", "SDPA with a mask", 10.0)]
    asked.append(("shiftkern", "window unfolded by hand", 3.0))
    return Result(
        "window of 3.1 %",
        f"N={n}, H={HEADS}, D={WIDTH}",
        timings,
        ["shiftkern"],
        list(peers),
        None,
        asked if n == 4096 else [],
    )


def blocks(n: int) -> Iterator[Result]:
    """All densities in one run, so that their times compare."""
    q, k, v = tokens(n)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    cases: dict[str, Callable[[], Any]] = {"SDPA, dense": lambda: F.scaled_dot_product_attention(q, k, v)}
    masks = {}
    for density in DENSITIES:
        dense_mask = random_blocks(n, density)
        masks[density] = mask = BlockMask.from_bool(dense_mask, BLOCK)
        kept = dense_mask[::BLOCK, ::BLOCK]
        order = kept.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
        # Every block that is kept is kept as a whole.
        flex_mask = flex.BlockMask.from_kv_blocks(
            torch.zeros_like(order[..., 0]),
            torch.zeros_like(order),
            kept.sum(1).int()[None, None],
            order,
            BLOCK,
            None,
            (n, n),
        )
        cases[f"{density}/shiftkern"] = lambda mask=mask: sparse_attention(q, k, v, mask)
        cases[f"{density}/SDPA with a mask"] = lambda m=dense_mask: F.scaled_dot_product_attention(q, k, v, m)
        cases[f"{density}/FlexAttention, compiled"] = lambda m=flex_mask: compiled(q, k, v, block_mask=m)
        with torch.no_grad():
            check(cases, [f"{density}/{case}" for case in ("SDPA with a mask", "shiftkern", "FlexAttention, compiled")])
    with torch.no_grad():
        timings = interleave(cases, 5)
    dense = timings["SDPA, dense"].median
    peers = ["SDPA with a mask", "FlexAttention, compiled", "SDPA, dense"]
    for density, mask in masks.items():
        own = {case: timings[f"{density}/{case}"] for case in ("shiftkern", *peers[:2])}
        # At most 1.5 times the kept share of the dense time, and a millisecond.
        asked = [("shiftkern", "SDPA, dense", dense / (1.5 * mask.density * dense + 1.0))]
        yield Result(
            "random blocks",
            f"N={n}, {100 * density:g} % kept",
            {**own, "SDPA, dense": timings["SDPA, dense"]},
            ["shiftkern"],
            peers,
            None,
            asked if density < 0.5 else [],
        )


def backward(n: int, density: float) -> Result:
    dense_mask = random_blocks(n, density)
    mask = BlockMask.from_bool(dense_mask, BLOCK)
    inputs = [t.requires_grad_() for t in tokens(n)]
    gradient = torch.randn_like(inputs[0])
    cases: dict[str, Callable[[], Any]] = {}
    for name, attend in (
        ("shiftkern", lambda q, k, v: sparse_attention(q, k, v, mask)),
        ("SDPA with a mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dense_mask)),
    ):
        out = attend(*inputs)
        cases[name] = lambda out=out: torch.autograd.grad(out, inputs, gradient, retain_graph=True)
    for ours, theirs in zip(cases["shiftkern"](), cases["SDPA with a mask"](), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-3)
    return Result(
        "backward, random blocks",
        f"N={n}, {100 * density:g} % kept",
        interleave(cases, 5),
        ["shiftkern"],
        ["SDPA with a mask"],
        None,
        [("shiftkern", "SDPA with a mask", 5.0)] if n == 4096 else [],
    )


def reattention(n: int) -> Result:
    q, k, v = tokens(n)
    mask = BlockMask.sliding_window(n, n, n // 64, n // 64 - 1)
    full, state = reattention_capture(q, k, v, mask)
    cases: dict[str, Callable[[], Any]] = {
        f"step, {mode}": lambda mode=mode: reattention_step(q, k, v, mask, state, mode=mode, ramp=0.0)
        for mode in ("rho", "merge", "residual")
    }
    cases["capture"] = lambda: reattention_capture(q, k, v, mask, mode="rho")
    cases["SDPA, dense"] = lambda: F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(full, cases["SDPA, dense"](), atol=2e-5, rtol=1e-4)
    check(cases, ["SDPA, dense", "step, rho", "step, merge", "step, residual"])
    ours = [name for name in cases if name != "SDPA, dense"]
    asked = [(name, "SDPA, dense", 1 / 1.6 if name == "capture" else 8.0) for name in ours]
    return Result(
        "Re-ttention at 3.1 %",
        f"N={n}",
        interleave(cases, 5),
        ours,
        ["SDPA, dense"],
        None,
        asked if n == 4096 else [],
    )


def merging(n: int) -> Result:
    a, b, _ = tokens(n)
    lse_a, lse_b = a.mean(-1), b.mean(-1)

    def plain() -> Tensor:
        total = torch.logaddexp(lse_a, lse_b)
        return a * (lse_a - total).exp()[..., None] + b * (lse_b - total).exp()[..., None]

    cases = {"shiftkern": lambda: merge_state(a, lse_a, b, lse_b)[0], "torch": plain}
    check(cases, ["torch", "shiftkern"])
    return Result("merge_state", f"N={n}, H={HEADS}, D={WIDTH}", interleave(cases), ["shiftkern"], ["torch"])


def results() -> Iterator[Result]:
    for n in (1024, 4096):
        yield window(n)
    yield from blocks(4096)
    for n in (1024, 4096):
        yield backward(n, 0.05 if n == 4096 else 0.0625)
    for n in (1024, 4096):
        yield reattention(n)
    for n in (1024, 4096):
        yield merging(n)


def plot_density(results: list[Result], target: Path) -> None:
    """Draw time against the share of kept pairs, which should be a straight line through the origin."""
    sweep = [r for r in results if r.work == "random blocks"]
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    kept = [100 * density for density in DENSITIES]
    for case, colour in (("shiftkern", "#0072b2"), ("SDPA with a mask", "#d55e00"), ("SDPA, dense", "#777777")):
        times = [r.timings[case].median for r in sweep]
        axes.plot(kept, times, "o-" if case == "shiftkern" else ".--", color=colour, label=case)
    slope = sweep[-1].timings["shiftkern"].median / kept[-1]
    axes.plot([0, 100], [0, 100 * slope], ":", color="#0072b2", linewidth=1, label="proportional to what is kept")
    axes.set(
        xlim=(0, 105), xlabel="pairs kept (%)", ylabel="milliseconds", title="Attention over random 64 x 64 blocks"
    )
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=110)
    plt.close(figure)
