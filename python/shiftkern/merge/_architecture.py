"""Running one architecture on the tensors of a state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.merge._states import States

__all__ = ["Architecture", "Runner"]

Runner = Callable[[dict[str, Tensor], Any], Any]


class Architecture:
    """A module whose own tensors are set aside, or a function of tensors and a batch."""

    def __init__(self, op: str, states: States, model: nn.Module | Runner) -> None:
        if not callable(model):
            _checks.refuse_type(
                op, "model", "a torch.nn.Module or a callable (tensors, batch)", _checks.describe(model)
            )
        self._model = model
        self._floating = states.floating
        #: For further names of a parameter that a module shares, its first one.
        self.same_as: dict[str, str] = {}
        #: Names of what has a gradient, each parameter once.
        self.trained = list(states.floating)
        if isinstance(model, nn.Module):
            own = _own(op, states, model)
            self.same_as = _shared(op, states, own)
            self.trained = [n for n in states.floating if isinstance(own[n], nn.Parameter) and n not in self.same_as]

    def run(self, tensors: dict[str, Tensor], batch: Any) -> Any:
        """Return the output for a batch; a module takes a mapping as keyword arguments."""
        if not isinstance(self._model, nn.Module):
            return self._model(tensors, batch)
        # A shared tensor has several names, and the module takes one of them for all. Its own whole numbers will do.
        given = {name: tensors[name] for name in self._floating if name not in self.same_as}
        if isinstance(batch, Mapping):
            return torch.func.functional_call(self._model, given, (), dict(batch))
        return torch.func.functional_call(self._model, given, (batch,))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run a module in evaluation mode, and leave its flags as they were."""
        modules = list(self._model.modules()) if isinstance(self._model, nn.Module) else []
        flags = [module.training for module in modules]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, training in zip(modules, flags, strict=True):
                module.training = training


def _own(op: str, states: States, model: nn.Module) -> dict[str, Tensor]:
    """Return the module's tensors by all of their names."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in states.base.items():
        if name not in own:
            _checks.refuse(op, "base", "names of the model's parameters and buffers", repr(name))
        if own[name].shape != tensor.shape:
            expected = f"shape {tuple(own[name].shape)} for tensor {name!r}, as in the model"
            _checks.refuse(op, "base", expected, f"{tuple(tensor.shape)}")
    return own


def _shared(op: str, states: States, own: dict[str, Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    same_as: dict[str, str] = {}
    for name in states.base:
        original = first.setdefault(id(own[name]), name)
        if original == name:
            continue
        same_as[name] = original
        for number, state in enumerate([states.base, *states.models]):
            if not torch.equal(state[name], state[original]):
                expected = f"equal values in {original!r} and {name!r}, which are one parameter of the model"
                where = f"model {number - 1}" if number else "the base"
                _checks.refuse(op, "models", expected, f"different ones in {where}")
    return same_as
