"""State dicts that belong together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern._checks import FLOATS, describe, number, refuse, refuse_type

__all__ = ["States", "accept_states", "check_finite", "round_to", "stream_keys", "weights_for"]


@dataclass
class States:
    """A base and models with the same names and shapes, as tensors."""

    op: str
    base: dict[str, Tensor]
    models: list[dict[str, Tensor]]
    #: Names of the tensors to merge; the others hold integers or booleans.
    floating: list[str]
    _numpy: bool

    def each(self) -> Any:
        """Go through the tensors to merge: name, base, models; all of one dtype, detached."""
        for name in self.floating:
            tensors = [self.base[name], *(model[name] for model in self.models)]
            dtype = tensors[0].dtype
            for tensor in tensors[1:]:
                dtype = torch.promote_types(dtype, tensor.dtype)
            base, *models = (tensor.detach().to(dtype) for tensor in tensors)
            yield name, base, models

    def merge(self, combine: Callable[[str, Tensor, list[Tensor]], Tensor]) -> dict[str, Any]:
        """Return ``combine(name, base, models)`` for each tensor to merge, and the others from the base."""
        return self.back({name: combine(name, base, models) for name, base, models in self.each()})

    def back(self, merged: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return all tensors in order, in the dtypes of the base, as the kind that came; the rest is the base's.

        What its dtype cannot hold is refused.
        """
        whole = {}
        for name, tensor in self.base.items():
            if name not in merged:
                whole[name] = tensor.detach().clone()
                continue
            whole[name] = result = round_to(merged[name], tensor.dtype)
            # A sum is the quickest look at all; it may overflow where no entry does.
            if not math.isfinite(result.sum(dtype=_sums(result.dtype))) and not bool(result.isfinite().all()):
                expected = f"a result of tensor {name!r} that {str(tensor.dtype).removeprefix('torch.')} can hold"
                refuse(self.op, "models", expected, "an overflow")
        return {name: tensor.numpy() for name, tensor in whole.items()} if self._numpy else whole


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of a type, once; torch goes to half types by way of float32."""
    if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    # In float32, what is between two numbers becomes the one whose last bit is odd, so that no half is met by chance.
    near = values.float()
    bits = near.view(torch.int32)
    below = bits - (near.abs().double() > values.abs()).int()
    odd = torch.where(near.double() == values, bits, below | 1).view(torch.float32)
    return torch.where(values.isfinite(), odd, near).to(dtype)


def accept_states(op: str, base: Any, models: Any, name: str = "models", base_name: str = "base") -> States:
    """See state dicts of tensors, or of NumPy arrays, as tensors; all with the names and shapes of ``base``.

    Errors call the arguments ``name`` and ``base_name``; where these are the same, ``base`` is the first model.
    """
    first_of_all = "model 0" if base_name == name else "the base" if base_name == "base" else f"'{base_name}'"
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        refuse_type(
            op, name, "a list of state dicts", describe(models) if not isinstance(models, Mapping) else "a dict"
        )
    if not models:
        refuse(op, name, "at least one model", "none")
    states = []
    kinds: set[bool] = set()
    for number_, (argument, state) in enumerate([(base_name, base), *((name, model) for model in models)]):
        where = f" of model {max(0, number_ - 1)}" if argument == name else ""
        if not isinstance(state, Mapping):
            refuse_type(op, argument, f"a mapping of names to tensors{where}", describe(state))
        tensors = {}
        for key, value in state.items():
            if isinstance(value, np.ndarray):
                kinds.add(True)
                tensors[key] = _from_numpy(op, argument, f"tensor {key!r}{where}", value)
            elif isinstance(value, Tensor):
                kinds.add(False)
                tensors[key] = value
            else:
                refuse_type(op, argument, f"a tensor or array for {key!r}{where}", describe(value))
        for key, tensor in tensors.items():
            # Taken over from the base they would look merged.
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in FLOATS:
                expected = f"dtype float16, bfloat16, float32 or float64, or integers, for {key!r}{where}"
                refuse_type(op, argument, expected, f"dtype {tensor.dtype}")
        states.append(tensors)
    if len(kinds) > 1:
        refuse_type(op, name, "tensors throughout or NumPy arrays throughout", "both")
    first, *others = states
    for number_, model in enumerate(others):
        for kind, keys in (("missing", first.keys() - model.keys()), ("unknown", model.keys() - first.keys())):
            if keys:
                refuse(op, name, f"the names of {first_of_all}", f"{kind} {sorted(map(str, keys))} in model {number_}")
        for key, tensor in first.items():
            if model[key].shape != tensor.shape:
                expected = f"shape {tuple(tensor.shape)} for tensor {key!r}"
                refuse(op, name, expected, f"{tuple(model[key].shape)} in model {number_}")
            if model[key].is_floating_point() != tensor.is_floating_point():
                refuse_type(op, name, f"{tensor.dtype} for tensor {key!r}", f"{model[key].dtype} in model {number_}")
            if model[key].device != tensor.device:
                refuse(op, name, f"tensor {key!r} on {tensor.device}", f"{model[key].device} in model {number_}")
    floating = [key for key, tensor in first.items() if tensor.dtype in FLOATS]
    return States(op, first, others, floating, kinds == {True})


def _from_numpy(op: str, argument: str, what: str, array: np.ndarray[Any, Any]) -> Tensor:
    native = array.dtype.newbyteorder("=")
    fits = array.dtype.isnative and array.flags.writeable and all(stride >= 0 for stride in array.strides)
    try:
        return torch.from_numpy(array if fits else array.astype(native, order="C"))
    except TypeError:
        refuse_type(op, argument, f"a numeric dtype for {what}", f"dtype {array.dtype}")


def check_finite(op: str, name: str, bad: Tensor) -> None:
    """Refuse NaN and infinities that an operator met in the tensor ``name``."""
    number_ = int(bad)
    if number_ >= 0:
        refuse(
            op, "models", "finite values", f"NaN or an infinity in tensor {name!r} of model {number_} or of the base"
        )


def weights_for(op: str, weights: Any, models: int, default: float) -> list[float]:
    """Return a finite weight for each model."""
    if weights is None:
        return [default] * models
    if isinstance(weights, (Tensor, np.ndarray)):
        weights = weights.tolist()
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        refuse_type(op, "weights", f"{models} numbers", describe(weights))
    if len(weights) != models:
        refuse(op, "weights", f"{models} numbers, one for each model", f"{len(weights)}")
    return [number(op, "weights", weight) for weight in weights]


def stream_keys(seed: int, models: int, name: str) -> list[int]:
    """Return the key of each model's stream of draws for the tensor ``name``."""
    keys = []
    for model in range(models):
        digest = hashlib.blake2b(f"{seed}/{model}/{name}".encode(), digest_size=8).digest()
        # torch passes whole numbers as signed ones.
        keys.append(int.from_bytes(digest, "little", signed=True))
    return keys
