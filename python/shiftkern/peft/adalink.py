"""AdaLink (188): a low-rank map of the input embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import WEIGHTED, Adapter, Base, Config, map_hidden, register
from shiftkern.peft._hidden import checked_width, width_of
from shiftkern.peft._kinds import Place

__all__ = ["AdaLinkConfig"]


@register("ADALINK")
@dataclass(frozen=True, kw_only=True)
class AdaLinkConfig(Config):
    """A low-rank map between the embeddings and the model, which stays as it is: ``e' = e + W_up W_down e``.

    e is the target's output, or the first tensor of it. ``W_up`` starts at zero. For several modalities, inject one
    adapter per source of embeddings, or name them all.

    Parameters
    ----------
    r : int
        Rank, at least 1.
    width : int, optional
        Size of the last dimension of e, for modules that do not tell it.
    seed : int, optional
        Of ``W_down``, uniform in ``+-sqrt(1 / width)``. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Any module can be adapted whose output has its features in the last dimension. The default
        is the token embeddings under the names that most models of transformers have for them.

    Raises
    ------
    ArgumentError
        A number out of range; on injection, a module whose width is not known or not ``width``.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(r width) per token and ``2 r width`` parameters. On embeddings and linear layers it can be merged, as
    ``(I + W_up W_down) E``, and is taken back by a solve of size r. Other modules compute more than a product with a
    weight. In a model whose embeddings are tied to its head, the merge leaves the head alone.

    References
    ----------
    Wang et al.: Non-Intrusive Adaptation: Input-Centric Parameter-efficient Fine-Tuning for Versatile Multimodal
    Modeling (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import AdaLinkConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 8))
    >>> trainable_parameters(inject(model, AdaLinkConfig(r=2, target_modules=["0"])))
    (32, 904)
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)

    target_modules: str | Sequence[str] = r"(.*\.)?(word_embeddings|embed_tokens|wte|shared)"
    r: int = 64
    width: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "AdaLinkConfig"
        self._set(r=_checks.positive_int(op, "r", self.r), width=checked_width(op, self.width))

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        adapter = _AdaLink(self.r, width_of("AdaLinkConfig", place, self.width), generator)
        adapter.mergeable = place.kind.name in ("linear", "embedding")
        return adapter


class _AdaLink(Adapter):
    activations = (*WEIGHTED, "block")

    def __init__(self, r: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.rand(r, width, generator=generator, dtype=torch.float64)
        self.down = nn.Parameter((2 * start - 1) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(width, r))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._columns(weight), None if bias is None else self._columns(bias)

    def _columns(self, value: Tensor) -> Tensor:
        return value + self.up @ (self.down @ value)

    def _core(self) -> Tensor:
        return torch.eye(len(self.down), dtype=self.up.dtype, device=self.up.device) + self.down @ self.up

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # By Woodbury, the inverse of I + U D is I - U (I + D U)^-1 D.
        core = self._core()
        weight = weight - self.up @ torch.linalg.solve(core, self.down @ weight)
        return weight, None if bias is None else bias - self.up @ torch.linalg.solve(core, self.down @ bias)

    def invertible(self) -> bool:
        return solvable(self._core())

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        return map_hidden(base(x, *args, **kwargs), self._add)

    def _add(self, e: Tensor) -> Tensor:
        return e + F.linear(F.linear(e.to(self.down.dtype), self.down), self.up).to(e.dtype)


def solvable(matrix: Tensor) -> bool:
    """Say whether solving with a matrix is accurate: it is finite, and shrinks nothing away."""
    matrix = matrix.detach().double()
    if not bool(torch.isfinite(matrix).all()):
        return False
    sizes = torch.linalg.svdvals(matrix)
    return bool(sizes[-1] > 1e-2 * sizes[0].clamp(min=1.0))
