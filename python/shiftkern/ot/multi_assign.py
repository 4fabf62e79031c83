"""Multi-SK (360): assign each sample to several anchors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["multi_assign"]


def multi_assign(
    scores: Any,
    anchors: int,
    *,
    reg: float = 0.07,
    n_iter: int = 20,
    scales: str = "two",
    marginal: Any = None,
    return_plan: bool = False,
) -> Any:
    """Spread every sample over ``anchors`` anchors by a Sinkhorn-Knopp iteration in three dimensions.

    A plan of K slices starts from ``A_mbk = exp(scale_m scores_bk / reg)``; sharper slices compete for the best
    anchors of a sample and push the others out of them. One iteration scales A so that

    1. each anchor of each slice gets its share of the samples: ``sum_b A_mbk = B marginal_k``,
    2. each sample meets each anchor once over all slices: ``sum_m A_mbk = 1``,
    3. each slice assigns each sample once: ``sum_k A_mbk = 1``.

    The result is the sum of the ``anchors`` sharpest slices, each of which picks another anchor.

    Parameters
    ----------
    scores : Tensor or numpy.ndarray
        Similarities ``(B, K)`` of B samples and K anchors, float and finite, of any size.
    anchors : int
        Number R of anchors that each sample gets, 1 to K.
    reg : float
        Temperature of the scores, > 0.
    n_iter : int
        Iterations, at least 1.
    scales : {"two", "linear"}
        "two": 1 for the R slices that are summed and 1/4 for the others. "linear": ``0.1 + 0.9 m / K`` for
        m = 1, ..., K, where the last R slices are summed.
    marginal : Tensor or numpy.ndarray, optional
        Shares ``(K,)`` of the anchors, > 0; scaled to the sum 1. Uniform by default, which is the only case in which
        all three conditions can hold at once: otherwise conditions 2 and 3 take the last word.
    return_plan : bool
        Return the plan as well.

    Returns
    -------
    assignment : Tensor or numpy.ndarray
        ``(B, K)`` in the dtype of ``scores``, not negative; rows sum to R, and entries are near to or below 1.
    plan : Tensor or numpy.ndarray
        With ``return_plan``: the slices ``(K, B, K)``, rising in sharpness.

    Raises
    ------
    ArgumentError
        No matrix, an empty one, a value that is not finite, an option out of range.
    ArgumentTypeError
        No float tensors or arrays, or a mixture of both.

    Notes
    -----
    O(n_iter B K) time and O(B K) memory with "two", as slices of one scale stay equal and only two differ; K/2 times as
    much with "linear", and O(B K^2) memory for a plan. Computed in float64 in the log domain, so that no score over-
    or underflows; the authors' code adds 1e-5 to denominators, which moves entries by up to a few percent, and replaces
    infinities. Defaults are those of the authors' training (with R = K / 2), who then rescale each row to [0, 1] by its
    least and largest entry, and who reorder a given marginal so that popular anchors get the large shares.
    Differentiable in ``scores`` and ``marginal``.

    References
    ----------
    Swetha et al.: Preserving Modality Structure Improves Multi-Modal Learning (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import multi_assign
    >>> scores = torch.tensor([[9.0, 8.0, 1.0, 0.0], [0.0, 9.0, 8.0, 1.0], [1.0, 0.0, 9.0, 8.0], [8.0, 1.0, 0.0, 9.0]])
    >>> multi_assign(scores, 2).round()
    tensor([[1., 1., 0., 0.],
            [0., 1., 1., 0.],
            [0., 0., 1., 1.],
            [1., 0., 0., 1.]])
    """
    op = "multi_assign"
    (scores, marginal), back = accept(op, scores=scores, marginal=marginal)
    _checks.tensor(op, "scores", scores, min_dim=2)
    if scores.dim() != 2 or scores.numel() == 0:
        _checks.refuse(op, "scores", "shape (B, K) with B, K >= 1", f"shape {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        _checks.refuse(op, "scores", "finite numbers", "NaN or infinity")
    samples, classes = scores.shape
    anchors = _checks.positive_int(op, "anchors", anchors)
    if anchors > classes:
        _checks.refuse(op, "anchors", f"at most the {classes} anchors there are", anchors)
    reg = _checks.positive(op, "reg", reg)
    n_iter = _checks.positive_int(op, "n_iter", n_iter)
    two = _checks.one_of(op, "scales", scales, ("two", "linear")) == "two"
    log_shares = math.log(samples) + _log_marginal(op, marginal, scores)
    return_plan = _checks.flag(op, "return_plan", return_plan)

    # Slices of one scale start equal and are treated equally: one of them stands for all.
    if two and anchors < classes:
        scale, count = [0.25, 1.0], [classes - anchors, anchors]
    elif two:
        scale, count = [1.0], [classes]
    else:
        scale, count = [0.1 + 0.9 * m / classes for m in range(1, classes + 1)], [1] * classes
    sharpness = torch.tensor(scale, dtype=torch.float64, device=scores.device)[:, None, None]
    copies = torch.tensor(count, device=scores.device)
    log_copies = copies.double().log()[:, None, None]
    # Sums run in the order of memory: one layout, one result.
    log_a = sharpness * (scores.double().contiguous() / reg)
    for _ in range(n_iter):
        log_a = log_a - log_a.logsumexp(1, keepdim=True) + log_shares
        log_a = log_a - (log_a + log_copies).logsumexp(0, keepdim=True)
        log_a = log_a - log_a.logsumexp(2, keepdim=True)
    plan = log_a.exp()
    sharpest = anchors * plan[-1] if two else plan[-anchors:].sum(0)
    assignment = back(sharpest.to(scores.dtype))
    return (assignment, back(plan.to(scores.dtype).repeat_interleave(copies, 0))) if return_plan else assignment


def _log_marginal(op: str, marginal: Tensor | None, scores: Tensor) -> Tensor:
    if marginal is None:
        return scores.new_full((), -math.log(scores.shape[1]), dtype=torch.float64)
    _checks.tensor(op, "marginal", marginal, shape=(scores.shape[1],), device=scores.device)
    if not bool((torch.isfinite(marginal) & (marginal > 0)).all()):
        _checks.refuse(op, "marginal", "finite numbers > 0", "others")
    return marginal.double().log().log_softmax(0)
