"""Unregularised transport by proximal steps (IPOT), with a certificate of how far from optimal the answer is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.errors import ConvergenceWarning
from shiftkern.ot._weights import check_weights, weights_or_none
from shiftkern.ot.sinkhorn import sinkhorn

__all__ = ["ProximalResult", "proximal_ot"]

#: The certificate costs about as much as a few steps.
_CHECK_EVERY = 10


@dataclass(frozen=True)
class ProximalResult:
    """Outcome of :func:`proximal_ot`: a plan and potentials, both feasible, whose values enclose the optimum.

    Attributes
    ----------
    f, g : Tensor or numpy.ndarray
        Potentials ``(n,)`` and ``(m,)`` in cost units with ``f_i + g_j <= M_ij``, zero weights included.
    value_linear : Tensor or numpy.ndarray
        ``<P, M>``, at least the optimum. Differentiable in M (gradient P) and in a and b (gradients f and g, which are
        unique up to a constant only).
    value_dual : Tensor or numpy.ndarray
        ``<f, a> + <g, b>``, at most the optimum.
    gap : float
        ``value_linear - value_dual``.
    gap_history : tuple of float
        The gap at each test, every tenth step and at the end.
    marginal_error : float
        L1 error of the marginals of the last step's plan, before it was rounded to a feasible one.
    n_iter : int
        Proximal steps made.
    converged : bool
        Whether the gap fell below the tolerance.
    status : {"converged", "max_iter"}
        The same in words.
    """

    f: Any
    g: Any
    value_linear: Any
    value_dual: Any
    gap: float
    gap_history: tuple[float, ...]
    marginal_error: float
    n_iter: int
    converged: bool
    status: str
    _plan: Any = field(repr=False)

    def plan(self) -> Any:
        """Return the plan P ``(n, m)``, with marginals a and b up to rounding."""
        return self._plan


def proximal_ot(
    a: Any,
    b: Any,
    M: Any,
    *,
    beta: float | None = None,
    n_iter: int = 2000,
    inner: int = 10,
    tol: float | None = None,
) -> ProximalResult:
    """Exact optimal transport by inexact proximal point steps: no regularisation remains in the limit.

    Each step is ``P <- argmin <P, M> + beta KL(P | P_before)``, by ``inner`` Sinkhorn updates of the kernel
    ``P_before * exp(-M / beta)`` that begin with the scaling of the step before. After t steps the plan has the form
    ``exp((f + g - M) t / beta)``; its potentials f and g are updated in the log domain, so that a small ``beta`` is no
    danger, only slow.

    Parameters
    ----------
    a, b : Tensor or numpy.ndarray or None
        Weights ``(n,)`` and ``(m,)``, >= 0 with equal positive sums; None for ``1 / n`` and ``1 / m``.
    M : Tensor or numpy.ndarray
        Cost matrix ``(n, m)``, float and finite.
    beta : float, optional
        Weight of the proximal term in cost units, > 0; a twentieth of the range of ``M`` by default. A large one makes
        easy and many steps, a small one few steps that need more inner updates.
    n_iter : int
        Most steps, at least 1.
    inner : int
        Sinkhorn updates in each step, at least 1. The paper finds 1 to be enough; more end sooner where several plans
        cost nearly the same.
    tol : float, optional
        Stop when the gap between the plan's cost and the dual bound is at most ``tol * (max M - min M) * sum(a)``, > 0;
        1e-4 by default.

    Returns
    -------
    ProximalResult
        Plan, potentials, bounds and how the iteration ended, in the library and dtype of ``M``.

    Raises
    ------
    ArgumentError
        Wrong shapes, an empty problem, NaN or infinity, negative weights, unequal or zero sums, an option out of range.
    ArgumentTypeError
        No float tensors or arrays, or both.

    Warns
    -----
    ConvergenceWarning
        ``n_iter`` steps left a larger gap.

    Notes
    -----
    O(n m) per inner update and per test, O(n m) memory; float64 inside. The plan is the last step's, rounded to its
    marginals (Altschuler et al.); the potentials are its own, made feasible by two minima over ``M``. Both therefore
    hold what they promise whether or not the iteration converged.

    References
    ----------
    Xie, Wang, Wang and Zha: A Fast Proximal Point Method for Computing Exact Wasserstein Distance (2020).
    Altschuler, Weed and Rigollet: Near-linear time approximation algorithms for optimal transport via Sinkhorn
    iteration (2017).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import proximal_ot
    >>> M = torch.tensor([[0.0, 1.0], [2.0, 0.5]])
    >>> result = proximal_ot(torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5]), M)
    >>> result.plan().mul(10).round()  # 0.1 has to move
    tensor([[5., 1.],
            [0., 4.]])
    >>> bool(result.value_dual <= 0.3 + 1e-6), bool(result.value_linear >= 0.3 - 1e-6)
    (True, True)
    """
    op = "proximal_ot"
    (a, b, M), back = accept(op, a=weights_or_none(a), b=weights_or_none(b), M=M)
    _checks.tensor(op, "M", M, min_dim=2)
    if M.dim() != 2 or M.numel() == 0:
        _checks.refuse(op, "M", "shape (n, m) with n, m >= 1", f"shape {tuple(M.shape)}")
    if not bool(torch.isfinite(M).all()):
        _checks.refuse(op, "M", "finite numbers", "NaN or infinity")
    a, b = (
        M.new_full((size,), 1.0 / size, dtype=torch.float64)
        if w is None
        else check_weights(op, name, w, size, M.device)
        for name, w, size in (("a", a, M.shape[0]), ("b", b, M.shape[1]))
    )
    mass, other = float(a.detach().double().sum()), float(b.detach().double().sum())
    if abs(mass - other) > 1e-6 * max(mass, other):
        _checks.refuse(op, "b", f"weights that sum to {mass}, as 'a' does", other)
    beta = None if beta is None else _checks.positive(op, "beta", beta)
    n_iter = _checks.positive_int(op, "n_iter", n_iter)
    inner = _checks.positive_int(op, "inner", inner)
    tol = 1e-4 if tol is None else _checks.positive(op, "tol", tol)

    with torch.no_grad():
        cost, p, q = M.detach().double(), a.detach().double(), b.detach().double() * (mass / other)
        span = float(cost.max() - cost.min())
        # Rounding of the two sums, which is all there is where all costs are equal.
        enough = tol * span * mass + 1e-12 * float(cost.abs().max()) * mass
        beta = beta or span / 20 or 1.0
        plan, f, g, history, error, steps = _solve(p, q, cost, beta, n_iter, inner, enough)
        dual = (p * f).sum() + (q * g).sum()
    value = (plan * M).sum()
    if a.requires_grad or b.requires_grad:
        value = value + (f * (a - a.detach())).sum() + (g * (b - b.detach())).sum()
    converged = history[-1] <= enough
    if not converged:
        message = f"{op}: after n_iter={n_iter} steps the gap is {history[-1]:.3g}, above tol={tol} of the cost's range"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    dtype = M.dtype
    return ProximalResult(
        f=back(f.to(dtype)),
        g=back(g.to(dtype)),
        value_linear=back(value.to(dtype)),
        value_dual=back(dual.to(dtype)),
        gap=history[-1],
        gap_history=tuple(history),
        marginal_error=error,
        n_iter=steps,
        converged=converged,
        status="converged" if converged else "max_iter",
        _plan=back(plan.to(dtype)),
    )


def _solve(
    a: Tensor, b: Tensor, M: Tensor, beta: float, n_iter: int, inner: int, gap: float
) -> tuple[Tensor, Tensor, Tensor, list[float], float, int]:
    """Iterate on the rows and columns that have mass; the others join with zeros in the plan."""
    rows, columns = a > 0, b > 0
    p, q, cost = a[rows], b[columns], M[rows][:, columns]
    g = before = torch.zeros_like(q)  # times the number of the step, these are potentials of the accumulated cost
    history: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for step in range(1, n_iter + 1):
            # The step before scaled columns by exp((g - before) / beta); starting there is what makes few updates do.
            start = (2.0 * g - before) / step
            solved = sinkhorn(
                p,
                q,
                cost,
                beta / step,
                max_iter=inner,
                tol=0.0,
                warmstart=(torch.zeros_like(p), start),
                grad="detach",
            )
            before, g = g, solved.g * step
            if step % _CHECK_EVERY == 0 or step == n_iter:
                current = solved.plan()
                error = float((current.sum(1) - p).abs().sum() + (current.sum(0) - q).abs().sum())
                plan = M.new_zeros(M.shape)
                plan[rows.unsqueeze(1) & columns] = _rounded(current, p, q).reshape(-1)
                f_all = (M[:, columns] - solved.g).amin(1)
                g_all = (M - f_all.unsqueeze(1)).amin(0)
                history.append(float((plan * M).sum() - (a * f_all).sum() - (b * g_all).sum()))
                if history[-1] <= gap:
                    break
    return plan, f_all, g_all, history, error, step


def _rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Scale down rows and columns that hold too much; spread what then lacks in proportion."""
    plan = plan * (a / plan.sum(1)).clamp(max=1.0).nan_to_num(nan=1.0).unsqueeze(1)
    plan = plan * (b / plan.sum(0)).clamp(max=1.0).nan_to_num(nan=1.0)
    rows, columns = (a - plan.sum(1)).clamp(min=0.0), (b - plan.sum(0)).clamp(min=0.0)
    total = rows.sum()
    return plan if float(total) == 0.0 else plan + torch.outer(rows, columns) / total
