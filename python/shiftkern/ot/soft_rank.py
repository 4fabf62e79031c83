"""Soft ranks and soft sorted values: projections onto the permutahedron."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._ops import sort as ops

__all__ = ["soft_rank", "soft_sort"]

_Values = TypeVar("_Values", Tensor, np.ndarray[Any, Any])


def soft_rank(
    x: _Values,
    *,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    dim: int = -1,
    descending: bool = False,
) -> _Values:
    """Rank values differentiably: the projection of ``x / strength`` onto the permutahedron of the ranks.

    With ``rho = (n, ..., 1)`` and ``e`` the strength, "l2" gives
    ``argmin_r ||r - x / e||^2`` over the convex hull of the permutations of ``rho``, and "kl" gives
    ``argmin_r KL(r || exp(x / e))`` over the same set. As ``e`` falls to 0 the ranks become the hard ones, as it grows
    they all become ``(n + 1) / 2``; their sum is always ``n (n + 1) / 2``.

    Parameters
    ----------
    x : Tensor or numpy.ndarray
        Values of any shape, float32 or float64, finite; every line along ``dim`` is ranked for itself.
    regularization : {"l2", "kl"}
        Distance of the projection. Gradients of "l2" are piecewise constant, those of "kl" smooth within a pool.
    regularization_strength : float
        ``e``, greater than 0.
    dim : int
        Dimension along which values are ranked.
    descending : bool
        Give rank 1 to the largest value instead of the smallest: the ranks of ``-x``.

    Returns
    -------
    Tensor or numpy.ndarray
        Soft ranks from 1 to n, in the shape, dtype and library of ``x``. Differentiable in ``x``.

    Raises
    ------
    ArgumentError
        Empty input, values that are not finite, an option out of range.
    ArgumentTypeError
        ``x`` is not of floats of 32 or 64 bits, an option is of the wrong type.

    Notes
    -----
    O(n log n) time and O(n) memory per line, O(n) for the gradient. Everything is float64 inside and rounded once; a
    value that is pooled with no other has its hard rank exactly. Where two pools just touch, and where values are
    equal, the gradient is that of the joined pool.

    References
    ----------
    Blondel, Teboul, Berthet, Djolonga: Fast Differentiable Sorting and Ranking (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import soft_rank
    >>> x = torch.tensor([0.3, 5.0, -2.0])
    >>> soft_rank(x, regularization_strength=0.1).tolist()
    [2.0, 3.0, 1.0]
    >>> [round(r, 2) for r in soft_rank(x, regularization_strength=5.0).tolist()]
    [1.84, 2.78, 1.38]
    """
    y: _Values = _soft_order("soft_rank", x, True, regularization, regularization_strength, dim, descending)
    return y


def soft_sort(
    x: _Values,
    *,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    dim: int = -1,
    descending: bool = False,
) -> _Values:
    """Sort values differentiably: the projection of ``rho / strength`` onto the permutahedron of the values.

    With ``rho = (n, ..., 1)`` and ``e`` the strength, "l2" gives, in descending order,
    ``argmin_y ||y - rho / e||^2`` over the convex hull of the permutations of ``x``, and "kl" gives
    ``argmin_y KL(exp(y) || exp(rho / e))`` with ``exp(y)`` in the hull of the permutations of ``exp(x)``. Ascending
    order is minus the descending one of ``-x``. As ``e`` falls to 0 the values become the sorted ones, as it grows they
    all become their mean ("l2", which always keeps their sum) or the logarithm of the mean of their exponentials
    ("kl", which keeps ``sum exp(y)`` when descending and ``sum exp(-y)`` when ascending).

    Parameters
    ----------
    x : Tensor or numpy.ndarray
        Values of any shape, float32 or float64, finite; every line along ``dim`` is sorted for itself.
    regularization : {"l2", "kl"}
        Distance of the projection.
    regularization_strength : float
        ``e``, greater than 0.
    dim : int
        Dimension along which values are sorted.
    descending : bool
        Begin with the largest value instead of the smallest.

    Returns
    -------
    Tensor or numpy.ndarray
        Soft sorted values in the shape, dtype and library of ``x``; monotone along ``dim``. Differentiable in ``x``.

    Raises
    ------
    ArgumentError
        Empty input, values that are not finite, an option out of range.
    ArgumentTypeError
        ``x`` is not of floats of 32 or 64 bits, an option is of the wrong type.

    Notes
    -----
    O(n log n) time and O(n) memory per line, O(n) for the gradient. Everything is float64 inside and rounded once; a
    value that is pooled with no other comes out exactly. Where two pools just touch, the gradient is that of the joined
    pool.

    References
    ----------
    Blondel, Teboul, Berthet, Djolonga: Fast Differentiable Sorting and Ranking (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import soft_sort
    >>> x = torch.tensor([3.0, 1.0, 2.0])
    >>> soft_sort(x, regularization_strength=2.0).tolist()
    [1.5, 2.0, 2.5]
    >>> soft_sort(x, regularization_strength=2.0, regularization="kl", descending=True).diff().lt(0).all().item()
    True
    """
    y: _Values = _soft_order("soft_sort", x, False, regularization, regularization_strength, dim, descending)
    return y


def _soft_order(
    op: str, x: Any, ranks: bool, regularization: object, strength: object, dim: object, descending: object
) -> Any:
    (x,), back = accept(op, x=x)
    x = _checks.tensor(op, "x", x, min_dim=1, dtypes=(torch.float32, torch.float64))
    if x.numel() == 0:
        _checks.refuse(op, "x", "at least one value", _checks.describe(x))
    dim = _checks.integer(op, "dim", dim, -x.dim())
    if dim >= x.dim():
        _checks.refuse(op, "dim", f"an integer below {x.dim()}", dim)
    kl = _checks.one_of(op, "regularization", regularization, ("l2", "kl")) == "kl"
    strength = _checks.positive(op, "regularization_strength", strength)
    lines = x.movedim(dim, -1)
    y, _, _ = ops.soft_order(
        lines.reshape(-1, lines.shape[-1]), ranks, kl, strength, _checks.flag(op, "descending", descending)
    )
    return back(y.view(lines.shape).movedim(-1, dim))
