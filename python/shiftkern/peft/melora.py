"""MELoRA (203): many small LoRAs side by side, each between a slice of the inputs and one of the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["MELoRAConfig"]


@register("MELORA")
@dataclass(frozen=True, kw_only=True)
class MELoRAConfig(Config):
    """Mini-ensemble of low-rank adapters: ``y = W x + b + (alpha / r) blockdiag(B_1 A_1, .., B_n A_n) x``.

    Slice i of the inputs goes through its own ``A_i`` ``(r, in / n)`` and ``B_i`` ``(out / n, r)`` to slice i of the
    outputs. The rank is ``n r`` with the parameters of one LoRA of rank ``r``. ``A_i`` starts uniform in
    ``+-sqrt(n / in)``, as a linear layer of torch on its slice, ``B_i`` at zero.

    Parameters
    ----------
    r : int
        Rank of each, at least 1.
    n : int
        How many, at least 1; divides the inputs and outputs of every layer.
    alpha : float
        Scale, > 0.
    seed : int, optional
        Of all ``A_i``. None: others each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; an ``n`` that does not divide a layer's widths.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(r (in + out)) per token and in parameters, for any ``n``: the block-diagonal matrix is not formed but to merge.

    References
    ----------
    Ren et al.: MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import MELoRAConfig, inject
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), MELoRAConfig(r=1, n=4))
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(4, 1, 2), (4, 1, 1)]
    """

    r: int = 4
    n: int = 4
    alpha: float = 8.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "MELoRAConfig"
        self._set(
            r=_checks.positive_int(op, "r", self.r),
            n=_checks.positive_int(op, "n", self.n),
            alpha=_checks.positive(op, "alpha", self.alpha),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        divides("MELoRAConfig", "n", self.n, place)
        return _MELoRA(self, place, generator)


def divides(op: str, name: str, value: int, place: Place) -> None:
    """Refuse a number that does not divide the widths of a layer."""
    if place.in_features % value or place.out_features % value:
        expected = f"a divisor of the {place.in_features} inputs and {place.out_features} outputs of '{place.name}'"
        _checks.refuse(op, name, expected, value)


class _MELoRA(Adapter):
    activations = ("linear",)

    def __init__(self, config: MELoRAConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        n, r, width = config.n, config.r, place.in_features // config.n
        start = torch.rand(n, r, width, generator=generator, dtype=torch.float64)
        self.A = nn.Parameter((2 * start - 1) / math.sqrt(max(width, 1)))
        self.B = nn.Parameter(torch.zeros(n, place.out_features // n, r))
        self.scale = config.alpha / r

    def change(self) -> Tensor:
        blocks: Tensor = torch.block_diag(*(self.B @ self.A))  # type: ignore[no-untyped-call]
        return self.scale * blocks

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - self.change(), bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        slices = x.to(self.A.dtype).unflatten(-1, (self.A.shape[0], -1))
        narrow = torch.einsum("...ni,nri->...nr", slices, self.A)
        change = torch.einsum("...nr,nor->...no", narrow, self.B).flatten(-2)
        return y + (self.scale * change).to(y.dtype)
