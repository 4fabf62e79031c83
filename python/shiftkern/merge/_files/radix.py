"""Exact magnitudes of a rank, for task vectors that are only seen in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["COUNTER_BYTES", "SCRATCH_BYTES", "count_digits", "kth_magnitudes"]

_DIGITS = 1 << 16
#: Elements whose temporary values stay in the cache.
_BLOCK = 1 << 17
#: Memory for the counters of one search.
COUNTER_BYTES = 8 * _DIGITS
#: Memory for the temporary values of a block.
SCRATCH_BYTES = 40 * _BLOCK

#: A pass over the task vectors: pieces of the base, and of all models.
Pieces = Callable[[], Iterable[tuple[Tensor, list[Tensor]]]]


def count_digits(
    base: Tensor, models: list[Tensor], wide: torch.dtype, shift: int, prefixes: list[int], counts: Tensor
) -> None:
    """Add to each model's row of ``counts`` how often which 16 bits, from bit ``shift`` on, are in ``|model - base|``.

    Only magnitudes whose bits above these equal the model's prefix count. Differences are of the type ``wide``. As
    magnitudes are not negative, the order of their bits, read as whole numbers, is that of their values.
    """
    whole: Any = np.uint64 if wide == torch.float64 else np.uint32
    sign, lowest = whole(1 << (8 * wide.itemsize - 1)), whole(_DIGITS - 1)
    rows = counts.numpy()
    for first in range(0, base.numel(), _BLOCK):
        start = _widened(base[first : first + _BLOCK], wide)
        for row, model, prefix in zip(rows, models, prefixes, strict=True):
            bits = np.subtract(_widened(model[first : first + _BLOCK], wide), start).view(whole)
            bits &= ~sign
            if shift + 16 < 8 * wide.itemsize:
                bits = bits[bits >> whole(shift + 16) == prefix]
            row += np.bincount((bits >> whole(shift) & lowest).astype(np.int64), minlength=_DIGITS)


def _widened(values: Tensor, wide: torch.dtype) -> Any:
    """See a block in a wider type, by NumPy: in torch, waiting for threads would take longer than so little work."""
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.uint8).numpy().view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32).astype(np.float64 if wide == torch.float64 else np.float32, copy=False)
    return values.numpy().astype(np.float64 if wide == torch.float64 else np.float32, copy=False)


def kth_magnitudes(
    pieces: Pieces, wide: torch.dtype, ranks: list[int], together: Callable[[Tensor], Tensor] = lambda counts: counts
) -> list[float]:
    """Return each model's ``ranks``-th largest magnitude; infinity for rank 0.

    ``pieces`` is gone through once for each 16 bits of the type ``wide``; ``together`` adds up counters of several
    processes that see different pieces.
    """
    remaining, prefixes = list(ranks), [0] * len(ranks)
    for shift in range(8 * wide.itemsize - 16, -1, -16):
        counts = torch.zeros((len(ranks), _DIGITS), dtype=torch.int64)
        for base, models in pieces():
            count_digits(base, models, wide, shift, prefixes, counts)
        for k, row in enumerate(together(counts)):
            # How many have this digit or a larger one.
            at_least = row.flip(0).cumsum(0)
            place = int(torch.searchsorted(at_least, remaining[k]))
            if remaining[k] == 0 or place == _DIGITS:
                continue
            digit = _DIGITS - 1 - place
            remaining[k] -= int(at_least[place] - row[digit])
            prefixes[k] = prefixes[k] << 16 | digit
    whole = torch.int64 if wide == torch.float64 else torch.int32
    values = torch.tensor(prefixes, dtype=whole).view(wide).tolist()
    return [math.inf if rank == 0 else value for rank, value in zip(ranks, values, strict=True)]
