"""HRA: the input goes through a chain of reflections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Config, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._rotated import InputRotation
from shiftkern.rotation.householder_chain import householder_chain

__all__ = ["HRAConfig"]


@register("HRA")
@dataclass(frozen=True, kw_only=True)
class HRAConfig(Config):
    """Householder reflection adaptation: ``y = W H_1 ... H_r x + b`` with ``H_i = I - 2 u_i u_i^T / ||u_i||^2``.

    Neighbouring reflections start equal and cancel: the identity.

    Parameters
    ----------
    r : int
        Reflections: an even number, or with ``orthogonalize`` any from 1 to the layer's inputs.
    orthogonalize : bool
        Make the normals orthogonal (Gram-Schmidt): ``H = I - 2 Q Q^T``. That is never the identity, and it starts at
        random normals.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers and convolutions can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``r in`` parameters and ``O(r in)`` per token: activations are reflected, no matrix of ``in x in`` is built.

    References
    ----------
    Yuan et al.: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation
    (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import HRAConfig, inject, trainable_parameters
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(8, 3)), HRAConfig(r=2))
    >>> trainable_parameters(model)
    (16, 43)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    r: int = 8
    orthogonalize: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "HRAConfig"
        r = _checks.positive_int(op, "r", self.r)
        if not _checks.flag(op, "orthogonalize", self.orthogonalize) and r % 2 != 0:
            _checks.refuse(op, "r", "an even number, so that reflections can cancel at the start", r)
        self._set(r=r)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        if self.orthogonalize and self.r > place.in_features:
            expected = f"at most the {place.in_features} inputs of '{place.name}', as the normals are orthogonal"
            _checks.refuse("HRAConfig", "r", expected, self.r)
        return _HRA(self, place, generator)


class _HRA(InputRotation):
    def __init__(self, config: HRAConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        self.orthogonalize = config.orthogonalize
        count = config.r if config.orthogonalize else config.r // 2
        normals = torch.randn(place.in_features, count, generator=generator, dtype=torch.float64)
        self.U = nn.Parameter(normals if config.orthogonalize else normals.repeat_interleave(2, 1))

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        return householder_chain(x, self.U, orthogonalize=self.orthogonalize, transpose=transpose)
