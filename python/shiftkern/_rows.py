"""Directions: rows scaled to unit length."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["unit_rows"]


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row to unit length; a zero row has no direction and stays zero, as does its gradient.

    The largest magnitude is divided out first, so that no square overflows or vanishes.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    empty = largest == 0
    scaled = x / largest.masked_fill(empty, 1.0)
    # The norm of a scaled row is at least 1, but for empty rows, which are left out.
    norm = torch.linalg.vector_norm(scaled.masked_fill(empty, 1.0), dim=-1, keepdim=True)
    unit: Tensor = (scaled / norm).masked_fill(empty, 0.0)
    return unit
