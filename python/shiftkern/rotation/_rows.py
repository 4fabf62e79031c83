"""What all rotations do with their input: rows of coordinates in, rows of the same shape out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks


def accept_x(op: str, x: Any) -> Tensor:
    """Check the tensor that is rotated along its last dimension."""
    accepted = _checks.tensor(op, "x", x, min_dim=1)
    if accepted.shape[-1] == 0:
        _checks.refuse(op, "x", "at least one coordinate", f"shape {tuple(accepted.shape)}")
    return accepted


def as_rows(x: Tensor) -> Tensor:
    """See ``(..., d)`` as a matrix ``(rows, d)``, also where there are no rows."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def widened(parameters: Tensor, x: Tensor) -> Tensor:
    """See parameters in a type as wide as that ``x`` is computed in, so that only what they are is rounded."""
    return parameters.to(torch.promote_types(torch.promote_types(parameters.dtype, x.dtype), torch.float32))


def check_divides(op: str, name: str, size: int, width: int, what: str = "the width of x") -> None:
    """Refuse a block size that does not divide the width."""
    if width % size != 0:
        _checks.refuse(op, name, f"a divisor of {what}, {width}", size)
