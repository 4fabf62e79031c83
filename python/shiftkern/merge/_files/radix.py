"""Exact magnitudes of a rank, for task vectors that are only seen in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from shiftkern._ops import merge as ops

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
    if torch.promote_types(base.dtype, torch.float32) == wide:
        ops.count_digits_(base, models, shift, prefixes, counts)
        return
    for first in range(0, base.numel(), _BLOCK):
        start, *others = (tensor[first : first + _BLOCK].to(wide) for tensor in (base, *models))
        ops.count_digits_(start, others, shift, prefixes, counts)


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
