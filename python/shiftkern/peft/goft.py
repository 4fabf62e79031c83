"""GOFT and qGOFT (180): the input is turned in pairs of coordinates, by angles or by free 2 x 2 blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._rotated import InputRotation
from shiftkern.rotation.givens_mix import givens_mix, invert_blocks
from shiftkern.rotation.givens_rotate import givens_pairs, givens_rotate
from shiftkern.rotation.orthogonality import orthogonality_penalty

__all__ = ["GOFTConfig"]

Topology = Literal["tree", "butterfly", "brick"]


@register("GOFT")
@dataclass(frozen=True, kw_only=True)
class GOFTConfig(Config):
    """Fine-tuning by Givens rotations: ``y = W R(theta)^T x + b`` with ``theta = pi tanh(raw)``.

    R is the product of plane rotations of :func:`shiftkern.rotation.givens_rotate`. With ``quasi`` (qGOFT) each
    rotation becomes a free 2 x 2 block, ``y = W M^T x + b``, and :func:`penalty` gives
    ``penalty * sum_i <alpha_i, beta_i>^2`` over the columns of all blocks, to be added to the loss. Starts at the
    identity.

    Parameters
    ----------
    quasi : bool
        Free blocks instead of angles.
    topology : {"tree", "butterfly", "brick"}
        Pairs of coordinates in each stage. "tree" is the paper's, with ``in - 1`` angles.
    layers : int, optional
        Layers of "brick"; None: as many as the layer has inputs.
    scale : bool
        Train a factor per output, too, on the weight but not on the bias.
    penalty : float
        Weight of the penalty with ``quasi``, >= 0.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range, an unknown topology, layers of another topology than "brick".
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``O(in)`` per token with the tree. The merge of qGOFT is taken back by the inverse 2 x 2 blocks.

    References
    ----------
    Ma et al.: Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation (2024), equations 3 to 6.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import GOFTConfig, inject, trainable_parameters
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 3)), GOFTConfig())
    >>> trainable_parameters(model)
    (7, 34)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    quasi: bool = False
    topology: Topology = "tree"
    layers: int | None = None
    scale: bool = False
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "GOFTConfig"
        topology = _checks.one_of(op, "topology", self.topology, ("tree", "butterfly", "brick"))
        if self.layers is not None and topology != "brick":
            _checks.refuse(op, "layers", f"None, as topology {topology!r} has a fixed number", self.layers)
        self._set(
            quasi=_checks.flag(op, "quasi", self.quasi),
            layers=None if self.layers is None else _checks.positive_int(op, "layers", self.layers),
            scale=_checks.flag(op, "scale", self.scale),
            penalty=_checks.non_negative(op, "penalty", self.penalty),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        if place.in_features < 2:
            _checks.refuse("GOFTConfig", "target_modules", "layers with at least 2 inputs to turn", repr(place.name))
        return _QuasiGOFT(self, place) if self.quasi else _GOFT(self, place)


class _Givens(InputRotation):
    def __init__(self, config: GOFTConfig, place: Place) -> None:
        super().__init__(place.out_features if config.scale else 0)
        self.topology: Topology = config.topology
        self.count = len(givens_pairs(config.topology, place.in_features, config.layers))


class _GOFT(_Givens):
    def __init__(self, config: GOFTConfig, place: Place) -> None:
        super().__init__(config, place)
        self.raw = nn.Parameter(torch.zeros(self.count))

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        # T is the transpose of R.
        theta = math.pi * self.raw.tanh()
        return givens_rotate(x, theta, topology=self.topology, transpose=not transpose)


class _QuasiGOFT(_Givens):
    def __init__(self, config: GOFTConfig, place: Place) -> None:
        super().__init__(config, place)
        self.blocks = nn.Parameter(torch.eye(2).repeat(self.count, 1, 1))
        self.weight_of_penalty = config.penalty

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        return givens_mix(x, self.blocks, topology=self.topology, transpose=not transpose)

    def turn_back(self, weight: Tensor) -> Tensor:
        return givens_mix(weight, invert_blocks(self.blocks).mT, topology=self.topology, transpose=True)

    def invertible(self) -> bool:
        size = torch.linalg.det(self.blocks.detach().double()).abs()
        return super().invertible() and bool((size > 1e-2).all())

    def penalty(self, base: Base) -> Tensor | None:
        return self.weight_of_penalty * orthogonality_penalty(self.blocks)
