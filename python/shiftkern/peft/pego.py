"""PEGO (101): several low-rank updates side by side, kept apart from the weight and from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import computing, first_order_only, save, without_autocast
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["PEGOConfig", "pego_penalty"]

#: Entries of a product that are in memory at once: 8 MiB in float64.
_TILE = 1 << 20


def pego_penalty(weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of magnitudes by which low-rank updates overlap with the weight and with each other.

    ``sum_i |W (B_i A_i)^T|_1 + sum_{i<j} |(B_i A_i) (B_j A_j)^T|_1`` with the sum over the magnitudes of all entries.
    The rows of the updates are orthogonal to those of the weight and to each other where it is 0.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``, float.
    pairs : sequence of (Tensor, Tensor)
        ``A_i`` ``(r_i, in)`` and ``B_i`` ``(out, r_i)`` for each update, float, on the device of ``weight``.

    Returns
    -------
    Tensor
        A scalar, float64 if an argument is and float32 otherwise. Differentiable, once, in all arguments.

    Raises
    ------
    ArgumentError
        Shapes or devices that do not fit.
    ArgumentTypeError
        No float tensors, or no pairs of them.

    Notes
    -----
    Each term is the sum over a product ``L R^T`` of two factors with ``r`` columns, ``W A_i^T`` and ``B_i``, or ``B_i``
    and ``B_j (A_j A_i^T)``. The ``out x out`` products are made in bands of bounded size, for the sum and its gradient
    at once, and never kept: O(out^2 r) time for each term, where products of the updates themselves take
    O(out^2 in), and O(out r) memory. Sums are float64.

    Where an entry is 0, the sum has a kink, and the derivative is taken as 0, as that of :func:`torch.abs`. With all
    ``B_i = 0``, the usual start, every entry is at its kink: the penalty and its gradient are 0, and the first step is
    that of the task alone.

    References
    ----------
    Hu et al.: Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
    Generalization (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import pego_penalty
    >>> weight = torch.eye(2)
    >>> first = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
    >>> second = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [-1.0]])
    >>> pego_penalty(weight, [first, second])  # 3 and 2 with the weight, and nothing with each other
    tensor(5.)
    """
    op = "pego_penalty"
    _checks.tensor(op, "weight", weight)
    if weight.dim() != 2:
        _checks.refuse(op, "weight", "shape (out, in)", f"shape {tuple(weight.shape)}")
    if isinstance(pairs, Tensor) or not isinstance(pairs, Sequence):
        _checks.refuse_type(op, "pairs", "a sequence of pairs of tensors", _checks.describe(pairs))
    rows, columns = weight.shape
    for i, pair in enumerate(pairs):
        if isinstance(pair, Tensor) or not isinstance(pair, Sequence) or len(pair) != 2:
            _checks.refuse_type(op, f"pairs[{i}]", "a pair of tensors", _checks.describe(pair))
        a = _checks.tensor(op, f"pairs[{i}][0]", pair[0], device=weight.device)
        if a.dim() != 2 or a.shape[1] != columns:
            _checks.refuse(op, f"pairs[{i}][0]", f"shape (r, {columns})", f"shape {tuple(a.shape)}")
        _checks.tensor(op, f"pairs[{i}][1]", pair[1], shape=(rows, a.shape[0]), device=weight.device)
    flat = [weight, *(t for pair in pairs for t in pair)]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in flat) else torch.float32
    total = torch.zeros((), dtype=wide, device=weight.device)
    with without_autocast(weight.device):
        weight = weight.to(wide)
        factors = [(a.to(wide), b.to(wide)) for a, b in pairs]
        for i, (a, b) in enumerate(factors):
            total = total + _MagnitudeSum.apply(weight @ a.mT, b)
            for other_a, other_b in factors[i + 1 :]:
                total = total + _MagnitudeSum.apply(b, other_b @ (other_a @ a.mT))
    return total


def _slopes(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if slope is None else grad * slope for slope in ctx.saved_tensors)


class _MagnitudeSum(torch.autograd.Function):
    """``sum |L R^T|`` of ``(m, r)`` and ``(n, r)``: the gradients are those of ``sign(L R^T)``, band by band."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        needed = zip((left, right), ctx.needs_input_grad, strict=True)
        for_left, for_right = (torch.zeros_like(t) if wanted else None for t, wanted in needed)
        total = torch.zeros((), dtype=torch.float64, device=left.device)
        height = max(1, _TILE // max(1, right.shape[0]))
        for first in range(0, left.shape[0], height):
            band = left[first : first + height]
            product = band @ right.mT
            total += product.abs().sum(dtype=torch.float64)
            signs = product.sign_()
            if for_left is not None:
                for_left[first : first + height] = signs @ right
            if for_right is not None:
                for_right.addmm_(signs.mT, band)
        save(ctx, (left, right), (for_left, for_right))
        return total.to(left.dtype)

    backward = staticmethod(first_order_only("pego_penalty", _slopes))


@register("PEGO")
@dataclass(frozen=True, kw_only=True)
class PEGOConfig(Config):
    """A group of low-rank updates: ``y = W x + b + sum_i B_i A_i x``, without a factor ``alpha / r``.

    To the loss of the task comes ``weight`` times :func:`pego_penalty`, summed over the layers; get it from
    :func:`penalty`. ``A_i`` starts uniform in ``+-sqrt(1 / in)`` as a linear layer of torch, ``B_i`` at zero.

    Parameters
    ----------
    r : int
        Rank of each update, at least 1.
    count : int
        How many updates, at least 1.
    weight : float
        Weight of the penalty, at least 0.
    seed : int, optional
        Of all ``A_i``. None: others each time.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers; the method is meant for the projections to queries and values, which is the
        default, under their names in most transformers.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(count r (in + out)) per token and in parameters; all updates together are two products. The penalty is as costly
    as a training step on ``out`` tokens and does not depend on the batch. At the start it stands at its kink, with a
    gradient of 0; see :func:`pego_penalty`.

    References
    ----------
    Hu et al.: Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
    Generalization (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import PEGOConfig, inject, penalty
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), PEGOConfig(r=2, count=3, target_modules=["0"]))
    >>> loss = model(torch.ones(1, 4)).sum() + penalty(model)
    """

    target_modules: str | Sequence[str] = ("q_proj", "v_proj")
    r: int = 4
    count: int = 4
    weight: float = 0.1
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "PEGOConfig"
        self._set(
            r=_checks.positive_int(op, "r", self.r),
            count=_checks.positive_int(op, "count", self.count),
            weight=_checks.non_negative(op, "weight", self.weight),
            seed=None if self.seed is None else _checks.seed(op, "seed", self.seed),
        )

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        return _PEGO(self, place, generator)


class _PEGO(Adapter):
    activations = ("linear",)

    def __init__(self, config: PEGOConfig, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        # The updates lie side by side, so that together they are one of rank count * r.
        rank = config.count * config.r
        start = torch.rand(rank, place.in_features, generator=generator, dtype=torch.float64)
        self.A = nn.Parameter((2 * start - 1) / math.sqrt(max(place.in_features, 1)))
        self.B = nn.Parameter(torch.zeros(place.out_features, rank))
        self.count = config.count
        self.weight = config.weight

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """``A_i`` and ``B_i`` of each update."""
        return list(zip(self.A.chunk(self.count), self.B.chunk(self.count, 1), strict=True))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.B @ self.A, bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - self.B @ self.A, bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        return y + F.linear(F.linear(x.to(self.A.dtype), self.A), self.B).to(y.dtype)

    def penalty(self, base: Base) -> Tensor | None:
        # The weight of the base layer itself: other adapters are not what is to be preserved.
        own = base.layer.weight
        assert isinstance(own, Tensor)
        return self.weight * pego_penalty(base.kind.matrix(own).detach().to(computing(own.dtype)), self.pairs())
