"""Masks that pass their gradient on to the scores that they were chosen by."""

from __future__ import annotations

from torch import Tensor

__all__ = ["straight_through"]


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """Return ``mask`` in the type of ``scores``, with the gradient of ``scores``."""
    # The difference is 0 and its gradient 1.
    return mask.to(scores.dtype) + (scores - scores.detach())
