"""BOFT (72): the input is turned by a product of butterfly-permuted block rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._rotated import InputRotation
from shiftkern.rotation.butterfly_rotate import butterfly_rotate

__all__ = ["BOFTConfig"]


@register("BOFT")
@dataclass(frozen=True, kw_only=True)
class BOFTConfig(Config):
    """Butterfly orthogonal fine-tuning: ``y = s * (W R x) + b`` with ``R = B_(m-1) ... B_0``.

    Each factor is made of Cayley blocks that join ever more distant coordinates, as in
    :func:`shiftkern.rotation.butterfly_rotate`; ``s`` is a trained factor per output. Starts at the identity.

    Parameters
    ----------
    block_size : int
        ``b``, at least 2, and even for several factors.
    factors : int
        ``m``, at least 1; ``b 2^(m - 1)`` divides each layer's inputs. 1 is OFT with a scale.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; on injection, a layer whose inputs do not fit.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``m in (b - 1) / 2 + out`` parameters and ``O(m in b)`` per token.

    References
    ----------
    Liu et al.: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import BOFTConfig, inject, trainable_parameters
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 3)), BOFTConfig(block_size=2, factors=3))
    >>> trainable_parameters(model)
    (15, 42)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    block_size: int = 4
    factors: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "BOFTConfig"
        size = _checks.integer(op, "block_size", self.block_size, 2)
        factors = _checks.positive_int(op, "factors", self.factors)
        if factors > 1 and size % 2 != 0:
            _checks.refuse(op, "block_size", "an even number for several factors", size)
        if factors > 60:
            _checks.refuse(op, "factors", "at most 60", factors)
        self._set(block_size=size, factors=factors)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        span = self.block_size << (self.factors - 1)
        if place.in_features % span != 0:
            expected = (
                f"a number with block_size * 2^(factors - 1) = {span} a divisor of the {place.in_features} inputs"
            )
            _checks.refuse("BOFTConfig", "factors", f"{expected} of '{place.name}'", self.factors)
        return _BOFT(self, place)


class _BOFT(InputRotation):
    def __init__(self, config: BOFTConfig, place: Place) -> None:
        super().__init__(scaled=place.out_features)
        b, self.factors = config.block_size, config.factors
        self.block_size = b
        self.skew = nn.Parameter(torch.zeros(config.factors, place.in_features // b, b * (b - 1) // 2))

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        return butterfly_rotate(x, self.skew, block_size=self.block_size, factors=self.factors, transpose=transpose)
