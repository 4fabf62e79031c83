"""Sinkhorn divergence: entropic transport between samples, without its bias."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.errors import ConvergenceWarning
from shiftkern.ot._weights import check_weights, weights_or_none
from shiftkern.ot.sinkhorn import sinkhorn_samples

__all__ = ["sinkhorn_divergence"]

Metric: TypeAlias = Literal["sqeuclidean", "euclidean", "cosine"]

#: What would differ between the three problems, or make the difference of their values something else.
_REFUSED = ("warmstart", "reg_m", "reg_m_type", "grad")


def sinkhorn_divergence(
    X: Any,
    Y: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    *,
    cost: Metric = "sqeuclidean",
    debias: bool = True,
    **options: Any,
) -> Any:
    """Debiased entropic transport cost ``S(X, Y) = OT(X, Y) - (OT(X, X) + OT(Y, Y)) / 2``.

    ``OT(X, Y) = min_P <P, M> + reg KL(P | a b^T)`` over the plans with marginals a and b, M holding the costs of all
    pairs. S goes from the transport cost (reg -> 0) to half of the energy-like distance
    ``2 <a b^T, M_XY> - <a a^T, M_XX> - <b b^T, M_YY>`` (reg -> infinity), is zero for equal measures, and is positive
    for others if ``exp(-cost / reg)`` is a positive kernel, which holds for "sqeuclidean", "euclidean" and "cosine".

    Parameters
    ----------
    X, Y : Tensor or numpy.ndarray
        Samples ``(n, d)`` and ``(m, d)``, float and finite.
    reg : float
        Regularisation in the units of the cost, > 0. For "sqeuclidean" it is twice the square of GeomLoss's blur, and S
        twice GeomLoss's value, whose cost has a factor of one half.
    a, b : Tensor or numpy.ndarray, optional
        Weights ``(n,)`` and ``(m,)``, >= 0 with equal sums; ``1 / n`` and ``1 / m`` by default.
    cost : {"sqeuclidean", "euclidean", "cosine"}
        ``|x - y|^2``, ``|x - y|``, or ``1 - <x, y> / (|x| |y|)``.
    debias : bool
        Subtract the self terms; without them this is ``OT(X, Y)``.
    **options
        Of :func:`shiftkern.ot.sinkhorn_samples`, the same for all three problems: ``max_iter``, ``tol``, ``omega``,
        ``reg_init`` and so on.

    Returns
    -------
    Tensor or numpy.ndarray
        Shape ``()``. Differentiable in ``X``, ``Y``, ``a`` and ``b`` by the envelope theorem: exact at convergence,
        first order only. Nothing is clamped: values within the solver's tolerance of zero may be negative.

    Raises
    ------
    ArgumentError
        Wrong shapes, no samples, NaN or infinity, negative weights or unequal sums, an unknown cost, an option that the
        solver refuses or that has no meaning here (``warmstart``, ``reg_m``, ``reg_m_type``, ``grad``).
    ArgumentTypeError
        No float tensors or arrays, or both.

    Warns
    -----
    ConvergenceWarning
        One of the problems did not converge; the message says which.

    Notes
    -----
    Three solves, each O(n m d) per iteration (n n d and m m d for the self terms) in O(n + m) memory. The self terms
    begin at the symmetric potential, found by averaged updates: alternating ones would need thousands of iterations
    where ``reg`` is small against the distances of the samples.

    References
    ----------
    Feydy et al.: Interpolating between Optimal Transport and MMD using Sinkhorn Divergences (2019).
    Genevay, Peyré and Cuturi: Learning Generative Models with Sinkhorn Divergences (2018).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sinkhorn_divergence
    >>> X = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    >>> round(sinkhorn_divergence(X, X + 3, 0.5).item(), 6)  # a translation costs its squared length
    9.0
    """
    op = "sinkhorn_divergence"
    (X, Y, a, b), back = accept(op, X=X, Y=Y, a=weights_or_none(a), b=weights_or_none(b))
    _samples(op, "X", X, None)
    _samples(op, "Y", Y, X)
    if X.dtype != Y.dtype:
        common = torch.promote_types(X.dtype, Y.dtype)
        X, Y = X.to(common), Y.to(common)
    reg = _checks.positive(op, "reg", reg)
    masses = [
        1.0 if w is None else float(check_weights(op, name, w, len(x), X.device).detach().double().sum())
        for name, w, x in (("a", a, X), ("b", b, Y))
    ]
    slack = max(1e-6, *(torch.finfo(w.dtype).eps for w in (a, b) if w is not None), 0.0)
    if abs(masses[0] - masses[1]) > slack * max(masses):
        _checks.refuse(op, "b" if b is not None else "a", "weights of equal sums", f"{masses[0]} and {masses[1]}")
    _checks.one_of(op, "cost", cost, ("sqeuclidean", "euclidean", "cosine"))
    _checks.flag(op, "debias", debias)
    for name in _REFUSED:
        if name in options:
            _checks.refuse(op, name, "no such option, as it cannot serve all three problems", repr(options[name]))

    max_iter = _checks.positive_int(op, "max_iter", options.pop("max_iter", 1000))
    tol = options.pop("tol", None)
    default = masses[0] * (1e-7 if X.dtype == torch.float64 else 1e-4)
    tol = default if tol is None else _checks.positive(op, "tol", tol)
    options = {"cost": cost, "max_iter": max_iter, "tol": tol, **options}
    values, missed = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for pair, x, y, p, q in [("X and Y", X, Y, a, b), ("X and X", X, X, a, a), ("Y and Y", Y, Y, b, b)]:
            if x is not y:
                solved = sinkhorn_samples(x, y, reg, p, q, **options)
            elif debias:
                start = _symmetric_potential(x, reg, p, cost, max_iter, tol)
                solved = sinkhorn_samples(x, y, reg, p, q, warmstart=(start, start), **options)
            else:
                break
            values.append(solved.value)
            if not solved.converged:
                missed.append(f"{pair} (marginal error {float(solved.marginal_error):.3g})")
    if missed:
        message = f"{op}: the solver did not converge between {', '.join(missed)}"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return back(values[0] - (values[1] + values[2]) / 2 if debias else values[0])


def _symmetric_potential(x: Tensor, reg: float, a: Tensor | None, cost: Metric, max_iter: int, tol: float) -> Tensor:
    """Potential f of a measure to itself, for which the plan ``exp((f_i + f_j - M_ij) / reg)`` is its own transpose.

    Alternating updates find the sum ``f + g`` quickly but hardly move mass between distant samples, and stall. The mean
    of f and its update at least halves the error at each step, as exp(-M / reg) is positive semi-definite.
    """
    x = x.detach()
    weights = x.new_full((len(x),), 1.0 / len(x)) if a is None else a.detach().to(x.dtype)
    filled = weights > 0
    f = torch.zeros_like(weights).masked_fill(~filled, -torch.inf)
    for _ in range(max_iter):
        new = sinkhorn_samples(x, x, reg, a, a, cost=cost, max_iter=1, warmstart=(f, f), grad="detach").f
        error = (weights[filled] * torch.expm1((f - new)[filled] / reg).abs()).sum()
        f = (f + new) / 2
        if float(error) <= tol:
            break
    return f


def _samples(op: str, name: str, x: Any, like: Tensor | None) -> None:
    _checks.tensor(op, name, x, min_dim=2, device=None if like is None else like.device)
    if x.dim() != 2 or x.numel() == 0:
        _checks.refuse(op, name, "shape (samples, d), neither of them 0", f"shape {tuple(x.shape)}")
    if like is not None and x.shape[1] != like.shape[1]:
        _checks.refuse(op, name, f"{like.shape[1]} dimensions, as 'X' has", x.shape[1])
    if not bool(torch.isfinite(x).all()):
        _checks.refuse(op, name, "finite numbers", "NaN or infinity")
