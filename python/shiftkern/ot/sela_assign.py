"""SeLa (400): label all samples at once, with classes of equal size."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern.errors import ConvergenceWarning
from shiftkern.ot.sinkhorn import sinkhorn

__all__ = ["sela_assign"]


def sela_assign(log_probs: Any, lam: float, tol: float = 0.1, *, max_iter: int = 1000) -> tuple[Any, Any]:
    """Self-labels: the transport plan between samples and equally filled classes that costs least.

    ``Q = diag(c) P^lam diag(r)`` with marginals ``1 / N`` of the samples and ``1 / K`` of the classes: the entropic
    plan of the cost ``-log_probs`` at ``reg = 1 / lam``. The labels are the largest entries of its rows.

    Parameters
    ----------
    log_probs : Tensor or numpy.ndarray
        Logarithms of class probabilities, ``(N, K)``, float and finite; rows need not be normalised.
    lam : float
        Sharpness, > 0; the authors take 25. The larger, the closer to a linear programme, and the slower.
    tol : float
        The authors' stopping rule, > 0: ``sum_i |c_i / c_i' - 1|`` over the samples, with c' the update of c. As all
        samples weigh ``1 / N``, this is ``N`` times the L1 error of their marginal.
    max_iter : int
        Most iterations (each updates r and c), at least 1.

    Returns
    -------
    Q : Tensor or numpy.ndarray
        ``(N, K)`` in the dtype of ``log_probs``, summing to 1 over all entries. Not differentiable.
    labels : Tensor or numpy.ndarray
        ``(N,)``, int64.

    Raises
    ------
    ArgumentError
        No matrix, an empty one, NaN or infinity, an option out of range.
    ArgumentTypeError
        No float tensor or array.

    Warns
    -----
    ConvergenceWarning
        ``max_iter`` iterations were not enough.

    Notes
    -----
    O(N K) per iteration and O(N K) memory. As in the authors' code classes are updated before samples, starting from
    equal c; iterations here are float64 in the log domain, so that no probability is too small, and the rule is tested
    after each of them instead of each tenth.

    References
    ----------
    Asano, Rupprecht and Vedaldi: Self-labelling via simultaneous clustering and representation learning (2020).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sela_assign
    >>> log_probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]).log()
    >>> sela_assign(log_probs, 25.0)[1].tolist()
    [0, 0, 1, 1]
    """
    op = "sela_assign"
    (log_probs,), back = accept(op, log_probs=log_probs)
    _checks.tensor(op, "log_probs", log_probs, min_dim=2)
    if log_probs.dim() != 2 or log_probs.numel() == 0:
        _checks.refuse(op, "log_probs", "shape (N, K) with N, K >= 1", f"shape {tuple(log_probs.shape)}")
    if not bool(torch.isfinite(log_probs).all()):
        _checks.refuse(op, "log_probs", "finite numbers", "NaN or infinity")
    lam = _checks.positive(op, "lam", lam)
    tol = _checks.positive(op, "tol", tol)
    max_iter = _checks.positive_int(op, "max_iter", max_iter)
    samples = log_probs.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solved = sinkhorn(
            None,
            None,
            -log_probs.detach().double(),
            1.0 / lam,
            tol=tol / samples,
            max_iter=max_iter,
            update_order="gf",
            grad="detach",
        )
    if not solved.converged:
        message = f"{op}: the samples' scalings still moved by more than tol={tol} after {solved.n_iter} iterations"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    plan = solved.plan()
    return back(plan.to(log_probs.dtype)), back(plan.argmax(1))
