"""AdapterBias (91): one shift per layer, as far as each token asks for it."""

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

__all__ = ["AdapterBiasConfig"]

#: The second layer of feed-forward networks under its names in LLaMA, OPT and BART, GPT-2, BERT and ViT, DistilBERT.
_SECOND = r".*(down_proj|fc2|mlp\.c_proj|(?<!attention\.)output\.dense|lin2)"


@register("ADAPTERBIAS")
@dataclass(frozen=True, kw_only=True)
class AdapterBiasConfig(Config):
    """A token-dependent shift of the feed-forward output: ``y = W h + b + (w . h + c) v``.

    ``h`` is the input of the adapted layer, which is to be the second one of a feed-forward network: its intermediate
    activation. ``w`` and ``c`` start as a linear layer of torch, uniform in ``+-sqrt(1 / in)``; ``v`` starts at zero.

    Parameters
    ----------
    shared : bool
        One ``w`` and ``c`` for all layers, which must then have equally many inputs.
    seed : int, optional
        Of ``w`` and ``c``. None: others each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers; the default knows the second feed-forward layer by its names in common
        transformers. The paper also trains the normalization that follows: name it in ``modules_to_save``.

    Raises
    ------
    ArgumentError
        A seed out of range; with ``shared``, layers with different numbers of inputs.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(in + out) per token and in parameters. It is a change of rank one, ``W + v w^T`` and ``b + c v``, and can be
    merged. A layer without bias gets one by merging and loses it by unmerging.

    References
    ----------
    Fu et al.: AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import AdapterBiasConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    >>> trainable_parameters(inject(model, AdapterBiasConfig(target_modules=["2"])))
    (21, 169)
    """

    target_modules: str | Sequence[str] = _SECOND
    shared: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(shared=_checks.flag("AdapterBiasConfig", "shared", self.shared))

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        if not self.shared:
            return None
        first = places[0]
        for place in places:
            if place.in_features != first.in_features:
                expected = f"layers with {first.in_features} inputs, as '{first.name}' has, for a shared w"
                got = f"{place.in_features} in '{place.name}'"
                _checks.refuse("AdapterBiasConfig", "target_modules", expected, got)
        return _Amount(first.in_features, generator)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _AdapterBias(place, generator, shared)


class _Amount(nn.Module):
    """``w . h + c``, a number per token."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.rand(features + 1, generator=generator, dtype=torch.float64)
        start = (2 * start - 1) / math.sqrt(max(features, 1))
        self.w = nn.Parameter(start[:-1])
        self.c = nn.Parameter(start[-1])

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h.to(self.w.dtype), self.w[None], self.c[None])


class _AdapterBias(Adapter):
    activations = ("linear",)

    def __init__(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(place.out_features))
        # A shared part goes by the name that it is saved once under.
        if shared is None:
            self.own = _Amount(place.in_features, generator)
        else:
            self.shared = shared

    def amount(self) -> _Amount:
        part = self.own if hasattr(self, "own") else self.shared
        assert isinstance(part, _Amount)
        return part

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        part = self.amount()
        shift = part.c * self.v
        return torch.addr(weight, self.v, part.w), shift if bias is None else bias + shift

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        part = self.amount()
        return torch.addr(weight, self.v, part.w, alpha=-1), None if bias is None else bias - part.c * self.v

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        amount: Tensor = self.amount()(x)
        return y + (amount * self.v).to(y.dtype)
