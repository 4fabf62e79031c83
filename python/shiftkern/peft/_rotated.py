"""What methods that rotate a layer's input have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shiftkern.peft._adapter import Adapter, Base
from shiftkern.peft.ssf import divisible

__all__ = ["InputRotation"]


class InputRotation(Adapter):
    """``y = scale * (W T x) + b`` with a linear map T of the input, a rotation unless a method says otherwise.

    The scale, one factor per output and on the weight alone, is there if ``scaled`` gives the number of outputs.
    """

    activations = ("linear",)

    scale: nn.Parameter | None

    def __init__(self, scaled: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(scaled)) if scaled else None

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        """Apply T, or its transpose, to the last dimension."""
        raise NotImplementedError

    def turn_back(self, weight: Tensor) -> Tensor:
        """Apply the inverse of the transpose of T to the last dimension; T itself where it is a rotation."""
        return self.turn(weight)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Rows of W T are those of W, turned by the transpose of T.
        weight = self.turn(weight, transpose=True)
        return weight if self.scale is None else self.scale[:, None] * weight, bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn_back(weight if self.scale is None else weight / self.scale[:, None]), bias

    def invertible(self) -> bool:
        return self.scale is None or divisible(self.scale)

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(self.turn(x), *args, **kwargs)
        if self.scale is None:
            return y
        bias = base.bias()
        scaled = self.scale * y
        # The bias is not scaled: the part of it that was is put right.
        return (scaled if bias is None else scaled + (1 - self.scale) * bias).to(y.dtype)
