"""Argument checks that speak the library's one error language."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from shiftkern.errors import ArgumentError, ArgumentTypeError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def refuse(op: str, name: str, expected: str, got: object) -> NoReturn:
    """Raise the error for a value that does not fit."""
    raise ArgumentError(f"{op}: argument '{name}': expected {expected}, got {got}")


def refuse_type(op: str, name: str, expected: str, got: object) -> NoReturn:
    """Raise the error for a type that does not fit."""
    raise ArgumentTypeError(f"{op}: argument '{name}': expected {expected}, got {got}")


def describe(value: object) -> str:
    """Say what a value is, shortly."""
    if isinstance(value, Tensor) and value.is_nested:
        return f"a nested {value.dtype} tensor"
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def number(op: str, name: str, value: object) -> float:
    """Return a finite real number as float; booleans and tensors with several elements are refused."""
    if isinstance(value, Tensor) and value.device.type != "meta" and value.numel() == 1:
        value = value.item()
    # NumPy's complex numbers convert to float, dropping the imaginary part.
    if isinstance(value, (bool, complex, Tensor, str)) or not hasattr(value, "__float__"):
        refuse_type(op, name, "a number", describe(value))
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        refuse_type(op, name, "a number", describe(value))
    # Not math.isfinite, which torch.compile cannot trace where numbers are symbolic.
    if not -math.inf < result < math.inf:
        refuse(op, name, "a finite number", result)
    return result


def fraction(op: str, name: str, value: object) -> float:
    """Return a number in [0, 1] as float."""
    result = number(op, name, value)
    if not 0.0 <= result <= 1.0:
        refuse(op, name, "a number in [0, 1]", result)
    return result


def positive(op: str, name: str, value: object) -> float:
    """Return a number > 0 as float."""
    result = number(op, name, value)
    if result <= 0.0:
        refuse(op, name, "a number > 0", result)
    return result


def non_negative(op: str, name: str, value: object) -> float:
    """Return a number >= 0 as float."""
    result = number(op, name, value)
    if result < 0.0:
        refuse(op, name, "a number >= 0", result)
    return result


def integer(op: str, name: str, value: object, least: int) -> int:
    """Return a whole number from ``least`` to 2**63 - 1; floats and booleans are refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        refuse_type(op, name, f"an integer >= {least}", describe(value))
    try:
        result = operator.index(value)
    except TypeError:
        refuse_type(op, name, f"an integer >= {least}", describe(value))
    if result < least:
        refuse(op, name, f"an integer >= {least}", result)
    if result >= 1 << 63:
        refuse(op, name, "an integer below 2**63", result)
    return result


def generator(op: str, name: str, value: object) -> torch.Generator | None:
    """Return a generator, or None for none."""
    if value is not None and not isinstance(value, torch.Generator):
        refuse_type(op, name, "a torch.Generator", describe(value))
    return value


def process_group(op: str, name: str, value: object) -> None:
    """Refuse what is no group of processes, nor None for all of them."""
    if value is not None and not isinstance(value, torch.distributed.ProcessGroup):
        refuse_type(op, name, "a torch.distributed.ProcessGroup", describe(value))


def threshold(op: str, name: str, value: object) -> float | None:
    """Return a number >= 0, infinity included, or None."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return value
    return non_negative(op, name, value)


def positive_int(op: str, name: str, value: object) -> int:
    """Return a whole number >= 1."""
    return integer(op, name, value, 1)


def seed(op: str, name: str, value: object) -> int:
    """Return a whole number that a generator takes as seed."""
    return integer(op, name, value, 0)


def flag(op: str, name: str, value: object) -> bool:
    """Return a boolean; anything else is refused."""
    if not isinstance(value, bool):
        refuse_type(op, name, "True or False", describe(value))
    return value


def one_of(op: str, name: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str):
        refuse_type(op, name, f"one of {', '.join(map(repr, choices))}", describe(value))
    if value not in choices:
        refuse(op, name, f"one of {', '.join(map(repr, choices))}", repr(value))
    return value


def tensor(
    op: str,
    name: str,
    value: Any,
    *,
    shape: Sequence[int] | None = None,
    min_dim: int = 0,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> Tensor:
    """Return ``value`` if it is a dense tensor of one of ``dtypes`` with the given shape and device."""
    if not isinstance(value, Tensor):
        refuse_type(op, name, "a torch.Tensor", describe(value))
    if value.is_nested:
        refuse_type(op, name, "a dense (strided) tensor", "a nested one")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        refuse_type(op, name, f"a tensor of dtype {names}", describe(value))
    if value.layout is not torch.strided:
        refuse_type(op, name, "a dense (strided) tensor", f"layout {value.layout}")
    if value.dim() < min_dim:
        refuse(op, name, f"at least {min_dim} dimensions", describe(value))
    if shape is not None and tuple(value.shape) != tuple(shape):
        refuse(op, name, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        refuse(op, name, f"a tensor on {device}, as the other arguments", f"one on {value.device}")
    return value


def per_channel(op: str, name: str, value: Any, channels: int, device: torch.device) -> Tensor:
    """Return a float tensor of shape (C,)."""
    return tensor(op, name, value, shape=(channels,), device=device)


def optional_per_channel(op: str, name: str, value: Any, channels: int, device: torch.device) -> Tensor | None:
    """Return a float tensor of shape (C,), or None."""
    return None if value is None else per_channel(op, name, value, channels, device)


def writable(op: str, name: str, value: Tensor) -> None:
    """Refuse a tensor several of whose elements share memory, or whose memory holds its negative."""
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        expected = "a tensor with memory of its own for each element"
        refuse(op, name, expected, f"an expanded one of strides {value.stride()}")
    # A tracer cannot ask this; what it hands to operators has memory of its own.
    if not torch.compiler.is_compiling() and value.is_neg():
        refuse(
            op, name, "a tensor whose memory holds its numbers", "a negative view, as of the imaginary part of conj()"
        )
