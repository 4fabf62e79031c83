"""Weights of measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks

__all__ = ["check_weights", "weights_or_none"]


def weights_or_none(weights: Any) -> Any:
    """None for None and for anything empty, which POT takes for uniform weights."""
    if isinstance(weights, Tensor):
        return None if weights.numel() == 0 else weights
    # An array without dimensions has a method __len__, which raises.
    sized = not isinstance(weights, np.ndarray) or weights.ndim > 0
    return None if sized and hasattr(weights, "__len__") and len(weights) == 0 else weights


def check_weights(op: str, name: str, weights: Any, size: int, device: torch.device) -> Tensor:
    """Return a float tensor ``(size,)`` of finite weights, none negative and not all zero."""
    _checks.tensor(op, name, weights, shape=(size,), device=device)
    plain = weights.detach()
    if not bool(torch.isfinite(plain).all()) or bool((plain < 0).any()) or not bool((plain > 0).any()):
        _checks.refuse(op, name, "finite weights >= 0, not all of them 0", _checks.describe(plain.tolist()))
    return weights  # type: ignore[no-any-return]
