"""What methods on task vectors share: options for each model, and the sum of what they keep of task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._states import check_finite

__all__ = [
    "NOTHING",
    "Signs",
    "arc",
    "balance",
    "between",
    "checked",
    "combine_kept",
    "election",
    "per_model",
    "rate",
    "task_vectors",
]

#: Whether signs are elected and by which sum, and what sums are divided by.
Signs = tuple[str, str]
#: Sums of magnitudes below this are no measure to rescale by.
NOTHING = 1e-12
#: Beyond this cosine, of either sign, an arc is not told from a line.
_COLLINEAR = 0.9995


def arc(cosine: float, t: float) -> list[float] | None:
    """Return the coefficients of two vectors at ``t`` on the arc between them; None where it is as good as a line."""
    if abs(cosine) > _COLLINEAR:
        return None
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def rate(op: str, name: str, value: object) -> float:
    """Return a number in [0, 1) as float."""
    result = _checks.non_negative(op, name, value)
    if result >= 1.0:
        _checks.refuse(op, name, "a number in [0, 1)", result)
    return result


def per_model(
    op: str, name: str, value: Any, models: int, check: Callable[[str, str, object], float] = _checks.fraction
) -> list[float]:
    """Return a number for each model, from a list or from one number for all."""
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [check(op, name, value)] * models
    if len(value) != models:
        _checks.refuse(op, name, f"a number, or {models} numbers, one for each model", f"{len(value)}")
    return [check(op, name, item) for item in value]


def election(op: str, then: object, elect: object, divide_by: object) -> Signs:
    """Return how what is kept is combined; only "ties" elects signs and divides."""
    if _checks.one_of(op, "then", then, ("linear", "ties")) == "linear":
        for name, value in (("elect", elect), ("divide_by", divide_by)):
            if value is not None:
                _checks.refuse(op, name, "None, as then='linear' adds up", repr(value))
        return "none", "none"
    return (
        _checks.one_of(op, "elect", "unweighted" if elect is None else elect, ("unweighted", "weighted")),
        _checks.one_of(op, "divide_by", "count" if divide_by is None else divide_by, ("count", "weight", "none")),
    )


def checked(op: str, name: str, found: tuple[Tensor, Tensor]) -> Tensor:
    """Return an operator's result for the tensor ``name``, unless it met NaN or an infinity."""
    result, bad = found
    check_finite(op, name, bad)
    return result


def task_vectors(op: str, name: str, base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return the finite ``model - base`` of each model, in the type that tensors are computed in."""
    wide = torch.promote_types(base.dtype, torch.float32)
    origin = base.to(wide)
    deltas = [(model.to(wide) - origin).contiguous() for model in models]
    for number, delta in enumerate(deltas):
        if not bool(delta.isfinite().all()):
            check_finite(op, name, torch.tensor(number))
    return deltas


def combine_kept(
    op: str, name: str, base: Tensor, kept: list[Tensor], weights: list[float], scale: float, signs: Signs
) -> Tensor:
    """Return ``base`` and the combination of task vectors, of which everything counts."""
    count = len(kept)
    everything = [0.0] * count, [torch.inf] * count, 0.0, [0] * count, 0
    combined = checked(op, name, ops.masked(None, kept, *everything, weights, [1.0] * count, scale, *signs, 1.0))
    return base.to(combined.dtype) + combined


def balance(base: Tensor, models: list[Tensor], low: list[float], wide: torch.dtype) -> Tensor:
    """Return how many entries of the sum of trimmed task vectors are positive, less how many are negative."""
    origin, total = base.to(wide), torch.zeros_like(base, dtype=wide)
    for model, least in zip(models, low, strict=True):
        delta = model.to(wide) - origin
        total += delta.where(delta.abs() >= least, 0.0)
    return total.sign_().sum(dtype=torch.int64)


def between(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return ``(1 - t) a + t b``, exact at both ends and where ``a`` is ``b``, and what was bad."""
    found: tuple[Tensor, Tensor] = ops.linear(a, [b], [t]) if t < 0.5 else ops.linear(b, [a], [1.0 - t])
    return found
