"""Bottleneck adapters of Houlsby et al. (200)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import WEIGHTED, Adapter, Base, Config, map_hidden, register
from shiftkern.peft._hidden import checked_width, width_of
from shiftkern.peft._kinds import Place

__all__ = ["HoulsbyConfig"]

Approximation = Literal["none", "tanh"]


@register("HOULSBY")
@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(Config):
    """A bottleneck after a module, with a skip: ``h + W_up gelu(W_down h + b_down) + b_up``.

    h is the module's output, or the first tensor of its output. The paper places one after the output projection of
    attention and one after that of the feed-forward part, both after dropout and before the residual sum and the
    layer normalization, whose parameters are trained, too: name them in ``modules_to_save``.

    Parameters
    ----------
    bottleneck : int
        Size of the middle.
    std : float
        The weights' start, >= 0: normal, cut off at ``+-2 std``. Biases start at zero, so that the whole is close to
        the identity, but not the identity.
    approximate : {"tanh", "none"}
        The form of GELU: the authors' approximation, or the exact one.
    width : int, optional
        Size of the last dimension of h, for modules that do not tell it, such as dropout.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Any module can be adapted whose output has its features in the last dimension. The default
        is both dropouts in each layer of BERT as transformers names them.

    Raises
    ------
    ArgumentError
        A number out of range, an unknown form of GELU; on injection, a module whose width is not known or not
        ``width``.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(width bottleneck) per token and in parameters. It is no change of weights and cannot be merged.

    References
    ----------
    Houlsby et al.: Parameter-Efficient Transfer Learning for NLP (2019).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import HoulsbyConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.LayerNorm(8))
    >>> config = HoulsbyConfig(bottleneck=2, width=8, target_modules=["1"], modules_to_save=["2"])
    >>> trainable_parameters(inject(model, config))[0]
    58
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)

    target_modules: str | Sequence[str] = ("output.dropout",)
    bottleneck: int = 64
    std: float = 1e-3
    approximate: Approximation = "tanh"
    width: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "HoulsbyConfig"
        _checks.one_of(op, "approximate", self.approximate, ("none", "tanh"))
        self._set(
            bottleneck=_checks.positive_int(op, "bottleneck", self.bottleneck),
            std=_checks.non_negative(op, "std", self.std),
            width=checked_width(op, self.width),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _Houlsby(self, width_of("HoulsbyConfig", place, self.width), generator)


class _Houlsby(Adapter):
    activations = (*WEIGHTED, "block")
    mergeable = False

    def __init__(self, config: HoulsbyConfig, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Parameter(torch.zeros(s)) for s in ((config.bottleneck, width), (width, config.bottleneck))
        )
        for weight in (self.down, self.up):
            if config.std:
                cut = 2 * config.std
                nn.init.trunc_normal_(weight, std=config.std, a=-cut, b=cut, generator=generator)
        self.down_bias = nn.Parameter(torch.zeros(config.bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.approximate: Approximation = config.approximate

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        return map_hidden(base(x, *args, **kwargs), self._add)

    def _add(self, h: Tensor) -> Tensor:
        middle = F.linear(h.to(self.down.dtype), self.down, self.down_bias)
        return h + F.linear(F.gelu(middle, approximate=self.approximate), self.up, self.up_bias).to(h.dtype)
