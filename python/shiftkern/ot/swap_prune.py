"""SWAP (378): prune weights so that the outputs of a linearised network keep their distribution."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.errors import ConvergenceWarning
from shiftkern.ot.sinkhorn import sinkhorn

__all__ = ["SwapResult", "cubic_sparsity", "swap_prune"]

#: Step sizes are halved at most this often; then no step is left that rounding does not drown.
_HALVINGS = 60


@dataclass(frozen=True)
class SwapResult:
    """Outcome of :func:`swap_prune`.

    Attributes
    ----------
    weights : Tensor or numpy.ndarray
        Pruned weights ``(p,)``, at most k of them not zero.
    mask : Tensor or numpy.ndarray
        Boolean ``(p,)``: where they are not zero.
    plan : Tensor or numpy.ndarray
        Last plan ``(n, n)``: row i is an output of the dense weights, column j one of the pruned weights.
    objective : Tensor or numpy.ndarray
        float64, the start (the k largest weights) and each step: ``Q`` plus the entropy's part,
        ``n / 2 * reg * KL(P | 1/n^2)``, which is what a step and a new plan both lower. Never rises with
        ``step="backtracking"``.
    quality : Tensor or numpy.ndarray
        float64, ``Q`` alone at the same times; the same as ``objective`` without entropy.
    n_iter : int
        Steps made.
    converged : bool
        Whether the objective stopped moving, and every plan was solved to its tolerance.
    """

    weights: Any
    mask: Any
    plan: Any
    objective: Any
    quality: Any
    n_iter: int
    converged: bool


def swap_prune(
    gradients: Any,
    weights: Any,
    keep: float,
    *,
    reg: float | None = 1.0,
    lam: float = 0.01,
    transport: bool = True,
    step: str | float = "backtracking",
    n_steps: int = 200,
    tol: float = 1e-6,
    sinkhorn_tol: float = 1e-4,
    max_iter: int = 5000,
) -> SwapResult:
    """Sparse weights by entropic Wasserstein regression: match outputs as a distribution, not one by one.

    With the samples' gradients x_i as linearised network, dense weights w0 and a plan P with marginals ``1 / n``::

        Q(w) = n / 2 sum_ij P_ij (x_i.w0 - x_j.w)^2 + n lam / 2 |w - w0|^2    subject to |w|_0 <= k

    From the k largest of w0, alternates the best plan for w, ``argmin_P <P, C> + reg KL(P | 1/n^2)`` with
    ``C_ij = (x_i.w0 - x_j.w)^2``, and a step at that plan, ``w <- H_k(w - tau grad Q)`` with
    ``grad Q = X^T (X w - n P^T X w0) + n lam (w - w0)``, where H_k keeps the k largest magnitudes.

    Parameters
    ----------
    gradients : Tensor or numpy.ndarray
        Per-sample gradients of the loss in the weights, ``(n, p)``, float and finite.
    weights : Tensor or numpy.ndarray
        Dense weights ``(p,)``, float and finite.
    keep : int or float
        How many weights stay, an integer from 1 to p, or which part of them, a float in (0, 1].
    reg : float or None
        Regularisation in units of C, >= 0. None or 0: the exact plan, which sorts both outputs. ``math.inf``: the
        independent plan ``1 / n^2``, which matches the mean only.
    lam : float
        Weight of the distance to the dense weights, >= 0.
    transport : bool
        False fixes the plan ``I / n``: sparse regression of each output, as without transport.
    step : "backtracking", "lipschitz" or float
        Step size tau. "backtracking": doubles the size of the step before and halves it until the objective does not
        rise. "lipschitz": ``1 / (|X|^2 + n lam)``, which never raises Q at the plan of the step. A number > 0: itself,
        without any promise.
    n_steps : int
        Most steps, at least 0.
    tol : float
        Stop when a step with its new plan lowers the objective by less than ``tol`` times its value, >= 0.
    sinkhorn_tol, max_iter : float, int
        L1 error of the plan's marginals and most iterations, for the entropic plan.

    Returns
    -------
    SwapResult
        Weights in the dtype of ``weights``, with their mask, plan and history, in the library of the input. Not
        differentiable.

    Raises
    ------
    ArgumentError
        Wrong shapes, no samples or weights, NaN or infinity, an option out of range, a step size
        given as a number at which the steps diverge.
    ArgumentTypeError
        No float tensors or arrays, or one of each; options of a wrong type.

    Warns
    -----
    ConvergenceWarning
        The objective still moved after ``n_steps``, or a plan did not reach its tolerance.

    Notes
    -----
    O(n p) per step and trial, O(n^2) per Sinkhorn iteration, O(n p + n^2) memory; float64 inside. A plan that an
    unconverged solve leaves worse than the one before is not taken.

    The published code steps along ``X^T P (X w - X w0) + lam (w - w0)``, which is not the gradient of its
    objective: it transports both outputs, and its two terms are scaled differently. This is the gradient. The authors
    tune tau by Adam and cap it where the support would change; we search for it.

    References
    ----------
    You and Cheng: SWAP: Sparse Entropic Wasserstein Regression for Robust Network Pruning (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import swap_prune
    >>> X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> result = swap_prune(X, torch.tensor([3.0, 0.1, -2.0, 0.0, 0.2, 1.0]), 3)
    >>> result.mask.tolist()
    [True, False, True, False, False, True]
    """
    op = "swap_prune"
    (gradients, weights), back = accept(op, gradients=gradients, weights=weights)
    _checks.tensor(op, "gradients", gradients, min_dim=2)
    if gradients.dim() != 2 or gradients.numel() == 0:
        _checks.refuse(op, "gradients", "shape (n, p) with n, p >= 1", f"shape {tuple(gradients.shape)}")
    n, size = gradients.shape
    _checks.tensor(op, "weights", weights, shape=(size,), device=gradients.device)
    for name, x in (("gradients", gradients), ("weights", weights)):
        if not bool(torch.isfinite(x).all()):
            _checks.refuse(op, name, "finite numbers", "NaN or infinity")
    k = _kept(op, keep, size)
    entropy = _checks.threshold(op, "reg", reg) or 0.0
    lam = _checks.non_negative(op, "lam", lam)
    _checks.flag(op, "transport", transport)
    if isinstance(step, str):
        _checks.one_of(op, "step", step, ("backtracking", "lipschitz"))
    else:
        step = _checks.positive(op, "step", step)
    n_steps = _checks.integer(op, "n_steps", n_steps, 0)
    tol = _checks.non_negative(op, "tol", tol)
    sinkhorn_tol = _checks.positive(op, "sinkhorn_tol", sinkhorn_tol)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)

    with torch.no_grad():
        X, dense = gradients.double(), weights.double()
        planner = _Planner(X @ dense, entropy, transport, sinkhorn_tol, max_iter)
        w = _largest(dense, k)
        plan, extra = planner.best(X @ w)
        # The largest singular value, from the smaller of the two products of X with itself.
        gram = X @ X.T if n <= size else X.T @ X
        bound = float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0)) + n * lam
        tau = step if isinstance(step, float) else 1.0 / bound if bound > 0 else 1.0
        quality = [_quality(X, w, dense, lam, planner.source, plan)]
        objective = [quality[0] + extra]
        settled = False
        taken = 0
        while taken < n_steps and not settled:
            current = quality[-1]
            slope = _slope(X, w, dense, lam, planner.source, plan)
            if step == "backtracking":
                tau *= 2.0
            for _ in range(_HALVINGS):
                trial = _largest(w - tau * slope, k)
                reached = _quality(X, trial, dense, lam, planner.source, plan)
                if step != "backtracking" or reached <= current:
                    break
                tau /= 2.0
            else:
                trial, reached = w, current
            if not math.isfinite(reached):
                _checks.refuse(op, "step", "a step size that keeps the objective finite", step)
            w, taken = trial, taken + 1
            new, new_extra = planner.best(X @ w)
            new_quality = _quality(X, w, dense, lam, planner.source, new)
            if step != "backtracking" or new_quality + new_extra <= reached + extra:
                plan, extra, reached = new, new_extra, new_quality
            quality.append(reached)
            objective.append(reached + extra)
            settled = abs(objective[-2] - objective[-1]) <= tol * abs(objective[-2])
    if n_steps and not settled:
        message = f"{op}: the objective still moved by more than tol={tol} after n_steps={n_steps} steps"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    if planner.missed:
        message = (
            f"{op}: {planner.missed} of {taken + 1} plans missed sinkhorn_tol={sinkhorn_tol} in {max_iter} iterations"
        )
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return SwapResult(
        weights=back(w.to(weights.dtype)),
        mask=back(w != 0),
        plan=back(plan.to(gradients.dtype)),
        objective=back(torch.tensor(objective, dtype=torch.float64)),
        quality=back(torch.tensor(quality, dtype=torch.float64)),
        n_iter=taken,
        converged=settled and not planner.missed,
    )


def cubic_sparsity(step: int, total: int, final: float, initial: float = 0.0) -> float:
    """Sparsity of a gradual pruning run: ``final + (initial - final) (1 - step / total)^3``.

    Prunes fast at first, while weights abound, and slowly in the end. Give ``1 - cubic_sparsity(...)`` to
    :func:`swap_prune` as ``keep`` at each of the steps 1 to ``total``.

    Parameters
    ----------
    step : int
        Step, at least 0; beyond ``total`` the sparsity stays ``final``.
    total : int
        Steps in all, at least 1.
    final, initial : float
        Sparsity (the part of weights that are zero) at the end and at step 0, in [0, 1].

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument out of range or of a wrong type.

    References
    ----------
    Zhu and Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression (2017).

    Examples
    --------
    >>> from shiftkern.ot.swap_prune import cubic_sparsity
    >>> [round(cubic_sparsity(i, 4, 0.8), 4) for i in range(5)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8]
    """
    op = "cubic_sparsity"
    step = _checks.integer(op, "step", step, 0)
    total = _checks.positive_int(op, "total", total)
    final = _checks.fraction(op, "final", final)
    initial = _checks.fraction(op, "initial", initial)
    return final + (initial - final) * (1.0 - min(step, total) / total) ** 3


def _kept(op: str, keep: float, size: int) -> int:
    if not isinstance(keep, bool) and hasattr(keep, "__index__") and not isinstance(keep, Tensor):
        k = _checks.positive_int(op, "keep", keep)
        if k > size:
            _checks.refuse(op, "keep", f"at most the {size} weights there are", k)
        return k
    part = _checks.positive(op, "keep", keep)
    if part > 1.0:
        _checks.refuse(op, "keep", "an integer, or a fraction in (0, 1]", part)
    return max(1, round(part * size))


def _largest(w: Tensor, k: int) -> Tensor:
    """H_k: all but the k largest magnitudes are zero."""
    kept = w.abs().topk(k).indices
    return torch.zeros_like(w).scatter(0, kept, w[kept])


class _Planner:
    """Best plans between the outputs of the dense weights and those of others."""

    def __init__(self, source: Tensor, reg: float, transport: bool, tol: float, max_iter: int) -> None:
        self.source, self.reg, self.transport = source, reg, transport
        self.tol, self.max_iter = tol, max_iter
        self.missed = 0
        self._solved: Any = None

    def best(self, target: Tensor) -> tuple[Tensor, float]:
        """Return the plan, and the part of the objective that is its entropy."""
        n = len(target)
        if not self.transport:
            return torch.eye(n, dtype=target.dtype, device=target.device) / n, 0.0
        if self.reg == math.inf:
            return target.new_full((n, n), 1.0 / n**2), 0.0
        if self.reg == 0.0:
            # On a line, a convex cost is least where order is kept.
            plan = target.new_zeros(n, n)
            plan[self.source.argsort(stable=True), target.argsort(stable=True)] = 1.0 / n
            return plan, 0.0
        costs = (self.source.unsqueeze(1) - target).square()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._solved = sinkhorn(
                None,
                None,
                costs,
                self.reg,
                tol=self.tol,
                max_iter=self.max_iter,
                warmstart=self._solved,
                grad="detach",
            )
        self.missed += not self._solved.converged
        return self._solved.plan(), n / 2 * self.reg * float(self._solved.value_kl)


def _quality(X: Tensor, w: Tensor, dense: Tensor, lam: float, source: Tensor, plan: Tensor) -> float:
    apart = (plan * (source.unsqueeze(1) - X @ w).square()).sum()
    return float(len(X) / 2 * (apart + lam * (w - dense).square().sum()))


def _slope(X: Tensor, w: Tensor, dense: Tensor, lam: float, source: Tensor, plan: Tensor) -> Tensor:
    """The gradient of Q at a fixed plan; with column sums of 1 / n it is the formula of the docstring."""
    sums = plan.sum(0)
    # What each output should be: the mean of the outputs that its column of the plan holds.
    matched = (plan.T @ source) / torch.where(sums > 0, sums, 1.0)
    return len(X) * (X.T @ (sums * (X @ w - matched)) + lam * (w - dense))
