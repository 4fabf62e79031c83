"""Balanced assignment of samples to prototypes, as in self-supervised clustering."""

from __future__ import annotations

from typing import Any

import torch

from shiftkern import _checks
from shiftkern._crossing import accept
from shiftkern._ops import ot as ops

__all__ = ["sinkhorn_assign"]

_MOST_ROUNDS = 1_000_000


def sinkhorn_assign(scores: Any, reg: float = 0.05, n_iter: int = 3, *, hard: bool = False) -> Any:
    """Assign samples to prototypes so that every prototype gets the same share.

    ``n_iter`` rounds of Sinkhorn-Knopp on ``exp(scores / reg)`` in the order of SwAV and DINO: first the prototypes are
    scaled to equal totals, then the samples. In the log domain: the published code subtracts maxima, which
    at three rounds changes the answer, or overflows; this is the same iteration for scores of any size.

    Parameters
    ----------
    scores : Tensor or numpy.ndarray
        Similarities ``(N, K)`` of samples and prototypes, finite, float32 or float64 (half precision is computed in
        float32).
    reg : float
        Temperature, > 0.
    n_iter : int
        Rounds, from 1 to 1000000. The samples' totals are exact after each, the prototypes' only in the limit.
    hard : bool
        Return labels instead of assignments.

    Returns
    -------
    Tensor or numpy.ndarray
        Assignments ``(N, K)`` whose rows sum to one, or with ``hard`` int64 labels ``(N,)``. Not differentiable.

    Raises
    ------
    ArgumentError
        Not a matrix, empty, values that are not finite, an option out of range.
    ArgumentTypeError
        No float tensor or array.

    Notes
    -----
    O(N K n_iter), one power per cell and round, no memory but the result. On several processes assign the gathered
    scores.

    References
    ----------
    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sinkhorn_assign
    >>> scores = torch.tensor([[500.0, 499.0], [500.0, 480.0], [500.0, 495.0], [500.0, 400.0]])
    >>> sinkhorn_assign(scores, reg=5.0, n_iter=10, hard=True)
    tensor([1, 0, 1, 0])
    """
    op = "sinkhorn_assign"
    (scores,), back = accept(op, scores=scores)
    scores = _checks.tensor(op, "scores", scores)
    if scores.is_meta:
        _checks.refuse(op, "scores", "a tensor with data", "one on the meta device")
    if scores.dim() != 2 or scores.numel() == 0:
        _checks.refuse(op, "scores", "shape (N, K), not empty", f"shape {tuple(scores.shape)}")
    reg = _checks.positive(op, "reg", reg)
    n_iter = _checks.positive_int(op, "n_iter", n_iter)
    if n_iter > _MOST_ROUNDS:
        _checks.refuse(op, "n_iter", f"at most {_MOST_ROUNDS}", n_iter)
    _checks.flag(op, "hard", hard)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    assigned = ops.sinkhorn_assign(wide, reg, n_iter)
    return back(assigned.argmax(1) if hard else assigned)
