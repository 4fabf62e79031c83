"""Batches of examples, as methods that look at data before they are injected take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shiftkern import _checks

__all__ = ["batches", "examples"]


def batches(op: str, data: Any, quiet: bool) -> Iterator[tuple[Any, int]]:
    """Go through batches, with the number of examples of each; tqdm shows how many are done."""
    from tqdm import tqdm

    if isinstance(data, (Tensor, str, dict)) or not isinstance(data, Iterable):
        _checks.refuse_type(op, "data", "an iterable of batches", _checks.describe(data))
    seen = 0
    with tqdm(unit="example", desc=op, disable=quiet) as bar:
        for batch in data:
            leaves = pytree.tree_leaves(batch)
            sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and _dense(leaf)}
            if len(sizes) != 1 or not all(isinstance(leaf, Tensor) and _dense(leaf) for leaf in leaves):
                expected = "batches of tensors whose first dimension is the same number of examples"
                _checks.refuse(op, "data", expected, ", ".join(map(_checks.describe, leaves)) or "an empty batch")
            size = sizes.pop()
            yield batch, size
            seen += size
            bar.update(size)
    if not seen:
        _checks.refuse(op, "data", "at least one example", "none")


def _dense(leaf: Tensor) -> bool:
    """Whether a tensor has examples along its first dimension, and can be cut there."""
    return not leaf.is_nested and leaf.layout is torch.strided and leaf.dim() > 0


def examples(batch: Any, start: int, stop: int) -> Any:
    """Return some of a batch's examples as a batch."""
    return pytree.tree_map(lambda leaf: leaf[start:stop], batch)
