"""SSF (92): a scale and a shift of every output feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["SSFConfig"]


@register("SSF")
@dataclass(frozen=True, kw_only=True)
class SSFConfig(Config):
    """Scaling and shifting features: ``y = scale * (W x + b) + shift``, per output feature or channel.

    Parameters
    ----------
    std : float
        Spread of the start, >= 0: ``scale ~ N(1, std^2)``, ``shift ~ N(0, std^2)``. The published 0.02 is close to the
        identity, but not the identity; 0 is.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers, convolutions and normalizations can be adapted; the paper adapts all of
        them.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    Folds into ``diag(scale) W`` and ``scale * b + shift``, and costs nothing then. A layer without bias gets one by
    merging and loses it by unmerging.

    References
    ----------
    Lian et al.: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import SSFConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    >>> trainable_parameters(inject(model, SSFConfig(target_modules=".*")))
    (12, 33)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm")

    std: float = 0.02
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(std=_checks.non_negative("SSFConfig", "std", self.std))

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _SSF(self.std, place, generator)


class _SSF(Adapter):
    activations = ("linear", "conv", "norm")

    def __init__(self, std: float, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        scale, shift = std * torch.randn(2, place.out_features, generator=generator, dtype=torch.float64)
        self.scale = nn.Parameter(1 + scale)
        self.shift = nn.Parameter(shift)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale[:, None] * weight, self.shift if bias is None else self.scale * bias + self.shift

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight / self.scale[:, None], None if bias is None else (bias - self.shift) / self.scale

    def invertible(self) -> bool:
        return divisible(self.scale)

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        scale, shift = (base.kind.per_feature(v, y) for v in (self.scale, self.shift))
        return (scale * y + shift).to(y.dtype)


def divisible(scale: Tensor) -> bool:
    """Say whether dividing by a scale gives back what was multiplied: nothing vanished or left the range."""
    size = scale.detach().abs()
    return bool(((size > 1e-3) & (size < 1e3)).all())
