"""KAdaptation (198): Kronecker products of rank-one factors, one half of which all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft.melora import divides

__all__ = ["KroneckerConfig"]


@register("KADAPTATION")
@dataclass(frozen=True, kw_only=True)
class KroneckerConfig(Config):
    """Kronecker adaptation: ``y = W x + b + scale sum_i kron(a_i b_i^T, u_i v_i^T) x + shift``, i = 1 .. terms.

    The slow factors ``a_i b_i^T`` ``(size, size)`` are the same in all layers; the fast ones ``u_i v_i^T``
    ``(out / size, in / size)`` are each layer's own. ``a_i``, ``b_i`` start uniform in +-0.01, ``v_i`` uniform in
    ``+-sqrt(size / in)``, ``u_i`` at zero.

    Parameters
    ----------
    terms : int
        How many products, at least 1.
    size : int
        Of the slow factors; divides the inputs and outputs of every layer.
    scale : float
        > 0; the published 160 makes up for the small slow factors.
    bias : bool
        Train a ``shift`` ``(out,)``, started at zero, as well.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers; the default is the published one, the projections to queries and values,
        under their names in most transformers.

    Raises
    ------
    ArgumentError
        A number out of range; a ``size`` that does not divide a layer's widths.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(terms (in + out)) per token. As ``kron(a b^T, u v^T) = kron(a, u) kron(b, v)^T``, the change is a product of two
    thin matrices, and neither it nor a Kronecker product is formed but to merge. Parameters: 2 terms size, and
    terms (in + out) / size for each layer, + out with ``bias``.

    In the published program all ``u_i`` and ``v_i`` start at zero, where no factor has a gradient, and values use the
    factors of queries; here ``v_i`` is random and each layer has its own. It also drops entries of the assembled change
    while training, which is left out as it would have to be formed.

    References
    ----------
    He et al.: Parameter-efficient Model Adaptation for Vision Transformers (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import KroneckerConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    >>> config = KroneckerConfig(terms=2, size=8, bias=False, target_modules="all-linear")
    >>> trainable_parameters(inject(model, config))  # 2 * 8 * 2 shared, 2 * (8 + 8) in each layer
    (96, 8416)
    """

    target_modules: str | Sequence[str] = ("q_proj", "v_proj")
    terms: int = 32
    size: int = 32
    scale: float = 160.0
    bias: bool = True
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "KroneckerConfig"
        self._set(
            terms=_checks.positive_int(op, "terms", self.terms),
            size=_checks.positive_int(op, "size", self.size),
            scale=_checks.positive(op, "scale", self.scale),
            bias=_checks.flag(op, "bias", self.bias),
        )

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        return _Slow(self.terms, self.size, generator)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        divides("KroneckerConfig", "size", self.size, place)
        assert isinstance(shared, _Slow)
        return _Kronecker(self, place, generator, shared)


class _Slow(nn.Module):
    """The factors that all layers share."""

    def __init__(self, terms: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        a, b = 0.01 * (2 * torch.rand(2, terms, size, generator=generator, dtype=torch.float64) - 1)
        self.a = nn.Parameter(a.clone())
        self.b = nn.Parameter(b.clone())


class _Kronecker(Adapter):
    activations = ("linear",)

    def __init__(self, config: KroneckerConfig, place: Place, generator: torch.Generator, shared: _Slow) -> None:
        super().__init__()
        width = place.in_features // config.size
        start = torch.rand(config.terms, width, generator=generator, dtype=torch.float64)
        self.u = nn.Parameter(torch.zeros(config.terms, place.out_features // config.size))
        self.v = nn.Parameter((2 * start - 1) / math.sqrt(max(width, 1)))
        self.shift = nn.Parameter(torch.zeros(place.out_features)) if config.bias else None
        self.scale = config.scale
        self.shared: nn.Module = shared

    def factors(self) -> tuple[Tensor, Tensor]:
        """Columns ``scale kron(a_i, u_i)`` (out, terms) and rows ``kron(b_i, v_i)`` (terms, in)."""
        slow = self.shared
        assert isinstance(slow, _Slow)
        left = (slow.a[:, :, None] * self.u[:, None, :]).flatten(1)
        right = (slow.b[:, :, None] * self.v[:, None, :]).flatten(1)
        return self.scale * left.T, right

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        left, right = self.factors()
        if self.shift is not None:
            bias = self.shift if bias is None else bias + self.shift
        return weight + left @ right, bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        left, right = self.factors()
        if self.shift is not None and bias is not None:
            bias = bias - self.shift
        return weight - left @ right, bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        left, right = self.factors()
        change = F.linear(F.linear(x.to(right.dtype), right), left)
        return y + (change if self.shift is None else change + self.shift).to(y.dtype)
