"""ETHER and ETHER+ (136): one reflection per block of coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.rotation.householder_reflect import householder_reflect

__all__ = ["ETHERConfig"]


@register("ETHER")
@dataclass(frozen=True, kw_only=True)
class ETHERConfig(Config):
    """Fine-tuning by hyperplane reflections: ``y = W H x + b``, two-sided ``y = G W H x + b``.

    H and G are block-diagonal. Each block is ``I - 2 u u^T``, or with ``plus`` ``I - u u^T + v v^T``, for vectors of
    unit length. A reflection is never the identity: it is as far from it at the start as it ever is. ETHER+ starts
    with ``v = u``, the identity.

    Parameters
    ----------
    blocks : int
        Blocks of neighbouring inputs (and outputs), a divisor of their number.
    plus : bool
        ETHER+.
    two_sided : bool
        Reflect the outputs, too, but not the bias.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; on injection, blocks that do not divide a layer's inputs or outputs.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``in`` parameters, and twice as many with ``plus``, and ``O(in)`` per token. The merge of ETHER+ is taken back by
    the inverse 2 x 2 matrices of the blocks; where ``u`` and ``v`` are nearly orthogonal there is none, and the
    original weights are kept.

    References
    ----------
    Bini et al.: ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import ETHERConfig, inject, trainable_parameters
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), ETHERConfig(blocks=2, plus=True, two_sided=True))
    >>> trainable_parameters(model)
    (24, 60)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    blocks: int = 4
    plus: bool = False
    two_sided: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "ETHERConfig"
        self._set(
            blocks=_checks.positive_int(op, "blocks", self.blocks),
            plus=_checks.flag(op, "plus", self.plus),
            two_sided=_checks.flag(op, "two_sided", self.two_sided),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        widths = {"inputs": place.in_features} | ({"outputs": place.out_features} if self.two_sided else {})
        for what, width in widths.items():
            if width % self.blocks != 0:
                _checks.refuse(
                    "ETHERConfig", "blocks", f"a divisor of the {width} {what} of '{place.name}'", self.blocks
                )
        return _ETHER(self, place, generator)


class _Reflection(nn.Module):
    """A block-diagonal reflection, or its relaxed form."""

    v: nn.Parameter | None

    def __init__(self, width: int, blocks: int, plus: bool, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.randn(blocks, width // blocks, generator=generator, dtype=torch.float64)
        self.blocks = blocks
        self.u = nn.Parameter(start)
        self.v = nn.Parameter(start.clone()) if plus else None

    def forward(self, x: Tensor) -> Tensor:
        return householder_reflect(x, self.u, self.v, blocks=self.blocks)

    # Typed, unlike nn.Module's own.
    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = super().__call__(x)
        return result

    def inverse(self, x: Tensor) -> Tensor:
        """Undo it. Both forms are symmetric, and a reflection is its own inverse."""
        if self.v is None:
            return self(x)
        u, v = F.normalize(self.u, dim=1), F.normalize(self.v, dim=1)
        parts = x.reshape(*x.shape[:-1], *u.shape)
        along_u, along_v = (parts * u).sum(-1), (parts * v).sum(-1)
        c = (u * v).sum(-1)
        # By Woodbury: I - [u v] K^-1 [u v]^T with K = [[0, c], [c, 2]].
        by_u = (along_v - 2 * along_u / c) / c
        by_v = along_u / c
        return (parts - by_u.unsqueeze(-1) * u - by_v.unsqueeze(-1) * v).flatten(-2)

    def invertible(self) -> bool:
        """Say whether the relaxed form is far from singular in every block."""
        if self.v is None:
            return True
        return bool((F.cosine_similarity(self.u.detach(), self.v.detach(), dim=1).abs() > 0.05).all())


class _ETHER(Adapter):
    activations = ("linear",)

    outputs: _Reflection | None

    def __init__(self, config: ETHERConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        self.inputs = _Reflection(place.in_features, config.blocks, config.plus, generator)
        both = config.two_sided
        self.outputs = _Reflection(place.out_features, config.blocks, config.plus, generator) if both else None

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = self.inputs(weight)
        return weight if self.outputs is None else self.outputs(weight.T).T, bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.outputs is not None:
            weight = self.outputs.inverse(weight.T).T
        return self.inputs.inverse(weight), bias

    def invertible(self) -> bool:
        return self.inputs.invertible() and (self.outputs is None or self.outputs.invertible())

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(self.inputs(x), *args, **kwargs)
        if self.outputs is None:
            return y
        bias = base.bias()
        reflected: Tensor = self.outputs(y)
        # The bias is not reflected: the part of it that was is put right.
        return (reflected if bias is None else reflected + (bias - self.outputs(bias))).to(y.dtype)
