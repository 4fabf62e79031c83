"""The one boundary: tensors to the extension, NumPy arrays to tensors.

The extension reads and writes memory it is shown as ``(address, number of elements, type code)``. Only this module
makes such tuples, and only of CPU tensors without gaps, or with strides beside them; callers keep the tensor alive
until the extension returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from shiftkern._checks import describe, refuse_type
from shiftkern._runtime import get_num_threads as threads

__all__ = [
    "TokensView",
    "View",
    "accept",
    "from_numpy",
    "optional_view",
    "strided",
    "threads",
    "tokens_view",
    "type_code",
    "view",
]

View: TypeAlias = tuple[int, int, int]
#: Memory from the first to the last element, shape, and strides but for that of the channels, which is 1.
TokensView: TypeAlias = tuple[View, tuple[int, ...], tuple[int, ...]]

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


def strided(tensor: Tensor) -> Tensor:
    """Return a (B, H, N, D) tensor whose channels lie side by side: itself where they do."""
    return tensor if tensor.shape[3] <= 1 or tensor.stride(3) == 1 else tensor.contiguous()


def tokens_view(tensor: Tensor) -> TokensView:
    """Describe the memory of a (B, H, N, D) tensor from :func:`strided`; other axes may have any strides."""
    shape, strides = tuple(tensor.shape), tensor.stride()[:3]
    span = 0
    if tensor.numel():
        span = shape[3] + sum((size - 1) * stride for size, stride in zip(shape[:3], strides, strict=True))
    return (tensor.data_ptr(), span, _CODES[tensor.dtype]), shape, strides


def type_code(tensor: Tensor) -> int:
    """Return the extension's number for a tensor's dtype."""
    return _CODES[tensor.dtype]


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


def accept(op: str, **values: Any) -> tuple[tuple[Any, ...], Callable[[Any], Any]]:
    """See arguments that are all tensors, or all NumPy arrays or sequences of numbers, as tensors.

    Integers from NumPy or sequences become float64; None stays. The second result turns a tensor into the kind that
    came in.
    """
    given = {name: value for name, value in values.items() if value is not None}
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    if tensors:
        for name, value in given.items():
            if not isinstance(value, Tensor):
                refuse_type(op, name, f"a torch.Tensor, as '{tensors[0]}' is one", describe(value))
        return tuple(values.values()), _as_it_is
    return tuple(_from_array_like(op, name, value) for name, value in values.items()), _to_numpy


def _from_array_like(op: str, name: str, value: Any) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes, dict, set)) or not hasattr(value, "__len__"):
        refuse_type(op, name, "a torch.Tensor or a numpy.ndarray", describe(value))
    try:
        array = np.asarray(value)
    except ValueError:
        refuse_type(op, name, "a sequence of numbers of equal lengths", describe(value))
    if array.dtype.kind in "iu" or array.size == 0:
        array = array.astype(np.float64)
    return from_numpy(op, name, array)


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _to_numpy(value: Tensor) -> Any:
    return value.detach().numpy()
