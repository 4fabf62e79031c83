"""The one boundary: tensors to the extension, NumPy arrays to tensors.

The extension reads and writes memory it is shown as ``(address, number of elements, type code)``. Only this module
makes such tuples, and only of contiguous CPU tensors; callers keep the tensor alive until the extension returns.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from shiftkern._checks import refuse_type
from shiftkern._runtime import get_num_threads as threads

__all__ = ["View", "from_numpy", "optional_view", "threads", "view"]

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


def from_numpy(op: str, name: str, array: np.ndarray[Any, Any]) -> Tensor:
    """See a NumPy array as a tensor: without a copy where torch can hold it as it lies in memory."""
    native = array.dtype.newbyteorder("=")
    if native not in (np.float32, np.float64, np.float16):
        refuse_type(op, name, "an array of dtype float16, float32 or float64", f"dtype {array.dtype}")
    # torch knows neither foreign byte orders nor negative strides nor read-only memory.
    fits = array.dtype.isnative and array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if fits else array.astype(native, order="C"))
