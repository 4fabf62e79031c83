"""The modules that hang in a model in the place of base layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shiftkern._library import without_autocast
from shiftkern.peft._adapter import Adapter, Base, Config, keep_wide, layer_parameters
from shiftkern.peft._kinds import Kind, kind_of

__all__ = ["AdaptedLayer", "Merge", "TrainedCopies", "train_in_full"]

M = TypeVar("M", bound=nn.Module)


@dataclass
class Merge:
    """What a merge did to a layer, so that it can be taken back.

    ``kept`` holds the original weight and bias where they were kept; otherwise they are computed back.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    had_bias: bool
    kept: tuple[Tensor, Tensor | None] | None


class AdaptedLayer(nn.Module):
    """A base layer with its adapters, in the base layer's place.

    Attributes
    ----------
    base_layer : nn.Module
        The layer as it was.
    adapters : nn.ModuleDict
        Adapters by name.
    kind : Kind
        The kind of the base layer.
    configs : dict
        Their configs by name.
    active : list of str
        Names of the model's adapters that act, the first one closest to the base layer; this layer need not have all.
    disabled : bool
        Whether the base layer is evaluated alone.
    merges : list of Merge
        What is folded into the base layer's weight at present, the oldest first.
    frozen : tuple of str
        Names of the model's parameters that injection froze, kept in one of the layers.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.configs: dict[str, Config] = {}
        self.active: list[str] = []
        self.disabled = False
        self.merges: list[Merge] = []
        self.frozen: tuple[str, ...] = ()
        self.kind: Kind = kind_of(base_layer)
        self._first = _first_parameter(base_layer)
        self.training = base_layer.training

    @property
    def merged(self) -> list[str]:
        """Names of the adapters that are folded into the base layer's weight, in order."""
        return [name for merge in self.merges for name in merge.names]

    def adapter(self, name: str) -> Adapter:
        """Return one of the adapters."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def add(self, name: str, adapter: Adapter, config: Config) -> None:
        """Take an adapter in; whether it is active is not decided here."""
        self.adapters[name] = adapter
        self.configs[name] = config
        if not adapter.mergeable:
            # nn.TransformerEncoderLayer computes with the weights of layers instead of calling them, unless one of
            # them has a hook.
            self.register_forward_pre_hook(_noticed)

    def acting(self) -> list[str]:
        """Names of the adapters that act on activations: active and not merged."""
        merged = self.merged
        return [] if self.disabled else [name for name in self.active if name in self.adapters and name not in merged]

    def base(self, names: Sequence[str] | None = None) -> Base:
        """Return the layer as some adapters leave it, in the order of ``names``; by default all that act."""
        names = self.acting() if names is None else names
        return Base(self.base_layer, self.kind, [self.adapter(name) for name in names])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the layer with its acting adapters."""
        base = self.base()
        if not base.adapters:
            return self.base_layer(*args, **kwargs)
        if not args and self._first is not None:
            args = (kwargs.pop(self._first, None),)
        return base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What the base layer has is read from it. Code that takes a layer's weight to use it instead of calling the
        # layer, as nn.MultiheadAttention does, gets the adapted one.
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("base_layer")
            if layer is None:
                raise
        if name in ("weight", "bias") and self.kind.name != "block":
            base = self.base()
            if base.adapters and all(adapter.mergeable for adapter in base.adapters):
                with without_autocast(layer.weight.device):
                    weight, bias = base.parameters()
                if name == "weight":
                    return self.kind.stored(weight, layer.weight).to(layer.weight.dtype)
                return None if bias is None else bias.to(layer.weight.dtype)
        return getattr(layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Weights that are tied or replaced from outside belong to the base layer.
        if name in ("weight", "bias") and "base_layer" in self.__dict__.get("_modules", {}):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for merge in self.merges:
            if merge.kept is not None and not isinstance(merge.kept[0], nn.Parameter):
                weight, bias = merge.kept
                merge.kept = keep_wide(fn, weight).to(weight.dtype), bias if bias is None else fn(bias).to(bias.dtype)
        return self

    def folded(self, names: Iterable[str]) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with adapters folded in, in the form and type in which they are stored."""
        own = self.base_layer.weight
        assert isinstance(own, Tensor)
        with torch.no_grad(), without_autocast(own.device):
            weight, bias = layer_parameters(self.base_layer, self.kind)
            for name in names:
                weight, bias = self.adapter(name).merge(weight, bias)
            return self.kind.stored(weight, own).to(own.dtype), None if bias is None else bias.to(own.dtype)

    def merge(self, names: tuple[str, ...], *, keep: bool, shared: frozenset[int]) -> None:
        """Fold adapters into the weight. ``shared`` are parameters that other layers hold, by id; those stay."""
        layer = self.base_layer
        own, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(own, nn.Parameter)
        keep = keep or not all(self.adapter(name).invertible() for name in names)
        weight_new, bias_new = self.folded(names)
        tied = id(own) in shared or (bias is not None and id(bias) in shared)
        kept: tuple[Tensor, Tensor | None] | None = None
        if tied:
            # Another layer keeps these objects alive; they come back when the merge is undone.
            kept = own, bias
        elif keep:
            kept = own.detach().clone(), None if bias is None else bias.detach().clone()
        _put(layer, "weight", weight_new, fresh=tied)
        if bias_new is not None:
            _put(layer, "bias", bias_new, fresh=tied or bias is None)
        self.merges.append(Merge(names, own.dtype, bias is not None, kept))

    def unmerge(self) -> None:
        """Take the last merge back."""
        merge, layer = self.merges[-1], self.base_layer
        own = layer.weight
        assert isinstance(own, nn.Parameter)
        if merge.kept is not None:
            weight, bias = merge.kept
            if isinstance(weight, nn.Parameter):
                layer._parameters["weight"] = weight
                if merge.had_bias:
                    assert isinstance(bias, nn.Parameter)
                    layer._parameters["bias"] = bias
            else:
                _put(layer, "weight", weight.to(own), fresh=False)
                if bias is not None:
                    _put(layer, "bias", bias.to(own), fresh=False)
        else:
            with torch.no_grad(), without_autocast(own.device):
                matrix, offset = layer_parameters(layer, self.kind)
                for name in reversed(merge.names):
                    matrix, offset = self.adapter(name).unmerge(matrix, offset)
                _put(layer, "weight", self.kind.stored(matrix, own).to(own.dtype), fresh=False)
                if merge.had_bias and offset is not None:
                    _put(layer, "bias", offset.to(own.dtype), fresh=False)
        if not merge.had_bias and getattr(layer, "bias", None) is not None:
            layer._parameters["bias"] = None
        self.merges.pop()

    def extra_repr(self) -> str:
        """Names and states of the adapters."""
        state = ", disabled" if self.disabled else ""
        return f"active={self.active}, merged={self.merged}{state}"


class TrainedCopies(nn.Module):
    """A module of the base model and the copies of it that adapters train in full.

    The copy of the last active adapter that has one is evaluated; without any, the original.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: list[str] = []
        self.disabled = False
        self.training = original.training

    def fresh(self) -> nn.Module:
        """Return a copy of the original to train."""
        return train_in_full(copy.deepcopy(self.original))

    def chosen(self) -> nn.Module:
        """Return the module that is evaluated now."""
        names = [] if self.disabled else [name for name in self.active if name in self.copies]
        return self.copies[names[-1]] if names else self.original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the module that is chosen."""
        return self.chosen()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.chosen(), name)


def train_in_full(module: M) -> M:
    """Let every parameter be trained that can be: integers, as of quantized weights, have no gradient."""
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return module


def _noticed(layer: nn.Module, args: Any) -> None:
    """Do nothing: the hook that makes torch call a layer."""


def _first_parameter(layer: nn.Module) -> str | None:
    """Name of the first argument of a layer's forward, for calls that name it."""
    try:
        parameters = inspect.signature(layer.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    first = next(iter(parameters), None)
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else None


def _put(layer: nn.Module, attribute: str, value: Tensor, *, fresh: bool) -> None:
    """Write a parameter: into the object that is there, or as a new one."""
    old = layer._parameters.get(attribute)
    if fresh or old is None:
        trained = old is not None and old.requires_grad
        layer._parameters[attribute] = nn.Parameter(value.contiguous(), requires_grad=trained)
        return
    with torch.no_grad():
        old.copy_(value)
