"""What both isotropic mergers share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._states import States

__all__ = ["among", "kept_directions"]


def among(op: str, argument: str, names: Any, states: States) -> set[str]:
    """Return names of tensors as a set."""
    if isinstance(names, str) or not isinstance(names, (Sequence, set, frozenset)):
        _checks.refuse_type(op, argument, "a list of names of tensors", _checks.describe(names))
    unknown = [name for name in names if name not in states.base]
    if unknown:
        _checks.refuse(op, argument, "names of tensors of the base", f"unknown {unknown}")
    return set(names)


def kept_directions(op: str, name: str, values: Tensor, rank_tol: float | None, shape: Sequence[int]) -> Tensor:
    """Return which singular values count; warn of directions that nothing but rounding determines."""
    largest = values.max()
    if rank_tol is not None:
        return values > rank_tol * largest
    rounding = max(shape) * torch.finfo(values.dtype).eps * largest
    missing = int((values <= rounding).sum())
    if missing and float(largest) > 0.0:
        message = (
            f"{op}: {missing} of {values.numel()} directions of {name!r} are arbitrary, as the task vectors do not "
            "reach them, and get the mean singular value all the same; pass rank_tol=1e-4 or so to leave them out"
        )
        warnings.warn(message, UserWarning, stacklevel=5)
    return torch.ones_like(values, dtype=torch.bool)
