"""Parameter dicts as the aligning functions take them: torch or NumPy, of any shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._states import _from_numpy as from_numpy

__all__ = ["accept_params"]


def accept_params(op: str, **named: Any) -> tuple[list[dict[str, Tensor]], Callable[[Mapping[str, Tensor]], Any]]:
    """See dicts of tensors, or of NumPy arrays, as dicts of tensors; the second result turns tensors back.

    Nothing is copied but what torch cannot hold as it lies in memory. Values must be finite.
    """
    kind: type | None = None
    found = []
    for argument, params in named.items():
        if not isinstance(params, Mapping):
            _checks.refuse_type(op, argument, "a mapping of names to tensors or arrays", _checks.describe(params))
        if not params:
            _checks.refuse(op, argument, "at least one tensor", "an empty mapping")
        tensors = {}
        for name, value in params.items():
            if not isinstance(name, str):
                _checks.refuse_type(op, argument, "names that are strings", _checks.describe(name))
            where = f"{argument}['{name}']"
            if not isinstance(value, (Tensor, np.ndarray)):
                _checks.refuse_type(op, where, "a torch.Tensor or a numpy.ndarray", _checks.describe(value))
            if kind is None:
                kind = Tensor if isinstance(value, Tensor) else np.ndarray
            if not isinstance(value, kind):
                other = "torch.Tensor" if kind is Tensor else "numpy.ndarray"
                _checks.refuse_type(op, where, f"a {other}, as the first value is one", _checks.describe(value))
            tensors[name] = _tensor(op, where, value)
        found.append(tensors)
    return found, _arrays if kind is np.ndarray else dict


def _tensor(op: str, where: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = from_numpy(op, where.partition("[")[0], where, value)
    if value.layout is not torch.strided or value.is_complex():
        _checks.refuse_type(op, where, "a dense tensor of real numbers", f"{value.layout}, {value.dtype}")
    if value.is_floating_point() and not bool(torch.isfinite(value.detach()).all()):
        _checks.refuse(op, where, "finite numbers", "NaN or infinity")
    tensor: Tensor = value
    return tensor


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
