"""Sorting networks with relaxed comparators."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._ops import sort as ops

__all__ = ["diffsort"]

_Values = TypeVar("_Values", Tensor, np.ndarray[Any, Any])


def diffsort(
    x: _Values,
    network: str = "bitonic",
    steepness: float = 10.0,
    distribution: str = "cauchy",
    error_free: bool = False,
) -> tuple[_Values, _Values]:
    """Sort by a network whose comparators mix their inputs, and give the relaxed permutation matrix.

    A comparator of ``a`` and ``b`` with ``alpha = f(steepness (b - a))`` outputs ``alpha a + (1 - alpha) b`` as the
    smaller and ``(1 - alpha) a + alpha b`` as the larger value. All ``f`` here but the logistic one make the outputs
    monotone in the inputs (no gradient has the wrong sign).

    Parameters
    ----------
    x : Tensor or numpy.ndarray
        ``(n,)`` or ``(B, n)``, float32 or float64, finite; rows are sorted for themselves, ascending.
    network : {"bitonic", "odd_even"}
        "bitonic": about ``log2(n)^2 / 2`` stages; where n is no power of two, the network of the next one, filled up
        with values behind all others whose comparators are exact. "odd_even": n stages of neighbours.
    steepness : float
        Greater than 0; the larger, the nearer to hard sorting.
    distribution : {"cauchy", "reciprocal", "optimal", "logistic"}
        ``f(v)`` is ``atan(v) / pi + 1/2``, ``(v / (2 + |v|) + 1) / 2``, ``v + 1/2`` up to ``|v| = 1/4`` and
        ``1 - 1 / (16 v)``, ``1 / (16 |v|)`` beyond it, or ``1 / (1 + exp(-v))``.
    error_free : bool
        Output exact minima and maxima, so that ``sorted`` and ``P`` are those of hard sorting, with the gradients of
        the relaxed comparators at those values.

    Returns
    -------
    sorted : Tensor or numpy.ndarray
        The sorted values, in the shape, dtype and library of ``x``. Differentiable in ``x``.
    P : Tensor or numpy.ndarray
        ``(n, n)`` or ``(B, n, n)``: row i says how much of each input is in output i, ``sorted = P x``. Rows and
        columns sum to 1. Differentiable in ``x``.

    Raises
    ------
    ArgumentError
        Wrong rank, empty input, values that are not finite, an option out of range.
    ArgumentTypeError
        ``x`` is not of floats of 32 or 64 bits, an option is of the wrong type.

    Notes
    -----
    O(S n^2) time per row for S stages: a comparator mixes two rows of P. The gradient takes about four times as long,
    and O(S n) extra memory for each row that is worked on. Values are float64 inside and rounded once.

    References
    ----------
    Petersen, Borgelt, Kuehne, Deussen: Monotonic Differentiable Sorting Networks (2022).
    Kim, Yoon, Cho: Generalized Neural Sorting Networks with Error-Free Differentiable Swap Functions (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import diffsort
    >>> y, P = diffsort(torch.tensor([3.0, -1.0, 2.0]), steepness=1e6)
    >>> [round(v, 3) for v in y.tolist()]
    [-1.0, 2.0, 3.0]
    >>> P.round().int().tolist()
    [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    """
    op = "diffsort"
    (values,), back = accept(op, x=x)
    values = _checks.tensor(op, "x", values, min_dim=1, dtypes=(torch.float32, torch.float64))
    if values.dim() > 2:
        _checks.refuse(op, "x", "shape (n,) or (B, n)", f"shape {tuple(values.shape)}")
    if values.numel() == 0:
        _checks.refuse(op, "x", "at least one value", _checks.describe(values))
    y, p = ops.diffsort(
        values if values.dim() == 2 else values.unsqueeze(0),
        _checks.one_of(op, "network", network, ("bitonic", "odd_even")),
        _checks.one_of(op, "distribution", distribution, ("cauchy", "reciprocal", "optimal", "logistic")),
        _checks.positive(op, "steepness", steepness),
        _checks.flag(op, "error_free", error_free),
    )
    if values.dim() == 1:
        y, p = y.squeeze(0), p.squeeze(0)
    return back(y), back(p)
