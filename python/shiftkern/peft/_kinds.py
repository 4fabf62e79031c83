"""The layers that adapters know: how each sees its weight as a matrix, and how it is called with another one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from shiftkern._library import computing

__all__ = ["BLOCK", "Kind", "Place", "kind_of", "place_of"]


class Kind(ABC):
    """One type of base layer. ``name`` is what methods declare in ``Config.kinds``."""

    name: ClassVar[str]
    #: Axis of the output that holds its features.
    axis: int = -1
    #: Whether the layer can hold a bias.
    biased: ClassVar[bool] = True

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """See a stored weight as a matrix (out, in)."""

    @abstractmethod
    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Turn a matrix into the form and shape in which the weight ``like`` is stored."""

    @abstractmethod
    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Evaluate the layer with another weight, in stored form, and another bias."""

    def per_feature(self, vector: Tensor, output: Tensor) -> Tensor:
        """Reshape a vector (out,) so that it broadcasts along the features of an output."""
        return vector if self.axis == -1 else vector.view(-1, *(1,) * (output.dim() - 2))


class _Linear(Kind):
    name = "linear"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix

    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _Transposed(Kind):
    """Conv1D of transformers: a linear layer whose weight is stored (in, out)."""

    name = "linear"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T

    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.T, bias)


class _Conv(Kind):
    """Conv1d, Conv2d and Conv3d: the matrix is (out, in / groups * kernel size)."""

    name = "conv"
    axis = 1

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The layer's own function knows padding modes; its signature is the same in all dimensions.
        result: Tensor = layer._conv_forward(x, weight, bias)  # type: ignore[operator]
        return result

    def per_feature(self, vector: Tensor, output: Tensor) -> Tensor:
        # Convolutions also take a single instance without a batch, so that only the trailing axes are known.
        return vector.view(-1, *(1,) * self._spatial)

    def __init__(self, spatial: int) -> None:
        self._spatial = spatial
        self.axis = -1 - spatial


class _Embedding(Kind):
    """The matrix is (dimension, entries), as a linear layer of one-hot inputs has it."""

    name = "embedding"
    biased = False

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T

    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(layer, nn.Embedding)
        return F.embedding(x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)


class _Norm(Kind):
    """Normalizations with weight and bias per channel: the matrix is one column (channels, 1)."""

    name = "norm"

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.squeeze(1)

    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = functional_call(layer, {"weight": weight, "bias": bias}, (x,))  # type: ignore[dict-item]
        return result


class _Block(Kind):
    """Any other module: it has no weight that could be changed, but an input and an output."""

    name = "block"
    biased = False

    def matrix(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        raise NotImplementedError

    def call(self, layer: nn.Module, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


BLOCK = _Block()
_CHANNEL_NORM = _Norm(1)
_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: _Linear(),
    nn.Conv1d: _Conv(1),
    nn.Conv2d: _Conv(2),
    nn.Conv3d: _Conv(3),
    nn.Embedding: _Embedding(),
    nn.LayerNorm: _Norm(-1),
    nn.GroupNorm: _CHANNEL_NORM,
    nn.BatchNorm1d: _CHANNEL_NORM,
    nn.BatchNorm2d: _CHANNEL_NORM,
    nn.BatchNorm3d: _CHANNEL_NORM,
}
_TRANSPOSED = _Transposed()


def kind_of(layer: nn.Module) -> Kind:
    """Return the kind of a layer: "block" where it is none with a floating-point weight that its forward just uses."""
    # A weight that is computed (parametrizations, weight normalization) or not there yet cannot be written.
    weight = layer._parameters.get("weight")
    if weight is None or torch.nn.parameter.is_lazy(weight) or not weight.is_floating_point():
        return BLOCK
    if is_transposed(layer):
        return _TRANSPOSED
    for cls, kind in _KINDS.items():
        if isinstance(layer, cls):
            # A subclass that does something else with its weight is another function.
            plain = type(layer).forward is cls.forward and not _special(layer)
            return kind if plain else BLOCK
    return BLOCK


def _special(layer: nn.Module) -> bool:
    """Say whether a layer of a known class has options with which it is no function of weight and bias alone."""
    if isinstance(layer, nn.Embedding):
        # Rows are scaled down after they were looked up: those of a merged table by other factors.
        return layer.max_norm is not None
    if isinstance(layer, nn.LayerNorm):
        return layer.weight.dim() != 1 or layer.bias is None
    return False


def is_transposed(layer: nn.Module) -> bool:
    """Say whether a layer is Conv1D of transformers, without importing that."""
    cls = type(layer)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") and hasattr(layer, "nf")


@dataclass(frozen=True)
class Place:
    """Where an adapter goes.

    Attributes
    ----------
    name : str
        Name of the layer in the base model.
    layer : nn.Module
        The base layer.
    kind : Kind
        Its kind; ``kind.name`` is "linear", "conv", "embedding", "norm" or "block".
    out_features, in_features : int
        Shape of the weight as a matrix; 0 for a block.
    dtype, device
        Of the adapter's parameters: float64 for a float64 layer, otherwise float32.
    """

    name: str
    layer: nn.Module
    kind: Kind
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device


def place_of(name: str, layer: nn.Module, model: nn.Module) -> Place:
    """Describe a layer of a model for an adapter."""
    kind = kind_of(layer)
    # A block without parameters takes type and device from the model.
    first = next((p for m in (layer, model) for p in m.parameters() if p.is_floating_point()), torch.empty(0))
    if kind.name == "block":
        return Place(name, layer, kind, 0, 0, computing(first.dtype), first.device)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows, columns = kind.matrix(weight).shape
    return Place(name, layer, kind, rows, columns, computing(weight.dtype), weight.device)
