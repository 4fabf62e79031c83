"""LoRA (233 with ``freeze_a``): a product of two thin matrices beside the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["LoRAConfig"]


@register("LORA")
@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Low-rank adaptation: ``y = W x + b + (alpha / r) B A x``.

    B starts at zero. A starts uniform in ``+-sqrt(1 / in)``, as a linear layer of torch (and PEFT) does, or, with
    ``freeze_a``, as the ``r`` right singular vectors of a uniform random matrix, and stays there: half of the
    parameters, and no loss in what B alone can learn.

    Parameters
    ----------
    r : int
        Rank, at least 1; with ``freeze_a`` at most the layer's inputs.
    alpha : float
        Scale, > 0.
    dropout : float
        Chance in [0, 1) to drop an input of A while training.
    freeze_a : bool
        Keep A, with orthonormal rows, and train B only.
    seed : int, optional
        Of A. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers, convolutions and embeddings can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(r (in + out)) per token and in parameters. On convolutions A is a convolution with the layer's own kernel size
    and stride, and B one of size 1.

    References
    ----------
    Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models (2021).
    Zhu et al.: Asymmetry in Low-Rank Adapters of Foundation Models (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, merge
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRAConfig(r=2, alpha=4))
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(2, 4), (3, 2)]
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding")

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    freeze_a: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "LoRAConfig"
        dropout = _checks.fraction(op, "dropout", self.dropout)
        if dropout == 1.0:
            _checks.refuse(op, "dropout", "a number below 1", dropout)
        self._set(
            r=_checks.positive_int(op, "r", self.r),
            alpha=_checks.positive(op, "alpha", self.alpha),
            dropout=dropout,
            freeze_a=_checks.flag(op, "freeze_a", self.freeze_a),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        grouped = getattr(place.layer, "groups", 1) != 1
        if self.dropout and (grouped or place.kind.name == "embedding"):
            what = f"0 for '{place.name}', {'a grouped convolution' if grouped else 'an embedding'}"
            _checks.refuse("LoRAConfig", "dropout", what, self.dropout)
        if self.freeze_a and self.r > place.in_features:
            expected = f"at most the {place.in_features} inputs of '{place.name}', as the rows of A are orthonormal"
            _checks.refuse("LoRAConfig", "r", expected, self.r)
        return _LoRA(self, place, generator)


class _LoRA(Adapter):
    activations: tuple[str, ...] = ("linear", "conv", "embedding")

    A: Tensor
    B: Tensor

    def __init__(self, config: LoRAConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.rand(config.r, place.in_features, generator=generator, dtype=torch.float64)
        if config.freeze_a:
            self.register_buffer("A", torch.linalg.svd(start, full_matrices=False)[2].contiguous())
        else:
            self.A = nn.Parameter((2 * start - 1) / math.sqrt(max(place.in_features, 1)))
        self.B = nn.Parameter(torch.zeros(place.out_features, config.r))
        self.scale = config.alpha / config.r
        self.dropout = config.dropout
        if getattr(place.layer, "groups", 1) != 1:
            # Each group has inputs of its own: its rows of B A act on those, which is what a merged weight does.
            self.activations = ("linear", "embedding")

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.B @ self.A), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - self.scale * (self.B @ self.A), bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        layer, kind = base.layer, base.kind
        if kind.name == "embedding":
            return y + F.linear(self.scale * F.embedding(x, self.A.T), self.B).to(y.dtype)
        x = x.to(self.A.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        # The scale goes on the r numbers in the middle, the fewest there are.
        if kind.name == "linear":
            return y + F.linear(self.scale * F.linear(x, self.A), self.B).to(y.dtype)
        assert isinstance(layer.weight, Tensor)
        narrow = self.scale * kind.call(layer, x, self.A.view(-1, *layer.weight.shape[1:]), None)
        return y + F.linear(narrow.movedim(kind.axis, -1), self.B).movedim(-1, kind.axis).to(y.dtype)
