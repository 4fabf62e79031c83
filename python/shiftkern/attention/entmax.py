"""alpha-entmax: a softmax that can be exactly 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks

__all__ = ["entmax"]


def entmax(x: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Map scores to probabilities, those of low scores to exactly 0.

    ``argmax over p in the simplex of <p, x> + H_alpha(p)`` with Tsallis entropy H_alpha, which is
    ``p_i = max((alpha - 1) x_i - tau, 0)^(1 / (alpha - 1))`` for the tau that makes the sum 1. ``alpha=1`` is the
    softmax, ``alpha=2`` the sparsemax (the nearest point of the simplex); the larger, the sparser.

    Parameters
    ----------
    x : Tensor
        Scores, float, of any shape with an axis; ``-inf`` gets 0.
    alpha : float
        At least 1.
    dim : int
        Axis of the probabilities.

    Returns
    -------
    Tensor
        Probabilities in the shape and dtype of ``x``. Differentiable, with slopes ``p_i^(2 - alpha)`` where
        ``p_i > 0``; the gradient by ``alpha`` is left out.

    Raises
    ------
    ArgumentError
        No axis or an unknown one, ``alpha < 1``.
    ArgumentTypeError
        No float tensor, no numbers.

    Notes
    -----
    O(n log n) by sorting for 1.5 and 2, exact up to rounding; O(n) per step of a bisection for other alphas, which goes
    on to the last bit. Computed in float64 and rounded once. A line with NaN, or of ``-inf`` only, becomes NaN.

    References
    ----------
    Peters, Niculae and Martins: Sparse Sequence-to-Sequence Models (2019).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import entmax
    >>> entmax(torch.tensor([1.0, 0.5, -2.0]), alpha=2)
    tensor([0.7500, 0.2500, 0.0000])
    """
    op = "entmax"
    _checks.tensor(op, "x", x, min_dim=1)
    alpha = _checks.number(op, "alpha", alpha)
    if alpha < 1.0:
        _checks.refuse(op, "alpha", "a number >= 1", alpha)
    dim = _checks.integer(op, "dim", dim, -x.dim())
    if dim >= x.dim():
        _checks.refuse(op, "dim", f"an axis below {x.dim()}", dim)
    if alpha == 1.0 or x.shape[dim] == 0:
        return x.softmax(dim)
    # Thresholds are close to the scores of a wide support, and their differences are the probabilities.
    p: Tensor = _Entmax.apply(x.double().movedim(dim, -1), alpha)
    return p.movedim(-1, dim).to(x.dtype)


class _Entmax(torch.autograd.Function):
    """Along the last axis, for alpha > 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        # With the largest at 0, tau is in [-1, 0): what lies below -1 has probability 0 and need not be told apart.
        z = ((x - x.amax(-1, keepdim=True)) * (alpha - 1.0)).clamp_min(-1.0)
        if alpha == 2.0:
            return (z - _sparsemax_threshold(z)).clamp_min_(0.0)
        if alpha == 1.5:
            return (z - _entmax15_threshold(z)).clamp_min_(0.0).square_()
        low = torch.full_like(z[..., :1], -1.0)
        high = torch.full_like(low, -((1.0 / z.shape[-1]) ** (alpha - 1.0)))
        power = 1.0 / (alpha - 1.0)
        for _ in range(torch.finfo(z.dtype).bits):
            middle = (low + high) / 2
            too_much = (z - middle).clamp_min_(0.0).pow_(power).sum(-1, keepdim=True) >= 1.0
            low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        p = (z - low).clamp_min_(0.0).pow_(power)
        return p / p.sum(-1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, of_p: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        slopes = p.masked_fill(p == 0, 1.0).pow(2.0 - ctx.alpha).masked_fill(p == 0, 0.0)
        mean = (slopes * of_p).sum(-1, keepdim=True) / slopes.sum(-1, keepdim=True)
        return slopes * (of_p - mean), None


def _sparsemax_threshold(z: Tensor) -> Tensor:
    """Threshold of the largest support whose last score is above it."""
    ordered = z.sort(-1, descending=True).values
    return _of_support((ordered.cumsum(-1) - 1.0) / _counts(z), ordered)


def _entmax15_threshold(z: Tensor) -> Tensor:
    """Solve ``sum over the support of (z_i - tau)^2 = 1``, a quadratic equation for each support."""
    ordered, counts = z.sort(-1, descending=True).values, _counts(z)
    mean = ordered.cumsum(-1) / counts
    variance = ordered.square().cumsum(-1) / counts - mean.square()
    # Where a support is too wide there is no root; it will not be taken.
    return _of_support(mean - (1.0 / counts - variance).clamp_min(0.0).sqrt(), ordered)


def _counts(z: Tensor) -> Tensor:
    return torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)


def _of_support(thresholds: Tensor, ordered: Tensor) -> Tensor:
    # NaN compares as False, and must find a place all the same.
    size = (ordered > thresholds).sum(-1, keepdim=True).clamp_min(1)
    return thresholds.gather(-1, size - 1).clamp_min(-1.0)
