"""Class labels: whole numbers, which the crossing for real numbers would turn into floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks

__all__ = ["class_labels"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def class_labels(op: str, name: str, value: Any, other: str, like: Any, shape: tuple[int, ...], device: Any) -> Tensor:
    """Return labels as an int64 tensor of ``shape``; they must be a tensor exactly where ``like`` is one."""
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor):
            _checks.refuse_type(op, name, f"a torch.Tensor, as '{other}' is one", _checks.describe(value))
        labels = _checks.tensor(op, name, value, shape=shape, dtypes=_WHOLE, device=device)
        return labels.to(torch.int64)
    if isinstance(value, (Tensor, str, bytes, dict, set)) or not hasattr(value, "__len__"):
        expected = f"a numpy.ndarray of integers, as '{other}' is no torch.Tensor"
        _checks.refuse_type(op, name, expected, _checks.describe(value))
    try:
        array = np.asarray(value)
    except ValueError:
        _checks.refuse_type(op, name, "a sequence of integers of equal lengths", _checks.describe(value))
    if array.dtype.kind not in "iu" and array.size:
        _checks.refuse_type(op, name, "an array of integers", f"dtype {array.dtype}")
    if array.shape != shape:
        _checks.refuse(op, name, f"shape {shape}", f"shape {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64).copy())
