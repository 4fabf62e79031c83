"""Predict each unit of one network from few units of another."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from shiftkern import _checks
from shiftkern.errors import ConvergenceWarning
from shiftkern.merge._comoments import measure

__all__ = ["sparse_prediction"]


def sparse_prediction(
    acts_a: Any, acts_b: Any, decay: float = 10**-2.6, *, max_iter: int = 5000, tol: float = 1e-8
) -> Any:
    """Weights with which few units of A predict each unit of B: a mapping of one to many.

    ``min over W of E|y - W^T x|^2 / 2 + decay sum |W_ij|``, with ``x`` and ``y`` the activations of A and B, each unit
    shifted and scaled to mean 0 and variance 1.

    Parameters
    ----------
    acts_a, acts_b : Tensor or numpy.ndarray, or iterable of these
        Activations of two layers on the same inputs, as for :func:`activation_matching`.
    decay : float
        Weight of the penalty, >= 0. From 1 on every weight is 0.
    max_iter : int
        Steps at most.
    tol : float
        Largest violation of the optimality conditions that ends the iteration.

    Returns
    -------
    Tensor or numpy.ndarray
        ``W``, float64, ``(units of A, units of B)``; exact zeros where a unit is not used, and for units that never
        vary. Not differentiable.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`activation_matching`; an option out of range.

    Warns
    -----
    ConvergenceWarning
        ``max_iter`` steps were not enough.

    Notes
    -----
    The objective depends on the data through correlations alone: one pass over it, O(n p (p + q)), then accelerated
    proximal gradient steps (with restarts) of O(p^2 q). The authors fit the same layer by stochastic gradient descent.

    References
    ----------
    Li, Yosinski, Clune, Lipson and Hopcroft: Convergent Learning: Do different neural networks learn the same
    representations? (2016). Beck and Teboulle: A Fast Iterative Shrinkage-Thresholding Algorithm (2009).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import sparse_prediction
    >>> a = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    >>> b = a[:, :1] + a[:, 3:4]
    >>> sparse_prediction(a, b, 0.1).ne(0).flatten().tolist()
    [True, False, False, True, False]
    """
    op = "sparse_prediction"
    decay, tol = _checks.non_negative(op, "decay", decay), _checks.positive(op, "tol", tol)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)
    moments, back = measure(op, acts_a, acts_b, own=True)
    gram, cross = moments.own_correlations(), moments.correlations()
    step = 1.0 / max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-300)
    weights = ahead = torch.zeros_like(cross)
    momentum = 1.0
    for _ in range(max_iter):
        moved = torch.nn.functional.softshrink(ahead - step * (gram @ ahead - cross), step * decay)
        slope = gram @ moved - cross
        # At a minimum: slope = -decay sign(W) where W is not 0, and |slope| <= decay elsewhere.
        violation = torch.where(moved != 0, (slope + decay * moved.sign()).abs(), slope.abs() - decay)
        if float(violation.max()) <= tol:
            return back(moved)
        # Momentum that points uphill is dropped.
        faster = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        uphill = float(((ahead - moved) * (moved - weights)).sum()) > 0.0
        ahead = moved if uphill else moved + (momentum - 1.0) / faster * (moved - weights)
        weights, momentum = moved, 1.0 if uphill else faster
    message = f"{op}: the optimality conditions are still violated by {float(violation.max()):.1e} > tol={tol} "
    warnings.warn(message + f"after max_iter={max_iter} steps", ConvergenceWarning, stacklevel=2)
    return back(weights)
