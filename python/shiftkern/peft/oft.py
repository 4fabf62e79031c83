"""OFT: the input is turned block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._rotated import InputRotation
from shiftkern.rotation.cayley_rotate import cayley_rotate

__all__ = ["OFTConfig"]


@register("OFT")
@dataclass(frozen=True, kw_only=True)
class OFTConfig(Config):
    """Orthogonal fine-tuning: ``y = W R x + b`` with block-diagonal rotations R, Cayley transforms of skew blocks.

    Starts at the identity.

    Parameters
    ----------
    block_size : int
        Inputs in a block, a divisor of each layer's inputs, at least 2.
    method : {"solve", "neumann"}
        The exact transform, or a series that is close to a rotation for small parameters only (see
        :func:`shiftkern.rotation.cayley_rotate`). A merge with the series keeps the original weights.
    terms : int
        Powers of the series, at least 1.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range, an unknown method; on injection, a block size that does not divide a layer's inputs.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``in (block_size - 1) / 2`` parameters and ``O(in block_size)`` per token.

    References
    ----------
    Qiu et al.: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import OFTConfig, inject, trainable_parameters
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 3)), OFTConfig(block_size=4))
    >>> trainable_parameters(model)
    (12, 39)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    block_size: int = 32
    method: Literal["solve", "neumann"] = "solve"
    terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "OFTConfig"
        _checks.one_of(op, "method", self.method, ("solve", "neumann"))
        self._set(
            block_size=_checks.integer(op, "block_size", self.block_size, 2),
            terms=_checks.positive_int(op, "terms", self.terms),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        if place.in_features % self.block_size != 0:
            expected = f"a divisor of the {place.in_features} inputs of '{place.name}'"
            _checks.refuse("OFTConfig", "block_size", expected, self.block_size)
        return _OFT(self, place)


class _OFT(InputRotation):
    def __init__(self, config: OFTConfig, place: Place) -> None:
        super().__init__()
        self.block_size, self.method, self.terms = config.block_size, config.method, config.terms
        blocks = place.in_features // config.block_size
        self.skew = nn.Parameter(torch.zeros(blocks, config.block_size * (config.block_size - 1) // 2))

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        return cayley_rotate(
            x, self.skew, block_size=self.block_size, method=self.method, terms=self.terms, transpose=transpose
        )

    def invertible(self) -> bool:
        return self.method == "solve"
