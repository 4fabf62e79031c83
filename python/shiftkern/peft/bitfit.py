"""BitFit: only biases are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["BitFitConfig"]


@register("BITFIT")
@dataclass(frozen=True, kw_only=True)
class BitFitConfig(Config):
    """Training of biases alone: ``y = W x + b + d`` with ``d`` from zero.

    Parameters
    ----------
    target_modules, modules_to_save
        See :class:`Config`. Linear layers, convolutions and normalizations can be adapted. A layer without bias gets
        one by merging and loses it by unmerging.

    Raises
    ------
    ArgumentError
        Wrong target modules.
    ArgumentTypeError
        An argument of a wrong type.

    References
    ----------
    Ben Zaken et al.: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
    (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import BitFitConfig, inject, trainable_parameters
    >>> trainable_parameters(inject(torch.nn.Sequential(torch.nn.Linear(8, 3)), BitFitConfig()))
    (3, 30)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm")

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _BitFit(place)


class _BitFit(Adapter):
    activations = ("linear", "conv", "norm")

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(place.out_features))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.delta if bias is None else bias + self.delta

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, None if bias is None else bias - self.delta

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        return (y + base.kind.per_feature(self.delta, y)).to(y.dtype)
