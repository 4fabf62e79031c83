"""(IA)^3 (179): a scale of every output feature, or of every input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, names_of_modules, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._targets import ends_in
from shiftkern.peft.ssf import divisible

__all__ = ["IA3Config"]


@register("IA3")
@dataclass(frozen=True, kw_only=True)
class IA3Config(Config):
    """Inhibiting and amplifying activations: ``y = l * (W x + b)``, for ``feedforward_modules`` ``y = W (l * x) + b``.

    The paper adapts the projections of keys and values and, in a gated feed-forward, the linear half of the first
    layer. ``l`` starts at ones.

    Parameters
    ----------
    feedforward_modules : sequence of str
        Those of the targets, by name or end of name, whose input is scaled instead of their output.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers, convolutions and embeddings can be adapted.

    Raises
    ------
    ArgumentError
        On injection, an embedding or a grouped convolution in ``feedforward_modules``.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``out`` (or ``in``) parameters per layer, folded into the rows (or columns) of the weight.

    References
    ----------
    Liu et al.: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import IA3Config, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Linear(3, 5))
    >>> trainable_parameters(inject(model, IA3Config(feedforward_modules=["1"])))
    (6, 53)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding")

    feedforward_modules: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = names_of_modules("IA3Config", "feedforward_modules", self.feedforward_modules)
        self._set(feedforward_modules=names)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        if not ends_in(place.name, self.feedforward_modules):
            return _Outputs(place)
        if place.kind.name == "embedding" or getattr(place.layer, "groups", 1) != 1:
            expected = "linear layers and convolutions without groups"
            _checks.refuse("IA3Config", "feedforward_modules", expected, f"'{place.name}', {place.layer}")
        return _Inputs(place)


class _Outputs(Adapter):
    activations = ("linear", "conv", "embedding")

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(place.out_features))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.l[:, None] * weight, None if bias is None else self.l * bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight / self.l[:, None], None if bias is None else bias / self.l

    def invertible(self) -> bool:
        return divisible(self.l)

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        return (base.kind.per_feature(self.l, y) * y).to(y.dtype)


class _Inputs(Adapter):
    activations = ("linear",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        channels = getattr(place.layer, "in_channels", place.in_features)
        self.l = nn.Parameter(torch.ones(channels))
        # A channel of a convolution is as many columns as its kernel has cells.
        self.cells = place.in_features // channels

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.l.repeat_interleave(self.cells), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight / self.l.repeat_interleave(self.cells), bias

    def invertible(self) -> bool:
        return divisible(self.l)

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base((self.l * x).to(x.dtype), *args, **kwargs)
        return y
