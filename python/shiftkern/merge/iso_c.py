"""Iso-C: the summed task matrix with equal singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._combine import rate, task_vectors
from shiftkern.merge._isotropic import among, kept_directions
from shiftkern.merge._states import accept_states

__all__ = ["iso_c"]


def iso_c(
    base: Any, models: Any, scale: float = 1.0, rank_tol: float | None = None, *, average: Sequence[str] = ()
) -> dict[str, Any]:
    """Merge task matrices so that all directions of their sum count alike.

    For a matrix, with the singular value decomposition ``sum_k (theta_k - base) = U S V^T``,
    ``base + scale * mean(S) U V^T``. Tensors of other ranks get the mean of the task vectors, times ``scale``.

    Parameters
    ----------
    base : dict of str to Tensor or numpy.ndarray
        State dict of the pretrained model, finite.
    models : list of dict
        Fine-tuned models, with the names and shapes of the base, finite.
    scale : float
        Factor of the merged task vector.
    rank_tol : float, optional
        Leave out the directions whose singular value is at most this share of the largest one, in [0, 1); the mean is
        over the others. Without it, all ``min(m, n)`` directions count, as in the paper: where the sum is of a lower
        rank, as that of a few low-rank updates, some of them are arbitrary.
    average : list of str
        Matrices that are averaged like tensors of other ranks.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. Merging the base with itself returns it bit for bit.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Warns
    -----
    UserWarning
        A sum lacks rank, and there is no ``rank_tol``.

    Notes
    -----
    O(m n min(m, n)) for each matrix, in torch. The nuclear norm of the sum is kept.

    References
    ----------
    Marczak et al.: No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces (2025).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import iso_c
    >>> base = {"w": torch.zeros(2, 2)}
    >>> a, b = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]])}, {"w": torch.tensor([[0.0, 0.0], [0.0, 1.0]])}
    >>> iso_c(base, [a, b])["w"].abs()
    tensor([[2., 0.],
            [0., 2.]])
    """
    op = "iso_c"
    states = accept_states(op, base, models)
    scale = _checks.number(op, "scale", scale)
    tol = None if rank_tol is None else rate(op, "rank_tol", rank_tol)
    averaged = among(op, "average", average, states)

    def flatten(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        total = torch.stack(task_vectors(op, name, origin, tensors)).sum(0)
        if total.dim() != 2 or total.numel() == 0 or name in averaged:
            return origin + scale * total / len(tensors)
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        kept = kept_directions(op, name, s, tol, total.shape)
        if not bool(kept.any()):
            return origin
        merged: Tensor = origin + scale * s[kept].mean() * (u[:, kept] @ vt[kept])
        return merged

    return states.merge(flatten)
