"""Iso-CTS: directions that tasks share and directions of their own, with equal singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._combine import rate, task_vectors
from shiftkern.merge._isotropic import among, kept_directions
from shiftkern.merge._states import accept_states

__all__ = ["iso_cts"]


def iso_cts(
    base: Any,
    models: Any,
    scale: float = 1.0,
    rank_tol: float | None = None,
    *,
    common_fraction: float = 0.8,
    average: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge task matrices so that common directions and those of single tasks count alike.

    Of ``min(m, n)`` directions of a matrix, most are the first singular vectors ``U_c, V_c`` of ``sum_k D_k`` with
    ``D_k = theta_k - base``. Each task adds as many of the first singular vectors of ``D_k - U_c U_c^T D_k``. Both sets
    of vectors are made orthonormal by their polar factors ``U, V``, and the result is
    ``base + scale * mean(S) U V^T`` with all their singular values ``S``. Tensors of other ranks get the mean of the
    task vectors, times ``scale``.

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
        over the others. Without it all directions count, as in the paper, arbitrary ones included.
    common_fraction : float
        Share of common directions, in [0, 1]; rounded so that all tasks have equally many of their own.
    average : list of str
        Matrices that are averaged like tensors of other ranks.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind, order and dtypes of the base; float32 inside (float64 for float64), rounded once. Integer and
        boolean tensors are those of the base. Merging the base with itself returns it bit for bit; with
        ``common_fraction=1``, or one model, it is :func:`iso_c`.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, an option out of range, an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Warns
    -----
    UserWarning
        Task vectors lack rank, and there is no ``rank_tol``.

    Notes
    -----
    O(K m n min(m, n)) for each matrix, in torch.

    References
    ----------
    Marczak et al.: No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces (2025).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import iso_cts
    >>> base = {"w": torch.zeros(2, 2)}
    >>> a, b = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]])}, {"w": torch.tensor([[0.0, 0.0], [0.0, 1.0]])}
    >>> iso_cts(base, [a, b])["w"].abs()
    tensor([[2., 0.],
            [0., 2.]])
    """
    op = "iso_cts"
    states = accept_states(op, base, models)
    scale = _checks.number(op, "scale", scale)
    tol = None if rank_tol is None else rate(op, "rank_tol", rank_tol)
    common_fraction = _checks.fraction(op, "common_fraction", common_fraction)
    averaged = among(op, "average", average, states)

    def flatten(name: str, origin: Tensor, tensors: list[Tensor]) -> Tensor:
        deltas = task_vectors(op, name, origin, tensors)
        total = torch.stack(deltas).sum(0)
        if total.dim() != 2 or total.numel() == 0 or name in averaged:
            return origin + scale * total / len(tensors)
        rank, count = min(total.shape), len(deltas)
        own = min(math.floor((rank - math.floor(common_fraction * rank)) / count + 0.5), rank // count)
        u, s, vt = (part[..., : rank - own * count] for part in _svd(total))
        parts = [(u, s, vt)]
        for delta in deltas if own else []:
            a, b, c = _svd(delta - u @ (u.mT @ delta))
            parts.append((a[:, :own], b[:own], c[:, :own]))
        lefts, values, rights = (torch.cat(pieces, -1) for pieces in zip(*parts, strict=True))
        kept = kept_directions(op, name, values, tol, total.shape)
        if not bool(kept.any()):
            return origin
        polar = _polar(lefts[:, kept]) @ _polar(rights[:, kept]).mT
        return origin + scale * values[kept].mean() * polar

    return states.merge(flatten)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors in columns on both sides."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt.mT


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    u, _, v = _svd(matrix)
    return u @ v.mT
