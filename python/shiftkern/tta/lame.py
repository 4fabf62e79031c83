"""LAME: adapt a batch's class probabilities, leaving the model alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import from_numpy
from shiftkern._ops import tta as ops
from shiftkern.errors import ConvergenceWarning

__all__ = ["LameResult", "lame"]


@dataclass(frozen=True)
class LameResult:
    """Outcome of :func:`lame`.

    Attributes
    ----------
    probs : Tensor or numpy.ndarray
        Adapted probabilities ``(N, K)``.
    energy : Tensor
        Energy of the starting point and after each update, float64, shape ``(iterations + 1,)``.
    iterations : int
        Updates made.
    converged : bool
        Whether the relative change of the energy fell below the tolerance.
    """

    probs: Any
    energy: Tensor
    iterations: int
    converged: bool


@overload
def lame(
    probs: Tensor,
    features: Tensor,
    *,
    affinity: str = ...,
    k: int = ...,
    weight: float = ...,
    max_iter: int = ...,
    tol: float = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def lame(
    probs: np.ndarray[Any, Any],
    features: np.ndarray[Any, Any],
    *,
    affinity: str = ...,
    k: int = ...,
    weight: float = ...,
    max_iter: int = ...,
    tol: float = ...,
    return_info: Literal[False] = ...,
) -> np.ndarray[Any, Any]: ...
@overload
def lame(
    probs: Any,
    features: Any,
    *,
    affinity: str = ...,
    k: int = ...,
    weight: float = ...,
    max_iter: int = ...,
    tol: float = ...,
    return_info: Literal[True],
) -> LameResult: ...
def lame(
    probs: Any,
    features: Any,
    *,
    affinity: str = "knn",
    k: int = 5,
    weight: float = 1.0,
    max_iter: int = 100,
    tol: float = 1e-8,
    return_info: bool = False,
) -> Any:
    """Adapt the class probabilities of a batch so that near instances agree.

    From ``Y = P`` iterates ``Y <- softmax(log(P + 1e-10) + weight * W Y)`` until the energy
    ``-<Y, log P> - weight / 2 <Y, W Y> + <Y, log Y>`` changes by less than ``tol`` relatively. For positive
    semi-definite W ("linear", "rbf") the energy falls monotonically; "knn" carries no such guarantee.

    Parameters
    ----------
    probs : Tensor or numpy.ndarray
        Class probabilities ``(N, K)``, float, finite and not negative.
    features : Tensor or numpy.ndarray
        Features ``(N, d)``, float and finite; scaled to unit length inside.
    affinity : {"knn", "rbf", "linear"}
        "knn": 1 for the ``k`` nearest other instances, not symmetrised. "rbf": ``exp(-dist^2 / (2 sigma^2))`` with
        ``sigma`` the mean of each instance's k-th smallest distance, the zero to itself counted, as in the authors'
        code. "linear": inner products.
    k : int
        Neighbours, at least 1; at most all there are.
    weight : float
        Weight of the pairwise term, >= 0.
    max_iter : int
        Most updates, at least 0.
    tol : float
        Relative change of the energy to stop at, >= 0.
    return_info : bool
        Return a :class:`LameResult` instead of the probabilities.

    Returns
    -------
    Tensor, numpy.ndarray or LameResult
        Probabilities in the shape, dtype, device and library of ``probs``; rows sum to 1. Not differentiable.

    Raises
    ------
    ArgumentError
        Wrong rank or length, non-finite or negative probabilities, non-finite features, an option out of range.
    ArgumentTypeError
        No float tensors or arrays, or one of each.

    Warns
    -----
    ConvergenceWarning
        ``max_iter`` updates were not enough.

    Notes
    -----
    O(N^2 d) for the affinity and O(N k K) per update ("knn"; no N x N matrix is kept), O(N^2 K) and O(N^2) memory
    ("rbf"), O(N d K) ("linear"). Probabilities are float64 inside.

    References
    ----------
    Boudiaf et al.: Parameter-free Online Test-time Adaptation (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.tta import lame
    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55]])
    >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.1]])
    >>> lame(probs, features, k=2).argmax(1).tolist()
    [0, 0, 0]
    """
    op = "lame"
    is_numpy = isinstance(probs, np.ndarray)
    if is_numpy:
        if not isinstance(features, np.ndarray):
            _checks.refuse_type(op, "features", "a numpy.ndarray, as 'probs' is one", _checks.describe(features))
        probs, features = (from_numpy(op, n, a) for n, a in (("probs", probs), ("features", features)))
    _checks.tensor(op, "probs", probs, min_dim=2)
    _checks.tensor(op, "features", features, min_dim=2, device=probs.device)
    if probs.dim() != 2:
        _checks.refuse(op, "probs", "shape (N, K)", f"shape {tuple(probs.shape)}")
    if features.dim() != 2 or features.shape[0] != probs.shape[0]:
        _checks.refuse(op, "features", f"shape ({probs.shape[0]}, d)", f"shape {tuple(features.shape)}")
    max_iter = _checks.integer(op, "max_iter", max_iter, 0)
    y, energy, status = ops.lame(
        probs,
        features,
        _checks.one_of(op, "affinity", affinity, ("knn", "rbf", "linear")),
        _checks.positive_int(op, "k", k),
        _checks.non_negative(op, "weight", weight),
        max_iter,
        _checks.non_negative(op, "tol", tol),
    )
    iterations, converged = status.tolist()
    if not converged and not torch.compiler.is_compiling():
        message = f"lame: the energy still moved by more than tol={tol} after max_iter={max_iter} updates"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    y = y.to(probs.dtype)
    result = y.numpy() if is_numpy else y
    if not _checks.flag(op, "return_info", return_info):
        return result
    return LameResult(result, energy[: iterations + 1], iterations, bool(converged))
