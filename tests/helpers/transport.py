"""Entropic transport as one writes it down: plain float64 loops in the log domain, one update at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import logsumexp

Array = np.ndarray
EXACT = ("exact", 0.0)

#: Around lanes, panels and blocks of rows.
SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257, 300)


def _respond(side: tuple[str, float], balanced: Array, reg: float) -> Array:
    """The potential less ``reg * log`` of the weights that answers ``balanced``, the one that meets them."""
    kind, rho = side
    if kind == "kl":
        return balanced * rho / (rho + reg)
    if kind == "tv":
        return np.clip(balanced, -rho, rho)
    return np.minimum(balanced, 0.0) if kind == "at_most" else balanced


def sinkhorn_loop(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    steps: int,
    *,
    order: str = "fg",
    omega: float = 1.0,
    rows: tuple[str, float] = EXACT,
    columns: tuple[str, float] = EXACT,
    start: tuple[Any, Any] | None = None,
    anneal: tuple[float, float] | None = None,
    mass: float | None = None,
) -> tuple[Array, Array, Array, Array]:
    """``steps`` updates of both potentials from zero: f, g, the plan, and the marginal error of every iteration.

    The error is that of the plan of the new ``f`` and the old ``g``. After "gf" that plan is the one returned.
    """
    a, b, M = (np.asarray(x, dtype=np.float64) for x in (a, b, M))
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    f0, g0 = (np.zeros_like(a), np.zeros_like(b)) if start is None else start
    f = np.where(a > 0, np.where(np.isfinite(f0), f0, 0.0), -np.inf)
    g = np.where(b > 0, np.where(np.isfinite(g0), g0, 0.0), -np.inf)
    shift, errors = 0.0, []

    def plan(eps: float) -> Array:
        return np.exp((f[:, None] + g + shift - M) / eps)

    def step(old: Array, log_w: Array, side: tuple[str, float], balanced: Array, eps: float, relax: float) -> Array:
        new = _respond(side, balanced, eps) + eps * log_w
        # Potentials of zero weights are -inf and stay so.
        return np.where(log_w > -np.inf, (1 - relax) * np.where(log_w > -np.inf, old, 0.0) + relax * new, -np.inf)

    def columns_step(eps: float, relax: float) -> Array:
        balanced = -eps * logsumexp((f[:, None] - M) / eps, axis=0) - shift
        return step(g, log_b, columns, balanced, eps, relax)

    with np.errstate(invalid="ignore"):
        for k in range(steps):
            eps = reg if anneal is None or k + 1 == steps else max(reg, anneal[0] * anneal[1] ** k)
            relax = omega if k and eps == reg else 1.0
            if k == 0 and mass is not None:
                shift = eps * (np.log(mass) - logsumexp((f[:, None] + g - M) / eps))
            if k == 0 and order == "gf":
                g = columns_step(eps, 1.0)
            f = step(f, log_a, rows, -eps * logsumexp((g + shift - M) / eps, axis=1), eps, relax)
            P = plan(eps)
            errors.append(np.abs(P.sum(1) - a).sum() + np.abs(P.sum(0) - b).sum())
            if order == "gf" and k + 1 == steps:
                break
            g = columns_step(eps, relax)
            if mass is not None:
                shift += eps * np.log(mass / plan(eps).sum())
    return f, g + shift, plan(reg), np.array(errors)


def solve_loop(a: Any, b: Any, M: Any, reg: float, tol: float = 1e-11, **options: Any) -> Array:
    """The plan at convergence, with annealing so that small ``reg`` takes no ages."""
    steps = 500
    while True:
        _, _, P, errors = sinkhorn_loop(a, b, M, reg, steps, anneal=(max(reg, float(np.ptp(M))), 0.95), **options)
        if errors[-1] <= tol * np.sum(a) or steps > 20_000:
            assert errors[-1] <= tol * np.sum(a), "the oracle did not converge"
            return P
        steps *= 4


def explicit_error(P: Any, a: Any, b: Any) -> float:
    P = np.asarray(P, dtype=np.float64)
    return float(np.abs(P.sum(1) - np.asarray(a)).sum() + np.abs(P.sum(0) - np.asarray(b)).sum())


def problem(n: int, m: int, seed: int = 0, dtype: Any = np.float64) -> tuple[Array, Array, Array]:
    """Weights that sum to one, and costs of order one."""
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return a / a.sum(), b / b.sum(), rng.random((n, m)).astype(dtype)


def rounding(dtype: Any, M: Any, reg: float, steps: int) -> float:
    """How far plans may be from the exact ones, relatively, after ``steps`` updates.

    Updates do not expand errors in the potentials; each adds a few roundings of the largest exponent.
    """
    reach = float(np.abs(M[np.isfinite(M)]).max()) / reg if np.isfinite(M).any() else 0.0
    return 4 * (steps + 4) * float(np.finfo(dtype).eps) * (reach + 8)


def objective(P: Any, M: Any, a: Any, b: Any, reg: float) -> tuple[float, float, float, float]:
    """``<P, M> + reg KL(P | a b^T)``, ``<P, M>``, the divergence, and the entropy."""
    P, M = np.asarray(P, dtype=np.float64), np.asarray(M, dtype=np.float64)
    reference = np.outer(a, b)
    held = P > 0
    linear = float((P[held] * M[held]).sum())
    kl = float((P[held] * np.log(P[held] / reference[held])).sum() - P.sum() + reference.sum())
    entropy = float(-(P[held] * np.log(P[held])).sum())
    return linear + reg * kl, linear, kl, entropy
