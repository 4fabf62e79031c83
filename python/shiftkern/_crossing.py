"""The one boundary between torch tensors and the extension.

The extension reads and writes memory it is shown as ``(address, number of elements, type code)``. Only this module
makes such tuples, and only of contiguous CPU tensors; callers keep the tensor alive until the extension returns.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from shiftkern._runtime import get_num_threads as threads

__all__ = ["View", "optional_view", "threads", "view"]

View: TypeAlias = tuple[int, int, int]

_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.bool: 4,
    torch.uint8: 4,
    torch.int64: 5,
}


def view(tensor: Tensor) -> View:
    """Describe the memory of a contiguous CPU tensor (in any dense memory format)."""
    return tensor.data_ptr(), tensor.numel(), _CODES[tensor.dtype]


def optional_view(tensor: Tensor | None) -> View | None:
    """Describe a small per-channel tensor, or nothing."""
    return None if tensor is None else view(tensor)
