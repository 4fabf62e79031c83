"""Attention over kept pairs as one writes it down: float64, one query at a time, nothing but its kept keys looked at.

Beside each result stands how far a computation may be from it that rounds to ``u`` after each operation and adds in
order: the terms of the error analysis, none of them measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern.attention import BlockMask

from helpers.strategies import computing, lay_out, make, roundoff

Array = np.ndarray

#: Layouts of (B, H, N, D): what models make (heads split off, q, k and v in one) and what they do not.
LAYOUTS = ("contiguous", "heads last", "fused", "fortran", "channels apart", "tokens apart", "offset")


@dataclass
class Expected:
    """Results and, with the same names in ``far``, bounds on the distance from them."""

    out: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array
    far: dict[str, Array]

    def check(self, **found: Tensor) -> None:
        """Hold tensors to the results of the same names."""
        for name, value in found.items():
            want, most = getattr(self, name), self.far[name]
            got = value.detach().double().numpy()
            assert got.shape == want.shape, name
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
            endless = np.isinf(want)
            np.testing.assert_array_equal(got[endless], want[endless], err_msg=name)
            fine = np.isfinite(want)
            excess = np.abs(got[fine] - want[fine]) - most[fine]
            assert excess.size == 0 or excess.max() <= 0, f"{name} is beyond its bound by {excess.max()}"


def _plain(x: Any) -> Array:
    return x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    scale: float | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> Expected:
    """Output, log-sum-exp and gradients; ``keep`` is bool and broadcasts to (B, H, N, M)."""
    u, stored = roundoff(computing(q.dtype)), 0.0
    if q.dtype in (torch.float16, torch.bfloat16):
        stored = roundoff(q.dtype)
    least = torch.finfo(q.dtype).smallest_normal * (stored or u)
    # Weights below this become 0.
    small = torch.finfo(computing(q.dtype)).smallest_normal
    (batch, heads, count, width), groups = q.shape, k.shape[1]
    kept = np.broadcast_to(keep.numpy(), (batch, heads, count, k.shape[2]))
    scale = 1 / math.sqrt(max(width, 1)) if scale is None else scale
    Q, K, V = _plain(q), _plain(k), _plain(v)
    value_width = V.shape[3]
    G = np.zeros((batch, heads, count, value_width)) if grad_out is None else _plain(grad_out)
    E = np.zeros((batch, heads, count)) if grad_lse is None else _plain(grad_lse)
    r = Expected(np.zeros_like(G), np.full_like(E, -np.inf), *(np.zeros_like(t) for t in (Q, K, V)), {})
    far = r.far = {name: np.zeros_like(getattr(r, name)) for name in ("out", "lse", "dq", "dk", "dv")}
    with np.errstate(all="ignore"):
        for b, h, i in np.ndindex(batch, heads, count):
            (at,) = np.nonzero(kept[b, h, i])
            if not len(at):
                continue
            g = h * groups // heads
            query, keys, values, up, down = Q[b, h, i], K[b, g, at], V[b, g, at], G[b, h, i], E[b, h, i]
            s = scale * (keys @ query)
            peak = s.max()
            w = np.exp(s - peak)
            p = w / w.sum()
            out, lse = p @ values, peak + np.log(w.sum())
            slope = p * (values @ up - out @ up + down)
            r.out[b, h, i], r.lse[b, h, i] = out, lse
            r.dq[b, h, i] = scale * slope @ keys
            np.add.at(r.dk[b, g], at, scale * slope[:, None] * query)
            np.add.at(r.dv[b, g], at, p[:, None] * up)

            # An exponent is a sum of `width` terms of a factor of two roundings, less a rounded level; the other terms
            # are the exponential and the sum of the weights.
            exponent = abs(scale) * (np.abs(keys) @ np.abs(query)).max()
            wrong = u * ((width + 6) * exponent + 2 * abs(lse) + len(at) + 16)
            far["out"][b, h, i] = (2 * wrong * p + small) @ np.abs(values) + stored * np.abs(out) + least
            far["lse"][b, h, i] = wrong + u * abs(lse)
            # The sums of the gradients: `value_width` terms in a slope, and each row's in the last product.
            wrong = 2 * wrong + u * (value_width + len(at) + count * heads + 16)
            inner = np.abs(out) @ np.abs(up)
            off = (wrong * p + small) * (np.abs(values) @ np.abs(up) + inner + abs(down)) + stored * p * inner
            far["dq"][b, h, i] = abs(scale) * off @ np.abs(keys)
            np.add.at(far["dk"][b, g], at, abs(scale) * off[:, None] * np.abs(query))
            np.add.at(far["dv"][b, g], at, (wrong * p + small)[:, None] * np.abs(up))
    for name in ("dq", "dk", "dv"):
        far[name] += (stored or u) * np.abs(getattr(r, name)) + least
    return r


def problem(
    batch: int = 2,
    heads: int = 3,
    n_q: int = 70,
    n_k: int = 90,
    width: int = 16,
    value_width: int | None = None,
    *,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    groups = heads if groups is None else groups
    shapes = (
        (batch, heads, n_q, width),
        (batch, groups, n_k, width),
        (batch, groups, n_k, width if value_width is None else value_width),
    )
    return tuple(make(shape, dtype, 10 * seed + i, mean=0.0) for i, shape in enumerate(shapes))  # type: ignore[return-value]


def random_mask(
    n_q: int, n_k: int, block: tuple[int, int], maps: tuple[int, int] = (1, 1), seed: int = 0, empty: float = 0.5
) -> tuple[BlockMask, Tensor]:
    """Blocks that are empty, full, or kept in part; as a mask, and dense."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-n // side) for n, side in zip((n_q, n_k), block, strict=True))
    kind = torch.rand((*maps, rows, columns), generator=generator)
    spread = kind.repeat_interleave(block[0], 2)[:, :, :n_q].repeat_interleave(block[1], 3)[..., :n_k]
    pairs = torch.rand((*maps, n_q, n_k), generator=generator) < 0.4
    dense = (spread > empty) & ((spread > 0.5 + 0.5 * empty) | pairs)
    return BlockMask.from_bool(dense, block), dense


def arranged(x: Tensor, layout: str) -> Tensor:
    """Return a tensor equal to ``x`` (B, H, N, D) in another layout; what lies between its elements is NaN."""
    batch, heads, tokens, width = x.shape
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":
        memory = x.new_full((batch, tokens, 3, heads, width), torch.nan)
        memory[:, :, 1] = x.transpose(1, 2)
        return memory[:, :, 1].transpose(1, 2)
    if layout == "fortran":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "channels apart":
        return lay_out(x, "sliced")
    if layout == "tokens apart":
        memory = x.new_full((batch, heads, 2 * tokens + 1, width + 3), torch.nan)
        memory[:, :, 1::2, 2:-1] = x
        return memory[:, :, 1::2, 2:-1]
    return lay_out(x, layout)
